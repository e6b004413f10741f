"""What only a GPU can tell, in nine minutes: sections by themselves, each a process with a time limit and a JSON line.

    make gpu                                       all of it, and a table; without a GPU it says so and does nothing
    python tests/gpu/check.py kernels parity       some sections
    python tests/gpu/check.py --tiny               everything small, on the CPU too: for faults of this script

    environment   versions, what the GPU multiplies and copies a second, against its file in configs/hardware/
    kernels       attention with its statistics, and dilated attention, against products in float64
    parity        losses and gradients of every objective in float32, and augmentation, against the CPU
    run           'pretrain tile' and 'slide' and 'embed' as they are: steps, checkpoint, resumed, bf16
    compiled      a network's blocks compiled: the same losses, and how many graphs
    step          a ViT-L's step: tiles a second, memory, operations as a share of the peak, waits
    profile       three such steps traced: how long the GPU stood still, and which kernels took its time
    longnet       forward and backward of the released slide encoder by length
    loader        tiles a second of the loader alone
    checkpoints   a ViT-L saved beside its training, and loaded: the same bits, how long each took and held up
    preemption    a signal in mid-run: how long until a published checkpoint, and going on
    jpeg          tiles decoded by the GPU, against the four threads of a loader

A section that fails doesn't stop the next; what would begin after nine minutes is left out. Times are held against what this GPU was just seen to multiply and to copy a
second, so any CUDA GPU will do. With OUT set the lines are left there as gpu_check.json, and the traces. What is needed
beside a plain CUDA image of torch is said before anything is done, with the command that fetches it as wheels.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import distributions
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
IN_THE_IMAGE = {"torch", "torchvision", "numpy"}  # of a plain CUDA image
NOT_USED = {"wandb"}  # here: a run's record is written without it
ALL_OF_IT = 9 * 60  # seconds
NEWER = {
    name: (2, 14) for name in ("run", "checkpoints", "preemption")
}  # torch's; before, none is saved beside training
TINY = "--tiny" in sys.argv
STEP_BYTES_A_TILE = 170.8e9 / 64  # of an uncompiled ViT-L step outside of its products, as tests/bench/step.py counts


def needed() -> list[str]:
    """What must be installed beside a plain CUDA image of torch: what the project declares, and its tests."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    tests = [one for one in project["optional-dependencies"]["test"] if name_of(one) in ("pytest", "hypothesis")]
    return [one for one in project["dependencies"] + tests if name_of(one) not in IN_THE_IMAGE | NOT_USED]


def name_of(requirement: str) -> str:
    """``Numba_x>=0.63`` → ``numba-x``."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement)[0]).lower()


def lacking() -> list[str]:
    """What of that isn't here, in any version."""
    here = {name_of(str(one.metadata["Name"])) for one in distributions()}
    return [one for one in needed() if name_of(one) not in here]


def environment() -> dict[str, Any]:
    import torch

    from pretrain.doctor.gpus import SOUND_SHARE
    from pretrain.settings.hardware import peak_of

    side = 256 if TINY else 8192
    found: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda, "device": device_name()}
    for name, tf32 in (("tf32", True), ("fp32", False)):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        a, b = (torch.randn(side, side, device=device()) for _ in range(2))
        found[f"{name}_tflops"] = 2 * side**3 / seconds_of(lambda a=a, b=b: a @ b) / 1e12
    products, copied = measured_rates()
    peak = peak_of(device(), "bf16")
    share = products / peak if peak else None  # of a GPU that configs/hardware doesn't know there is none
    found |= {"bf16_tflops": products / 1e12, "copy_tb_s": copied / 1e12, "of_the_data_sheet": share}
    return found | {"ok": share is None or share > SOUND_SHARE}


