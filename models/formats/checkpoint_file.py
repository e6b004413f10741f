"""A checkpoint file of unknown origin: find the encoder inside, wherever it is, and tell by its names whose they are.

{"model": {"_orig_mod.teacher.backbone.blocks.0.…": …, "_orig_mod.teacher.dino_head.…": …}, "iteration": 3}
   │                 │
   └─ dictionaries are gone through; names of wrappers are dropped wherever they stand
                     └─ what stands before cls_token is where an encoder is; of several, the teacher's
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.formats import dinov2, timm
from models.formats.dinov3 import is_dinov3, read_dinov3
from models.formats.published import PublishedWeights, Weights, listed
from models.formats.timm_dinov3 import is_timm_dinov3, read_timm_dinov3

WRAPPERS = re.compile(r"(^|\.)(?:(?:_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+")
CLASS_TOKEN, MASK_TOKEN = "cls_token", "mask_token"
DECODER = "decoder_"  # of MAE's own code, in one state dict with the encoder
NUMBER_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DEEPEST = 20  # dictionaries inside of each other
TRANSFORMERS = "embeddings."
AVERAGED = re.compile(r"(?:^|[._])(?:teacher|ema|momentum|target)(?:[._]|$)")
TRAINED = re.compile(r"(?:^|[._])(?:student|online)(?:[._]|$)")
# What is known by its names, and isn't read: a pattern that one of them matches, and whose they are.
OTHERS = (
    (r"(^|\.)(class_embedding|embeddings\.class_embedding)$", "CLIP's vision transformer"),
    (r"(^|\.)vision_model\.embeddings\.patch_embedding\.", "SigLIP's vision transformer"),
    (r"relative_position_bias_table$", "a Swin transformer"),
    (r"(^|\.)stages\.\d+\.blocks\.\d+\.(conv_dw|gamma)", "a ConvNeXt"),
    (r"(^|\.)layer4\.\d+\.conv1\.weight$", "a ResNet"),
)


@dataclass(frozen=True)
class Found:
    """An encoder in a checkpoint: where it is, and its weights by the names that follow."""

    place: str  # "model.teacher.backbone."; "" where the checkpoint is the encoder
    weights: Weights


def read_checkpoint_file(checkpoint: Mapping[str, Any], place: str = "") -> PublishedWeights:
    """The encoder in what a file holds: timm's names, DINOv2's or DINOv3's, bare or inside a training checkpoint, of several the
    one at ``place``.

    What MAE keeps beside its encoder, ``decoder_…`` and the decoder's mask token, is left out. Raises ValueError where
    it holds none, several that nothing tells apart, or one of a format that isn't read.
    """
    found, left_out = backbone(checkpoint, place)
    weights = found.weights
    if any(name.startswith(DECODER) for name in weights):
        weights = {name: t for name, t in weights.items() if not name.startswith(DECODER) and name != MASK_TOKEN}
        left_out.append("decoder")
    for name, tensor in weights.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta or tensor.dtype not in NUMBER_TYPES:
            raise ValueError(
                f"{name} is of {tensor.dtype} and layout {tensor.layout}: save the weights as ordinary floats"
            )
    if f"{TRANSFORMERS}{CLASS_TOKEN}" in weights:
        raise ValueError("it has transformers' names, which mean little without config.json: give its folder")
    published = _read(weights)
    published.left_out += left_out
    published.place = found.place.rstrip(".")
    return published


def _read(weights: Weights) -> PublishedWeights:
    """Weights by the format that their names show."""
    if is_dinov3(weights):
        return read_dinov3(weights)
    if is_timm_dinov3(weights):
        return read_timm_dinov3(weights)
    theirs = "register_tokens" in weights or (MASK_TOKEN in weights and "reg_token" not in weights)
    theirs = theirs or any(re.match(r"blocks\.\d+\.(\d+\.|mlp\.w12\.)", name) for name in weights)
    return dinov2.read_dinov2(weights) if theirs else timm.read_timm(weights)


def backbone(checkpoint: Mapping[str, Any], place: str = "") -> tuple[Found, list[str]]:
    """The encoder in a checkpoint, at ``place`` where it is given, and the names of the parts that are something else.

    DINOv2's training writes ``{"teacher": {"backbone.…", "dino_head.…"}}`` or ``teacher.backbone.…``; of student and
    teacher the teacher is taken: it is what DINOv2 releases. Raises ValueError where there is none, or which is left
    open.
    """
    parts = list(_parts(checkpoint))
    every = [found for place, weights in parts for found in _encoders(place, weights)]
    if not every:
        raise ValueError(_what_it_is([name for _, weights in parts for name in weights]))
    best = max(_preference(found) for found in every)
    chosen = [found for found in every if (found.place == f"{place}." if place else _preference(found) == best)]
    places = [found.place.rstrip(".") for found in chosen or every]
    if len(chosen) != 1:
        raise ValueError(
            (f"there is no encoder at {place}, but at" if place else f"it holds {len(chosen)} encoders,")
            + f" {listed(name or 'its top' for name in places)}: name the one that is meant behind the file,"
            f" FILE::{places[-1]}"
        )
    (found,) = chosen
    depth = max(found.place.count("."), 1)
    inside = {f"{found.place}{name}" for name in found.weights}
    names = {f"{place}{name}" for place, weights in parts for name in weights} - inside
    others = {".".join(name.split(".")[:depth]) for name in names}
    said = sorted(str(key) for key, value in checkpoint.items() if not isinstance(value, Tensor | Mapping))
    return found, said + sorted(others)


def _parts(checkpoint: Mapping[Any, Any], place: str = "", depth: int = 0) -> Iterator[tuple[str, Weights]]:
    """Every dictionary that holds tensors, without the names of wrappers, and where it is."""
    weights: Weights = {}
    if depth > DEEPEST:
        return
    for key, value in checkpoint.items():
        name = str(key)
        plain = WRAPPERS.sub(r"\1", f"{name}.")[:-1]
        if isinstance(value, Tensor):
            if plain in weights:
                raise ValueError(f"{name} is there twice, with and without the name of a wrapper")
            weights[plain] = value
        elif isinstance(value, Mapping):
            yield from _parts(value, f"{place}{plain}." if plain else place, depth + 1)
    if weights:
        yield place, weights


def _encoders(place: str, weights: Weights) -> Iterator[Found]:
    for name in weights:
        if name == CLASS_TOKEN or name.endswith(f".{CLASS_TOKEN}"):
            prefix = name.removesuffix(CLASS_TOKEN)
            if prefix.endswith(TRANSFORMERS):
                prefix = prefix.removesuffix(TRANSFORMERS)
            inside = {other.removeprefix(prefix): t for other, t in weights.items() if other.startswith(prefix)}
            yield Found(f"{place}{prefix}", inside)


def _preference(found: Found) -> int:
    return 2 if AVERAGED.search(found.place) else 0 if TRAINED.search(found.place) else 1


def _what_it_is(names: list[str]) -> str:
    for pattern, what in OTHERS:
        if any(re.search(pattern, name) for name in names):
            return f"these are weights of {what}, which isn't read: it takes vision transformers of DINOv2's and DINOv3's kind"
    return (
        f"no vision transformer is in it: none of its {len(names)} tensors is a {CLASS_TOKEN}, the first are"
        f" {listed(names, 3)}"
        if names
        else "it holds no tensors"
    )
