"""Check a machine, a cluster and the data before a job wastes hours on them. One line each: ok, warn, or FAIL with what
to do.

It takes the settings of 'pretrain tile' and looks at what such a run would need here; 'pretrain doctor slide' takes
those of 'pretrain slide', and 'pretrain doctor machine' looks at no run at all:

    pretrain doctor
    pretrain doctor recipe=midnight data.shards=shards run=runs/midnight trainer.devices=8 tiles_per_second=600
    pretrain doctor slides="slides/a.svs slides/b.mrxs" partition=gpu

Looked at: versions, accelerators, cores for each process, on GPUs what they multiply and at which clocks, whether they
reach each other, and how torch gives out their memory; an all-reduce of this machine's processes, writing and renaming
in the run's folder (under srun, that all nodes see it), openslide, the tiles against their index, the run's lanes and processes, the rate
at which one process reads and decodes them, W&B, SLURM, disk room for checkpoints. Exit code 1 where anything fails.
Under srun one process of each node speaks, with the node's name. A process of each node adds up a tensor with the
others'.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from omegaconf import OmegaConf

from data.tiles.source import TileSource
from data.tiles.stream import Stream
from models.allowed import ON_DISK, within
from pretrain.commands import tile
from pretrain.doctor import machine, own_objective, report, run_settings, tiles
from pretrain.encoders import init
from pretrain.objectives.interface import Objective
from pretrain.settings import plugins
from pretrain.training.tile_settings import TileData


@dataclass
class Config(tile.Config):
    """Types of the settings; values and explanations are in ``configs/``. ``data`` is that of 'pretrain tile', but may
    lack shards."""

    data: Annotated[Any, TileData]  # whose shards may be missing
    slides: Annotated[list[str], ON_DISK]
    tiles_per_second: Annotated[float | None, within(above=0)]
    partition: str | None


def run(config: Config) -> None:
    """Check, print, and end with exit code 1 where anything fails."""
    place, trainer, data = Path(config.run), config.trainer, config.data
    as_tile = {field.name: getattr(config, field.name) for field in fields(tile.Config)}
    with_data = not plugins.lacking(data, TileSource) and data.get("shards") != []

    def objective() -> Objective:
        return plugins.build(config.objective, lambda: plugins.build(config.model))  # type: ignore[no-any-return]

    def whole() -> tile.Config:
        return tile.Config(**as_tile | {"data": typed_data(data)})

    opened: list[tuple[TileSource, Stream]] = []  # of what is built, as opening says how much is taken of the tiles

    def build(run: tile.Config) -> None:
        from pretrain.training.tile_stage import TileTraining

        stage = TileTraining(place, run, objective)
        opened.append((stage.tiles, stage.stream))
        if run.init is not None:
            init.find_encoder(run.init)

    checks = report.of_processes(trainer, data["threads"]) + report.of_folder(place)
    checks.append(lambda: machine.slides([Path(slide) for slide in config.slides]))
    checks.append(lambda: run_settings.check_settings(place, config, whole if with_data else None, build))
    checks.append(lambda: own_objective.check_own_objective(config))
    if with_data:
        processes, patch = trainer.devices * trainer.nodes, config.model["patch_size"]
        checks.append(
            lambda: tiles.check_tiles(
                data,
                processes,
                trainer.accumulate,
                patch,
                config.tiles_per_second,
                config.seed,
                trainer.devices,
                next(iter(opened), None),
            )
        )
    report.say_findings(
        checks + report.run_checks(place, objective, config.optim.steps, trainer, config.wandb, config.partition)
    )


def typed_data(data: dict[str, Any]) -> TileData:
    """``data`` as 'pretrain tile' types it."""
    schema = plugins.schema_beside(TileData, data["_target_"])
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), data))  # type: ignore[return-value]