def kernels() -> dict[str, Any]:
    import torch

    from models.attention_kernels import kernel
    from models.attention_statistics import Batched, matrix_products, plain_backward, takes_flash
    from models.dilated_attention import MOST_RUNS, dilated_attention

    torch.backends.cuda.matmul.allow_tf32 = False
    shapes = (
        [(3, 1), (2, 5), (4, 64), (3, 65)]
        if TINY
        else [(3, 1), (2, 5), (4, 64), (3, 65), (2, 1023), (1, 4097), (300, 17)]
    )
    rows, exact = sum(runs * length for runs, length in shapes), Batched(matrix_products, plain_backward)
    worst: dict[str, float] = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for heads, width in ((1, 48), (16, 48), (4, 64), (4, 32)):
            q, k, v, grad = (normal(rows, heads, width, seed=i, dtype=dtype) for i in range(4))
            wide = [x.double() for x in (q, k, v, grad)]
            out, lse = exact.forward(*wide[:3], shapes)
            expected = (out, lse, *exact.backward(wide[3], *wide[:3], out, lse, shapes))
            for name in ("sdpa", *(["varlen"] if takes_flash(q) else [])):
                each = kernel(name)
                got = each.forward(q, k, v, shapes)
                got = (*got, *each.backward(grad, q, k, v, out.to(dtype), lse.float(), shapes))
                for what, one, other in zip(("out", "lse", "dq", "dk", "dv"), got, expected, strict=True):
                    key = f"{name} {str(dtype)[6:]} {what}"
                    worst[key] = max(worst.get(key, 0.0), relative(one, other))
    lengths = [500, 70, 123] if TINY else [5000, 7000, 1233]
    schedule = ([64, 128, 256], [1, 2, 4]) if TINY else ([1024, 5792, 32768], [1, 4, 16])
    for compatible in (False, True):
        results = []
        for where, dtype in (
            (device(), torch.float32),
            (torch.device("cpu"), torch.float32),
            (device(), torch.bfloat16),
        ):
            q, k, v = (normal(sum(lengths), 16, 48, seed=i).to(where, dtype).requires_grad_() for i in range(3))
            out = dilated_attention(q, k, v, lengths, *schedule, compatible)
            results.append([out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))])
        for name, some in (("float32", results[0]), ("bfloat16", results[2])):
            worst[f"dilated {name} {'compatible' if compatible else 'exact'}"] = max(map(relative, some, results[1]))
    many = torch.ones(MOST_RUNS, 1, 64, device=device(), dtype=torch.bfloat16)
    kernel("sdpa").forward(many, many, many, [(MOST_RUNS, 1)])  # as many runs as a grid has rows
    limits = {"bfloat16": 3e-2, "float16": 4e-3, "float32": 1e-4}
    bad = {
        name: error for name, error in worst.items() if error > next(limits[kind] for kind in limits if kind in name)
    }
    return {"ok": not bad, "worst": max(worst.values()), "bad": bad, "cases": len(worst)}


def parity() -> dict[str, Any]:
    import numpy as np
    import torch

    from data.keyed import rng
    from data.tiles.augment import augment_together
    from data.tiles.augment_cpu import augment_each
    from data.tiles.augment_parameters import Colour, draw_parameters

    torch.backends.cuda.matmul.allow_tf32 = False
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (make, given) in (tile_steps() | slide_steps(Path(folder))).items():
            (loss, gradients), (other, others) = (
                loss_and_gradients(make, given, where) for where in (torch.device("cpu"), device())
            )
            largest = max(float(g.norm()) for g in gradients)
            found[f"{name} loss"] = float((loss - other).abs() / loss.abs())
            found[f"{name} gradients"] = max(
                relative(b, a) for a, b in zip(gradients, others, strict=True) if float(a.norm()) > 1e-6 * largest
            )
    colours = Colour(0.8, 0.4, 0.4, 0.2, 0.1, 0.2, (0.5, 0.5, 0.5), (0.1, 2.0), (0.2, 0.2, 0.2), 0.0, 0.0)
    rows = np.stack([draw_parameters(colours, [0], rng(0, "check", i))[0] for i in range(32)])
    images = torch.randint(0, 256, (32, 3, 96, 96), dtype=torch.uint8)
    scale, offset = torch.ones(3), torch.zeros(3)
    expected = torch.empty(images.shape)
    augment_each(images.numpy(), rows, scale.numpy(), offset.numpy(), expected.numpy())
    got = augment_together(images.to(device()), rows, scale.to(device()), offset.to(device())).cpu()
    found["augmentation, largest"] = float((got - expected).abs().max())
    limits = {"loss": 5e-5, "gradients": 5e-4, "largest": 2 / 255}
    bad = {
        name: error for name, error in found.items() if error > next(limits[kind] for kind in limits if kind in name)
    }
    return {"ok": not bad, **found, "bad": bad}


Steps = dict[str, tuple[Callable[[], Any], Any]]  # how an objective is made, and its batch, by name


