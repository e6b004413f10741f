"""Which cells of a slide become tiles, and how that is written down for others to read."""

from pathlib import Path

import h5py
import numpy as np
import pytest

from data.fault import Fault
from data.slides.coordinates import plan_grid
from data.slides.coordinates_h5 import coordinates_path, read_coordinates_h5, read_tiling, write_tiling
from data.slides.reading import Slide
from data.slides.tiling import BACKGROUND, KEPT, PEN, Tiling, TilingSettings, downsample_for, tile_slide
from data.slides.tissue import TISSUE_RULES, tissue_needed
from tests.data.slides.synthetic_slides import stained, write_slide

SETTINGS = TilingSettings(mpp=0.5, tile_size=64, tissue=tissue_needed(["otsu"], [0.25]))


def tiled(
    path: Path, image: np.ndarray, mpp: float = 0.5, settings: TilingSettings = SETTINGS
) -> tuple[Tiling, np.ndarray]:
    with Slide(write_slide(path, image, mpp)) as slide:
        return tile_slide(slide, path.stem, settings, None, "TCGA-[A-Z0-9]{2}-[A-Z0-9]{4}")


def test_the_disc_is_kept_and_the_glass_is_not(tmp_path: Path) -> None:
    tiling, thumbnail = tiled(tmp_path / "TCGA-AB-1234-01.tiff", stained(650, 900, [(200, 300, 150)]))
    assert tiling.verdict.shape == (10, 14)
    assert tiling.patient == "TCGA-AB-1234"
    rows, columns = np.mgrid[:640, :896]
    disc = (columns - 200) ** 2 + (rows - 300) ** 2 < 150**2
    truth = disc.reshape(10, 64, 14, 64).mean(axis=(1, 3))
    np.testing.assert_allclose(tiling.tissue, truth, atol=0.12)
    sure = abs(truth - 0.25) > 0.12
    np.testing.assert_array_equal((tiling.verdict == KEPT)[sure], (truth >= 0.25)[sure])
    x, y, share = tiling.tiles(KEPT)
    assert (share >= 0.25).all()
    assert np.lexsort((x, y)).tolist() == list(range(len(x))), "row-major"
    assert thumbnail.shape == (650, 900, 3)


def test_of_several_rules_a_tile_satisfies_each(tmp_path: Path) -> None:
    """A blob that is grey has enough by luminance and none by hue; its verdict and shares survive the h5."""
    image = stained(640, 640, [(180, 180, 140), (460, 460, 140)])
    grey = image[320:, 320:].mean(axis=2, keepdims=True)
    image[320:, 320:] = grey
    alone = {
        name: tiled(tmp_path / "a.tiff", image, settings=TilingSettings(0.5, 64, tissue_needed([name], [share])))[0]
        for name, share in (("gigapath", 0.4), ("hsv", 0.6))
    }
    settings = TilingSettings(0.5, 64, tissue_needed(["gigapath", "hsv"], [0.4, 0.6]))
    both, _ = tiled(tmp_path / "a.tiff", image, settings=settings)
    np.testing.assert_allclose(both.tissue, alone["gigapath"].tissue, atol=0.02)
    np.testing.assert_array_equal(both.further[0], alone["hsv"].tissue)
    kept = (both.tissue >= 0.4) & (both.further[0] >= 0.6)
    np.testing.assert_array_equal(both.verdict == KEPT, kept)
    assert 4 < kept.sum() < (alone["gigapath"].verdict == KEPT).sum() and not kept[5:, 5:].any()
    write_tiling(tmp_path, both)
    back = read_tiling(coordinates_path(tmp_path, "a"))
    np.testing.assert_allclose(back.further[0], both.further[0], atol=1e-3)
    assert settings.facts()["min_tissue"] == [0.4, 0.6] and SETTINGS.facts()["tissue"] == "otsu"


