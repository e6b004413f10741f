"""``format=gigapath``: a slide run's encoder as Prov-GigaPath's own code loads it.

<out>/
    slide_encoder.pth         {"model": state dict with the released key names}
    README.md
"""

import re
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from data.embeddings.standardisation import Statistics
from data.fault import Fault
from data.files import create_folder_whole
from data.redaction import redacted
from pretrain.encoders.export.publishing import Exported, provenance
from pretrain.encoders.run_checkpoint import RUN_CONFIG, STUDENT, TEACHER, RunCheckpoint, find_checkpoint
from pretrain.encoders.slide_encoders import standardised_by
from pretrain.run import checkpoints

OF_TRAINING = re.compile(r"mask_token|patch_embed\.proj\d")  # none of the released names


def export_gigapath(checkpoint: Path, out: Path, license: str, plugins: Collection[str] = ()) -> Exported:
    """Write a slide run's encoder as ``slide_encoder.pth`` with the released key names, unless it is there already."""
    found = find_checkpoint(checkpoint, plugins)
    weights = checkpoints.read_network(found.folder, TEACHER, STUDENT)
    weights.pop("mask_token", None)  # of an objective that hides tiles from the encoder; the released network has none
    if "encoder.layers.0.ffn.fc1.weight" not in weights:
        raise Fault(
            f"{found.run} trained no LongNet, and format=gigapath has no other network: hand on the run itself, which"
            " 'pretrain embed stage=slide' reads."
        )

    # Mask tokens hide tiles in training; of several tile encoders, the first one's embeddings are taken.
    weights = {name: tensor for name, tensor in weights.items() if not OF_TRAINING.match(name)}
    if (statistics := standardised_by(found)) is not None:
        _standardise_first(weights, statistics)

    def fill(folder: Path) -> None:
        path = folder / "slide_encoder.pth"
        torch.save({"model": {name: tensor.contiguous().clone() for name, tensor in weights.items()}}, path)
        loaded = torch.load(path, weights_only=True)["model"]
        if list(loaded) != list(weights) or not all(torch.equal(loaded[name], weights[name]) for name in weights):
            raise Fault(f"{path} read back differs from what was written: check the disk, and export again")
        (folder / "README.md").write_text(slide_card(found, weights, license))

    use = f'torch.load("{out}/slide_encoder.pth")["model"]'
    return Exported(create_folder_whole(out, fill), f"{out}/slide_encoder.pth: the released key names", use)


def _standardise_first(weights: dict[str, Tensor], statistics: Statistics) -> None:
    """Have the input projection take embeddings as they are: W (x − m) / s + b = (W / s) x + (b − (W / s) m)."""
    mean, std = torch.from_numpy(statistics.mean), torch.from_numpy(statistics.std)
    weight, bias = (weights[f"patch_embed.proj.{name}"] for name in ("weight", "bias"))
    scaled = weight.double() / std
    weights["patch_embed.proj.weight"] = scaled.to(weight.dtype)
    weights["patch_embed.proj.bias"] = (bias.double() - scaled @ mean).to(bias.dtype)


def slide_card(found: RunCheckpoint, weights: dict[str, Tensor], license: str) -> str:
    """The model card of an exported slide encoder."""
    parameters = sum(tensor.numel() for tensor in weights.values())
    return f"""\
---
license: {license}
tags: [pathology, histology, longnet, whole-slide]
---

# {found.run.resolve().name}: a pathology slide encoder

A LongNet encoder of {parameters / 1e6:.1f} M parameters, trained with Slidewright as a masked autoencoder over frozen tile embeddings.
`slide_encoder.pth` holds `{{"model": state_dict}}` with the key names of Prov-GigaPath's release.

It was trained with exact attention gradients and without attended padding. Code that follows the released model attends to
zero padding, so for segments that a slide doesn't fill its outputs differ from those seen in training.

## Training

```yaml
{redacted((found.run / RUN_CONFIG).read_text().strip())}
```
{provenance(found.run)}"""
