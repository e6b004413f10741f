"""What a user hangs into Lightning's trainer: callbacks and loggers of their own, a profiler, a trial of one step."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from data.fault import Fault
from launch.entry import run_command_line
from pretrain.run.metrics import read_metrics
from pretrain.settings.composition import load
from tests.pretrain.training.test_slide_training import SMALL
from tests.pretrain.training.test_slide_training import words as slide_words
from tests.pretrain.training.test_tile_training import command
from tests.pretrain.training.wavy_slides import write_wavy_slides

pytestmark = pytest.mark.usefixtures("one_thread")
SEEN: list[tuple[int, int, float]] = []


class Counting(L.Callback):
    """Notes every batch."""

    def __init__(self, times: int) -> None:
        self.times = times

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_index: int) -> None:
        SEEN.append((self.times, module.step, float(outputs["loss"])))


class Stopping(L.Callback):
    """Ends the run after a step, 0: before the first."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_fit_start(self, trainer: L.Trainer, module: Any) -> None:
        trainer.should_stop = not self.after

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        trainer.should_stop = module.step >= self.after


class Logging(L.Callback):
    """Logs a step's number in every way that Lightning has, and a loss that is not the run's."""

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        self.log("mine", float(module.step))  # type: ignore[attr-defined]
        module.log("loss", 77.0)
        trainer.logger.log_metrics({"straight": torch.tensor(module.step)})  # type: ignore[union-attr]
        trainer.logger.log_metrics({"counted": trainer.global_step}, step=trainer.global_step)  # type: ignore[union-attr]


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


@pytest.mark.parametrize("word", ["hooks.Mine", "[hooks.Mine]"])
def test_a_callback_without_its_brackets_is_shown_them(word: str) -> None:
    with pytest.raises(Fault, match=r"trainer\.callbacks: 'hooks\.Mine' .*write \[\{_target_: hooks\.Mine\}\]"):
        load("tile", ["run=a", "data.shards=b", f"trainer.callbacks={word}"])


def test_a_profiler_writes_a_trace_of_some_steps(tile_shards: Path, tmp_path: Path) -> None:
    run_command_line(command(tile_shards, tmp_path / "run", "trainer.profiler=pytorch"))
    (trace,) = (tmp_path / "run" / "profile").glob("*.json")
    assert json.loads(trace.read_text())["traceEvents"]


