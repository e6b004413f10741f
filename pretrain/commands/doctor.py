"""Check a machine, a cluster and the data before a job wastes hours on them. One line each: ok, warn, or FAIL with what to do.

It takes the settings of 'pretrain tile' and looks at what such a run would need here:

    pretrain doctor
    pretrain doctor recipe=midnight data.shards=shards run=runs/midnight trainer.devices=8 tiles_per_second=600
    pretrain doctor slides="slides/a.svs slides/b.mrxs" partition=gpu

Looked at: versions, accelerators, an all-reduce of this machine's processes, writing and renaming in the run's folder (under
srun, that all nodes see it), openslide, the tiles against their index, the run's lanes and processes, the rate at which
one process reads and decodes them, W&B, SLURM, disk room for checkpoints. Exit code 1 where anything fails. Under srun one
process of each node speaks, with the node's name. Processes of different nodes are not made to talk to each other.
"""

import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.fault import Fault
from pretrain.commands import tile


@dataclass
class Config(tile.Config):
    """Types of the settings; values and explanations are in ``configs/``. ``data`` is that of 'pretrain tile', but may lack shards."""

    data: Any
    slides: list[str]
    tiles_per_second: float | None
    partition: str | None


def run(config: Config) -> None:
    """Check, print, and end with exit code 1 where anything fails."""
    if os.environ.get("SLURM_LOCALID", "0") != "0":
        return  # another process of this node speaks
    host = f"{platform.node()}: " if "SLURM_STEP_ID" in os.environ else ""
    worst = False
    for check in checks(config):
        for finding in check():
            print(f"{host}{finding.status:<5} {finding.about:<13} {finding.says}", flush=True)
            worst |= finding.status == "FAIL"
    if worst:
        sys.stdout.flush()
        raise Fault(f"{host}what says FAIL above keeps a job from running well.")


def checks(config: Config) -> list[Callable[[], list[Any]]]:
    """What is looked at, in the order in which it is said."""
    from pretrain import plugins
    from pretrain.doctor import folder, machine, services, tiles
    from pretrain.record import logged_in

    place, trainer = Path(config.run), config.trainer
    gpu = machine.on_gpu(trainer.accelerator)
    found = [
        machine.versions,
        lambda: machine.accelerators(trainer.accelerator, trainer.devices, trainer.precision),
        lambda: machine.all_reduce(max(2, trainer.devices) if not gpu else trainer.devices, gpu),
        lambda: folder.write_and_rename(place),
        lambda: folder.seen_by_all_nodes(place, os.environ),
        lambda: machine.slides([Path(slide) for slide in config.slides]),
    ]
    if config.data.get("shards") or "shards" not in config.data:
        processes, patch = trainer.devices * trainer.nodes, config.model["patch_size"]
        found.append(lambda: tiles.check(config.data, processes, trainer.accumulate, patch, config.tiles_per_second, config.seed))  # fmt: skip

    def room() -> list[Any]:
        objective = folder.built(lambda: plugins.build(config.objective, lambda: plugins.build(config.model)))
        return folder.room(place, folder.checkpoint_bytes(objective), trainer.keep_checkpoints, config.optim.steps, trainer.checkpoint_every)  # fmt: skip

    found += [
        room,
        lambda: services.wandb(config.wandb.mode, logged_in),
        lambda: services.slurm(os.environ, config.partition, trainer.devices, trainer.nodes),
    ]
    return found
