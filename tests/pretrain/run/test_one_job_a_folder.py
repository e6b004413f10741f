"""Two jobs on one folder: the second one is told who is there, and nothing of the first is touched."""

import signal
import time
from pathlib import Path

import pytest

from pretrain.run import checkpoints
from pretrain.run.metrics import read_metrics
from tests.pretrain.training.test_tile_training import STEPS, command, finish, metrics, refused, start


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_second_job_on_a_run_s_folder_is_refused_and_may_follow_when_the_first_was_killed(
    processes: int, tile_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = command(tile_shards, run, "trainer.checkpoint_every=2", f"trainer.devices={processes}")
    first = start([*words, "optim.schedule_steps=6", "optim.steps=100000"])
    end = time.monotonic() + 90
    while len(read_metrics(run)) < 3 or checkpoints.newest(run) is None:
        assert time.monotonic() < end and first.poll() is None
        time.sleep(0.05)
    line = refused(command(tile_shards, run), capsys)
    assert f"another job is writing to {run}: process " in line and "wait for it or end it" in line
    assert first.poll() is None
    first.send_signal(signal.SIGKILL)
    first.communicate()
    end = time.monotonic() + 30  # ranks that a launcher started end with it
    while time.monotonic() < end and (run / ".lease").exists() and refusal(run):
        time.sleep(0.1)
    there = checkpoints.newest(run)
    assert there is not None
    until = checkpoints.step_of(there) + 3
    said = finish(start([*words, "optim.schedule_steps=6", f"optim.steps={until}", "allow_changes=true"]))
    assert f"resuming after step {checkpoints.step_of(there)} of {until}" in said
    assert [line["step"] for line in metrics(run)] == list(range(1, until + 1)) and until > STEPS / 2
    assert not (run / ".lease").exists()


def refusal(run: Path) -> bool:
    """Whether somebody who lives holds the run's folder."""
    from data import lease

    holder = lease.read_holder(run / ".lease")
    return holder is not None and holder.is_gone() is False