def test_every_cell_has_one_verdict(tmp_path: Path) -> None:
    image = stained(640, 640, [(200, 200, 120)])
    image[400:560, 400:560] = (40, 130, 110)
    tiling, _ = tiled(tmp_path / "a.tiff", image)
    assert sum(tiling.counts().values()) == tiling.verdict.size == 100
    assert tiling.counts()["pen"] >= 4
    assert tiling.verdict[8, 8] == PEN and tiling.verdict[3, 3] == KEPT and tiling.verdict[0, 9] == BACKGROUND


def test_tissue_under_ink_is_not_kept(tmp_path: Path) -> None:
    image = stained(640, 640, [(320, 320, 250)])
    image[256:320, 256:320] = (40, 80, 190)
    tiling, _ = tiled(tmp_path / "a.tiff", image)
    assert tiling.verdict[4, 4] == PEN and tiling.verdict[6, 6] == KEPT


def test_a_thumbnail_has_at_most_1024_pixels_a_side_and_says_its_scale(tmp_path: Path) -> None:
    tiling, thumbnail = tiled(tmp_path / "a.tiff", stained(700, 2100, [(900, 300, 200)]))
    assert thumbnail.shape == (342, 1024, 3)
    assert tiling.thumbnail_downsample == pytest.approx(2100 / 1024)


def test_the_image_that_a_rule_judges_stays_small_and_fine_enough() -> None:
    for rule in TISSUE_RULES.values():
        huge = plan_grid([(400_000, 300_000)], 0.25, 0.5, 256, "huge")
        assert huge.width / downsample_for(rule, huge, [1.0, 4.0, 16.0]) <= 4096.5
        small = plan_grid([(5_000, 4_000)], 0.25, 0.25, 224, "small")
        assert small.tile_size_level0 / downsample_for(rule, small, [1.0]) >= 16


def test_refusals_name_the_slide_and_the_reason(tmp_path: Path) -> None:
    with pytest.raises(Fault, match=r"tiny\.tiff .*smaller than one tile"):
        tiled(tmp_path / "tiny.tiff", stained(60, 300, []))
    dark = np.zeros((300, 300, 3), dtype=np.uint8)
    dark[100:103, 100:103, 0] = 200
    with pytest.raises(Fault, match=r"dark\.tiff is a fluorescence slide"):
        tiled(tmp_path / "dark.tiff", dark)
    with pytest.raises(Fault, match=r"coarse\.tiff .*never enlarged"):
        tiled(tmp_path / "coarse.tiff", stained(300, 300, []), mpp=2.0)


def test_the_real_fluorescence_slide_is_refused(shared: Path) -> None:
    with Slide(shared / "slides/odd/fluor_test3-TRITC-560.ndpi") as slide, pytest.raises(Fault, match="fluorescence"):
        tile_slide(slide, "fluor", SETTINGS, None, "")


@pytest.mark.parametrize("mpp", [0.5, 0.23])
def test_a_tiling_is_read_back_as_it_was_written(tmp_path: Path, mpp: float) -> None:
    tiling, _ = tiled(tmp_path / "a.tiff", stained(650, 900, [(200, 300, 150)]), mpp)
    (tmp_path / "coordinates").mkdir()
    write_tiling(tmp_path, tiling)
    back = read_tiling(coordinates_path(tmp_path, "a"))
    assert back.grid == tiling.grid
    assert (back.slide, back.source, back.patient) == (tiling.slide, tiling.source, tiling.patient)
    np.testing.assert_array_equal(back.verdict, tiling.verdict)
    np.testing.assert_allclose(back.tissue, tiling.tissue, atol=1e-3)
    plain = read_coordinates_h5(coordinates_path(tmp_path, "a"))
    x, y, _ = tiling.tiles(KEPT)
    assert plain.x.tolist() == x.tolist() and plain.y.tolist() == y.tolist()
    assert (plain.slide, plain.tile_size, plain.tile_size_level0, plain.mpp) == (
        "a",
        64,
        tiling.grid.tile_size_level0,
        tiling.grid.mpp,
    )
    assert (plain.width, plain.height) == (900, 650)


