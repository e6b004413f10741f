"""Is a folder of shards what its index and its records say, to the byte?

Every tar is read once, front to back. Each member's header is held to its checksum, each tile's JPEG and JSON to the
CRC-32 that was recorded when the shard was written or scanned, each gap to zeros, the members' places to the index; the
index to its own checksums and to the shards' records. So any change of any byte that a reader could meet is found. What
the tars held when they were recorded isn't taken on trust either where another program wrote them: there every JPEG is
decoded.

The folder may be a URL: then everything is read from there, a few MB at a time. An index may lie in another folder than
its tars.
"""

import json
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data.fault import Fault
from data.images import decode_image
from data.npz_files import SPOILT
from data.remote import RemotePath, Truncated, is_remote, list_names, url_within
from data.shards.index import ShardIndex
from data.shards.layout import COLUMNS, RUNS
from data.shards.records import CHECKSUMS
from data.shards.tar_members import DamagedTar, Member, members, padding
from data.shards.tile_facts import Impossible, locate_tile, read_tile_facts
from data.shards.tile_members import (
    SampleOrder,
    beside_tiles,
    is_json,
    is_tile,
    json_key,
    json_of_each,
    place_in,
    split_member,
)
from data.slides.coordinates_h5 import read_tiling

GRID_FACTS = ("width", "height", "mpp_level0", "mpp", "tile_size", "tile_size_level0", "level", "downsample")
MOST_FINDINGS = 1000  # findings kept for one shard; the rest are counted


@dataclass(frozen=True)
class Defect:
    """One thing that is wrong: in which file of the folder, at which member of it (empty: the file as a whole), and
    what."""

    shard: str
    member: str
    kind: str  # a few words to count by
    what: str


@dataclass
class Verified:
    """What came of one shard. ``tiles`` and ``size`` (bytes) are what was there; ``findings`` is cut at
    `MOST_FINDINGS`, ``unnamed`` counts the rest."""

    shard: str
    tiles: int = 0
    size: int = 0
    findings: list[Defect] = field(default_factory=list)
    unnamed: int = 0

    def find(self, member: str, kind: str, what: str) -> None:
        """Add a finding."""
        if len(self.findings) < MOST_FINDINGS:
            self.findings.append(Defect(self.shard, member, kind, what))
        else:
            self.unnamed += 1


Folder = Path | str  # a path, or a URL


def list_shards(folder: Folder) -> list[str]:
    """The tars in the folder and those that its index or records know of, by file name, sorted. Raises Fault where
    there is nothing."""
    if isinstance(folder, Path) and not folder.is_dir():
        raise Fault(f"there is no folder {folder}")
    opened = _index(folder)
    records = _listed(folder / "index" if isinstance(folder, Path) else url_within(folder, "index"), ".npz")
    names = {f"{record.stem}.tar" for record in records} | {tar.name for tar in _listed(_place_of_tars(folder), ".tar")}
    if isinstance(opened, tuple):
        names |= opened[0].keys()
    if not names:
        raise Fault(f"there are no tile shards in {folder}: make some with 'pretrain shard slides=… out={folder}'")
    return sorted(names)


def verify_folder(folder: Folder) -> Verified:
    """What belongs to no single shard: ``index.npz`` itself, shards that it lacks, and the slides' h5 files of
    coordinates."""
    result = Verified("index.npz")
    opened = _index(folder)
    if isinstance(opened, Defect):
        result.findings.append(opened)
        return result
    _, index = opened
    with _at(folder, "index.npz").open("rb") as file, zipfile.ZipFile(file) as archive:
        bad = archive.testzip()
    if bad:
        result.find(
            bad, "damaged index", "its bytes have changed since it was written: 'pretrain shards index' makes it again"
        )
    for number, slide in enumerate(index.slides):
        facts = index.facts(number)
        if facts["coordinates"] is None:
            continue
        try:
            tiling = read_tiling(_at(folder, str(facts["coordinates"])))
        except Fault as fault:
            result.find(str(facts["coordinates"]), "damaged coordinates", str(fault))
            continue
        kept = tiling.counts()["kept"]
        for name in GRID_FACTS:
            if (said := getattr(tiling.grid, name)) != facts[name]:
                result.find(
                    str(facts["coordinates"]), "coordinates differ", f"it says {name} = {said}, the index {facts[name]}"
                )
        if kept != facts["tiles"]:
            result.find(
                str(facts["coordinates"]),
                "coordinates differ",
                f"it says that slide {slide} has {kept} tiles, the index says {facts['tiles']}",
            )
    return result


