"""What a GPU holds and does beside the networks' tensors and products: named memory, augmentation, bytes and host."""

from collections import Counter

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from data.tiles.augment import augment_together, with_shifted_stains
from data.tiles.augment_parameters import draw_parameters
from models.attention_statistics import SDPA
from pretrain.plan import gpu_overhead as beside
from pretrain.plan.collectives import GATHERED, SUMMED, Collective
from pretrain.plan.estimate import Estimate, Settings, estimate
from pretrain.plan.full_plan import make_plan
from pretrain.plan.kernels import bytes_moved, starts_kernels
from pretrain.plan.rehearsal import OperationWatch
from pretrain.plan.step_time import OF_BANDWIDTH, StepTime, step_time
from pretrain.plan.table import plan_table
from pretrain.plan.torch_internals import TorchDispatchMode
from pretrain.settings.annotation import as_dictionary
from pretrain.settings.hardware import described
from pretrain.training.tile_settings import ColourSettings, colour
from tests.pretrain.plan.test_plan import SLIDE, SMALL, planned
from tests.pretrain.training.real_steps import shape_of

SUPPOSED = ("slides.width=48", "slides.tiles=60", "slides.largest=60", "slides.count=40")


def test_each_group_of_processes_has_nccls_buffers() -> None:
    shard, replicate = (Collective(name, "backward", ranks) for name, ranks in ((GATHERED, (0, 1)), (SUMMED, (0, 2))))
    alone, full, hybrid = (
        beside.gpu_overhead(calls, processes, 5)
        for calls, processes in (([Collective(GATHERED, "forward", (0,))], 1), ([shard], 2), ([shard, replicate], 4))
    )
    assert set(alone) == {"CUDA's context (assumed)", "workspaces of cuBLAS and attention"}
    assert alone["workspaces of cuBLAS and attention"] == beside.CUBLAS + 5
    each = beside.CHANNELS * beside.BUFFERS
    assert (
        full["NCCL's buffers, groups: 1 (assumed)"] == each
        and hybrid["NCCL's buffers, groups: 3 (assumed)"] == 3 * each
    )


def test_a_gpu_has_them_and_they_count_for_what_fits() -> None:
    found = make_plan(planned(*SMALL, "model.depth=2", "launch.gpus_per_node=1"))
    assert found["peak_bytes_by_part"]["CUDA's context (assumed)"] == beside.CONTEXT
    assert found["peak_bytes"] == sum(found["peak_bytes_by_part"].values())
    assert found["augmentation_bytes"] > 0 and "augmentation, before the forward" in plan_table(found)


def test_attentions_backward_sums_up_its_largest_queries_in_float32() -> None:
    run, _ = shape_of(*SMALL, "model.depth=2", "model.drop_path=0")
    found = estimate(run, Settings(1, 1, "bf16", "none", 1), fused_attention=True)
    side, crops = run.data.crops.global_size // run.model["patch_size"], run.data.crops.global_count * 8
    assert found.workspace == 4 * crops * (side**2 + 1 + run.model["registers"]) * 96


