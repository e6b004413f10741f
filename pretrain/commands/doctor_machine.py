"""As 'pretrain doctor', for no run in particular: is this machine fit for 'pretrain shard', 'pretrain embed' and the
others?

    pretrain doctor machine
    pretrain doctor machine run=embeddings slides="slides/a.svs slides/b.mrxs" partition=gpu

Looked at: versions, accelerators, cores, on a GPU what it multiplies and at which clocks, writing and renaming in a
folder, openslide, SLURM.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from models.allowed import ON_DISK
from pretrain.doctor import machine, report, services


@dataclass
class Config:
    """Types of the settings; values and explanations are in ``configs/doctor_machine.yaml``."""

    run: Annotated[str, ON_DISK]
    slides: Annotated[list[str], ON_DISK]
    partition: str | None


def run(config: Config) -> None:
    """Check, print, and end with exit code 1 where anything fails."""
    report.say_findings(
        [
            machine.versions,
            *report.of_machine("auto", 1, "float32", threads=None),
            *report.of_folder(Path(config.run)),
            lambda: machine.slides([Path(slide) for slide in config.slides]),
            lambda: services.slurm(os.environ, config.partition, 1, 1),
        ]
    )
