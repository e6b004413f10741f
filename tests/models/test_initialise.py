"""Initial values depend on (seed, name) alone, whole or sharded."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from models.heads import PrototypeHead
from models.initialise import initialise, networks
from models.vit import VisionTransformer

ROOT = Path(__file__).resolve().parents[2]


def vit(depth: int = 2, **settings: object) -> VisionTransformer:
    return VisionTransformer(
        image_size=32, patch_size=8, width=24, depth=depth, heads=3, feed_forward_width=48, **settings
    )  # type: ignore[arg-type]


def filled(root: nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    initialise(root, seed)
    return root.state_dict()


def test_the_same_seed_gives_the_same_values_whatever_torch_drew_before() -> None:
    one = filled(vit())
    torch.manual_seed(99)
    torch.rand(7)
    other = filled(vit())
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_another_part_or_another_size_moves_no_other_value() -> None:
    small, large = filled(vit(2)), filled(vit(4, registers=3))
    assert all(torch.equal(value, large[name]) for name, value in small.items())


def test_another_seed_and_another_name_give_other_values() -> None:
    one, other = filled(vit()), filled(vit(), seed=1)
    assert not torch.equal(one["blocks.0.attn.qkv.weight"], other["blocks.0.attn.qkv.weight"])
    assert not torch.equal(one["blocks.0.attn.qkv.weight"], one["blocks.1.attn.qkv.weight"])


def test_two_networks_of_one_shape_start_apart() -> None:
    heads = nn.ModuleDict(
        {
            name: PrototypeHead(8, prototypes=12, bottleneck=5, hidden=16, layers=3)
            for name in ("dino_head", "ibot_head")
        }
    )
    state = filled(heads)
    assert not torch.equal(state["dino_head.mlp.0.weight"], state["ibot_head.mlp.0.weight"])


def test_distributions_are_dinov2s() -> None:
    state = filled(
        VisionTransformer(
            image_size=64,
            patch_size=8,
            width=128,
            depth=1,
            heads=2,
            feed_forward_width=256,
            registers=4,
            layer_scale=1e-5,
        )
    )
    weight = state["blocks.0.attn.qkv.weight"]
    assert abs(weight.std() - 0.02) < 5e-4 and abs(weight.mean()) < 3e-4
    assert state["patch_embed.proj.weight"].abs().max() <= (3 * 64) ** -0.5
    assert abs(state["patch_embed.proj.weight"].std() - (3 * 64) ** -0.5 / 3**0.5) < 1e-3
    assert 0 < state["cls_token"].abs().max() < 1e-5 and 0 < state["reg_token"].abs().max() < 1e-5
    assert not state["mask_token"].any() and not state["blocks.0.attn.qkv.bias"].any()
    assert (state["blocks.0.ls1.gamma"] == 1e-5).all() and (state["norm.weight"] == 1).all()


def test_a_parameter_outside_every_network_is_refused_by_name() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = vit()
            self.scale = nn.Parameter(torch.empty(1))

    with pytest.raises(ValueError, match="'scale'"):
        initialise(Root(), 0)


def test_a_network_without_initialise_is_refused_by_name() -> None:
    root = nn.ModuleDict({"encoder": vit(), "extra": nn.Linear(2, 2)})
    assert [name for name, _ in networks(root)] == ["encoder"]
    with pytest.raises(ValueError, match=r"'extra\.bias' .*2 such"):
        initialise(root, 0)


def test_a_name_that_a_network_does_not_know_is_refused() -> None:
    encoder = vit()
    encoder.register_parameter("surprise", nn.Parameter(torch.empty(3)))
    with pytest.raises(KeyError, match="surprise"):
        initialise(encoder, 0)


SHARDED = """
import sys, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from models.initialise import initialise
from models.vit import VisionTransformer
mesh = init_device_mesh("cpu", (2,))
with torch.device("meta"):
    vit = VisionTransformer(image_size=32, patch_size=8, width=24, depth=2, heads=3, feed_forward_width=48)
for block in vit.blocks:
    fully_shard(block, mesh=mesh)
fully_shard(vit, mesh=mesh)
vit.to_empty(device="cpu")
initialise(vit, 5)
whole = {name: value.full_tensor() for name, value in vit.state_dict().items()}
if dist.get_rank() == 0:
    torch.save(whole, sys.argv[1])
dist.barrier()
"""


def test_shards_of_two_processes_hold_the_values_of_one(tmp_path: Path) -> None:
    port = str(20000 + hash(tmp_path.name) % 20000)
    environment = {
        "PYTHONPATH": str(ROOT),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", SHARDED, str(tmp_path / "whole.pt")]
    processes = [
        subprocess.Popen(command, env=environment | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert (tmp_path / "whole.pt").exists(), errors
    alone = filled(vit(), seed=5)
    whole = torch.load(tmp_path / "whole.pt", weights_only=True)
    assert whole.keys() == alone.keys()
    assert all(torch.equal(whole[name], alone[name]) for name in alone)
