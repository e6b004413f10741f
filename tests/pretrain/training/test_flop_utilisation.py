"""``flop_utilisation`` in a run's record: operations that steps really take, over what the devices can do in the time
they took."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from data.embeddings.standardisation import Statistics
from data.embeddings.store import EmbeddingStore
from launch.entry import run_command_line
from pretrain.objectives.dinov2 import DINOv2
from pretrain.objectives.interface import Moment, Objective
from pretrain.objectives.slide_mae import SlideMAE
from pretrain.plan.rehearsal import CPU_ATTENTION
from pretrain.run.metrics import read_metrics
from pretrain.settings import plugins
from pretrain.settings.composition import load
from pretrain.settings.hardware import allow_tf32, peak_of
from pretrain.training.gradients import gradients
from pretrain.training.sharding import lay_mesh, materialise, shard
from pretrain.training.slide_batches import sequences_of
from pretrain.training.utilisation import operations_of_step, silent_about_operations
from tests.data.shards.tile_folders import write_tiles
from tests.pretrain.objectives import tile_objectives
from tests.pretrain.objectives.pairwise_objective import Pairwise
from tests.pretrain.training.real_steps import Step, one_process, shape_of
from tests.pretrain.training.test_slide_training import SMALL
from tests.pretrain.training.test_slide_training import words as slide_words
from tests.pretrain.training.test_tile_training import TINY
from tests.pretrain.training.wavy_slides import write_wavy_slides

ROOT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")
DINOV2 = ("recipe=small", "model.width=96", "model.depth=3", "data.batch_size=8", "objective.group_size=4")
DINOV3 = (
    "recipe=dinov3_gram", "scale=smoke", "model.width=96", "model.depth=3", "model.heads=3", "model.feed_forward_width=384",
    "data.batch_size=8", "objective.group_size=4", "data.crops.global_size=96", "data.crops.local_size=48",
    "data.crops.local_count=2",
)  # fmt: skip
DINO = ("recipe=small_dino", *DINOV2[1:])
JEPA = ("recipe=small_jepa", *DINOV2[1:])
MAE = ("recipe=small_mae", "model.depth=3", "data.batch_size=16")
LEJEPA = (
    "recipe=small_lejepa", "model.width=96", "model.depth=3", "data.batch_size=8", "objective.group_size=4",
    "objective.hidden=64",
)  # fmt: skip
DISTIL = (
    "recipe=small_distil", "model.width=96", "model.depth=3", "data.batch_size=8", "objective.group_size=4",
    f"objective.teacher={tile_objectives.teacher_file()}", "objective.teacher_heads=3",
)  # fmt: skip
DISTIL_HEADS = (
    "recipe=small", "objective=distil_heads", f"objective.teacher={tile_objectives.teacher_run()}", "objective.group_size=4",
    "model.width=96", "model.depth=3", "data.batch_size=8",
)  # fmt: skip
SLIDE_MAE = ("recipe=small_slide", "data.batch_size=4", "data.field_cells=0")
SLIDE_VIT = ("model=slide_vit", "model.width=96", "model.depth=2", "model.heads=4", "model.feed_forward_width=384")
DECODER = tuple(f"objective.decoder_{name}" for name in ("width=64", "depth=2", "heads=4", "feed_forward_width=128"))
WIDER = ("model.registers=4", "model.feed_forward=swiglu", "model.feed_forward_width=256")
STEPS = {
    "dinov2": ("none", 1, DINOV2),
    "dinov2 wider, checkpointed": ("full", 1, (*DINOV2, *WIDER)),
    "dinov2 with rotary positions, checkpointed": (
        "full",
        1,
        (*DINOV2, "model.position_embedding=rope", "model.qkv_bias=no_key", "model.own_cls_norm=true"),
    ),
    "dinov2 of long crops, checkpointed in part": ("selective", 1, (*DINOV2, "data.crops.global_size=192")),
    "dinov2 of crops that attend by a kernel": (
        "full",
        1,
        (*DINOV2, "model.depth=2", "data.crops.global_size=368", "data.crops.local_count=0"),
    ),
    "dinov2 with another head and more views": (
        "none",
        1,
        (*DINOV2, "objective.separate_ibot_head=true", "objective.ibot_prototypes=2048", "data.crops.local_count=8"),
    ),
    "dinov2 with stochastic depth": ("full", 1, (*DINOV2, "data.batch_size=16", "model.drop_path=0.4")),
    "dinov2 with stochastic depth and no layer scale": (
        "full",
        1,
        (*DINOV2, "data.batch_size=16", "model.drop_path=0.4", "model.layer_scale=0"),
    ),
    "dinov2 in two parts": ("none", 2, (*DINOV2, "objective.prototypes=4096")),
    "dinov2 in two parts, centred": ("none", 2, (*DINOV2, "objective.prototypes=4096", "objective.centring=centre")),
    "dinov3 with Gram anchoring": ("none", 1, (*DINOV3, "objective.gram_size=144")),
    "dinov3 in two parts, checkpointed": ("full", 2, (*DINOV3, "objective.gram_weight=0")),
    "dino": ("none", 1, DINO),
    "dino wider, checkpointed": ("full", 2, (*DINO, *WIDER, "data.crops.local_count=6")),
    "dino without local views": (
        "none",
        1,
        (*DINO, "model.drop_path=0.3", "data.batch_size=16", "data.crops.local_count=0"),
    ),
    "jepa": ("none", 1, JEPA),
    "jepa of a narrow predictor, in two parts, checkpointed, with rising stochastic depth": (
        "full",
        2,
        (
            *JEPA,
            "data.batch_size=16",
            "objective.predictor_width=48",
            "model.drop_path=0.4",
            "model.drop_path_rising=true",
        ),
    ),
    "mae": ("none", 1, MAE),
    "mae wider, checkpointed": ("full", 2, (*MAE, *WIDER, "objective.mask_ratio=0.5", "objective.decoder_depth=4")),
    "lejepa": ("none", 1, LEJEPA),
    "lejepa in two parts, checkpointed": ("full", 2, LEJEPA),
    "distil, checkpointed": ("full", 1, DISTIL),
    "distil_heads in two parts, checkpointed": ("full", 2, DISTIL_HEADS),
    "slide_mae": ("none", 1, SLIDE_MAE),
    "slide_mae checkpointed": ("full", 1, SLIDE_MAE),
    "slide_mae of gaps, with dropout": (
        "full",
        1,
        (
            *SLIDE_MAE,
            "objective.decoder_start=token",
            "model.segment_lengths=[16,32,64]",
            "model.dilated_ratios=[1,4,16]",
            "model.dropout=0.1",
            "data.mask_ratio=0.5",
        ),
    ),
    "slide_mae with stochastic depth": ("full", 1, (*SLIDE_MAE, "model.drop_path=0.2")),
    "slide_context": ("none", 1, (*SLIDE_MAE, "objective=slide_context", "data.further=[b,c]", *DECODER)),
    "slide_context with attention by distance": (
        "full",
        2,
        (*SLIDE_MAE, *SLIDE_VIT, "objective=slide_context", "data.further=[b]", *DECODER),
    ),
    "slide_ibot": (
        "none",
        1,
        (
            *SLIDE_MAE,
            "objective=slide_ibot",
            "data.crops.global_side=6",
            "data.crops.local_side=4",
            "objective.prototypes=512",
            "objective.hidden=128",
        ),
    ),
    "slide_pairs": ("none", 1, (*SLIDE_MAE, "objective=slide_pairs", "objective.predictor_width=64")),
    "slide_pairs with attention by distance": (
        "full",
        2,
        (*SLIDE_MAE, *SLIDE_VIT, "objective=slide_pairs", "objective.pooled=mean_std"),
    ),
    "slide_mae with mask tokens in the encoder": (
        "full",
        1,
        (*SLIDE_MAE, "objective.mask_tokens=encoder", "objective.decoder_start=token"),
    ),
    "slide_mae of clusters with attention by distance": (
        "none",
        1,
        (
            *SLIDE_MAE,
            *SLIDE_VIT,
            "objective.target=clusters",
            "objective.loss=cross_entropy",
            "data.inputs=standardised",
        ),
    ),
    "slide_mae with attention by distance": ("full", 1, (*SLIDE_MAE, *SLIDE_VIT)),
    "slide_mae with attention by distance within reach": ("none", 1, (*SLIDE_MAE, *SLIDE_VIT, "model.reach=3")),
}


def test_every_objective_is_held_to_real_steps() -> None:
    objectives = {path.stem for path in (ROOT / "configs" / "objective").glob("*.yaml")}
    assert objectives == {name.split()[0].strip(",") for name in STEPS}


FURTHER = {name for name in STEPS if name.startswith("slide_") and name not in ("slide_mae", "slide_ibot")}
FURTHER |= {name for name in STEPS if name.startswith("jepa of")}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in FURTHER)) for n in STEPS])
def test_a_step_costs_what_torchs_counter_counts(name: str) -> None:
    checkpointing, accumulate, settings = STEPS[name]
    run, optim = shape_of(*settings)
    with one_process():
        step = Step(run, optim, "float32", checkpointing, accumulate)
        told = operations_of_step(step.objective, [part for part, _ in step.parts], checkpointing)
        assert told == pytest.approx(step.flops(), rel=0.03)


def test_slides_of_any_lengths_cost_what_real_steps_cost(tmp_path: Path) -> None:
    store = EmbeddingStore.open(write_wavy_slides(tmp_path, 7, columns=12, rows=12, fewer=19))
    given = load(
        "slide",
        [
            "run=a",
            "data.embeddings=b",
            "model.width=32",
            "data.batch_size=3",
            "data.batch_tokens=200",
            "data.lanes=1",
            "data.field_cells=0",
        ],
    ).object()
    sequences = sequences_of(store, Statistics.of(store), given.data, seed=0, kind=SlideMAE)
    with one_process():
        with torch.device("meta"):
            objective = plugins.build(given.objective, lambda: plugins.build(given.model, store.width))
        shard(objective, lay_mesh("cpu", 1, 1), "float32")
        materialise(objective, CPU, 0)
        for step in range(4):
            batch = sequences.batch(step)
            assert operations_of_step(objective, [batch], "none") == pytest.approx(counted(objective, batch), rel=0.03)


class AllPatches(DINOv2):
    all_patches = True
    operations = DINOv2.operations


def test_an_objective_that_reads_all_patches_may_say_what_its_parent_says() -> None:
    ours = tile_objectives.dinov2()
    ours.__class__ = AllPatches
    batch = tile_objectives.batch(8)
    assert silent_about_operations(ours) == []
    assert operations_of_step(ours, [batch], "none") == pytest.approx(counted(ours, batch), rel=0.03)


def counted(objective: Objective, batch: object) -> int:
    """A step's operations by torch's counter."""
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        gradients(objective, [(batch, 0)], Moment(0, 20, 0), lambda loss: loss.backward())
    return counter.get_total_flops()


class Longer(DINOv2):
    """Computes more than it says."""


class Stem(torch.nn.Module):
    """Says nothing."""


def test_what_a_class_inherits_is_not_taken_for_its_own() -> None:
    ours = tile_objectives.dinov2()
    assert silent_about_operations(ours) == []
    ours.__class__ = Longer
    assert silent_about_operations(ours) == ["Longer"]
    own = Pairwise(tile_objectives.encoder(), width=8)
    assert silent_about_operations(own) == ["Pairwise", "Scale"]  # and torch's Sequential is for Pairwise to count
    own.encoder = Stem()
    assert silent_about_operations(own) == ["Pairwise", "Scale", "Stem"]


def test_training_does_without_the_plan() -> None:
    code = (
        "import sys, pretrain.commands.tile, pretrain.commands.slide; print([name for name in sys.modules if"
        " name.startswith('pretrain.plan')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.usefixtures("one_thread")
def test_the_record_says_it_where_the_peak_is_known(tmp_path: Path) -> None:
    shards = write_tiles(tmp_path / "shards", [40, 37])
    words = [f"data.shards={shards}", *TINY, "optim.steps=2"]
    each = each_of_tiny()
    run_command_line(["tile", f"run={tmp_path / 'run'}", *words, "trainer.peak_tflops=0.02"])
    assert_share(tmp_path / "run", each, 0.02e12)


@pytest.mark.usefixtures("one_thread")
def test_the_record_of_slides_says_it_too(tmp_path: Path) -> None:
    store = write_wavy_slides(tmp_path / "embeddings", 6, columns=8, rows=6, fewer=6)
    run_command_line(
        slide_words(
            tmp_path / "run", store, *SMALL, "optim.steps=2", "optim.warmup_steps=1", "trainer.peak_tflops=0.02"
        )
    )
    shares = [line["flop_utilisation"] for line in read_metrics(tmp_path / "run") if "loss" in line]
    assert len(shares) == 2 and all(0 < share < 1 for share in shares)


@pytest.mark.usefixtures("one_thread")
def test_an_objective_that_does_not_say_its_operations_has_no_figure_and_is_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = write_tiles(tmp_path / "shards", [40, 37])
    (tmp_path / "own" / "objective").mkdir(parents=True)
    (tmp_path / "own" / "objective" / "longer.yaml").write_text(
        f"defaults: [dinov2, _self_]\n_target_: {__name__}.Longer\n"
    )
    own = ["objective=longer", "--config-dir", str(tmp_path / "own"), "trainer.peak_tflops=0.02"]
    run_command_line(["tile", f"run={tmp_path / 'run'}", f"data.shards={shards}", *TINY, "optim.steps=2", *own])
    assert not any("flop_utilisation" in line for line in read_metrics(tmp_path / "run"))
    assert capsys.readouterr().err.count("no flop_utilisation, since Longer has no method operations() of its own") == 1


@pytest.mark.slow
def test_two_processes_can_do_twice_as_much(tmp_path: Path) -> None:
    shards = write_tiles(tmp_path / "shards", [40, 37])
    words = [f"data.shards={shards}", *TINY, "optim.steps=2"]
    both = [f"run={tmp_path / 'run'}", *words, "trainer.peak_tflops=0.02", "trainer.devices=2"]
    done = subprocess.run(
        [sys.executable, "-m", "pretrain", "tile", *both],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert_share(tmp_path / "run", each_of_tiny(), 2 * 0.02e12)


def each_of_tiny() -> float:
    """Operations that a tile of `TINY` costs, counted."""
    with one_process():
        return Step(*shape_of(*TINY), "float32", "none").flops() / 16


def assert_share(run: Path, each: float, peak: float) -> None:
    """Steps took ``each`` a tile, but for how many patches are masked, which is drawn."""
    records = [line for line in read_metrics(run) if "loss" in line]
    assert len(records) == 2
    for line in records:
        assert line["flop_utilisation"] == pytest.approx(each * line["tiles_per_second"] / peak, rel=0.03)
        assert 0 < line["flop_utilisation"] < 1


@pytest.mark.parametrize("gpu", [True, False])
def test_float32_is_multiplied_as_tf32_where_there_is_a_gpu(gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", chosen.append)
    allow_tf32()
    assert chosen == (["high"] if gpu else [])


def test_gpus_are_known_by_their_names_and_others_are_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    for name, precision, peak in (
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("NVIDIA A100-SXM4-40GB", "float32", 156e12),
        ("NVIDIA H100 80GB HBM3", "float64", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", None),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA RTX of tomorrow", "bf16", None),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert peak_of(gpu, precision) == peak
    assert peak_of(CPU, "float32") is None