def verify_shard(folder: Folder, name: str) -> Verified:
    """Read shard ``name`` (its file name) whole and hold it to the index and to its record."""
    result = Verified(name)
    path = _at(_place_of_tars(folder), name)
    record = _record(folder, name, result)
    columns, checked = _expected(folder, name, record, result)
    facts = record[0] if record else None
    planned_empty = facts is not None and not sum(facts["counts"])
    if isinstance(path, Path) and path.exists() and not path.is_file():  # a pipe would be waited for
        result.find("", "unreadable", "it is no file")
        return result
    try:
        with path.open("rb") as file:
            result.size = path.stat().st_size
            scanned = facts is not None and bool(facts.get("scanned"))
            _walk(file, result, columns, checked, scanned, decode=facts is None or scanned or not checked)
    except FileNotFoundError:
        if not planned_empty:
            result.find(
                "",
                "missing shard",
                "it is known to the index or has a record, but there is no such file: put it back, or run 'pretrain"
                " shard' again",
            )
        return result
    except OSError as error:
        result.find("", "unreadable", f"it can't be read ({error.strerror or error})")
        return result
    if facts is not None and facts["size"] != result.size:
        difference = result.size - facts["size"]
        result.find(
            "",
            "truncated" if difference < 0 else "wrong size",
            f"it has {abs(difference):,} bytes {'less' if difference < 0 else 'more'} than when it was recorded",
        )
    return result


def _walk(
    file: BinaryIO, result: Verified, columns: dict[str, np.ndarray] | None, checked: bool, scanned: bool, decode: bool
) -> None:
    """One pass over the tar: every member, every gap, then the tiles that the pass did not meet."""
    rows = {} if columns is None else {int(offset): row for row, offset in enumerate(columns["offset"])}
    seen: set[str] = set()
    tiles: list[tuple[Member, int | None]] = []  # and row in the index
    jsons: dict[
        str, list[tuple[str, int, dict[str, Any] | str]]
    ] = {}  # name, CRC-32, what it says, or why it can't be so
    order = SampleOrder()
    try:
        for member in members(file, result.size):
            order.meet(member)
            if not member.is_file:
                continue
            file.seek(member.offset)
            data = file.read(member.size)
            if file.read(padding(member)).strip(b"\0"):
                result.find(member.name, "changed bytes", "the padding behind it isn't zeros")
            if member.name in seen:
                result.find(
                    member.name, "double member", "the shard holds two members of this name: webdataset refuses it"
                )
            seen.add(member.name)
            if is_tile(member):
                result.tiles += 1
                tiles.append((member, row := rows.get(member.offset)))
                _check_jpeg(result, member, data, columns, row, checked, decode)
            elif is_json(member):
                jsons.setdefault(split_member(member.name)[0], []).append(
                    (member.name, zlib.crc32(data), read_tile_facts(member.name, data))
                )
    except DamagedTar as damage:
        kind = "truncated" if "truncated" in str(damage) else "damaged tar"
        behind = len(rows) - sum(row is not None for _, row in tiles)
        result.find(
            "",
            kind,
            f"{damage}; {behind:,} of its {len(rows):,} tiles lie behind that" if columns is not None else str(damage),
        )
    _check_jsons(result, tiles, jsons, columns, checked, order if scanned else None)
    if not result.tiles:
        result.find("", "empty shard", "there is no tile in it")
    if columns is not None:
        _check_unmet(file, result, columns, sorted(set(rows.values()) - {row for _, row in tiles}), checked)


