"""Plans: operations and memory against steps that are really taken, throughput by hand, and the command."""

import json
from collections import Counter
from dataclasses import replace
from math import gcd
from pathlib import Path

import pytest
import torch

from data.fault import Fault
from launch.entry import run_command_line
from pretrain import cli
from pretrain.commands import recipes
from pretrain.commands.plan import Config
from pretrain.objectives.slide_mae import SlideMAE
from pretrain.plan.batches import SupposedSlides, lane
from pretrain.plan.composed_run import compose_run, set_run_words_aside
from pretrain.plan.estimate import Estimate, Settings, estimate, held_all_the_time, shards
from pretrain.plan.evaluation import judged_steps, of_slides
from pretrain.plan.full_plan import make_plan
from pretrain.plan.gpu_overhead import gpu_overhead
from pretrain.plan.published import implied
from pretrain.plan.rehearsal import rehearse
from pretrain.plan.remedies import remedies
from pretrain.plan.run_shape import run_shape
from pretrain.plan.step_time import step_time
from pretrain.plan.table import plan_table
from pretrain.plan.throughput import pace
from pretrain.settings.composition import load
from pretrain.settings.hardware import described
from pretrain.training.even_shares import micro_batch_share, tiles_of
from tests.pretrain.objectives.tile_objectives import teacher_file, teacher_run
from tests.pretrain.training.real_steps import Step, one_process, peak_of_sharing, shape_of

SMALL = ("recipe=small", "model.width=96", "data.batch_size=8")
ROTARY = ("model.position_embedding=rope", "model.qkv_bias=no_key", "model.own_cls_norm=true", "model.registers=4")
CROPS = ("recipe=small_slide", "objective=slide_ibot", "data.batch_size=8", "data.field_cells=0", "data.crops.global_side=6", "data.crops.local_side=4", "objective.prototypes=512", "objective.hidden=128")  # fmt: skip
GIVEN = (f"objective.teacher={teacher_file()}", "objective.teacher_heads=3")
FIXED = ("dinov2_vitg14", "dinov2_vitl16_short", "uni", "openmidnight")


def planned(*words: str) -> Config:
    return load("plan", set_run_words_aside(list(words), [])).object()


