"""What is curated is more even than what was there, is exactly as large as asked, and is the same for whoever goes on."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from data.embeddings.store import EmbeddingStore, EmbeddingWriter
from data.fault import Fault
from data.keyed import rng
from launch.entry import run_command_line
from pretrain.curation import curating, labels, table
from pretrain.curation.balance import Lots, balanced, levelled
from pretrain.curation.curating import effective
from pretrain.curation.kept_arrays import kept_array
from pretrain.curation.table import SlideShare
from tests.data.shards.tile_folders import write_tiles

KINDS, WIDTH = 20, 12
SIZES = np.array([3000, 1500, 700, 300, 150, 100, 60, 40, 40, 40, 30, 30, 30, 20, 20, 20, 20, 20, 20, 20])
"""Tiles of each true class: a long tail, most of two slides' one class."""


def long_tail(folder: Path, slides: int = 6, encoder: str = "0") -> np.ndarray:
    """A store of 6160 tiles of 20 classes; the classes of its rows, in the store's order."""
    draw = rng("long tail")
    kinds = draw.permutation(np.repeat(np.arange(KINDS), SIZES))
    values = draw.normal(0, 4, (KINDS, WIDTH))[kinds] + draw.normal(0, 1, (len(kinds), WIDTH))
    with EmbeddingWriter(folder, WIDTH, "made up", encoder) as writer:
        for number, rows in enumerate(np.array_split(np.arange(len(kinds)), slides)):
            places = np.stack([np.arange(len(rows)) % 40 * 256, np.arange(len(rows)) // 40 * 256], 1)
            writer.add(f"s{number}", values[rows], places, 256.0, 0.5)
    return kinds


def command(folder: Path, *words: str, out: str = "out") -> list[str]:
    settings = [f"embeddings={folder / 'store'}", "clusters=[120,30]", "size=600", "device=cpu"]
    settings += ["resampling_steps=[2,2]", "iterations=10", "fit_tiles=null"]
    return ["curate", *settings, f"out={folder / out}", *words]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``store`` of the long tail, and what was curated of it in ``out``; ``kinds.npy``: the true classes."""
    folder = tmp_path_factory.mktemp("curation")
    np.save(folder / "kinds.npy", long_tail(folder / "store"))
    run_command_line(command(folder))
    return folder


def table_of(folder: Path, out: str = "out") -> dict[str, Any]:
    found = pq.read_table(folder / out / "curated.parquet")
    return {name: found.column(name).to_numpy() for name in found.column_names}


def test_the_chosen_tiles_true_classes_are_clearly_more_even(folder: Path) -> None:
    kinds, weights = np.load(folder / "kinds.npy"), table_of(folder)["weight"]
    before, after = effective(np.bincount(kinds)), effective(np.bincount(kinds[weights > 0], minlength=KINDS))
    assert before < 6 and after > 2.4 * before
    at_random = kinds[rng(0).permutation(len(kinds))[:600]]
    assert after > 2.2 * effective(np.bincount(at_random, minlength=KINDS))


def test_the_table_has_every_tile_once_in_the_store_s_order_with_its_clusters(folder: Path) -> None:
    rows, store = table_of(folder), EmbeddingStore.open(folder / "store")
    assert rows["weight"].sum() == 600 and set(rows["weight"]) == {0, 1}
    places = np.concatenate([store.read(slide).coordinates for slide in store.slides])
    assert np.array_equal(np.stack([rows["x"], rows["y"]], 1), places)
    assert [str(slide) for slide in rows["slide"]] == [
        slide for slide in store.slides for _ in range(store.rows(slide))
    ]
    assert set(rows["tile_size_level0"]) == {256.0} and rows["row"][:3].tolist() == [0, 1, 2]
    values = np.concatenate([store.read(slide).embeddings for slide in store.slides]).astype(np.float32)
    fine, coarse = (np.load(folder / "out" / f"centres-{level}.npy") for level in (1, 2))
    nearest = ((values[:, None] - fine) ** 2).sum(2).argmin(1)
    assert (rows["cluster_1"] == nearest).mean() > 0.999
    above = ((fine[:, None] - coarse) ** 2).sum(2).argmin(1)
    assert np.array_equal(rows["cluster_2"], above[rows["cluster_1"]])


def test_the_top_clusters_share_equally_where_they_have_tiles_enough(folder: Path) -> None:
    rows = table_of(folder)
    there, taken = np.bincount(rows["cluster_2"]), np.bincount(rows["cluster_2"], rows["weight"])
    full = taken == there
    assert np.ptp(taken[~full]) <= 1 and (taken[full] <= taken[~full].max()).all()


def test_stopped_at_any_point_the_same_command_comes_to_the_same_table(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(labels, "TILES_OF_A_FILE", 2000)
    whole = (folder / "out" / "curated.parquet").read_bytes()
    (tmp_path / "store").symlink_to(folder / "store")

    class Stop(Exception):
        pass

    for where, name, after in ((curating, "fitted_level", 1), (labels, "nearest_of_many", 2), (table, "_of_slides", 0)):
        real, calls = getattr(where, name), []

        def stopping(*given: Any, real: Any = real, calls: list[int] = calls, after: int = after, **more: Any) -> Any:
            calls.append(0)
            if len(calls) > after:
                raise Stop
            return real(*given, **more)

        with monkeypatch.context() as patch, pytest.raises(Stop):
            patch.setattr(where, name, stopping)
            run_command_line(command(tmp_path))
        assert not (tmp_path / "out" / "curated.parquet").exists()
    made = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.npy")}
    assert {"centres-1.npy", "centres-2.npy", "labels-000000.npy"} <= made.keys()
    (tmp_path / "out" / ".curated.parquet.1-host-0.partial").write_bytes(b"of one that was killed")
    run_command_line(command(tmp_path))
    assert (tmp_path / "out" / "curated.parquet").read_bytes() == whole
    assert not list((tmp_path / "out").glob(".*.partial"))
    assert (tmp_path / "out" / "centres-1.npy").stat().st_mtime_ns == made["centres-1.npy"]
    assert not list((tmp_path / "out").glob("labels-*"))
    capsys.readouterr()
    run_command_line(command(tmp_path))
    assert "nothing to do" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_command_line(command(tmp_path, "seed=1"))
    assert "seed 0 then, 1 now" in capsys.readouterr().err


def test_with_repeats_small_clusters_have_more_than_their_tiles(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "store").symlink_to(folder / "store")
    run_command_line(command(tmp_path, "repeats=4", "size=3000", "resampling_steps=[0,0]"))
    run_command_line(command(tmp_path, "size=3000", "resampling_steps=[0,0]", out="once"))
    kinds, rows, once = np.load(folder / "kinds.npy"), table_of(tmp_path), table_of(tmp_path, "once")
    assert rows["weight"].sum() == 3000 and rows["weight"].max() == 4
    even = [effective(np.bincount(kinds, one["weight"])) for one in (rows, once)]
    assert even[0] > 1.2 * even[1]


def test_shares_are_as_equal_as_the_clusters_allow() -> None:
    draw = rng(0)
    assert levelled(np.array([2, 50, 9, 0]), 25, draw).tolist() == [2, 14, 9, 0]
    assert levelled(np.array([2, 5]), 9, draw).tolist() == [2, 5]
    for total in (0, 1, 7, 100, 313):
        most = rng(total, "most").integers(0, 40, 30)
        amounts = levelled(most, total, rng(total))
        assert amounts.sum() == min(total, most.sum()) and (amounts <= most).all()
        free = amounts[amounts < most]
        assert not len(free) or amounts.max() - free.min() <= 1
    sizes = [np.array([100, 3, 40, 7]), np.array([103, 47])]
    fine, coarse = balanced(sizes, [np.array([0, 0, 1, 1])], 60, 1, 0)
    assert coarse.tolist() == [30, 30] and fine.tolist() == [27, 3, 23, 7]


def test_lots_take_exactly_as_many_and_every_tile_as_often() -> None:
    clusters = rng("lots").integers(0, 3, 90)
    sizes = np.bincount(clusters)
    often = np.zeros(90)
    for trial in range(400):
        lots = Lots(sizes, np.array([7, 0, sizes[2] + 5]))
        weights = np.concatenate([lots.weights(part, rng(trial, at)) for at, part in enumerate(np.split(clusters, 9))])
        assert np.bincount(clusters, weights).tolist() == [7, 0, sizes[2] + 5]
        often += weights
    expected = np.array([7 / sizes[0], 0, 1 + 5 / sizes[2]])[clusters]
    assert np.abs(often / 400 - expected).max() < 0.12


def test_the_page_shows_tiles_of_some_clusters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = write_tiles(tmp_path / "shards", [40, 37])
    with EmbeddingWriter(tmp_path / "store", 4, "made up", "0") as writer:
        for slide, first, last in (("slide0", 0, 40), ("slide1", 40, 77)):
            numbers = np.arange(first, last)
            places = np.stack([numbers % 8 * 48, numbers // 8 * 48], 1)
            writer.add(slide, rng(first, "values").normal(size=(len(numbers), 4)), places, 48.0, 0.5)
    words = command(tmp_path, "clusters=[8,3]", "size=20", "shown=2", "tiles=5")
    run_command_line(words)
    page = (tmp_path / "out" / "index.html").read_text()
    assert "No tiles are shown" in page and "20 tiles a pass, of 77 tiles of 2 slides" in page and "slide1" in page
    made = (tmp_path / "out" / "curated.parquet").stat().st_mtime_ns
    run_command_line([*words, f"shards={shards}"])
    page = (tmp_path / "out" / "index.html").read_text()
    assert len(re.findall(r"cluster-\d+\.png", page)) == 4 and "aren't in these shards" not in page
    assert len(list((tmp_path / "out").glob("cluster-*.png"))) == 2
    assert (tmp_path / "out" / "curated.parquet").stat().st_mtime_ns == made
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert facts["taken"] == 20 and (tmp_path / "out" / "slides.csv").read_text().startswith(
        "slide,tiles,taken\nslide0,40,"
    )


@pytest.mark.parametrize(("side", "mpp", "unit"), [(96.0, 0.5, "48 level-0 pixels a side"), (48.0, 0.25, "0.5 µm/px")])
def test_shards_of_other_tiles_than_were_embedded_are_refused(
    tmp_path: Path, side: float, mpp: float, unit: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = write_tiles(tmp_path / "shards", [40])
    with EmbeddingWriter(tmp_path / "store", 4, "made up", "0") as writer:
        writer.add("slide0", np.eye(40, 4), np.stack([np.arange(40), np.arange(40)], 1), side, mpp)
    with pytest.raises(SystemExit):
        run_command_line(command(tmp_path, "clusters=[8,3]", "size=20", f"shards={shards}"))
    assert f"tiles of slide0 have {unit} in shards={shards} and" in capsys.readouterr().err
    assert not (tmp_path / "out" / "curated.json").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["size=7000"], "size=7000 is more than the 6,160 tiles that there are, each at most 1 times"),
        (["clusters=[7000,10]"], "clusters=[7000, 10] asks for 7,000 clusters of 6,160 tiles: ask for fewer"),
        (["clusters=[10,10]"], "each level has fewer clusters than the one before it"),
        (["clusters=[]"], "clusters=[] is not allowed: it must be at least one"),
        (["embeddings=FOLDER/none"], "none holds no slide embeddings (no store.json)"),
        (["embeddings=FOLDER/features"], "features is no store of tile embeddings (no store.json): 'pretrain embed' makes one of shards or slides, and 'pretrain embed features=FOLDER/features out=…'"),
        (["embeddings=[FOLDER/store,FOLDER/other]"], "only slides of one tile encoder can be put together"),
        (["embeddings=[FOLDER/store,FOLDER/store]"], "both hold the slide 's0'"),
        (["embeddings=FOLDER/empty"], "holds no tile: embed slides that have some"),
        (["shards=FOLDER/features"], "there are no tile shards in"),
        (["device=cuda:99"], "device=cuda:99 is not on this machine"),
        (["out=FOLDER/store/store.json"], "store.json"),
        (["out=FOLDER/store"], "store holds the embeddings themselves: give a folder of its own, out=curated say."),
    ],
)  # fmt: skip
def test_what_can_t_be_is_one_sentence(
    folder: Path, tmp_path: Path, words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "store").symlink_to(folder / "store")
    (tmp_path / "features").mkdir()
    if "other" in words[0]:
        long_tail(tmp_path / "other", 2, "1")
    with EmbeddingWriter(tmp_path / "empty", WIDTH, "made up", "0") as writer:
        writer.add("none", np.zeros((0, WIDTH)), np.zeros((0, 2), int), 256.0, 0.5)
    with pytest.raises(SystemExit) as ended:
        run_command_line(command(tmp_path, *(word.replace("FOLDER", str(tmp_path)) for word in words)))
    said = capsys.readouterr().err.splitlines()
    assert ended.value.code in (1, 2) and sentence.replace("FOLDER", str(tmp_path)) in said[-1]
    assert len([line for line in said if line.startswith("pretrain: ")]) == 1


def test_embeddings_that_are_damaged_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long_tail(tmp_path / "store", 2)
    (file,) = (tmp_path / "store").glob("embeddings-*.bin")
    with file.open("r+b") as opened:
        opened.seek(1000)
        opened.write(b"\xff\x7f")  # a NaN
    with pytest.raises(SystemExit):
        run_command_line(command(tmp_path))
    assert "embeddings of s0 in" in capsys.readouterr().err
    with file.open("r+b") as opened:
        opened.truncate(5000)
    with pytest.raises(SystemExit):
        run_command_line(command(tmp_path))
    assert "is missing or shorter than its index says" in capsys.readouterr().err


def test_any_name_of_a_slide_comes_back_from_the_list_of_slides(tmp_path: Path) -> None:
    curating._write_slides(tmp_path / "slides.csv", [SlideShare('a, "b"', 3, 1), SlideShare("c", 2, 0)])
    with (tmp_path / "slides.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [["slide", "tiles", "taken"], ['a, "b"', "3", "1"], ["c", "2", "0"]]


def test_a_damaged_file_of_ours_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "centres-1.npy").write_bytes(b"nothing")
    with pytest.raises(Fault, match=r"centres-1\.npy is damaged"):
        kept_array(tmp_path / "centres-1.npy", (2, 3))
    (tmp_path / "labels-000000.npy").write_bytes((folder / "out" / "centres-1.npy").read_bytes())
    with pytest.raises(Fault, match=r"labels-000000\.npy is damaged"):
        labels.TileLabels(tmp_path, 5).sizes(3)
