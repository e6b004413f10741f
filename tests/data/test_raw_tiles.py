"""Bytes of many tiles at once: the same as one at a time."""

from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from data.fault import Fault
from data.raw_tiles import RawTiles
from data.shard_index import ShardIndex
from data.shard_tiles import ShardTiles
from tests.data.tile_folders import write_tiles


def test_tiles_read_together_in_any_order_are_those_read_one_by_one(tmp_path: Path) -> None:
    folder = write_tiles(tmp_path / "shards", [7, 5])
    one_by_one = ShardTiles(shards=[str(folder)])
    rows = np.array([11, 0, 6, 7, 3, 0])
    with RawTiles(ShardIndex.open(folder)) as raw:
        for row, data in zip(rows.tolist(), raw.read(rows), strict=True):
            assert np.array_equal(simplejpeg.decode_jpeg(data), one_by_one.read(row))
        assert raw.read(rows[:0]) == []


def test_a_tar_that_ends_too_early_is_said(tmp_path: Path) -> None:
    folder = write_tiles(tmp_path / "shards", [4])
    index = ShardIndex.open(folder)
    with (folder / "tiles-000000.tar").open("r+b") as tar:
        tar.truncate(int(index.offset[3]) + 10)
    with RawTiles(index) as raw:
        assert len(raw.read(np.arange(3))) == 3
        with pytest.raises(Fault, match="truncated"):
            raw.read(np.array([3]))
