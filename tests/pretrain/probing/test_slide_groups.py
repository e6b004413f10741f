"""Splits that keep tiles of one slide together, by what is known of them or by their likeness."""

from pathlib import Path

import numpy as np
import pytest
from openslide import OpenSlide
from PIL import Image

from data.fault import Fault
from data.keyed import rng
from pretrain.commands.probe import Config, run
from pretrain.probing import slide_groups, splits
from pretrain.probing.images import LabelledImages, read_class_folders, read_image
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
    groups = slide_groups.groups_of(images.files, folder, None, map(read_image, images.files))
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
    groups = slide_groups.by_likeness(tiles, len(tiles)).of
    purity = sum(np.bincount(np.array(own)[groups == group]).max() for group in np.unique(groups)) / len(own)
    assert purity > 0.8


@pytest.mark.parametrize(
    ("names", "how", "groups"),
    [
        (["TCGA-AB-1234-01A_x.png", "TCGA-AB-1234-02B.png", "TCGA-CD-9999-01.png"], "TCGA's patients", [0, 0, 1]),
        (["s1_0_224.png", "s1_224_0.png", "a-b_x10_y20.png"], "slides, by the names", [1, 1, 0]),
        (["one/1.png", "one/2.png", "two/1.png"], "slides, by their folders", [0, 0, 1]),
        (["image_1.png", "image_2.png", "s_1_2.png"], None, None),
    ],
)
def test_names_tell_patients_and_slides_only_where_all_of_them_do(
    names: list[str], how: str | None, groups: list[int] | None
) -> None:
    found = slide_groups.by_name([Path("set/class") / name for name in names], Path("set"))
    if how is None:
        assert found is None
    else:
        assert found is not None and found.known and how in found.how and found.of.tolist() == groups


def test_a_table_tells_by_path_or_name_and_names_what_it_lacks(tmp_path: Path) -> None:
    files = [tmp_path / "a" / "1.png", tmp_path / "b" / "2.png"]
    (tmp_path / "slides.csv").write_text("\ufefffile,slide,patient\na/1.png,s1,p\n2.png,s2,p\n")
    found = slide_groups.by_table(files, tmp_path, tmp_path / "slides.csv")
    assert found.of.tolist() == [0, 0] and found.how == "patients of slides.csv"
    (tmp_path / "slides.csv").write_text("file,slide\na/1.png,s1\n")
    with pytest.raises(Fault, match=r"says no slide of 1 of 2 images, the first is .*2\.png"):
        slide_groups.by_table(files, tmp_path, tmp_path / "slides.csv")
    (tmp_path / "slides.csv").write_text("name,slide\na/1.png,s1\n")
    with pytest.raises(Fault, match="has the columns name, slide: it needs file, and patient or slide"):
        slide_groups.by_table(files, tmp_path, tmp_path / "slides.csv")


def test_a_class_of_one_group_cannot_be_split_by_groups(tmp_path: Path) -> None:
    images = read_class_folders(write_class_folders(tmp_path / "set", {"a": 6, "b": 6}))
    assert splits.grouped_split(images, np.array([0] * 6 + [1, 1, 1, 2, 2, 2]), 0.5, 0) is None
    split = splits.grouped_split(images, np.array([0, 0, 0, 1, 1, 1] * 2), 0.5, 0)
    assert split is not None and len(split[0]) == len(split[1]) == 6
    assert (split[1] % 6 // 3).std() == 0


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


@pytest.mark.parametrize(
    ("names", "how"),
    [
        (["a/s0/tile_0_0.jpg", "a/s1/tile_0_1.jpg", "b/s2/tile_0_0.jpg"], "slides, by their folders"),
        (["a/images/1.jpg", "b/images/2.jpg"], None),
        (["a/a_1_1.jpg", "b/b_2_1.jpg"], None),
    ],
)
def test_names_that_are_one_for_all_or_the_class_again_tell_no_slides(names: list[str], how: str | None) -> None:
    found = slide_groups.by_name([Path("set") / name for name in names], Path("set"))
    assert found.how == how if found else how is None