def test_a_trial_takes_a_step_and_leaves_nothing(
    tile_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for settings, done in (
        (["true"], "1 step, 1 look, 1 checkpoint and 1 evaluation went well"),
        (["3", "trainer.log_every=2"], "3 steps, 3 looks, 2 checkpoints and 1 evaluation went well"),
        (
            ["true", f"trainer.callbacks=[{{_target_:{__name__}.Logging}}]"],
            "1 step, 1 look, 1 checkpoint and 1 evaluation went well",
        ),
        (
            ["true", f"trainer.callbacks=[{{_target_:{__name__}.Stopping,after:0}}]"],
            "no step was taken, since a callback",
        ),
    ):
        run_command_line(command(tile_shards, tmp_path / "run", f"trainer.fast_dev_run={settings[0]}", *settings[1:]))
        assert f"{tmp_path / 'run'}: {done}" in capsys.readouterr().err and not list(tmp_path.iterdir())
    run_command_line(command(tile_shards, tmp_path / "run"))
    assert [line["step"] for line in read_metrics(tmp_path / "run") if "loss" in line] == list(range(1, 7))


def test_a_callback_that_ends_the_run_loses_no_step(
    tile_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seldom = "trainer.checkpoint_every=100"
    for after, newest in ((0, "none"), (2, "step-00000002"), (4, "step-00000004")):
        stop = f"trainer.callbacks=[{{_target_:{__name__}.Stopping,after:{after}}}]"
        run_command_line(command(tile_shards, tmp_path / "run", seldom, stop))
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.endswith(f"{newest}, ended by a callback before step 6: the same command continues")
    run_command_line(command(tile_shards, tmp_path / "run", seldom))
    run_command_line(command(tile_shards, tmp_path / "whole", seldom))
    one, other = (
        [(line["step"], line["loss"]) for line in read_metrics(tmp_path / run) if "loss" in line]
        for run in ("run", "whole")
    )
    assert one == other and len(one) == 6


def test_what_callbacks_log_is_of_the_step_just_taken_also_after_a_kill(tile_shards: Path, tmp_path: Path) -> None:
    words = command(
        tile_shards,
        tmp_path / "run",
        f"trainer.callbacks=[{{_target_:{__name__}.Logging}},"
        "{_target_:lightning.pytorch.callbacks.LearningRateMonitor}]",
        f"trainer.loggers=[{{_target_:lightning.pytorch.loggers.CSVLogger,save_dir:{tmp_path / 'csv'}}}]",
    )
    run_command_line(words)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000006")  # as a kill after step 5 leaves it
    run_command_line(words)
    lines = read_metrics(tmp_path / "run")
    every = list(range(1, 7))
    for name in ("mine", "straight", "counted"):
        found = [(line["step"], line[f"callbacks/{name}"]) for line in lines if f"callbacks/{name}" in line]
        assert found == [(step, step) for step in every]
    assert sorted({line["step"] for line in lines if "callbacks/lr-ShardAdamW/pg1" in line}) == every
    assert [line["step"] for line in lines if line.get("callbacks/loss") == 77] == every
    assert [line["step"] for line in lines if "loss" in line] == every and 77 not in [
        line.get("loss") for line in lines
    ]
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
    for table, steps in zip(sorted((tmp_path / "csv").rglob("metrics.csv")), (every, every[4:]), strict=True):
        mine = [(int(row["step"]), float(row["mine"])) for row in csv.DictReader(table.open()) if row["mine"]]
        assert mine == [(step, step) for step in steps]


@pytest.mark.parametrize(
    ("callback", "sentence"),
    [
        ("lightning.pytorch.callbacks.ModelCheckpoint", "trainer.checkpoint_every="),
        ("lightning.pytorch.callbacks.EarlyStopping,monitor:loss", "watch.patience="),
        ("lightning.pytorch.callbacks.StochasticWeightAveraging,swa_lrs:0.1", "the teacher is the average"),
        ("lightning.pytorch.callbacks.EMAWeightAveraging", "the teacher is the average"),
        ("lightning.pytorch.callbacks.OnExceptionCheckpoint,dirpath:a", "trainer.checkpoint_every="),
        ("lightning.pytorch.callbacks.LearningRateFinder", "optim.lr="),
        ("lightning.pytorch.callbacks.BatchSizeFinder", "'pretrain plan' says what fits"),
        ("lightning.pytorch.callbacks.BackboneFinetuning", "optim.frozen_backbone_steps="),
        ("lightning.pytorch.callbacks.ModelPruning,pruning_fn:l1_unstructured", "model.width="),
        (f"{__name__}.Stopping,afetr:1", "Stopping can't be made of"),
    ],
)
def test_callbacks_that_have_no_place_here_are_told_what_has(
    callback: str, sentence: str, tile_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_command_line(command(tile_shards, tmp_path / "run", f"trainer.callbacks=[{{_target_:{callback}}}]"))
    assert ended.value.code == 2 and sentence in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_trial_of_the_slide_stage_says_what_it_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = write_wavy_slides(tmp_path / "store", 6, columns=8, rows=6, fewer=6)
    held_out = ["data.validation_fraction=0.4", "trainer.fast_dev_run=true"]
    run_command_line(slide_words(tmp_path / "run", store, *SMALL, "optim.warmup_steps=1", *held_out))
    assert "run: 1 step, 1 checkpoint and 1 evaluation went well" in capsys.readouterr().err


@pytest.mark.parametrize("run", [".", "/", "runs/.."])
def test_a_trial_needs_a_run_with_a_name(
    run: str, tile_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        run_command_line(command(tile_shards, Path(run), "trainer.fast_dev_run=true"))
    assert f"pretrain: run={run} has no name for a trial to be beside" in capsys.readouterr().err


def test_a_trials_profile_would_be_thrown_away() -> None:
    sentence = (
        "trainer.fast_dev_run=true and trainer.profiler=simple don't go together: a trial's folder is thrown away"
    )
    with pytest.raises(Fault, match=sentence):
        load("tile", ["run=a", "data.shards=b", "trainer.fast_dev_run=true", "trainer.profiler=simple"])


@pytest.mark.parametrize("word", ["-1", "1.5", "some"])
def test_a_trial_is_of_whole_steps(word: str) -> None:
    with pytest.raises(Fault, match=r"^trainer\.fast_dev_run"):
        load("tile", ["run=a", "data.shards=b", f"trainer.fast_dev_run={word}"])


class Lacking(L.Callback):
    """Needs a package that nobody has, when it is made or when it is set up."""

    def __init__(self, made: bool) -> None:
        if made:
            import nobody_has_this  # noqa: F401  # type: ignore[import-not-found]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        raise ModuleNotFoundError("`that` is not installed. HINT: Try\nrunning `pip install that`")


@pytest.mark.parametrize(
    ("made", "sentence"),
    [
        ("true", "Lacking needs a package that is not there (No module named 'nobody_has_this'): pip install nobody_has_this"),
        ("false", "trainer.callbacks or trainer.loggers name needs a package that is not there (`that` is not installed. HINT"),
    ],
)  # fmt: skip
def test_a_package_that_a_callback_lacks_is_a_sentence_before_any_work(
    made: str, sentence: str, tile_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run_command_line(
            command(tile_shards, tmp_path / "run", f"trainer.callbacks=[{{_target_:{__name__}.Lacking,made:{made}}}]")
        )
    said = capsys.readouterr().err.strip().splitlines()
    assert sentence in said[-1] and "Traceback" not in "".join(said)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_trial_removes_nothing_that_was_there(
    tile_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    notes = tmp_path / "run.trial" / "notes.txt"
    notes.parent.mkdir()
    notes.write_text("precious")
    with pytest.raises(SystemExit):
        run_command_line(command(tile_shards, tmp_path / "run", "trainer.fast_dev_run=true"))
    assert "run.trial is there already" in capsys.readouterr().err and notes.read_text() == "precious"
