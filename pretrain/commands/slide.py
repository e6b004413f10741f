"""Pretrain a slide encoder on slide embeddings: a masked autoencoder over frozen tile embeddings, or self-distillation.

    pretrain slide run=runs/slide data.embeddings=embeddings
    pretrain slide run=runs/slide recipe=gigapath_slide data.embeddings=embeddings trainer.devices=8
    pretrain slide run=runs/slide model=slide_vit data.embeddings=embeddings
    pretrain slide run=runs/slide recipe=moozy_slide data.embeddings=embeddings

The encoder is a LongNet, or a ViT whose attention falls with distance. objective=slide_ibot compares crops of a slide
in place of hiding tiles, and judges itself by how often two crops of a slide find each other.

The masked autoencoder judges itself at every checkpoint on held-out slides: masked R² beside three baselines that need
no learning (the data set's mean, the slide's mean, the nearest visible neighbours), how much worse it gets when tiles
are shuffled, and the effective rank of slide embeddings. Where slides are few, data.field_cells cuts them into
overlapping fields.

The folder is like that of a tile run, and the same command resumes it.
"""

from dataclasses import dataclass
from typing import Annotated

from data.fault import Fault
from pretrain.objectives.interface import SlideObjective
from pretrain.settings import plugins
from pretrain.settings.composition import of_the_command_line
from pretrain.settings.plugins import Plugin
from pretrain.training.run_config import RunConfig, train
from pretrain.training.slide_stage import SlideData, SlideTraining, SlideWatch, open_store, require_cells_seen
from pretrain.training.trainer_settings import require_devices


@dataclass
class Config(RunConfig):
    """Types of the settings; values and explanations are in ``configs/``."""

    objective: Annotated[Plugin, SlideObjective]
    data: SlideData
    watch: SlideWatch


def run(config: Config) -> None:
    """Train, or say that the run is done. Raises Fault for compiled blocks, of which every step would need others."""
    if config.trainer.compile:
        with of_the_command_line():
            raise Fault(
                "trainer.compile=true is for 'pretrain tile': slides have other lengths at every step, and each would"
                " be compiled anew; leave it out."
            )
    require_devices(config.trainer)
    require_cells_seen(config)
    store = open_store(config.data)

    def objective():  # type: ignore[no-untyped-def]
        return plugins.build(config.objective, lambda: plugins.build_empty(config.model, store.width))

    train(config, lambda folder: SlideTraining(folder, config, objective, store))
