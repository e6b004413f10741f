"""The tile stage, run for real on a tiny encoder: shared, killed, resumed, spoilt, and always the same run.

Most runs are made in this process through `launch.entry.run_command_line`, which saves six seconds of imports; those
that are about processes (several of them, or a killed one) are real commands.
"""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from data.shards.index import ShardIndex
from launch.entry import run_command_line
from pretrain.objectives.dinov2 import DINOv2
from pretrain.run import checkpoints
from pretrain.run.folder import digest, read_config
from pretrain.run.metrics import read_metrics
from pretrain.training.fit import out_of_memory
from tests.data.shards.tile_folders import spoil, write_tiles

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[3]
STEPS = 6
TINY = [
    "model.image_size=32",
    "model.patch_size=8",
    "model.width=48",
    "model.depth=2",
    "model.heads=2",
    "model.feed_forward_width=96",
    "objective.group_size=4",
    "objective.prototypes=64",
    "objective.ibot_prototypes=64",
    "objective.bottleneck=16",
    "objective.hidden=48",
    "data.batch_size=16",
    "data.lanes=4",
    "data.threads=1",
    "data.crops.global_size=32",
    "data.crops.local_size=16",
    "data.crops.local_count=2",
    f"optim.steps={STEPS}",
    "optim.warmup_steps=2",
    "optim.frozen_last_layer_steps=1",
    "trainer.checkpoint_every=2",
    "trainer.accelerator=cpu",
]
# The two ways through the objective: Sinkhorn over all ranks, and everything else that depends on how samples are
# split.
WAYS = {
    "sinkhorn": ["objective.separate_ibot_head=true"],
    "everything": [
        "objective.centring=centre",
        "objective.spread=kde",
        "model.drop_path=0.3",
        "trainer.accumulate=2",
        "model.registers=2",
        "data.min_saturated=0.985",
    ],
}
GROUP = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
CLOCK = ("tiles_per_second", "data_wait", "peak_memory_gib", "look_seconds", "evaluation_seconds")


def command(tile_shards: Path, run: Path, *settings: str) -> list[str]:
    return ["tile", f"run={run}", f"data.shards={tile_shards}", *TINY, *settings]


