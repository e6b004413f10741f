"""`pretrain inspect` shows what is there."""

import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data.fault import Fault
from data.shards.index import ShardIndex
from data.shards.layout import COLUMNS
from launch.entry import run_command_line
from pretrain.commands import inspect
from pretrain.commands import shard as shard_command
from pretrain.inspection.drawn_tiles import DrawnTiles
from pretrain.inspection.shards import _draw, _facts, shards_page
from pretrain.inspection.slides import COLOURS, contact_sheet, histogram
from pretrain.inspection.views import recipe_settings, seen
from pretrain.pages.page import STYLE
from pretrain.settings.composition import load
from tests.data.parquet.tables import write_table
from tests.data.shards.tile_folders import picture, spoil, write_tiles
from tests.data.slides.synthetic_slides import stained, write_slide

DEFAULTS: dict[str, Any] = {
    "slide": None,
    "shards": None,
    "data": None,
    "out": None,
    "mpp": 0.5,
    "tile_size": 64,
    "tissue": ["otsu"],
    "min_tissue": None,
    "min_saturated": None,
    "slides_mpp": None,
    "tiles": 20,
    "maps": 4,
    "views": "small",
    "weights": None,
    "seed": 0,
}


def look(**settings: Any) -> None:
    inspect.run(
        inspect.Config(
            **(DEFAULTS | {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()})
        )
    )


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    image = stained(640, 704, [(250, 300, 200)])
    image[64:320, 512:640] = (40, 80, 190)
    return write_slide(tmp_path_factory.mktemp("slides") / "s.tiff", image, 0.5)


def near(picture: Image.Image, colour: tuple[int, int, int], tolerance: int = 12) -> np.ndarray:
    return (np.abs(np.asarray(picture).astype(int) - colour) <= tolerance).all(axis=2)