@pytest.mark.parametrize(
    ("precision", "checkpointing", "accumulate", "settings"),
    [
        ("float32", "none", 1, SMALL),
        pytest.param("float32", "full", 1, (*SMALL, "model.depth=4"), marks=pytest.mark.slow),
        pytest.param("float32", "selective", 2, (*SMALL, "data.batch_size=16", "objective.separate_ibot_head=true"), marks=pytest.mark.slow),
        pytest.param("bf16", "none", 1, ("recipe=small", "model.width=192", "data.batch_size=8", "objective.prototypes=4096"), marks=pytest.mark.slow),
        pytest.param("float32", "none", 1, (*SMALL, *ROTARY), marks=pytest.mark.slow),
        pytest.param("float32", "full", 2, ("recipe=small_jepa", *SMALL[1:], "data.batch_size=16", "model.drop_path=0.4", "model.drop_path_rising=true", "model.depth=4"), marks=pytest.mark.slow),
        pytest.param("float32", "none", 1, ("recipe=small_jepa", *SMALL[1:], "objective.predictor_width=48"), marks=pytest.mark.slow),
        ("float32", "full", 1, ("recipe=small_mae", "data.batch_size=16")),
        pytest.param("float32", "none", 1, ("recipe=small_mae", "model.width=96", "model.depth=3", "data.batch_size=24"), marks=pytest.mark.slow),
        pytest.param("float32", "full", 1, ("recipe=small_distil", "model.width=96", "data.batch_size=8", *GIVEN), marks=pytest.mark.slow),
        pytest.param("float32", "full", 1, (*SMALL, "objective=distil_heads", "objective.group_size=8", f"objective.teacher={teacher_run()}"), marks=pytest.mark.slow),
        pytest.param("float32", "full", 2, ("recipe=small_lejepa", "model.width=96", "data.batch_size=16"), marks=pytest.mark.slow),
        ("float32", "none", 1, ("recipe=small_slide", "data.batch_size=4", "data.field_cells=0")),
        pytest.param("float32", "none", 1, CROPS, marks=pytest.mark.slow),
        pytest.param("float32", "full", 2, (*CROPS, "model.depth=5", "objective.centring=sinkhorn"), marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_plan_has_the_operations_and_the_memory_of_a_real_step(
    precision: str, checkpointing: str, accumulate: int, settings: tuple[str, ...]
) -> None:
    run, optim = shape_of(*settings)
    found = estimate(run, Settings(1, 1, precision, checkpointing, accumulate), fused_attention=False)
    with one_process():
        step = Step(run, optim, precision, checkpointing, accumulate)
        assert found.peak == pytest.approx(step.peak(), rel=0.05)
        assert sum(found.flops.values()) == step.flops()


def test_attention_by_distance_is_planned_as_a_kernel_and_can_not_share_slides() -> None:
    words = ("recipe=small_slide", "data.batch_size=4", "data.field_cells=0", "model=slide_vit", "model.width=96")
    run, optim = shape_of(*words, "model.depth=2", "model.heads=4", "model.feed_forward_width=384")
    found = estimate(run, Settings(1, 1, "float32", "none", 1), fused_attention=False)
    with one_process():
        assert sum(found.flops.values()) == Step(run, optim, "float32", "none").flops()
    ways = [found.flops["encoder blocks, attention", way] for way in ("forward", "backward")]
    assert 0 < 5 * ways[0] == 2 * ways[1]  # two products forward, five backward
    with pytest.raises(
        Fault, match=r"data\.processes_per_slide=2: SlideViT can't share a slide over processes; 1 gives"
    ):
        estimate(run, Settings(2, 2, "float32", "none", 1, 2), fused_attention=False)


def test_the_samples_that_stochastic_depth_keeps_are_planned_as_they_are_drawn() -> None:
    run, optim = shape_of(*SMALL, "data.batch_size=16", "model.drop_path=0.4", "model.depth=3")
    found = estimate(run, Settings(1, 1, "float32", "none", 1), fused_attention=False)
    with one_process():
        step = Step(run, optim, "float32", "none")
        assert sum(found.flops.values()) == pytest.approx(
            step.flops(), rel=0.002
        )  # which of the wanted tokens, is drawn
        assert found.peak == pytest.approx(step.peak(), rel=0.05)


def test_operations_are_those_of_the_formulas() -> None:
    width, depth, hidden, tiles = 96, 3, 384, 8
    run, _ = shape_of(
        "recipe=small_mae",
        f"model.width={width}",
        f"model.depth={depth}",
        f"model.feed_forward_width={hidden}",
        f"data.batch_size={tiles}",
    )
    flops = estimate(run, Settings(1, 1, "float32", "none", 1), fused_attention=False).flops
    visible = 1 + int(36 * 0.25)  # of 6 × 6 patches, and the class token
    linear = 2 * tiles * visible * depth * (4 * width**2 + 2 * width * hidden)
    products = 4 * tiles * visible**2 * depth * width
    assert flops["encoder blocks, linear maps", "forward"] == linear
    assert flops["encoder blocks, linear maps", "backward"] == 2 * linear
    assert flops["encoder blocks, attention", "forward"] == products
    assert flops["encoder blocks, attention", "backward"] == 2 * products
    assert flops["encoder patch embedding", "forward"] == 2 * tiles * 36 * 3 * 16**2 * width


@pytest.mark.parametrize("settings", [(*SMALL, "model.depth=7", "model.drop_path=0.2", "objective.group_size=4"), pytest.param(("recipe=small_slide", "data.batch_size=4", "model.depth=5"), marks=pytest.mark.slow)])  # fmt: skip
def test_few_blocks_tell_about_many(settings: tuple[str, ...]) -> None:
    run, _ = shape_of(*settings)
    found = estimate(run, Settings(2, 2, "bf16", "none", 1), fused_attention=True)
    whole = rehearse(run.build(), run.batch(2, 1), processes=2, precision="bf16")
    assert found.flops == whole.flops
    held = sum(size for name, size in found.held.items() if name != "gradients")
    assert found.peak == pytest.approx(held + max(sum(phase.values()) for phase in whole.phases), rel=0.06)


def test_a_kernel_that_keeps_no_pairs_takes_less_memory_and_as_many_operations_forward() -> None:
    run, _ = shape_of(*SMALL, "model.depth=2", "data.crops.global_size=192")
    products, fused = (
        estimate(run, Settings(1, 1, "float32", "none", 1), fused_attention=way) for way in (False, True)
    )
    key = ("encoder blocks, attention", "forward")
    assert fused.peak < products.peak and fused.flops[key] == products.flops[key]


def test_more_processes_hold_less_of_the_networks() -> None:
    run, _ = shape_of("recipe=small", "model.depth=2")
    alone, four = (held_all_the_time(run, Settings(n, n, "float32", "none", 1)) for n in (1, 4))
    replicated = held_all_the_time(run, Settings(4, 2, "float32", "none", 1))
    for part in ("parameters, encoder", "optimiser (two moments)", "teacher", "gradients"):
        assert alone[part] / 4 <= four[part] < alone[part] / 3.9
        assert alone[part] / 2 <= replicated[part] < alone[part] / 1.9


def test_the_first_process_holds_the_larger_part_of_what_does_not_divide() -> None:
    from torch import empty, nn

    assert shards([nn.Parameter(empty(5, 3)), nn.Parameter(empty(1, 1, 7))], 4) == 2 * 3 + 7


def test_pace_is_operations_over_what_is_used_of_the_peak() -> None:
    found = Estimate(samples=6, flops=Counter({("a", "forward"): 3 * 10**12}), held={}, highest={})
    machine = described("h100_80gb")
    step = step_time(found, machine, 4, peak=100e12, utilisation=0.3, operator_us=10, reads_memory=False)
    speed = pace(
        found,
        step=step,
        dollars_per_hour=2.0,
        steps=36_000,
        nodes=2,
        processes_per_node=4,
        sample=(0.5, 0.01),
    )
    assert speed.step_seconds == pytest.approx(0.1) and speed.per_second == pytest.approx(480)
    assert (speed.hours, speed.gpu_hours, speed.dollars) == pytest.approx((1.0, 8.0, 16.0))
    assert (speed.megabytes_per_second, speed.cores) == pytest.approx((120.0, 2.4))


def test_lanes_hold_the_largest_slide_and_then_what_fits() -> None:
    slides = SupposedSlides(width=8, tiles=100, largest=450)
    assert lane(slides, 4, None, 0, largest=True) == [450, 100, 100, 100]
    assert lane(slides, 4, 600, 0, largest=True) == [450, 100]
    assert lane(slides, 4, 400, 0, largest=True) == [450]  # a slide larger than a lane's share goes alone
    assert lane(slides, 2, 400, 5, largest=False) == [25, 25]


def test_a_batch_that_does_not_divide_names_what_does() -> None:
    data = {"batch_size": 768, "lanes": 96, "slides_per_lane": None}
    assert tiles_of(data, 32, 1, 24) == 24
    with pytest.raises(Fault, match=r"product must be one of 1, 2, 4, 8, 16, 32\."):
        tiles_of(data, 48, 1, 24)
    with pytest.raises(Fault, match=r"data.batch_size=768 is not a multiple of objective.group_size=5: change"):
        tiles_of(data, 48, 1, 5)
    with pytest.raises(Fault, match=r"data.lanes=32 can't be shared evenly by 24 processes"):
        make_plan(planned("recipe=midnight", "launch.nodes=3"))
    with pytest.raises(Fault, match=r"by 8 processes.*The plan supposes 8 GPUs a node, .*launch\.gpus_per_node= says"):
        make_plan(planned("recipe=slide"))
    with pytest.raises(Fault, match=r"by 3 processes × trainer\.accumulate=1; make it a multiple\.$"):
        make_plan(planned("recipe=slide", "launch.gpus_per_node=3"))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["launch.nodes=0"], "launch.nodes=0 is not allowed: it must be at least 1."),
        (["launch.nodes=-2"], "launch.nodes=-2 is not allowed: it must be at least 1."),
        (["launch.gpus_per_node=-8"], "launch.gpus_per_node=-8 is not allowed: it must be at least 1."),
        (["reserve=-0.1"], "reserve=-0.1 is not allowed: it must be at least 0 and less than 1."),
        (["reserve=1"], "reserve=1.0 is not allowed"),
        (["hardware.memory_gib=-16"], "hardware.memory_gib=-16.0 is not allowed: it must be more than 0."),
        (["dollars_per_hour=-1"], "dollars_per_hour=-1.0 is not allowed: it must be at least 0."),
        (["utilisation=1.2"], "utilisation=1.2 is not allowed: it must be more than 0 and at most 1."),
        (["slides.tiles=0"], "slides.tiles=0 is not allowed: it must be at least 1."),
        (["recipe=small_slide", "slides.tiles=500", "slides.largest=400"], "slides.largest=400 is less than slides.tiles=500"),
        (["input.read_ms=-1"], "input.read_ms=-1.0 is not allowed"),
        (["trainer.accumulate=0"], "trainer.accumulate=0 is not allowed: it must be at least 1."),
        (["trainer.shard_size=3"], "trainer.shard_size=3 does not divide the 1 processes."),
    ],
)  # fmt: skip
def test_machines_that_cannot_be_are_refused(words: list[str], sentence: str) -> None:
    with pytest.raises(Fault) as refused:
        make_plan(planned(*words, "hardware=cpu"))
    assert str(refused.value).startswith(sentence)


