"""``format=gigapath``: a slide run's encoder as Prov-GigaPath's own code loads it.

<out>/
    slide_encoder.pth         {"model": state dict with the released key names}
    README.md                 model card: how it is loaded, what it was trained on and how

Their ``slide_encoder.create_model(path, architecture, in_chans)`` takes the file's path and one of three architectures by
name, whose heads and segments its code sets; a file that isn't there it answers with random weights and a line. It was
tried on their public code at the published size, with a stand-in for fairscale: no parameter missing, none left over.
"""

import importlib
import importlib.util
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.embeddings.standardisation import Statistics
from data.fault import Fault
from data.files import create_folder_whole
from pretrain.encoders.export.card import (
    as_lines,
    facts,
    judged_by_labels,
    parameters_in_words,
    published_differences,
    whole_record,
)
from pretrain.encoders.export.publishing import Exported
from pretrain.encoders.export.where_things_lie import without_folders, without_places
from pretrain.encoders.run_checkpoint import STUDENT, TEACHER, RunCheckpoint, find_checkpoint
from pretrain.encoders.slide_encoders import standardised_by, tile_encoders_of
from pretrain.run import checkpoints

OF_TRAINING = re.compile(r"mask_token|patch_embed\.proj\d")  # none of the released names
ARCHITECTURES = {
    (768, 12): "gigapath_slide_enc12l768d",
    (1024, 24): "gigapath_slide_enc24l1024d",
    (1536, 12): "gigapath_slide_enc12l1536d",
}  # by width and depth, all with 16 heads and a feed-forward of four widths
THEIR_SEGMENTS = [1024, 5792, 32768, 185363, 1048576]  # of their default max_wsi_size and tile_size
THEIR_RATIOS = [1, 2, 4, 8, 16]
OBJECTIVES = "pretrain.objectives"
CLOSE = 0.001  # our 185,360 is the nearest to theirs that its ratio divides


def export_gigapath(checkpoint: Path, out: Path, license: str, plugins: Collection[str] = ()) -> Exported:
    """Write a slide run's encoder as ``slide_encoder.pth`` with the released key names, unless it is there already."""
    found = find_checkpoint(checkpoint, plugins)
    weights = checkpoints.read_network(found.folder, TEACHER, STUDENT)
    if "embeddings" not in (found.config.get("data") or {}):
        raise Fault(f"{found.run} is another kind of run: format=gigapath is for runs of 'pretrain slide'.")
    if "encoder.layers.0.ffn.fc1.weight" not in weights:
        raise Fault(
            f"{found.run} trained no LongNet, and format=gigapath has no other network: hand on the run itself, which"
            " 'pretrain embed stage=slide' reads."
        )

    # Mask tokens hide tiles in training; of several tile encoders, the first one's embeddings are taken.
    weights = {name: tensor for name, tensor in weights.items() if not OF_TRAINING.match(name)}
    if (statistics := standardised_by(found)) is not None:
        _standardise_first(weights, statistics)
    architecture = architecture_of(found.config.get("model") or {}, weights)

    def fill(folder: Path) -> None:
        path = folder / "slide_encoder.pth"
        torch.save({"model": {name: tensor.contiguous().clone() for name, tensor in weights.items()}}, path)
        loaded = torch.load(path, weights_only=True)["model"]
        if list(loaded) != list(weights) or not all(torch.equal(loaded[name], weights[name]) for name in weights):
            raise Fault(f"{path} read back differs from what was written: check the disk, and export again")
        (folder / "README.md").write_text(slide_card(found, weights, license, architecture, out.resolve().name))

    use = code_to_load(f"{out}/slide_encoder.pth", architecture, weights)
    return Exported(create_folder_whole(out, fill), f"{out}/slide_encoder.pth: the released key names", use)


def _standardise_first(weights: dict[str, Tensor], statistics: Statistics) -> None:
    """Have the input projection take embeddings as they are: W (x − m) / s + b = (W / s) x + (b − (W / s) m)."""
    mean, std = torch.from_numpy(statistics.mean), torch.from_numpy(statistics.std)
    weight, bias = (weights[f"patch_embed.proj.{name}"] for name in ("weight", "bias"))
    scaled = weight.double() / std
    weights["patch_embed.proj.weight"] = scaled.to(weight.dtype)
    weights["patch_embed.proj.bias"] = (bias.double() - scaled @ mean).to(bias.dtype)


def architecture_of(model: Mapping[str, Any], weights: Mapping[str, Tensor]) -> str | None:
    """The name by which their code builds this network; None where it has none for its sizes, heads or segments."""
    width, hidden = weights["cls_token"].shape[-1], weights["encoder.layers.0.ffn.fc1.weight"].shape[0]
    depth = len({name.split(".")[2] for name in weights if name.startswith("encoder.layers.")})
    segments, ratios = model.get("segment_lengths") or [], model.get("dilated_ratios") or []
    same = len(segments) == len(THEIR_SEGMENTS) and all(
        abs(ours / theirs - 1) < CLOSE for ours, theirs in zip(segments, THEIR_SEGMENTS, strict=True)
    )
    if not same or list(ratios) != THEIR_RATIOS or model.get("heads") != 16 or hidden != 4 * width:
        return None
    return ARCHITECTURES.get((width, depth))


def code_to_load(path: str, architecture: str | None, weights: Mapping[str, Tensor]) -> str:
    """Code that loads the file."""
    if architecture is None:
        return f'torch.load("{path}")["model"]'
    return f'slide_encoder.create_model("{path}", "{architecture}", {weights["patch_embed.proj.weight"].shape[1]})'


