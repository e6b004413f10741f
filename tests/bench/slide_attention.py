"""What attention that falls with distance costs in blocks, beside the dense way, and with 100,000 tiles.

    python tests/bench/slide_attention.py           2 threads, two and a half minutes on two cores, 4 GiB of memory
    python tests/bench/slide_attention.py THREADS=4

Two heads of 64 in float32 on one slide, a square of tiles, forward and backward. The dense way makes the distances of
all pairs and each head's bias, and hands that to torch's attention as its mask. Every measurement is a process of its
own: memory is the growth of the resident set's peak (Linux) beyond what the inputs take, times are processor seconds.
Then a whole `SlideViT`, small (one block, 128 wide, two heads), embeds 100,000 tiles 1,536 wide without gradients: in
full, and with a reach of 8 cells.

    time_ratio_4k, _16k        forward + backward in blocks over the dense way's
    memory_ratio_4k, _16k      the same for memory
    memory_growth_16k_over_4k  of the blocks; tiles grow by 4
    time_growth_reach          forward + backward with a reach of 8 cells at 16,384 tiles over 4,096
    forward_100k_gib           peak of the whole process, in full
    forward_100k_seconds       its processor seconds
    forward_100k_reach_seconds the same with the reach
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from math import ceil, sqrt
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F
from longnet import resident
from torch import Tensor

from models.distance_attention import alibi_slopes, distance_attention, lay_out_tokens
from models.slide_vit import SlideViT

HEADS, HEAD_WIDTH, REACH = 2, 64, 8.0
SHORT, LONG, LONGEST = 4_096, 16_384, 100_000
GIB = 2**30

Way = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def square(tiles: int) -> Tensor:
    """The cells of a square of tiles, row by row."""
    side = ceil(sqrt(tiles))
    numbers = torch.arange(tiles)
    return torch.stack([numbers % side, numbers // side], dim=1)


def blocks(q: Tensor, k: Tensor, v: Tensor, cells: Tensor, reach: list[float] | None = None) -> Tensor:
    return distance_attention(q, k, v, lay_out_tokens(cells, [len(q)], 0, reach), alibi_slopes(HEADS))


def dense(q: Tensor, k: Tensor, v: Tensor, cells: Tensor) -> Tensor:
    places = cells.float()
    bias = -alibi_slopes(HEADS)[:, None, None] * torch.cdist(places, places)
    heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads_first, attn_mask=bias[None])[0].transpose(0, 1)


def within_reach(q: Tensor, k: Tensor, v: Tensor, cells: Tensor) -> Tensor:
    return blocks(q, k, v, cells, [REACH])


WAYS: dict[str, Way] = {"blocks": blocks, "dense": dense, "reach": within_reach}


def step(way: Way, tiles: int) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(tiles, HEADS, HEAD_WIDTH, generator=generator) for _ in range(4))
    qkv = [x.requires_grad_() for x in (q, k, v)]
    cells = square(tiles)
    return lambda: torch.autograd.grad(way(*qkv, cells), qkv, grad)


def embed(reach: list[float] | None) -> Callable[[], object]:
    network = SlideViT(
        1536, width=HEADS * HEAD_WIDTH, depth=1, heads=HEADS, feed_forward_width=4 * HEADS * HEAD_WIDTH, registers=4,
        slopes="fixed", reach=reach, dropout=0.0, drop_path=0.0,
    )  # fmt: skip
    tokens, cells = torch.randn(LONGEST, 1536), square(LONGEST)

    def work() -> object:
        with torch.inference_mode():
            return network(tokens, cells, [LONGEST], all_layers=True)

    return work


def child(name: str, tiles: int) -> None:
    """What a process of its own measures: prints its peak, how far that grew, and processor seconds."""
    if name in WAYS:
        step(WAYS[name], 256)()  # libraries, threads and their buffers
        work = step(WAYS[name], tiles)
    else:
        work = embed([REACH] if name == "embed within reach" else None)
    before, began = resident(peak=False), time.process_time()
    work()
    spent, peak = time.process_time() - began, resident(peak=True)
    print(json.dumps({"peak": peak, "growth": peak - before, "seconds": spent}))


def in_child(name: str, tiles: int, threads: int) -> dict[str, float]:
    command = [sys.executable, __file__, f"THREADS={threads}", f"CHILD={name}", f"TILES={tiles}"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    memory = f"{found['growth'] / 2**20:,.0f} MiB beyond its inputs, {found['peak'] / GIB:.2f} GiB in all"
    print(f"{name}, {tiles:,} tiles: {found['seconds']:.1f} processor seconds, {memory}", flush=True)
    return found


def main() -> None:
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    threads = int(given.get("THREADS", 2))
    torch.set_num_threads(threads)
    if name := given.get("CHILD"):
        return child(name, int(given["TILES"]))
    short, long = ({name: in_child(name, tiles, threads) for name in WAYS} for tiles in (SHORT, LONG))
    whole, reached = (in_child(name, LONGEST, threads) for name in ("embed", "embed within reach"))
    figures = {
        f"{kind}_ratio_{size}": found["blocks"][measure] / found["dense"][measure]
        for size, found in (("4k", short), ("16k", long))
        for kind, measure in (("time", "seconds"), ("memory", "growth"))
    } | {
        "memory_growth_16k_over_4k": long["blocks"]["growth"] / short["blocks"]["growth"],
        "time_growth_reach": long["reach"]["seconds"] / short["reach"]["seconds"],
        "forward_100k_gib": whole["peak"] / GIB,
        "forward_100k_seconds": whole["seconds"],
        "forward_100k_reach_seconds": reached["seconds"],
    }
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
