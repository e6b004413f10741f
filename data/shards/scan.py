"""The index of shards that another program wrote, made in one pass over the tars.

Everything in the folder is read, or left out under a name, counted, with a reason: members that are no tile, tars that
are damaged or empty, files that are no tar. What is left out is kept in the index (``meta["left_out"]``), so that a
second run says it too.
"""

import json
import os
import re
import zlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from data.fault import Fault
from data.files import Refused, make_folder, require_writable
from data.git_lfs import refuse_pointer
from data.npz_files import SPOILT
from data.redaction import is_private
from data.remote import RemotePath, is_remote, list_names, url_within
from data.shards.index import ShardIndex
from data.shards.layout import COLUMNS, SLIDE_FACTS
from data.shards.records import CHECKSUMS, merge_records, record_path, write_record
from data.shards.tar_members import DamagedTar, members
from data.shards.tile_facts import Impossible, locate_tile, read_tile_facts, take_in
from data.shards.tile_members import (
    LeftOut,
    SampleOrder,
    beside_tiles,
    is_json,
    is_tile,
    json_key,
    json_of_each,
    leave_out,
    split_member,
    why_not,
)
from data.slides.coordinates import FARTHEST, UNKNOWN_PLACE

PACKED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # how gzip's, bzip2's, xz's and zstd's files begin
COMPRESSED = re.compile(r"\.(tar\.\w+|tgz|tbz2?|txz|tzst)$", re.IGNORECASE)
OUR_FILES = (
    "index",
    "index.npz",
    "coordinates",
    "thumbnails",
    "plan.json",
    "slides.csv",
)  # what lies beside shards of ours, or is made by a scan
SCAN_RULES = 2  # by which tars were scanned: what was scanned by others is read again
REFUSED_NAMED = 3  # of refused tiles
KINDS_NAMED = 5  # kinds of what was left out that the sentence names where nothing else is there


def scan(folder: Path | str, out: Path | None = None) -> ShardIndex:
    """Index shards that another program wrote, and keep the index beside them, or in ``out``. `describe_left_out` tells what
    isn't in it.

    A sample is a tile and its JSON (`data.shards.tile_members`), whose facts are taken where they can be true
    (`data.shards.tile_facts`); failing a slide or place there, slide and place from a key ``<slide>_<x>_<y>``; failing
    that, the tar counts as one slide and x and y are -1. Tars that were scanned before and haven't changed are not read
    again. Raises Fault where there is no tile.

    The folder may be a URL, whose index then goes to ``out``: its tars are read once from front to back, a few MB at a
    time.
    """
    made: dict[str, Any] = {"made_by": "another program, indexed by a scan"}
    shards, tars, others = folder, list_tars(folder), _no_tars(folder)
    if not tars:
        raise Fault(f"there are no .tar shards in {folder}{_beside(others)}")
    if out is None and is_remote(folder):
        raise Fault(
            f"say where the index of {folder} goes: pretrain shards index shards={folder} out=FOLDER, and train on"
            " FOLDER"
        )
    if out is not None and is_private(str(folder)):
        raise Fault(
            f"the index of {folder} would have to keep its password or token: give the address without it, and that by"
            ' fsspec\'s configuration, FSSPEC_HTTPS=\'{"client_kwargs": {"headers": {…}}}\' or a file in'
            " ~/.config/fsspec."
        )
    if out is not None:
        made["location"] = str(shards) if is_remote(shards) else str(Path(shards).resolve())
    folder = Path(folder) if out is None else Path(out)
    try:
        require_writable(make_folder(folder / "index") / "record")
    except Refused as refusal:
        if out is not None:
            raise
        raise Fault(
            f"{refusal} Or keep the index in a folder of yours: pretrain shards index shards={shards} out=FOLDER, and"
            " train on FOLDER."
        ) from refusal
    names: list[str] = []
    tiles = 0
    inside: dict[str, LeftOut] = {}
    slides: dict[str, dict[str, Any]] = {}
    for tar in tars:
        try:
            record = _known(folder, tar) or _scanned(folder, tar)
        except UnreadableTar as error:
            leave_out(others, "", str(error), tar.name)
            continue
        if not sum(record["counts"]) and not record.get("left_out"):
            leave_out(others, "", "it holds no file", tar.name)
        names.append(tar.stem)
        tiles += sum(record["counts"])
        for kind, why, count, example in record.get("left_out", ()):
            leave_out(inside, kind, why, f"{example} in {tar.name}", count)
        for facts in record["slides"]:
            take_in(slides.setdefault(facts["slide"], facts), facts)
    if not tiles:
        raise Fault(
            f"the shards in {shards} hold no .jpg, .jpeg, .png or .webp that can be read as a tile{_beside(inside | others)}"
        )
    made["left_out"] = {
        "members": [asdict(left) for left in inside.values()],
        "files": [asdict(left) for left in others.values()],
    }
    disputed: dict[str, LeftOut] = {}
    for slide, facts in slides.items():
        for name, values in facts.get("disputed", {}).items():
            leave_out(
                disputed,
                f"slide with several {name}",
                "its tiles' .json contradict one another, so it counts as not known",
                f"{slide}: {' and '.join(map(repr, values))}",
            )
    made["disputed"] = [asdict(kind) for kind in disputed.values()]
    merge_records(folder, names, made, slides)
    return ShardIndex.open(folder)