def _check_jpeg(
    result: Verified,
    member: Member,
    data: bytes,
    columns: dict[str, np.ndarray] | None,
    row: int | None,
    checked: bool,
    decode: bool,
) -> None:
    if columns is not None and row is not None:
        x, y = int(columns["x"][row]), int(columns["y"][row])
        stated = _place(member.name)
        if member.size != int(columns["length"][row]):
            result.find(
                member.name, "index mismatch", f"it has {member.size} bytes, in the index {columns['length'][row]}"
            )
        elif stated is not None and not decode and stated != (x, y):
            result.find(member.name, "index mismatch", f"in the index its place is ({x}, {y})")
        elif checked and zlib.crc32(data) != int(columns["crc32"][row]):
            how = _undecodable(data)
            result.find(
                member.name, "changed tile", f"its bytes have changed ({how or 'it still decodes, to other pixels'})"
            )
            return
    if decode and (how := _undecodable(data)):
        result.find(member.name, "undecodable tile", how)


def _check_jsons(
    result: Verified,
    tiles: list[tuple[Member, int | None]],
    jsons: dict[str, list[tuple[str, int, dict[str, Any] | str]]],
    columns: dict[str, np.ndarray] | None,
    checked: bool,
    scanned: SampleOrder | None,
) -> None:
    """Each JSON that is one, and that of each tile as it was recorded. A tile that a scan leaves out, and says so, is
    nothing new."""
    beside = beside_tiles([member.name for member, _ in tiles]) if scanned else {}
    tiles = [tile for number, tile in enumerate(tiles) if number not in beside]
    keys = [split_member(member.name)[0] for member, _ in tiles]
    recorded = columns["json_crc32"] if columns is not None and checked else None
    named_by_scan: set[int] = set()
    for (member, row), key, told in zip(tiles, keys, json_of_each(keys, jsons), strict=True):
        if columns is None:
            break
        if row is None:
            try:
                if scanned:
                    if reason := scanned.why_refused(key, json_key(key, jsons)):
                        raise Impossible(*reason, key)
                    locate_tile(key, told and told[2], Path(result.shard).stem)
            except Impossible:
                named_by_scan.add(id(told))
                continue
            result.find(
                member.name, "not in the index", f"no tile is known at byte {member.offset}: training never sees it"
            )
        elif told is None:
            if recorded is not None and recorded[row]:
                result.find(f"{key}.json", "missing JSON", "the tile's facts are gone")
        elif not isinstance(facts := told[2], str):
            if recorded is not None and told[1] != recorded[row]:
                result.find(told[0], "changed JSON", "its bytes have changed")
            elif any(axis in facts and facts[axis] != int(columns[axis][row]) for axis in ("x", "y")):
                result.find(
                    told[0],
                    "index mismatch",
                    f"it says ({facts.get('x')}, {facts.get('y')}), the index ({columns['x'][row]},"
                    f" {columns['y'][row]})",
                )
    for told in (told for several in jsons.values() for told in several):
        if isinstance(told[2], str) and id(told) not in named_by_scan:
            result.find(told[0], "damaged JSON", told[2])


def _check_unmet(
    file: BinaryIO, result: Verified, columns: dict[str, np.ndarray], rows: list[int], checked: bool
) -> None:
    """Tiles of the index that the pass over the members did not meet: is each still readable where the index has it?"""
    for row in rows:
        offset, length = int(columns["offset"][row]), int(columns["length"][row])
        name = f"tile ({columns['x'][row]}, {columns['y'][row]}) at byte {offset}"
        file.seek(offset)
        data = file.read(length)
        if len(data) < length:
            result.find(name, "lost tile", f"the shard ends {length - len(data)} bytes before its end")
        elif (checked and zlib.crc32(data) != int(columns["crc32"][row])) or _undecodable(data):
            result.find(name, "lost tile", "there is no member there, nor the tile's bytes")
        else:
            result.find(name, "hidden tile", "training reads it, but no reader of tars comes to it")


def _expected(
    folder: Folder, name: str, record: tuple[dict[str, Any], dict[str, np.ndarray]] | None, result: Verified
) -> tuple[dict[str, np.ndarray] | None, bool]:
    """What the tiles of a shard should be: offset, length, x, y, and the checksums where there are any (then True)."""
    opened = _index(folder)
    indexed = None
    if not isinstance(opened, Defect):
        files, index = opened
        if name in files:
            file = files[name]
            rows = slice(int(index.file_start[file]), int(index.file_start[file + 1]))
            indexed = {column: np.asarray(getattr(index, column)[rows]).astype(np.int64) for column in COLUMNS}
        elif record is None or sum(record[0]["counts"]):
            result.find("", "not in the index", "training never reads it: 'pretrain shards index' takes it up")
    if record is None:
        return indexed, False
    columns = record[1]
    if indexed is not None and any(not np.array_equal(indexed[column], columns[column]) for column in COLUMNS):
        result.find(
            "",
            "index mismatch",
            "index.npz and the shard's own record place its tiles differently: 'pretrain shards index' makes the index"
            " again",
        )
    return columns, all(column in columns for column in CHECKSUMS)


