"""A checkpoint file of unknown origin: find the encoder inside, and tell by its names whose they are."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from models.formats import dinov2, timm
from models.formats.published import Published, Weights

CONTAINERS = ("teacher", "model", "state_dict")  # as training code nests state dicts
BACKBONES = ("teacher.backbone.", "module.backbone.", "backbone.", "module.")


def read(checkpoint: Mapping[str, Any]) -> Published:
    """The encoder in what a file holds: timm's names or DINOv2's, bare or inside a training checkpoint.

    Raises ValueError where it holds none.
    """
    weights, left_out = backbone(checkpoint)
    if any(name.endswith("embeddings.cls_token") for name in weights):
        raise ValueError("it has transformers' names, which mean little without config.json: give its folder")
    theirs = "register_tokens" in weights or ("mask_token" in weights and "reg_token" not in weights)
    theirs = theirs or any(re.match(r"blocks\.\d+\.(\d+\.|mlp\.w12\.)", name) for name in weights)
    published = dinov2.read(weights) if theirs else timm.read(weights)
    published.left_out += left_out
    return published


def backbone(checkpoint: Mapping[str, Any]) -> tuple[Weights, list[str]]:
    """The encoder's weights in a checkpoint, and the names of the parts that are something else.

    DINOv2's training writes ``{"teacher": {"backbone.…", "dino_head.…"}}`` or ``teacher.backbone.…``; of student and
    teacher the teacher is taken: it is what DINOv2 releases.
    """
    left_out: list[str] = []
    for key in CONTAINERS:
        inner = checkpoint.get(key)
        if isinstance(inner, Mapping):
            left_out += sorted(other for other in checkpoint if other != key)
            checkpoint = inner
    weights = {name: tensor for name, tensor in checkpoint.items() if isinstance(tensor, Tensor)}
    left_out += sorted(checkpoint.keys() - weights.keys())
    for prefix in BACKBONES:
        if any(name.startswith(prefix) for name in weights):
            others = {".".join(name.split(".")[: prefix.count(".")]) for name in weights if not name.startswith(prefix)}
            chosen = {name.removeprefix(prefix): t for name, t in weights.items() if name.startswith(prefix)}
            return chosen, left_out + sorted(others)
    return weights, left_out
