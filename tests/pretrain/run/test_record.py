"""metrics.jsonl always, Weights & Biases when asked."""

import json
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from data.fault import Fault
from pretrain.run import metrics as metrics_file
from pretrain.run.record import RunRecord, WandbMirror
from pretrain.run.wandb_settings import WandbSettings


@dataclass
class Config:
    wandb: WandbSettings
    seed: int = 0


@dataclass
class WithSecrets:
    wandb: WandbSettings
    url: str
    api_key: str


def config(mode: str) -> Config:
    return Config(WandbSettings(mode, "slidewright"))


def record_from(run: Path, step: int) -> RunRecord:
    record = RunRecord(run)
    record.begin(step)
    return record


def mirror_of(run: Path, config: object) -> WandbMirror:
    mirror = WandbMirror(run, config)
    mirror.begin()
    return mirror


def test_every_line_is_on_disk_as_soon_as_it_is_added(tmp_path: Path) -> None:
    record = record_from(tmp_path, 0)
    for step in (1, 2):
        record.record({"loss": 0.1 + step}, step)
        assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1]) == {
            "step": step,
            "loss": 0.1 + step,
        }


def test_a_resumed_record_drops_the_steps_it_will_retake(tmp_path: Path) -> None:
    first = record_from(tmp_path, 0)
    for step in range(1, 6):
        first.record({"loss": 0.0}, step)
    second = record_from(tmp_path, 3)
    for step in (4, 5):
        second.record({"loss": 1.0}, step)
    found = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(record["step"], record["loss"]) for record in found] == [(1, 0.0), (2, 0.0), (3, 0.0), (4, 1.0), (5, 1.0)]


def test_what_callbacks_log_is_of_the_present_step_and_never_one_of_the_runs_own_figures(tmp_path: Path) -> None:
    record = record_from(tmp_path, 0)
    record.present = 3
    record.record({"loss": 0.5}, 3)
    record.log_metrics({"loss": torch.tensor(77.0), "epoch": 0, "wide": np.float32(2)})
    record.log_metrics({"early": float("nan")}, 2)
    record.log_metrics({"epoch": 0}, 3)
    assert metrics_file.read_metrics(tmp_path) == [
        {"step": 3, "loss": 0.5},
        {"step": 3, "callbacks/loss": 77.0, "callbacks/wide": 2.0},
        {"step": 2, "callbacks/early": None},
    ]


@pytest.mark.parametrize("value", [torch.zeros(2), np.zeros(2), "high", [1.0], None])
def test_what_is_no_single_number_is_refused_by_its_name(value: object, tmp_path: Path) -> None:
    with pytest.raises(Fault, match=r"trainer\.callbacks: the figure mine is .*, and the record takes single numbers"):
        record_from(tmp_path, 0).log_metrics({"mine": value})


def test_what_is_logged_outside_of_the_steps_is_told_when_there_are_some(tmp_path: Path) -> None:
    closed = record_from(tmp_path, 0)
    closed.close()
    for record in (RunRecord(tmp_path), closed):
        with pytest.raises(
            Fault, match="callbacks/mine came while no step was being taken: log from on_train_start to"
        ):
            record.log_metrics({"mine": 1.0})


def test_what_a_full_disk_refuses_is_said_once_and_written_when_there_is_room(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = record_from(tmp_path, 0)
    record.record({"loss": 0.0}, 1)
    end = (tmp_path / "metrics.jsonl").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (end + 7, before[1]))  # room for part of a line
    try:
        for step in (2, 3, 4):
            record.record({"loss": 0.0}, step)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = capsys.readouterr().err
    assert said.count("can't be written") == 1 and "training goes on" in said
    assert (tmp_path / "metrics.jsonl").stat().st_size == end
    record.record({"loss": 0.0}, 5)
    assert "is written again, with all that waited" in capsys.readouterr().err
    assert [line["step"] for line in metrics_file.read_metrics(tmp_path)] == [1, 2, 3, 4, 5]


def test_off_writes_nothing_and_imports_nothing(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; sys.path.insert(0, '.'); from tests.pretrain.run.test_record import"
        f" config, mirror_of;w = mirror_of(Path({str(tmp_path)!r}), config('off')); w.record({{'loss': 1.0}}, 1);"
        " w.close(); assert 'wandb' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).resolve().parents[3])
    assert list(tmp_path.iterdir()) == []


def test_offline_writes_its_folder_and_keeps_its_id_over_starts(tmp_path: Path) -> None:
    ids = []
    for step in (1, 2):
        mirror = mirror_of(tmp_path, config("offline"))
        mirror.record({"loss": 1.0}, step)
        assert mirror.run is not None
        ids.append(mirror.run.id)
        mirror.close()
    assert ids[0] == ids[1] == (tmp_path / "wandb_id.txt").read_text().strip()
    segments = [path for path in (tmp_path / "wandb").glob("offline-run-*") if any(path.glob("*.wandb"))]
    assert len(segments) >= 1


def test_online_without_a_login_writes_offline_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    mirror = mirror_of(tmp_path, config("online"))
    mirror.record({"loss": 1.0}, 1)
    mirror.close()
    assert "not logged in" in capsys.readouterr().err
    assert list((tmp_path / "wandb").glob("offline-run-*"))


def test_a_mirror_that_breaks_is_said_once_and_stops_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken:
        def log(self, *_: object, **__: object) -> None:
            raise ConnectionResetError("Connection lost")

    mirror = mirror_of(tmp_path, config("off"))
    mirror.run = Broken()
    for step in (1, 2):
        mirror.record({"loss": 1.0}, step)
    mirror.close()
    assert (
        capsys.readouterr().err.count(
            "wandb: ConnectionResetError: Connection lost; what follows is in metrics.jsonl only"
        )
        == 1
    )


@pytest.mark.slow
def test_a_signal_to_every_process_leaves_the_run_alive_without_its_mirror(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys, time; os.environ.pop('WANDB_SERVICE', None); from pathlib import Path;"
        " sys.path.insert(0, '.')\nfrom tests.pretrain.run.test_record import config, mirror_of\nw ="
        f" mirror_of(Path({str(tmp_path)!r}), config('offline')); w.record({{'loss': 1.0}}, 1)\nfor child in"
        " Path(f'/proc/{os.getpid()}/task/{os.getpid()}/children').read_text().split():\n    os.kill(int(child),"
        " signal.SIGTERM)\ntime.sleep(2); w.record({'loss': 1.0}, 2); w.close(); print('alive')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert "alive" in done.stdout and "what follows is in metrics.jsonl only" in done.stderr, done.stderr


def test_weights_and_biases_gets_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "https://me:hunter2@host/shards?token=hunter2"
    words = [f"data.shards={secret}", "trainer.loggers=[{_target_:x.L,api_key:hunter2}]"]
    monkeypatch.setattr(sys, "argv", ["pretrain", *words])
    mirror = mirror_of(tmp_path, WithSecrets(WandbSettings("offline", "slidewright"), secret, "hunter2"))
    assert mirror.run is not None and mirror.run.config["url"] == "https://***@host/shards?token=***"
    assert mirror.run.config["api_key"] == "***"
    mirror.close()
    kept = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"host/shards" in kept and b"hunter2" not in kept and sys.argv[1:] == words
