"""Shards hold the right tiles, appear whole or not at all, and are read by stock webdataset."""

import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from data.fault import Fault
from data.keyed import rng
from data.shards.index import ShardIndex, read_jpeg
from data.shards.records import merge_records
from data.shards.writing import PlannedShard, TileRange, is_published, plan_shards, read_shard_facts, write_shard
from data.slides import cutting
from data.slides.coordinates_h5 import write_tiling
from data.slides.reading import Slide
from data.slides.tiling import READ, Tiling, TilingSettings, tile_slide
from data.slides.tissue import tissue_needed
from tests.data.shards.tile_folders import write_tiles
from tests.data.slides.synthetic_slides import stained, write_slide

SETTINGS = TilingSettings(mpp=0.5, tile_size=64, tissue=tissue_needed(["otsu"], [0.25]))


def tiled(folder: Path, name: str, image: np.ndarray | None = None) -> Tiling:
    path = write_slide(
        folder / "slides" / f"{name}.tiff", stained(500, 600, [(250, 250, 180)]) if image is None else image, 0.5
    )
    with Slide(path) as slide:
        tiling, _ = tile_slide(slide, name, SETTINGS, None, "")
    for inside in ("coordinates", "index"):
        (folder / inside).mkdir(exist_ok=True)
    write_tiling(folder, tiling)
    return tiling


def part_of(tiling: Tiling) -> TileRange:
    return TileRange(tiling.slide, 0, len(tiling.tiles(*READ)[0]))


