"""Cut whole-slide images into tile shards.

Finds the tissue of every slide, cuts it into tiles at the asked microns per pixel, and writes

    <out>/tiles-000000.tar …     WebDataset shards: <slide>_<x>_<y>.jpg and .json, readable by anyone's WebDataset
    <out>/index.npz              where each tile lies, for training
    <out>/coordinates/*.h5       the tiles' places, for TRIDENT's and CLAM's readers
    <out>/thumbnails/*.jpg       a small picture of each slide
    <out>/slides.csv             what came of each slide, and why one failed

Any format that openslide reads. A slide whose own statement of its µm per pixel can't be right is refused; slides_mpp=,
one value or a table with the columns slide and mpp, overrules what slides say. A slide that fails is named and counted,
and the others go on; run the same command again to continue after an interruption, to retry what failed, or to add
slides.

Examples:

    pretrain shard slides=/slides out=shards
    pretrain shard slides="a.svs b.tiff" out=shards mpp=1.0 slides_mpp=0.25
    pretrain shard slides=slides.csv out=shards slides_mpp=slides.csv
    pretrain shard slides='/archive/**/*.ndpi' out=shards tissue=gigapath workers=8
    pretrain shard slides=/slides out=shards coordinates=trident/20x_256px_0px_overlap
    pretrain shard slides=/slides out=shards part=3/40

The last line is one job of an array of forty, each of which takes its share of the slides; 'pretrain shards index
shards=shards' merges what they made. With coordinates= the tiles are those that TRIDENT or CLAM chose, and no tissue is
looked for.
"""

import os
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from data.fault import Fault
from data.files import refused
from data.parallel import in_processes
from data.shards.folder import (
    FAILED,
    NO_TISSUE,
    PENDING,
    TILED,
    SlideRow,
    load_rows,
    prepare,
    save_plan,
    save_rows,
    written_by_one,
)
from data.shards.index import ShardIndex
from data.shards.job_array import JobPart, check_division, known_slides
from data.shards.records import merge_records
from data.shards.writing import Shard, TileRange, is_published, plan_shards, read_shard_facts, write_shard
from data.slides.coordinates_h5 import coordinates_path, read_tiling, write_tiling
from data.slides.cutting import JPEG_QUALITY
from data.slides.lists import list_slides
from data.slides.mpp import SAME_MPP, SlidesMpp
from data.slides.names import name_slides
from data.slides.survey import survey
from data.slides.tiling import TilingSettings
from data.slides.tissue import RULES
from models.allowed import FILE_STEM, ON_DISK, PATTERN, SHARE, SOME, TILE, one_of, within
from pretrain.run.progress import Progress, say, track

MOST_SAID = 10  # slides of a kind that are said one by one


@dataclass
class Config:
    slides: Annotated[list[str], SOME, ON_DISK]
    out: Annotated[str, ON_DISK]
    mpp: Annotated[float, within(above=0)]
    tile_size: Annotated[int, TILE]
    tissue: Annotated[str, one_of(*RULES)]
    min_tissue: Annotated[float | None, SHARE]
    slides_mpp: str | None
    patient_pattern: Annotated[str, PATTERN]
    tiles_per_shard: Annotated[int, within(least=1)]
    name: Annotated[str, FILE_STEM]
    coordinates: Annotated[str | None, ON_DISK]
    part: str | None
    workers: Annotated[int | None, within(least=1)]


def run(config: Config) -> None:
    """Cut the slides, or say that it is done. Raises Fault where not one slide gave tiles, and where the disk is full."""
    out = Path(config.out)
    min_tissue = RULES[config.tissue].min_tissue if config.min_tissue is None else config.min_tissue
    settings = TilingSettings(config.mpp, config.tile_size, config.tissue, min_tissue)
    paths, slides_mpp = list_slides(config.slides), SlidesMpp.parse(config.slides_mpp)
    if some := slides_mpp.tells_of(paths):
        say(some)
    part = None if config.part is None else JobPart.parse(config.part)
    try:
        with written_by_one(out, part.state if part else ""):
            _shard(config, out, settings, paths, part, slides_mpp)
    except OSError as error:  # what a slide's file does wrong is a Fault already: this is about writing
        raise refused(out, error) from error


