"""Files behind a URL: the same bytes as from a disk, through failures, and a clear end where there is no hope."""

import base64
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import fsspec
import numpy as np
import pytest
from fsspec.config import set_conf_env

from data import remote
from data.embeddings.sources import ShardSource
from data.fault import Fault
from data.redaction import redacted
from data.remote import RemoteColumn, RemotePath, Truncated, list_names, read_range, size_of
from data.shards.index import ShardIndex
from data.shards.scan import scan
from data.shards.verify import list_shards, verify_folder, verify_shard
from data.tiles.loader import RankBatch
from data.tiles.of_shards import ShardTiles
from data.tiles.source import UnreadableTile
from launch.entry import run_command_line
from tests.data.flaky_server import CUT, FAIL, FORBID, SHORT, STALL, FlakyServer, GCSHandler, S3Handler, serving
from tests.data.shards.tile_folders import spoil, write_tiles
from tests.data.tiles.test_loader import batches, by_tile, same

CONTENT = bytes(range(256)) * 40


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FlakyServer]:
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    monkeypatch.setattr(remote, "STALLED_AFTER", 0.4)
    (tmp_path / "bytes").write_bytes(CONTENT)
    with serving(tmp_path) as running:
        yield running


def test_a_range_is_those_bytes_and_no_others_are_sent(server: FlakyServer) -> None:
    assert read_range(f"{server.url}/bytes", 1000, 1300) == CONTENT[1000:1300]
    assert server.served == [("bytes", 300)]
    assert size_of(f"{server.url}/bytes") == len(CONTENT)


@pytest.mark.parametrize("mood", [FAIL, STALL, CUT, SHORT])
def test_a_server_that_recovers_costs_only_time(server: FlakyServer, mood: str) -> None:
    server.misbehave.extend([mood] * 2)
    assert read_range(f"{server.url}/bytes", 5, 4000) == CONTENT[5:4000]
    assert not server.misbehave


@pytest.mark.parametrize("mood", [FAIL, STALL, CUT])
def test_a_server_that_stays_broken_ends_in_one_sentence_with_its_url(server: FlakyServer, mood: str) -> None:
    server.always = mood
    with pytest.raises(Fault, match=rf"{server.url}/bytes can't be read .*tried 5 times") as refused:
        read_range(f"{server.url}/bytes", 0, 100)
    assert not isinstance(refused.value, Truncated) and "\n" not in str(refused.value)