@given(st.lists(st.integers(0, 60), max_size=30), st.integers(1, 25))
def test_a_plan_covers_every_tile_once_and_splits_only_large_slides(counts: list[int], limit: int) -> None:
    parts = [TileRange(f"s{number}", 0, count) for number, count in enumerate(counts)]
    plan = plan_shards(parts, limit, "tiles", 3)
    assert [shard.name for shard in plan] == [f"tiles-{3 + number:06d}" for number in range(len(plan))]
    covered = [(part.slide, tile) for shard in plan for part in shard.parts for tile in range(part.first, part.last)]
    assert covered == [(f"s{number}", tile) for number, count in enumerate(counts) for tile in range(count)]
    assert all(0 < len(shard) <= limit for shard in plan)
    for number, count in enumerate(counts):
        homes = [shard for shard in plan if any(part.slide == f"s{number}" for part in shard.parts)]
        assert len(homes) == (0 if not count else 1 if count <= limit else -(-count // limit))


def test_tiles_in_a_shard_are_the_slides_pixels_through_the_index(tmp_path: Path) -> None:
    tilings = [tiled(tmp_path, name) for name in ("a", "b")]
    shard = PlannedShard("tiles-000000", [part_of(tiling) for tiling in tilings])
    written = write_shard(tmp_path, shard, {})
    merge_records(tmp_path, [shard.name], {})
    index = ShardIndex.open(tmp_path)
    assert written.tiles == len(index) == len(shard) and not written.failed
    assert index.slides == ["a", "b"]
    descriptor = os.open(index.path(0), os.O_RDONLY)
    for row in (0, 7, len(index) - 1):
        tile = simplejpeg.decode_jpeg(read_jpeg(descriptor, int(index.offset[row]), int(index.length[row])))
        with Slide(tmp_path / "slides" / f"{index.slides[index.slide[row]]}.tiff") as slide:
            expected = slide.read_tile(tilings[0].grid, int(index.x[row]), int(index.y[row]))
        assert tile.shape == (64, 64, 3)
        assert np.abs(tile.astype(int) - expected).mean() < 6, "JPEG noise only"
    os.close(descriptor)


def test_stock_webdataset_reads_the_shards(tmp_path: Path) -> None:
    tiling = tiled(tmp_path, "a_b")
    write_shard(tmp_path, PlannedShard("tiles-000000", [part_of(tiling)]), {})
    samples = list(webdataset.WebDataset(str(tmp_path / "tiles-000000.tar"), shardshuffle=False).decode("rgb8"))
    xs, ys, shares = tiling.tiles(*READ)
    assert [sample["__key__"] for sample in samples] == [f"a_b_{x}_{y}" for x, y in zip(xs, ys, strict=True)]
    for sample, x, y, share in zip(samples, xs, ys, shares, strict=True):
        assert sample["jpg"].shape == (64, 64, 3)
        facts = sample["json"]
        assert (facts["x"], facts["y"], facts["slide"], facts["level"]) == (x, y, "a_b", 0)
        assert (facts["tile_size"], facts["tile_size_level0"]) == (64, 64.0)
        assert facts["mpp"] == pytest.approx(0.5) and facts["tissue"] == pytest.approx(share, abs=1e-2)


def test_writing_a_shard_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    shard = PlannedShard("tiles-000000", [part_of(tiled(tmp_path, "a"))])
    write_shard(tmp_path, shard, {})
    first, record = (tmp_path / "tiles-000000.tar").read_bytes(), read_shard_facts(tmp_path, shard.name)
    write_shard(tmp_path, shard, {})
    assert (tmp_path / "tiles-000000.tar").read_bytes() == first
    assert read_shard_facts(tmp_path, shard.name) == record


def test_an_interrupted_shard_leaves_nothing_under_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = PlannedShard("tiles-000000", [part_of(tiled(tmp_path, "a"))])
    calls = []

    def full(tile: np.ndarray) -> bytes:
        calls.append(1)
        if len(calls) == 5:
            raise OSError(28, "No space left on device")
        return encode(tile)

    encode = cutting.encode
    monkeypatch.setattr(cutting, "encode", full)
    with pytest.raises(Fault, match=r"tiles-000000\.tar can't be written \(No space left"):
        write_shard(tmp_path, shard, {})
    assert not list(tmp_path.glob("*.tar")) and not list(tmp_path.glob(".*"))
    assert not is_published(tmp_path, shard.name)


def test_a_shard_whose_record_is_damaged_in_whatever_way_is_made_again_or_is_what_it_was(tmp_path: Path) -> None:
    folder = write_tiles(tmp_path / "x", [3])
    record = folder / "index/tiles-000000.npz"
    content, facts = record.read_bytes(), read_shard_facts(folder, "tiles-000000")
    for draw in range(150):
        spoilt = bytearray(content)
        spoilt[int(rng(draw, "record").integers(len(content)))] ^= 1 << draw % 8
        record.write_bytes(spoilt)
        if is_published(folder, "tiles-000000"):
            assert read_shard_facts(folder, "tiles-000000") == facts


def test_a_slide_that_fails_is_taken_out_and_the_others_stay(tmp_path: Path) -> None:
    tilings = [tiled(tmp_path, name) for name in ("a", "b", "c")]
    (tmp_path / "slides/b.tiff").write_bytes(b"gone bad")
    written = write_shard(tmp_path, PlannedShard("tiles-000000", [part_of(tiling) for tiling in tilings]), {})
    assert list(written.failed) == ["b"] and "b.tiff cannot be read" in written.failed["b"]
    with tarfile.open(tmp_path / "tiles-000000.tar") as tar:
        slides = {name.split("_")[0] for name in tar.getnames()}
    assert slides == {"a", "c"}
    merge_records(tmp_path, ["tiles-000000"], {})
    assert ShardIndex.open(tmp_path).slides == ["a", "c"]


def damage(path: Path, share: float) -> None:
    """Overwrite the compressed data of a share of the slide's tiles, from its middle on."""
    import tifffile

    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        spots = list(zip(page.dataoffsets, page.databytecounts, strict=True))
    bad = spots[len(spots) // 2 :][: max(1, round(share * len(spots)))]
    with path.open("r+b") as file:
        for offset, count in bad:
            file.seek(offset)
            file.write(b"\xff" * count)


def test_a_few_damaged_tiles_are_left_out_and_counted(tmp_path: Path) -> None:
    tiling = tiled(tmp_path, "a", stained(1200, 1200, [(600, 600, 590)]))
    damage(tmp_path / "slides/a.tiff", share=0.01)
    shard = PlannedShard("tiles-000000", [part_of(tiling)])
    written = write_shard(tmp_path, shard, {})
    facts = read_shard_facts(tmp_path, shard.name)
    assert 0 < len(facts["rejected"]) == len(shard) - written.tiles <= 9 and not written.failed
    assert {verdict for *_, verdict in facts["rejected"]} == {4}


def test_a_slide_damaged_through_and_through_fails_by_name(tmp_path: Path) -> None:
    shard = PlannedShard("tiles-000000", [part_of(tiled(tmp_path, "a", stained(1200, 1200, [(600, 600, 590)])))])
    damage(tmp_path / "slides/a.tiff", share=0.5)
    written = write_shard(tmp_path, shard, {})
    assert "a.tiff is damaged" in written.failed["a"] and "too many" in written.failed["a"]
    assert not list(tmp_path.glob("*.tar")) and not is_published(tmp_path, shard.name)


def test_tiles_found_empty_are_recorded_with_their_cell(tmp_path: Path) -> None:
    tiling = tiled(tmp_path, "a")
    flat = stained(500, 600, [(250, 250, 180)])
    flat[192:256, 256:320] = (190, 110, 170)
    write_slide(tmp_path / "slides/a.tiff", flat, 0.5)
    written = write_shard(tmp_path, PlannedShard("tiles-000000", [part_of(tiling)]), {})
    assert read_shard_facts(tmp_path, "tiles-000000")["rejected"] == [["a", 256, 192, 3]]
    assert written.tiles == len(tiling.tiles(*READ)[0]) - 1


def test_members_say_nothing_of_this_machine(tmp_path: Path) -> None:
    write_shard(tmp_path, PlannedShard("tiles-000000", [part_of(tiled(tmp_path, "a"))]), {})
    with tarfile.open(tmp_path / "tiles-000000.tar") as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.uname) == (0, 0, "")
            if member.name.endswith(".json"):
                content = tar.extractfile(member)
                assert content is not None and str(tmp_path) not in json.dumps(json.load(content))
