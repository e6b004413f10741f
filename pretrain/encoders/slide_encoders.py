"""A frozen slide encoder from a slide run, one of its checkpoints, or a released ``slide_encoder.pth``."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn

from data.embeddings.standardisation import Statistics
from data.embeddings.store import EmbeddingStore
from data.fault import Fault
from data.json_files import read_object
from models.longnet import LongNet
from models.slide_network import SlideNetwork
from pretrain.encoders.frozen import device_of, fingerprint, freeze
from pretrain.encoders.run_checkpoint import STUDENT, TEACHER, RunCheckpoint, find_checkpoint
from pretrain.encoders.weight_files import read_file
from pretrain.run import checkpoints
from pretrain.settings.any_machine import on_any_machine
from pretrain.settings.config_files import CONFIGS
from pretrain.settings.plugins import build

RELEASED = {(768, 12), (1024, 24), (1536, 12)}  # width and depth of the published configurations, all with 16 heads
TILE_ENCODER = "tile_encoder.json"  # in a slide run's folder: whose embeddings it was trained on


def statistics_file(number: int) -> str:
    """In a slide run's folder: mean and spread of the embeddings of the tile encoder of that number."""
    return f"statistics-{number}.json" if number else "statistics.json"


@dataclass(frozen=True)
class EncoderInput:
    """A tile encoder whose embeddings a slide network takes: its hash, where it is known, and what they were
    standardised by in training, None for nothing."""

    tile_encoder_hash: str | None = None
    statistics: Statistics | None = None

    @property
    def says(self) -> str:
        """All that counts beside weights."""
        if self.statistics is None:
            return ""
        return f"standardised by {self.statistics.mean.tolist()} {self.statistics.std.tolist()}"


@dataclass(frozen=True)
class SlideEncoder:
    """A frozen slide network that takes the first of its ``inputs``, by number, until `require_fits` says which."""

    network: SlideNetwork
    name: str
    hash: str
    inputs: list[EncoderInput]
    notes: list[str]  # what is worth saying about it
    device: torch.device

    def require_fits(self, store: EmbeddingStore) -> None:
        """Have the network take embeddings of the tile encoder that ``store`` is of. Raises Fault unless it was trained
        on them."""
        hashes = [one.tile_encoder_hash for one in self.inputs]
        number = next((i for i, known in enumerate(hashes) if known in (None, store.encoder_hash)), None)
        if number is None:
            raise Fault(
                f"{self.name} was trained on embeddings of another tile encoder ({', '.join(map(str, hashes))}) than"
                f" {store.folder} holds ({store.encoder}, {store.encoder_hash}): embed the slides with that one."
            )
        if (width := self.network.input_widths[number]) != store.width:
            raise Fault(f"{self.name} takes {width}-wide embeddings, and {store.folder} holds {store.width}-wide ones.")
        self.take(number)

    def take(self, number: int) -> None:
        """Have the network take embeddings of the tile encoder of that number."""
        self.network.choose_input(number)
        if (found := self.inputs[number].statistics) is not None:
            mean, std = (torch.from_numpy(one).float().to(self.device) for one in (found.mean, found.std))
            self.network.standardise_inputs(mean, std)


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
    if "mask_token" in weights:
        network.add_mask_token()
    while (further := f"patch_embed.proj{len(network.input_widths)}.weight") in weights:
        network.add_input(weights[further].shape[1])
    try:
        network.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise Fault(f"{found.folder} doesn't fit the model in {found.run}/config.yaml ({error})") from error
    notes, cells = [], data.get("field_cells", 0)
    if cells:
        notes.append(
            f"it was trained on fields of {cells} × {cells} tiles, and whole slides may be larger than any it saw"
        )
    numbers = range(len(network.input_widths))
    hashes: list[str | None] = [None for _ in numbers]
    if trained_on := tile_encoders_of(found):
        hashes = [one["encoder_hash"] for one in trained_on]
    elif len(numbers) > 1:
        raise Fault(
            f"{found.run} was trained on embeddings of {len(numbers)} tile encoders, and {TILE_ENCODER}, which says whose"
            " are whose, is missing: put a copy back."
        )
    name = f"{found.run.resolve().name} ({found.folder.name})"
    inputs = [EncoderInput(hashes[number], standardised_by(found, number)) for number in numbers]
    return _frozen(network, name, inputs, notes, place)


def tile_encoders_of(found: RunCheckpoint) -> list[dict[str, Any]]:
    """Whose embeddings of what a slide run was trained on, as it noted it, the first store's first; none where that is
    missing."""
    path = found.run / TILE_ENCODER
    if not path.is_file():
        return []
    way_out = "put a copy back, or delete it, and nobody is held to the tile encoder any more"
    about = read_object(path, {"encoder_hash"}, way_out)
    return [about, *about.get("further", [])]


def standardised_by(found: RunCheckpoint, number: int = 0) -> Statistics | None:
    """What a slide run standardised its inputs by, of the tile encoder of that number; None where it took embeddings as
    they are. Raises Fault where it isn't there."""
    if (found.config.get("data") or {}).get("inputs") != "standardised":
        return None
    path = found.run / statistics_file(number)
    if not path.is_file():
        raise Fault(
            f"{found.run} was trained on standardised embeddings, and {path.name}, which says by what, is missing: put"
            " a copy back."
        )
    return Statistics.load(path)


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
    return _frozen(network, path.stem, [EncoderInput()], [notes], device)


def _frozen(
    network: nn.Module, name: str, inputs: list[EncoderInput], notes: list[str], device: torch.device
) -> SlideEncoder:
    if not isinstance(network, SlideNetwork):
        raise Fault(
            f"{name} is a {type(network).__name__}, which embeds no slides: derive it from"
            " models.slide_network.SlideNetwork."
        )
    freeze(network, device)
    beside = "".join(one.says for one in inputs)
    found = SlideEncoder(network, name, fingerprint(network, beside), inputs, notes, device)
    found.take(0)
    return found