def describe_left_out(index: ShardIndex) -> tuple[list[LeftOut], list[LeftOut]]:
    """What a scan left out: members of tars, and whole files."""
    found = index.meta.get("left_out", {"members": [], "files": []})
    members, files = ([LeftOut(**left) for left in found[name]] for name in ("members", "files"))
    return members, files


def disputed(index: ShardIndex) -> list[LeftOut]:
    """What is in an index that `scan` made, and isn't known or can't all be true: tiles of which nothing says slide and
    place, facts of a slide that its tiles contradict one another in, places of a slide that have several tiles."""
    told = [LeftOut(**kind) for kind in index.meta.get("disputed", [])]
    return [*_nowhere(index).values(), *told, *_twice(index).values()]


def _nowhere(index: ShardIndex) -> dict[str, LeftOut]:
    """Tiles of whose slide nothing is known but the tar that they lie in."""
    nowhere: dict[str, LeftOut] = {}
    starts = np.asarray(index.run_start)
    for run in np.flatnonzero(index.x[starts[:-1]] == UNKNOWN_PLACE).tolist():
        first, last = int(starts[run]), int(starts[run + 1])
        tar = index.files[index.file_of(first)]
        if index.slide_of(first) == tar.removesuffix(".tar"):
            why = (
                "neither a .json, as slide, x and y, nor a key <slide>_<x>_<y> says where they are from, so each tar counts"
                " as a slide"
            )
            leave_out(nowhere, "tile without slide and place", why, f"the first in {tar}", last - first)
    return nowhere


def _twice(index: ShardIndex) -> dict[str, LeftOut]:
    """Tiles whose place on their slide has another, as far as places are known."""
    twice: dict[str, LeftOut] = {}
    runs = np.argsort(index.run_slide, kind="stable")
    for of_slide in np.split(runs, np.nonzero(np.diff(index.run_slide[runs]))[0] + 1):
        rows = np.concatenate([np.arange(index.run_start[run], index.run_start[run + 1]) for run in of_slide])
        x, y = index.x[rows].astype(np.int64), index.y[rows].astype(np.int64)
        rows, places = rows[x != UNKNOWN_PLACE], (x * FARTHEST + y)[x != UNKNOWN_PLACE]
        order = np.argsort(places, kind="stable")
        again = np.nonzero(np.diff(places[order]) == 0)[0]
        if len(again):
            first, second = (int(rows[order[again[0] + after]]) for after in (0, 1))
            tars = " and ".join(dict.fromkeys(index.files[index.file_of(row)] for row in (first, second)))
            example = f"({index.x[first]}, {index.y[first]}) of {index.slide_of(first)} in {tars}"
            leave_out(
                twice,
                "tile at a place that is taken",
                "both are in the index, and are trained on twice as often: remove one of the tars if one is a copy",
                example,
                len(again),
            )
    return twice


class UnreadableTar(Exception):
    """A tar that gives no tiles as it is; the message says why, and the way out."""


