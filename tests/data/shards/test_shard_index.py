"""The index says where tiles are, costs little, and notices when something is missing."""

import ast
import os
import zlib
from pathlib import Path

import numpy as np
import pytest

from data.fault import Fault
from data.shards.index import ShardIndex, read_jpeg
from data.shards.layout import COLUMNS
from data.shards.records import merge_records, recorded_checksums, write_record
from data.shards.scan import scan
from tests.data.shards.tars import write_tar


def make(
    folder: Path, shards: list[list[tuple[str, int]]], longest: int = 20_000, size: int = 10**8
) -> dict[str, np.ndarray]:
    """Records of shards of (slide, tiles), with tars that are only names; returns all columns in order."""
    (folder / "index").mkdir(parents=True, exist_ok=True)
    columns: dict[str, list[np.ndarray]] = {name: [] for name in COLUMNS}
    row = 0
    for number, slides in enumerate(shards):
        count = sum(tiles for _, tiles in slides)
        rows = np.arange(row, row + count)
        values = {
            "offset": 512 + rows * 21_000,
            "length": longest - rows % 100,
            "x": rows % 7 * 256,
            "y": rows // 7 * 256,
        }
        row += count
        name = f"tiles-{number:06d}"
        facts = {
            "file": f"{name}.tar",
            "size": size,
            "longest": longest,
            "slides": [{"slide": slide, "mpp": 0.5, "source": f"{folder}/{slide}.svs"} for slide, _ in slides],
            "counts": [tiles for _, tiles in slides],
        }
        write_record(folder, name, facts, values)
        if count:
            (folder / f"{name}.tar").touch()
        for key in COLUMNS:
            columns[key].append(values[key])
    return {key: np.concatenate(pieces) for key, pieces in columns.items()}


def names(count: int) -> list[str]:
    return [f"tiles-{number:06d}" for number in range(count)]


LAYOUT = [[("a", 30), ("b", 20)], [("c", 50)], [("c", 49)], [("d", 0)]]


def test_the_merged_index_is_the_records_in_order(tmp_path: Path) -> None:
    expected = make(tmp_path, LAYOUT)
    digest = merge_records(tmp_path, names(4), {"mpp": 0.5})
    index = ShardIndex.open(tmp_path)
    assert len(index) == 149 and index.digest == digest
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(index, name), expected[name])
    assert index.files == [f"{name}.tar" for name in names(3)] and index.slides == ["a", "b", "c"]
    np.testing.assert_array_equal(index.file, np.repeat([0, 1, 2], [50, 50, 49]))
    np.testing.assert_array_equal(index.slide, np.repeat([0, 1, 2], [30, 20, 99]))
    np.testing.assert_array_equal(index.rows_of(2), np.arange(50, 149))
    np.testing.assert_array_equal(index.file_start, [0, 50, 100, 149])
    assert index.meta["mpp"] == 0.5
    assert index.facts(2)["tiles"] == 99 and index.facts(2)["mpp"] == 0.5
    assert index.path(1) == tmp_path / "tiles-000001.tar"


def test_a_tile_costs_14_bytes_and_no_memory_until_it_is_read(tmp_path: Path) -> None:
    make(tmp_path, [[("a", 100_000)]])
    merge_records(tmp_path, names(1), {})
    assert (tmp_path / "index.npz").stat().st_size < 14.1 * 100_000
    index = ShardIndex.open(tmp_path)
    assert all(isinstance(getattr(index, name).base, np.memmap) for name in COLUMNS)


@pytest.mark.parametrize(("longest", "size", "dtypes"), [(70_000, 10**8, ("u4", "u4")), (20_000, 2**33, ("i8", "u2"))])
def test_large_jpegs_and_large_tars_widen_their_columns(
    tmp_path: Path, longest: int, size: int, dtypes: tuple[str, str]
) -> None:
    expected = make(tmp_path, [[("a", 500)]], longest, size)
    merge_records(tmp_path, names(1), {})
    index = ShardIndex.open(tmp_path)
    assert (index.offset.dtype, index.length.dtype) == tuple(np.dtype(text) for text in dtypes)
    np.testing.assert_array_equal(index.length, expected["length"])


