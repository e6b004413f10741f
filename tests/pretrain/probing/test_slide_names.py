"""What names say of slides: read coarsely, and never more surely than they say it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pretrain.probing.grouping import Groups
from pretrain.probing.slide_names import by_name

FOLDER = Path("set")
Name = Callable[[str, int, int], str]
"""From a class, a slide and a tile's number the path of a tile below its class."""


def read(
    name: Name, slides: int = 10, classes: tuple[str, ...] = ("AC", "H"), tiles: int = 100
) -> tuple[Groups | None, np.ndarray]:
    """What names say of tiles of slides that are each in every class, and of which slide each is."""
    made = [(klass, number % slides, number) for klass in classes for number in range(tiles)]
    return by_name([FOLDER / one[0] / name(*one) for one in made], FOLDER), np.array([slide for _, slide, _ in made])


def keeps_slides_together(groups: Groups, slides: np.ndarray) -> bool:
    return all(len(np.unique(groups.of[slides == slide])) == 1 for slide in np.unique(slides))


TOLD: dict[str, Name] = {
    "TCGA's codes": lambda c, s, i: f"TCGA-AA-{3000 + s}-01Z-00-DX1_{224 * i}_{i}.jpg",
    "TCGA's codes in small letters": lambda c, s, i: f"tcga-aa-{3000 + s}-01z-00-dx1.{i}.jpg",
    "CPTAC's codes": lambda c, s, i: f"C3L-{s:05d}-21.{i}.jpg",
    "x and y": lambda c, s, i: f"case{s}_{224 * i}_{i}.jpg",
    "x, y and size": lambda c, s, i: f"case{s}_{224 * i}_{224 * (i // 10)}_256.jpg",
    "x, y, width and height": lambda c, s, i: f"case{s}_{224 * i}_{i}_256_256.jpg",
    "x, y and a size that is smaller at edges": lambda c, s, i: f"case{s}_{224 * i}_{i}_{256 - i % 3}.jpg",
    "x, y and level": lambda c, s, i: f"case{s}_{224 * i}_{i}_L0.jpg",
    "histolab's": lambda c, s, i: f"case{s}_tile_{i}_level0_{i}-{2 * i}-{i + 224}-{2 * i + 224}.png",
    "QuPath's": lambda c, s, i: f"case{s} [x={224 * i},y={i},w=224,h=224].png",
    "a number": lambda c, s, i: f"case{s}_{i}.jpg",
    "a date": lambda c, s, i: f"case{s}_2019-{1 + i % 12:02d}-{1 + i % 28:02d}.jpg",
    "a copy's number": lambda c, s, i: f"case{s}_{224 * i}_{i} (1).jpg",
    "the class before the slide": lambda c, s, i: f"{c}_case{s}_{224 * i}_{i}.jpg",
    "the class by another name": lambda c, s, i: f"{c.lower()}x_case{s}_{224 * i}_{i}.jpg",
    "the class at the end": lambda c, s, i: f"{8800 + s}_idx5_x{224 * i}_y{i}_class{int(c == 'H')}.png",
    "the tile before the slide": lambda c, s, i: f"{i}_case{s}.png",
    "a patient's slides": lambda c, s, i: f"patient{s}_slide{i // 10}_{224 * i}_{i}.jpg",
    "a patient's number behind the word": lambda c, s, i: f"patient_{s:03d}_node_{i % 4}_x_{224 * i}_y_{i}.png",
    "a folder": lambda c, s, i: f"case{s}/{i}.jpg",
    "a folder, and a name that says nothing": lambda c, s, i: f"case{s}/t_{224 * i}_{i}_256.png",
    "a slide's folder with one for each magnification": lambda c, s, i: f"case{s}/{10 + 10 * (i % 20 < 10)}x/{i}.jpg",
    "a magnification's folder with one for each slide": lambda c, s, i: f"{10 + 10 * (i % 20 < 10)}x/case{s}/{i}.jpg",
    "a folder for each slide and magnification": lambda c, s, i: f"case{s}_{10 + 10 * (i % 20 < 10)}x/{i}.jpg",
    "a patient's folder with one for each slide": lambda c, s, i: f"patient{s}/slide{i // 10}/{i}.jpg",
    "a folder for a patient's slide": lambda c, s, i: f"patient{s}-slide{i // 10}/{i}.jpg",
    "a part's folder": lambda c, s, i: f"train/case{s}/tiles/{i}.jpg",
    "a region of a slide": lambda c, s, i: f"case{s}_annotation{i % 4}_{i}.png",
    "a contour of a slide": lambda c, s, i: f"case{s}_contour{i % 4}_{224 * i}_{i}.png",
    "a slide and a region in one word": lambda c, s, i: f"S{s}R{i % 4}_{i}.png",
    "a side of a slide": lambda c, s, i: f"case{s}_{('top', 'bottom')[i % 20 < 10]}_{224 * i}_{i}.png",
    "a block of a case": lambda c, s, i: f"S17-{1000 + s}-{'AB'[i % 20 < 10]}{i % 3}_{224 * i}_{i}.png",
    "a region's folder in a slide's": lambda c, s, i: f"S{s}/roi{i % 4}/{i}.png",
    "a slide's file in the name": lambda c, s, i: f"{149 + s}-B1-{c}.ndpi_ROI__reg00{i % 3}_crop_sk0000{i}_({i},{i},9,9).png",
    "a slide's file as a folder": lambda c, s, i: f"{('HE', 'ER')[i % 20 < 10]}/case {s}.svs/{i}.png",
    "a UUID": lambda c, s, i: f"{s:08x}-e29b-41d4-a716-446655440000_{224 * i}_{i}.png",
    "a folder of the class": lambda c, s, i: f"{c}_tiles/case{s}/{i}.jpg",
}  # fmt: skip


