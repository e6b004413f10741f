"""`pretrain shard` from slides to shards: killed, repeated, extended and fed with bad slides."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import webdataset

from data.fault import Fault
from data.shards.folder import load_rows
from data.shards.index import ShardIndex, read_jpeg
from data.slides.coordinates_h5 import coordinates_path, read_coordinates_h5
from pretrain.commands.shard import Config, run
from tests.data.slides.synthetic_slides import stained, write_slide

DEFAULTS: dict[str, Any] = {
    "slides": None,
    "out": None,
    "mpp": 0.5,
    "tile_size": 64,
    "tissue": ["otsu"],
    "min_tissue": None,
    "min_saturated": None,
    "slides_mpp": None,
    "patient_pattern": "TCGA-[A-Z0-9]{2}-[A-Z0-9]{4}",
    "tiles_per_shard": 40,
    "name": "tiles",
    "workers": 1,
    "coordinates": None,
    "part": None,
}


def shard(**settings: Any) -> None:
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()}
    if isinstance(plain.get("slides"), str):
        plain["slides"] = [plain["slides"]]
    run(Config(**(DEFAULTS | plain)))


def slides(folder: Path, names: str = "a b c") -> Path:
    for number, name in enumerate(names.split()):
        write_slide(folder / f"{name}.tiff", stained(420, 500, [(250, 200, 150 + 10 * number)], seed=number), 0.5)
    return folder


def contents(out: Path) -> dict[str, bytes]:
    """Every tile by slide, x and y, read through the index; fails on a duplicate."""
    index = ShardIndex.open(out)
    tiles: dict[str, bytes] = {}
    for row in range(len(index)):
        descriptor = os.open(index.path(int(index.file[row])), os.O_RDONLY)
        key = f"{index.slides[index.slide[row]]}_{index.x[row]}_{index.y[row]}"
        assert key not in tiles
        tiles[key] = read_jpeg(descriptor, int(index.offset[row]), int(index.length[row]))
        os.close(descriptor)
    return tiles


def tars(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.tar"))}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Three slides and the shards of an undisturbed run."""
    folder = tmp_path_factory.mktemp("done")
    shard(slides=slides(folder / "slides"), out=folder / "out")
    return folder / "slides", folder / "out"


def test_index_coordinates_thumbnails_and_shards_agree(done: tuple[Path, Path]) -> None:
    _, out = done
    tiles = contents(out)
    stock = [
        sample["__key__"]
        for path in sorted(out.glob("*.tar"))
        for sample in webdataset.WebDataset(str(path), shardshuffle=False)
    ]
    assert sorted(stock) == sorted(tiles)
    index = ShardIndex.open(out)
    for number, slide in enumerate(index.slides):
        coordinates = read_coordinates_h5(coordinates_path(out, slide))
        rows = index.rows_of(number)
        assert coordinates.x.tolist() == index.x[rows].tolist() and coordinates.y.tolist() == index.y[rows].tolist()
        assert (out / "thumbnails" / f"{slide}.jpg").exists()
        assert load_rows(out)[slide].kept == len(rows) == index.facts(number)["tiles"]
        assert index.facts(number)["coordinates"] == f"coordinates/{slide}_patches.h5"
    assert index.meta["mpp"] == 0.5 and index.meta["tile_size"] == 64


