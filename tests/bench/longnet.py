"""What dilated attention costs: against the padded formulation, the bare kernel, its own FLOPs, and with a million
tokens.

    python tests/bench/longnet.py                  2 threads, eight minutes on two quiet cores, 18 GiB of memory
    python tests/bench/longnet.py THREADS=4

Attention of the released slide encoder (16 heads of 48, its schedule) in float32, forward and backward, on one slide of
random numbers; then one whole layer forward. Times are processor seconds of this process, not of the clock, the least
of some rounds in which the ways take turns; still, other work on the same cores spoils the caches, which is said when
there is some. Memory is the growth of the resident set's peak in a process of its own (Linux), beyond what the inputs
take.

    time_ratio_16k       forward + backward over the padded formulation's, at 16,384 tokens, same kernel
    memory_ratio_16k     the same for memory: output, gradients and everything in between
    over_kernel_16k      forward + backward over the bare kernel's on the same runs of tokens, each contiguous
    growth_64k_over_16k  forward + backward at 65,536 tokens over 16,384
    forward_1m_gib       peak of the whole process while 1,000,000 tokens go through one layer, 768 wide
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

# Before torch loads OpenMP: a thread that waits for another then sleeps. It would spin, and on a busy machine processor
# seconds would count the waiting: the more calls a way makes, the more of it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from padded_dilated_attention import padded_dilated_attention
from torch import Tensor

from models.attention_statistics import stock, stock_backward
from models.dilated_attention import Branch, dilated_attention, lay_out
from models.longnet import Layer, LayerSettings
from models.sequence_parallel import TokenShare

HEADS, HEAD_WIDTH, FEED_FORWARD = 16, 48, 3072
SEGMENTS, RATIOS = (1024, 5792, 32768, 185360, 1048576), (1, 2, 4, 8, 16)
SHORT, LONG, LONGEST = 16_384, 65_536, 1_000_000
ROUNDS = 6
GIB = 2**30


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return dilated_attention(q, k, v, [len(q)], SEGMENTS, RATIOS)


def padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return padded_dilated_attention(q, k, v, SEGMENTS, RATIOS)


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"exact": exact, "padded": padded}


def inputs(tokens: int) -> tuple[list[Tensor], Tensor]:
    """q, k, v and the gradient of the output, (tokens, heads, head_width) each."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(tokens, HEADS, HEAD_WIDTH, generator=generator) for _ in range(4))
    return [x.requires_grad_() for x in (q, k, v)], grad


def branches(tokens: int) -> list[Branch]:
    return [
        lay_out((tokens,), w, r, range(HEADS), HEADS, HEAD_WIDTH, torch.device("cpu"))
        for w, r in zip(SEGMENTS, RATIOS, strict=True)
    ]


def forward_flops(tokens: int) -> float:
    """Of q·kᵀ and its product with v, over all runs; the backward has five products for these two."""
    return sum(
        4.0 * runs * branch.unit * length**2 * HEAD_WIDTH
        for branch in branches(tokens)
        for call in branch.calls
        for runs, length in call.shapes
    )


def seconds(work: Callable[[], object]) -> float:
    """Processor seconds, of all threads."""
    began = time.process_time()
    work()
    return time.process_time() - began


def step(way: Callable[[Tensor, Tensor, Tensor], Tensor], tokens: int) -> Callable[[], object]:
    qkv, grad = inputs(tokens)
    return lambda: torch.autograd.grad(way(*qkv), qkv, grad)


def bare_kernel(tokens: int) -> Callable[[], None]:
    """The kernel alone, forward and backward, on runs of the same numbers and lengths, each contiguous in memory."""
    runs = [
        [torch.randn(runs, branch.unit, length, HEAD_WIDTH) for _ in range(4)]
        for branch in branches(tokens)
        for call in branch.calls
        for runs, length in call.shapes
    ]

    def work() -> None:
        for q, k, v, grad in runs:
            stock_backward(grad, q, k, v, *stock(q, k, v))

    return work


def product_rate() -> float:
    """FLOPs a processor second of one float32 matrix product of 2048 × 2048: the best of some."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    return max(2 * 2048**3 / seconds(lambda: a @ b) for _ in range(10))


def least(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Processor seconds of each way at their least over the rounds, in which they take turns: other work only ever adds
    to them."""
    taken = [{name: seconds(work) for name, work in ways.items()} for _ in range(rounds)]
    return {name: min(each[name] for each in taken) for name in ways}


def measure_growth() -> float:
    """The long step over the mean of short ones before and after it."""
    short, long = step(exact, SHORT), step(exact, LONG)
    before, spent, after = seconds(short), seconds(long), seconds(short)
    return 2 * spent / (before + after)


def resident(peak: bool) -> int:
    """This process's resident bytes, now or at most so far."""
    name = "VmHWM" if peak else "VmRSS"
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


def child(way: str) -> None:
    """What a process of its own measures: prints bytes, and for the longest slide also seconds."""
    if way == "layer":
        layer = Layer(LayerSettings(HEADS * HEAD_WIDTH, HEADS, FEED_FORWARD, SEGMENTS, RATIOS), 0)
        x = torch.randn(LONGEST, HEADS * HEAD_WIDTH)
        with torch.inference_mode():
            spent = seconds(lambda: layer(x, TokenShare((LONGEST,)), None))
        print(json.dumps({"bytes": resident(peak=True), "seconds": spent}))
        return
    step(WAYS[way], 512)()  # libraries, threads and their buffers
    work = step(WAYS[way], SHORT)
    before = resident(peak=False)
    work()
    print(json.dumps({"bytes": resident(peak=True) - before}))


def in_child(way: str, threads: int) -> dict[str, float]:
    command = [sys.executable, __file__, f"THREADS={threads}", f"CHILD={way}"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    threads, busy = int(given.get("THREADS", 2)), os.getloadavg()[0]
    torch.set_num_threads(threads)
    if way := given.get("CHILD"):
        return child(way)
    memory = {name: in_child(name, threads)["bytes"] for name in WAYS}
    print(f"extra memory at {SHORT:,} tokens: " + ", ".join(f"{k} {v / 2**20:.0f} MiB" for k, v in memory.items()))
    spent = least({name: step(way, SHORT) for name, way in WAYS.items()} | {"kernel": bare_kernel(SHORT)}, ROUNDS)
    floor = 3.5 * forward_flops(SHORT) / product_rate()
    print(f"processor seconds forward + backward at {SHORT:,} tokens: ", end="")
    print(", ".join(f"{name} {value:.2f}" for name, value in spent.items()))
    print(
        f"floor, the FLOPs at this machine's rate of large products: {floor:.2f} s; exact is at"
        f" {spent['exact'] / floor:.2f} × it"
    )
    growth = measure_growth()
    print(
        f"{LONG:,} over {SHORT:,} tokens: {growth:.2f} × (the FLOPs:"
        f" {forward_flops(LONG) / forward_flops(SHORT):.2f} ×)"
    )
    layer = in_child("layer", threads)
    print(
        f"{LONGEST:,} tokens through one layer: {layer['bytes'] / GIB:.1f} GiB, {layer['seconds']:.0f} processor"
        " seconds"
    )
    if busy > threads / 2:
        print(f"other work kept {busy:.1f} cores busy when this began: these figures are less sharp")
    figures = {
        "time_ratio_16k": spent["exact"] / spent["padded"],
        "memory_ratio_16k": memory["exact"] / memory["padded"],
        "over_kernel_16k": spent["exact"] / spent["kernel"],
        "growth_64k_over_16k": growth,
        "forward_1m_gib": layer["bytes"] / GIB,
    }
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
