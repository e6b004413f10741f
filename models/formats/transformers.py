"""transformers' ``Dinov2Model`` and ``Dinov2WithRegistersModel``, as their folders hold them.

    theirs (in files)                             ours
    embeddings.cls_token, mask_token              cls_token, mask_token
    embeddings.register_tokens                    reg_token
    embeddings.position_embeddings                pos_embed
    embeddings.patch_embeddings.projection        patch_embed.proj
    encoder.layer.7.norm1, norm2                  blocks.7.norm1, norm2
    ….attention.attention.query, key, value       ….attn.qkv: the three, one above the other
    ….attention.output.dense                      ….attn.proj
    ….layer_scale1.lambda1, layer_scale2.lambda1  ….ls1.gamma, ls2.gamma
    ….mlp.fc1, fc2                                ….mlp.fc1, fc2
    ….mlp.weights_in, weights_out (SwiGLU)        ….mlp.fc1, fc2
    layernorm                                     norm

In memory, version 5 calls some of them otherwise (``attention.q_proj``, ``mlp.gate_proj`` and ``up_proj`` for the
halves of ``weights_in``); those are read too, and the names in files are written: every version loads them.
"""

import re
from typing import Any

import torch

from models.formats.published import PublishedWeights, Weights, require_dinov2s_parts
from models.vit import VisionTransformer