def test_run_again_it_does_nothing(done: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    source, out = done
    before = {
        path: path.stat().st_mtime_ns for path in out.rglob("*") if path.suffix in (".tar", ".npz", ".h5", ".jpg")
    }
    shard(slides=source, out=out)
    assert "nothing left to do" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_processes_make_no_difference(done: tuple[Path, Path], tmp_path: Path) -> None:
    source, out = done
    shard(slides=source, out=tmp_path / "out", workers=2)
    assert tars(tmp_path / "out") == tars(out)
    assert ShardIndex.open(tmp_path / "out").digest == ShardIndex.open(out).digest


ROOT = Path(__file__).resolve().parents[3]

KILLED = """
import os, signal, sys
from data.slides import cutting
from pretrain.commands.shard import Config, run
encode, tiles = cutting.encode, 0
def last(tile):
    global tiles
    tiles += 1
    if tiles == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(tile)
cutting.encode = last
run(Config(**eval(sys.argv[1])))
"""


def test_killed_in_the_middle_of_any_shard_it_leaves_no_half_one_and_continues_to_the_same_end(
    done: tuple[Path, Path], tmp_path: Path
) -> None:
    source, reference = done
    out = tmp_path / "out"
    settings = DEFAULTS | {"slides": [str(source)], "out": str(out)}
    expected = tars(reference)
    rows = ShardIndex.open(reference).file
    first, second, _ = (int((rows == shard).sum()) for shard in range(3))
    made: dict[Path, int] = {}  # what was whole at a kill, and when it was written
    # Each run begins with the first shard that isn't whole.
    for shards, tile in enumerate((10, first + 10, second + 10)):
        killed = subprocess.run([sys.executable, "-c", KILLED, repr(settings), str(tile)], cwd=ROOT, timeout=120)
        assert killed.returncode == -signal.SIGKILL
        assert len(tars(out)) == shards and list(out.glob(".tiles*.tar.*")), "not killed in the middle of a shard"
        whole = [*out.glob("*.tar"), *out.glob("coordinates/*.h5"), *out.glob("thumbnails/*.jpg")]
        made = {path: path.stat().st_mtime_ns for path in whole} | made
        for name, content in tars(out).items():
            assert content == expected[name]
        if shards:
            with pytest.raises(Fault, match="aren't finished"):
                ShardIndex.open(out)
    shard(slides=source, out=out)
    assert tars(out) == expected
    assert contents(out) == contents(reference)
    assert len(made) > 6 and made == {path: path.stat().st_mtime_ns for path in made}, "something was done twice"
    assert not list(out.rglob(".tiles*"))


def test_bad_slides_are_named_and_counted_and_the_others_lose_nothing(
    done: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, reference = done
    source = slides(tmp_path / "slides")
    write_slide(source / "mute.tiff", stained(420, 500, [(250, 200, 150)]), None)
    dark = stained(420, 500, []) * 0
    dark[200:204, 200:204, 0] = 220
    write_slide(source / "dark.tiff", dark, 0.5)
    write_slide(source / "glass.tiff", stained(420, 500, []), 0.5)
    (source / "broken.svs").write_bytes(b"no slide")
    shard(slides=source, out=tmp_path / "out")
    err = capsys.readouterr().err
    assert contents(tmp_path / "out") == contents(reference)
    for line in (
        "mute.tiff does not say how many microns",
        "dark.tiff is a fluorescence slide",
        "broken.svs cannot be read",
        "no tissue found on",
    ):
        assert sum(line in printed for printed in err.splitlines()) == 1
    assert "7 slides: 3 tiled, 1 no tissue, 3 failed" in err
    rows = load_rows(tmp_path / "out")
    assert {row.slide for row in rows.values() if row.outcome == "failed"} == {"mute", "dark", "broken"}
    assert "slides_mpp" in rows["mute"].message

    shard(slides=source, out=tmp_path / "out", slides_mpp=0.5)  # the way out that the message named
    assert load_rows(tmp_path / "out")["mute"].outcome == "tiled"
    assert "7 slides: 4 tiled, 1 no tissue, 2 failed" in capsys.readouterr().err
    assert contents(tmp_path / "out").items() > contents(reference).items()


def test_only_bad_slides_end_in_a_fault(tmp_path: Path) -> None:
    (tmp_path / "broken.svs").write_bytes(b"no slide")
    with pytest.raises(Fault, match="none of the 1 slides gave a tile"):
        shard(slides=tmp_path / "broken.svs", out=tmp_path / "out")


def test_pale_tiles_are_not_cut_and_are_counted_by_slide(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = stained(256, 512, [(256, 128, 600)])
    image[:, :256] = image[:, :256].mean(axis=2, keepdims=True)
    write_slide(tmp_path / "half.tiff", image, 0.5)
    asked = {"slides": tmp_path / "half.tiff", "out": tmp_path / "out", "tissue": ["gigapath"], "min_tissue": [0.0]}
    shard(**asked, min_saturated=0.5)
    (row,) = load_rows(tmp_path / "out").values()
    assert (row.kept, row.pale, row.empty) == (16, 16, 0) and "pale" in capsys.readouterr().err
    index = ShardIndex.open(tmp_path / "out")
    assert len(index) == 16 and min(index.x) == 256
    with pytest.raises(Fault, match=r"min_saturated=0\.5 then, None now"):
        shard(**asked)


def test_a_slide_that_breaks_between_tissue_and_tiles_is_retried(
    done: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pretrain.cutting import tissue

    source, reference = slides(tmp_path / "slides"), done[1]
    survey = tissue.survey

    def then_break(job: tuple[Path, str], **settings: Any) -> Any:
        tiling = survey(job, **settings)
        if job[1] == "b":
            job[0].rename(job[0].with_suffix(".gone"))
        return tiling

    monkeypatch.setattr(tissue, "survey", then_break)
    shard(slides=source, out=tmp_path / "out")
    assert load_rows(tmp_path / "out")["b"].outcome == "failed"
    assert contents(tmp_path / "out") == {
        key: tile for key, tile in contents(reference).items() if not key.startswith("b_")
    }
    monkeypatch.undo()
    (source / "b.gone").rename(source / "b.tiff")
    shard(slides=source, out=tmp_path / "out")
    assert load_rows(tmp_path / "out")["b"].outcome == "tiled"
    assert contents(tmp_path / "out") == contents(reference)


def test_slides_can_be_added_later(done: tuple[Path, Path], tmp_path: Path) -> None:
    source, reference = done
    shard(slides=source / "a.tiff", out=tmp_path / "out")
    first = tars(tmp_path / "out")
    shard(slides=[str(source / "b.tiff"), str(source / "c.tiff")], out=tmp_path / "out")
    assert tars(tmp_path / "out").items() > first.items()
    assert contents(tmp_path / "out") == contents(reference)


def test_slides_of_the_same_name_are_told_apart_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slides(tmp_path / "one", "s")
    slides(tmp_path / "two", "s")
    shard(slides=tmp_path, out=tmp_path / "out")
    assert ShardIndex.open(tmp_path / "out").slides == ["one-s", "two-s"]
    assert "called one-s:" in capsys.readouterr().err


def test_a_lost_shard_is_made_again(done: tuple[Path, Path], tmp_path: Path) -> None:
    source, reference = done
    shard(slides=source, out=tmp_path / "out")
    (tmp_path / "out/tiles-000001.tar").unlink()
    shard(slides=source, out=tmp_path / "out")
    assert tars(tmp_path / "out") == tars(reference)


def test_what_cannot_be_is_refused_in_one_sentence(done: tuple[Path, Path], tmp_path: Path) -> None:
    source, out = done
    with pytest.raises(Fault, match=r"cut with other settings \(mpp=0.5 then, 1.0 now\)"):
        shard(slides=source, out=out, mpp=1.0)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/x.tar").touch()
    with pytest.raises(Fault, match="another program"):
        shard(slides=source, out=tmp_path / "theirs")


def test_real_slides_good_and_bad(shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard(
        slides=[str(shared / "slides/whole"), str(shared / "slides/odd")],
        out=tmp_path / "out",
        tile_size=256,
        workers=1,
    )
    err = capsys.readouterr().err
    assert "5 slides: 1 tiled, 4 failed" in err
    assert len(ShardIndex.open(tmp_path / "out")) == 44


def test_a_wrong_resolution_is_refused_until_it_is_overruled_which_is_said(
    tmp_path: Path, done: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Cut as what it isn't, the same picture gives other tiles, in silence."""
    source = tmp_path / "slides"
    for number, (name, mpp) in enumerate((("a", 352.78), ("b", 0.025), ("c", 0.5))):
        write_slide(source / f"{name}.tiff", stained(420, 500, [(250, 200, 150 + 10 * number)], seed=number), mpp)
    (source / "mpp.csv").write_text("slide,mpp\na.tiff,0.5\nb,0.5\n")
    out = tmp_path / "out"
    shard(slides=source, out=out)
    err = capsys.readouterr().err
    assert "3 slides: 1 tiled, 2 failed" in err and "a.tiff says that a pixel is 352.8 µm wide" in err
    shard(slides=source, out=out, slides_mpp=source / "mpp.csv")
    err = capsys.readouterr().err
    assert (
        "a.tiff says 352.8 µm per pixel, and slides_mpp=0.5 overrules that" in err and "tells of 2 of 3 slides" in err
    )
    assert contents(out) == contents(done[1])
    shard(slides=source, out=out, slides_mpp=0.5)
    assert "nothing left to do" in capsys.readouterr().err
    with pytest.raises(
        Fault, match=r"was cut as one of 0\.5 µm per pixel, and slides_mpp= says 0\.25 now: choose another out="
    ):
        shard(slides=source, out=out, slides_mpp=0.25)


def test_slides_of_any_names_are_cut_side_by_side_and_keep_their_names(tmp_path: Path) -> None:
    files = ["张三.tiff", "李四.tiff", "S12.3456.tiff", "S12-3456.tiff", "case1.tif", "case1.tiff", f"{'x' * 245}.tiff"]
    for number, name in enumerate(files):
        write_slide(tmp_path / "slides" / name, stained(200, 200, [(100, 100, 80)], number), 0.5)
    (tmp_path / "list.txt").write_text("slides", encoding="utf-8-sig")
    shard(slides=tmp_path / "list.txt", out=tmp_path / "out")
    index = ShardIndex.open(tmp_path / "out")
    assert sorted(Path(index.facts(number)["source"]).name for number in range(len(index.slides))) == sorted(files)
    assert all((tmp_path / "out" / str(index.facts(number)["coordinates"])).exists() for number in range(len(files)))
