"""timm's ``vit_*_dinov3`` models, which are its ``Eva``.

theirs                          ours
gamma_1, gamma_2                ls1.gamma, ls2.gamma
attn.q_bias, attn.v_bias        attn.qkv.bias: the two, zeros for keys between them (``…_qkvb`` models alone have them)
mlp.fc1_g, mlp.fc1_x (SwiGLU)   mlp.fc1: the two, one above the other
everything else                 the same name; no mask token, and no norm of local crops' class tokens
"""

import re
from typing import Any

import torch

from models.formats.published import QKV_BIAS, PublishedWeights, Weights, of_keys
from models.formats.timm import timm_sizes
from models.vit import VisionTransformer

EPSILON = 1e-5  # of its norms
GAMMAS = ((".gamma_1", ".ls1.gamma"), (".gamma_2", ".ls2.gamma"))
GATED = ("fc1_g", "fc1_x")


def is_timm_dinov3(weights: Weights) -> bool:
    """Whether these are its names."""
    return "cls_token" in weights and "pos_embed" not in weights and any(name.endswith(".gamma_1") for name in weights)


def read_timm_dinov3(weights: Weights, *, heads: int | None = None) -> PublishedWeights:
    """A state dict of one of them."""
    left_out = ["head"] if "head.weight" in weights else []
    ours: Weights = {}
    parts: dict[str, Weights] = {}
    for name, tensor in weights.items():
        if name.startswith("head."):
            continue
        for theirs, mine in GAMMAS:
            name = name.replace(theirs, mine)
        packed = re.sub(r"\.mlp\.fc1_[gx]\.", ".mlp.fc1.", re.sub(r"\.attn\.[qv]_bias$", QKV_BIAS, name))
        if packed == name:
            ours[name] = tensor
        else:
            parts.setdefault(packed, {})[name.split(".")[3]] = tensor
    for name, found in parts.items():
        order = ("q_bias", "v_bias") if name.endswith(QKV_BIAS) else GATED
        if lacking := [part for part in order if part not in found]:
            raise ValueError(f"missing: {', '.join(lacking)} of {name}")
        first, last = (found[part] for part in order)
        ours[name] = torch.cat([first, torch.zeros_like(first), last] if name.endswith(QKV_BIAS) else [first, last])
    return PublishedWeights("timm", ours, heads, left_out=left_out, norm_epsilon=EPSILON)


def write_timm_dinov3(network: VisionTransformer) -> Weights:
    """A network's weights for one of them; see `timm_dinov3_architecture`.

    Raises ValueError for what timm can't express: biases of keys, class tokens' own norm.
    """
    if network.cls_norm is not None:
        raise ValueError("timm's DINOv3 has no norm of class tokens' own: model.own_cls_norm can't be exported")
    theirs: Weights = {}
    for name, tensor in network.state_dict().items():
        if name == "mask_token" or name.startswith("local_cls_norm."):
            continue
        tensor = tensor.detach()
        for other, mine in GAMMAS:
            name = name.replace(mine, other)
        if name.endswith(QKV_BIAS):
            if of_keys(tensor).any():
                raise ValueError(
                    "timm's DINOv3 has no biases of keys: train with model.qkv_bias=no_key, or export"
                    " format=transformers"
                )
            queries, _, values = tensor.chunk(3)
            block = name.removesuffix("qkv.bias")
            theirs |= {f"{block}q_bias": queries, f"{block}v_bias": values}
        elif network.feed_forward == "swiglu" and ".mlp.fc1." in name:
            for part, half in zip(GATED, tensor.chunk(2), strict=True):
                theirs[name.replace(".mlp.fc1.", f".mlp.{part}.")] = half
        else:
            theirs[name] = tensor
    return {name: tensor.contiguous().clone() for name, tensor in theirs.items()}


def timm_dinov3_architecture(settings: dict[str, Any], image_size: int) -> tuple[str, dict[str, Any]]:
    """timm's architecture name and its arguments for one of our vision transformers with rotary positions.

    Raises ValueError for an epsilon of norms that timm's don't have, and for none of the layer scales that they have.
    """
    if settings.get("norm_epsilon") != EPSILON:
        raise ValueError(
            f"timm's DINOv3 has norms of epsilon {EPSILON:g}, and this run"
            f" model.norm_epsilon={settings.get('norm_epsilon', 1e-6):g}: export format=transformers"
        )
    if not settings["layer_scale"]:
        raise ValueError("timm's DINOv3 has layer scales, and this run model.layer_scale=0: hand on the run itself")
    arguments = timm_sizes(settings, image_size, settings["feed_forward_width"])
    arguments |= {"num_reg_tokens": settings["registers"]}
    if settings["feed_forward"] == "swiglu":
        arguments |= {"swiglu_mlp": True, "swiglu_align_to": 1}  # of unpacked halves, of any width
    biased = settings.get("qkv_bias", "all") != "none"
    return f"vit_small_patch16_dinov3{'_qkvb' if biased else ''}", arguments
