"""Checkpoints of facebookresearch/dinov3 and what was trained with it.

theirs                          ours
storage_tokens                  reg_token
mlp.w1, mlp.w2 (SwiGLU)         mlp.fc1: the two, one above the other
mlp.w3                          mlp.fc2
rope_embed.periods              not kept: computed (`models.rotary`)
attn.qkv.bias_mask              not kept: the biases that it leaves, zeros for keys
everything else                 the same name
"""

import re

import torch

from models.formats.published import QKV_BIAS, PublishedWeights, Weights, of_keys
from models.rotary import periods
from models.vit import VisionTransformer

PERIODS, BIAS_MASK = "rope_embed.periods", ".attn.qkv.bias_mask"
PERIOD_ROUNDING = 2**-8  # of bfloat16: released checkpoints keep periods that have been through it
SWIGLU_HALVES = {"w1": 0, "w2": 1}
DINOV3_NAMES = (("storage_tokens", "reg_token"), (".mlp.w3.", ".mlp.fc2."))


def is_dinov3(weights: Weights) -> bool:
    """Whether these are its names."""
    return PERIODS in weights or "storage_tokens" in weights


def read_dinov3(weights: Weights) -> PublishedWeights:
    """A DINOv3 backbone's weights. The epsilon of norms isn't among them, heads are told by the periods.

    Raises ValueError for angles other than ours, which are those of every released model, and for a bias mask that
    hides something else than keys.
    """
    if lacking := [name for name in ("cls_token", PERIODS) if name not in weights]:
        raise ValueError(f"missing: {', '.join(lacking)}")
    width, theirs = weights["cls_token"].shape[-1], weights[PERIODS].float()
    ours = periods(4 * len(theirs))
    if not torch.allclose(theirs, ours, rtol=PERIOD_ROUNDING):
        raise ValueError(f"its {PERIODS} aren't the powers of 100 that this network has")
    said = []
    if not torch.allclose(theirs, ours, rtol=1e-5):
        said.append("its rotary periods were rounded to bfloat16, and here they are exact: features differ a little")
    found: Weights = {}
    halves: dict[str, Weights] = {}
    for name, tensor in weights.items():
        if half := re.search(r"\.mlp\.(w1|w2)\.", name):
            halves.setdefault(name.replace(half.group(), ".mlp.fc1."), {})[half.group(1)] = tensor
        elif name != PERIODS and not name.endswith(BIAS_MASK):
            for other, mine in DINOV3_NAMES:
                name = name.replace(other, mine)
            found[name] = tensor
    for name, parts in halves.items():
        if lacking := [half for half in SWIGLU_HALVES if half not in parts]:
            raise ValueError(f"missing: {', '.join(lacking)} of {name}")
        found[name] = torch.cat([parts[half] for half in SWIGLU_HALVES])
    for name, mask in weights.items():
        if name.endswith(BIAS_MASK):
            bias = name.removesuffix("_mask")
            if bias not in found:
                raise ValueError(f"missing: {bias}")
            shown = torch.ones_like(mask)
            of_keys(shown).zero_()
            if not torch.equal(mask, shown):
                raise ValueError(f"{name} hides something else than the keys' third of the bias")
            found[bias] = torch.where(mask == 0, 0, found[bias])
    heads = width // (4 * len(theirs))
    return PublishedWeights("DINOv3", found, heads, norm_epsilon=None, said=said)


def write_dinov3(network: VisionTransformer) -> Weights:
    """A network's weights under DINOv3's names. Raises ValueError for one whose positions aren't rotary."""
    if network.position_embedding != "rope":
        raise ValueError(
            f"DINOv3 has rotary positions, and this network position_embedding={network.position_embedding}"
        )
    back = [(mine, other) for other, mine in (DINOV3_NAMES if network.feed_forward == "swiglu" else DINOV3_NAMES[:1])]
    theirs: Weights = {PERIODS: periods(network.width // network.heads)}
    for name, tensor in network.state_dict().items():
        if network.feed_forward == "swiglu" and ".mlp.fc1." in name:
            for half, part in zip(SWIGLU_HALVES, tensor.detach().chunk(2), strict=True):
                theirs[name.replace(".mlp.fc1.", f".mlp.{half}.")] = part
            continue
        if name.endswith(QKV_BIAS) and network.qkv_bias == "no_key":
            mask = torch.ones_like(tensor)
            of_keys(mask).zero_()
            theirs[f"{name}_mask"] = mask
        for mine, other in back:
            name = name.replace(mine, other)
        theirs[name] = tensor.detach()
    return {name: tensor.contiguous().clone() for name, tensor in theirs.items()}
