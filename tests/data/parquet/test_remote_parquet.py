"""Parquet files behind a URL are read by the ranges of their images, through a server's failures."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import HfFileSystem, constants

from data import remote
from data.fault import Fault
from data.lease import once
from data.parquet.files import list_parquet
from data.parquet.index import ParquetIndex, ParquetQuestion, scan_parquet
from data.tiles.of_parquet import ParquetTiles
from data.tiles.stream import Stream
from tests.data.flaky_server import CUT, FAIL, FlakyServer, HubHandler, S3Handler, serving
from tests.data.parquet.tables import write_table


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``shards/a.parquet`` and ``shards/b.parquet``, with a column of four megabytes beside the images."""
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    monkeypatch.setattr(remote, "STALLED_AFTER", 0.4)
    for name, first in (("a", 0), ("b", 30)):
        others = np.random.default_rng(0).bytes(300_000).hex()
        numbers = range(first, first + 30)
        write_table(
            tmp_path / "shards" / f"{name}.parquet",
            numbers,
            group=10,
            slide=["s"] * 30,
            other=[others[n * 20_000 : (n + 1) * 20_000] for n in range(30)],
        )
    return tmp_path


def read(named: str, index: Path) -> ParquetTiles:
    question = ParquetQuestion.of(list_parquet([named]), None, None, None, None)
    once(question.path(index), lambda: scan_parquet(index, question, lambda files, count: files))
    return ParquetTiles(ParquetIndex.open(index, question))


def test_a_file_behind_a_url_gives_the_tiles_of_a_local_one_by_ranges(files: Path, tmp_path: Path) -> None:
    local = read(str(files / "shards" / "a.parquet"), tmp_path / "local")
    with serving(files) as server:
        there = read(f"{server.url}/shards/a.parquet", tmp_path / "there")
        server.served.clear()
        server.misbehave.extend([FAIL, CUT])
        for number in range(30):
            assert np.array_equal(there.read(number), local.read(number))
        assert len(server.served) <= 4  # the footer, and 30 neighbouring tiles at once, through two failures
        with pytest.raises(Fault, match="a web server doesn't list its folders"):
            list_parquet([f"{server.url}/shards"])


@pytest.fixture
def s3(files: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FlakyServer]:
    s3fs = pytest.importorskip("s3fs")
    for name, value in (("AWS_ACCESS_KEY_ID", "key"), ("AWS_SECRET_ACCESS_KEY", "secret")):
        monkeypatch.setenv(name, value)
    with serving(files, S3Handler) as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.url)
        s3fs.S3FileSystem.clear_instance_cache()
        yield running
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_folder_of_a_bucket_is_listed(s3: FlakyServer, files: Path, tmp_path: Path) -> None:
    assert list_parquet(["s3://shards"]) == ["s3://shards/a.parquet", "s3://shards/b.parquet"]
    asked = ParquetQuestion.of(["s3://shards/a.parquet"], None, None, None, None)
    assert asked.versions == ['"1"']  # its ETag; another means that its index isn't taken again
    there = read("s3://shards", tmp_path / "there")
    local = read(str(files / "shards"), tmp_path / "local")
    assert len(there) == len(local) == 60 and np.array_equal(there.read(45), local.read(45))
    assert there.digest == local.digest  # names below the common folder, sizes, columns
    with pytest.raises(Fault, match="there is no Parquet file at"):
        list_parquet([str(tmp_path / "nothing")])


@pytest.fixture
def hub(files: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FlakyServer]:
    """The hub's own file system, and in the place of the hub a server with the data set ``org/tiles``."""
    (files / "datasets" / "org" / "tiles").mkdir(parents=True)
    (files / "shards").rename(files / "datasets" / "org" / "tiles" / "data")
    with serving(files, HubHandler) as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{running.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        HfFileSystem.clear_instance_cache()
        yield running
    HfFileSystem.clear_instance_cache()


def test_a_data_set_of_the_hub_is_listed_indexed_and_read_by_ranges_and_goes_on_without_another_scan(
    hub: FlakyServer, files: Path, tmp_path: Path
) -> None:
    named, folder = "hf://datasets/org/tiles", files / "datasets" / "org" / "tiles" / "data"
    assert list_parquet([named]) == [f"{named}/data/{name}.parquet" for name in "ab"]
    assert list_parquet([f"{named}/data/b*.parquet"]) == [f"{named}/data/b.parquet"]
    there, local = read(named, tmp_path / "there"), read(str(folder), tmp_path / "local")
    assert len(there) == 60 and there.digest == local.digest
    hub.misbehave.extend([FAIL, CUT])
    for number in (0, 45, 59):
        assert np.array_equal(there.read(number), local.read(number))
    assert hub.served and {name for name, _ in hub.served} == {"a.parquet", "b.parquet"}
    hub.served.clear()
    again = read(named, tmp_path / "there")  # as a run that goes on does
    assert not hub.served and again.digest == there.digest
    orders = [
        np.concatenate([Stream(source.parts, batch_size=4, lanes=2, window=2, seed=0).batch(step) for step in (7, 8)])
        for source in (again, local)
    ]
    assert np.array_equal(*orders)
    assert all(np.array_equal(again.read(int(number)), local.read(int(number))) for number in orders[0][:2])
    with pytest.raises(Fault, match="hf://datasets/org/none is not there, or not for you"):
        list_parquet(["hf://datasets/org/none"])