def test_augmentation_takes_the_memory_that_is_planned() -> None:
    run, _ = shape_of(*SMALL, "data.colour.stain_probability=0.5", "data.colour.stain_shift=0.05")
    crops, colours = run.data.crops, colour(ColourSettings(**as_dictionary(run.data.colour)))
    generator, images = np.random.default_rng(0), []
    for views, side, kinds in ((crops.global_count, crops.global_size, [0, 1]), (crops.local_count, crops.local_size, [2] * crops.local_count)):  # fmt: skip
        rows = np.concatenate([draw_parameters(colours, np.array(kinds), generator) for _ in range(8)])
        images.append((torch.zeros(views * 8, 3, side, side, dtype=torch.uint8), rows))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        made = [
            augment_together(with_shifted_stains(x, rows), rows, torch.ones(3), torch.zeros(3)) for x, rows in images
        ]
    now = most = 0
    for event in sorted(seen.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        now += event.nbytes() if event.name() == "[memory]" else 0
        most = max(most, now)
    # Of the bytes that come in, which lie beside, those of the global crops are there at the highest moment.
    taken = most - sum(crop.nbytes for crop in made) + images[0][0].nbytes
    assert run.augmentation(8) == pytest.approx(taken, rel=0.05)


def test_bytes_are_those_of_what_is_neither_product_nor_attention() -> None:
    started, moved = [], []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = function(*args, **(kwargs or {}))
            if starts_kernels(function):
                started.append(str(function))
                moved.append(bytes_moved(function, args, kwargs, result))
            return result

    x = torch.ones(4, 4)
    with Seen():
        ((x @ x).view(16) + torch.empty(16)).mul_(2)
    assert started == ["aten.mm.default", "aten.add.Tensor", "aten.mul_.Tensor"] and moved == [0, 3 * 64, 64]


def test_a_step_waits_for_the_gpu_or_for_its_host() -> None:
    machine = described("a100_80gb")
    flops = Counter({("a", "forward"): 3 * 10**12})
    found = Estimate(1, flops, {}, {}, operators=20_000, moved=round(machine.memory_gb_s * OF_BANDWIDTH * 1e9 / 10))

    def step(operator_us: float, reads_memory: bool) -> StepTime:
        return step_time(
            found, machine, 8, peak=100e12, utilisation=0.3, operator_us=operator_us, reads_memory=reads_memory
        )

    slides = step(5, True)
    assert (slides.arithmetic, slides.memory, slides.host) == pytest.approx((0.1, 0.1, 0.1))
    assert slides.seconds == pytest.approx(0.2) and not slides.waits_for_host
    assert step(25, True).seconds == pytest.approx(0.5) and step(25, True).waits_for_host
    tiles = step(4, False)
    assert (tiles.memory, tiles.host, tiles.seconds) == pytest.approx((0, 0.08, 0.1)) and not tiles.waits_for_host
    assert step(6, False).seconds == pytest.approx(0.12) and step(6, False).waits_for_host


@pytest.mark.slow
def test_the_parts_of_a_slide_stages_step_are_said() -> None:
    words = (*SLIDE, *SUPPOSED, "hardware=h100_80gb", "launch.gpus_per_node=1", "trainer.precision=bf16")
    found = make_plan(planned(*words, "operator_us=25"))
    step = found["step"]
    assert step["memory"] > 0 and step["host"] > step["arithmetic"] + step["memory"]
    assert found["pace"]["step_seconds"] == pytest.approx(step["host"])
    assert "of the host (operator_us=25): the host is the slower" in plan_table(found)


@pytest.mark.slow
def test_a_tile_stages_step_says_where_the_host_is_the_slower() -> None:
    words = (*SMALL, "model.depth=2", "hardware=h100_80gb", "launch.gpus_per_node=1", "trainer.precision=bf16")
    found = make_plan(planned(*words))
    step = found["step"]
    assert step["memory"] == 0 and step["host"] == pytest.approx(found["operators_per_step"] * 10e-6)
    assert found["pace"]["step_seconds"] == pytest.approx(step["host"]) and step["waits_for_host"]
    idle = 1 - step["arithmetic"] / step["host"]
    assert f"bound by the host: the GPU has nothing to do for {idle:.0%} of a step" in plan_table(found)
    table = plan_table(found | {"step": step | {"waits_for_host": False}})
    assert "the GPU is the slower" in table and "bound by the host" not in table
    compiled = make_plan(planned(*words, "trainer.compile=true"))
    assert (compiled["step"]["host"], compiled["step"]["computing"]) == (0, step["arithmetic"])
    table = plan_table(compiled)
    assert "the host's time isn't known and not counted: trainer.compile=true" in table and "would help" not in table
    assert "of the host" not in plan_table(make_plan(planned(*SMALL, "model.depth=2", "hardware=cpu")))


def test_slide_attention_of_many_lengths_is_one_call_where_flash_attention_takes_its_numbers() -> None:
    with torch.device("meta"):
        objective = shape_of(*SLIDE)[0].build()()
    for dtype, calls in ((torch.bfloat16, range(1, 2)), (torch.float32, range(3, 100))):
        q = torch.zeros(2 * 4 + 3 * 5 + 6, 2, 8, dtype=dtype)
        watch = OperationWatch(objective, {})
        with watch, watch.one_call_of_slide_attention():
            watch.begin([])
            SDPA.forward(q, q, q, [(2, 4), (3, 5), (1, 6)])
        assert watch.seen.work["operators"] in calls