def test_numpy_alone_reads_the_index(tmp_path: Path) -> None:
    expected = make(tmp_path, LAYOUT)
    merge_records(tmp_path, names(4), {})
    with np.load(tmp_path / "index.npz") as archive:
        np.testing.assert_array_equal(archive["x"], expected["x"])


def test_the_digest_is_that_of_the_content_not_of_the_folder(tmp_path: Path) -> None:
    digests = []
    for folder, layout in (
        ("here", LAYOUT),
        ("there", LAYOUT),
        ("other", [[("a", 30), ("b", 20)], [("c", 51)], [("c", 48)]]),
    ):
        make(tmp_path / folder, layout)
        digests.append(merge_records(tmp_path / folder, names(len(layout)), {}))
    assert digests[0] == digests[1] != digests[2]


def test_merging_again_leaves_the_index_alone_unless_something_is_new(tmp_path: Path) -> None:
    make(tmp_path, LAYOUT)
    merge_records(tmp_path, names(2), {})
    before = (tmp_path / "index.npz").stat().st_mtime_ns
    merge_records(tmp_path, names(2), {})
    assert (tmp_path / "index.npz").stat().st_mtime_ns == before
    merge_records(tmp_path, names(3), {})
    assert len(ShardIndex.open(tmp_path)) == 149


def test_what_is_missing_is_named_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(Fault, match=r"no tile shards in .*pretrain shard slides="):
        ShardIndex.open(tmp_path / "nowhere")
    make(tmp_path, LAYOUT)
    with pytest.raises(Fault, match=r"no index yet.*pretrain shards index shards="):
        ShardIndex.open(tmp_path)
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(Fault, match="aren't finished"):
        ShardIndex.open(tmp_path)
    merge_records(tmp_path, names(4), {})
    (tmp_path / "tiles-000001.tar").unlink()
    with pytest.raises(Fault, match=r"tiles-000001\.tar is in the index but not on disk"):
        ShardIndex.open(tmp_path)
    whole = (tmp_path / "index.npz").read_bytes()
    (tmp_path / "tiles-000001.tar").touch()
    (tmp_path / "index.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Fault, match=r"index\.npz is damaged"):
        ShardIndex.open(tmp_path)


def test_a_short_read_says_that_the_shard_is_truncated(tmp_path: Path) -> None:
    (tmp_path / "t.tar").write_bytes(bytes(range(100)))
    descriptor = os.open(tmp_path / "t.tar", os.O_RDONLY)
    assert read_jpeg(descriptor, 10, 5) == bytes(range(10, 15))
    for offset in (90, 200):
        with pytest.raises(Fault, match="truncated"):
            read_jpeg(descriptor, offset, 20)
    os.close(descriptor)


@pytest.mark.parametrize("key", ["files", "coordinates"])
def test_an_index_that_points_out_of_its_folder_is_refused(tmp_path: Path, key: str) -> None:
    make(tmp_path, LAYOUT)
    merge_records(tmp_path, names(4), {})
    index = ShardIndex.open(tmp_path)
    named = index.meta[key] if key == "files" else index.meta["slides"][key]
    for outside in ("../x", "/x", "a/../../x"):
        named[0] = outside
        with pytest.raises(
            Fault, match=r"names a file outside of its folder, .*x: it is damaged, or not to be trusted"
        ):
            ShardIndex(tmp_path, vars(index), index.meta)


def test_threads_read_checksums_without_pythons_parser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads of Python 3.11 that parse at the same time end in a SystemError, once in some thousand shards that a run
    opens."""
    write_tar(tmp_path / "a.tar", [("s_0_0.jpg", b"one"), ("s_1_0.jpg", b"two")])
    index = scan(tmp_path)
    monkeypatch.delattr(ast, "parse")
    assert recorded_checksums(index, 0).tolist() == [zlib.crc32(b"one"), zlib.crc32(b"two")]  # type: ignore[union-attr]
