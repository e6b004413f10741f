"""Splits that keep tiles of one slide together, by what is known of them or by their likeness."""

from pathlib import Path

import numpy as np
import pytest
import torch
from openslide import OpenSlide
from PIL import Image

from data.keyed import rng
from pretrain.commands.probe import Config, run
from pretrain.encoders.preprocessing import Preprocessing
from pretrain.probing import likeness, slide_groups, splits
from pretrain.probing.grouping import Groups
from pretrain.probing.images import LabelledImages, read_class_folders, read_image
from pretrain.training.probe_set import ProbeSet
from tests.pretrain.probing.test_probing import write_class_folders


def tile(slide: int, klass: int, number: int) -> np.ndarray:
    """Nuclei in two stains whose colours are the slide's; their number is the class's."""
    draw = rng(slide, klass, number)
    tint = rng(slide, "stains").uniform(-0.12, 0.12, (2, 3))
    stains = np.array([[0.65, 0.70, 0.29], [0.25, 0.75, 0.45]]) + tint
    down, right = np.mgrid[0:64, 0:64]
    nuclei = sum(
        ((down - y) ** 2 + (right - x) ** 2 < 25).astype(float) for y, x in draw.uniform(0, 64, (6 + 12 * klass, 2))
    )
    amount = np.stack([0.1 + nuclei.clip(0, 1), 0.5 + 0.2 * draw.random((64, 64))], -1)
    glass = 245 - rng(slide, "glass").uniform(0, 20, 3)
    return (glass * np.exp(-amount @ stains) + draw.normal(0, 1, (64, 64, 3))).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def of_slides(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[Path, int]]:
    """Tiles of two classes from 20 slides, each of them mostly of one class, and of which slide each is. Their names
    say nothing."""
    folder, slides = tmp_path_factory.mktemp("of_slides"), {}
    number = 0
    for slide in range(20):
        for i in range(12):
            klass = (slide + (i % 4 == 0)) % 2
            path = folder / "ab"[klass] / f"{rng(0, number).integers(1 << 40)}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(tile(slide, klass, number)).save(path)
            slides[path] = slide
            number += 1
    return folder, slides


def shared_slides(images: LabelledImages, slides: dict[Path, int], split: tuple[np.ndarray, np.ndarray]) -> float:
    """The share of test images whose slide is among the training images."""
    train, test = ([slides[images.files[i]] for i in part] for part in split)
    return float(np.isin(test, train).mean())


def test_groups_by_likeness_keep_most_tiles_of_a_slide_on_one_side(of_slides: tuple[Path, dict[Path, int]]) -> None:
    folder, slides = of_slides
    images = read_class_folders(folder)
    groups = slide_groups.groups_of(images.files, folder, None, lambda: map(read_image, images.files))
    assert not groups.known and "likely one slide" in groups.how
    own = np.array([slides[path] for path in images.files])
    assert np.mean([np.bincount(groups.of[own == slide]).max() / 12 for slide in range(20)]) > 0.8
    for seed in range(3):
        split = splits.grouped_split(images, groups.of, 0.25, seed)
        assert split is not None and sorted(np.concatenate(split)) == list(range(len(images.files)))
        assert shared_slides(images, slides, split) < 0.25
        assert 0.15 < len(split[1]) / len(images.files) < 0.35


def test_on_real_slides_groups_by_likeness_are_of_few_slides_each(shared: Path) -> None:
    tiles, own = [], []
    for number, path in enumerate(sorted((shared / "slides" / "regions").glob("*.tiff"))):
        region = np.asarray(OpenSlide(path).read_region((0, 0), 0, (960, 960)).convert("RGB"))
        for y in range(0, 960, 160):
            for x in range(0, 960, 160):
                tiles.append(region[y : y + 160, x : x + 160])
                own.append(number)
    groups = likeness.by_likeness(tiles, len(tiles)).of
    purity = sum(np.bincount(np.array(own)[groups == group]).max() for group in np.unique(groups)) / len(own)
    assert purity > 0.8


def split_classes(images: LabelledImages, split: splits.GroupSplit, label: int) -> tuple[int, int]:
    """How many images of a class are for training, and how many for testing."""
    return tuple(int((images.labels[part] == label).sum()) for part in (split.train, split.test))  # type: ignore[return-value]


