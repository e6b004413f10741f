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
    pretrain shard slides=/slides out=shards tissue=[otsu,hsv] min_tissue=[0.4,0.6] min_saturated=0.5
    pretrain shard slides=/slides out=shards 'tissue=[otsu,{_target_: my_rules.Pink, least_red: 150}]'
    pretrain shard slides=/slides out=shards coordinates=trident/20x_256px_0px_overlap
    pretrain shard slides=/slides out=shards part=3/40

The last line is one job of an array of forty, each of which takes its share of the slides; 'pretrain shards index
shards=shards' merges what they made. With coordinates= the tiles are those that TRIDENT or CLAM chose, and no tissue is
looked for.

With several tissue rules a tile must satisfy each. A rule of your own, or a trained network, is a class derived from
data.slides.tissue.TissueRule in a file of a folder that --config-dir or PYTHONPATH names.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from data.fault import Fault
from data.files import refused
from data.shards.folder import NO_TISSUE, TILED, ShardFolder, SlideRow, written_by_one
from data.shards.job_array import JobPart, check_division, known_slides
from data.shards.records import merge_records
from data.shards.writing import TileRange, plan_shards
from data.slides.cutting import JPEG_QUALITY
from data.slides.lists import list_slides
from data.slides.mpp import SlidesMpp
from data.slides.names import name_slides
from data.slides.tiling import TilingSettings
from models.allowed import FILE_STEM, ON_DISK, PATTERN, SHARE, SOME, TILE, within
from pretrain.cutting.summary import say_outcomes, say_renamed
from pretrain.cutting.tiles import cut_shards, failed_parts, record_outcomes
from pretrain.cutting.tissue import find_tissue, hold_to_same_mpp
from pretrain.run.counted import counted_as
from pretrain.run.progress import say
from pretrain.settings.tissue_rules import RULES, chosen_rules


@dataclass
class Config:
    slides: Annotated[list[str], SOME, ON_DISK]
    out: Annotated[str, ON_DISK]
    mpp: Annotated[float, within(above=0)]
    tile_size: Annotated[int, TILE]
    tissue: Annotated[list[Any], SOME, RULES]
    min_tissue: Annotated[list[float] | None, SHARE]
    min_saturated: Annotated[float | None, SHARE]
    slides_mpp: str | None
    patient_pattern: Annotated[str, PATTERN]
    tiles_per_shard: Annotated[int, within(least=1)]
    name: Annotated[str, FILE_STEM]
    coordinates: Annotated[str | None, ON_DISK]
    part: str | None
    workers: Annotated[int | None, within(least=1)]


def run(config: Config) -> None:
    """Cut the slides, or say that it is done. Raises Fault where not one slide gave tiles, and where the disk is
    full."""
    out = Path(config.out)
    paths, slides_mpp = list_slides(config.slides), SlidesMpp.parse(config.slides_mpp)
    if some := slides_mpp.tells_of(paths):
        say(some)
    part = None if config.part is None else JobPart.parse(config.part)
    try:
        with written_by_one(out, part.state if part else ""):
            _shard(config, out, paths, part, slides_mpp)
    except OSError as error:  # what a slide's file does wrong is a Fault already: this is about writing
        raise refused(out, error) from error


def _shard(config: Config, out: Path, paths: list[Path], part: JobPart | None, slides_mpp: SlidesMpp) -> None:
    workers = config.workers or len(os.sched_getaffinity(0))
    rules = chosen_rules(config.tissue, config.min_tissue)
    settings = TilingSettings(config.mpp, config.tile_size, rules, config.min_saturated)
    made = settings.facts() | {"min_saturated": config.min_saturated, "jpeg_quality": JPEG_QUALITY}
    if config.coordinates is not None:
        made |= {"tissue": "given", "min_tissue": None}
    check_division(out, part)
    folder = ShardFolder.take_up(out, made, part.state if part else "")
    names = name_slides(paths, known_slides(out))
    if part is not None:
        names = {path: slide for path, slide in names.items() if part.owns(slide)}
        say(f"{part}: {counted_as(len(names), 'slide')} of {len(paths):,}")
    say_renamed(names)
    hold_to_same_mpp(folder, names, slides_mpp)
    for path, slide in names.items():
        folder.rows.setdefault(slide, SlideRow(slide, str(path))).path = str(path)
    folder.save_rows()
    asked = set(names.values())
    finished = all(folder.rows[slide].outcome in (TILED, NO_TISSUE) for slide in asked)
    merged = part is not None or (out / "index.npz").exists()
    if finished and merged and len(folder.published) == len(folder.plan):
        if part is None:
            merge_records(out, [shard.name for shard in folder.plan], made)
        say_outcomes(folder, asked, part)
        say(f"nothing left to do: all {len(asked)} slides are done")
        return

    coordinates = None if config.coordinates is None else Path(config.coordinates)
    new = find_tissue(folder, names, settings, slides_mpp, config.patient_pattern, coordinates, workers)

    # Which tiles go into which shard is decided once, and written down before the first is cut.
    parts = failed_parts(folder, asked) + [TileRange(slide, 0, new[slide]) for slide in sorted(new)]
    folder.plan += plan_shards(parts, config.tiles_per_shard, config.name + folder.state, first_number=len(folder.plan))
    folder.save_rows()  # before the plan: what is planned isn't surveyed again
    folder.save_plan()

    failed = cut_shards(folder, names, workers)
    record_outcomes(folder, failed)
    if part is None:
        merge_records(out, [shard.name for shard in folder.published], made)
    folder.save_rows()
    say_outcomes(folder, asked, part)
    if asked and not any(folder.rows[slide].outcome == TILED for slide in asked):
        raise Fault(
            f"none of the {len(asked)} slides gave a tile; the reasons are above and in {out}/slides{folder.state}.csv"
        )
