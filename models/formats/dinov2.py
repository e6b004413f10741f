"""Checkpoints of facebookresearch/dinov2 and what was trained with it.

theirs                       ours
register_tokens              reg_token
blocks.2.7.… (chunks)        blocks.7.…: the second number is the block's own
mlp.w12, mlp.w3 (SwiGLU)     mlp.fc1, mlp.fc2
everything else              the same name
"""

import re

from models.formats.published import PublishedWeights, Weights, require_dinov2s_parts
from models.vit import VisionTransformer

RELEASED_HEADS = {384: 6, 768: 12, 1024: 16, 1536: 24}  # by width; the published files don't say
REGISTERS = (("register_tokens", "reg_token"),)
DINOV2_SWIGLU = (("mlp.w12.", "mlp.fc1."), ("mlp.w3.", "mlp.fc2."))


def read_dinov2(weights: Weights) -> PublishedWeights:
    """A DINOv2 backbone's weights. Positions are resampled as its own code does it: see `models.formats`."""
    ours: Weights = {}
    for name, tensor in weights.items():
        name = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name)
        for theirs, mine in (*REGISTERS, *DINOV2_SWIGLU):
            name = name.replace(theirs, mine)
        ours[name] = tensor
    if lacking := [name for name in ("cls_token", "pos_embed") if name not in ours]:
        raise ValueError(f"missing: {', '.join(lacking)}")
    registers = "reg_token" in ours
    heads = RELEASED_HEADS.get(ours["cls_token"].shape[-1])
    return PublishedWeights(
        "DINOv2", ours, heads, position_antialias=registers, position_offset=0.0 if registers else 0.1
    )


def write_dinov2(network: VisionTransformer) -> Weights:
    """A network's weights under DINOv2's names, unchunked, positions on the network's own grid. Raises ValueError for
    parts that it hasn't."""
    require_dinov2s_parts(network, "DINOv2")
    pairs = (*REGISTERS, *DINOV2_SWIGLU) if network.feed_forward == "swiglu" else REGISTERS
    theirs: Weights = {}
    for name, tensor in network.state_dict().items():
        for other, mine in pairs:
            name = name.replace(mine, other)
        theirs[name] = tensor.detach().contiguous().clone()
    return theirs
