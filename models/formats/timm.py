"""timm's ``VisionTransformer``: our names, without a mask token, and with positions in one of three layouts.

    pos_embed             timm's setting                       example
    class, patches        no registers                         Prov-GigaPath, UNI, Virchow
    patches               no_embed_class                       DINOv2 with registers: the class token holds its position
    class, regs, patches  registers without no_embed_class     Virchow2

Read, the positions of registers are added to the registers; written, the class token absorbs its position where there
are registers. Both leave every feature as it was.
"""

import math
from typing import Any

import torch

from models.formats.published import PublishedWeights, Weights, require_dinov2s_parts
from models.vit import VisionTransformer


def read_timm(weights: Weights, *, heads: int | None = None, grid: int | None = None) -> PublishedWeights:
    """A timm state dict. ``grid`` is the position grid's side, needed only where the count of tokens leaves it open.

    Raises ValueError where the positions are no square grid, or could be two.
    """
    left_out = ["head"] if "head.weight" in weights else []
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith("head.")}
    if lacking := [name for name in ("cls_token", "pos_embed") if name not in weights]:
        raise ValueError(f"missing: {', '.join(lacking)}")
    positions = weights["pos_embed"]
    registers = weights["reg_token"].shape[1] if "reg_token" in weights else 0
    own = own_positions(positions.shape[1], registers, grid)
    zero = torch.zeros_like(weights["cls_token"])
    if own == 0:
        weights["pos_embed"] = torch.cat([zero, positions], dim=1)
    elif registers:
        weights["pos_embed"] = torch.cat([positions[:, :1], positions[:, own:]], dim=1)
        weights["reg_token"] = weights["reg_token"] + positions[:, 1:own]
    return PublishedWeights("timm", weights, heads, position_antialias=True, position_offset=0.0, left_out=left_out)


def own_positions(count: int, registers: int, grid: int | None) -> int:
    """How many of ``count`` positions belong to the class token and the registers: all of these, or none."""
    possible = [own for own in (0, 1 + registers) if count > own and math.isqrt(count - own) ** 2 == count - own]
    if grid is not None:
        possible = [own for own in possible if count - own == grid**2]
    if not possible:
        raise ValueError(f"its {count} positions are no square grid")
    if len(possible) > 1:
        raise ValueError(f"its {count} positions fit two grids, with and without positions of {registers} registers")
    return possible[0]


def write_timm(network: VisionTransformer, image_size: int) -> Weights:
    """A network's weights for timm, with the position grid of ``image_size`` resampled as the network itself does
    it. Raises ValueError for parts that timm's ``VisionTransformer`` hasn't."""
    require_dinov2s_parts(network, "timm's VisionTransformer")
    weights = {name: tensor.detach() for name, tensor in network.state_dict().items() if name != "mask_token"}
    grid = image_size // network.patch_size
    with torch.no_grad():
        cls, patches = network.positions(grid, grid)
        if "reg_token" in weights:
            weights["cls_token"] = weights["cls_token"] + cls
            weights["pos_embed"] = patches
        else:
            weights["pos_embed"] = torch.cat([cls, patches], dim=1)
    return {name: tensor.contiguous().clone() for name, tensor in weights.items()}


def timm_sizes(settings: dict[str, Any], image_size: int, hidden: int) -> dict[str, Any]:
    """The arguments that timm's ViTs of every family have in common; ``hidden``: the width between a feed-forward's two
    maps, as timm counts it."""
    width = settings["width"]
    ratio = hidden / width
    if int(width * ratio) != hidden:  # timm truncates; half a unit more survives it
        ratio = (hidden + 0.5) / width
    return {
        "img_size": image_size,
        "patch_size": settings["patch_size"],
        "embed_dim": width,
        "depth": settings["depth"],
        "num_heads": settings["heads"],
        "mlp_ratio": ratio,
        "init_values": settings["layer_scale"] or None,
        "num_classes": 0,
        "global_pool": "token",
    }


def architecture(settings: dict[str, Any], image_size: int) -> tuple[str, dict[str, Any]]:
    """timm's architecture name and its arguments for one of our vision transformers.

    timm registers functions, not sizes: the two ``dinov2`` families differ in the feed-forward, and ``reg4`` in where
    the class token's position lives; ``model_args`` set every size.
    """
    hidden, registers = settings["feed_forward_width"], settings["registers"]
    swiglu = settings["feed_forward"] == "swiglu"
    inner = 2 * hidden if swiglu else hidden  # timm counts both halves of SwiGLU's packed layer
    arguments = timm_sizes(settings, image_size, inner)
    if registers:
        arguments["reg_tokens"] = registers
    family = "giant" if swiglu else "base"
    return f"vit_{family}_patch14_{'reg4_' if registers else ''}dinov2", arguments