def test_a_machine_of_cores_is_one_process_unless_it_is_told() -> None:
    found = make_plan(planned(*SMALL, "hardware=cpu"))
    assert found["processes"] == 1
    assert "CUDA's context (assumed)" not in found["peak_bytes_by_part"] and found["augmentation_bytes"] == 0
    said = plan_table(found)
    assert "machine-hours" in said and "GPU" not in said and " 0 dollars" not in said
    with pytest.raises(Fault, match="can't be shared by 4 processes") as refused:
        make_plan(planned(*SMALL, "hardware=cpu", "launch.gpus_per_node=4"))
    assert refused.value.code == 2  # as a run's command line has it


SLIDE = (
    "recipe=small_slide",
    "data.field_cells=0",
    "data.batch_size=4",
    "data.lanes=4",
    "model.depth=2",
    "objective.decoder_depth=1",
)


@pytest.mark.slow
def test_evaluation_is_counted_and_said() -> None:
    words = (
        "hardware=cpu",
        "optim.steps=10",
        "optim.warmup_steps=4",
        "trainer.checkpoint_every=4",
        "data.validation_fraction=0.25",
        "slides.width=48",
        "slides.tiles=60",
        "slides.largest=60",
        "slides.count=40",
    )
    found = make_plan(planned(*SLIDE, *words))
    assert (found["evaluation"]["times"], found["evaluation"]["samples"]) == (3, 10)  # after steps 4, 8 and the last
    run = run_shape(compose_run([*SLIDE, "data.crop=1"], []), SupposedSlides(48, 60, 60))
    four = estimate(run, Settings(1, 1, "float32", "none", 1), fused_attention=False).flops
    forward = sum(count for (_, way), count in four.items() if way == "forward") / 4
    assert found["evaluation"]["flops"] == pytest.approx(3 * 10 * 2 * forward, rel=0.01)
    assert found["step"]["memory"] == found["step"]["host"] == 0  # utilisation= covers them on CPUs
    pace = found["pace"]
    assert pace["hours"] == pytest.approx(10 * pace["step_seconds"] / 3600 + pace["evaluation_hours"])
    text = plan_table(found)
    assert "are evaluation: 3 checkpoints" in text and "2 forwards of 10 slides, shared by the processes" in text
    assert "3,072 A100-hours" not in text
    found["settings"] = ["recipe=gigapath_slide"]
    assert "3,072 A100-hours" in plan_table(found)
    found["evaluation"]["samples"] = 0
    assert "no evaluation: data.validation_fraction=0" in plan_table(found)