def test_a_slide_gives_mask_map_and_page(slide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    look(slide=slide, out=tmp_path)
    err = capsys.readouterr().err
    assert "index.html" in err and "kept" in err and "8 pen" in err
    page = (tmp_path / "index.html").read_text()
    for stem in ("tiles", "tissue", "examples", "thumbnail"):
        assert f'src="{stem}.png"' in page
    assert STYLE in page, "the report's paper"
    tiles = Image.open(tmp_path / "tiles.png")
    zoom = 1200 / 704  # the map is drawn 1200 pixels wide, 16 from the left and 46 from the top
    kept = near(tiles.crop((16, 46, 16 + 1200, 46 + 1090)), COLOURS[1])
    xs, ys = np.nonzero(kept.any(axis=0))[0] / zoom, np.nonzero(kept.any(axis=1))[0] / zoom
    assert xs.min() >= 0 and xs.max() < 512 and ys.max() <= 577, "kept tiles are outlined around the disc only"
    assert near(tiles, COLOURS[2]).sum() > 500, "pen is in the picture"


def cut(slide: Path, out: Path) -> None:
    """Shards of a slide, as 'pretrain shard' makes them."""
    shard_command.run(
        shard_command.Config(
            [str(slide)],
            str(out),
            0.5,
            64,
            ["otsu"],
            None,
            None,
            None,
            "",
            1000,
            "tiles",
            None,
            None,
            1,
        )
    )


def test_shards_give_a_sheet_maps_histograms_and_a_page(slide: Path, tmp_path: Path) -> None:
    cut(slide, tmp_path / "shards")
    look(shards=[tmp_path / "shards"], out=tmp_path / "look")
    stems = {path.stem for path in (tmp_path / "look").glob("*.png")}
    assert stems == {"sheet", "seen", "map-s", "tiles-per-slide", "mpp", "mpp-level0"}
    page = (tmp_path / "look/index.html").read_text()
    assert all(f"{stem}.png" in page for stem in stems)
    first = (tmp_path / "look/sheet.png").read_bytes()
    look(shards=[tmp_path / "shards"], out=tmp_path / "again")
    look(shards=[tmp_path / "shards"], out=tmp_path / "other", seed=1)
    assert (tmp_path / "again/sheet.png").read_bytes() == first != (tmp_path / "other/sheet.png").read_bytes()


def test_a_mixture_shows_each_folders_share_and_draws_by_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [str(write_tiles(tmp_path / name, [tiles], side=32)) for name, tiles in (("lung", 60), ("skin", 20))]
    look(shards=folders, weights=[1.0, 4.0], out=tmp_path / "look", views=None)
    said = capsys.readouterr().err
    assert "20.0% of what is drawn, 75.0% of the tiles" in said and "80.0% of what is drawn, 25.0% of the tiles" in said
    stems = {path.stem for path in (tmp_path / "look").glob("*.png")}
    assert "mixture" in stems and "seen" not in stems
    for weights in ([1.0], [1.0, 0.0]):
        with pytest.raises(Fault, match="2 positive numbers, one for each folder"):
            look(shards=folders, weights=weights, out=tmp_path / "look")


def test_of_several_rules_each_ones_tissue_is_shown_and_pale_tiles_are_among_the_examples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = stained(256, 512, [(256, 128, 600)])
    image[:, :256] = image[:, :256].mean(axis=2, keepdims=True)
    slide = write_slide(tmp_path / "half.tiff", image, 0.5)
    look(slide=slide, out=tmp_path / "look", tissue=["gigapath", "hsv"], min_tissue=[0.0, 0.6], min_saturated=0.5)
    said = capsys.readouterr().err
    assert "gigapath, judged at" in said and "hsv, judged at" in said and "a tile needs 60% tissue" in said
    assert "16 background, 16 kept" in said and (tmp_path / "look/tissue-2.png").exists()


def test_some_tars_of_a_folder_are_shown_by_what_lies_in_them(tmp_path: Path) -> None:
    folder = write_tiles(tmp_path / "shards", [6, 5, 4], side=32)
    page = shards_page([f"{folder}/tiles-{{000001..000002}}.tar"], None, None, 20, 0, 0)
    facts = dict(page.facts)
    assert facts["tiles"].startswith("9 of") and facts["slides"] == "2" and facts["tar files"].startswith("2 (")
    size = sum((folder / f"tiles-00000{tar}.tar").stat().st_size for tar in (1, 2))
    assert facts["tar files"] == f"2 ({size / 1e6:,.1f} MB)" and "9 tiles drawn" in page.pictures[0][1]


def test_parquet_files_are_shown_as_shards_are_and_so_is_any_source(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slides = [f"s{number // 5}" for number in range(30)]
    table = pq.read_table(write_table(tmp_path / "files/a.parquet", range(30), slide=slides))
    broken = [b"no image" if number == 7 else jpeg.as_py() for number, jpeg in enumerate(table["jpeg"])]
    pq.write_table(table.set_column(0, "jpeg", pa.array(broken)), tmp_path / "files/a.parquet", row_group_size=4)
    words = ["inspect", "data=parquet", f"data.files={tmp_path / 'files'}", "tiles=30", f"out={tmp_path / 'look'}"]
    words.append("data.min_saturated=1.0")
    run_command_line([*words, "views=null"])
    said, page = capsys.readouterr().err, (tmp_path / "look/index.html").read_text()
    assert {path.stem for path in (tmp_path / "look").glob("*.png")} == {"sheet", "tiles-per-slide"}
    assert "6 known, of 0 of them the patient; none held out" in said and "8 of 4 rows" in said
    assert "of the 29 tiles drawn, which training passes over" in said
    assert "row 7 of" in page and "1 of the 30 tiles drawn" in page and "29 tiles drawn at random" in page
    shards = write_tiles(tmp_path / "shards", [20])
    mixed = f"{{rows:{{files:{tmp_path / 'files'},weight:1}},tars:{{shards:{shards},weight:3}}}}"
    run_command_line(["inspect", "data=mixture", f"data.members={mixed}", "views=null", f"out={tmp_path / 'mixed'}"])
    assert "tars: " in (said := capsys.readouterr().err) and "75.0% of what is drawn, 40.0% of the tiles" in said


def test_a_source_without_its_files_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_command_line(["inspect", "data=parquet"])
    assert "say what to look at: data.files=…" in capsys.readouterr().err


def test_the_views_shown_are_those_of_training_and_follow_the_recipe() -> None:
    tiles = [picture(number, 64) for number in range(3)]
    small = recipe_settings("small", ["data.crops.local_count=2", "data.crops.global_size=64"])
    sheet = np.asarray(seen(tiles, small, 0))
    assert sheet.shape[0] == 3 * 68 and sheet.shape[1] > 4 * 68
    plain = recipe_settings(
        "small",
        [
            f"data.crops.{name}"
            for name in (
                "local_count=0",
                "global_size=64",
                "global_scale=[1,1]",
                "aspect=[1,1]",
                "vertical_flip=0",
                "quarter_turns=0",
            )
        ]
        + [
            "data.colour.jitter_probability=0",
            "data.colour.grey_probability=0",
            "data.masks.share=0",
            "objective.ibot_weight=0",
        ]
        + ["data.colour.blur_probability=[0,0,0]", "data.colour.solarise_probability=[0,0,0]"],
    )
    shown = np.asarray(seen(tiles, plain, 0)).astype(int)
    for row, tile in enumerate(tiles):
        for column in range(2):
            view = shown[68 * row : 68 * row + 64, 68 * column : 68 * column + 64]
            assert min(np.abs(view - other).max() for other in (tile, tile[:, ::-1])) <= 1


def test_the_views_of_a_recipe_with_another_source_are_its_own() -> None:
    shown = recipe_settings("nanopath_jepa")
    assert seen([picture(0, 64)], shown, 0).width > 2 * shown.data.crops.global_size
    own = load("tile", ["run=none", "data.files=none", "recipe=nanopath_jepa"]).object().data
    parts = ("crops", "colour", "masks", "mean", "std")
    assert [getattr(shown.data, part) for part in parts] == [getattr(own, part) for part in parts]


def test_tiles_that_are_no_jpeg_are_named_beside_those_that_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_tiles(tmp_path / "shards", [6])
    spoil(folder, [1, 4])
    look(shards=[folder], out=tmp_path / "look", views=None)
    said, page = capsys.readouterr().err, (tmp_path / "look/index.html").read_text()
    for place in (said, page):
        assert "2 of the 6 tiles drawn" in place and place.count("is no readable JPEG") == 2
    assert "4 tiles drawn at random" in page


def test_shards_without_one_readable_tile_are_a_fault(slide: Path, tmp_path: Path) -> None:
    cut(slide, tmp_path / "shards")
    tar = tmp_path / "shards/tiles-000000.tar"
    tar.write_bytes(bytes(tar.stat().st_size))
    with pytest.raises(Fault, match=r"can be read: .*tiles-000000\.tar: the tile at byte \d+ is no readable JPEG"):
        look(shards=[tmp_path / "shards"], out=tmp_path / "look")


def test_a_picture_that_the_disk_refuses_is_a_sentence_and_no_half_one(
    slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(self: Image.Image, path: Path, **_: object) -> None:
        path.write_bytes(b"PNG")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(SystemExit):
        run_command_line(["inspect", f"slide={slide}", f"out={tmp_path / 'page'}"])
    assert "tiles.png can't be written (No space left on device): make room there" in capsys.readouterr().err
    assert list((tmp_path / "page").iterdir()) == []


def test_one_of_slide_shards_and_source_is_needed(slide: Path, tmp_path: Path) -> None:
    for given in ({}, {"slide": slide, "shards": [tmp_path]}, {"slide": slide, "data": {}}):
        with pytest.raises(Fault, match="say what to look at"):
            look(out=tmp_path, **given)


def test_a_sheet_shows_every_tile_in_its_place() -> None:
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0), (0, 250, 250)]
    sheet = contact_sheet(
        [np.full((32, 32, 3), colour, dtype=np.uint8) for colour in colours],
        [f"tile\n{n}" for n in range(5)],
        columns=3,
        side=40,
    )
    centres = [np.argwhere(near(sheet, colour)).mean(axis=0) for colour in colours]
    assert [int((near(sheet, colour)).sum()) for colour in colours] == [1600] * 5
    assert centres[0][0] == centres[2][0] < centres[3][0] == centres[4][0]
    assert centres[0][1] == centres[3][1] < centres[1][1] < centres[2][1]


def test_a_histogram_of_equal_values_is_drawn() -> None:
    assert histogram(np.full(5, 0.25), "title", "µm").size == histogram(np.arange(9.0), "title", "µm").size


def test_a_billion_tiles_are_looked_at_in_memory_of_a_few(tmp_path: Path) -> None:
    """Columns of a billion rows that are all the same bytes: whoever goes through them makes something of that
    length."""
    index = ShardIndex.open(write_tiles(tmp_path / "shards", [3], side=32))
    (tmp_path / "shards/index/tiles-000000.npz").unlink()  # the checksums of three tiles
    columns = {name: np.broadcast_to(np.asarray(getattr(index, name))[1], 10**9) for name in COLUMNS}
    runs = {"file_start": np.array([0, 10**9]), "run_start": np.array([0, 10**9]), "run_slide": np.zeros(1, np.int32)}
    huge = ShardIndex(index.folder, columns | runs, index.meta)
    tracemalloc.start()
    began = time.monotonic()
    facts, drawn = dict(_facts(huge)), DrawnTiles()
    _draw(huge, 9, 0, drawn)
    took, peak = time.monotonic() - began, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 300 * 2**20 and took < 3 and [len(part) for part in vars(drawn).values()] == [9, 9, 0]
    assert facts["tiles"] == f"1,000,000,000 of {int(index.length[1]) / 1000:.1f} kB"
