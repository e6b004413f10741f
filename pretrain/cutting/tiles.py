"""Tiles into the shards that a plan says, and what came of their slides."""

from collections import defaultdict
from functools import partial
from pathlib import Path

from data.fault import Fault
from data.parallel import in_processes
from data.shards.folder import FAILED, NO_TISSUE, TILED, ShardFolder, SlideRow
from data.shards.writing import PlannedShard, TileRange, WrittenShard, is_published, read_shard_facts, write_shard
from data.slides.coordinates_h5 import coordinates_path, read_tiling, write_tiling
from pretrain.run.progress import Progress, say


def cut_shards(folder: ShardFolder, names: dict[Path, str], workers: int) -> dict[str, str]:
    """Cut every planned shard that isn't there yet; returns why slides failed, by slide.

    A shard is published whole or not at all, and remembered by being there. Raises Fault where one can't be written.
    """
    todo = [shard for shard in folder.plan if not is_published(folder.out, shard.name)]
    if not todo:
        say("no new tiles to cut")
        return {}
    sources = {slide: str(path) for path, slide in names.items()}
    cut = partial(_write, out=folder.out, sources=sources, min_saturated=folder.made["min_saturated"])
    failed: dict[str, str] = {}
    progress = Progress(sum(len(shard) for shard in todo), "cutting tiles", "tiles")
    try:
        for shard, written in in_processes(cut, todo, workers):
            if isinstance(written, Fault):
                raise written
            for slide, message in written.failed.items():
                failed[slide] = message
                say(f"skipped: {message}")
            progress.advance(len(shard), shard.name)
    finally:
        progress.close()
    return failed


def _write(shard: PlannedShard, out: Path, sources: dict[str, str], min_saturated: float | None) -> WrittenShard:
    return write_shard(out, shard, sources, min_saturated)


def record_outcomes(folder: ShardFolder, failed: dict[str, str]) -> None:
    """What came of the slides of all published shards, into the folder's rows and the slides' h5."""
    published, rows = folder.published, folder.rows
    _record_rejected(folder.out, published, rows)
    for shard in published:
        for piece in shard.parts:
            rows[piece.slide].outcome = TILED if rows[piece.slide].kept else NO_TISSUE
            rows[piece.slide].message = ""
    for slide, message in failed.items():
        rows[slide].outcome, rows[slide].message = FAILED, message


def _record_rejected(out: Path, shards: list[PlannedShard], rows: dict[str, SlideRow]) -> None:
    """Move tiles that turned out empty, damaged or pale from kept to their verdict, in the slides' h5 and rows."""
    rejected: dict[str, list[tuple[int, int, int]]] = defaultdict(list)
    for shard in shards:
        for slide, x, y, verdict in read_shard_facts(out, shard.name)["rejected"]:
            rejected[slide].append((x, y, verdict))
    for slide, cells in rejected.items():
        before = read_tiling(coordinates_path(out, slide))
        tiling = before.rejected(cells)
        if (tiling.verdict != before.verdict).any():
            write_tiling(out, tiling)
        if slide in rows:
            rows[slide].describe(tiling)


def failed_parts(folder: ShardFolder, asked: set[str]) -> list[TileRange]:
    """Parts of slides that failed in a shard published without them, and that no later shard has taken on."""
    waiting: dict[TileRange, None] = {}
    for shard in folder.plan:
        failed = (
            set(read_shard_facts(folder.out, shard.name)["failed"]) if is_published(folder.out, shard.name) else set()
        )
        for part in shard.parts:
            if part.slide in failed and part.slide in asked:
                waiting[part] = None
            else:
                waiting.pop(part, None)
    return list(waiting)
