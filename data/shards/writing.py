"""Tiles into WebDataset tars: which tiles go into which shard, and writing one.

A shard holds whole slides, up to ``tiles_per_shard`` tiles; a slide with more gets shards of its own, evenly filled. So
most of a patient's data can be withdrawn by deleting a few files. Which tiles go where is decided once, before the
first tile is read, and kept in ``plan.json``; each shard is then a job of its own, and the same whoever writes it, in
whatever order, after whatever interruption. A kill costs the shard that each process was at, which is one large slide
or half a minute of small ones; slides whose tissue was found are not looked at again.
"""

import json
import math
import tarfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data.fault import Fault
from data.files import appearing
from data.npz_files import SPOILT
from data.shards.layout import COLUMNS
from data.shards.records import CHECKSUMS, record_path, write_record
from data.shards.tar_members import TAR_BLOCK, member_header
from data.slides.coordinates_h5 import coordinates_path, read_tiling
from data.slides.cutting import CutTile, cut_tiles
from data.slides.tiling import KEPT, Tiling


@dataclass(frozen=True)
class TileRange:
    """Candidate tiles ``first`` to ``last - 1`` of a slide, in row-major order."""

    slide: str
    first: int
    last: int


@dataclass(frozen=True)
class PlannedShard:
    """A planned shard: its name (without ``.tar``) and what goes into it."""

    name: str
    parts: list[TileRange]

    def __len__(self) -> int:
        return sum(part.last - part.first for part in self.parts)


@dataclass
class WrittenShard:
    """What came of a shard: kept tiles, bytes, and slides that failed with the reason why."""

    name: str
    tiles: int = 0
    size: int = 0
    failed: dict[str, str] = field(default_factory=dict)


