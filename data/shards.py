"""Tiles into WebDataset tars: which tiles go into which shard, and writing one.

A shard holds whole slides, up to ``tiles_per_shard`` tiles; a slide with more gets shards of its own, evenly filled. So most
of a patient's data can be withdrawn by deleting a few files. Which tiles go where is decided once, before the first tile
is read, and kept in ``plan.json``; each shard is then a job of its own, and the same whoever writes it, in
whatever order, after whatever interruption.
"""

import io
import json
import math
import os
import tarfile
import zlib
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg

from data.coordinates_h5 import coordinates_path, read_tiling
from data.fault import Fault
from data.shard_index import publish, record_path, write_record
from data.slides import Slide
from data.tiling import DAMAGED, EMPTY, READ, Tiling
from data.tissue import is_empty

JPEG_QUALITY = 90
MOST_DAMAGED = 0.05  # share of a slide's tiles that may be damaged before the slide counts as failed


@dataclass(frozen=True)
class Part:
    """Candidate tiles ``first`` to ``last - 1`` of a slide, in row-major order."""

    slide: str
    first: int
    last: int


@dataclass(frozen=True)
class Shard:
    """A planned shard: its name (without ``.tar``) and what goes into it."""

    name: str
    parts: list[Part]

    def __len__(self) -> int:
        return sum(part.last - part.first for part in self.parts)


@dataclass
class Written:
    """What came of a shard: kept tiles, bytes, and slides that failed with the reason why."""

    name: str
    tiles: int = 0
    size: int = 0
    failed: dict[str, str] = field(default_factory=dict)


