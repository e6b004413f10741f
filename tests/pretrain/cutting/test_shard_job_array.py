"""Shards made by a job array, from given coordinates, or onto a full disk; and the commands that index and verify
them."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from data.fault import Fault
from data.shards.folder import load_rows
from data.shards.index import ShardIndex
from data.shards.writing import read_shard_facts
from data.slides.coordinates_h5 import coordinates_path, read_coordinates_h5
from data.slides.given_tiles import given_tiles
from data.slides.reading import Slide
from data.slides.tiling import TilingSettings
from launch.entry import run_command_line
from pretrain.commands import shards_index, shards_verify
from tests.data.shards.tile_folders import write_tiles
from tests.data.slides.synthetic_slides import stained, write_slide
from tests.pretrain.commands.test_shard_command import DEFAULTS, ROOT, contents, shard, slides


def index(*folders: Path) -> None:
    shards_index.run(shards_index.Config([str(folder) for folder in folders], None))


NAMES = "a b c d e f g"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("whole")
    shard(slides=slides(folder / "slides", NAMES), out=folder / "out")
    return folder / "slides", folder / "out"


def facts(out: Path) -> dict[str, dict[str, object]]:
    opened = ShardIndex.open(out)
    return {slide: opened.facts(number) for number, slide in enumerate(opened.slides)}


def test_parts_of_a_job_array_merge_to_what_one_run_makes(whole: tuple[Path, Path], tmp_path: Path) -> None:
    source, reference = whole
    out = tmp_path / "out"
    for number in (2, 1, 3):
        shard(slides=source, out=out, part=f"{number}/3")
        with pytest.raises(Fault, match="no index yet"):
            ShardIndex.open(out)
        if number != 3:
            with pytest.raises(Fault, match=r"of 3 ha(s|ve) not been cut into .* part=(1|3)/3"):
                index(out)
    index(out)
    assert contents(out) == contents(reference)
    assert facts(out) == facts(reference)
    assert load_rows(out) == load_rows(reference)
    for slide in NAMES.split():
        assert coordinates_path(out, slide).read_bytes() != b"" and np.array_equal(
            read_coordinates_h5(coordinates_path(out, slide)).x,
            read_coordinates_h5(coordinates_path(reference, slide)).x,
        )
    digest = ShardIndex.open(out).digest
    shard(slides=source, out=out, part="2/3")  # nothing left to do
    index(out)
    assert ShardIndex.open(out).digest == digest
    shards_verify.run(shards_verify.Config([str(out)], str(tmp_path / "report.json"), 1))
    assert json.loads((tmp_path / "report.json").read_text())["ok"]


def test_slides_added_to_a_job_array_move_no_other_slide(whole: tuple[Path, Path], tmp_path: Path) -> None:
    source, _ = whole
    out = tmp_path / "out"
    some = [str(source / f"{name}.tiff") for name in "acd"]
    for number in (1, 2):
        shard(slides=some, out=out, part=f"{number}/2")
    before = {path.name: path.read_bytes() for path in out.glob("*.tar")}
    for number in (1, 2):
        shard(slides=source, out=out, part=f"{number}/2")
    index(out)
    assert before.items() <= {path.name: path.read_bytes() for path in out.glob("*.tar")}.items()
    assert contents(out) == contents(whole[1])


def test_what_does_not_fit_a_job_array_is_refused(whole: tuple[Path, Path], tmp_path: Path) -> None:
    source, out = whole[0] / "a.tiff", tmp_path / "out"
    with pytest.raises(Fault, match="part=3/2 is not a part"):
        shard(slides=source, out=out, part="3/2")
    shard(slides=source, out=out, part="1/2")
    with pytest.raises(Fault, match="was begun in 2 parts, and this is part 1 of 3"):
        shard(slides=source, out=out, part="1/3")
    with pytest.raises(Fault, match="being cut in 2 parts: say which with part="):
        shard(slides=source, out=out)
    with pytest.raises(Fault, match="was begun in one piece"):
        shard(slides=source, out=whole[1], part="1/2")
    shard(slides=source, out=out, part="2/2", mpp=1.0)
    with pytest.raises(Fault, match=r"part 2 of 2 of .* was cut with other settings"):
        index(out)


def test_an_index_that_is_lost_is_made_again_and_others_shards_get_theirs(
    whole: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole[1], tmp_path / "ours")
    (tmp_path / "ours/index.npz").unlink()
    theirs = write_tiles(tmp_path / "theirs", [3, 4])
    (theirs / "index.npz").unlink()
    shutil.rmtree(theirs / "index")
    (tmp_path / "ours/stray.tar").touch()
    run_command_line(["shards", "index", f"shards={tmp_path / 'ours'} {theirs}"])
    assert ShardIndex.open(tmp_path / "ours").digest == ShardIndex.open(whole[1]).digest
    assert len(ShardIndex.open(theirs)) == 7
    said = capsys.readouterr().err
    assert "7 tiles of 2 slides in 2 shards, indexed" in said
    assert (
        "left out: stray.tar: 'pretrain shard' has no record of it" in said
        and "left out: 1 tar (stray.tar), as said" in said
    )


def test_verify_ends_with_exit_code_1_one_sentence_and_a_report(
    whole: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole[1], out)
    run_command_line(["shards", "verify", f"shards={out}", "workers=2"])
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] and report["folders"][0]["tiles"] == len(ShardIndex.open(out))
    tar = sorted(out.glob("*.tar"))[0]
    os.truncate(tar, tar.stat().st_size // 2)
    with pytest.raises(SystemExit) as ended:
        run_command_line(["shards", "verify", f"shards={out}", "workers=1"])
    assert ended.value.code == 1
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert not report["ok"] and report["found"] == len(report["folders"][0]["findings"]) > 1
    assert {finding["shard"] for finding in report["folders"][0]["findings"]} == {tar.name}
    assert "truncated" in report["folders"][0]["kinds"] and "truncated" in printed.err
    assert printed.err.splitlines()[-1].startswith(f"pretrain: {report['found']} things are wrong")
    shard(slides=whole[0], out=out)  # the way out
    assert contents(out) == contents(whole[1])
    run_command_line(["shards", "verify", f"shards={out}", "workers=1"])


# Coordinates of others ---------------------------------------------------------------------------------------------


def trident(path: Path, coords: list[tuple[int, int]], side: int = 64, **other: object) -> None:
    """A file of TRIDENT's documented schema."""
    path.parent.mkdir(parents=True, exist_ok=True)
    attributes = {
        "patch_size": 64,
        "patch_size_level0": side,
        "level0_magnification": 20,
        "target_magnification": 20,
        "overlap": 0,
        "name": path.stem.removesuffix("_patches"),
        "savetodir": str(path.parent),
        "level0_width": 500,
        "level0_height": 420,
    } | other
    with h5py.File(path, "w") as file:
        file["coords"] = np.array(coords, dtype=np.int64)
        file["coords"].attrs.update(attributes)