def tile_steps() -> Steps:
    """Every objective of tiles."""
    from tests.pretrain.objectives import tile_objectives as tile

    seen, larger = tile.batch(8), tile.batch(8, larger=True)
    return {
        "dinov2 sinkhorn": (lambda: tile.dinov2(drop_path=0.3), seen),
        "dinov2 centre kde": (lambda: tile.dinov2("centre", spread="kde"), seen),
        "dinov3": (lambda: tile.filled(tile.unfilled_dinov3(tile.encoder(position_embedding="rope"))), larger),
        "dino": (lambda: tile.dino(drop_path=0.3), seen),
        "jepa": (lambda: tile.jepa(drop_path=0.3), seen),
        "lejepa": (tile.lejepa, seen),
        "distil": (tile.distil, seen),
        "distil_heads": (tile.distil_heads, seen),
        "mae": (tile.mae, tile.batch(8, (1, 0))),
    }


def slide_steps(folder: Path) -> Steps:
    """Every objective of slides; without dropout, whose draws are the device's own."""
    from data.embeddings.grid_crops import CropSequences
    from data.embeddings.standardisation import Statistics
    from models.slide_vit import SlideViT
    from pretrain.objectives.slide_ibot import SlideIBOT
    from tests.data.embeddings.test_slide_sequences import DEFAULTS
    from tests.pretrain.objectives import test_slide_context as context
    from tests.pretrain.objectives import test_slide_mae_objective as mae
    from tests.pretrain.objectives import test_slide_pairs as pairs
    from tests.pretrain.objectives.tile_objectives import filled
    from tests.pretrain.training.sharded_steps import CROPS, SLIDE_IBOT

    store = mae.waves(folder, 16)
    whole = mae.whole_slides(store).batch(0)
    crops = CropSequences(store, Statistics.of(store), **(DEFAULTS | CROPS))

    def ibot() -> Any:
        sizes = {"width": 32, "depth": 2, "heads": 4, "feed_forward_width": 64, "dropout": 0.0, "drop_path": 0.1}
        settings = SLIDE_IBOT | {"spread_weight": 0.0, "frozen_prototype_norms": True}
        return filled(
            SlideIBOT(lambda: SlideViT(mae.WIDTH, **sizes, registers=1, slopes="fixed", reach=None), **settings)
        )

    return {
        "slide_mae": (mae.objective, whole),
        "slide_mae nearby": (lambda: mae.objective("token", decoder_start="nearby"), whole),
        "slide_pairs": (pairs.objective, whole),
        "slide_pairs by distance": (lambda: pairs.objective("slide_vit"), whole),
        "slide_context": (lambda: context.context("longnet", []), whole),
        "slide_ibot": (ibot, crops.batch(0)),
    }


def loss_and_gradients(make: Callable[[], Any], given: Any, where: Any) -> tuple[Any, list[Any]]:
    """Of a step on that device in float32, on the CPU."""
    from pretrain.objectives.interface import Moment
    from pretrain.objectives.tile_batch import TileBatch
    from pretrain.training.gradients import gradients

    objective = make().to(where)
    if isinstance(given, TileBatch):
        crops = [(images.to(where), views) for images, views in given.crops]
        given = replace(given, crops=crops, masks=given.masks.to(where))
    else:
        given = given.to(where)
    means = gradients(objective, [(given, 0)], Moment(0, 10, 0), lambda loss: loss.backward())
    return means["loss"].cpu(), [p.grad.cpu() for p in objective.parameters() if p.grad is not None]


def run() -> dict[str, Any]:
    from pretrain.run.metrics import read_metrics
    from tests.pretrain.training.wavy_slides import write_wavy_slides

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        shards = tile_shards(place)
        small = [*tile_words(place / "tile", shards), "optim.schedule_steps=12"]
        pretrain(*small, "optim.steps=8")
        pretrain(*small, "optim.steps=12", "allow_changes=true")  # goes on
        losses = [line["loss"] for line in read_metrics(place / "tile") if "loss" in line]
        store = write_wavy_slides(place / "embeddings", 6, columns=8, rows=6, fewer=6)
        slide = [f"run={place / 'slide'}", f"data.embeddings={store}", "recipe=small_slide", "optim.steps=6"]
        pretrain("slide", *slide, "optim.warmup_steps=1", "trainer.checkpoint_every=3", *accelerator())
        slides = [line["loss"] for line in read_metrics(place / "slide") if "loss" in line]
        pretrain("embed", f"checkpoint={place / 'tile'}", f"shards={shards}", f"out={place / 'tiles'}")
    fine = all(loss == loss and abs(loss) < 1e6 for loss in [*losses, *slides])
    return {"ok": fine and len(losses) == 12 and len(slides) == 6, "tile_losses": losses[::4], "slide_losses": slides}


