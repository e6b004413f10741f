"""Say, before a run is started, whether it fits, how long it takes, what it costs and what it must read. Needs no GPU.

Give a run's own settings, those of 'pretrain tile' or 'pretrain slide', and the machines:

    pretrain plan recipe=midnight launch.nodes=4 launch.gpus_per_node=8 hardware=h100_80gb
    pretrain plan recipe=midnight trainer.precision=bf16 trainer.activation_checkpointing=full launch.nodes=4
    pretrain plan recipe=gigapath_slide hardware=a100_80gb launch.nodes=8 trainer.precision=bf16 out=plan.json
    pretrain plan published=true

A step of the real objective in the real sharding is rehearsed on tensors that have shapes and no numbers: its
operations are counted by torch's formulas, its memory is followed from one operation to the next, and what it sends to
other processes is read off its collectives. Everything printed is computed, but for two lines of a GPU's memory that
are assumed, and say so; nothing was measured on a GPU. Computed for eager execution: torch.compile changes memory,
mostly to less. Time supposes a share of the peak, which only a run can tell; published runs tell what others got
(published=true). In the tile stage that share covers a GPU's memory and its host too; in the slide stage these are
counted, as operators and bytes. Networks are those of configs/hardware, and yours are given with
hardware.intra_node_gb_s= and hardware.inter_node_gb_s=.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from data.files import require_writable, write_whole
from models.allowed import ON_DISK
from pretrain.plan.batches import SupposedSlides
from pretrain.plan.full_plan import make_plan
from pretrain.plan.published import PublishedRun, implied
from pretrain.plan.table import plan_table, published_table
from pretrain.plan.throughput import Input
from pretrain.settings.hardware import Machine
from pretrain.settings.ranges import within


@dataclass
class Launch:
    """``launch:``, of which a plan needs these two."""

    nodes: Annotated[int, within(least=1)]
    gpus_per_node: Annotated[int | None, within(least=1)]


@dataclass
class Config:
    """Types of the settings; values and explanations are in ``configs/plan.yaml``."""

    launch: Launch
    hardware: Machine
    utilisation: Annotated[float | None, within(above=0, most=1)]
    operator_us: Annotated[float, within(least=0)]
    dollars_per_hour: Annotated[float | None, within(least=0)]
    reserve: Annotated[float, within(least=0, below=1)]
    out: Annotated[str | None, ON_DISK]
    published: bool
    slides: SupposedSlides
    input: Input
    runs: dict[str, PublishedRun]
    settings: list[str]
    config_dirs: list[str]


def run(config: Config) -> None:
    """Print the plan, and write it where ``out`` says."""
    if config.out is not None:
        require_writable(Path(config.out))
    if config.published:
        rows = [implied(name, run, config.slides) for name, run in config.runs.items()]
        report: Any = [asdict(row) for row in rows]
        text = published_table(rows)
    else:
        report = make_plan(config)
        text = plan_table(report)
    print(text)
    if config.out is not None:
        write_whole(Path(config.out), json.dumps({"computed": report}, indent=2))
        print(f"\nwritten to {config.out}")
