"""One reader of tars: the same bytes in any order, few files open, and no other tile passed off as the one that was
asked for."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from data import open_files
from data.embeddings.sources import ShardSource
from data.fault import Fault
from data.remote import Truncated
from data.shards.index import ShardIndex
from data.shards.open_tars import OpenTars
from data.tiles.of_shards import ShardTiles
from tests.data.shards.tile_folders import write_tiles


def test_tiles_in_any_order_are_those_that_training_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_files, "share_of_open_files", lambda holder: 2)
    folder = write_tiles(tmp_path / "shards", [7, 5, 4])
    index, tars, training = ShardIndex.open(folder), OpenTars(), ShardTiles(shards=[str(folder)])
    for row in (11, 0, 15, 6, 7, 3, 12, 0):
        assert np.array_equal(simplejpeg.decode_jpeg(tars.jpeg(index, row)), training.read(row))
        assert len(tars) <= 2
    assert index.file_of(6) == 0 and index.file_of(7) == 1 and index.slide_of(15) == index.slides[index.slide[15]]


def test_a_tar_that_ends_too_early_is_said(tmp_path: Path) -> None:
    folder = write_tiles(tmp_path / "shards", [4])
    index, tars = ShardIndex.open(folder), OpenTars()
    with (folder / "tiles-000000.tar").open("r+b") as tar:
        tar.truncate(int(index.offset[3]) + 10)
    assert tars.jpeg(index, 2)
    with pytest.raises(Truncated, match="truncated"):
        tars.jpeg(index, 3)


def test_whoever_reads_another_shard_than_the_one_that_was_indexed_is_told(tmp_path: Path) -> None:
    """Training, embedding and looking take tiles from the same reader; here a shard's place was taken by a
    neighbour."""
    folder = write_tiles(tmp_path / "shards", [3, 3])
    index = ShardIndex.open(folder)
    shutil.copy(folder / "tiles-000000.tar", folder / "tiles-000001.tar")
    with pytest.raises(ValueError, match="its index is of another file"):
        OpenTars().jpeg(index, 3)
    found = ShardSource([str(folder)])._read(index, np.arange(6))
    assert all(isinstance(tile, np.ndarray) for tile in found[:3])
    assert all(isinstance(tile, Fault) and "another file" in str(tile) for tile in found[3:])


def test_a_tar_that_vanishes_while_it_is_embedded_is_a_fault_of_each_of_its_tiles(tmp_path: Path) -> None:
    folder = write_tiles(tmp_path / "shards", [3, 2])
    source = ShardSource([str(folder)])
    (folder / "tiles-000001.tar").unlink()
    assert all(isinstance(tile, np.ndarray) for tile in source.open("slide0").read(np.arange(3)))
    gone = source.open("slide1").read(np.arange(2))
    assert all(isinstance(tile, Fault) and "tiles-000001.tar can't be decoded" in str(tile) for tile in gone)