def _record(folder: Folder, name: str, result: Verified) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
    path = _at(folder, f"index/{Path(name).stem}.npz")
    try:
        with path.open("rb") as file, np.load(file) as record:
            columns = {key: record[key].astype(np.int64) for key in record.files if key != "facts"}
            facts = json.loads(str(record["facts"]))
        if {*COLUMNS} - set(columns) or len({len(column) for column in columns.values()}) != 1:
            raise ValueError("columns are missing")
        if sum(facts["counts"]) != len(columns["offset"]):
            raise ValueError("its numbers of tiles disagree")
        return facts, columns
    except FileNotFoundError:
        result.find("", "missing record", f"index/{path.name} is gone: its tiles have no checksums")
    except (*SPOILT, Truncated) as error:
        result.find(f"index/{path.name}", "damaged record", f"the shard's record can't be read ({error})")
    return None


def _index(folder: Folder) -> "tuple[dict[str, int], ShardIndex] | Defect":
    """The folder's index with the numbers of its shards by name, or what is wrong with it. (Shards that are gone don't
    count here: they are found one by one.)"""
    try:
        stamp = _at(folder, "index.npz").stat()
    except FileNotFoundError:
        return Defect(
            "index.npz", "", "missing index", f"there is none: 'pretrain shards index shards={folder}' makes it"
        )
    return _opened(folder, stamp.st_mtime_ns, stamp.st_size)


@lru_cache(maxsize=1)
def _opened(folder: Folder, changed: int, size: int) -> "tuple[dict[str, int], ShardIndex] | Defect":
    try:
        index = ShardIndex.open(folder, complete=False)
        _sound(index)
        return {name: number for number, name in enumerate(index.files)}, index
    except Fault as fault:
        return Defect("index.npz", "", "damaged index", str(fault))


def _place_of_tars(folder: Folder) -> Folder:
    """Where the tars of a folder's index lie: there, or where the index says."""
    opened = _index(folder)
    if isinstance(opened, Defect):
        return folder
    location = opened[1].location
    return location if is_remote(location) else Path(location)


def _at(folder: Folder, name: str) -> Path | RemotePath:
    """A file of the folder."""
    return folder / name if isinstance(folder, Path) else RemotePath(url_within(folder, name))


def _listed(folder: Folder, ending: str) -> Sequence[Path | RemotePath]:
    """The files of the folder that end so."""
    if isinstance(folder, Path):
        return sorted(folder.glob(f"*{ending}"))
    try:
        return [_at(folder, name) for name in list_names(folder, ending)]
    except FileNotFoundError:
        return []


def _sound(index: ShardIndex) -> None:
    """Raises Fault where the index's columns can't belong together."""
    tiles = len(index.offset)
    whole = (
        len(index.file_start) == len(index.files) + 1 == len(set(index.files)) + 1
        and len(index.run_start) == len(index.run_slide) + 1
        and all(len(getattr(index, column)) == tiles for column in COLUMNS)
        and all((np.diff(getattr(index, name)) >= 0).all() for name in RUNS[:2])
        and all(int(getattr(index, name)[-1]) == tiles for name in RUNS[:2])
        and bool((np.asarray(index.run_slide) < len(index.slides)).all())
    )
    if not whole:
        raise Fault(
            f"{index.folder / 'index.npz'} is damaged (its columns don't belong together): delete it and run 'pretrain"
            f" shards index shards={index.folder}'"
        )


def _place(name: str) -> tuple[int, int] | None:
    found = place_in(split_member(name)[0])
    return found and found[1:]


def _undecodable(data: bytes) -> str:
    """Why the bytes are no picture that can be read rightly, or nothing."""
    try:
        decode_image(data)
    except ValueError as error:
        return f"it is no readable picture: {error}"
    return ""
