"""What the runs of both stages are told, and how a run of either begins and ends."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from models.allowed import ON_DISK, within
from pretrain.run.folder import held, noting_how_it_ended
from pretrain.run.preemption import ending_when_asked
from pretrain.run.wandb_settings import WandbSettings
from pretrain.settings.plugins import Plugin
from pretrain.training.optimisation import Optim
from pretrain.training.trainer_settings import RESUME, TrainerSettings
from pretrain.training.trial import run_or_trial
from pretrain.training.watching import Watch

if TYPE_CHECKING:
    from pretrain.training.module import Training


@dataclass
class RunConfig:
    """Types of the settings that both stages have; of objective, data and watch each says more. Values and explanations
    are in ``configs/``."""

    run: Annotated[str, ON_DISK]
    seed: Annotated[int, within(least=0)]
    allow_changes: bool
    resume: Annotated[str, RESUME]
    model: Plugin
    objective: Plugin
    data: Any
    optim: Optim
    trainer: TrainerSettings
    watch: Watch
    wandb: WandbSettings


def train(config: RunConfig, training_in: "Callable[[Path], Training]") -> None:
    """Train in the run's folder, or say that the run is done; ``training_in`` makes the stage's training of a folder,
    once it is this job's alone."""
    from pretrain.training.fit import fit  # brings Lightning with it: settings are looked at before

    with run_or_trial(config) as folder, ending_when_asked(folder), held(folder) as lease, noting_how_it_ended(folder):
        fit(training_in(folder), lease)