@pytest.mark.slow
def test_two_micro_batches_tell_about_four() -> None:
    run, _ = shape_of(*SMALL, "data.batch_size=16", "objective.group_size=4", "model.depth=2")
    two = run.batch(2, 2)
    found = [
        rehearse(run.build(), replace(two, parts=parts), processes=2, shard_size=2, precision="bf16")
        for parts in (2, 4)
    ]
    two_pairs, four = (
        {name: times * n for name, n in one.work.items()} for times, one in zip((2, 1), found, strict=True)
    )
    assert two_pairs == pytest.approx(four, rel=0.03)  # what is done once a step is counted twice
    assert {name: 2 * count for name, count in found[0].flops.items()} == found[1].flops


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "words"), [("titan_slide", ("slides.width=768",)), ("ticon", ("data.further=[a,b,c,d]",))]
)
def test_recipes_of_regions_are_planned(recipe: str, words: tuple[str, ...]) -> None:
    smaller = ("data.batch_size=16", "data.lanes=4", "model.width=96", "model.feed_forward_width=96")
    found = make_plan(planned(f"recipe={recipe}", *words, *smaller, "hardware=a100_80gb", "launch.gpus_per_node=4"))
    assert found["pace"]["hours"] > 0


def test_judging_takes_a_run_of_the_published_recipe_less_than_a_twentieth_of_its_tokens() -> None:
    """Forwards alone, of whole slides; training passes each slide's crop forward and, at twice the cost, backward."""
    run = run_shape(compose_run(["recipe=gigapath_slide"], []), SupposedSlides(1536, 8090, 50_000, count=171_189))
    times, samples = len(judged_steps(run)), run.watch.held_out_slides
    assert samples == 256 and times == 81
    trained = run.steps * run.data.batch_size * run.data.crop**2
    assert times * samples * SlideMAE.evaluation_passes / trained < 0.05