def _shard(
    config: Config, out: Path, settings: TilingSettings, paths: list[Path], part: JobPart | None, slides_mpp: SlidesMpp
) -> None:
    state = part.state if part else ""
    workers = config.workers or len(os.sched_getaffinity(0))
    made = asdict(settings) | {"jpeg_quality": JPEG_QUALITY}
    if config.coordinates is not None:
        made |= {"tissue": "given", "min_tissue": None}
    check_division(out, part)
    plan = prepare(out, made, state)
    rows = load_rows(out, state)
    names = name_slides(paths, known_slides(out))
    if part is not None:
        names = {path: slide for path, slide in names.items() if part.owns(slide)}
        say(f"{part}: {counted_as(len(names), 'slide')} of {len(paths):,}")
    _report_renamed(names)
    _hold_to_mpp(out, plan, rows, names, slides_mpp)
    for path, slide in names.items():
        rows.setdefault(slide, SlideRow(slide, str(path))).path = str(path)
    save_rows(out, rows, state)
    asked = set(names.values())
    finished = all(rows[slide].outcome in (TILED, NO_TISSUE) for slide in asked)
    merged = part is not None or (out / "index.npz").exists()
    if finished and merged and all(is_published(out, shard.name) for shard in plan):
        if part is None:
            merge_records(out, [shard.name for shard in plan], made)
        _summary(out, rows, asked, part)
        say(f"nothing left to do: all {len(asked)} slides are done")
        return

    # 1. Find the tissue of every slide that isn't planned yet.
    planned = {part.slide for shard in plan for part in shard.parts}
    undecided = [
        (path, slide) for path, slide in names.items() if slide not in planned and rows[slide].outcome != NO_TISSUE
    ]
    overruled = 0
    look = partial(
        survey, out=out, settings=settings, slides_mpp=slides_mpp, patient_pattern=config.patient_pattern,
        coordinates=None if config.coordinates is None else Path(config.coordinates),
    )  # fmt: skip
    new: dict[str, int] = {}
    surveyed = in_processes(look, undecided, workers)
    for (_, slide), result in track(surveyed, len(undecided), "finding tissue", "slides") if undecided else ():
        row = rows[slide]
        if isinstance(result, Fault):
            row.outcome, row.message = FAILED, str(result)
            say(f"skipped: {result}")
            continue
        tiling, left = result.tiling, result.left
        if result.overruled:
            overruled += 1
            if overruled <= MOST_SAID:
                say(result.overruled)
        if left.outside or left.double:
            say(
                f"{row.path}: left out {left.outside:,} given tiles that hang over its edge, and {left.double:,} that were given twice"
            )
        row.describe(tiling)
        candidates = int(sum(row.__dict__[name] for name in ("kept", "empty", "damaged")))
        row.outcome, row.message = (PENDING, "") if candidates else (NO_TISSUE, "")
        if candidates:
            new[slide] = candidates
        else:
            say(f"no tissue found on {row.path}")
    if overruled > MOST_SAID:
        say(f"… and what {overruled - MOST_SAID} more slides say is overruled")

    # 2. Decide which tiles go into which shard, once, and write it down before the first is cut.
    parts = _failed_parts(out, plan, asked) + [TileRange(slide, 0, new[slide]) for slide in sorted(new)]
    plan += plan_shards(parts, config.tiles_per_shard, config.name + state, first_number=len(plan))
    save_rows(out, rows, state)  # before the plan: what is planned isn't surveyed again
    save_plan(out, made, plan, state)

    # 3. Cut them. A shard is published whole or not at all, and remembered by being there.
    todo = [shard for shard in plan if not is_published(out, shard.name)]
    cut = partial(_cut, out=out, sources={slide: str(path) for path, slide in names.items()})
    failed: dict[str, str] = {}
    if todo:
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
    else:
        say("no new tiles to cut")

    # 4. Write down what came of it.
    published = [shard for shard in plan if is_published(out, shard.name)]
    _record_rejected(out, published, rows)
    for shard in published:
        for piece in shard.parts:
            rows[piece.slide].outcome = TILED if rows[piece.slide].kept else NO_TISSUE
            rows[piece.slide].message = ""
    for slide, message in failed.items():
        rows[slide].outcome, rows[slide].message = FAILED, message
    if part is None:
        merge_records(out, [shard.name for shard in published], made)
    save_rows(out, rows, state)
    _summary(out, rows, asked, part)
    if asked and not any(rows[slide].outcome == TILED for slide in asked):
        raise Fault(
            f"none of the {len(asked)} slides gave a tile; the reasons are above and in {out}/slides{state}.csv"
        )