def compiled() -> dict[str, Any]:
    import torch
    from torch._dynamo.utils import counters

    from pretrain.objectives.interface import Moment

    losses: dict[bool, list[float]] = {}
    seconds = 0.0
    for compiles in (False, True):
        with single_process():
            objective, batches = built("small", compiles), [random_batch("small", 16, seed) for seed in range(4)]
            losses[compiles], began = [], time.monotonic()
            for step, given in enumerate(batches):
                with fused(compiles):
                    loss, _ = objective.loss(given, Moment(step, 12, 0))
                    loss.backward()
                losses[compiles].append(float(loss))
            seconds = time.monotonic() - began
    apart = max(abs(a - b) / abs(a) for a, b in zip(*losses.values(), strict=True))
    graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    torch.compiler.reset()
    return {
        "ok": apart < 2e-2 and not breaks and graphs <= 8 + (0 if TINY else 13),  # of blocks, and of losses on a GPU
        "apart": apart,
        "graphs": graphs,
        "seconds_of_it": seconds,
    }


def step() -> dict[str, Any]:
    import torch

    from pretrain.settings.hardware import peak_of
    from pretrain.training.utilisation import operations_of_step

    found: dict[str, Any] = {}
    products, copied = measured_rates()
    recipe, tiles = large_recipe()
    for compiles in (False, True):
        with single_process():
            one = RecipeStep(recipe, tiles, compiles)
            if device().type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            took = seconds_of(one, rounds=2 if TINY else 10)
            passed = operations_of_step(one.objective, [one.given], "none")
            kind = "compiled" if compiles else "eager"
            found |= {f"{kind}_tiles_per_second": tiles / took, f"{kind}_tflop_per_second": passed / took / 1e12}
            if not TINY:
                found[f"{kind}_of_the_floor"] = took / (passed / products + STEP_BYTES_A_TILE * tiles / copied)
            if peak := peak_of(device(), "bf16"):
                found[f"{kind}_utilisation"] = passed / took / peak
            if device().type == "cuda":
                found[f"{kind}_allocated_gib"] = torch.cuda.max_memory_allocated() / 2**30
                found[f"{kind}_reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
                torch.cuda.set_sync_debug_mode("warn")
                with warnings.catch_warnings(record=True) as waits:
                    warnings.simplefilter("always")  # else those of one line count as one
                    one()
                torch.cuda.set_sync_debug_mode("default")
                found[f"{kind}_waits"] = len(waits)
    # Those of the floor are 240 and 320 tiles a second of an H200.
    limits = {"_waits": 2, "eager_of_the_floor": 1.9, "compiled_of_the_floor": 1.5}
    bad = {
        name: value
        for name, value in found.items()
        for end, most in limits.items()
        if name.endswith(end) and value > most
    }
    return {"ok": not bad, "bad": bad, **found}


def profile() -> dict[str, Any]:
    import torch
    from torch.profiler import ProfilerActivity

    from tests.gpu.device_trace import ON_CPU, ON_GPU, idle, longest_kernels, number_of, read_trace, waits

    steps, gpu = 3, device().type == "cuda"
    found: dict[str, Any] = {}
    table: list[str] = []
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("eager",) if TINY else ("eager", "compiled"):
            with single_process():
                one = RecipeStep(*large_recipe(), kind == "compiled")
                seconds_of(one, rounds=1)
                with torch.profiler.profile(activities=activities) as profiled:
                    for _ in range(steps):
                        one()
                    if gpu:
                        torch.cuda.synchronize()
            file = Path(os.environ.get("OUT") or folder) / f"gpu_check_{kind}_trace.json.gz"
            profiled.export_chrome_trace(str(file))
            events, kinds = read_trace(file), ON_GPU if gpu else ON_CPU
            share, longest = idle(events, kinds)
            found |= {f"{kind}_idle": share, f"{kind}_longest_idle_ms": longest}
            found |= {f"{kind}_waits": waits(events) / steps, f"{kind}_kernels": number_of(events, kinds) / steps}
            table += [f"{kind}: {100 * share:.1f} % idle, at most {longest:.1f} ms at a time; ms a step of"]
            table += [f"{ms:9.2f}  {name[:100]}" for name, ms in longest_kernels(events, kinds, steps).items()]
    bad = {name: value for name, value in found.items() if gpu and name.endswith("_idle") and value > 0.15}
    return {"ok": not bad, "bad": bad, **found, "table": table}


def longnet() -> dict[str, Any]:
    import torch

    from models.longnet import Layers, LayerSettings
    from pretrain.training.sharding import recomputed

    found: dict[str, Any] = {}
    bad: dict[str, float] = {}
    products, _ = measured_rates()
    if device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    layers = Layers(
        LayerSettings(768, 16, 3072, (1024, 5792, 32768, 185363 // 16 * 16, 1048576), (1, 2, 4, 8, 16)),
        1 if TINY else 12,
    ).to(device(), torch.bfloat16 if device().type == "cuda" else torch.float32)
    # Seconds expected of a GPU that multiplies 780 TFLOP/s, at most.
    for tokens, expected in {500: 60.0}.items() if TINY else {16_000: 0.12, 64_000: 0.5, 256_000: 2.6}.items():
        x = torch.randn(tokens, 768, device=device(), dtype=next(layers.parameters()).dtype, requires_grad=True)
        if tokens > 100_000:
            for layer in layers.layers:
                layer.forward = recomputed(layer.forward, selective=False)

        def one(x: Any = x, tokens: int = tokens) -> None:
            layers(x, [tokens], None)[0].float().mean().backward()

        took = seconds_of(one, rounds=2)
        found[f"seconds_of_{tokens}"] = took
        if not TINY and took > 1.3 * expected * 780e12 / products:
            bad[f"seconds_of_{tokens}"] = took
        if device().type == "cuda":
            began = time.process_time()
            one()
            found[f"host_seconds_of_{tokens}"] = time.process_time() - began
            found[f"allocated_gib_of_{tokens}"] = torch.cuda.max_memory_allocated() / 2**30
            torch.cuda.reset_peak_memory_stats()
    return {"ok": not bad, "bad": bad, **found}


def loader() -> dict[str, Any]:
    from omegaconf import OmegaConf

    from pretrain.doctor.tiles import loading, open_stream, tiles_per_second
    from pretrain.settings.composition import load

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        shards = tile_shards(Path(folder), tiles=64 if TINY else 2048, side=256)
        words = [f"recipe={'small' if TINY else 'dinov2_vitl16_short'}", "run=none", f"data.shards={shards}"]
        for threads in (1,) if TINY else (2, 4, 8):
            settings = ["data.batch_size=64", "data.lanes=4", f"data.threads={threads}"]
            tree: Any = OmegaConf.to_container(load("tile", [*words, *settings]).tree, resolve=True)
            source, stream = open_stream(tree["data"], 0)
            batches = loading(source, stream, tree["data"], 1, 1, tree["model"]["patch_size"], 0)
            found[f"tiles_per_second_{threads}"] = tiles_per_second(batches)
    return {"ok": True, **found}


def checkpoints() -> dict[str, Any]:
    from torch.utils._pytree import tree_leaves

    from pretrain.run.across_ranks import local_shard
    from pretrain.run.checkpoints import contents, newest, restore
    from pretrain.run.saving import Saver

    def state() -> list[Any]:
        """Copies of all that a checkpoint holds."""
        leaves = tree_leaves(contents(one.objective, one.optimiser))
        return [local_shard(leaf).clone() if hasattr(leaf, "clone") else leaf for leaf in leaves]

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, single_process():
        run = Path(folder)
        one = RecipeStep(*large_recipe(), compiles=False)
        alone = seconds_of(one)
        saver = Saver(run, keep=1, milestones=None)
        for number, name in ((1, "first"), (2, "second")):  # the first also takes the memory of the copy
            saved, began, during = state(), time.monotonic(), []
            refusal = saver.begin(number, one.objective, one.optimiser, {})
            if refusal:
                return {"ok": False, "error": refusal}
            found[f"{name}_stall_seconds"] = time.monotonic() - began
            while not saver.under_way[1].done():
                during.append(seconds_of(one, rounds=1, warm_up=0))
            refusal = saver.wait()
            found[f"{name}_published_after_seconds"] = time.monotonic() - began
            found[f"{name}_steps_slower"] = median(during) / alone - 1 if during else None
        one()
        began = time.monotonic()
        restore(newest(run), one.objective, one.optimiser)
        found["loaded_after_seconds"] = time.monotonic() - began
        exact = same(saved, state())
        found["gigabytes"] = sum(file.stat().st_size for file in newest(run).iterdir()) / 1e9
    limits = {"first_stall_seconds": 1.5, "second_stall_seconds": 0.6, "second_steps_slower": 0.1}
    bad = {} if TINY else {name: found[name] for name, most in limits.items() if (found[name] or 0) > most}
    return {"ok": exact and not refusal and not bad, "the_same_bits": exact, "refusal": refusal, "bad": bad, **found}


def jpeg() -> dict[str, Any]:
    from concurrent.futures import ThreadPoolExecutor

    import simplejpeg
    import torch

    from tests.data.shards.tile_folders import picture

    try:
        from torchvision.io import decode_jpeg
    except ImportError as error:
        return {"ok": True, "skipped": f"torchvision isn't here ({error})"}
    files = [simplejpeg.encode_jpeg(picture(number, 256), quality=85) for number in range(4 if TINY else 64)]
    encoded = [torch.frombuffer(bytearray(file), dtype=torch.uint8) for file in files] * (1 if TINY else 4)
    try:
        decoded = decode_jpeg(encoded, device=device())
    except RuntimeError as error:
        return {"ok": True, "skipped": f"torchvision can't decode on this device ({str(error).splitlines()[0]})"}
    took = seconds_of(lambda: decode_jpeg(encoded, device=device()))
    with ThreadPoolExecutor(4) as pool:
        by_threads = seconds_of(lambda: list(pool.map(simplejpeg.decode_jpeg, files)))
    expected = [torch.from_numpy(simplejpeg.decode_jpeg(file)).permute(2, 0, 1) for file in files]
    apart = torch.stack([(a.cpu().float() - b).abs() for a, b in zip(decoded[: len(files)], expected, strict=True)])
    return {
        "ok": float(apart.mean()) <= 1,
        "tiles_per_second": len(encoded) / took,
        "tiles_per_second_of_4_threads": len(files) / by_threads,
        "apart_mean": float(apart.mean()),
        "apart_largest": float(apart.max()),
    }


def preemption() -> dict[str, Any]:
    from pretrain.run.metrics import read_metrics

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        words = [
            *tile_words(place / "run", tile_shards(place)),
            "optim.steps=100000",
            "trainer.checkpoint_every=100000",
        ]
        with (place / "said").open("w") as said:
            process = subprocess.Popen(command(*words), cwd=ROOT, stdout=said, stderr=subprocess.STDOUT)
        while not (place / "run" / "metrics.jsonl").exists() or len(read_metrics(place / "run")) < 3:
            assert process.poll() is None, f"the run ended by itself: {(place / 'said').read_text()[-2000:]}"
            time.sleep(0.2)
        began = time.monotonic()
        process.send_signal(signal.SIGUSR1)
        code = process.wait(120)
        took = time.monotonic() - began
        (written,) = (place / "run" / "checkpoints").glob("step-*")
        steps = int(written.name[-8:])
        pretrain(*words[:-2], f"optim.steps={steps + 2}", words[-1], "allow_changes=true")  # goes on
        last = [line["step"] for line in read_metrics(place / "run") if "loss" in line][-1]
    fine = code == 75 and last == steps + 2
    return {"ok": fine, "code": code, "seconds_until_over": took, "saved_at": steps, "gone_on_to": last}


# What sections share -------------------------------------------------------------------------------------------------


def device() -> Any:
    import torch

    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def device_name() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def measured_rates() -> tuple[float, float]:
    """Operations a second of bf16 products, and bytes a second of copies (read and written), of this device now."""
    import torch

    from pretrain.doctor.gpus import SIDE, products_per_second

    block = torch.empty(2**20 if TINY else 2**28, device=device())
    copied = 2 * block.nbytes / seconds_of(block.clone)
    side = 64 if TINY else SIDE
    products_per_second(device(), side, 0.0)  # a library's first product chooses its kernel
    products = products_per_second(device(), side, 0.0 if TINY else 0.5)
    del block
    torch.cuda.empty_cache()  # so that a section's own memory is what its figures say
    return products, copied


def same(one: list[Any], other: list[Any]) -> bool:
    """Whether two states are, bit for bit."""
    import torch

    return len(one) == len(other) and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(one, other, strict=True)
    )


def seconds_of(work: Callable[[], Any], rounds: int = 5, warm_up: int = 2) -> float:
    """The median of some rounds, after those to warm up."""
    import torch

    times = []
    for _ in range(rounds + warm_up):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return median(times[warm_up:])


def normal(*size: int, seed: int, dtype: Any = None) -> Any:
    """Normal numbers, the same on every device."""
    import torch

    made = torch.randn(*size, generator=torch.Generator().manual_seed(seed))
    return made.to(device(), dtype or torch.float32)


def relative(one: Any, other: Any) -> float:
    """``‖a − b‖ / ‖b‖``."""
    one, other = one.detach().double().cpu(), other.detach().double().cpu()
    return float((one - other).norm() / other.norm().clamp(min=1e-30))


def accelerator() -> list[str]:
    return (
        ["trainer.accelerator=gpu", "trainer.precision=bf16"]
        if device().type == "cuda"
        else ["trainer.accelerator=cpu"]
    )


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "pretrain", *words]


def pretrain(*words: str) -> None:
    """Run a command to its end. Raises RuntimeError with its last lines where it fails."""
    done = subprocess.run(command(*words), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"pretrain {' '.join(words)}: {done.stdout[-2000:]}")


def tile_shards(place: Path, tiles: int = 48, side: int = 48) -> Path:
    from tests.data.shards.tile_folders import write_tiles

    return write_tiles(place / "shards", [tiles // 4] * 4, side)


def tile_words(run: Path, shards: Path) -> list[str]:
    from tests.pretrain.training.test_tile_training import TINY as SMALL

    words = [word for word in SMALL if not word.startswith(("optim.steps", "trainer.accelerator"))]
    return ["tile", f"run={run}", f"data.shards={shards}", *words, "trainer.checkpoint_every=4", *accelerator()]


def single_process() -> Any:
    """A process group of one, as a run has it."""
    from tests.pretrain.training.real_steps import one_process

    return one_process("nccl" if device().type == "cuda" else "gloo")


def shape_of_recipe(recipe: str, *settings: str) -> Any:
    from tests.pretrain.training.real_steps import shape_of

    return shape_of(f"recipe={recipe}", *settings)[0]


def built(recipe: str, compiles: bool, *settings: str) -> Any:
    """A recipe's objective as a run on one GPU has it, in bf16."""
    import torch

    from pretrain.training.sharding import lay_mesh, materialise, shard

    with torch.device("meta"):
        objective = shape_of_recipe(recipe, *settings).build()()
    shard(objective, lay_mesh(device().type, 1, None), "bf16", "none", compiles)
    materialise(objective, device(), 0)
    return objective


def large_recipe() -> tuple[str, int]:
    """The recipe whose step is looked at, and the tiles of one: half as many where the GPU hasn't the 40 GiB for 64."""
    import torch

    if TINY:
        return "small", 16
    return "dinov2_vitl16_short", 64 if torch.cuda.get_device_properties(device()).total_memory > 45 * 2**30 else 32


def fused(compiles: bool) -> Any:
    """While losses are compiled where a run would compile them: see `Training.fuses`."""
    import torch

    from data.fused import fusing

    return fusing(torch.compile if compiles and device().type == "cuda" else None)


class RecipeStep:
    """A recipe's objective and optimiser on one process, and a batch; call it to take a step."""

    def __init__(self, recipe: str, tiles: int, compiles: bool) -> None:
        from pretrain.training.adamw import ShardAdamW

        self.objective = built(recipe, compiles, f"objective.group_size={tiles}")
        self.given, self.compiles = random_batch(recipe, tiles, 0), compiles
        self.networks = list(self.objective.trained().values())
        trained = [p for network in self.networks for p in network.parameters() if p.requires_grad]
        self.optimiser = ShardAdamW(trained, lr=1e-5, fused=True)

    def __call__(self) -> None:
        from pretrain.objectives.interface import Moment
        from pretrain.training.gradients import gradients
        from pretrain.training.optimisation import clip

        moment = Moment(0, 10, 0)
        self.optimiser.zero_grad()
        with fused(self.compiles):
            gradients(self.objective, [(self.given, 0)], moment, lambda loss: loss.backward())
        for network in self.networks:
            clip(network.parameters(), 3.0)
        self.optimiser.step()
        self.objective.after_step(moment)


def random_batch(recipe: str, tiles: int, seed: int) -> Any:
    """Noise of the recipe's crops, and its share of masked patches."""
    import torch

    from pretrain.objectives.tile_batch import TileBatch

    shape = shape_of_recipe(recipe)
    draw, crops, masks = torch.Generator().manual_seed(seed), shape.data.crops, shape.data.masks
    sizes = [(crops.global_size, crops.global_count), (crops.local_size, crops.local_count)]
    images = [(torch.randn(tiles * n, 3, s, s, generator=draw).to(device()), n) for s, n in sizes if n]
    grid = crops.global_size // shape.model["patch_size"]
    masked = (
        torch.rand(tiles * crops.global_count, grid, grid, generator=draw) < masks.share * (masks.low + masks.high) / 2
    )
    return TileBatch(images, masked.to(device()), masked_numbers=masked.flatten().nonzero()[:, 0].to(device()))


@dataclass(frozen=True)
class Section:
    work: Callable[[], dict[str, Any]]
    limit: int  # seconds


SECTIONS = {  # limits are for what hangs: sound sections take half of them
    "environment": Section(environment, 60),
    "kernels": Section(kernels, 90),
    "parity": Section(parity, 90),
    "run": Section(run, 120),
    "compiled": Section(compiled, 100),
    "step": Section(step, 120),
    "profile": Section(profile, 100),
    "longnet": Section(longnet, 80),
    "loader": Section(loader, 90),
    "checkpoints": Section(checkpoints, 90),
    "preemption": Section(preemption, 60),
    "jpeg": Section(jpeg, 30),
}


def one_section(name: str) -> None:
    """Run a section in this process, and print its line."""
    warnings.filterwarnings("ignore", ".*returned a view tensor.*")  # FSDP's, about what isn't done here
    began = time.monotonic()
    try:
        found = SECTIONS[name].work()
    except Exception as error:  # told, and the next section is run all the same
        said = f"{type(error).__name__}: {error}"
        found = {"ok": False, "error": said if len(said) < 3000 else f"{said[:800]} […] {said[-2000:]}"}
    print(json.dumps({"section": name, "seconds": round(time.monotonic() - began, 1), **found}, default=str))


def as_process(name: str, limit: float) -> dict[str, Any]:
    """A section's line, from a process of its own, which is ended after ``limit`` seconds with all that it started."""
    import torch

    least = NEWER.get(name, (0, 0))
    if tuple(map(int, torch.__version__.split(".")[:2])) < least:
        needs = f"needs torch {'.'.join(map(str, least))}, and here is {torch.__version__}"
        return {"section": name, "ok": True, "skipped": needs}
    if limit < 1:
        return {"section": name, "ok": False, "error": f"left out: {ALL_OF_IT} s are over"}
    words = [sys.executable, __file__, name, "--here", *(["--tiny"] if TINY else [])]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        said, _ = process.communicate(timeout=limit)
        return json.loads(said.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {"section": name, "ok": False, "error": f"not over after {limit:.0f} s"}
    except (IndexError, ValueError):
        return {"section": name, "ok": False, "error": f"ended with code {process.returncode} and no line"}
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main() -> int:
    names = [word for word in sys.argv[1:] if not word.startswith("--")]
    if unknown := [name for name in names if name not in SECTIONS]:
        print(f"there is no section {unknown[0]}: {', '.join(SECTIONS)}")
        return 2
    if "--here" in sys.argv:
        one_section(names[0])
        return 0
    import torch

    if not torch.cuda.is_available() and not TINY:
        print("skipped: torch sees no CUDA device here; --tiny tries the script itself on the CPU")
        return 0
    if absent := lacking():
        print(f"not here: {', '.join(map(name_of, absent))}. Where there is a network:\n")
        print(f"    {shlex.join(['pip', 'download', '--only-binary=:all:', '--dest', 'wheels', *absent])}\n")
        print("then here: pip install --no-index --find-links wheels --no-deps wheels/*.whl")
        return 1
    lines, end = [], time.monotonic() + (ALL_OF_IT if not TINY else float("inf"))
    for name in names or SECTIONS:
        limit = min(SECTIONS[name].limit * (3 if TINY else 1), end - time.monotonic())
        lines.append(as_process(name, limit))
        print(json.dumps(lines[-1]), flush=True)
    print(f"\n{'section':<14}{'':<6}{'s':>6}")
    for line in lines:
        how = "FAIL" if not line["ok"] else "skip" if "skipped" in line else "ok"
        why = line.get("error") or line.get("skipped") or (f"beyond: {line['bad']}" if line.get("bad") else "")
        print(f"{line['section']:<14}{how:<6}{line.get('seconds', '–'):>6}  {why[:120]}".rstrip())
    for line in lines:
        print("", *line.get("table", []), sep="\n", end="")
    print()
    if out := os.environ.get("OUT"):
        (Path(out) / "gpu_check.json").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return 0 if all(line["ok"] for line in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
