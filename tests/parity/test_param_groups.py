"""Learning-rate and weight-decay multipliers of DINOv2's parameter groups."""

import json
from pathlib import Path

import torch

from models.vit import VisionTransformer
from pretrain.training.optimisation import multipliers


def test_multipliers_equal_the_reference_exactly(goldens: Path) -> None:
    golden = json.loads((goldens / "dinov2_param_groups.json").read_text())
    depth, groups = golden["depth"], golden["groups"]
    swiglu = "blocks.0.mlp.w12.weight" in groups
    with torch.device("meta"):
        vit = VisionTransformer(
            image_size=32,
            patch_size=8,
            width=24,
            depth=depth,
            heads=3,
            feed_forward="swiglu" if swiglu else "mlp",
            feed_forward_width=48,
            registers=4 if "register_tokens" in groups else 0,
            layer_scale=1e-5 if "blocks.0.ls1.gamma" in groups else 0.0,
        )
    found = {
        name: multipliers(name, parameter.ndim, depth, golden["layerwise_decay"], golden["patch_embed_lr_mult"])
        for name, parameter in vit.named_parameters()
    }
    ours = {
        theirs: theirs.replace("register_tokens", "reg_token").replace("w12", "fc1").replace("w3", "fc2")
        for theirs in groups
    }
    assert sorted(ours.values()) == sorted(found)
    for theirs, expected in groups.items():
        kind = found[ours[theirs]]
        assert (kind.lr, kind.weight_decay, kind.last_layer) == (
            expected["lr_mult"],
            expected["wd_mult"],
            expected["is_last_layer"],
        ), theirs
