"""The loader's end is the trainer's: with one sentence, an exit code, and nobody left behind."""

import errno
import os
import signal
import time
from pathlib import Path

import pytest

from data import loader_process
from data.fault import Fault
from data.tiles.loader import loader_of
from pretrain.run import checkpoints
from tests.data.shards.tile_folders import write_tiles
from tests.data.tiles.test_loader import batches, by_tile, same
from tests.data.tiles.test_loader import load as direct
from tests.pretrain.training.test_tile_training import command, metrics, start


@pytest.mark.slow  # in the default suite a loader alone is killed, and each error has its sentence
@pytest.mark.parametrize(
    ("failure", "processes", "sentence"),
    [
        ("KeyError", 2, "the loader failed with KeyError: 'stain'; its traceback is above"),
        ("OSError", 1, "pretrain: the loader may open no more files"),
        ("MemoryError", 1, "pretrain: the loader has no memory left"),
        ("SIGKILL", 1, "was ended by Killed (out of memory, most likely"),
        ("SIGKILL", 2, "was ended by Killed (out of memory, most likely"),
        ("SIGBUS", 1, "was ended by Bus error (/dev/shm is full"),
    ],
)
def test_whatever_ends_the_loader_ends_the_run_with_its_own_sentence(
    failure: str, processes: int, sentence: str, tile_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRETRAIN_TEST_FAILURE", failure)
    run = tmp_path / "run"
    settings = ["data._target_=tests.pretrain.training.failing_sources.FailingTiles", f"trainer.devices={processes}"]
    process = start(command(tile_shards, run, "optim.steps=400", "trainer.checkpoint_every=1", *settings))
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 1 and sentence in output, output
    assert output.count("Traceback") == (failure == "KeyError"), output
    assert checkpoints.newest(run) is not None
    with pytest.raises(ProcessLookupError):  # nobody of the session is left
        end = time.monotonic() + 15
        while time.monotonic() < end:
            os.killpg(process.pid, 0)
            time.sleep(0.1)


def test_where_shared_memory_has_no_room_the_same_batches_come_through_a_pipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_tiles(tmp_path / "shards", [11, 13])
    monkeypatch.setattr("data.tiles.loader.shared_memory_room", lambda: 1000)
    through = loader_of(batches(folder), pin_memory=False)
    found = list(through)
    assert not found[0].parts[0].views[0].is_shared()
    assert all(same(by_tile(a.parts), by_tile(b.parts)) for a, b in zip(direct(folder), found, strict=True))
    through.end()


def test_an_error_that_is_not_the_loader_process_s_is_left_as_it_is() -> None:
    assert loader_process.ended_by(RuntimeError("size mismatch")) is None
    assert loader_process.ended_by(ValueError("DataLoader worker (pid 3) is killed by signal: Killed.")) is None
    fault = Fault("a sentence")
    assert loader_process.fault_of(fault) is fault


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(errno.EMFILE, "Too many open files"), "the loader may open no more files"),
        (OSError(errno.EIO, "Input/output error"), "the loader can't read on"),
        (MemoryError(), "the loader has no memory left"),
        (KeyError("stain"), "the loader failed with KeyError: 'stain'; its traceback is above"),
    ],
)
def test_each_kind_of_error_has_its_sentence(error: Exception, sentence: str) -> None:
    fault = loader_process.fault_of(error)
    assert str(fault).startswith(sentence) and bool(fault.trace) == isinstance(error, KeyError)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_ctrl_c_ends_a_run_after_its_step_with_a_checkpoint(processes: int, tile_shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(command(tile_shards, run, "optim.steps=100000", f"trainer.devices={processes}"))
    record, end = run / "metrics.jsonl", time.monotonic() + 60
    while not (record.exists() and record.read_text().count("\n") >= 3):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "stopping after this step" in output and "the same command continues" in output
    newest = checkpoints.newest(run)
    assert newest is not None and checkpoints.step_of(newest) == metrics(run)[-1]["step"]


def test_a_batch_that_waits_when_its_maker_is_killed_is_the_killed_process_s_fault(tmp_path: Path) -> None:
    through = loader_of(batches(write_tiles(tmp_path / "shards", [11, 13])), pin_memory=False)
    waiting = iter(through)
    next(waiting)
    (process,) = through._processes
    time.sleep(1)  # the next batches are made, and lie in files that only their maker can hand over
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises((Fault, RuntimeError)) as raised:
        list(waiting)
    fault = raised.value if isinstance(raised.value, Fault) else loader_process.ended_by(raised.value)
    assert fault is not None and f"the loader process {process.pid} was ended by Killed (out of memory" in str(fault)