def clam(path: Path, coords: list[tuple[int, int]]) -> None:
    """A file of CLAM's documented schema."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["coords"] = np.array(coords, dtype=np.int64)
        file["coords"].attrs.update(
            {
                "patch_size": 64,
                "patch_level": 0,
                "downsample": np.array([1.0, 1.0]),
                "downsampled_level_dim": np.array([500, 420]),
                "level_dim": np.array([500, 420]),
                "name": path.stem,
                "save_path": str(path.parent),
            }
        )


COORDS = [
    (37, 150),
    (101, 150),
    (203, 155),
    (40, 214),
    (-0, 0),
    (470, 10),
    (37, 150),
]  # off every grid; glass; over the edge; twice


@pytest.mark.parametrize("writer", ["trident", "clam", "our own"])
def test_tiles_are_cut_where_another_programs_h5_says(
    tmp_path: Path, writer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    image = stained(420, 500, [(150, 200, 150)])
    path = write_slide(tmp_path / "slides/s.1.tiff", image, 0.5)
    folder = tmp_path / "given"
    if writer == "trident":
        trident(folder / "20x_64px_0px_overlap/patches/s.1_patches.h5", COORDS)
    elif writer == "clam":
        clam(folder / "patches/s.1.h5", COORDS)
    else:
        trident(tmp_path / "first/s.1_patches.h5", COORDS)
        shard(slides=path, out=tmp_path / "before", coordinates=tmp_path / "first")
        folder = tmp_path / "before/coordinates"
    capsys.readouterr()
    shard(slides=path, out=tmp_path / "out", coordinates=folder)
    if writer != "our own":
        assert "left out 1 given tiles that hang over its edge, and 1 that were given twice" in capsys.readouterr().err
    tiles = contents(tmp_path / "out")
    inside = [(37, 150), (101, 150), (203, 155), (40, 214)]
    assert set(tiles) == {f"s-1_{x}_{y}" for x, y in inside}, "the flat one at (0, 0) is empty"
    import simplejpeg

    for x, y in inside:
        pixels = simplejpeg.decode_jpeg(tiles[f"s-1_{x}_{y}"])
        assert np.abs(pixels.astype(int) - image[y : y + 64, x : x + 64]).mean() < 6
    written = read_coordinates_h5(coordinates_path(tmp_path / "out", "s-1"))
    assert sorted(zip(written.x.tolist(), written.y.tolist(), strict=True)) == sorted(inside)
    assert load_rows(tmp_path / "out")["s-1"].kept == 4
    record = read_shard_facts(tmp_path / "out", "tiles-000000")
    assert record["rejected"] == ([["s-1", 0, 0, 3]] if writer != "our own" else [])
    shards_verify.run(shards_verify.Config([str(tmp_path / "out")], str(tmp_path / "report.json"), 1))


def test_given_coordinates_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    for name in "abcd":
        write_slide(tmp_path / f"slides/{name}.tiff", stained(420, 500, [(150, 200, 150)]), 0.5)
    trident(tmp_path / "given/a_patches.h5", [(0, 0)], side=128)
    trident(tmp_path / "given/b_patches.h5", [(0, 0)], level0_width=9)
    trident(tmp_path / "given/c_patches.h5", [(-5, 0)])
    with pytest.raises(Fault, match="none of the 4 slides"):
        shard(slides=tmp_path / "slides", out=tmp_path / "out", coordinates=tmp_path / "given")
    messages = {slide: row.message for slide, row in load_rows(tmp_path / "out").items()}
    assert "say tile_size=64 mpp=1" in messages["a"] and "about a slide of 9×420" in messages["b"]
    assert "negative coordinates" in messages["c"] and "no coordinates of" in messages["d"]


GRID = [(64 * column, 64 * row) for row in range(4) for column in range(4)]


@pytest.mark.parametrize(("places", "said", "sentence"), [
    ([(x // 2, y // 2) for x, y in GRID], {"overlap": 0}, "64 level-0 pixels that are 32 apart"), ([(x // 64, y // 64) for x, y in GRID], None, "64 level-0 pixels that are 1 apart"),
    ([(x // 2, y // 2) for x, y in GRID], {"overlap": 32}, ""), ([(x // 2, y // 2) for x, y in GRID], None, ""),
    ([(x // 8, y // 8) for x, y in GRID], {"overlap": 32}, "64 level-0 pixels that are 8 apart"), ([(x + 500, y) for x, y in GRID], {"overlap": 0}, "16 of 16 tiles beside its slide of 500 × 420"),
])  # fmt: skip
def test_given_coordinates_are_held_to_what_they_are_said_to_be(
    tmp_path: Path, places: list[tuple[int, int]], said: dict[str, int] | None, sentence: str
) -> None:
    """Tiles that overlap as their file says are cut, and those of CLAM's files, which don't say, where they share
    half."""
    write_slide(tmp_path / "s.tiff", stained(420, 500, [(150, 200, 150)]), 0.5)
    path = tmp_path / "given/s_patches.h5"
    if said is None:
        clam(path, places)
    else:
        trident(path, places, **said)
    with Slide(tmp_path / "s.tiff") as slide:
        settings = TilingSettings(0.5, 64, ())
        if sentence:
            with pytest.raises(Fault, match=sentence):
                given_tiles(slide, "s", path, settings, None, "")
        else:
            assert given_tiles(slide, "s", path, settings, None, "")[0].counts()["kept"] == 16


# A full disk -------------------------------------------------------------------------------------------------------

SMALL_DISK = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
from pretrain.commands.shard import Config, run
from data.fault import Fault
try:
    run(Config(**eval(sys.argv[1])))
except Fault as fault:
    sys.exit(str(fault))
"""