def _cut(shard: Shard, out: Path, sources: dict[str, str]) -> Any:
    return write_shard(out, shard, sources)


def _failed_parts(out: Path, plan: list[Shard], asked: set[str]) -> list[TileRange]:
    """Parts of slides that failed in a shard published without them, and that no later shard has taken on."""
    waiting: dict[TileRange, None] = {}
    for shard in plan:
        failed = set(read_shard_facts(out, shard.name)["failed"]) if is_published(out, shard.name) else set()
        for part in shard.parts:
            if part.slide in failed and part.slide in asked:
                waiting[part] = None
            else:
                waiting.pop(part, None)
    return list(waiting)


def _record_rejected(out: Path, shards: list[Shard], rows: dict[str, SlideRow]) -> None:
    """Move tiles that turned out empty or damaged from kept to their verdict, in the slides' h5 and rows."""
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


def _hold_to_mpp(
    out: Path, plan: list[Shard], rows: dict[str, SlideRow], names: dict[Path, str], slides_mpp: SlidesMpp
) -> None:
    """Where an earlier run took a slide for one of other µm per pixel than the user says now: look at it again if it
    gave no tile; raises Fault if it is cut."""
    planned = {part.slide for shard in plan for part in shard.parts}
    for path, slide in names.items():
        looked_at = slide in planned or (slide in rows and rows[slide].outcome == NO_TISSUE)
        if (mpp := slides_mpp.of(path)) is None or not looked_at:
            continue
        then = read_tiling(coordinates_path(out, slide)).grid.mpp_level0
        if abs(then / mpp - 1) <= SAME_MPP:
            continue
        if slide in planned:
            raise Fault(
                f"{path} was cut as one of {then:.4g} µm per pixel, and slides_mpp= says {mpp:g} now: choose another out="
            )
        rows[slide].outcome = PENDING


def _report_renamed(names: dict[Path, str]) -> None:
    renamed = [(path, slide) for path, slide in names.items() if slide != path.stem]
    for path, slide in renamed[:10]:
        say(f"called {slide}: {path}")
    if len(renamed) > 10:
        say(f"… and {len(renamed) - 10} more slides under another name than their file's; slides.csv has them all")


def counted_as(number: int, noun: str) -> str:
    """``1 shard``, ``2 shards``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def holdings(index: ShardIndex) -> str:
    """``212 tiles of 10 slides in 2 shards``."""
    parts = (
        counted_as(len(index), "tile"),
        counted_as(len(index.slides), "slide"),
        counted_as(len(index.files), "shard"),
    )
    return "{} of {} in {}".format(*parts)


def _summary(out: Path, rows: dict[str, SlideRow], asked: set[str], part: JobPart | None) -> None:
    """A table of what came of the slides that were asked for, and what comes next."""
    chosen = [rows[slide] for slide in sorted(asked)]
    say("")
    if 0 < len(chosen) <= 40:
        width = max(len(row.slide) for row in chosen)
        columns = ("kept", "background", "pen", "empty", "damaged")
        say(f"{'slide':<{width}}  {'outcome':<9}  {'µm/px':<6}" + "".join(f"{name:>12}" for name in columns))
        for row in chosen:
            mpp = f"{row.mpp:.4g}" if row.mpp else ""
            numbers = "".join(f"{getattr(row, name):>12,}" for name in columns)
            say(f"{row.slide:<{width}}  {row.outcome:<9}  {mpp:<6}{numbers}")
        say("")
    outcomes = Counter(row.outcome for row in chosen)
    counted = ", ".join(f"{outcomes[name]} {name}" for name in (TILED, NO_TISSUE, FAILED) if outcomes[name])
    say(f"{counted_as(len(chosen), 'slide')}: {counted or 'nothing to do'}")
    if outcomes[FAILED]:
        say(
            f"why they failed: {out}/slides{part.state if part else ''}.csv; running the same command again retries them"
        )
    if part is not None:
        say(f"{part} is done; when all are: pretrain shards index shards={out}")
    elif (out / "index.npz").exists() and any(out.glob("*.tar")):
        index = ShardIndex.open(out)
        size = sum(index.meta["sizes"]) / 1e6
        say(f"{out}: {holdings(index)} ({size:,.1f} MB)")
        say(f"look at them: pretrain inspect shards={out} out=inspect")