def order_in_words(model: Mapping[str, Any]) -> str:
    """In which order their code, which cuts tiles into segments as they come, must be given them."""
    if model.get("order", "rows") == "rows":
        return "Tiles come row by row."
    return """\
Tiles come along a Hilbert curve (`model.order=hilbert`), not row by row: their code cuts segments from tiles as they come, and
in another order its answers are others. Sort a slide's tiles by Slidewright's `models.token_order.hilbert_index` of their
cells (column, row)."""


def how_it_is_used(
    architecture: str | None, weights: Mapping[str, Tensor], folder: str, model: Mapping[str, Any]
) -> str:
    """The card's section of that, beside a ``folder`` of this name."""
    code = code_to_load(f"{folder}/slide_encoder.pth", architecture, weights)
    if architecture is None:
        return f"""\
```python
import torch

weights = {code}  # run beside the folder {folder}
```

Prov-GigaPath's code has no name for a network of these sizes, heads or segments: build its `LongNetViT` with them, or hand on the
run itself, which `pretrain embed stage=slide` reads. {order_in_words(model)}
"""
    return f"""\
```python
from gigapath import slide_encoder  # github.com/prov-gigapath/prov-gigapath; with numpy below 2

encoder = {code}.eval()  # run beside the folder {folder}
cls = encoder(tiles, places)[0]  # (1, n, {weights["patch_embed.proj.weight"].shape[1]}) embeddings, (1, n, 2) places → (1, {weights["cls_token"].shape[-1]})
```

{order_in_words(model)} Their code divides places by a tile's side of 256: give cell (column, row) times 256. With
`global_pool=True` it answers with the mean of the tiles.
"""


def objective_in_words(settings: Mapping[str, Any]) -> str:
    """What an objective of ours says of itself first; the name alone of another's."""
    module, _, name = str(settings.get("_target_", "")).rpartition(".")
    if not module.startswith(f"{OBJECTIVES}.") or importlib.util.find_spec(module) is None:
        return f"Its objective was `{name}`." if name else "Its objective isn't recorded."
    told = (importlib.import_module(module).__doc__ or "").partition("\n\n")[0]
    return f"Its objective was `{name}`. {' '.join(told.split())}"


def attention_in_words(model: Mapping[str, Any]) -> str:
    """With which arithmetic the network was trained, and what that means for code that follows the released model."""
    if model.get("compatible"):
        return """\
It was trained with the released model's attention (`model.compatible=true`): zero padding is attended, and branch weights are
constants in the backward. Code that follows the released model attends as it did in training."""
    return """\
It was trained with exact attention gradients and without attended padding. Code that follows the released model attends to
zero padding, so for segments that a slide doesn't fill its outputs differ from those seen in training."""


def objective_facts(settings: Mapping[str, Any]) -> dict[str, str]:
    """How the objective was set."""
    told = ", ".join(
        f"{key}={value}" for key, value in without_places(dict(settings)).items() if not key.startswith("_")
    )
    return {"Settings of the objective": told} if told else {}


def tile_encoder_facts(found: RunCheckpoint) -> dict[str, str]:
    """What a slide encoder can't be used without: whose embeddings it takes, and of which tiles."""
    trained_on = tile_encoders_of(found)
    if not trained_on:
        return {"Tile encoder": "not recorded: find out before you use it"}
    first, *others = trained_on
    told = {"Tile encoder": f"{without_folders(str(first.get('encoder')))}, of hash {first['encoder_hash']}"}
    low, high = first.get("mpp") or (0, 0)
    mpp = f"{low:g} µm/px" if low == high else f"{low:g} to {high:g} µm/px"
    told |= {
        "Size of a tile": " or ".join(f"{size} × {size} px" for size in first.get("tile_size") or [])
        or "not recorded: find out before you use it",
        "Resolution of a tile": mpp if low else "not recorded: find out before you use it",
    }
    if "slides" in first:
        store = Path(str((found.config.get("data") or {}).get("embeddings"))).name
        told["Embeddings"] = f"{first['slides']:,} slides, {first['tiles']:,} tiles, in the store {store}"
    if others:
        told["Trained with"] = f"embeddings of {len(others)} more tile encoders, which this file doesn't take"
    return told


def slide_card(
    found: RunCheckpoint, weights: dict[str, Tensor], license: str, architecture: str | None, name: str
) -> str:
    """The model card of a slide encoder that is exported into a folder of this ``name``."""
    parameters = sum(tensor.numel() for tensor in weights.values())
    model, objective = found.config.get("model") or {}, found.config.get("objective") or {}
    return f"""\
---
license: {license}
tags: [pathology, histology, longnet, whole-slide]
---

# {found.run.resolve().name}: a pathology slide encoder

A LongNet encoder of {parameters_in_words(parameters)} parameters, trained with Slidewright over frozen tile embeddings.
{objective_in_words(objective)}
`slide_encoder.pth` holds `{{"model": state_dict}}` with the key names of Prov-GigaPath's release.

{attention_in_words(model)}

## Use

{how_it_is_used(architecture, weights, name, model)}
## Training

{as_lines(tile_encoder_facts(found) | facts(found) | objective_facts(objective))}
{whole_record(found)}{published_differences(found.run)}{judged_by_labels(found)}
## Limits

It has seen the slides and the tile encoder of its training and no others. Compare it with the mean of the tiles, with smoothed tiles and
with random weights on your labels (`pretrain probe stage=slide`) before you rely on it. Not a medical device.
"""