def _scanned(folder: Path, tar: Path | RemotePath) -> dict[str, Any]:
    """Read a tar from front to back and write its record, whose facts are returned. Raises UnreadableTar."""
    tiles: list[tuple[str, int, int, int]] = []  # name, offset, length, CRC-32
    jsons: dict[str, list[tuple[dict[str, Any] | str, int]]] = {}  # facts, or why they can't be true; CRC-32
    left: dict[str, LeftOut] = {}
    order = SampleOrder()
    if isinstance(tar, Path) and not tar.is_file():  # a pipe would be waited for, a dangling link is not there
        raise UnreadableTar("it is no file")
    try:
        size = tar.stat().st_size
        if not size:
            raise UnreadableTar("it is empty, a file of 0 bytes: copy it again")
        if isinstance(tar, Path):
            refuse_pointer(tar)
        with tar.open("rb") as file:
            if file.read(6).startswith(PACKED):
                raise UnreadableTar(
                    "it is compressed, whatever its name, and tiles are read from where they lie in a tar: unpack it"
                )
            file.seek(0)
            for member in members(file, size):
                order.meet(member)
                if is_tile(member) and not member.size:
                    ending = split_member(member.name)[1]
                    leave_out(left, f"empty .{ending}", "it has 0 bytes", member.name)
                elif is_tile(member) or is_json(member):
                    file.seek(member.offset)
                    content = file.read(member.size)
                    checksum = zlib.crc32(content)
                    if is_tile(member):
                        tiles.append((member.name, member.offset, member.size, checksum))
                    else:
                        jsons.setdefault(split_member(member.name)[0], []).append(
                            (read_tile_facts(member.name, content), checksum)
                        )
                elif (reason := why_not(member)) is not None:
                    leave_out(left, *reason, member.name)
    except Fault as fault:
        raise UnreadableTar(str(fault).removeprefix(f"{tar} ")) from fault
    except (DamagedTar, OSError) as error:
        many = f"; the {len(tiles):,} tiles in front of that are left out with it" if tiles else ""
        raise UnreadableTar(f"it is damaged ({error}): replace it{many}") from error

    beside = beside_tiles([name for name, *_ in tiles])
    for number, why in beside.items():
        name = tiles[number][0]
        leave_out(left, f".{split_member(name)[1]} beside a tile", why, name)
    tiles = [tile for number, tile in enumerate(tiles) if number not in beside]
    keys = [split_member(name)[0] for name, *_ in tiles]
    rows: list[tuple[int, ...]] = []
    slides: list[dict[str, Any]] = []
    counts: list[int] = []
    used = set()
    refused: dict[tuple[str, str], list[str]] = {}
    for key, (_, offset, length, checksum), told in zip(keys, tiles, json_of_each(keys, jsons), strict=True):
        facts, of_json = told or (None, 0)
        used.add(id(told))
        if reason := order.why_refused(key, owner := json_key(key, jsons)):
            refused.setdefault(reason, []).append(key)
            used |= set(map(id, jsons.get(owner, ())))
            continue
        try:
            slide, x, y = locate_tile(key, facts, tar.stem)
        except Impossible as impossible:
            leave_out(left, *impossible.args)
            continue
        assert not isinstance(facts, str)
        if not slides or slides[-1]["slide"] != slide:
            # Files beside the tars are ours to name, and not a tile's.
            slides.append(dict.fromkeys(SLIDE_FACTS) | {"slide": slide})
            counts.append(0)
        take_in(slides[-1], facts or {})
        counts[-1] += 1
        rows.append((offset, length, x, y, checksum, of_json))
    for (kind, why), tiles_refused in refused.items():
        first = ", ".join(dict.fromkeys(tiles_refused[:REFUSED_NAMED]))
        leave_out(left, kind, why, first, len(tiles_refused))
    for key, several in jsons.items():
        if alone := sum(id(told) not in used for told in several):
            leave_out(left, "lone .json", "no picture has its key", f"{key}.json", alone)
    table = np.array(rows, dtype=np.int64).reshape(-1, 6)
    facts_of_tar = {
        "file": tar.name,
        "size": size,
        "longest": int(table[:, 1].max(initial=0)),
        "slides": slides,
        "counts": counts,
        "scanned": SCAN_RULES,
        "left_out": [(kind.kind, kind.why, kind.count, kind.example) for kind in left.values()],
    }
    write_record(folder, tar.stem, facts_of_tar, dict(zip((*COLUMNS, *CHECKSUMS), table.T, strict=True)))
    return facts_of_tar


def _known(folder: Path, tar: Path | RemotePath) -> dict[str, Any] | None:
    """What the record of a tar says, where it describes the tar as it is and was made by these rules; None where there
    is no such record."""
    try:
        path = record_path(folder, tar.stem)
        with np.load(path) as record:
            facts: dict[str, Any] = json.loads(str(record["facts"]))
            made = os.stat(path).st_mtime_ns
        if isinstance(tar, Path) and tar.stat().st_mtime_ns > made:  # packed anew, maybe to the same size
            return None
        of_now = facts.get("scanned", SCAN_RULES) == SCAN_RULES
        return facts if facts["size"] == tar.stat().st_size and of_now else None
    except SPOILT:
        return None


def list_tars(folder: Path | str) -> Sequence[Path | RemotePath]:
    """The shards in a folder or behind a URL, sorted by name."""
    if is_remote(folder):
        return [RemotePath(url_within(str(folder), name)) for name in list_names(str(folder), ".tar")]
    return sorted(Path(folder).glob("*.tar"))


def _no_tars(folder: Path | str) -> dict[str, LeftOut]:
    """What else is in the folder; behind a URL, where all sorts of things may be listed, only what should have been a
    tar."""
    left: dict[str, LeftOut] = {}
    if is_remote(folder):
        entries = [(name, False) for name in list_names(str(folder), "") if COMPRESSED.search(name)]
    elif Path(folder).is_dir():
        entries = sorted((entry.name, entry.is_dir()) for entry in os.scandir(folder))
    else:
        return left
    for name, is_folder in entries:
        if name.endswith(".tar") or name.startswith(".") or name in OUR_FILES:
            continue
        if name.lower().endswith(".tar"):
            leave_out(left, "", f"its ending is in capitals: rename it to {name[:-4]}.tar", name)
        elif COMPRESSED.search(name):
            leave_out(
                left, "", "it is compressed, and tiles are read from where they lie in a tar: unpack it to a .tar", name
            )
        elif is_folder and (inside := next(Path(folder, name).rglob("*.tar"), None)):
            leave_out(left, "", f"it holds shards of its own: name it too, as shards='{folder} {inside.parent}'", name)
        else:
            leave_out(left, "other folder" if is_folder else "other file", "no .tar", name)
    return left


def _beside(left: dict[str, LeftOut]) -> str:
    named = [str(kind) for kind in left.values()]
    more = f"; and {len(named) - KINDS_NAMED} more" if len(named) > KINDS_NAMED else ""
    return f" ({'; '.join(named[:KINDS_NAMED])}{more})" if named else ""