def plan_shards(parts: list[TileRange], limit: int, name: str, first_number: int) -> list[PlannedShard]:
    """Put ``parts``, in their order, into shards of at most ``limit`` tiles; only a part larger than that is split."""
    shards: list[list[TileRange]] = []
    room = 0
    for part in parts:
        count = part.last - part.first
        pieces = math.ceil(count / limit)
        bounds = [part.first + count * piece // pieces for piece in range(pieces + 1)] if pieces else []
        for first, last in pairwise(bounds):
            if pieces > 1 or last - first > room:
                shards.append([])
                room = limit
            shards[-1].append(TileRange(part.slide, first, last))
            room = 0 if pieces > 1 else room - (last - first)
    return [PlannedShard(f"{name}-{first_number + number:06d}", inside) for number, inside in enumerate(shards)]


def is_published(folder: Path, name: str) -> bool:
    """Whether shard ``name`` is complete: its record is there and, unless it holds no tile, its tar in the size that
    the record says."""
    try:
        facts = read_shard_facts(folder, name)
    except SPOILT:
        return False  # none yet, or one that is damaged: the shard is made again
    if not sum(facts["counts"]):
        return True
    tar = folder / f"{name}.tar"
    return tar.exists() and tar.stat().st_size == facts["size"]


def read_shard_facts(folder: Path, name: str) -> dict[str, Any]:
    """The facts in a shard's record: `write_shard` says which."""
    with np.load(record_path(folder, name)) as record:
        return json.loads(str(record["facts"]))


def write_shard(
    folder: Path, shard: PlannedShard, sources: dict[str, str], min_saturated: float | None = None
) -> WrittenShard:
    """Cut the tiles of ``shard`` and publish its tar and its record.

    ``sources`` gives each slide's file. Tiles that turn out empty or pale, or whose data is damaged, are left out and
    recorded in ``facts["rejected"]`` as [slide, x, y, verdict]. A slide that can't be read, or with more than 5 % of its tiles
    damaged, is taken out of the shard again and recorded in ``facts["failed"]``; where every slide failed nothing is
    published.

    The tar is synced and renamed before its record, and counts from then on; whatever happens earlier leaves only a
    hidden partial file, removed by the next run. Raises Fault where the disk is full.
    """
    written = WrittenShard(shard.name)
    path = folder / f"{shard.name}.tar"
    rows: list[tuple[int, ...]] = []
    slides: list[dict[str, Any]] = []
    counts: list[int] = []
    rejected: list[tuple[str, int, int, int]] = []
    with appearing(path) as partial:
        with partial.open("wb", buffering=1 << 20) as raw:
            tar = TarWriter(raw)
            for part in shard.parts:
                before, rejected_before, start = len(rows), len(rejected), tar.offset
                tiling = read_tiling(coordinates_path(folder, part.slide))
                source = Path(sources.get(part.slide, tiling.source))
                cut = cut_tiles(source, tiling, part.first, part.last, min_saturated)
                try:
                    _add_part(tar, part, tiling, cut, rows, rejected)
                except Fault as fault:
                    written.failed[part.slide] = str(fault)
                    del rows[before:], rejected[rejected_before:]
                    tar.rewind(start)
                    continue
                slides.append(facts_of(tiling))
                counts.append(len(rows) - before)
            tar.finish()
        written.tiles, written.size = len(rows), partial.stat().st_size
        if not rows:
            partial.unlink()
    if not slides:
        return written
    table = np.array(rows, dtype=np.int64).reshape(-1, 6)
    columns = {name: table[:, position] for position, name in enumerate((*COLUMNS, *CHECKSUMS))}
    facts = {
        "file": path.name,
        "size": written.size,
        "longest": int(table[:, 1].max(initial=0)),
        "slides": slides,
        "counts": counts,
        "rejected": rejected,
        "failed": written.failed,
    }
    write_record(folder, shard.name, facts, columns)
    return written


def facts_of(tiling: Tiling) -> dict[str, Any]:
    """What the index keeps about a slide (see `data.shards.layout.SLIDE_FACTS`)."""
    grid = tiling.grid
    return {
        "slide": tiling.slide,
        "source": tiling.source,
        "patient": tiling.patient or None,
        "width": grid.width,
        "height": grid.height,
        "mpp_level0": grid.mpp_level0,
        "mpp": grid.mpp,
        "tile_size": grid.tile_size,
        "tile_size_level0": grid.tile_size_level0,
        "level": grid.level,
        "downsample": grid.downsample,
        "thumbnail_downsample": tiling.thumbnail_downsample,
        "coordinates": f"coordinates/{tiling.slide}_patches.h5",
    }


class TarWriter:
    """A tar written front to back, whose end can be taken back. No time, owner or mode of this machine goes in."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.offset = file, 0

    def add(self, name: str, data: bytes) -> int:
        """Append a member and return the offset of its data."""
        header = member_header(name, len(data))
        self.file.write(header + data + bytes(-len(data) % TAR_BLOCK))
        offset = self.offset + len(header)
        self.offset = offset + len(data) + -len(data) % TAR_BLOCK
        return offset

    def rewind(self, offset: int) -> None:
        """Take back everything from ``offset`` on."""
        self.file.seek(offset)
        self.file.truncate()
        self.offset = offset

    def finish(self) -> None:
        """Write the end mark, and fill the last record as tar programs do."""
        end = self.offset + 2 * TAR_BLOCK
        self.file.write(bytes(end - self.offset + -end % tarfile.RECORDSIZE))


def _add_part(
    tar: TarWriter,
    part: TileRange,
    tiling: Tiling,
    cut: Iterable[CutTile],
    rows: list[tuple[int, ...]],
    rejected: list[tuple[str, int, int, int]],
) -> None:
    common = {
        key: value
        for key, value in facts_of(tiling).items()
        if key in ("slide", "patient", "level", "mpp", "tile_size", "tile_size_level0") and value is not None
    }
    beginning = json.dumps(common)[:-1]
    for tile in cut:
        if tile.verdict != KEPT:
            rejected.append((part.slide, tile.x, tile.y, tile.verdict))
            continue
        key = f"{part.slide}_{tile.x}_{tile.y}"
        measured = "" if math.isnan(tile.share) else f', "tissue": {round(tile.share, 3)}'
        facts = f'{beginning}, "x": {tile.x}, "y": {tile.y}{measured}}}'.encode()
        offset = tar.add(f"{key}.jpg", tile.jpeg)
        tar.add(f"{key}.json", facts)
        rows.append((offset, len(tile.jpeg), tile.x, tile.y, zlib.crc32(tile.jpeg), zlib.crc32(facts)))
