"""Tiles by number over several folders: the right pixels, in blocks that never cross a tar."""

import pickle
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from data.shards.scan import scan
from data.tiles import of_shards
from data.tiles.of_shards import ShardTiles
from data.tiles.source import UnreadableTile, cut_blocks
from tests.data.shards.tars import write_tar
from tests.data.shards.tile_folders import picture, spoil, write_tiles


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiles(tmp_path / "a", [7, 5])


def near(one: np.ndarray, other: np.ndarray) -> bool:
    """Equal but for JPEG's loss; pictures of two numbers differ by ten times as much."""
    return float(np.abs(one.astype(int) - other.astype(int)).mean()) < 6


def test_every_number_gives_its_tile_over_tars_and_folders(folder: Path, tmp_path: Path) -> None:
    tiles = ShardTiles(shards=[folder, write_tiles(tmp_path / "b", [4])])
    assert len(tiles) == 16
    for number in range(16):
        expected = number if number < 12 else number - 12
        tile = tiles.read(number)
        assert tile.dtype == np.uint8 and near(tile, picture(expected)) and not near(tile, picture(expected + 1))


def test_blocks_cover_every_tile_and_never_cross_a_tar(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_shards, "cut_blocks", partial(cut_blocks, most=3))
    sizes = ShardTiles(shards=[folder]).parts[0].block_sizes
    assert sizes.sum() == 12 and sizes.max() <= 3
    assert 7 in np.cumsum(sizes)  # the first tar ends where a block ends
    assert sizes.max() - sizes.min() <= 1


def test_a_spoilt_tile_is_named_with_its_tar_slide_and_place(folder: Path) -> None:
    spoil(folder, [8])
    with pytest.raises(UnreadableTile, match=r"tile slide1 \(0, 48\) in .*tiles-000001\.tar can't be read"):
        ShardTiles(shards=[folder]).read(8)


def test_a_spoilt_tile_without_a_place_is_named_by_its_number_and_byte(tmp_path: Path) -> None:
    good = simplejpeg.encode_jpeg(picture(0))
    write_tar(tmp_path / "a.tar", [("one.jpg", good), ("two.jpg", good[:200])])
    scan(tmp_path)
    with pytest.raises(UnreadableTile, match=r"^tile number 2 \(at byte \d+\) in .*a\.tar can't be"):
        ShardTiles(shards=[str(tmp_path)]).read(1)


def test_a_truncated_shard_loses_its_last_tiles_and_no_others(folder: Path) -> None:
    tar = folder / "tiles-000001.tar"
    tiles = ShardTiles(shards=[folder])
    index, row = tiles.locate(10)
    with tar.open("r+b") as file:
        file.truncate(int(index.offset[row]) + 10)
    assert near(tiles.read(9), picture(9))
    with pytest.raises(UnreadableTile, match="truncated"):
        tiles.read(10)


def test_a_shard_that_disappears_is_an_unreadable_tile_not_a_crash(folder: Path) -> None:
    tiles = ShardTiles(shards=[folder])
    (folder / "tiles-000000.tar").unlink()
    with pytest.raises(UnreadableTile, match=r"tiles-000000\.tar"):
        tiles.read(0)


def test_threads_read_what_one_reader_reads(folder: Path) -> None:
    tiles = ShardTiles(shards=[folder])
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(tiles.read, list(range(12)) * 8))
    for position, tile in enumerate(found):
        assert np.array_equal(tile, tiles.read(position % 12))
    assert len(tiles._tars) == 2  # one descriptor a tar, whoever came first


def test_a_copy_for_another_process_opens_its_own_files(folder: Path) -> None:
    tiles = ShardTiles(shards=[folder])
    tiles.read(0)
    copy = pickle.loads(pickle.dumps(tiles))
    assert len(copy._tars) == 0 and np.array_equal(copy.read(0), tiles.read(0))


def test_the_digest_tells_other_tiles_and_another_order(folder: Path, tmp_path: Path) -> None:
    other = write_tiles(tmp_path / "b", [4])
    digests = {ShardTiles(shards=folders).digest for folders in ([folder], [other], [folder, other], [other, folder])}
    assert len(digests) == 4
    assert ShardTiles(shards=[write_tiles(tmp_path / "c", [7, 5])]).digest == ShardTiles(shards=[folder]).digest


def test_a_tar_that_is_numbered_says_no_slide_of_tiles_that_name_none(tmp_path: Path) -> None:
    """A scan takes the tar's name where nothing else says the slide: so tars of one slide each are known by it."""
    for tar, slide in (("tiles-000000", None), ("patient7", f"{tmp_path}/patient7")):
        write_tar(tmp_path / f"{tar}.tar", [("bare.jpg", b"jpeg")])
        scan(tmp_path)
        tiles = ShardTiles(shards=[str(tmp_path)])
        found = {index: tiles.slide(index) for index in range(len(tiles))}
        assert slide in found.values()
    assert set(found.values()) == {None, f"{tmp_path}/patient7"}
