"""One process of a test: load the newest checkpoint, check every number in it, change all of them, save beside
training.

    RANK=… WORLD_SIZE=… python sharded_saving.py FOLDER STEP REPLICAS

Every value is a function of its place and of the step, so that each process can tell what the whole must be.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from pretrain.run import checkpoints
from pretrain.run.saving import Saver


def fill(model: nn.Module, optimiser: torch.optim.Optimizer, step: int) -> None:
    for number, parameter in enumerate(model.parameters()):
        state = optimiser.state[parameter]
        for offset, tensor in ((0, parameter), (0.25, state["exp_avg"]), (0.5, state["exp_avg_sq"])):
            whole = torch.arange(parameter.numel()).view(parameter.shape) + number + offset + 1000 * step
            with torch.no_grad():
                tensor.copy_(
                    torch.distributed.tensor.distribute_tensor(whole.float(), tensor.device_mesh, tensor.placements)
                )


def values(model: nn.Module, optimiser: torch.optim.Optimizer) -> list[Tensor]:
    tensors = [
        tensor
        for parameter in model.parameters()
        for tensor in (parameter, *(optimiser.state[parameter][name] for name in ("exp_avg", "exp_avg_sq")))
    ]
    return [tensor.full_tensor().detach().clone() for tensor in tensors]


def main() -> None:
    folder, step, replicas = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    world = int(os.environ["WORLD_SIZE"])
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous-{step}", rank=int(os.environ["RANK"]), world_size=world
    )
    shape, names = ((world,), ("shard",)) if replicas == 1 else ((replicas, world // replicas), ("replicate", "shard"))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 257, bias=False))  # which no number of processes divides evenly
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimiser = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.ones(2, 7)).sum().backward()
    optimiser.step()
    if step:
        fill(model, optimiser, step - 1)
        wanted = values(model, optimiser)
        fill(model, optimiser, -1)
        checkpoints.restore(checkpoints.newest(folder), model, optimiser)  # type: ignore[arg-type]
        assert all(torch.equal(a, b) for a, b in zip(values(model, optimiser), wanted, strict=True))
    fill(model, optimiser, step)
    saver = Saver(folder, keep=1, milestones=None)
    saver.begin(step, model, optimiser, {})
    fill(model, optimiser, -1)
    assert saver.wait() is None and checkpoints.newest(folder).name == f"step-{step:08d}"  # type: ignore[union-attr]


if __name__ == "__main__":
    main()