def test_a_class_of_one_group_cannot_be_split_by_groups(tmp_path: Path) -> None:
    images = read_class_folders(write_class_folders(tmp_path / "set", {"a": 6, "b": 6}))
    assert splits.grouped_split(images, np.array([0] * 6 + [1, 1, 1, 2, 2, 2]), 0.5, 0) is None
    split = splits.grouped_split(images, np.array([0, 0, 0, 1, 1, 1] * 2), 0.5, 0)
    assert split is not None and len(split[0]) == len(split[1]) == 6
    assert (split[1] % 6 // 3).std() == 0


def test_a_class_of_one_patient_is_split_inside_it_and_named_and_the_others_keep_their_groups(tmp_path: Path) -> None:
    images = read_class_folders(write_class_folders(tmp_path / "set", {"a": 40, "b": 40, "rare": 5}))
    patients = np.array([*(np.arange(80) % 8), *([3] * 5)])
    split = splits.group_split(images, Groups(patients, "patients of t.csv", known=True), 0.25, seed=0)
    assert split.inside == ["rare"] and split_classes(images, split, 2) == (4, 1)
    common = [part[images.labels[part] < 2] for part in (split.train, split.test)]
    assert not set(patients[common[0]]) & set(patients[common[1]]) and len(common[1]) == 20
    assert split.kind == "other slides but for class rare"
    assert "class rare can't be on both sides by these, and is split at random" in split.how


def test_a_few_classes_that_cannot_be_on_both_sides_do_not_undo_what_is_known_and_most_of_them_do(
    tmp_path: Path,
) -> None:
    images = read_class_folders(write_class_folders(tmp_path / "set", {"a": 24, "b": 24, "c": 24}))
    number = np.arange(24) % 6
    one_alone = Groups(np.concatenate([number, number, number * 0]), "known", known=True)
    two_alone = Groups(np.concatenate([number, number * 0, number * 0 + 1]), "known", known=True)
    all_alone = Groups(np.concatenate([number * 0, number * 0, number * 0 + 1]), "known", known=True)
    guess = Groups(np.concatenate([number, number, number]), "guess", known=False)

    def chosen(*groupings: Groups) -> tuple[str, list[str]] | None:
        found = splits.best_group_split(images, groupings, 0.25, seed=0)
        return found and (found.groups.how, found.inside)

    assert chosen(one_alone, guess) == ("known", ["c"])
    assert chosen(two_alone, guess) == ("guess", [])
    assert chosen(two_alone) == ("known", ["b", "c"])
    assert chosen(all_alone) is None


def test_names_that_cannot_split_any_class_are_followed_by_likeness(
    of_slides: tuple[Path, dict[Path, int]], tmp_path: Path
) -> None:
    folder, _ = of_slides
    for number, path in enumerate(sorted(folder.rglob("*.png"))):
        place = tmp_path / path.parent.name / f"S19-1000_{number}.png"
        place.parent.mkdir(exist_ok=True)
        place.symlink_to(path)
    own = splits.own_split(read_class_folders(tmp_path), None, 0.2, 0, threads=1, ahead=4)
    assert own.words.startswith("likely other slides: ") and "by glass, stains and texture" in own.words


def test_near_duplicates_are_of_one_group_turned_mirrored_and_compressed_too(
    of_slides: tuple[Path, dict[Path, int]],
) -> None:
    folder, _ = of_slides
    tiles = [read_image(path) for path in sorted(folder.rglob("*.png"))[:60]]
    draw = rng(0, "duplicates")
    copies = []
    for number, one in enumerate(tiles):
        copy = np.rot90(one, number % 4)[:, :: 1 - 2 * (number // 4 % 2)].astype(np.float64)
        copies.append((copy + draw.normal(0, 2, copy.shape) + 10 * (number % 3)).clip(0, 255).astype(np.uint8))
    groups = likeness.by_likeness(tiles + copies, 120)
    assert (groups.of[:60] == groups.of[60:]).all() and "60 near duplicates" in groups.how
    alike = likeness.near_duplicates(np.stack([likeness.thumbnail_of(one) for one in tiles + copies]), chunk=7)
    assert (alike[:60] == alike[60:]).all() and len(set(alike.tolist())) == 60


def test_blank_tiles_are_no_duplicates() -> None:
    draw = rng(0, "blank")
    blank = [(240 + draw.normal(0, 1, (64, 64, 3))).clip(0, 255).astype(np.uint8) for _ in range(4)]
    assert not np.stack([likeness.thumbnail_of(one) for one in blank]).any()
    assert len(set(likeness.near_duplicates(np.zeros((4, 256))).tolist())) == 4


def test_the_five_turned_copies_among_the_colorectal_tiles_are_found(shared: Path) -> None:
    files = sorted(path for name in ("H", "T") for path in (shared / "tiles" / "crc5" / name).glob("*.jpg"))
    alike = likeness.near_duplicates(np.stack([likeness.thumbnail_of(read_image(path)) for path in files]))
    numbers = [
        sorted(files[i].stem for i in np.flatnonzero(alike == one)) for one in np.flatnonzero(np.bincount(alike) > 1)
    ]
    assert len(numbers) == 5 and ["image_T_504", "image_T_584"] in numbers


def test_the_probe_splits_by_slides_and_warns_where_colour_recognises_them(
    of_slides: tuple[Path, dict[Path, int]], make_tile_run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, slides = of_slides
    run_folder, _ = make_tile_run()
    table = tmp_path / "slides.csv"
    table.write_text("file,slide\n" + "".join(f"{path.name},{slide}\n" for path, slide in slides.items()))
    config = Config(str(run_folder), str(folder), None, None, str(table), 0.25, 0, 32, 2, "cpu", "float32", [])
    run(config)
    said = capsys.readouterr().out
    assert "other slides: 0.25 held out by slides of slides.csv, seed 0" in said and "a guess" not in said
    assert "beware: with tiles of the same slides on both sides the colour histogram reaches" in said


def changed_copies(one: np.ndarray) -> dict[str, np.ndarray]:
    """A tile, and what augmentation makes of it."""
    softer = (one.astype(np.float64) + np.roll(one, 1, 0) + np.roll(one, 1, 1)) / 3
    stained = (255 * (one / 255) ** np.array([1.3, 1.0, 0.8])).astype(np.uint8)
    return {"orig": one, "blur": softer.astype(np.uint8), "stain": stained, "mirror": one[:, ::-1]}


@pytest.mark.parametrize("name", ["{kind}7/{number}", "{kind}_S{slide}_{number}"])
def test_copies_of_a_tile_stay_on_one_side_whatever_their_names_say_and_the_split_is_a_guess(
    name: str, of_slides: tuple[Path, dict[Path, int]], tmp_path: Path
) -> None:
    files = sorted(of_slides[0].rglob("*.png"))[::10]
    original = {}
    for number, path in enumerate(files):
        for kind, pixels in changed_copies(read_image(path)).items():
            place = tmp_path / path.parent.name / f"{name.format(kind=kind, number=number, slide=number % 5)}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(place)
            original[place] = number
    own = splits.own_split(read_class_folders(tmp_path), None, 0.25, 0, threads=1, ahead=4)
    assert own.words.startswith("likely other slides: ")
    assert not {original[path] for path in own.train.files} & {original[path] for path in own.test.files}
    asked = ProbeSet(tmp_path, 1000)
    assert asked.load(Preprocessing(16, 16, (0.5,) * 3, (0.5,) * 3), 0, 1, torch.device("cpu")).startswith("likely")
    one, other = ({original[asked.set.files[i]] for i in side} for side in asked.across[0])
    assert not one & other


def test_one_pair_of_copies_joins_two_slides_and_leaves_the_others_known(tmp_path: Path) -> None:
    draw = rng(0, "pair")
    thumbnails = np.stack([likeness.thumbnail_of(draw.integers(0, 255, (16, 16, 3), np.uint8)) for _ in range(200)])
    named = Groups(np.arange(200) % 10, "slides", known=True)
    assert likeness.with_copies(named, thumbnails) is named
    thumbnails[7] = thumbnails[3]
    found = likeness.with_copies(named, thumbnails)
    assert found.known and found.of.max() + 1 == 9 and len(np.unique(found.of[[3, 7]])) == 1
    assert found.how == "slides; 1 near duplicates with what they resemble in other groups"
