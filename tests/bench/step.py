"""A DINOv2 step by count: what a GPU would be given to do, and what its host would do for it, without a GPU.

    python tests/bench/step.py              ViT-L with 64 tiles, ViT-g with 48: a minute

Forward and backward of the recipe's objective are run on torch's fake tensors, in bfloat16 as FSDP gives it, with the
attention of a GPU. Counted are

    operators            calls of operators that compute, a kernel or more each, views left out
    gigabytes            read and written by those that are no matrix product and no attention, uncompiled
    widths               saved for the backward by a block, in bfloat16 numbers a kept token, over the network's width
    optimiser_and_ema    host milliseconds of AdamW and the teacher's average for as many parameters as the recipe's, up
                         to the two calls that start kernels, on one process's shards and this machine's processor
    clip                 the same of clipping gradients, this processor's kernels for one row a parameter included
    operator_us          host microseconds of an operator of forward and backward, in one process's units of FSDP, of
                         networks so narrow that there is next to nothing to compute: what 'pretrain plan' supposes
"""

import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.objectives.interface import Moment
from pretrain.objectives.teacher import ema_update
from pretrain.plan.kernels import bytes_moved, starts_kernels
from pretrain.plan.rehearsal import as_on_a_gpu
from pretrain.training.adamw import ShardAdamW
from pretrain.training.gradients import gradients
from pretrain.training.optimisation import clip
from pretrain.training.sharding import lay_mesh, materialise, shard, units_of
from tests.pretrain.training.real_steps import filled, one_process, shape_of

NETWORKS = {"vitl": ("dinov2_vitl16_short", 64), "vitg": ("openmidnight", 48)}


class Counted(TorchDispatchMode):
    """Operators, and the bytes of those that are no product."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = 0
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if starts_kernels(function):
            self.operators += 1
            self.bytes[function._overloadpacket.__name__] += bytes_moved(function, args, kwargs, result)
        return result


def counts(recipe: str, tiles: int) -> dict[str, float]:
    """Operators, gigabytes and widths of a micro-batch's forward and backward."""
    shape = shape_of(f"recipe={recipe}")[0]
    with torch.device("meta"):
        objective: Any = shape.build()().to(torch.bfloat16)
    widths: list[float] = []
    with as_on_a_gpu(objective), FakeTensorMode(allow_non_fake_inputs=True):
        objective.to_empty(device="cpu")
        batch = shape.batch(shape.data.batch_size // tiles, 1).make()
        batch.crops = [(images.bfloat16(), views) for images, views in batch.crops]
        block = units_of(objective.trained()["encoder"])[1]
        block.forward = saving(block.forward, widths, objective.trained()["encoder"].width)
        with Counted() as counted:
            objective.loss(batch, Moment(0, 1, 0))[0].backward()
    return {
        "operators": counted.operators,
        "gigabytes": round(sum(counted.bytes.values()) / 1e9, 1),
        "widths": round(widths[-1], 2),
    } | {"most": {name: round(size / 1e9, 1) for name, size in counted.bytes.most_common(8)}}


def saving(forward: Any, widths: list[float], width: int) -> Any:
    """A block's ``forward`` that notes what it saves, parameters and its input left out."""

    def noting(x: Tensor, shapes: Any, kept: Any = None, wanted: Any = None) -> Tensor:
        storages: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.is_floating_point() and not isinstance(tensor, torch.nn.Parameter) and tensor.numel() > 10**6:
                storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            held.append(tensor)  # or another storage takes its place
            return tensor

        held: list[Tensor] = []
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            result = forward(x, shapes, kept, wanted)
        tokens = len(x) if kept is None else len(kept[0].rows)
        if wanted is None:
            widths.append(sum(storages.values()) / 2 / tokens / width)
        return result

    return noting


def host_milliseconds(recipe: str) -> dict[str, float]:
    """Of clipping, and of AdamW and the average without their kernels, for the recipe's parameters with one row each, on
    the shards of one process."""
    shape = shape_of(f"recipe={recipe}", *NARROW)[0]
    with torch.device("meta"):
        objective: Any = shape.build()()
    shard(objective, lay_mesh("cpu", 1, None), "float32")
    objective.to_empty(device="cpu")
    networks = list(objective.trained().values())
    parameters = [one for network in networks for one in network.parameters() if one.requires_grad]
    optimiser = ShardAdamW(parameters, lr=1e-4, fused=True)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()  # makes its moments

    def timed(work: Callable[[], object]) -> float:
        times = []
        for _ in range(20):
            began = time.process_time()
            work()
            times.append((time.process_time() - began) * 1e3)
        return median(times)

    found = {"clip_ms": timed(lambda: [clip(network.parameters(), 3.0) for network in networks])}
    with (
        mock.patch.object(torch, "_fused_adamw_", lambda *_, **__: None),
        mock.patch.object(torch, "_foreach_lerp_", lambda *_, **__: None),
    ):
        averaged = timed(lambda: ema_update(objective.student, objective.teacher, 0.99))
        found["optimiser_and_ema_ms"] = timed(optimiser.step) + averaged
    return {name: round(value, 2) for name, value in found.items()}


def operator_microseconds(recipe: str) -> float:
    """Of a step of the recipe's networks, a few numbers wide, on crops of two tiles, of a patch or four each."""
    patch = shape_of(f"recipe={recipe}")[0].model["patch_size"]
    small = [f"data.crops.global_size={2 * patch}", f"data.crops.local_size={patch}", "objective.group_size=2"]
    shape = shape_of(f"recipe={recipe}", *NARROW, *small)[0]
    with torch.device("meta"):
        objective: Any = shape.build()()
    shard(objective, lay_mesh("cpu", 1, None), "bf16")
    materialise(objective, torch.device("cpu"), 0, make_objective=shape.build())
    planned = shape.batch(1, shape.data.batch_size // objective.group_size)
    parts = [(filled(planned.make(), planned.true), 0)]

    def step() -> float:
        began = time.process_time()
        gradients(objective, parts, Moment(0, 1, 0), lambda loss: loss.backward())
        return time.process_time() - began

    with Counted() as counted:
        step()
    return round(min(step() for _ in range(5)) / counted.operators * 1e6, 1)


NARROW = [
    "model.width=8",
    "model.heads=1",
    "model.feed_forward_width=8",
    "objective.prototypes=8",
    "objective.hidden=8",
    "objective.bottleneck=8",
]


def main() -> None:
    torch.set_num_threads(1)
    line = {}
    for name, (recipe, tiles) in NETWORKS.items():
        found = counts(recipe, tiles)
        print(f"{name}: {found}", flush=True)
        del found["most"]
        line |= {f"{name}_{what}": value for what, value in found.items()}
        with one_process():
            line |= {f"{name}_{what}": value for what, value in host_milliseconds(recipe).items()}
            line[f"{name}_operator_us"] = operator_microseconds(recipe)
    print(json.dumps(line))


if __name__ == "__main__":
    main()