def test_what_cannot_get_better_is_not_tried_again(server: FlakyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAUSE", 1000)
    with pytest.raises(FileNotFoundError, match="nothing"):
        read_range(f"{server.url}/nothing", 0, 10)
    server.always = FORBID
    with pytest.raises(Fault, match=r"is refused \(HTTP 403"):
        read_range(f"{server.url}/bytes", 0, 10)
    server.always, server.ranges = None, False
    with pytest.raises(Fault, match="ignores byte ranges"):
        read_range(f"{server.url}/bytes", 0, 10)


def test_a_file_that_ends_early_is_truncated_and_what_there_is_comes_along(server: FlakyServer) -> None:
    with pytest.raises(Truncated, match="ends 100 bytes early") as refused:
        read_range(f"{server.url}/bytes", len(CONTENT) - 50, len(CONTENT) + 100)
    assert refused.value.data == CONTENT[-50:]
    with pytest.raises(Truncated):
        read_range(f"{server.url}/bytes", len(CONTENT) + 5, len(CONTENT) + 10)


def test_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    with pytest.raises(Fault, match=r"http://127\.0\.0\.1:9/tiles can't be read"):
        read_range("http://127.0.0.1:9/tiles", 0, 10)


def test_a_missing_package_is_named() -> None:
    with pytest.raises(Fault, match="takes the package adlfs: pip install adlfs"):
        read_range("az://bucket/tiles", 0, 10)
    with pytest.raises(Fault, match="nosuch"):
        read_range("nosuch://bucket/tiles", 0, 10)


def test_a_file_is_read_and_searched_like_one_on_disk(server: FlakyServer) -> None:
    path = RemotePath(f"{server.url}/bytes")
    with path.open() as file:
        assert file.seek(-10, 2) == len(CONTENT) - 10 and file.read() == CONTENT[-10:]
        file.seek(0)
        assert file.read() == CONTENT
    assert path.stat().st_size == len(CONTENT) and (path.name, path.stem) == ("bytes", "")


def test_a_column_is_the_array_whatever_is_asked_of_it(
    tmp_path: Path, server: FlakyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "PAGE", 10)
    values = np.arange(1000, 1095, dtype=np.uint32)
    (tmp_path / "column").write_bytes(b"head" + values.tobytes())
    column = RemoteColumn(f"{server.url}/column", values.dtype, 4, 95)
    assert len(column) == 95 and column[94] == 1094 and column[7] == 1007
    for wanted in (slice(0, 95), slice(9, 11), slice(20, 20), slice(88, 200), np.array([3, 94, 3])):
        assert np.array_equal(column[wanted], values[wanted])
    before = len(server.served)
    assert column[50:60].tolist() == list(range(1050, 1060)) and len(server.served) == before


# Shards ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiles(tmp_path / "shards", [11, 13])


def load(shards: object, **settings: int) -> list[RankBatch]:
    found = list(batches(shards, **settings))  # type: ignore[arg-type]
    assert all(isinstance(batch, RankBatch) for batch in found)
    return found  # type: ignore[return-value]


def assert_same_batches(near: Path, far: str) -> None:
    for own, fetched in zip(load(near), load(far), strict=True):
        assert same(by_tile(own.parts), by_tile(fetched.parts)) and not fetched.bad


def assert_parts_were_read(folder: Path, server: FlakyServer) -> None:
    read = sum(size for name, size in server.served if name.endswith(".tar"))
    assert read < sum(path.stat().st_size for path in folder.glob("*.tar")), "whole files were read"


def test_remote_shards_give_the_batches_of_local_ones_through_failures(folder: Path, server: FlakyServer) -> None:
    server.misbehave.extend([FAIL, CUT, None, STALL, None, SHORT, None, FAIL, None, CUT])
    assert_same_batches(folder, f"{server.url}/shards")
    assert ShardTiles(shards=[f"{server.url}/shards"]).digest == ShardTiles(shards=[folder]).digest


def test_a_block_is_fetched_in_one_request_and_once(folder: Path, server: FlakyServer) -> None:
    tiles = ShardTiles(shards=[f"{server.url}/shards"])
    server.served.clear()
    tiles.expect(np.arange(24))
    for number in range(24):
        tiles.read(number)
    data = [served for served in server.served if served[0].endswith(".tar")]
    assert [name for name, _ in sorted(data)] == ["tiles-000000.tar", "tiles-000001.tar"]
    assert_parts_were_read(folder, server)


def test_a_remote_tar_that_goes_is_skipped_and_a_truncated_one_loses_its_end(folder: Path, server: FlakyServer) -> None:
    tiles = ShardTiles(shards=[f"{server.url}/shards"])
    index, row = tiles.locate(20)
    tar = folder / "tiles-000001.tar"
    tar.write_bytes(tar.read_bytes()[: int(index.offset[row]) + 10])
    (folder / "tiles-000000.tar").unlink()
    with pytest.raises(UnreadableTile, match=rf"{server.url}/shards/tiles-000000.tar") as gone:
        tiles.read(3)
    assert gone.value.next == 11 + 3  # as far into the next tar
    assert tiles.read(19).shape == (48, 48, 3)
    with pytest.raises(UnreadableTile, match="truncated"):
        tiles.read(20)


def test_a_server_that_dies_during_training_stops_it_with_its_url(folder: Path, server: FlakyServer) -> None:
    dying = batches(f"{server.url}/shards", stop=9)  # type: ignore[arg-type]
    server.always = FAIL
    with pytest.raises(Fault, match=f"{server.url}/shards/.*tried 5 times"):
        list(dying)


def test_others_remote_shards_take_one_scan_and_an_index_of_ours(
    folder: Path, tmp_path: Path, server: FlakyServer
) -> None:
    (folder / "index.npz").unlink()
    with pytest.raises(
        Fault, match=rf"there is no {server.url}/shards/index\.npz: make an index .*shards={server.url}/shards out="
    ):
        ShardTiles(shards=[f"{server.url}/shards"])
    with pytest.raises(Fault, match="say where the index"):
        scan(f"{server.url}/shards")
    assert list_names(f"{server.url}/shards", ".tar") == ["tiles-000000.tar", "tiles-000001.tar"]
    index = scan(f"{server.url}/shards", tmp_path / "mine")
    assert index.remote and len(index) == 24 and ShardIndex.open(tmp_path / "mine").digest == index.digest
    scan(folder)
    for near, far in zip(load(folder), load(tmp_path / "mine"), strict=True):
        assert same(by_tile(near.parts), by_tile(far.parts))


def test_a_folder_that_is_not_there_or_lists_nothing_is_a_sentence(tmp_path: Path, server: FlakyServer) -> None:
    with pytest.raises(Fault, match=rf"{server.url}/nowhere is not there, or has no page that lists its files"):
        scan(f"{server.url}/nowhere", tmp_path / "mine")


def test_remote_shards_are_embedded_and_looked_at_as_local_ones_are(
    folder: Path, tmp_path: Path, server: FlakyServer
) -> None:
    url = f"{server.url}/shards"
    near, far = ShardSource([str(folder)]), ShardSource([url])
    assert near.slides == far.slides
    for slide in near.slides:
        rows = np.arange(len(near.open(slide).coordinates))
        for one, other in zip(near.open(slide).read(rows), far.open(slide).read(rows), strict=True):
            assert isinstance(one, np.ndarray) and np.array_equal(one, other)
    run_command_line(["inspect", f"shards={url}?token=secret", f"out={tmp_path / 'page'}", "views=null", "tiles=4"])
    page = (tmp_path / "page" / "index.html").read_text()
    assert f"{url}?token=***" in page and "secret" not in page
    (folder / "tiles-000001.tar").unlink()
    last = far.open(far.slides[-1])
    (fault,) = last.read(np.array([len(last.coordinates) - 1]))
    assert isinstance(fault, Fault) and f"in {url}/tiles-000001.tar can't be decoded" in str(fault)


def test_shards_that_cannot_be_written_to_have_their_index_elsewhere(folder: Path, tmp_path: Path) -> None:
    index = scan(folder, tmp_path / "mine")
    assert index.path(0) == folder / "tiles-000000.tar" and not list((tmp_path / "mine").glob("*.tar"))
    (folder / "tiles-000001.tar").unlink()
    with pytest.raises(Fault, match=rf"{folder}/tiles-000001\.tar is in the index but not on disk"):
        ShardIndex.open(tmp_path / "mine")


def verified(folder: Path | str) -> list[tuple[str, str, str]]:
    results = [verify_folder(folder), *(verify_shard(folder, name) for name in list_shards(folder))]
    return sorted((f.shard, f.member, f.kind) for result in results for f in result.findings)


def test_remote_shards_are_verified_as_local_ones_are(folder: Path, server: FlakyServer) -> None:
    url = f"{server.url}/shards"
    server.misbehave.extend([FAIL, None, CUT])
    assert verified(folder) == verified(url) == []
    index = ShardIndex.open(folder)
    with (folder / "tiles-000001.tar").open("r+b") as tar:
        tar.seek(int(index.offset[15]) + 400)
        tar.write(b"flip")
        tar.truncate(int(index.offset[20]) + 10)
    (folder / "tiles-000000.tar").unlink()
    (folder / "index/tiles-000000.npz").unlink()
    found = verified(url)
    assert found == verified(folder) and {kind for _, _, kind in found} >= {
        "changed tile",
        "truncated",
        "missing shard",
        "missing record",
    }
    (folder / "tiles-000001.tar").write_bytes(b"")
    assert verified(url) == verified(folder)
    (folder / "index.npz").unlink()
    assert verified(url) == verified(folder) and ("index.npz", "", "missing index") in verified(url)


def test_shards_whose_index_lies_elsewhere_are_verified_there(
    folder: Path, tmp_path: Path, server: FlakyServer
) -> None:
    for number, place in enumerate((folder, f"{server.url}/shards")):
        scan(place, tmp_path / f"index{number}")
        assert verified(tmp_path / f"index{number}") == []
    spoil(folder, [3])
    for number in range(2):
        assert [(shard, kind) for shard, _, kind in verified(tmp_path / f"index{number}")] == [
            ("tiles-000000.tar", "changed tile")
        ]


@pytest.mark.parametrize("token", ["abcdef", "a/b+c=="])
def test_a_signed_folder_is_read_and_its_token_is_never_said(
    folder: Path, tmp_path: Path, server: FlakyServer, token: str
) -> None:
    signed, server.key = f"{server.url}/shards?token={quote(token)}", f"token={token}"
    assert_same_batches(folder, signed)
    assert ShardIndex.open(signed).url(0) == f"{server.url}/shards/tiles-000000.tar?token={quote(token)}"
    assert list_names(signed, ".tar") == ["tiles-000000.tar", "tiles-000001.tar"] and verified(signed) == []
    with pytest.raises(Fault, match=r"/shards\?token=\*\*\* would have to keep its password or token: .*FSSPEC_HTTPS"):
        scan(signed, tmp_path / "mine")
    said = []
    (folder / "tiles-000000.tar").unlink()
    with pytest.raises(UnreadableTile) as gone:
        ShardTiles(shards=[signed]).read(3)
    said.append(redacted(str(gone.value)))
    for mood in (FAIL, CUT, FORBID):
        server.always = mood
        with pytest.raises(Fault) as refused:
            ShardTiles(shards=[signed])
        said.append(str(refused.value))
    server.always, server.key = None, "another"
    with pytest.raises(Fault, match=r"index\.npz\?token=\*\*\* is refused \(HTTP 403") as refused:
        ShardTiles(shards=[signed])
    assert not [line for line in (*said, str(refused.value)) if token in line or quote(token) in line]


def test_a_password_in_the_address_is_used_and_never_said(folder: Path, server: FlakyServer) -> None:
    server.key = "Basic " + base64.b64encode(b"me:secret").decode()
    url = server.url.replace("://", "://me:secret@") + "/shards"
    assert_same_batches(folder, url)
    server.always = FORBID
    with pytest.raises(Fault, match="is refused") as refused:
        ShardTiles(shards=[url])
    assert "secret" not in str(refused.value)


def test_secrets_come_from_fsspecs_own_configuration(
    folder: Path, tmp_path: Path, server: FlakyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.key = "Bearer abcdef"
    with pytest.raises(Fault, match="403"):
        ShardTiles(shards=[f"{server.url}/shards"])
    configured: dict[str, dict[str, object]] = {}
    set_conf_env(configured, {"FSSPEC_HTTP": '{"client_kwargs": {"headers": {"Authorization": "Bearer abcdef"}}}'})
    monkeypatch.setitem(fsspec.config.conf, "http", configured["http"])
    assert_same_batches(folder, f"{server.url}/shards")
    assert len(scan(f"{server.url}/shards", tmp_path / "mine")) == 24


# S3 ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FlakyServer]:
    """A server that speaks S3, and s3fs's own client pointed at it as a user would: by the environment."""
    s3fs = pytest.importorskip("s3fs")
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    for name, value in {
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "eu-west-1",
        "AWS_MAX_ATTEMPTS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    with serving(tmp_path, S3Handler) as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.url)
        s3fs.S3FileSystem.clear_instance_cache()
        yield running
    s3fs.S3FileSystem.clear_instance_cache()


def test_shards_on_s3_give_the_batches_of_local_ones_through_failures(folder: Path, s3: FlakyServer) -> None:
    assert list_names("s3://shards/", ".tar") == ["tiles-000000.tar", "tiles-000001.tar"]
    assert size_of("s3://shards/index.npz") == (folder / "index.npz").stat().st_size
    assert verified("s3://shards") == []
    s3.served.clear()
    s3.misbehave.extend([FAIL, None, FAIL, None, CUT])
    assert_same_batches(folder, "s3://shards")
    assert_parts_were_read(folder, s3)


def test_what_s3_lacks_or_forbids_is_named_at_once(folder: Path, s3: FlakyServer) -> None:
    (folder / "tiles-000000.tar").unlink()
    tiles = ShardTiles(shards=["s3://shards"])
    with pytest.raises(UnreadableTile, match=r"s3://shards/tiles-000000\.tar"):
        tiles.read(3)
    assert tiles.read(12).shape == (48, 48, 3)
    s3.always = FORBID
    with pytest.raises(Fault, match=r"s3://shards/index\.npz is refused"):
        ShardTiles(shards=["s3://shards"])


# Google Cloud Storage ----------------------------------------------------------------------------------------------


@pytest.fixture
def gcs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FlakyServer]:
    """A server that speaks the JSON API, and gcsfs's own client pointed at it as a user would: by the environment."""
    # Otherwise it asks over gRPC what kind of bucket this is, which no server but Google's answers, for a minute.
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    gcsfs = pytest.importorskip("gcsfs")
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    with serving(tmp_path, GCSHandler) as running:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", running.url)
        gcsfs.GCSFileSystem.clear_instance_cache()
        yield running
    gcsfs.GCSFileSystem.clear_instance_cache()


def test_shards_on_google_cloud_give_the_batches_of_local_ones_through_failures(folder: Path, gcs: FlakyServer) -> None:
    assert list_names("gs://shards/", ".tar") == ["tiles-000000.tar", "tiles-000001.tar"]
    assert size_of("gs://shards/index.npz") == (folder / "index.npz").stat().st_size
    gcs.misbehave.extend([SHORT, None, FAIL, None, CUT])
    assert_same_batches(folder, "gs://shards")
    assert_parts_were_read(folder, gcs)
    assert verified("gs://shards") == []


def test_what_google_cloud_lacks_or_forbids_is_named_at_once(folder: Path, gcs: FlakyServer) -> None:
    (folder / "tiles-000000.tar").unlink()
    tiles = ShardTiles(shards=["gs://shards"])
    with pytest.raises(UnreadableTile, match=r"gs://shards/tiles-000000\.tar"):
        tiles.read(3)
    assert tiles.read(12).shape == (48, 48, 3)
    length = (folder / "tiles-000001.tar").stat().st_size
    with pytest.raises(Truncated, match=r"gs://shards/tiles-000001\.tar ends"):
        read_range("gs://shards/tiles-000001.tar", length, length + 10)
    asked = len(gcs.served)
    gcs.always = FORBID
    with pytest.raises(Fault, match=r"gs://shards/index\.npz is refused"):
        ShardTiles(shards=["gs://shards"])
    assert len(gcs.served) == asked


def test_a_google_cloud_that_stalls_is_asked_again(
    folder: Path, gcs: FlakyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "STALLED_AFTER", 0.4)
    gcs.misbehave.append(STALL)
    assert read_range("gs://shards/index.npz", 0, 100) == (folder / "index.npz").read_bytes()[:100]