def test_held_out_slides_are_shared_by_the_processes() -> None:
    run = run_shape(compose_run([*SLIDE, "data.validation_fraction=0.25"], []), SupposedSlides(48, 60, 60, count=40))
    one, four = (of_slides(run, Settings(n, n, "float32", "none", 1), fused_attention=False) for n in (1, 4))
    assert one.samples == four.samples == 10 and four.flops == pytest.approx(one.flops * 3 / 10)


def test_a_tile_run_s_probe_and_looks_are_counted_and_said() -> None:
    words = (
        "recipe=small",
        "hardware=cpu",
        "optim.steps=1000",
        "trainer.checkpoint_every=300",
        "watch.every=100",
        "watch.probe=tiles",
        "watch.probe_images=700",
    )
    found = make_plan(planned(*words))
    judged, run = found["evaluation"], run_shape(compose_run(list(words[:1]), []), SupposedSlides(1, 1, 1))
    assert (judged["times"], judged["samples"], judged["looks"]) == (
        4,
        700,
        10,
    )  # after steps 300, 600, 900 and the last
    model, side = run.model, run.data.crops.global_size // run.model["patch_size"]
    n, width = side * side + 1 + model["registers"], model["width"]
    behind_attention = (
        2 * (width + 2 * model["feed_forward_width"]) * width
    )  # a token's, and in the last block the class token's alone
    block = n * (6 * width**2 + 4 * n * width + behind_attention)
    patches = 2 * side * side * 3 * model["patch_size"] ** 2 * width
    image = patches + model["depth"] * block - (n - 1) * behind_attention
    images = 4 * 700 + 10 * (256 + 2 * 2 * run.data.batch_size)
    assert judged["flops"] == pytest.approx(images * image, rel=0.01)
    pace = found["pace"]
    assert pace["hours"] == pytest.approx(1000 * pace["step_seconds"] / 3600 + pace["evaluation_hours"])
    assert (
        "4 checkpoints (trainer.checkpoint_every=), at each a forward of 700 labelled tiles (watch.probe_images=); 10"
        " looks" in plan_table(found)
    )
    judged["samples"] = 0
    assert "are evaluation: no watch.probe; 10 looks (watch.every=)" in plan_table(found)
    judged["looks"] = 0
    assert "no evaluation: neither watch.probe nor watch.every is given" in plan_table(found)


