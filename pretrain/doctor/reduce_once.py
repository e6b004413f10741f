"""One process of `pretrain.doctor.machine.all_reduce`: ``python -m pretrain.doctor.reduce_once RANK WORLD BACKEND
MEETING SECONDS``."""

import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from pretrain.doctor.machine import VALUES


def main() -> None:
    """Join the others, add up, and print ``sum <sum> <seconds of one all-reduce>``."""
    rank, world, backend, meeting, seconds = sys.argv[1:]
    device = torch.device("cuda", int(rank)) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=float(seconds))
    dist.init_process_group(backend, init_method=meeting, rank=int(rank), world_size=int(world), timeout=timeout)
    value = torch.full((VALUES[backend],), float(int(rank) + 1), device=device)
    dist.all_reduce(value)
    total = int(value.mean().item())
    began = time.monotonic()
    for _ in range(3):
        dist.all_reduce(value)
    value[0].item()  # waits for the device
    print(f"sum {total} {(time.monotonic() - began) / 3}", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
