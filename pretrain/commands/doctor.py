"""Check a machine, a cluster and the data before a job wastes hours on them. One line each: ok, warn, or FAIL with what to do.

It takes the settings of 'pretrain tile' and looks at what such a run would need here; 'pretrain doctor slide' takes those of
'pretrain slide', and 'pretrain doctor machine' looks at no run at all:

    pretrain doctor
    pretrain doctor recipe=midnight data.shards=shards run=runs/midnight trainer.devices=8 tiles_per_second=600
    pretrain doctor slides="slides/a.svs slides/b.mrxs" partition=gpu

Looked at: versions, accelerators, an all-reduce of this machine's processes, writing and renaming in the run's folder (under
srun, that all nodes see it), openslide, the tiles against their index, the run's lanes and processes, the rate at which
one process reads and decodes them, W&B, SLURM, disk room for checkpoints. Exit code 1 where anything fails. Under srun one
process of each node speaks, with the node's name. Processes of different nodes are not made to talk to each other.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain import plugins
from pretrain.commands import tile
from pretrain.doctor import machine, report, tiles


@dataclass
class Config(tile.Config):
    """Types of the settings; values and explanations are in ``configs/``. ``data`` is that of 'pretrain tile', but may lack shards."""

    data: Any
    slides: list[str]
    tiles_per_second: float | None
    partition: str | None


def run(config: Config) -> None:
    """Check, print, and end with exit code 1 where anything fails."""
    place, trainer, data = Path(config.run), config.trainer, config.data
    checks = report.of_processes(trainer) + report.of_folder(place)
    checks.append(lambda: machine.slides([Path(slide) for slide in config.slides]))
    if data.get("shards") or "shards" not in data:
        processes, patch = trainer.devices * trainer.nodes, config.model["patch_size"]
        checks.append(lambda: tiles.check(data, processes, trainer.accumulate, patch, config.tiles_per_second, config.seed))  # fmt: skip
    report.say(
        checks + report.of_a_run(
            place, lambda: plugins.build(config.objective, lambda: plugins.build(config.model)), config.optim.steps, trainer, config.wandb, config.partition
        )
    )  # fmt: skip