@pytest.mark.parametrize("kind", TOLD)
def test_a_slide_that_names_tell_is_kept_together_and_known(kind: str) -> None:
    groups, slides = read(TOLD[kind])
    assert groups is not None and groups.known
    assert keeps_slides_together(groups, slides) and groups.of.max() + 1 == 10


SILENT: dict[str, Name] = {
    "numbers": lambda c, s, i: f"{i}.jpg",
    "a place": lambda c, s, i: f"{224 * (i % 10)}_{224 * (i // 10)}.jpg",
    "two corners": lambda c, s, i: f"{i % 10}-{i // 10}-{i % 10 + 224}-{i // 10 + 224}.jpg",
    "a word and a place": lambda c, s, i: f"tile_{i % 10}_{i // 10}.jpg",
    "an image's number and a date": lambda c, s, i: f"img{i}_{2015 + i % 5}-{1 + s:02d}-{1 + i % 28:02d}.jpg",
    "the class and numbers": lambda c, s, i: f"{'tumour' if c == 'AC' else 'normal'}_{s}_{i}.jpg",
    "the class and a number": lambda c, s, i: f"image_{c}_{i}.jpg",
    "a name of its own for each": lambda c, s, i: f"{c}-{'ABCDEFGHIJ'[i // 10]}{'ABCDEFGHIJ'[i % 10]}QX.tif",
    "magnifications": lambda c, s, i: f"{10 + 10 * (i % 2)}x/{i}.jpg",
    "levels": lambda c, s, i: f"level{i % 2}/{i}.jpg",
    "folders of words": lambda c, s, i: f"images/tiles/{i}.jpg",
}  # fmt: skip


@pytest.mark.parametrize("kind", SILENT)
def test_names_of_places_classes_magnifications_and_numbers_tell_no_slides(kind: str) -> None:
    assert read(SILENT[kind])[0] is None


GUESSED: dict[str, Name] = {
    "a bare number before a place": lambda c, s, i: f"{8800 + s}_{224 * i}_{i}.jpg",
    "two folders of which nothing is known": lambda c, s, i: f"{('sharp', 'soft')[i % 20 < 10]}/{i}.jpg",
    "folders that cut across names": lambda c, s, i: f"shelf{i // 25}/case{s}_{i}.jpg",
    "one name that says nothing among others": lambda c, s, i: f"TCGA-AA-{3000 + s}-01Z.{i}.jpg" if i else "extra.jpg",
}  # fmt: skip


CROSSING: dict[str, Name] = {
    "stains over slides": lambda c, s, i: f"{('HE', 'KI67', 'PR', 'ER')[i // 10 % 4]}/S{s}/{i}.png",
    "experts over slides": lambda c, s, i: f"expert{i // 10 % 4}/S{s}/{i}.png",
    "years over slides": lambda c, s, i: f"{2015 + i // 10 % 4}/S{s}/{i}.png",
    "what was done before a slide": lambda c, s, i: f"{('orig', 'blur')[i // 10 % 2]}_S{s}_{i}.png",
    "what was done behind a slide": lambda c, s, i: f"S{s}_piece{i // 10 % 2}_{i}.png",
    "scanners over names of slides": lambda c, s, i: f"{('aperio', 'leica')[i // 10 % 2]}/S{s}_{i}.png",
}  # fmt: skip


@pytest.mark.parametrize("kind", CROSSING)
def test_an_inner_name_that_comes_again_in_outer_ones_is_kept_together_with_them_and_is_never_known(kind: str) -> None:
    groups, slides = read(CROSSING[kind])
    assert groups is None or (not groups.known and keeps_slides_together(groups, slides))


def test_slides_of_stains_that_share_a_few_slides_are_kept_together_as_either_says() -> None:
    groups, slides = read(lambda c, s, i: f"{('HE0', 'ER1', 'PR2', 'KI3')[s % 4 if i else 1]}/S{s}/{i}.png", slides=8)
    assert groups is not None and not groups.known and keeps_slides_together(groups, slides)
    assert groups.of.max() + 1 == 3 and "'s0' comes again in others" in groups.how


@pytest.mark.parametrize("kind", GUESSED)
def test_a_reading_that_may_be_wrong_is_a_guess(kind: str) -> None:
    groups, _ = read(GUESSED[kind])
    assert groups is not None and not groups.known


def test_one_name_that_says_nothing_leaves_the_others_their_patients() -> None:
    groups, slides = read(GUESSED["one name that says nothing among others"])
    assert groups is not None and "2 images whose names say none are kept together" in groups.how
    named = np.arange(len(slides)) % 100 > 0
    assert all(len(np.unique(groups.of[named & (slides == slide)])) == 1 for slide in range(10))
    assert groups.of.max() + 1 == 11


def test_what_is_kept_together_either_way_stays_so_where_folders_cut_across_names() -> None:
    groups, slides = read(lambda c, s, i: f"shelf{s // 2}/case{s if i < 90 else 9 - s}_{i}.jpg", slides=10)
    assert groups is not None and keeps_slides_together(groups, slides // 2)
    assert "by their folders" in groups.how and "by the names" in groups.how


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("x and y", "slides, by the names: 'case0_0_0.jpg' is of 'case0'"),
        ("a folder", "slides, by their folders: 'case0/0.jpg' is of 'case0'"),
        ("TCGA's codes", "patients, by the names: 'TCGA-AA-3000-01Z-00-DX1_0_0.jpg' is of 'TCGA-AA-3000'"),
    ],
)
def test_the_words_show_how_a_name_was_read(kind: str, words: str) -> None:
    groups, _ = read(TOLD[kind])
    assert groups is not None and groups.how == words
