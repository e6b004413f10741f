"""How long training stands still for a checkpoint: written beside it, against written while it waits.

    python tests/bench/checkpoint.py [folder]

A student of 24 million parameters with AdamW and its teacher, sharded as in training: 385 MB a checkpoint. Steps
alternate with saves of both kinds, on the same disk. Ends with one JSON line: medians in seconds of ``step``,
``waiting`` (a save that training waits for) and ``beside`` (the stall of one that is written beside it); ``ratio``,
beside over waiting; ``first_beside``, which also takes the memory of the copy; ``slowdown``, what the steps taken
during one such write lost to it; and ``megabytes`` a checkpoint.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pretrain.run.checkpoints import newest, save
from pretrain.run.saving import Saver

WIDTH, BLOCKS, SAVES = 1000, 6, 7


class Block(nn.Module):
    """Four square matrices, as a transformer's block has twelve."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.nn.functional.gelu(layer(x))
        return x


def network() -> nn.Module:
    made = nn.Sequential(*[Block() for _ in range(BLOCKS)])
    for block in made:
        fully_shard(block)
    return fully_shard(made)


def step(model: nn.ModuleDict, optimiser: torch.optim.Optimizer, x: Tensor) -> float:
    """One step of a student and of the teacher's moving average; seconds."""
    began = time.perf_counter()
    optimiser.zero_grad()
    (model["student"](x) - model["teacher"](x).detach()).square().mean().backward()
    optimiser.step()
    for mine, other in zip(model["teacher"].parameters(), model["student"].parameters(), strict=True):
        mine.to_local().lerp_(other.detach().to_local(), 0.01)
    return time.perf_counter() - began


def main() -> None:
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if sys.argv[1:] else None, prefix="bench-checkpoint-") as name:
        run = Path(name)
        dist.init_process_group("gloo", init_method=f"file://{run}/rendezvous", rank=0, world_size=1)
        torch.manual_seed(0)
        model = nn.ModuleDict({"student": network(), "teacher": network()})
        model["teacher"].requires_grad_(False)
        optimiser = torch.optim.AdamW(model["student"].parameters(), lr=1e-4, fused=True)
        x = torch.randn(256, WIDTH)
        saver = Saver(run, keep=1, milestones=None)
        alone = [step(model, optimiser, x) for _ in range(5)][1:]
        waiting, beside, slowdown = [], [], []
        for number in range(SAVES):
            began = time.perf_counter()
            save(run, 2 * number, model, optimiser, {}, keep=1)
            waiting.append(time.perf_counter() - began)
            alone += [step(model, optimiser, x) for _ in range(3)]
            began = time.perf_counter()
            saver.begin(2 * number + 1, model, optimiser, {})
            beside.append(time.perf_counter() - began)
            during = []
            while saver.under_way and not saver.under_way[1].done():
                during.append(step(model, optimiser, x))
            assert saver.wait() is None
            slowdown.append(sum(during) - len(during) * statistics.median(alone))
            print(
                f"save {number + 1}/{SAVES}: {waiting[-1]:.3f} s waiting, {beside[-1]:.3f} s beside, over {len(during)}"
                " steps",
                flush=True,
            )
        checkpoint = newest(run)
        assert checkpoint is not None
        size = sum(file.stat().st_size for file in checkpoint.iterdir())
        dist.destroy_process_group()
    median = statistics.median
    figures = {
        "step": median(alone),
        "waiting": median(waiting),
        "beside": median(beside[1:]),
        "ratio": median(beside[1:]) / median(waiting),
        "first_beside": beside[0],
        "slowdown": median(slowdown),
        "megabytes": size / 1e6,
    }
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
