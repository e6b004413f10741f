"""Encoders as other people's code loads them: timm and transformers folders, and Prov-GigaPath's slide encoder file.

    <out>/                        format=timm
        config.json               architecture, its arguments, preprocessing: what timm.create_model needs
        model.safetensors         the teacher's weights under timm's names
        README.md                 model card: what it was trained on and how

    <out>/                        format=transformers
        config.json, model.safetensors, preprocessor_config.json: what Dinov2Model.from_pretrained and AutoImageProcessor need
        README.md

    <out>/                        format=gigapath
        slide_encoder.pth         {"model": state dict with the released key names}
        README.md

A folder appears under its final name only after the exporter has loaded it back the way a stranger would and compared.
"""

import filecmp
import json
import os
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from data.fault import Fault
from data.files import make_folder, refusals
from data.keyed import rng
from data.redaction import redacted
from models.formats import timm as timm_format
from models.formats import transformers as transformers_format
from models.vit import VisionTransformer
from pretrain.encoders.loading import CONFIG, Preprocessing, RunCheckpoint, find_checkpoint, teacher
from pretrain.run import checkpoints

FEATURE_TOLERANCE = 1e-5
SLIDE_ENCODER = "encoder."


def timm_config(
    architecture: str, arguments: dict[str, Any], preprocessing: Preprocessing, license: str
) -> dict[str, Any]:
    """The ``config.json`` that ``timm.create_model("local-dir:…")`` and timm's hub loading read."""
    size = preprocessing.image_size
    return {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": arguments["embed_dim"],
        "global_pool": "token",
        "model_args": arguments,
        "pretrained_cfg": {
            "tag": "slidewright",
            "custom_load": False,
            "input_size": [3, size, size],
            "fixed_input_size": True,
            "interpolation": preprocessing.interpolation,
            "crop_pct": size / preprocessing.resize_to,
            "crop_mode": "center",
            "mean": list(preprocessing.mean),
            "std": list(preprocessing.std),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": license,
        },
    }


def timm_features(folder: Path, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Class token, pooled output and patches, loaded as a stranger would: timm raises for a tensor missing, unexpected
    or misshapen."""
    import timm

    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    features = loaded.forward_features(images)  # type: ignore[operator]
    return features[:, 0], loaded(images), features[:, loaded.num_prefix_tokens :]  # type: ignore[misc]


def transformers_features(folder: Path, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Class token, pooled output and patches, loaded as a stranger would. Raises `Fault` where weights are missing or
    left over."""
    transformers = import_transformers()
    config = json.loads((folder / "config.json").read_text())
    model = getattr(transformers, config["architectures"][0])
    loaded, report = model.from_pretrained(folder, output_loading_info=True, local_files_only=True)
    if any(report.values()):
        raise Fault(
            f"transformers loads the exported folder only in part, so nothing was published: please report this ({report})"
        )
    said = loaded.eval()(pixel_values=images)
    prefix = 1 + config.get("num_register_tokens", 0)
    return said.last_hidden_state[:, 0], said.pooler_output, said.last_hidden_state[:, prefix:]


def import_transformers() -> Any:
    """The package, which only this export needs. Raises `Fault` where it isn't installed."""
    try:
        import transformers
    except ImportError as error:
        raise Fault(
            "format=transformers loads the folder back with the package transformers: pip install 'slidewright[transformers]'"
        ) from error
    transformers.utils.logging.disable_progress_bar()
    return transformers


def largest_difference(
    network: VisionTransformer, image_size: int, load: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
) -> float:
    """Compare what ``load`` says about random images with the teacher: max |theirs − ours| / max |ours|."""
    pixels = rng(0, "export check").normal(size=(4, 3, image_size, image_size))
    images = torch.from_numpy(pixels).float()
    with torch.inference_mode():
        cls, patches = network.eval().features(images)
        theirs = load(images)
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in zip((cls, cls, patches), theirs, strict=True))


def publish(out: Path, fill: Callable[[Path], None]) -> bool:
    """Let ``fill`` write a folder beside ``out`` and give it that name when it is whole; a kill leaves ``out`` as it
    was.

    False when ``out`` already holds the very same files. Raises `Fault` when it holds anything else.
    """
    temporary = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(temporary, ignore_errors=True)
    make_folder(temporary)
    try:
        with refusals(out):
            fill(temporary)
        names = sorted(path.name for path in temporary.iterdir())
        if out.exists() and any(out.iterdir()):
            there = sorted(path.name for path in out.iterdir())
            if there != names or filecmp.cmpfiles(out, temporary, names, shallow=False)[0] != names:
                raise Fault(f"{out} already holds something else: choose another out=, or remove it")
            return False
        for path in temporary.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        temporary.rename(out)
        return True
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def export_timm(checkpoint: Path, out: Path, license: str, plugins: Collection[str] = ()) -> tuple[bool, float]:
    """Write a tile run's teacher as a timm folder, unless it is there already.

    ``plugins`` are the packages whose classes the run may name beside ours. Returns whether it was written now, and the
    check's `largest_difference`. Raises `Fault` when that is above 1e-5.
    """
    found = find_checkpoint(checkpoint, plugins)
    network, preprocessing = vision_transformer(found)
    architecture, arguments = timm_format.architecture(found.config["model"], preprocessing.image_size)
    files = {"config.json": timm_config(architecture, arguments, preprocessing, license)}
    weights = timm_format.write_timm(network, preprocessing.image_size)
    use = """\
import timm, torch

encoder = timm.create_model("local-dir:{this folder}", pretrained=True).eval()
features = encoder(images)"""
    card = tile_card(found, network, preprocessing, license, "timm", use)
    return export_tiles(out, found, network, preprocessing, files, weights, card, timm_features)


