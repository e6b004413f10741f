"""Shards spoilt in every way that disks, networks and people have: verify names each, and training neither crashes,
hangs nor says nothing."""

import io
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from data.fault import Fault
from data.keyed import rng
from data.masks import Masking
from data.shards.index import ShardIndex
from data.shards.records import merge_records
from data.shards.verify import Defect, list_shards, verify_folder, verify_shard
from data.shards.writing import PlannedShard, TileRange, write_shard
from data.slides.coordinates_h5 import read_tiling, write_tiling
from data.slides.reading import Slide
from data.slides.tiling import READ, TilingSettings, tile_slide
from data.slides.tissue import tissue_needed
from data.tiles.augment_parameters import Colour
from data.tiles.crops import CropSizes
from data.tiles.loader import RankBatch, TileBatches
from data.tiles.of_shards import ShardTiles, UnreadableTile
from data.tiles.stream import Stream
from tests.data.shards.tars import write_tar
from tests.data.shards.tile_folders import write_tiles
from tests.data.slides.synthetic_slides import stained, write_slide

VICTIM = "tiles-000001.tar"


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder as 'pretrain shard' makes it, and one of another program's shards, indexed by a scan: three tars of
    eight tiles each."""
    theirs = write_tiles(tmp_path_factory.mktemp("theirs"), [8, 8, 8])
    ours = tmp_path_factory.mktemp("ours")
    for folder in ("coordinates", "index"):
        (ours / folder).mkdir()
    names = []
    for number in range(3):
        slide_name = f"s{number}"
        path = write_slide(ours / "slides" / f"{slide_name}.tiff", stained(128, 256, [(128, 64, 300)], number), 0.5)
        with Slide(path) as slide:
            tiling, _ = tile_slide(
                slide, slide_name, TilingSettings(0.5, 64, tissue_needed(["otsu"], [0.25])), None, ""
            )
        write_tiling(ours, tiling)
        shard = PlannedShard(f"tiles-{number:06d}", [TileRange(slide_name, 0, len(tiling.tiles(*READ)[0]))])
        assert write_shard(ours, shard, {}).tiles == 8
        names.append(shard.name)
    merge_records(ours, names, {})
    shutil.rmtree(ours / "slides")
    return {"ours": ours, "theirs": theirs}


def verify(folder: Path) -> list[Defect]:
    results = [verify_folder(folder), *(verify_shard(folder, name) for name in list_shards(folder))]
    return [finding for result in results for finding in result.findings]


def read_all(folder: Path) -> tuple[list[int], list[str]] | Fault:
    """Numbers of the tiles that training can read, and the messages about the others; or the Fault that stops it at
    once."""
    try:
        tiles = ShardTiles(shards=[str(folder)])
    except Fault as fault:
        return fault
    good, bad = [], []
    for number in range(len(tiles)):
        try:
            assert tiles.read(number).ndim == 3
            good.append(number)
        except UnreadableTile as error:
            bad.append(str(error))
    return good, bad


def contents(folder: Path) -> list[object]:
    """Everything in index and records."""
    index = ShardIndex.open(folder)
    names = ("offset", "length", "x", "y", "file_start", "run_start", "run_slide")
    found: list[object] = [index.meta, *(getattr(index, name).tolist() for name in names)]
    for path in sorted(folder.glob("index/*.npz")):
        with np.load(path) as record:
            found += [(name, record[name].tolist()) for name in record.files]
    return found


Spoil = Callable[[Path, np.random.Generator], None]


def patch(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def truncate(tar: Path, draw: np.random.Generator) -> None:
    os.truncate(tar, int(draw.integers(0, tar.stat().st_size)))


def flip_a_bit(tar: Path, draw: np.random.Generator) -> None:
    at = int(draw.integers(tar.stat().st_size))
    patch(tar, at, bytes([tar.read_bytes()[at] ^ (1 << int(draw.integers(8)))]))


def flip_in_a_jpeg(tar: Path, draw: np.random.Generator) -> None:
    with tarfile.open(tar) as archive:
        jpegs = [member for member in archive if member.name.endswith(".jpg")]
    member = jpegs[int(draw.integers(len(jpegs)))]
    at = member.offset_data + int(draw.integers(member.size))
    patch(tar, at, bytes([tar.read_bytes()[at] ^ (1 << int(draw.integers(8)))]))


def zero_a_sector(tar: Path, draw: np.random.Generator) -> None:
    sectors = [at for at in range(0, tar.stat().st_size, 4096) if any(tar.read_bytes()[at : at + 4096])]
    patch(tar, sectors[int(draw.integers(len(sectors)))], bytes(4096)[: tar.stat().st_size])


def rewrite(tar: Path, keep: Callable[[int, str, bytes], tuple[str, bytes] | None]) -> None:
    with tarfile.open(tar) as archive:
        old = [(member.name, archive.extractfile(member).read()) for member in archive]  # type: ignore[union-attr]
    kept = [keep(number, name, data) for number, (name, data) in enumerate(old)]
    write_tar(tar, filter(None, kept), tarfile.GNU_FORMAT)


def drop_a_member(suffix: str) -> Spoil:
    def spoil(tar: Path, draw: np.random.Generator) -> None:
        which = 2 * int(draw.integers(8)) + (suffix == "json")
        rewrite(tar, lambda number, name, data: None if number == which else (name, data))

    return spoil


def garble_a_json(tar: Path, draw: np.random.Generator) -> None:
    which = 2 * int(draw.integers(8)) + 1
    rewrite(tar, lambda number, name, data: (name, b"{" * len(data) if number == which else data))


def swap_two_tiles(tar: Path, draw: np.random.Generator) -> None:
    first, second = draw.choice(8, 2, replace=False) * 2
    contents: dict[int, bytes] = {}
    rewrite(tar, lambda number, name, data: (contents.setdefault(number, data) and name, data))
    rewrite(tar, lambda number, name, data: (name, contents[{first: second, second: first}.get(number, number)]))


def double_a_member(tar: Path, draw: np.random.Generator) -> None:
    which = int(draw.integers(8)) * 2
    with tarfile.open(tar) as archive:
        member = archive.getmembers()[which]
        data = archive.extractfile(member).read()  # type: ignore[union-attr]
    with tarfile.open(tar, "a") as archive:
        archive.addfile(member, io.BytesIO(data))


def take_the_neighbours(tar: Path, draw: np.random.Generator) -> None:
    shutil.copy(tar.with_name("tiles-000000.tar"), tar)


def empty_tar(tar: Path, draw: np.random.Generator) -> None:
    tarfile.open(tar, "w").close()


def spoil_the_index(folder_file: str) -> Spoil:
    def spoil(tar: Path, draw: np.random.Generator) -> None:
        path = tar.parent / folder_file
        if draw.random() < 0.3:
            os.truncate(path, int(draw.integers(path.stat().st_size)))
        else:
            at = int(draw.integers(path.stat().st_size))
            patch(path, at, bytes([path.read_bytes()[at] ^ (1 << int(draw.integers(8)))]))

    return spoil


SPOILS: dict[str, tuple[Spoil, int]] = {
    "truncated": (truncate, 24),
    "a bit flipped anywhere": (flip_a_bit, 36),
    "a bit flipped in a JPEG": (flip_in_a_jpeg, 24),
    "a sector zeroed": (zero_a_sector, 12),
    "a JPEG left out": (drop_a_member("jpg"), 4),
    "a JSON left out": (drop_a_member("json"), 4),
    "a JSON garbled": (garble_a_json, 4),
    "two tiles swapped": (swap_two_tiles, 4),
    "a member doubled": (double_a_member, 2),
    "another shard's content": (take_the_neighbours, 1),
    "garbage behind": (lambda tar, draw: tar.open("ab").write(draw.bytes(700)) and None, 2),
    "zero bytes": (lambda tar, draw: os.truncate(tar, 0), 1),
    "no member": (empty_tar, 1),
    "no such file": (lambda tar, draw: tar.unlink(), 1),
    "noise": (lambda tar, draw: tar.write_bytes(draw.bytes(5000)) and None, 2),
    "a record spoilt": (spoil_the_index("index/tiles-000001.npz"), 12),
    "no record": (lambda tar, draw: (tar.parent / "index/tiles-000001.npz").unlink(), 1),
    "the index spoilt": (spoil_the_index("index.npz"), 12),
    "no index": (lambda tar, draw: (tar.parent / "index.npz").unlink(), 1),
}


def test_at_least_two_hundred_shards_are_spoilt() -> None:
    assert 2 * sum(times for _, times in SPOILS.values()) >= 200


@pytest.mark.parametrize("whose", ["ours", "theirs"])
def test_whole_shards_have_no_findings(originals: dict[str, Path], whose: str) -> None:
    assert verify(originals[whose]) == []
    assert read_all(originals[whose]) == (list(range(24)), [])


@pytest.mark.parametrize("kind", SPOILS)
@pytest.mark.parametrize("whose", ["ours", "theirs"])
def test_every_spoilt_shard_is_found_and_named_and_costs_the_others_nothing(
    originals: dict[str, Path], tmp_path: Path, whose: str, kind: str
) -> None:
    spoil, times = SPOILS[kind]
    for number in range(times):
        folder = tmp_path / str(number)
        shutil.copytree(originals[whose], folder)
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        spoil(folder / VICTIM, rng(number, "spoil", kind, whose))
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} != before
        findings = verify(folder)
        if kind in ("a record spoilt", "the index spoilt") and not findings:
            # Some bytes of a zip say nothing: times of day, the room for comments. What is read must be what was
            # written.
            assert contents(folder) == contents(originals[whose])
            shutil.rmtree(folder)
            continue
        named = {"index.npz"} if "index" in kind else {VICTIM, "index.npz"}
        assert findings and {f.shard for f in findings} & named, (kind, number, findings)
        if "index" not in kind:
            assert {f.shard for f in findings} <= named, (kind, number, findings)
        result = read_all(folder)
        if isinstance(result, Fault):
            assert kind in ("no such file", "no index", "the index spoilt"), (kind, number, result)
            assert str(folder) in str(result)
        elif kind != "the index spoilt":
            good, bad = result
            assert {*range(8), *range(16, 24)} <= set(good)
            assert len(good) + len(bad) == 24 and all(VICTIM in message for message in bad)
            if kind == "a bit flipped in a JPEG":
                assert len(bad) == 1, "a picture that changed silently"
        shutil.rmtree(folder)


@pytest.mark.parametrize("kind", ["another shard's content", "two tiles swapped", "a JPEG left out"])
def test_training_never_takes_another_tile_for_the_one_in_the_index(
    originals: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    whole = ShardTiles(shards=[str(originals["ours"])])
    shutil.copytree(originals["ours"], tmp_path / "x")
    SPOILS[kind][0](tmp_path / "x" / VICTIM, rng(0, "spoil"))
    good, bad = read_all(tmp_path / "x")  # type: ignore[misc]
    spoilt = ShardTiles(shards=[str(tmp_path / "x")])
    assert len(bad) == (len(good) and 24 - len(good)) > 0
    assert all(np.array_equal(spoilt.read(number), whole.read(number)) for number in good)


@pytest.mark.parametrize("kind", ["truncated", "a sector zeroed", "noise", "zero bytes", "another shard's content"])
def test_batches_go_on_with_full_counts_and_name_what_was_replaced(
    originals: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    folder = tmp_path / "x"
    shutil.copytree(originals["ours"], folder)
    SPOILS[kind][0](folder / VICTIM, rng(1, "spoil", kind))
    lost = len(read_all(folder)[1])  # type: ignore[index]
    tiles = ShardTiles(shards=[str(folder)])
    stream = Stream(tiles.parts, batch_size=8, lanes=2, window=1, seed=0)
    batches = list(
        TileBatches(
            tiles,
            stream,
            CropSizes(1, 24, (0.32, 1.0), 0, 16, (0.05, 0.32)),
            Colour(),
            Masking(0.5, 0.1, 0.5, 8),
            seed=0,
            start=0,
            stop=3,
            rank=0,
            world_size=1,
            accumulate=1,
            threads=2,
        )
    )
    assert all(isinstance(batch, RankBatch) and len(batch.parts[0].numbers) == 8 for batch in batches)
    named = {message for batch in batches if isinstance(batch, RankBatch) for message in batch.bad}
    assert lost and len(named) == lost, "one pass meets every tile, so each bad one is named"


def test_a_shard_that_vanishes_while_training_reads_it_is_a_counted_skip(
    originals: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "x"
    shutil.copytree(originals["ours"], folder)
    tiles = ShardTiles(shards=[str(folder)])
    tiles.read(0)
    (folder / "tiles-000000.tar").unlink()
    (folder / VICTIM).unlink()
    assert tiles.read(1).ndim == 3, "what is open can still be read"
    with pytest.raises(UnreadableTile, match=VICTIM):
        tiles.read(9)


def test_a_tile_in_the_index_behind_the_damage_is_still_checked_by_itself(
    originals: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "x"
    shutil.copytree(originals["ours"], folder)
    with tarfile.open(folder / VICTIM) as archive:
        member = archive.getmembers()[4]
    patch(folder / VICTIM, member.offset_data - 400, b"\xff")
    found = {(f.kind, f.member) for f in verify(folder)}
    kinds = [kind for kind, _ in found]
    assert kinds.count("damaged tar") == 1 and kinds.count("hidden tile") == 6


def test_a_damaged_h5_of_coordinates_is_a_finding_or_says_what_it_said(
    originals: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(originals["ours"], tmp_path / "x")
    path = tmp_path / "x/coordinates/s1_patches.h5"
    whole, content = read_tiling(path), path.read_bytes()
    found = 0
    for number in range(120):
        path.write_bytes(content)
        spoil_the_index(f"coordinates/{path.name}")(tmp_path / "x" / VICTIM, rng(number, "coordinates"))
        findings = verify_folder(tmp_path / "x").findings
        assert {finding.member for finding in findings} <= {f"coordinates/{path.name}"}
        found += bool(findings)
        if not findings:
            assert read_tiling(path).grid == whole.grid and read_tiling(path).counts()["kept"] == whole.counts()["kept"]
    assert found > 30


def test_a_shard_beside_the_index_that_it_does_not_know_is_found(originals: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(originals["theirs"], tmp_path / "x")
    shutil.copy(tmp_path / "x" / VICTIM, tmp_path / "x/more.tar")
    assert {(f.shard, f.kind) for f in verify(tmp_path / "x")} == {
        ("more.tar", "missing record"),
        ("more.tar", "not in the index"),
    }


def test_jpegs_that_were_bad_when_they_were_indexed_are_found_by_decoding(tmp_path: Path) -> None:
    folder = write_tiles(tmp_path / "x", [4])
    rewrite(folder / "tiles-000000.tar", lambda number, name, data: (name, data[:60] if number == 2 else data))
    for path in (folder / "index.npz", folder / "index/tiles-000000.npz"):
        path.unlink()
    from data.shards.scan import scan

    scan(folder)
    (finding,) = verify(folder)
    assert (finding.kind, finding.member) == ("undecodable tile", "slide0_48_0.jpg")


def test_a_decoded_picture_that_changed_silently_is_found_by_its_checksum(
    originals: dict[str, Path], tmp_path: Path
) -> None:
    """A JPEG replaced by another valid one of the same length: only the checksum tells."""
    shutil.copytree(originals["ours"], tmp_path / "x")
    index = ShardIndex.open(tmp_path / "x")
    path, offset, length = index.path(0), int(index.offset[0]), int(index.length[0])
    other = simplejpeg.encode_jpeg(np.full((64, 64, 3), 120, np.uint8), quality=90)
    patch(path, offset, other[:-2] + bytes(length - len(other)) + other[-2:])
    assert [(f.kind, f.member) for f in verify(tmp_path / "x")] == [
        ("changed tile", f"s0_{index.x[0]}_{index.y[0]}.jpg")
    ]
    with pytest.raises(UnreadableTile, match="its bytes have changed since"):
        ShardTiles(shards=[str(tmp_path / "x")]).read(0)
