"""What a user hangs into Lightning's trainer: callbacks and loggers of their own, a profiler, a trial of one step."""

import csv
import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest

from launch.entry import run_command_line
from pretrain.run.metrics import read_metrics
from tests.pretrain.training.test_tile_training import command

pytestmark = pytest.mark.usefixtures("one_thread")
SEEN: list[tuple[int, int, float]] = []


class Counting(L.Callback):
    """Notes every batch."""

    def __init__(self, times: int) -> None:
        self.times = times

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_index: int) -> None:
        SEEN.append((self.times, module.step, float(outputs["loss"])))


def test_callbacks_and_loggers_of_lightning_s_and_of_ones_own_are_called(tile_shards: Path, tmp_path: Path) -> None:
    SEEN.clear()
    run_command_line(
        command(
            tile_shards,
            tmp_path / "run",
            f"trainer.callbacks=[{{_target_:{__name__}.Counting,times:3}}]",
            f"trainer.loggers=[{{_target_:lightning.pytorch.loggers.TensorBoardLogger,save_dir:{tmp_path / 'board'}}},"
            f"{{_target_:lightning.pytorch.loggers.CSVLogger,save_dir:{tmp_path / 'csv'},flush_logs_every_n_steps:1}}]",
        )
    )
    record = [line for line in read_metrics(tmp_path / "run") if "loss" in line]
    assert [(3, line["step"], pytest.approx(line["loss"])) for line in record] == SEEN and len(SEEN) == 6
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = (tmp_path / "board").rglob("events.*")
    board = EventAccumulator(str(events)).Reload()
    assert [(one.step, one.value) for one in board.Scalars("loss")] == [
        (line["step"], pytest.approx(line["loss"])) for line in record
    ]
    (table,) = (tmp_path / "csv").rglob("metrics.csv")
    assert len([row for row in csv.DictReader(table.open()) if row.get("loss")]) == 6


def test_a_callback_that_is_none_is_refused_before_anything_is_made(
    tile_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_command_line(
            command(tile_shards, tmp_path / "run", "trainer.callbacks=[{_target_:models.vit.VisionTransformer}]")
        )
    assert ended.value.code == 2 and not (tmp_path / "run").exists()
    assert "is no Callback" in capsys.readouterr().err


def test_a_profiler_writes_a_trace_of_some_steps(tile_shards: Path, tmp_path: Path) -> None:
    run_command_line(command(tile_shards, tmp_path / "run", "trainer.profiler=pytorch"))
    (trace,) = (tmp_path / "run" / "profile").glob("*.json")
    assert json.loads(trace.read_text())["traceEvents"]


def test_a_trial_takes_a_step_and_leaves_nothing(
    tile_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_command_line(command(tile_shards, tmp_path / "run", "trainer.fast_dev_run=true"))
    assert "went well" in capsys.readouterr().err and not list(tmp_path.iterdir())
    run_command_line(command(tile_shards, tmp_path / "run"))
    assert [line["step"] for line in read_metrics(tmp_path / "run") if "loss" in line] == list(range(1, 7))
