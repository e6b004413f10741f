"""Pretrain a slide encoder on slide embeddings: a masked autoencoder over frozen tile embeddings, or self-distillation.

    pretrain slide run=runs/slide data.embeddings=embeddings
    pretrain slide run=runs/slide recipe=gigapath_slide data.embeddings=embeddings trainer.devices=8
    pretrain slide run=runs/slide model=slide_vit data.embeddings=embeddings
    pretrain slide run=runs/slide objective=slide_context data.embeddings=embeddings data.further=[embeddings_of_another]
    pretrain slide run=runs/slide recipe=moozy_slide data.embeddings=embeddings

The encoder is a LongNet, or a ViT whose attention falls with distance. objective=slide_pairs trains the slide's pooled
vector by pairs of tiles, objective=slide_context takes stores of several tile encoders, objective=slide_ibot compares
crops of a slide in place of hiding tiles, and judges itself by how often two crops of a slide find each other.

The masked autoencoder judges itself at every checkpoint on held-out slides: masked R² beside three baselines that need
no learning (the data set's mean, the slide's mean, the nearest visible neighbours), how much worse it gets when tiles
are shuffled, and the effective rank of slide embeddings. Where slides are few, data.field_cells cuts them into
overlapping fields.

The folder is like that of a tile run, and the same command resumes it.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from models.allowed import Agreements
from pretrain.objectives.interface import SlideObjective
from pretrain.settings import plugins
from pretrain.settings.plugins import Plugin
from pretrain.training.run_config import RunConfig, train
from pretrain.training.slide_settings import (
    SlideData,
    SlideWatch,
    build_slide_network,
    open_further,
    open_store,
    require_cells_seen,
    require_judged,
    require_network_shared,
    require_objective_shared,
    require_read,
    require_uncompiled,
    require_within_fields,
)
from pretrain.training.trainer_settings import require_devices


@dataclass
class Config(RunConfig):
    """Types of the settings; values and explanations are in ``configs/``."""

    objective: Annotated[Plugin, SlideObjective]
    data: SlideData
    watch: SlideWatch

    agreements: ClassVar[Agreements] = {
        ("data.further", "objective._target_"): require_read,
        ("data.field_cells", "data.crops.global_side", "objective._target_"): require_within_fields,
        (
            "data.field_cells",
            "data.crops.local_side",
            "objective._target_",
            "data.crops.local_count",
        ): require_within_fields,
        ("watch.patience", "data.validation_fraction", "watch.slide_labels"): require_judged,
        ("trainer.compile",): require_uncompiled,
        ("data.processes_per_slide", "model._target_"): require_network_shared,
        ("data.processes_per_slide", "objective._target_"): require_objective_shared,
    }


def run(config: Config) -> None:
    """Train, or say that the run is done."""
    require_devices(config.trainer)
    require_cells_seen(config)
    store = open_store(config.data)
    further = open_further(config.data, store)
    widths = [one.width for one in (store, *further)]

    def objective():  # type: ignore[no-untyped-def]
        return plugins.build(config.objective, lambda: build_slide_network(config.model, widths))

    from pretrain.training.slide_stage import SlideTraining  # brings Lightning with it

    train(config, lambda folder: SlideTraining(folder, config, objective, store, further))
