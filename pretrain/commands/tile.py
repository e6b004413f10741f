"""Pretrain a tile encoder on tile shards by self-distillation (DINOv2 and its relatives).

Give a run's folder and one or more folders of shards; a recipe sets network, objective, data and schedule:

    pretrain tile run=runs/first data.shards=shards
    pretrain tile run=runs/vitl recipe=dinov2_vitl16_short data.shards=shards trainer.devices=8
    pretrain tile run=runs/first data.shards=shards trainer.devices=2 trainer.accelerator=cpu
    pretrain tile run=runs/more data.shards=shards init=runs/first optim.frozen_backbone_steps=100

The folder then holds config.yaml (every setting, resolved), provenance.json, metrics.jsonl (a line a step),
checkpoints/ and samples/ (the crops the network saw). Stopped at any moment, by any means, the same command resumes
from the newest checkpoint, on the same data in the same order, also on another number of processes.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from models.allowed import ON_DISK, Agreements, within
from pretrain.objectives.interface import Objective
from pretrain.run.folder import held
from pretrain.run.preemption import ending_when_asked
from pretrain.run.record import WandbSettings
from pretrain.settings import plugins
from pretrain.settings.plugins import Plugin
from pretrain.training.fit import fit
from pretrain.training.optimisation import Optim
from pretrain.training.tile_stage import TileData, TileTraining, TileWatch, check_crop_patches
from pretrain.training.trainer_settings import RESUME, TrainerSettings, require_devices
from pretrain.training.trial import run_or_trial


@dataclass
class Config:
    """Types of the settings; values and explanations are in ``configs/``."""

    run: Annotated[str, ON_DISK]
    seed: Annotated[int, within(least=0)]
    allow_changes: bool
    resume: Annotated[str, RESUME]
    init: Annotated[str | None, ON_DISK]
    allow_plugins: list[str]
    model: Plugin
    objective: Annotated[Plugin, Objective]
    data: TileData
    optim: Optim
    trainer: TrainerSettings
    watch: TileWatch
    wandb: WandbSettings

    agreements: ClassVar[Agreements] = {
        (f"data.crops.{kind}_size", f"data.crops.{kind}_count", "model.patch_size"): check_crop_patches
        for kind in ("global", "local")
    }


def run(config: Config) -> None:
    """Train, or say that the run is done."""
    require_devices(config.trainer)

    def objective():  # type: ignore[no-untyped-def]
        return plugins.build(config.objective, lambda: plugins.build_empty(config.model))

    with run_or_trial(config) as folder, ending_when_asked(folder), held(folder) as lease:
        fit(TileTraining(folder, config, objective), lease)
