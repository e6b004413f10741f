"""``flop_utilisation`` in a run's record: operations that steps really take, over what the devices can do in the time
they took."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from data.embeddings.sequences import SlideSequences
from data.embeddings.standardisation import Statistics
from data.embeddings.store import EmbeddingStore
from launch.entry import run_command_line
from pretrain.objectives.interface import Moment
from pretrain.plan.operations import of_a_tile, of_an_embedding
from pretrain.plan.rehearsal import CPU_ATTENTION
from pretrain.run.metrics import read_metrics
from pretrain.settings import plugins
from pretrain.settings.composition import load
from pretrain.settings.hardware import peak_of
from pretrain.training.gradients import gradients
from pretrain.training.sharding import lay_mesh, materialise, shard
from tests.data.shards.tile_folders import write_tiles
from tests.pretrain.training.real_steps import Step, one_process, shape_of
from tests.pretrain.training.test_tile_training import TINY
from tests.pretrain.training.wavy_slides import write_wavy_slides

ROOT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")


def config(command: str, *words: str) -> Any:
    return load(command, list(words)).object()


def test_a_tile_costs_what_real_steps_cost() -> None:
    settings = (*TINY, "trainer.accumulate=2", "trainer.activation_checkpointing=full")
    given = config("tile", "run=a", "data.shards=b", *settings)
    run, optim = shape_of(*settings)
    with one_process():
        step = Step(run, optim, "float32", "full", 2)
        flops = step.flops()
    assert of_a_tile(given, fused_attention=False) * given.data.batch_size == flops


def test_slides_of_any_lengths_cost_what_real_steps_cost(tmp_path: Path) -> None:
    store = EmbeddingStore.open(write_wavy_slides(tmp_path, 7, columns=12, rows=12, fewer=19))
    settings = ("model.width=32", "model.depth=3", "data.batch_size=3", "data.batch_tokens=200", "data.lanes=1", "data.field_cells=0", "data.validation_fraction=0")  # fmt: skip
    given = config("slide", "run=a", "data.embeddings=b", *settings)
    own = {name: value for name, value in vars(given.data).items() if name not in ("embeddings", "processes_per_slide")}
    sequences = SlideSequences(store, Statistics.of(store), seed=0, **own)
    each = of_an_embedding(given, store.width, sequences.packing.sizes.tolist(), fused_attention=False)
    flops = tiles = 0
    with one_process():
        with torch.device("meta"):
            objective = plugins.build(given.objective, lambda: plugins.build(given.model, store.width))
        shard(objective, lay_mesh("cpu", 1, 1), "float32")
        materialise(objective, CPU, 0)
        for step in range(20):
            batch = sequences.batch(step)
            with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
                gradients(objective, [(batch, 0)], Moment(step, 20, 0), lambda loss: loss.backward())
            flops += counter.get_total_flops()
            tiles += len(batch.embeddings)
    assert each * tiles == pytest.approx(flops, rel=0.01)


def test_the_record_says_it_where_the_peak_is_known(tmp_path: Path) -> None:
    shards = write_tiles(tmp_path / "shards", [40, 37])
    words = [f"data.shards={shards}", *TINY, "optim.steps=2"]
    each = of_a_tile(config("tile", "run=a", *words), fused_attention=False)
    run_command_line(["tile", f"run={tmp_path / 'run'}", *words, "trainer.peak_tflops=0.02"])
    assert_share(tmp_path / "run", each, 0.02e12)


@pytest.mark.slow
def test_two_processes_can_do_twice_as_much(tmp_path: Path) -> None:
    shards = write_tiles(tmp_path / "shards", [40, 37])
    words = [f"data.shards={shards}", *TINY, "optim.steps=2"]
    each = of_a_tile(config("tile", "run=a", *words), fused_attention=False)
    both = [f"run={tmp_path / 'run'}", *words, "trainer.peak_tflops=0.02", "trainer.devices=2"]
    done = subprocess.run(
        [sys.executable, "-m", "pretrain", "tile", *both],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert_share(tmp_path / "run", each, 2 * 0.02e12)


def assert_share(run: Path, each: float, peak: float) -> None:
    records = read_metrics(run)
    assert len(records) == 2
    for line in records:
        assert line["flop_utilisation"] == pytest.approx(each * line["tiles_per_second"] / peak)
        assert 0 < line["flop_utilisation"] < 1


def test_gpus_are_known_by_their_names_and_others_are_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    for name, precision, peak in (
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("NVIDIA A100-SXM4-40GB", "float32", 19.5e12),
        ("NVIDIA H100 80GB HBM3", "float64", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", None),
        ("NVIDIA H100 PCIe", "bf16", None),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert peak_of(gpu, precision) == peak
    assert peak_of(CPU, "float32") is None
