"""As 'pretrain doctor', for a run of 'pretrain slide', whose settings it takes.

    pretrain doctor slide data.embeddings=embeddings run=runs/slide
    pretrain doctor slide recipe=gigapath_slide data.embeddings=embeddings run=runs/slide trainer.devices=8 slides_per_second=40

In place of tiles it looks at the embeddings: slides against their index, sequences against lanes and processes, and the
rate at which one process reads, cuts and masks them.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

from models.allowed import within
from pretrain.commands import slide
from pretrain.doctor import embeddings, report, run_settings
from pretrain.objectives.interface import Objective, SlideObjective
from pretrain.settings import plugins
from pretrain.training.slide_settings import build_slide_network, open_further, open_store, require_cells_seen


@dataclass
class Config(slide.Config):
    """Types of the settings; values and explanations are in ``configs/``."""

    slides_per_second: Annotated[float | None, within(above=0)]
    partition: str | None


def run(config: Config) -> None:
    """Check, print, and end with exit code 1 where anything fails."""
    place, trainer = Path(config.run), config.trainer
    processes = trainer.devices * trainer.nodes

    def objective() -> Objective:
        require_cells_seen(config)
        store = open_store(config.data)
        widths = [one.width for one in (store, *open_further(config.data, store))]
        return plugins.build(config.objective, lambda: build_slide_network(config.model, widths))  # type: ignore[no-any-return]

    as_slide = slide.Config(**{field.name: getattr(config, field.name) for field in fields(slide.Config)})
    report.say_findings(
        [
            *report.of_processes(trainer, threads=None),
            *report.of_folder(place),
            lambda: run_settings.check_settings(place, as_slide, lambda: as_slide, None),
            lambda: embeddings.check_embeddings(
                config.data,
                plugins.locate_class(config.objective["_target_"], SlideObjective),
                processes,
                trainer.accumulate,
                config.slides_per_second,
                config.seed,
            ),
            *report.run_checks(place, objective, config.optim.steps, trainer, config.wandb, config.partition),
        ]
    )