def test_processes_that_share_a_slide_hold_less_of_the_largest() -> None:
    slides = SupposedSlides(width=48, tiles=60, largest=1500)
    run = run_shape(compose_run(list(SLIDE), []), slides)
    alone, together = (estimate(run, Settings(4, 4, "float32", "none", n, n), fused_attention=True) for n in (1, 4))
    blocks = "activations of blocks"
    assert together.highest[blocks] < 0.4 * alone.highest[blocks] and together.peak < 0.6 * alone.peak
    assert (alone.samples, together.samples) == (1, 1)  # four lanes one after the other, a quarter of each
    other = run_shape(compose_run(["recipe=small_slide", "model.heads=3", "model.width=48"], []), slides)
    with pytest.raises(Fault, match=r"data.processes_per_slide=4 doesn't divide model.heads=3"):
        micro_batch_share(other, 4, 1, 4)
    with pytest.raises(Fault, match=r"data.processes_per_slide=3 doesn't divide the run's 4 processes"):
        micro_batch_share(run, 4, 1, 3)


@pytest.mark.slow
def test_processes_that_share_a_slide_take_the_memory_that_is_planned(tmp_path: Path) -> None:
    words, slides = (
        ("recipe=small_slide", "data.batch_size=4", "data.lanes=4", "data.field_cells=0"),
        SupposedSlides(48, 600, 1500),
    )
    torch.multiprocessing.spawn(peak_of_sharing, (tmp_path, 2, words, slides), nprocs=2)
    run, _ = shape_of(*words, slides=slides)
    found = estimate(run, Settings(2, 2, "float32", "none", 1, together=2), fused_attention=False)
    for rank in ("0", "1"):
        assert found.peak == pytest.approx(int((tmp_path / rank).read_text()), rel=0.05)