def export_transformers(checkpoint: Path, out: Path, license: str, plugins: Collection[str] = ()) -> tuple[bool, float]:
    """Write a tile run's teacher as a folder of transformers' Dinov2 models; otherwise as `export_timm`."""
    import_transformers()
    found = find_checkpoint(checkpoint, plugins)
    network, preprocessing = vision_transformer(found)
    try:
        config = transformers_format.config(found.config["model"], preprocessing.image_size)
    except ValueError as error:
        raise Fault(str(error)) from error
    files = {"config.json": config, "preprocessor_config.json": processor_config(preprocessing)}
    weights = transformers_format.write_transformers(network, preprocessing.image_size)
    model = config["architectures"][0]
    use = f"""\
from transformers import {model}

encoder = {model}.from_pretrained("{{this folder}}").eval()
features = encoder(images).pooler_output"""
    card = tile_card(found, network, preprocessing, license, "transformers", use)
    return export_tiles(out, found, network, preprocessing, files, weights, card, transformers_features)


def export_tiles(
    out: Path,
    found: RunCheckpoint,
    network: VisionTransformer,
    preprocessing: Preprocessing,
    files: dict[str, dict[str, Any]],
    weights: dict[str, Tensor],
    card: str,
    features: Callable[[Path, Tensor], tuple[Tensor, Tensor, Tensor]],
) -> tuple[bool, float]:
    """Publish configuration ``files``, ``weights`` and ``card``, once ``features`` loaded from them are the network's."""
    difference = 0.0

    def fill(folder: Path) -> None:
        nonlocal difference
        for name, config in files.items():
            (folder / name).write_text(json.dumps(config, indent=2) + "\n")
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "README.md").write_text(card)
        difference = largest_difference(network, preprocessing.image_size, lambda images: features(folder, images))
        if not difference <= FEATURE_TOLERANCE:
            raise Fault(
                f"the exported folder's features differ from the teacher's by {difference:.2g} of the largest, more than {FEATURE_TOLERANCE:g}, "
                f"so nothing was published: please report this with {found.run / CONFIG}"
            )

    return publish(out, fill), difference


def vision_transformer(found: RunCheckpoint) -> tuple[VisionTransformer, Preprocessing]:
    """A tile run's teacher. Raises `Fault` for a network of another kind, which no format here describes."""
    network, preprocessing = teacher(found)
    if not isinstance(network, VisionTransformer):
        raise Fault(
            f"{found.run} trains a {type(network).__name__}, and only models.vit.VisionTransformer can be exported"
        )
    return network, preprocessing


def processor_config(preprocessing: Preprocessing) -> dict[str, Any]:
    """The ``preprocessor_config.json`` of transformers' BitImageProcessor, the one that Dinov2 models use."""
    size = preprocessing.image_size
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": preprocessing.resize_to},
        "resample": 3 if preprocessing.interpolation == "bicubic" else 2,  # PIL's numbers
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
    }


def export_gigapath(checkpoint: Path, out: Path, license: str) -> bool:
    """Write a slide run's encoder as ``slide_encoder.pth`` with the released key names; False if it was there already."""
    found = find_checkpoint(checkpoint)
    weights = checkpoints.read_network(found.folder, SLIDE_ENCODER)

    def fill(folder: Path) -> None:
        path = folder / "slide_encoder.pth"
        torch.save({"model": {name: tensor.contiguous().clone() for name, tensor in weights.items()}}, path)
        loaded = torch.load(path, weights_only=True)["model"]
        if list(loaded) != list(weights) or not all(torch.equal(loaded[name], weights[name]) for name in weights):
            raise Fault(f"{path} read back differs from what was written: check the disk, and export again")
        (folder / "README.md").write_text(slide_card(found, weights, license))

    return publish(out, fill)


def tile_card(
    found: RunCheckpoint, network: nn.Module, preprocessing: Preprocessing, license: str, library: str, use: str
) -> str:
    """The model card of an exported tile encoder; ``use`` is code that ends with the features of ``images``."""
    model, config = found.config["model"], found.config
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

A vision transformer of {parameters / 1e6:.1f} M parameters (width {model["width"]}, {model["depth"]} blocks, {model["heads"]} heads,
patch {model["patch_size"]}, {model["feed_forward"]}, {model["registers"]} registers), trained with Slidewright by self-supervision:
no label was used. The weights are those of {found.folder.name}: the moving-average teacher's where the objective has one.

## Use

```python
{use}  # images (B, 3, {preprocessing.image_size}, {preprocessing.image_size}) → (B, {model["width"]}): the class token
```

Input: {preprocessing}. In numbers: mean {mean}, std {std}.

## Training

Tiles: {config["data"].get("shards", "not recorded")}. The whole configuration:

```yaml
{redacted((found.run / CONFIG).read_text().strip())}
```
{provenance(found.run)}
## Limits

It has seen the tissue, stains and scanners of its training slides and no others. Measure it on your task (`pretrain probe`) before you
rely on it. Not a medical device.
"""


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
{redacted((found.run / CONFIG).read_text().strip())}
```
{provenance(found.run)}"""


def provenance(run: Path) -> str:
    """The run's ``provenance.json`` as a section of the card, empty where the run has none."""
    path = run / "provenance.json"
    return f"\nProvenance:\n\n```json\n{redacted(path.read_text().strip())}\n```\n\n" if path.is_file() else "\n"
