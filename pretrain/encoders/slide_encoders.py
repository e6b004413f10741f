"""A frozen slide encoder from a slide run, one of its checkpoints, or a released ``slide_encoder.pth``."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn

from data.embeddings.store import EmbeddingStore
from data.fault import Fault
from data.json_files import read_object
from models.longnet import LongNet
from models.slide_network import SlideNetwork
from pretrain.encoders.frozen import device_of, fingerprint, freeze
from pretrain.encoders.run_checkpoint import STUDENT, TEACHER, find_checkpoint
from pretrain.encoders.weight_files import read_file
from pretrain.run import checkpoints
from pretrain.settings.any_machine import on_any_machine
from pretrain.settings.config_files import CONFIGS
from pretrain.settings.plugins import build

RELEASED = {(768, 12), (1024, 24), (1536, 12)}  # width and depth of the published configurations, all with 16 heads
TILE_ENCODER = "tile_encoder.json"  # in a slide run's folder: whose embeddings it was trained on


@dataclass(frozen=True)
class SlideEncoder:
    """A frozen slide network; ``tile_encoder_hash`` is that of the tile encoder whose embeddings it takes, where it is
    known."""

    network: SlideNetwork
    name: str
    hash: str
    tile_encoder_hash: str | None
    notes: list[str]  # what is worth saying about it
    device: torch.device

    def require_fits(self, store: EmbeddingStore) -> None:
        """Raise Fault unless ``store`` holds embeddings of the tile encoder that this one was trained on."""
        if self.tile_encoder_hash not in (None, store.encoder_hash):
            raise Fault(
                f"{self.name} was trained on embeddings of another tile encoder ({self.tile_encoder_hash}) than"
                f" {store.folder} holds ({store.encoder}, {store.encoder_hash}): embed the slides with that one."
            )
        if self.network.input_width != store.width:
            raise Fault(
                f"{self.name} takes {self.network.input_width}-wide embeddings, and {store.folder} holds"
                f" {store.width}-wide ones."
            )


def load_slide_encoder(checkpoint: str, device: str = "", plugins: Collection[str] = ()) -> SlideEncoder:
    """The slide encoder that ``checkpoint`` names, on ``device`` (a GPU where there is one); ``plugins`` are the
    packages whose classes a run may name beside ours. Raises Fault where there is none."""
    place = device_of(device)
    path = Path(checkpoint)
    if (path / "slide_encoder.pth").is_file():
        path = path / "slide_encoder.pth"
    if path.is_file():
        return _released(path, place)
    if not path.is_dir():
        raise Fault(
            f"there is no slide encoder at {path}: give a slide run, one of its checkpoints, or a slide_encoder.pth."
        )
    found = find_checkpoint(path, plugins)
    settings, data = found.config.get("model") or {}, found.config.get("data") or {}
    weights = checkpoints.read_network(found.folder, TEACHER, STUDENT)
    if "patch_embed.proj.weight" not in weights or "embeddings" not in data:
        raise Fault(f"{found.run} is not a slide run: give a run of 'pretrain slide'.")
    network = build(on_any_machine(settings), weights["patch_embed.proj.weight"].shape[1], allowed=found.plugins)
    if "mask_token" not in network.state_dict():
        weights.pop("mask_token", None)  # a LongNet has one where its objective asks for it, and here nothing is hidden
    try:
        network.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise Fault(f"{found.folder} doesn't fit the model in {found.run}/config.yaml ({error})") from error
    notes, cells = [], data.get("field_cells", 0)
    if cells:
        notes.append(
            f"it was trained on fields of {cells} × {cells} tiles, and whole slides may be larger than any it saw"
        )
    trained_on = found.run / TILE_ENCODER
    tile_hash = None
    if trained_on.is_file():
        way_out = "put a copy back, or delete it, and nobody is held to the tile encoder any more"
        tile_hash = read_object(trained_on, {"encoder_hash"}, way_out)["encoder_hash"]
    name = f"{found.run.resolve().name} ({found.folder.name})"
    return _frozen(network, name, tile_hash, notes, place)


def _released(path: Path, device: torch.device) -> SlideEncoder:
    """A file in the released format, whose sizes are read off its tensors and whose heads and segments are the
    published ones."""
    try:
        state: dict[str, Any] = read_file(path)["model"]
        input_width, width = state["patch_embed.proj.weight"].shape[1], state["cls_token"].shape[-1]
        depth = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("encoder.layers."))
        hidden = state["encoder.layers.0.ffn.fc1.weight"].shape[0]
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        why = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise Fault(f"{path} is no released slide encoder ({why}): give one, or a slide run.") from error
    if (width, depth) not in RELEASED:
        raise Fault(
            f"{path} has width {width} and {depth} layers, which is no published size, so its heads and segments are"
            " not known: give the run that it was exported from."
        )
    settings = OmegaConf.to_container(OmegaConf.load(CONFIGS / "model" / "longnet.yaml"))
    assert isinstance(settings, dict)
    sizes = {"width": width, "depth": depth, "heads": 16, "feed_forward_width": hidden}
    network = build({str(key): value for key, value in settings.items()} | sizes, input_width)
    assert isinstance(network, LongNet)
    try:
        notes = network.load_released(path)
    except ValueError as error:
        raise Fault(str(error)) from error
    return _frozen(network, path.stem, None, [notes], device)


def _frozen(
    network: nn.Module, name: str, tile_hash: str | None, notes: list[str], device: torch.device
) -> SlideEncoder:
    if not isinstance(network, SlideNetwork):
        raise Fault(
            f"{name} is a {type(network).__name__}, which embeds no slides: derive it from"
            " models.slide_network.SlideNetwork."
        )
    freeze(network, device)
    return SlideEncoder(network, name, fingerprint(network), tile_hash, notes, device)