def test_sharing_slides_is_a_remedy_of_the_slide_stage() -> None:
    def of(settings: Settings) -> Estimate:
        return Estimate(1, Counter(), {}, {"": 8 // settings.together})

    settings = Settings(8, 8, "bf16", "full", 1)
    *_, last = remedies(settings, 1, of, lambda one: one.peak <= 2, gpu=True, slides=True)
    assert last.words == "data.processes_per_slide=4 trainer.accumulate=4" and last.fits
    assert not any("per_slide" in one.words for one in remedies(settings, 1, of, lambda one: False, gpu=True))


@pytest.mark.slow
def test_midnight_at_full_size_fits_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_command_line(
        [
            "plan",
            "recipe=midnight",
            "trainer.precision=bf16",
            "launch.nodes=4",
            "launch.gpus_per_node=8",
            f"out={tmp_path / 'plan.json'}",
        ]
    )
    text = capsys.readouterr().out
    assert "It fits" in text and "computed and not measured" in text and "20% of the peak" in text
    found = json.loads((tmp_path / "plan.json").read_text())["computed"]
    assert found["parameters"]["encoder"] == recipes.describe_recipe("midnight").parameters
    assert found["peak_bytes"] == sum(found["peak_bytes_by_part"].values()) < found["room_bytes"]
    both = found["peak_bytes_by_activation_checkpointing"]
    assert both["full"] < both["none"] == found["peak_bytes"]
    # A forward pass is two operations for each weight and token; a backward twice that, on six tenths of the samples.
    tokens = 2 * 257 + 8 * 50
    weights = 40 * (4 * 1536**2 + 3 * 1536 * 4096)
    assert found["flops_per_sample"]["encoder blocks, linear maps, forward"] == pytest.approx(
        2 * tokens * 0.6 * weights, rel=0.05
    )


@pytest.mark.slow
def test_openmidnight_fits_as_it_was_published() -> None:
    found = make_plan(planned("recipe=openmidnight", "hardware=h100_80gb"))  # on eight, of 80 GB
    assert found["fits"] and found["samples_per_step_and_process"] == 48
    assert found["peak_bytes"] / 2**30 == pytest.approx(54.8, abs=0.5)  # the README says so
    assert {"CUDA's context (assumed)", "NCCL's buffers, groups: 1 (assumed)"} <= set(found["peak_bytes_by_part"])
    gathers, reduces = (
        found["communication"]["sent"][f"{name}, backward"] for name in ("all-gather", "reduce-scatter")
    )
    assert reduces == pytest.approx(2 * gathers)  # float32, and bfloat16
    assert found["step"]["exposed"] < 0.01 * found["step"]["computing"]


@pytest.mark.slow
def test_what_does_not_fit_is_told_what_to_change() -> None:
    run, _ = shape_of(*SMALL)
    whole = estimate(run, Settings(1, 1, "float32", "none", 1), fused_attention=True)
    needed = 0.8 * whole.peak + sum(gpu_overhead(whole.calls, 1, whole.workspace).values())
    machine = ("launch.gpus_per_node=1", f"hardware.memory_gib={needed / 2**30}", "reserve=0")
    found = make_plan(planned(*SMALL, *machine))
    assert not found["fits"] and found["remedies"][0]["words"] == "trainer.precision=bf16"
    *insufficient, last = found["remedies"]
    assert last["fits"] and not any(remedy["fits"] for remedy in insufficient)
    again = make_plan(planned(*SMALL, *machine, *last["words"].split()))
    assert again["fits"] and again["peak_bytes"] == last["peak"]


def test_a_slip_is_answered_with_the_nearest_setting_of_the_plan_or_of_the_run() -> None:
    with pytest.raises(Fault, match="did you mean 'utilisation'"):
        cli.parse(["plan", "utilization=0.3"])
    with pytest.raises(Fault, match=r"did you mean 'trainer.accumulate'"):
        make_plan(planned("recipe=midnight", "trainer.acumulate=2"))
    with pytest.raises(Fault, match=r"fits no stage.*midnight"):
        make_plan(planned("recipe=midnigth"))
    with pytest.raises(Fault, match="can't be planned"):
        make_plan(planned("trainer.precision=float64"))


@pytest.mark.slow
@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_can_be_planned_at_full_size(name: str) -> None:
    tree = recipes.compose_recipe(name).tree
    groups = tree.data.batch_size // tree.objective.get("group_size", 1)
    processes = gcd(tree.data.lanes, groups) // tree.trainer.accumulate
    nodes, gpus = (processes // 8, 8) if processes % 8 == 0 else (1, processes)
    found = make_plan(
        planned(
            f"recipe={name}",
            "trainer.precision=bf16",
            f"launch.nodes={nodes}",
            f"launch.gpus_per_node={gpus}",
            *(GIVEN if "distil" in name else ()),
        )
    )
    assert found["peak_bytes"] > 0 and found["pace"]["hours"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", FIXED)
def test_published_hours_imply_a_plausible_share_of_the_peak(name: str) -> None:
    config = planned()
    row = implied(name, config.runs[name], config.slides)
    assert 0.15 < row.utilisation < 0.6
    if name == "openmidnight":
        assert row.utilisation == pytest.approx(0.21, abs=0.02)  # what they say themselves
