"""What a GPU's memory holds beside a run's tensors, by name. None of it was measured here."""

from collections.abc import Iterable

from pretrain.plan.collectives import Collective

MIB = 2**20
CONTEXT = 600 * MIB
"""Assumed: driver and kernels, which CUDA loads as they are used: some 300 MB for a small network on a smaller GPU
(pytorch/pytorch#107667), and 1.06 GB on an H100 with what NCCL starts with (pytorch's, in NVIDIA/nccl#1685)."""

CHANNELS = 32
"""Of a group, at most: what NVIDIA/nccl#1685 counts on eight H100."""

BUFFERS = (10 + 2) * MIB
"""Of a channel: NCCL's receiving buffer, 4 MiB of large messages, 4.7 and 0.5 of small ones, and its sending one, as
#1685 lists their allocations. A ring has one of each, whatever its length (NCCL's authors in #986)."""

CUBLAS = 2 * 32 * MIB
"""A workspace for forward and one for backward, whose thread is another: torch's ``CublasHandlePool.cpp`` says 32 MiB
for Hopper and Blackwell, and a quarter of it for GPUs before."""


def gpu_overhead(calls: Iterable[Collective], processes: int, workspace: int) -> dict[str, int]:
    """Bytes by name, of a process whose step makes these ``calls``, and whose attention needs a ``workspace``.

    NCCL has buffers for each group; that of all processes is there for a run's figures, whatever a step calls. What is
    computed of the last one is attention's; cuBLAS takes what torch gives it."""
    groups = {call.ranks for call in calls if len(call.ranks) > 1}
    groups |= {tuple(range(processes))} if processes > 1 else set()
    return {
        "CUDA's context (assumed)": CONTEXT,
        **({f"NCCL's buffers, groups: {len(groups)} (assumed)": len(groups) * CHANNELS * BUFFERS} if groups else {}),
        "workspaces of cuBLAS and attention": CUBLAS + workspace,
    }