PREFIXES = ("dinov2.", "dinov2_with_registers.")  # of a model with a head on top
MODELS = {"dinov2": "Dinov2Model", "dinov2_with_registers": "Dinov2WithRegistersModel"}
TRANSFORMERS_NAMES = (
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.mask_token", "mask_token"),
    ("embeddings.register_tokens", "reg_token"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.patch_embeddings.projection.", "patch_embed.proj."),
    ("encoder.layer.", "blocks."),
    (".attention.output.dense.", ".attn.proj."),
    (".layer_scale1.lambda1", ".ls1.gamma"),
    (".layer_scale2.lambda1", ".ls2.gamma"),
    ("layernorm.", "norm."),
)
TRANSFORMERS_SWIGLU = ((".mlp.weights_in.", ".mlp.fc1."), (".mlp.weights_out.", ".mlp.fc2."))
IN_MEMORY = (
    (".attention.q_proj.", ".attention.attention.query."),
    (".attention.k_proj.", ".attention.attention.key."),
    (".attention.v_proj.", ".attention.attention.value."),
    (".attention.o_proj.", ".attention.output.dense."),
    (".mlp.down_proj.", ".mlp.weights_out."),
)
THREE = ("query", "key", "value")


def read_transformers(weights: Weights, config: dict[str, Any]) -> PublishedWeights:
    """A folder's weights and its ``config.json``.

    Raises ValueError for a model of another kind, and for settings that would change what the weights compute.
    """
    kind = config.get("model_type")
    if kind not in MODELS:
        raise ValueError(f"its model_type is {kind!r}: only {' and '.join(MODELS)} are read, and dinov3_vit")
    for name, value in (("hidden_act", "gelu"), ("layer_norm_eps", 1e-6), ("qkv_bias", True)):
        if config.get(name, value) != value:
            raise ValueError(f"its {name} is {config[name]}, ours {value}")
    ours: Weights = {}
    parts: dict[str, Weights] = {}
    left_out = set()
    with_head = any(name.startswith(PREFIXES) for name in weights)
    for name, tensor in weights.items():
        if with_head and not name.startswith(PREFIXES):
            left_out.add(name.partition(".")[0])
            continue
        name = renamed(name.removeprefix(PREFIXES[0]).removeprefix(PREFIXES[1]), IN_MEMORY)
        packed = re.sub(r"\.attention\.attention\.(query|key|value)\.", ".attn.qkv.", name)
        packed = re.sub(r"\.mlp\.(gate_proj|up_proj)\.", ".mlp.fc1.", packed)
        if packed != name:
            parts.setdefault(packed, {})[name.split(".")[-2]] = tensor
        else:
            ours[renamed(name, (*TRANSFORMERS_NAMES, *TRANSFORMERS_SWIGLU))] = tensor
    for name, found in parts.items():
        order = THREE if ".attn.qkv." in name else ("gate_proj", "up_proj")
        if lacking := [part for part in order if part not in found]:
            raise ValueError(f"missing: {', '.join(lacking)} of {renamed(name, TRANSFORMERS_NAMES)}")
        ours[renamed(name, TRANSFORMERS_NAMES)] = torch.cat([found[part] for part in order])
    if lacking := [name for name in ("cls_token", "pos_embed") if name not in ours]:
        raise ValueError(f"missing: {', '.join(lacking)}")
    if "reg_token" in ours and not ours["reg_token"].shape[1]:
        del ours["reg_token"]
    registers = kind == "dinov2_with_registers"
    heads = int(config["num_attention_heads"])
    return PublishedWeights("transformers", ours, heads, registers, position_offset=0.0, left_out=sorted(left_out))


def write_transformers(network: VisionTransformer, image_size: int) -> Weights:
    """A network's weights for transformers, the position grid of ``image_size`` resampled as the network itself does
    it.

    Without layer scale, which transformers always has, it is written as ones. Raises ValueError for parts that its
    Dinov2 models haven't.
    """
    require_dinov2s_parts(network, "transformers' Dinov2Model")
    grid = image_size // network.patch_size
    with torch.no_grad():
        ours = network.state_dict() | {"pos_embed": torch.cat(network.positions(grid, grid), dim=1)}
    swiglu = TRANSFORMERS_SWIGLU if network.feed_forward == "swiglu" else ()
    back = [(mine, theirs) for theirs, mine in (*TRANSFORMERS_NAMES, *swiglu)]
    theirs: Weights = {}
    for name, tensor in ours.items():
        tensor = tensor.detach()
        if ".attn.qkv." in name:
            for part, third in zip(THREE, tensor.chunk(3), strict=True):
                theirs[renamed(name.replace(".attn.qkv.", f".attention.attention.{part}."), back)] = third
        else:
            theirs[renamed(name, back)] = tensor
    if not network.layer_scale:
        for block in range(len(network.blocks)):
            for scale in ("layer_scale1", "layer_scale2"):
                theirs[f"encoder.layer.{block}.{scale}.lambda1"] = torch.ones(network.width)
    return {name: tensor.contiguous().clone() for name, tensor in theirs.items()}


def config(settings: dict[str, Any], image_size: int) -> dict[str, Any]:
    """``config.json`` for one of our vision transformers.

    transformers knows the feed-forward's width only as a whole ratio of the model's, for SwiGLU two thirds of it
    rounded up to a multiple of 8. Raises ValueError for a width that no ratio gives.
    """
    width, hidden, registers = settings["width"], settings["feed_forward_width"], settings["registers"]
    swiglu = settings["feed_forward"] == "swiglu"
    ratio = next((r for r in range(1, 33) if (swiglu_width(width * r) if swiglu else width * r) == hidden), None)
    if ratio is None:
        raise ValueError(
            f"transformers has no mlp_ratio for feed_forward_width={hidden} at width={width}: export format=timm"
        )
    kind = "dinov2_with_registers" if registers else "dinov2"
    values: dict[str, Any] = {
        "architectures": [MODELS[kind]],
        "model_type": kind,
        "hidden_size": width,
        "num_hidden_layers": settings["depth"],
        "num_attention_heads": settings["heads"],
        "mlp_ratio": ratio,
        "use_swiglu_ffn": swiglu,
        "hidden_act": "gelu",
        "image_size": image_size,
        "patch_size": settings["patch_size"],
        "num_channels": 3,
        "qkv_bias": True,
        "layer_norm_eps": 1e-6,
        "layerscale_value": settings["layer_scale"] or 1.0,
        "dtype": "float32",
    }
    return values | ({"num_register_tokens": registers} if registers else {"use_mask_token": True})


def swiglu_width(hidden: int) -> int:
    """The width that transformers gives a SwiGLU feed-forward for an MLP's ``hidden``."""
    return (int(hidden * 2 / 3) + 7) // 8 * 8


def renamed(name: str, pairs: tuple[tuple[str, str], ...] | list[tuple[str, str]]) -> str:
    """``name`` with every first of a pair replaced by its second."""
    for old, new in pairs:
        name = name.replace(old, new)
    return name
