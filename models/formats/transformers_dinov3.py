"""transformers' ``DINOv3ViTModel``, as its folders hold it.

    theirs (in files)                          ours
    embeddings.cls_token                       cls_token
    embeddings.mask_token                      mask_token, of one dimension less
    embeddings.register_tokens                 reg_token
    embeddings.patch_embeddings                patch_embed.proj
    layer.7.norm1, norm2                       blocks.7.norm1, norm2
    ….attention.q_proj, k_proj, v_proj         ….attn.qkv: the three, one above the other; zeros for biases that lack
    ….attention.o_proj                         ….attn.proj
    ….layer_scale1.lambda1, layer_scale2.…     ….ls1.gamma, ls2.gamma
    ….mlp.up_proj, down_proj                   ….mlp.fc1, fc2
    ….mlp.gate_proj (SwiGLU)                   the upper half of ….mlp.fc1
    norm                                       norm

In memory, version 5 says ``model.layer``; that is read too.
"""

import re
from typing import Any

import torch
from torch import Tensor

from models.formats.published import QKV_BIAS, PublishedWeights, Weights
from models.formats.transformers import renamed
from models.rotary import BASE_PERIOD
from models.vit import VisionTransformer

MODEL_TYPE, MODEL_CLASS = "dinov3_vit", "DINOv3ViTModel"
DINOV3_TRANSFORMERS_NAMES = (
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.mask_token", "mask_token"),
    ("embeddings.register_tokens", "reg_token"),
    ("embeddings.patch_embeddings.", "patch_embed.proj."),
    ("layer.", "blocks."),
    (".attention.o_proj.", ".attn.proj."),
    (".layer_scale1.lambda1", ".ls1.gamma"),
    (".layer_scale2.lambda1", ".ls2.gamma"),
    (".mlp.down_proj.", ".mlp.fc2."),
)
PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def read_transformers_dinov3(weights: Weights, config: dict[str, Any]) -> PublishedWeights:
    """A folder's weights and its ``config.json``. Raises ValueError for settings that would change what the weights
    compute."""
    gated = bool(config.get("use_gated_mlp", False))
    held = {
        "hidden_act": "silu" if gated else "gelu",
        "rope_theta": BASE_PERIOD,
        "proj_bias": True,
        "mlp_bias": True,
    }
    rope = config.get("rope_parameters")  # where some versions keep it
    if isinstance(rope, dict) and "rope_theta" in rope:
        config = {"rope_theta": rope["rope_theta"]} | config
    for name, value in held.items():
        if config.get(name, "gelu" if name == "hidden_act" else value) != value:
            raise ValueError(f"its {name} is {config[name]}, ours {value}")
    ours: Weights = {}
    parts: dict[str, Weights] = {}
    for name, tensor in weights.items():
        name = re.sub(r"^model\.layer\.", "layer.", name)
        packed = re.sub(r"\.attention\.([qkv])_proj\.", ".attn.qkv.", name)
        packed = re.sub(r"\.mlp\.(gate_proj|up_proj)\.", ".mlp.fc1.", packed)
        if packed != name:
            parts.setdefault(renamed(packed, DINOV3_TRANSFORMERS_NAMES), {})[name.split(".")[-2]] = tensor
        else:
            ours[renamed(name, DINOV3_TRANSFORMERS_NAMES)] = tensor
    for name, found in parts.items():
        order = PROJECTIONS if ".attn.qkv." in name else ("gate_proj", "up_proj") if gated else ("up_proj",)
        if name.endswith(QKV_BIAS):
            zeros = torch.zeros_like(next(iter(found.values())))
            found = dict.fromkeys(order, zeros) | found
        if lacking := [part for part in order if part not in found]:
            raise ValueError(f"missing: {', '.join(lacking)} of {name}")
        ours[name] = torch.cat([found[part] for part in order])
    if "cls_token" not in ours:
        raise ValueError("missing: cls_token")
    if "mask_token" in ours:
        ours["mask_token"] = ours["mask_token"].reshape(1, -1)
    if "reg_token" in ours and not ours["reg_token"].shape[1]:
        del ours["reg_token"]
    heads, epsilon = int(config["num_attention_heads"]), float(config.get("layer_norm_eps", 1e-5))
    return PublishedWeights("transformers", ours, heads, norm_epsilon=epsilon)


def write_transformers_dinov3(network: VisionTransformer) -> Weights:
    """A network's weights for transformers. Without layer scale, which transformers always has, it is written as ones.

    Raises ValueError for class tokens' own norm, which transformers can't express.
    """
    if network.cls_norm is not None:
        raise ValueError("transformers' DINOv3 has no norm of class tokens' own: model.own_cls_norm can't be exported")
    back = [(mine, theirs) for theirs, mine in DINOV3_TRANSFORMERS_NAMES]
    theirs: Weights = {"embeddings.register_tokens": torch.zeros(1, 0, network.width)}
    for name, tensor in network.state_dict().items():
        if name.startswith("local_cls_norm."):
            continue
        for part, value in _parts_of(name, tensor.detach(), network):
            theirs[renamed(part, back)] = value.unsqueeze(0) if name == "mask_token" else value
    if not network.layer_scale:
        for block in range(len(network.blocks)):
            for scale in ("layer_scale1", "layer_scale2"):
                theirs[f"layer.{block}.{scale}.lambda1"] = torch.ones(network.width)
    return {name: tensor.contiguous().clone() for name, tensor in theirs.items()}


def _parts_of(name: str, tensor: Tensor, network: VisionTransformer) -> list[tuple[str, Tensor]]:
    """The tensors that transformers has for one of ours, under names whose ends are its own."""
    if ".attn.qkv." in name:
        thirds = zip(PROJECTIONS, tensor.chunk(3), strict=True)
        without = "k_proj" if name.endswith(QKV_BIAS) and network.qkv_bias == "no_key" else ""
        return [(name.replace(".attn.qkv.", f".attention.{part}."), x) for part, x in thirds if part != without]
    if ".mlp.fc1." in name:
        gated = network.feed_forward == "swiglu"
        halves = zip(("gate_proj", "up_proj"), tensor.chunk(2), strict=True) if gated else [("up_proj", tensor)]
        return [(name.replace(".mlp.fc1.", f".mlp.{part}."), x) for part, x in halves]
    return [(name, tensor)]


def dinov3_config(settings: dict[str, Any], image_size: int) -> dict[str, Any]:
    """``config.json`` for one of our vision transformers with rotary positions."""
    biases = settings.get("qkv_bias", "all")
    return {
        "architectures": [MODEL_CLASS],
        "model_type": MODEL_TYPE,
        "hidden_size": settings["width"],
        "intermediate_size": settings["feed_forward_width"],
        "num_hidden_layers": settings["depth"],
        "num_attention_heads": settings["heads"],
        "use_gated_mlp": settings["feed_forward"] == "swiglu",
        "hidden_act": "silu" if settings["feed_forward"] == "swiglu" else "gelu",
        "image_size": image_size,
        "patch_size": settings["patch_size"],
        "num_channels": 3,
        "num_register_tokens": settings["registers"],
        "query_bias": biases != "none",
        "key_bias": biases == "all",
        "value_bias": biases != "none",
        "proj_bias": True,
        "mlp_bias": True,
        "layer_norm_eps": settings.get("norm_epsilon", 1e-6),
        "layerscale_value": settings["layer_scale"] or 1.0,
        "rope_theta": BASE_PERIOD,
        "pos_embed_rescale": settings.get("position_rescale", 1.0),
        "dtype": "float32",
    }
