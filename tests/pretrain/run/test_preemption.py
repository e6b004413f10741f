"""Signals that ask a run to end: noted, answered at the end of a batch by all ranks, and nothing is lost."""

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from data.fault import Fault
from launch.entry import run_command_line
from pretrain.objectives.dinov2 import DINOv2
from pretrain.run import checkpoints, preemption, signals
from pretrain.run.preemption import TRY_AGAIN, Preemption, ending_when_asked
from pretrain.training import fixed_images
from pretrain.training.ending import EndWhenAsked
from pretrain.training.module import Training
from tests.pretrain.training.test_tile_training import (
    ROOT,
    STEPS,
    assert_close,
    command,
    kill_after,
    metrics,
    start,
    weights,
)
from tests.pretrain.training.test_watching import write_classes

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = ["objective.centring=centre", "objective.spread=kde", "model.drop_path=0.3", "trainer.accumulate=2"]


@pytest.fixture(scope="module")
def uninterrupted(tile_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    run_command_line(command(tile_shards, run, *SETTINGS))
    return run


def signal_inside(monkeypatch: pytest.MonkeyPatch, number: signal.Signals, step: int) -> None:
    """Send this process a signal in the first micro-batch of a step, gradients being half summed."""
    loss = DINOv2.loss

    def interrupted(self: DINOv2, batch: Any, moment: Any) -> Any:
        if moment.step == step and moment.first == 0:
            os.kill(os.getpid(), number)
        return loss(self, batch, moment)

    monkeypatch.setattr(DINOv2, "loss", interrupted)


@pytest.mark.parametrize(
    "number",
    [signal.SIGUSR1, signal.SIGTERM, *(pytest.param(one, marks=pytest.mark.slow) for one in signals.ASKING[1::2])],
)
def test_a_signal_in_the_middle_of_a_step_ends_the_run_after_it_and_changes_nothing(
    number: signal.Signals,
    tile_shards: Path,
    uninterrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    before = signal.getsignal(number)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        signal_inside(patch, number, step=2)  # between two checkpoints
        run_command_line(command(tile_shards, run, *SETTINGS))
    said = capsys.readouterr().err
    assert ended.value.code == TRY_AGAIN == 75, said
    assert f"stopped by {number.name} after step 3 of {STEPS}" in said
    assert "step-00000003; the same command continues" in said
    assert checkpoints.read_state(checkpoints.newest(run))["step"] == 3 and not list(run.glob("checkpoints/*.partial"))  # type: ignore[arg-type]
    assert signal.getsignal(number) is before and not signals.noted()
    run_command_line(command(tile_shards, run, *SETTINGS))
    assert metrics(run) == metrics(uninterrupted)
    found, expected = weights(run), weights(uninterrupted)
    assert all(torch.equal(found[name], expected[name]) for name in found | expected)


@pytest.mark.parametrize("passes", [1, 20], ids=["of the first weights", "of a checkpoint"])
def test_a_signal_while_held_out_images_are_judged_is_heeded_within_a_batch_of_them(
    passes: int, tile_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """80 images, 8 a pass: ten passes before the first step, with some for what tells slides, and as many at each checkpoint."""
    run, judged = tmp_path / "run", []
    watched = [*SETTINGS, "watch.every=0", f"watch.probe={write_classes(tmp_path / 'classes', {'a': 40, 'b': 40})}"]
    features = fixed_images.class_tokens

    def interrupted(*arguments: Any) -> Any:
        judged.append(1)
        if len(judged) == passes:
            os.kill(os.getpid(), signal.SIGTERM)
        return features(*arguments)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(fixed_images, "class_tokens", interrupted)
        patch.setattr(fixed_images, "IMAGES_A_PASS", 8)
        run_command_line(command(tile_shards, run, *watched))
    assert ended.value.code == TRY_AGAIN and len(judged) == passes
    assert "stopped by SIGTERM after step" in capsys.readouterr().err
    assert (checkpoints.newest(run) is None) == (passes == 1)
    run_command_line(command(tile_shards, run, *watched))
    assert metrics(run)[-1]["step"] == STEPS


def test_a_signal_in_the_last_step_comes_too_late_to_matter(
    tile_shards: Path, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signal_inside(monkeypatch, signal.SIGTERM, step=STEPS - 1)
    run_command_line(command(tile_shards, tmp_path / "run", *SETTINGS))
    assert metrics(tmp_path / "run") == metrics(uninterrupted)


@pytest.mark.slow  # the jobs of test_slurm.py have two ranks too
def test_a_signal_to_one_of_two_ranks_ends_both_and_loses_nothing(
    tile_shards: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    run, two = tmp_path / "run", command(tile_shards, tmp_path / "run", *SETTINGS, "trainer.devices=2")
    process = start(two)
    kill_after(process, run, 1, signal.SIGUSR1, of="second")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == TRY_AGAIN and "stopped by SIGUSR1 after step" in output, output
    step = checkpoints.read_state(checkpoints.newest(run))["step"]  # type: ignore[arg-type]
    assert step == metrics(run)[-1]["step"] < STEPS
    run_command_line(command(tile_shards, run, *SETTINGS))
    assert_close(run, uninterrupted)


@pytest.mark.slow
def test_a_signal_during_the_imports_is_answered_before_the_first_step(tile_shards: Path, tmp_path: Path) -> None:
    process = start(command(tile_shards, tmp_path / "run", *SETTINGS))
    status = Path(f"/proc/{process.pid}/status")
    while not int(status.read_text().partition("SigCgt:")[2].split()[0], 16) >> (signal.SIGUSR2 - 1) & 1:
        time.sleep(0.002)
    process.send_signal(signal.SIGUSR2)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == TRY_AGAIN, output
    assert "stopped by SIGUSR2 before its first step; the same command continues" in output
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", signals.ASKING)
def test_a_job_that_is_signalled_whole_ends_as_if_one_process_had_been(
    number: signal.Signals, tile_shards: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    """As SLURM does it: every rank, and their loaders."""
    run = tmp_path / "run"
    process = start(command(tile_shards, run, *SETTINGS, "trainer.devices=2"))
    kill_after(process, run, 2, number, of="all")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == TRY_AGAIN, output
    run_command_line(command(tile_shards, run, *SETTINGS))
    assert_close(run, uninterrupted)


# SLURM -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A ``scontrol`` that knows job 42, in the state that the file ``state`` says, and notes what it was asked."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    (folder / "state").write_text("RUNNING")
    program = folder / "scontrol"
    program.write_text(
        f'#!/bin/sh\necho "$@" >> {folder}/asked\n'
        f'if [ "$1" = show ]; then echo "JobId=42 JobName=a JobState=$(cat {folder}/state) Requeue=1"; fi\n'
        f'if [ "$1" = requeue ] && [ -e {folder}/refuses ]; then echo "requeue is disabled" >&2; exit 1; fi\n'
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    return folder


def test_a_running_job_is_requeued_by_its_first_rank_only(slurm: Path) -> None:
    assert not Preemption().requeue(first_rank=False) and not (slurm / "asked").exists()
    assert Preemption().requeue(first_rank=True)
    assert (slurm / "asked").read_text().splitlines() == ["show job --oneliner 42", "requeue 42"]


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING", "PENDING"])
def test_a_job_that_was_cancelled_or_is_requeued_already_is_left_alone(
    state: str, slurm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (slurm / "state").write_text(state)
    assert not Preemption().requeue(first_rank=True)
    assert "requeue" not in (slurm / "asked").read_text() and f"job 42 is {state}" in capsys.readouterr().err


def test_a_start_that_made_no_checkpoint_is_not_started_again_for_ever(slurm: Path) -> None:
    with pytest.raises(Fault, match=r"no checkpoint made, and so it would be again.*launch\.time="):
        Preemption().requeue(first_rank=True, in_vain=True)
    assert "requeue" not in (slurm / "asked").read_text()
    (slurm / "state").write_text("PENDING")  # preempted: another job's doing, and SLURM starts it again by itself
    assert not Preemption().requeue(first_rank=True, in_vain=True)


def test_a_job_of_a_chain_leaves_the_rest_to_the_next(slurm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = slurm / "scontrol"
    program.write_text(program.read_text().replace("Requeue=1", "Requeue=0"))
    assert not Preemption().requeue(first_rank=True, in_vain=True)
    assert "requeue 42" not in (slurm / "asked").read_text()
    assert "will not start job 42 again, as it was submitted" in capsys.readouterr().err


def test_a_job_whose_time_is_over_before_its_first_step_ends_with_a_sentence(
    tile_shards: Path, slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    began = EndWhenAsked.on_train_start

    def late(self: EndWhenAsked, trainer: Any, training: Training) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        began(self, trainer, training)

    monkeypatch.setattr(EndWhenAsked, "on_train_start", late)
    with pytest.raises(SystemExit) as ended:
        run_command_line(command(tile_shards, tmp_path / "run"))
    assert ended.value.code == 1 and "requeue 42" not in (slurm / "asked").read_text()
    assert "pretrain: out of time with no checkpoint made, and so it would be again" in capsys.readouterr().err


@pytest.mark.parametrize("kept", [True, False])
def test_a_job_asked_to_end_before_its_ranks_met_is_started_again_if_that_comes_further(
    kept: bool, slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        time, "sleep", lambda _: os.kill(os.getpid(), signal.SIGTERM)
    )  # SLURM ends what it starts again
    with signals.listening(), pytest.raises(SystemExit if kept else Fault) as ended, ending_when_asked(tmp_path):
        os.kill(os.getpid(), signal.SIGUSR1)
        signals.heed(kept)
    assert ("requeue 42" in (slurm / "asked").read_text()) is kept
    assert ended.value.code == TRY_AGAIN if kept else "no checkpoint made" in str(ended.value)  # type: ignore[attr-defined]
    assert "stopped by SIGUSR1 before its first step" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "3")
    (slurm / "asked").unlink()
    with signals.listening(), pytest.raises(SystemExit), ending_when_asked(tmp_path):
        raise signals.Asked(signal.SIGUSR1)
    assert not (slurm / "asked").exists()  # the first rank speaks for all


def test_torchrun_and_no_slurm_mean_no_requeue(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    assert not Preemption().requeue(first_rank=True)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    monkeypatch.delenv("SLURM_JOB_ID")
    assert not Preemption().requeue(first_rank=True) and not (slurm / "asked").exists()


def test_a_refused_requeue_and_a_missing_scontrol_are_said(
    slurm: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (slurm / "refuses").touch()
    assert not Preemption().requeue(first_rank=True)
    assert "will not start job 42 again: requeue is disabled" in capsys.readouterr().err
    monkeypatch.setenv("PATH", str(slurm / "nowhere"))
    assert not Preemption().requeue(first_rank=True)
    assert "No such file" in capsys.readouterr().err


def test_a_requeued_rank_stays_until_slurm_ends_it_and_others_tell_with_one_exit_code_a_machine() -> None:
    with signals.listening():
        script = f"import os, time; time.sleep(1); os.kill({os.getpid()}, {int(signal.SIGTERM)})"
        began = time.monotonic()
        ender = subprocess.Popen([sys.executable, "-c", script])
        with pytest.raises(SystemExit):
            preemption.leave(requeued=True, local_rank=0)
        assert time.monotonic() - began >= 1
        ender.wait()
    for local_rank, code in ((0, TRY_AGAIN), (1, 0)):
        with pytest.raises(SystemExit) as ended:
            preemption.leave(requeued=False, local_rank=local_rank)
        assert ended.value.code == code


def test_a_signal_after_the_end_makes_no_failure_of_a_run_that_is_done(tmp_path: Path) -> None:
    program = (
        "import atexit, os, signal, sys, types\n"
        "from pretrain import __main__ as door\n"
        "sys.argv = ['pretrain', 'tile']\n"
        "door.importlib = types.SimpleNamespace(import_module=lambda name:"
        " types.SimpleNamespace(run_command_line=lambda words: None, say_defect=None, show_warning=None))\n"
        "class Late:\n"
        "    def __del__(self):\n"  # in the interpreter's last moments, when its handlers are gone
        "        os.kill(os.getpid(), signal.SIGUSR1); os.kill(os.getpid(), signal.SIGTERM)\n"
        "sys.late = Late()\n"
        "door.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done