def plan_shards(parts: list[Part], limit: int, name: str, first_number: int) -> list[Shard]:
    """Put ``parts``, in their order, into shards of at most ``limit`` tiles; only a part larger than that is split."""
    shards: list[list[Part]] = []
    room = 0
    for part in parts:
        count = part.last - part.first
        pieces = math.ceil(count / limit)
        bounds = [part.first + count * piece // pieces for piece in range(pieces + 1)] if pieces else []
        for first, last in pairwise(bounds):
            if pieces > 1 or last - first > room:
                shards.append([])
                room = limit
            shards[-1].append(Part(part.slide, first, last))
            room = 0 if pieces > 1 else room - (last - first)
    return [Shard(f"{name}-{first_number + number:06d}", inside) for number, inside in enumerate(shards)]


def is_published(folder: Path, name: str) -> bool:
    """Whether shard ``name`` is complete: its record is there and, unless it holds no tile, its tar."""
    record = record_path(folder, name)
    return record.exists() and ((folder / f"{name}.tar").exists() or not sum(read_facts(folder, name)["counts"]))


def read_facts(folder: Path, name: str) -> dict[str, Any]:
    """The facts in a shard's record: `write_shard` says which."""
    with np.load(record_path(folder, name)) as record:
        return json.loads(str(record["facts"]))


def write_shard(folder: Path, shard: Shard, sources: dict[str, str]) -> Written:
    """Cut the tiles of ``shard`` and publish its tar and its record.

    ``sources`` gives each slide's file. Tiles that turn out empty, or whose data is damaged, are left out and
    recorded in ``facts["rejected"]`` as [slide, row, column, verdict]. A slide that can't be read, or with more than 5 % of
    its tiles damaged, is taken out of the shard again and recorded in ``facts["failed"]``; where every slide failed nothing is published.

    The tar is synced and renamed before its record, and counts from then on; whatever happens earlier leaves only a hidden
    partial file, removed by the next run. Raises Fault where the disk is full.
    """
    written = Written(shard.name)
    path = folder / f"{shard.name}.tar"
    partial = folder / f".{path.name}.{os.getpid()}"
    rows: list[tuple[int, int, int, int, int]] = []
    slides: list[dict[str, Any]] = []
    counts: list[int] = []
    rejected: list[tuple[str, int, int, int]] = []
    try:
        with partial.open("w+b") as raw, tarfile.open(fileobj=raw, mode="w", format=tarfile.GNU_FORMAT) as tar:
            for part in shard.parts:
                before, rejected_before, start = len(rows), len(rejected), tar.offset
                tiling = read_tiling(coordinates_path(folder, part.slide))
                try:
                    _add_part(tar, part, tiling, Path(sources.get(part.slide, tiling.source)), rows, rejected)
                except Fault as fault:
                    written.failed[part.slide] = str(fault)
                    del rows[before:], rejected[rejected_before:]
                    tar.offset = start
                    raw.seek(start)
                    raw.truncate()
                    continue
                slides.append(facts_of(tiling))
                counts.append(len(rows) - before)
        written.tiles, written.size = len(rows), partial.stat().st_size
        if not slides:
            return written
        if rows:
            publish(partial, path)
        table = np.array(rows, dtype=np.int64).reshape(-1, 5)
        columns = {name: table[:, position] for position, name in enumerate(("offset", "length", "x", "y", "crc32"))}
        facts = {
            "file": path.name, "size": written.size, "longest": int(table[:, 1].max(initial=0)), "slides": slides, "counts": counts,
            "rejected": rejected, "failed": written.failed,
        }  # fmt: skip
        write_record(folder, shard.name, facts, columns)
    except OSError as error:
        raise Fault(
            f"writing {path} failed ({error.strerror or error}): make room or fix the disk, then run the same command again"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return written


def facts_of(tiling: Tiling) -> dict[str, Any]:
    """What the index keeps about a slide (see `shard_index.FACTS`)."""
    grid = tiling.grid
    return {
        "slide": tiling.slide, "source": tiling.source, "patient": tiling.patient or None, "width": grid.width, "height": grid.height,
        "mpp_level0": grid.mpp_level0, "mpp": grid.mpp, "tile_size": grid.tile_size, "tile_size_level0": grid.tile_size_level0,
        "level": grid.level, "downsample": grid.downsample, "thumbnail_downsample": tiling.thumbnail_downsample,
        "coordinates": f"coordinates/{tiling.slide}_patches.h5",
    }  # fmt: skip


def _add_part(
    tar: tarfile.TarFile, part: Part, tiling: Tiling, source: Path,
    rows: list[tuple[int, int, int, int, int]], rejected: list[tuple[str, int, int, int]],
) -> None:  # fmt: skip
    grid = tiling.grid
    xs, ys, shares = (values[part.first : part.last] for values in tiling.tiles(*READ))
    common = {
        key: value
        for key, value in facts_of(tiling).items()
        if key in ("slide", "patient", "level", "mpp", "tile_size", "tile_size_level0") and value is not None
    }
    damaged = 0
    slide = Slide(source)
    try:
        if slide.dimensions[0] != (grid.width, grid.height):
            raise Fault(
                f"{source} is not the slide it was when its tissue was found (its size has changed): shard it into another folder"
            )
        for x, y, share in zip(xs.tolist(), ys.tolist(), shares.tolist(), strict=True):
            try:
                tile = slide.read_tile(grid, x, y)
            except Fault as fault:
                damaged += 1
                rejected.append((part.slide, int(grid.cell(y)), int(grid.cell(x)), DAMAGED))
                if damaged > MOST_DAMAGED * len(xs):
                    raise Fault(
                        f"{fault}; {damaged} of its tiles so far, too many to go on: replace the file"
                    ) from fault
                slide.close()
                slide = Slide(source)  # after an error openslide refuses everything else on the same handle
                continue
            if is_empty(tile):
                rejected.append((part.slide, int(grid.cell(y)), int(grid.cell(x)), EMPTY))
                continue
            jpeg = simplejpeg.encode_jpeg(np.ascontiguousarray(tile), quality=JPEG_QUALITY)
            key = f"{part.slide}_{x}_{y}"
            offset = _add(tar, f"{key}.jpg", jpeg)
            _add(tar, f"{key}.json", json.dumps(common | {"x": x, "y": y, "tissue": round(share, 3)}).encode())
            rows.append((offset, len(jpeg), x, y, zlib.crc32(jpeg)))
    finally:
        slide.close()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Append a member and return the offset of its data. No time, owner or mode of this machine goes in."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
    return tar.offset - math.ceil(len(data) / tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
