"""What all exports of a tile encoder share: the teacher, the check of what was written, the model card."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from data.fault import Fault
from data.files import create_folder_whole
from data.keyed import rng
from models.vit import VisionTransformer
from pretrain.encoders.export.card import (
    as_lines,
    facts,
    judged,
    parameters_in_words,
    published_differences,
    whole_record,
)
from pretrain.encoders.preprocessing import Preprocessing
from pretrain.encoders.run_checkpoint import RUN_CONFIG, RunCheckpoint, teacher
from pretrain.encoders.tiles_seen import TILES_FILE, tiles_seen

FEATURE_TOLERANCE = 1e-5


def vision_transformer(found: RunCheckpoint) -> tuple[VisionTransformer, Preprocessing]:
    """A tile run's teacher. Raises `Fault` for a network of another kind, which no format here describes."""
    network, preprocessing = teacher(found)
    if not isinstance(network, VisionTransformer):
        raise Fault(
            f"{found.run} trains a {type(network).__name__}, and only models.vit.VisionTransformer can be exported"
        )
    return network, preprocessing


def export_tiles(
    out: Path,
    found: RunCheckpoint,
    network: VisionTransformer,
    preprocessing: Preprocessing,
    files: dict[str, dict[str, Any] | str],
    weights: dict[str, Tensor],
    card: str,
    features: Callable[[Path, Tensor], tuple[Tensor, Tensor, Tensor]],
) -> tuple[bool, float]:
    """Publish configuration ``files`` (settings, or text), ``weights`` and ``card``, once ``features`` loaded from them are the
    network's."""
    difference, seen = 0.0, tiles_seen([found.run])

    def fill(folder: Path) -> None:
        nonlocal difference
        for name, content in (files | ({TILES_FILE: seen} if seen else {})).items():
            text = content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"
            (folder / name).write_text(text)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "README.md").write_text(card)
        shutil.copymode(folder / "README.md", folder / "model.safetensors")  # which safetensors keeps to its owner
        difference = largest_difference(network, preprocessing.image_size, lambda images: features(folder, images))
        require_same_features(difference, FEATURE_TOLERANCE, found)

    return create_folder_whole(out, fill), difference


def require_same_features(difference: float, tolerance: float, found: RunCheckpoint) -> None:
    """Raise Fault where what was exported says something else than the teacher."""
    if not difference <= tolerance:
        raise Fault(
            f"the exported folder's features differ from the teacher's by {difference:.2g} of the largest, more than"
            f" {tolerance:g}, so nothing was published: please report this with {found.run / RUN_CONFIG}"
        )


def images_to_check(count: int, size: int) -> Tensor:
    """Noise as images ``(count, 3, size, size)``."""
    return torch.from_numpy(rng(0, "export check").normal(size=(count, 3, size, size))).float()


def largest_difference(
    network: VisionTransformer, image_size: int, load: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
) -> float:
    """Compare what ``load`` says about random images with the teacher: max |theirs − ours| / max |ours|."""
    images = images_to_check(4, image_size)
    with torch.inference_mode():
        cls, patches = network.eval().features(images)
        theirs = load(images)
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in zip((cls, cls, patches), theirs, strict=True))


def tile_card(
    found: RunCheckpoint,
    network: nn.Module,
    preprocessing: Preprocessing,
    license: str,
    library: str,
    use: str,
    folder: str,
) -> str:
    """The model card of an exported tile encoder; ``use`` is code that ends with the features of ``images``, run
    beside the ``folder`` of this name."""
    model = found.config["model"]
    parameters = sum(p.numel() for name, p in network.named_parameters() if name != "mask_token")
    mean, std = list(preprocessing.mean), list(preprocessing.std)
    return f"""\
---
license: {license}
library_name: {library}
pipeline_tag: image-feature-extraction
tags: [pathology, histology]
---

# {found.run.resolve().name}: a pathology tile encoder

A vision transformer of {parameters_in_words(parameters)} parameters (width {model["width"]}, {model["depth"]} blocks, {model["heads"]} heads,
patch {model["patch_size"]}, {model["feed_forward"]}, {model["registers"]} registers), trained with Slidewright by self-supervision:
no label was used. The weights are those of {found.folder.name}: the moving-average teacher's where the objective has one.

## Use

Beside the folder {folder}:

```python
{use}  # images (B, 3, {preprocessing.image_size}, {preprocessing.image_size}) → (B, {model["width"]}): the class token
```

Input: {preprocessing.resizing()}, mean {mean}, std {std}.

## Training

{as_lines(facts(found, preprocessing))}
{whole_record(found)}{published_differences(found.run)}{judged(found, network, preprocessing)}
## Limits

It has seen the tissue, stains and scanners of its training slides and no others. Measure it on your task (`pretrain probe`) before you
rely on it. Not a medical device.
"""