def metrics(run: Path) -> list[dict[str, Any]]:
    """The record of a run without what depends on the clock; how well slides are told, at both ends, is no step's."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line or "slide_knn" not in line]
    return [{name: value for name, value in line.items() if name not in CLOCK} for line in lines]


def weights(run: Path) -> dict[str, Tensor]:
    newest = checkpoints.newest(run)
    assert newest is not None
    return checkpoints.read_network(newest, "")


def start(arguments: list[str]) -> subprocess.Popen[str]:
    # Runs made in this process have left the address of their process group behind.
    kept = {name: value for name, value in os.environ.items() if name not in GROUP}
    environment = kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "pretrain", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def uninterrupted(tile_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run from first to last step in one process, each way. Never written to after this."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("uninterrupted")
    for way, settings in WAYS.items():
        run_command_line(command(tile_shards, folder / way, *settings))
    return {way: folder / way for way in WAYS}


def assert_close(found: Path, expected: Path) -> None:
    ours, theirs = metrics(found), metrics(expected)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            tolerance = 1e-4 if name.startswith("grad_norm") else 1e-5
            assert value == pytest.approx(other[name], rel=tolerance, abs=tolerance), f"{name} at step {one['step']}"


# Any number of processes -------------------------------------------------------------------------------------------


# In the default suite, jobs of two ranks in tests/launch/test_slurm.py are held to one process's losses.
@pytest.mark.slow
@pytest.mark.parametrize("way", ["everything", "sinkhorn"])
def test_two_processes_have_the_losses_of_one_and_one_goes_on_where_two_stopped(
    tile_shards: Path, uninterrupted: dict[str, Path], tmp_path: Path, way: str
) -> None:
    run, settings = tmp_path / way, WAYS[way]
    finish(start(command(tile_shards, run, *settings, "trainer.devices=2", "trainer.keep_checkpoints=0")))
    assert_close(run, uninterrupted[way])
    for step in (4, 6):
        shutil.rmtree(run / "checkpoints" / f"step-{step:08d}")
    run_command_line(command(tile_shards, run, *settings))
    assert_close(run, uninterrupted[way])
    if way == "everything":
        pale = [(folder / "pale_tiles.csv").read_text() for folder in (run, uninterrupted[way])]
        assert pale[0] == pale[1] and sum(int(line.rpartition(",")[2]) for line in pale[0].splitlines()[1:]) > 20


@pytest.mark.slow
def test_a_bad_tile_on_one_of_two_processes_is_counted_and_too_many_stop_both(
    tile_shards: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tile_shards, tmp_path / "shards")
    spoil(folder, list(range(0, 77, 8)))
    process = start(command(folder, tmp_path / "run", "trainer.devices=2", "data.max_bad_fraction=0.0001"))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output
    assert "more than data.max_bad_fraction=0.0001 allows" in output
    assert "Traceback" not in output, output


def test_micro_batches_change_nothing_that_belongs_to_the_global_batch(
    tile_shards: Path, uninterrupted: dict[str, Path], tmp_path: Path
) -> None:
    run_command_line(command(tile_shards, tmp_path / "run", *WAYS["sinkhorn"], "trainer.accumulate=4"))
    assert_close(tmp_path / "run", uninterrupted["sinkhorn"])


# Stopped at any moment ---------------------------------------------------------------------------------------------


def kill_after(
    process: subprocess.Popen[str], run: Path, steps: int, number: int = signal.SIGKILL, of: str = "first"
) -> None:
    """Signal the first or second rank or all processes, once so many steps are on record and, for SIGKILL, a checkpoint
    is published."""
    deadline = time.monotonic() + 240
    while (number == signal.SIGKILL and checkpoints.newest(run) is None) or len(read_metrics(run)) < steps:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.01)
    if of == "all":
        os.killpg(process.pid, number)
    else:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        wanted = b"\0LOCAL_RANK=" + (b"0" if of == "first" else b"1")
        ranks = [int(child) for child in children if wanted in Path(f"/proc/{child}/environ").read_bytes()]
        os.kill(ranks[0] if ranks else process.pid, number)  # one process is its own first rank
    if number == signal.SIGKILL:
        process.communicate()


def test_a_killed_run_resumes_and_ends_bit_for_bit_as_the_uninterrupted_one(
    tile_shards: Path, uninterrupted: dict[str, Path], tmp_path: Path
) -> None:
    run, settings = tmp_path / "run", WAYS["everything"]
    kill_after(start(command(tile_shards, run, *settings)), run, 3)
    newest = checkpoints.newest(run)
    assert newest is not None and checkpoints.read_state(newest)["step"] < STEPS, (
        "the kill came too late to test anything"
    )
    run_command_line(command(tile_shards, run, *settings))
    assert metrics(run) == metrics(uninterrupted["everything"])
    found, expected = weights(run), weights(uninterrupted["everything"])
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


class Kill(BaseException):
    """Ends a save where it stands."""


def test_an_interruption_before_any_checkpoint_and_one_inside_a_save_change_nothing(
    tile_shards: Path, uninterrupted: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, settings = tmp_path / "run", WAYS["sinkhorn"]

    def die_at(step: int) -> None:
        finish = checkpoints.Writer.finish

        def dying(self: checkpoints.Writer, **results: Any) -> None:
            if self.final.name == f"step-{step:08d}":
                super(checkpoints.Writer, self).finish(**results)
                raise Kill
            finish(self, **results)

        monkeypatch.setattr(checkpoints.Writer, "finish", dying)
        with pytest.raises(CheckpointException, match="Kill"):
            run_command_line(command(tile_shards, run, *settings))
        monkeypatch.setattr(checkpoints.Writer, "finish", finish)
        assert [path.suffix for path in (run / "checkpoints").glob(f"step-{step:08d}*")] == [".partial"]

    die_at(2)
    assert checkpoints.newest(run) is None
    die_at(4)
    run_command_line(command(tile_shards, run, *settings))
    assert metrics(run) == metrics(uninterrupted["sinkhorn"])
    assert not list((run / "checkpoints").glob("*.partial"))
    assert [path.name for path in checkpoints.complete(run)] == ["step-00000004", "step-00000006"]


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.05, 0.1, 0.2, 0.3, 0.5])
def test_a_kill_at_any_moment_after_the_first_step_changes_nothing(
    delay: float, tile_shards: Path, uninterrupted: dict[str, Path], tmp_path: Path
) -> None:
    run, settings = tmp_path / "run", WAYS["everything"]
    process = start(command(tile_shards, run, *settings))
    while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text():
        assert process.poll() is None
        time.sleep(0.005)
    time.sleep(delay)
    process.kill()
    process.communicate()
    run_command_line(command(tile_shards, run, *settings))
    assert metrics(run) == metrics(uninterrupted["everything"])


def test_a_finished_run_says_it_is_done_and_touches_nothing(
    tile_shards: Path, uninterrupted: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = uninterrupted["sinkhorn"]
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    run_command_line(command(tile_shards, run, *WAYS["sinkhorn"]))
    assert f"is done: {STEPS} steps" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before


# What a run leaves -------------------------------------------------------------------------------------------------


def test_the_record_has_each_step_once_with_finite_figures(uninterrupted: dict[str, Path]) -> None:
    for run in uninterrupted.values():
        lines = metrics(run)
        assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
        assert {
            "loss",
            "dino_global",
            "dino_local",
            "ibot",
            "spread",
            "lr",
            "weight_decay",
            "momentum",
            "grad_norm",
            "bad_tiles",
            "skipped",
        } <= lines[0].keys()
        assert lines[0]["lr"] == 0.0 and lines[1]["lr"] > 0  # warm-up
        assert all(line["loss"] == line["loss"] for line in lines)


def test_the_folder_holds_what_the_network_saw(uninterrupted: dict[str, Path]) -> None:
    run = uninterrupted["sinkhorn"]
    (sheet,) = (run / "samples").glob("*.png")
    with Image.open(sheet) as picture:
        assert picture.width > 2 * 36 + 2 * 36 and picture.height == 8 * 36
    assert {"config.yaml", "provenance.json", "metrics.jsonl", "checkpoints", "samples"} <= {
        path.name for path in run.iterdir()
    }


def test_training_moves_the_student_and_the_teacher_follows_behind(uninterrupted: dict[str, Path]) -> None:
    tensors = weights(uninterrupted["sinkhorn"])
    name = "encoder.blocks.0.attn.qkv.weight"
    apart = (tensors[f"student.{name}"] - tensors[f"teacher.{name}"]).abs().max()
    assert apart > 1e-6
    assert set(tensors) == {
        f"{side}.{rest}"
        for side in ("student", "teacher")
        for rest in (n.partition(".")[2] for n in tensors if n.startswith("student."))
    } | {
        "dino_centre",
        "ibot_centre",
    }


# Bad input ---------------------------------------------------------------------------------------------------------


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which a command ends."""
    with pytest.raises(SystemExit) as ended:
        run_command_line(arguments)
    assert ended.value.code in (1, 2)  # 2 where the command line is at fault
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pretrain: ")]
    return line


