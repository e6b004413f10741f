"""What packing crops of all sizes into one sequence saves, and what of a step is not matrix products.

    python tests/bench/packed_crops.py                       the small recipe, 2 threads, about a minute
    python tests/bench/packed_crops.py recipe=… THREADS=4    any tile settings, as 'pretrain tile' takes them

Whole DINOv2 steps (teacher, student, losses, backward, clipping, AdamW, moving average) on random images, without data
loading and augmentation, in float32. *Unpacked* is the same network called once for each crop size. Rounds of both
alternate, and the fastest step of each counts; still, another process on the same cores spoils the figures (threads
then wait for each other), which is said when it happens.
"""

import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from models.vit import KeptSamples, Tokens, VisionTransformer
from pretrain.objectives.interface import Moment, Objective
from pretrain.objectives.tile_batch import TileBatch
from pretrain.settings import plugins
from pretrain.settings.composition import load
from pretrain.training.gradients import gradients
from pretrain.training.optimisation import clip, parameter_groups, set_rates
from pretrain.training.sharding import materialise

ROUNDS, STEPS_A_ROUND, PROFILED = 6, 3, 4
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "mkldnn", "onednn", "convolution")
ATTENTION = "scaled_dot_product"


class Unpacked(VisionTransformer):
    """The same network, one pass for each crop size."""

    def forward(
        self,
        crops: list[Tensor],
        masks: list[Tensor | None] | None = None,
        kept: list[tuple[KeptSamples, KeptSamples]] | None = None,
        visible: None = None,
        wanted: list[Tensor | None] | None = None,
    ) -> list[Tokens]:
        if kept is not None:
            raise SystemExit("stochastic depth is drawn for the packed sequence: set model.drop_path=0")
        masks = masks if masks is not None else [None] * len(crops)
        read = [None if wanted is None else [part] for part in wanted or crops]
        return [
            VisionTransformer.forward(self, [images], [mask], wanted=patches)[0]
            for images, mask, patches in zip(crops, masks, read, strict=True)
        ]


def objective(config: object, encoder: type[VisionTransformer]) -> Objective:
    """The recipe's objective around an encoder of the given class."""
    model = {name: value for name, value in config.model.items() if name != "_target_"}
    with torch.device("meta"):
        built = plugins.build(config.objective, lambda: encoder(**model))
    materialise(built, torch.device("cpu"), config.seed)
    return built


def random_batch(config: object) -> TileBatch:
    """Crops of the recipe's numbers and sizes, and its share of masked patches."""
    crops, tiles = config.data.crops, config.data.batch_size
    generator = torch.Generator().manual_seed(0)
    sizes = [(crops.global_size, crops.global_count), (crops.local_size, crops.local_count)]
    images = [(torch.randn(tiles * views, 3, size, size, generator=generator), views) for size, views in sizes if views]
    side, masks = crops.global_size // config.model["patch_size"], config.data.masks
    rate = masks.share * (masks.low + masks.high) / 2
    masks = torch.rand(tiles * crops.global_count, side, side, generator=generator) < rate
    return TileBatch(images, masks, masked_numbers=masks.flatten().nonzero()[:, 0])


class Step:
    """One optimiser step after another of one objective on one batch."""

    def __init__(self, config: object, encoder: type[VisionTransformer]) -> None:
        self.config, self.objective, self.batch = config, objective(config, encoder), random_batch(config)
        self.optimiser = torch.optim.AdamW(parameter_groups(self.objective.trained(), config.optim), foreach=True)
        self.moment = Moment(step=1000, steps=config.optim.steps + 1000, seed=0)

    def __call__(self) -> None:
        set_rates(self.optimiser, 1e-5, 0.04, False)
        self.optimiser.zero_grad()
        gradients(self.objective, [(self.batch, 0)], self.moment, Tensor.backward)
        for network in self.objective.trained().values():
            clip(network.parameters(), self.config.optim.clip)
        self.optimiser.step()
        self.objective.after_step(self.moment)


def fastest(steps: dict[str, Step]) -> dict[str, float]:
    """Seconds of the fastest step of each, in alternating rounds."""
    best = dict.fromkeys(steps, float("inf"))
    for step in steps.values():
        step()
    for _ in range(ROUNDS):
        for name, step in steps.items():
            for _ in range(STEPS_A_ROUND):
                began = time.perf_counter()
                step()
                best[name] = min(best[name], time.perf_counter() - began)
    return best


def where_time_goes(step: Step) -> dict[str, float]:
    """The shares of a step's operator time: matrix products, attention kernels, and the others; of the fastest of some
    steps."""
    profiles = []
    for _ in range(PROFILED):
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            step()
        spent: dict[str, float] = {}
        for event in recorded.key_averages():
            name = event.key.removeprefix("aten::").lstrip("_")
            kind = (
                "attention kernels" if ATTENTION in name else "matrix products" if name.startswith(PRODUCTS) else name
            )
            spent[kind] = spent.get(kind, 0.0) + event.self_cpu_time_total
        profiles.append(spent)
    spent = min(profiles, key=lambda each: sum(each.values()))
    total = sum(spent.values())
    return {name: time_in / total for name, time_in in sorted(spent.items(), key=lambda item: -item[1])}


def main() -> None:
    given = [argument.removeprefix("THREADS=") for argument in sys.argv[1:] if argument.startswith("THREADS=")]
    threads, busy = int((given or ["2"])[0]), os.getloadavg()[0]
    torch.set_num_threads(threads)
    overrides = [argument for argument in sys.argv[1:] if not argument.startswith("THREADS=")]
    config = load("tile", ["run=none", "data.shards=none", *overrides]).object()
    steps = {"packed": Step(config, VisionTransformer), "unpacked": Step(config, Unpacked)}
    seconds = fastest(steps)
    shares = {name: where_time_goes(step) for name, step in steps.items()}
    outside = {
        name: 1 - share.get("matrix products", 0.0) - share.get("attention kernels", 0.0)
        for name, share in shares.items()
    }
    tiles = config.data.batch_size
    print(f"{'':<10} {'ms/step':>8} {'tiles/s':>8} {'outside products':>17}")
    for name, each in seconds.items():
        print(f"{name:<10} {each * 1e3:8.1f} {tiles / each:8.1f} {outside[name]:17.1%}")
    print(
        "\nwhere a packed step's time goes (attention kernels are products with a softmax between: not counted as"
        " outside)"
    )
    for name, share in list(shares["packed"].items())[:12]:
        print(f"  {share:6.1%}  {name}")
    if busy > threads / 2:
        print(f"\nother work kept {busy:.1f} cores busy when this began: these figures are not to be trusted")
    ratio = seconds["packed"] / seconds["unpacked"]
    print(json.dumps({"packed_over_unpacked": round(ratio, 3), "share_outside_matmul": round(outside["packed"], 3)}))


if __name__ == "__main__":
    main()
