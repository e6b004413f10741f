"""How fast, how long, at what price, and what a node must read and decode: from a step's time."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from data.tiles.crops import FurtherViews
from data.tiles.source import TileSource
from pretrain.plan.batches import SupposedSlides
from pretrain.plan.estimate import Estimate
from pretrain.plan.step_time import StepTime
from pretrain.settings.plugins import locate_class
from pretrain.settings.ranges import within

MEASURED_CROPS = 2 * 224**2 + 8 * 98**2  # pixels of the crops that `Input.crops_ms` was measured on
MEASURED_TILE = 256**2
MEASURED_SLIDE = 8089 * 1536


@dataclass
class Input:
    """``input:`` in ``configs/plan.yaml``: what reading costs one core."""

    tile_size: Annotated[int, within(least=1)]
    tile_kb: Annotated[float, within(least=0)]
    decode_ms: Annotated[float, within(least=0)]
    read_ms: Annotated[float, within(least=0)]
    crops_ms: Annotated[float, within(least=0)]
    slide_ms: Annotated[float, within(least=0)]


@dataclass
class Pace:
    """Of the whole run, but for what is of a node."""

    unit: str  # tiles or slides
    step_seconds: float
    per_second: float
    hours: float
    evaluation_hours: float  # of these, judging itself
    gpu_hours: float
    dollars: float
    megabytes_per_second: float  # that a node reads
    cores: float  # that a node needs to decode and cut


def pace(
    found: Estimate,
    *,
    step: StepTime,
    dollars_per_hour: float,
    steps: int,
    nodes: int,
    processes_per_node: int,
    sample: tuple[float, float],
    evaluation: float = 0.0,
) -> Pace:
    """``found``: a process's step, and ``step`` its time; ``sample``: MB and core-seconds of a tile or slide, of all
    processes that read it; ``evaluation``: a process's operations of judging, all through the run, which take what as
    many of a step do."""
    processes = nodes * processes_per_node
    of_node = found.samples * processes_per_node / step.seconds
    evaluating = evaluation / sum(found.flops.values()) * step.computing / 3600
    hours = steps * step.seconds / 3600 + evaluating
    gpu_hours = hours * processes
    megabytes, seconds = sample
    return Pace(
        "",
        step.seconds,
        found.samples * processes / step.seconds,
        hours,
        evaluating,
        gpu_hours,
        gpu_hours * dollars_per_hour,
        of_node * megabytes,
        of_node * seconds,
    )


def tile_cost(data: Any, further: Sequence[FurtherViews], cost: Input) -> tuple[float, float]:
    """MB and core-seconds of a tile: decoded from a shard, or read from its slide. ``further``: views beside global and
    local ones."""
    crops = data.crops
    pixels = crops.global_count * crops.global_size**2 + crops.local_count * crops.local_size**2
    pixels += sum(views.count * views.size**2 for views in further)
    tile = cost.tile_size**2 / MEASURED_TILE
    source: type[TileSource] = locate_class(data["_target_"], TileSource)
    got = cost.read_ms if source.reads_slides else cost.decode_ms
    return cost.tile_kb * tile / 1000, (got * tile + cost.crops_ms * pixels / MEASURED_CROPS) / 1000


def slide_cost(slides: SupposedSlides, tiles: int, cost: Input) -> tuple[float, float]:
    """MB (float16) and core-seconds of so many ``tiles`` of a slide, those that are read of it."""
    numbers = tiles * slides.width
    return 2 * numbers / 1e6, cost.slide_ms * numbers / MEASURED_SLIDE / 1000