def test_the_h5_has_what_tridents_and_clams_readers_ask_for(tmp_path: Path) -> None:
    (tmp_path / "coordinates").mkdir()
    same, _ = tiled(tmp_path / "same.tiff", stained(650, 900, [(200, 300, 150)]), mpp=0.499)
    shrunk, _ = tiled(tmp_path / "shrunk.tiff", stained(650, 900, [(200, 300, 150)]), mpp=0.23)
    for tiling in (same, shrunk):
        write_tiling(tmp_path, tiling)
    trident = {
        "patch_size",
        "patch_size_level0",
        "level0_magnification",
        "target_magnification",
        "overlap",
        "name",
        "savetodir",
        "level0_width",
        "level0_height",
    }
    clam = {"patch_size", "patch_level", "downsample", "downsampled_level_dim", "level_dim", "name", "save_path"}
    with h5py.File(coordinates_path(tmp_path, "same")) as file:
        of = file["coords"].attrs
        assert trident | clam <= set(of) and file["coords"].dtype == np.int64
        assert (of["patch_size"], of["patch_size_level0"], of["patch_level"], of["overlap"]) == (64, 64, 0, 0)
        assert (of["level0_magnification"], of["target_magnification"]) == (20, 20)
    with h5py.File(coordinates_path(tmp_path, "shrunk")) as file:
        of = file["coords"].attrs
        assert (
            trident <= set(of)
            and of["patch_size_level0"] == 139
            and of["tile_size_level0"] == pytest.approx(64 * 0.5 / 0.23)
        )
        assert "patch_level" not in of, "CLAM would read 64 pixels of level 0, the wrong field"


def test_coordinates_of_trident_and_clam_are_read(tmp_path: Path) -> None:
    coords = np.array([[0, 512], [512, 512]])
    for name, attributes in {
        "t_patches": {
            "patch_size": 256,
            "patch_size_level0": 512,
            "level0_magnification": 40,
            "name": "t",
            "level0_width": 9,
            "level0_height": 8,
        },
        "c": {"patch_size": 256, "patch_level": 1, "downsample": np.array([4.0, 4.0]), "name": "c"},
        "bare": {"patch_size": 256},
    }.items():
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file["coords"] = coords
            file["coords"].attrs.update(attributes)
    trident = read_coordinates_h5(tmp_path / "t_patches.h5")
    assert (trident.slide, trident.tile_size_level0, trident.mpp, trident.x.tolist(), trident.y.tolist()) == (
        "t",
        512.0,
        None,
        [0, 512],
        [512, 512],
    )
    clam = read_coordinates_h5(tmp_path / "c.h5")
    assert (clam.tile_size, clam.tile_size_level0, clam.width) == (256, 1024.0, None)
    for name, reason in (("bare", "neither"), ("absent", "no file"), ("junk", "can't be read as h5")):
        if name == "junk":
            (tmp_path / "junk.h5").write_bytes(b"junk")
        with pytest.raises(Fault, match=reason):
            read_coordinates_h5(tmp_path / f"{name}.h5")


def test_atlaspatchs_coordinates_of_five_columns_are_x_and_y_and_other_shapes_are_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "s.h5", "w") as file:
        file["coords"] = np.array([[0, 0, 512, 512, 0], [512, 0, 512, 512, 0]], np.int32)
        file.attrs.update({"patch_size": 256, "patch_size_level0": 512})
    found = read_coordinates_h5(tmp_path / "s.h5")
    assert (found.x.tolist(), found.y.tolist(), found.tile_size_level0) == ([0, 512], [0, 0], 512)
    with h5py.File(tmp_path / "s.h5", "a") as file:
        del file["coords"]
        file["coords"] = np.zeros((2, 4))
    with pytest.raises(Fault, match="not x and y of each tile"):
        read_coordinates_h5(tmp_path / "s.h5")