def test_changed_settings_are_refused_with_the_difference(
    tile_shards: Path, uninterrupted: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(command(tile_shards, uninterrupted["sinkhorn"], *WAYS["sinkhorn"], "optim.lr=0.5"), capsys)
    assert "(optim.lr: 0.0007 → 0.5)" in line and "give another run=" in line


def test_changed_data_is_refused_on_resuming(
    tile_shards: Path, uninterrupted: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(uninterrupted["sinkhorn"], tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    folder = shutil.copytree(tile_shards, tmp_path / "shards")
    for path in (run / "config.yaml", *run.glob("checkpoints/*/state.json")):
        path.write_text(path.read_text().replace(str(tile_shards), str(folder)))
    (folder / "index.npz").unlink()
    (folder / "index" / "tiles-000001.npz").unlink()
    (folder / "tiles-000001.tar").unlink()
    write_tiles(tmp_path / "more", [50])
    shutil.copy(tmp_path / "more" / "tiles-000000.tar", folder / "tiles-000001.tar")
    from data.shards.scan import scan

    scan(folder)
    assert "the data is not what" in refused(command(folder, run, *WAYS["sinkhorn"]), capsys)
    run_command_line(command(folder, run, *WAYS["sinkhorn"], "allow_changes=true"))
    assert "the data is not what" in capsys.readouterr().err and metrics(run)[-1]["step"] == STEPS
    first, *_, last = json.loads((run / "provenance.json").read_text())["starts"]
    assert first["data"] != last["data"]


def test_allowed_changes_are_said_kept_and_go_on_from_the_checkpoint(
    tile_shards: Path, uninterrupted: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(uninterrupted["sinkhorn"], tmp_path / "run")
    longer = command(tile_shards, run, *WAYS["sinkhorn"], "optim.weight_decay=0.2", f"optim.steps={STEPS + 2}")
    assert f"optim.steps: {STEPS} → {STEPS + 2}; optim.weight_decay: " in refused(longer, capsys)
    run_command_line([*longer, "allow_changes=true"])
    assert "goes on under other settings: optim.steps: 6 → 8" in capsys.readouterr().err
    assert [line["step"] for line in metrics(run)] == list(range(1, STEPS + 3))
    assert metrics(run)[:STEPS] == metrics(uninterrupted["sinkhorn"])
    assert json.loads((run / "provenance.json").read_text())["starts"][-1]["changes"]["optim.steps"] == [6, 8]
    run_command_line(longer)  # done: the newest checkpoint has these settings


def test_a_network_that_a_checkpoint_does_not_fit_is_one_sentence_even_where_changes_are_allowed(
    tile_shards: Path, uninterrupted: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(uninterrupted["sinkhorn"], tmp_path / "run")
    settings = ["model.width=96", f"optim.steps={STEPS + 2}", "allow_changes=true"]
    assert "can't be loaded" in refused(command(tile_shards, run, *WAYS["sinkhorn"], *settings), capsys)


def test_a_checkpoint_says_what_it_is_of(tile_shards: Path, uninterrupted: dict[str, Path]) -> None:
    run = uninterrupted["sinkhorn"]
    state = checkpoints.read_state(checkpoints.newest(run))  # type: ignore[arg-type]
    assert state["step"] == STEPS and state["samples"] == STEPS * 16 and state["skipped"] == 0
    assert state["settings"] == read_config(run) and state["config"] == digest(state["settings"])
    assert state["data"] == ShardIndex.open(tile_shards).digest
    assert state["packages"]["torch"] == torch.__version__.partition("+")[0] and state["python"] and state["git"]


def test_a_save_that_fails_is_said_counted_and_tried_again(
    tile_shards: Path,
    uninterrupted: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, finish = tmp_path / "run", checkpoints.Writer.finish

    def full(self: checkpoints.Writer, **results: Any) -> None:
        if self.final.name == "step-00000002":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finish(self, **results)

    monkeypatch.setattr(checkpoints.Writer, "finish", full)
    run_command_line(command(tile_shards, run, *WAYS["sinkhorn"]))
    said = capsys.readouterr().err
    assert said.count("step-00000002 could not be written (No space left on device); training goes on") == 1
    assert [path.name for path in checkpoints.complete(run)] == ["step-00000004", "step-00000006"]
    assert [line["failed_saves"] for line in metrics(run) if "failed_saves" in line] == [1]
    assert [line for line in metrics(run) if "loss" in line] == metrics(uninterrupted["sinkhorn"])


def test_a_last_save_that_fails_ends_the_run_with_one_sentence(
    tile_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    finish = checkpoints.Writer.finish

    def full(self: checkpoints.Writer, **results: Any) -> None:
        if self.final.name == f"step-{STEPS:08d}":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        finish(self, **results)

    monkeypatch.setattr(checkpoints.Writer, "finish", full)
    line = refused(command(tile_shards, tmp_path / "run", *WAYS["sinkhorn"]), capsys)
    assert "Read-only file system" in line and "free some room" in line
    assert checkpoints.newest(tmp_path / "run").name == "step-00000004"  # type: ignore[union-attr]


def test_a_bad_tile_is_named_counted_and_replaced(
    tile_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(tile_shards, tmp_path / "shards")
    spoil(folder, [3, 50])
    run_command_line(command(folder, tmp_path / "run", "data.max_bad_fraction=0.2"))
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("skipped: tile")]
    lines = metrics(tmp_path / "run")
    assert len(lines) == STEPS and sum(line["bad_tiles"] for line in lines) == len(said) >= 2
    assert any("slide0 (144, 0)" in line and "tiles-000000.tar" in line for line in said)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            ["data.crops.local_size=20"],
            "model.patch_size=8 don't go together: the side of a crop is a multiple of the patch's.",
        ),
        (["objective.group_size=3"], "not a multiple of objective.group_size=3"),
        (["objective.group_size=1", "data.lanes=4"], "objective.group_size=1 is not allowed: it must be at least 2."),
        (["trainer.precision=fp8"], "trainer.precision=fp8 is not allowed: it must be float32, bf16 or float64."),
        (["data.lanes=5"], "data.batch_size=16 is not a multiple of data.lanes=5"),
        (
            ["objective.spread=hope"],
            "objective.spread=hope is not allowed: it must be koleo, kde, kde_as_published or sigreg.",
        ),
    ],
)
def test_settings_that_do_not_fit_together_are_one_line(
    settings: list[str], sentence: str, tile_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sentence in refused(command(tile_shards, tmp_path / "run", *settings), capsys)


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Make the loss NaN at these steps."""
    loss = DINOv2.loss

    def poisoned(self: DINOv2, batch: Any, moment: Any) -> Any:
        value, figures = loss(self, batch, moment)
        return (value * float("nan") if moment.step in steps else value), figures

    monkeypatch.setattr(DINOv2, "loss", poisoned)


def test_a_loss_that_is_not_finite_is_skipped_counted_and_harms_nothing(
    tile_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poison(monkeypatch, {2, 3})
    run_command_line(command(tile_shards, tmp_path / "run", *WAYS["everything"]))
    said = capsys.readouterr().err
    assert "step 3 skipped: loss" in said and "step 4 skipped" in said
    lines = metrics(tmp_path / "run")
    assert [line["skipped"] for line in lines] == [0, 0, 1, 2, 2, 2]
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "run").values())
    assert checkpoints.read_state(checkpoints.complete(tmp_path / "run")[-1])["skipped"] == 2


def test_a_skipped_step_leaves_every_weight_and_centre_as_it_was(
    tile_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, {2, 3})
    monkeypatch.setattr(
        "pretrain.training.checkpointing.unfit", lambda training: None
    )  # or there were no checkpoint to look at
    run_command_line(command(tile_shards, tmp_path / "run", *WAYS["everything"], "trainer.keep_checkpoints=0"))
    second, fourth = (
        checkpoints.read_network(tmp_path / "run" / "checkpoints" / f"step-0000000{step}", "") for step in (2, 4)
    )
    assert all(torch.equal(second[name], fourth[name]) for name in second)


def test_too_many_skipped_steps_stop_the_run(
    tile_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poison(monkeypatch, {2, 3, 4, 5})
    line = refused(command(tile_shards, tmp_path / "run", "optim.max_skipped=2"), capsys)
    assert "3 steps in a row" in line and "optim.max_skipped=2" in line


def test_a_run_that_diverges_keeps_a_finite_checkpoint_and_goes_on_from_it_with_a_lower_rate(
    tile_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    every = ["trainer.checkpoint_every=1", "trainer.keep_checkpoints=1"]
    with monkeypatch.context() as context:
        poison(context, set(range(3, STEPS)))
        line = refused(command(tile_shards, run, *every), capsys)
    assert "is not done" in line and "step-00000003" in line
    assert [path.name for path in checkpoints.complete(run)] == ["step-00000003"]
    run_command_line(command(tile_shards, run, *every, "optim.lr=1e-5", "allow_changes=true"))
    assert checkpoints.step_of(checkpoints.complete(run)[-1]) == STEPS
    assert all(tensor.isfinite().all() for tensor in weights(run).values())


def test_weights_that_are_not_finite_are_never_published(
    tile_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    line = refused(
        command(tile_shards, run, "trainer.checkpoint_every=1", "optim.lr=1e39", "optim.warmup_steps=0"), capsys
    )
    assert "is not done" in line and not checkpoints.complete(run)


def test_a_picture_of_crops_that_the_disk_refuses_is_said_and_training_goes_on(
    tile_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    run_command_line(command(tile_shards, tmp_path / "run", "optim.steps=2", "optim.warmup_steps=1", "watch.every=1"))
    said = capsys.readouterr().err
    assert "step-00000000.png can't be written (No space left on device); training goes on without that picture" in said
    assert len(metrics(tmp_path / "run")) >= 2 and list((tmp_path / "run" / "samples").iterdir()) == []


def test_wandb_offline_writes_its_folder_and_off_writes_none(
    tile_shards: Path, uninterrupted: dict[str, Path], tmp_path: Path
) -> None:
    run_command_line(command(tile_shards, tmp_path / "run", "wandb.mode=offline", "optim.steps=2"))
    assert any((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert not (uninterrupted["sinkhorn"] / "wandb").exists()


def test_bf16_trains_near_float32_and_keeps_float32_masters(
    tile_shards: Path, uninterrupted: dict[str, Path], tmp_path: Path
) -> None:
    run_command_line(command(tile_shards, tmp_path / "run", *WAYS["sinkhorn"], "trainer.precision=bf16"))
    assert all(tensor.dtype == torch.float32 for tensor in weights(tmp_path / "run").values())
    for one, other in zip(metrics(tmp_path / "run"), metrics(uninterrupted["sinkhorn"]), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=0.05) and one["loss"] != other["loss"]


@pytest.mark.slow
def test_compiled_blocks_change_nothing_but_rounding(
    tile_shards: Path, uninterrupted: dict[str, Path], tmp_path: Path
) -> None:
    finish(start(command(tile_shards, tmp_path / "compiled", *WAYS["everything"], "trainer.compile=true")))
    assert_close(tmp_path / "compiled", uninterrupted["everything"])


def test_a_lack_of_memory_is_a_sentence(tmp_path: Path) -> None:
    for error, said in (
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"
                " allocate 9 bytes."
            ),
            "can't allocate memory: you tried",
        ),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), "CUDA out of memory. Tried"),
    ):
        fault = out_of_memory(tmp_path, error)
        assert fault is not None and f"there is not enough memory ({said}" in str(fault) and "none yet" in str(fault)
    assert out_of_memory(tmp_path, RuntimeError("size mismatch")) is None