@pytest.mark.parametrize(("room", "workers"), [(300, 1), (3000, 2), (40_000, 1)])
def test_files_that_cannot_grow_end_in_one_sentence_and_the_run_goes_on_when_there_is_room(
    whole: tuple[Path, Path], tmp_path: Path, room: int, workers: int
) -> None:
    """The kernel refuses every write past ``room`` bytes of a file: slides.csv, then the thumbnails and h5, then the
    tars."""
    source, reference = whole
    some = [str(source / f"{name}.tiff") for name in "abc"]
    settings = DEFAULTS | {"slides": some, "out": str(tmp_path / "out"), "workers": workers}
    ended = subprocess.run(
        [sys.executable, "-c", SMALL_DISK, repr(settings), str(room)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    last = ended.stderr.strip().splitlines()[-1]
    assert "File too large" in last and last.endswith("make room or fix the disk, then run the same command again.")
    for tar in (tmp_path / "out").glob("*.tar"):
        assert tar.stat().st_size == read_shard_facts(tmp_path / "out", tar.stem)["size"]
    shard(slides=some, out=tmp_path / "out")
    assert contents(tmp_path / "out") == {k: v for k, v in contents(reference).items() if k[0] in "abc"}


@pytest.mark.parametrize("call", range(12))
def test_a_disk_that_fills_at_any_moment_costs_nothing_that_was_finished(
    whole: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """The ``call``-th rename or sync of the run fails with ENOSPC, as on file systems that allocate late."""
    source, reference = whole
    calls = []

    def failing(do: object) -> object:
        def wrapped(*arguments: object, **named: object) -> object:
            calls.append(do)
            if len(calls) == call + 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return do(*arguments, **named)  # type: ignore[operator]

        return wrapped

    monkeypatch.setattr(os, "fsync", failing(os.fsync))
    monkeypatch.setattr(Path, "replace", failing(Path.replace))
    with pytest.raises(Fault, match=r"(No space left on device).*run the same command again"):
        shard(slides=source / "a.tiff", out=tmp_path / "out")
    monkeypatch.undo()
    shard(slides=source / "a.tiff", out=tmp_path / "out")
    assert contents(tmp_path / "out") == {k: v for k, v in contents(reference).items() if k.startswith("a_")}
    assert not list((tmp_path / "out").rglob(".*.[0-9]*"))
