"""A checkpoint of a run and the configuration that made it: found, and its teacher taken out of it."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data.fault import Fault
from pretrain.encoders.preprocessing import Preprocessing
from pretrain.encoders.tile_encoder import TileEncoder, class_token, initialised
from pretrain.run import checkpoints
from pretrain.run.folder import read_config
from pretrain.run.progress import say
from pretrain.settings.any_machine import on_any_machine
from pretrain.settings.plugins import build

TEACHER, STUDENT = "teacher.encoder.", "encoder."  # MAE's runs have one network and no teacher
RUN_CONFIG = "config.yaml"


@dataclass(frozen=True)
class RunCheckpoint:
    """A checkpoint of a tile run and the resolved configuration that made it."""

    folder: Path
    run: Path
    config: dict[str, Any]
    plugins: Collection[str]  # whose classes it may name beside ours


def find_checkpoint(folder: Path, plugins: Collection[str] = ()) -> RunCheckpoint:
    """The checkpoint that a run's folder (its newest) or a checkpoint folder stands for, with the run's configuration,
    which may name classes of ours and of ``plugins``.

    A run's newest checkpoint that is damaged is passed over, and said. Raises `Fault` where there is none that is
    whole.
    """
    folder = checkpoints.resolved(folder)
    if (folder / RUN_CONFIG).is_file():
        newest, whole = checkpoints.newest(folder), checkpoints.newest_whole(folder)
        if newest is None:
            raise Fault(f"{folder} has no checkpoint yet: run the same training command again until it has saved one")
        if whole is None:
            raise Fault(f"{folder} has no whole checkpoint: {checkpoints.damage(newest)}")
        if whole != newest:
            say(f"{checkpoints.damage(newest)}, so the one before it is taken: {whole}")
        return RunCheckpoint(whole, folder, read_config(folder), plugins)
    for run in folder.resolve().parents[:2]:
        if (run / RUN_CONFIG).is_file():
            if wrong := checkpoints.damage(folder):
                raise Fault(f"{wrong}: give another checkpoint of {run}{checkpoints.whole_before(folder)}.")
            return RunCheckpoint(folder, run, read_config(run), plugins)
    if (folder / "config.json").is_file():
        raise Fault(f"{folder} is an exported encoder, and here a run is asked for: give the one it was made from.")
    inside = sorted(path.parent.name for path in folder.glob(f"*/{RUN_CONFIG}"))
    hint = (
        f": did you mean {folder / inside[0]}?"
        if inside
        else ": give a run's folder, a checkpoint, or an exported folder"
    )
    raise Fault(f"{folder} holds neither a run (config.yaml) nor an exported encoder (config.json){hint}")


def require_tile_run(found: RunCheckpoint) -> None:
    """Raise Fault for the checkpoint of another kind of run."""
    settings, data = found.config.get("model"), found.config.get("data") or {}
    if not isinstance(settings, dict) or not {"mean", "std", "crops"} <= data.keys():
        if "embeddings" in data:
            raise Fault(
                f"{found.run} is a run of 'pretrain slide': 'pretrain probe stage=slide' judges it by labels of slides, and"
                " 'pretrain embed stage=slide' embeds with it, and 'pretrain export format=gigapath' hands it on; here give a run"
                " of 'pretrain tile'"
            )
        raise Fault(
            f"{found.run} is not a tile run (its {RUN_CONFIG} lacks model, or data.mean, std or crops): give a run of"
            " 'pretrain tile'"
        )


def teacher(found: RunCheckpoint) -> tuple[nn.Module, Preprocessing]:
    """The teacher's network with its weights (MAE: the only one), and the preprocessing that its training used. Raises
    Fault where it is no tile run's."""
    require_tile_run(found)
    weights = checkpoints.read_network(found.folder, TEACHER, STUDENT)
    network = untrained(found)
    try:
        network.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise Fault(f"{found.folder} doesn't fit the model in {found.run / RUN_CONFIG} ({error})") from error
    data, size = found.config["data"], evaluation_size(found.config)
    return network, Preprocessing(size, size, tuple(data["mean"]), tuple(data["std"]))


def untrained(found: RunCheckpoint) -> nn.Module:
    """A tile run's network, with the attention that runs everywhere: a single crop size needs no other."""
    return build(on_any_machine(found.config["model"]), allowed=found.plugins)


def run_encoder(found: RunCheckpoint, device: torch.device, precision: str) -> TileEncoder:
    """The teacher of a checkpoint as a `TileEncoder`."""
    network, preprocessing = teacher(found)
    name, width = f"{found.run.resolve().name} ({found.folder.name})", int(found.config["model"]["width"])
    random = initialised(lambda: untrained(found))
    return TileEncoder(network, class_token, preprocessing, name, str(found.folder), width, device, precision, random)


def evaluation_size(config: dict[str, Any]) -> int:
    """Pixels a side that a tile run's encoder is used at: those of its global crops, the teacher's only input.

    The model's ``image_size`` may be another: it is the grid that position embeddings are stored at.
    """
    return int(config["data"]["crops"]["global_size"])
