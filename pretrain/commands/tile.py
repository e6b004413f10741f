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

from models.allowed import ON_DISK, Agreements
from pretrain.objectives.interface import Objective
from pretrain.objectives.jepa import check_predictor_in
from pretrain.settings import plugins
from pretrain.settings.plugins import Plugin
from pretrain.training.run_config import RunConfig, train
from pretrain.training.tile_settings import (
    TileData,
    TileWatch,
    check_crop_patches,
    check_further_views,
    check_masked,
    check_view_counts,
)
from pretrain.training.trainer_settings import require_devices


@dataclass
class Config(RunConfig):
    """Types of the settings; values and explanations are in ``configs/``."""

    init: Annotated[str | None, ON_DISK]
    allow_plugins: list[str]
    objective: Annotated[Plugin, Objective]
    data: TileData
    watch: TileWatch

    agreements: ClassVar[Agreements] = {
        (f"data.crops.{kind}_size", f"data.crops.{kind}_count", "model.patch_size"): check_crop_patches
        for kind in ("global", "local")
    } | {
        ("objective._target_", "data.crops.global_count", "data.crops.local_count"): check_view_counts,
        ("objective", "data.crops", "model.patch_size"): check_further_views,
        ("objective", "data.masks.share"): check_masked,
        ("model.width", "objective.predictor_width", "objective.predictor_heads"): check_predictor_in,
    }


def run(config: Config) -> None:
    """Train, or say that the run is done."""
    require_devices(config.trainer)
    from pretrain.training.tile_stage import TileTraining  # brings Lightning with it

    def objective():  # type: ignore[no-untyped-def]
        return plugins.build(config.objective, lambda: plugins.build_empty(config.model))

    train(config, lambda folder: TileTraining(folder, config, objective))
