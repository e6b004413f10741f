"""A run's folder: reopened by the same settings, closed to others, whole after a kill."""

import json
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from data.fault import Fault
from data.files import write_whole
from pretrain.run import folder as run_folder
from pretrain.run import metrics as metrics_file


@dataclass
class Inner:
    lr: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)


@dataclass
class Config:
    run: str = "runs/a"
    seed: int = 0
    allow_changes: bool = False
    optim: Inner = field(default_factory=Inner)
    trainer: dict[str, Any] = field(default_factory=lambda: {"devices": 1})
    data: dict[str, Any] = field(default_factory=lambda: {"threads": 2, "batch_size": 8})


def test_opening_writes_what_a_reader_needs(tmp_path: Path) -> None:
    run_folder.open_run(tmp_path / "a", Config(), first_rank=True)
    assert run_folder.read_config(tmp_path / "a")["optim"]["lr"] == 0.1
    (start,) = json.loads((tmp_path / "a" / "provenance.json").read_text())["starts"]
    assert start["packages"]["torch"].startswith("2.") and start["command"][0] == "pretrain" and start["git"]
    assert {path.name for path in (tmp_path / "a").iterdir()} == {
        "config.yaml",
        "provenance.json",
        "checkpoints",
        "samples",
    }


def test_every_start_is_kept(tmp_path: Path) -> None:
    for _ in range(3):
        run_folder.open_run(tmp_path, Config(), first_rank=True)
    assert len(json.loads((tmp_path / "provenance.json").read_text())["starts"]) == 3


def test_only_the_first_rank_writes(tmp_path: Path) -> None:
    run_folder.open_run(tmp_path, Config(), first_rank=False)
    assert list(tmp_path.iterdir()) == []


def test_changed_settings_are_refused_with_the_difference(tmp_path: Path) -> None:
    run_folder.open_run(tmp_path, Config(), first_rank=True)
    with pytest.raises(Fault, match=r"optim\.lr: 0\.1 → 0\.2; seed: 0 → 1\); give another run="):
        run_folder.open_run(tmp_path, Config(seed=1, optim=Inner(lr=0.2)), first_rank=True)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["seed"] == 0


def test_allowed_changes_are_kept_and_are_the_settings_from_then_on(tmp_path: Path) -> None:
    run_folder.open_run(tmp_path, Config(), first_rank=True, data="a")
    run_folder.open_run(tmp_path, Config(seed=1, allow_changes=True), first_rank=True, data="b")
    run_folder.open_run(tmp_path, Config(seed=1), first_rank=True, data="b")
    starts = json.loads((tmp_path / "provenance.json").read_text())["starts"]
    assert [start.get("changes") for start in starts] == [None, {"seed": [0, 1]}, None]
    assert [start["data"] for start in starts] == ["a", "b", "b"]


def test_the_newest_checkpoints_settings_count_before_those_of_the_folder(tmp_path: Path) -> None:
    run_folder.open_run(tmp_path, Config(seed=1), first_rank=True)
    checkpoint = tmp_path / "checkpoints" / "step-00000001"
    checkpoint.mkdir()
    (checkpoint / "state.json").write_text(json.dumps({"settings": asdict(Config(seed=2))}))
    with pytest.raises(Fault, match=r"seed: 2 → 1\); give another run="):
        run_folder.open_run(tmp_path, Config(seed=1), first_rank=True)
    run_folder.open_run(tmp_path, Config(seed=2), first_rank=True)


def test_where_and_how_fast_it_runs_may_change_and_leaves_the_hash(tmp_path: Path) -> None:
    before = run_folder.open_run(tmp_path, Config(), first_rank=True)
    moved = Config(run="elsewhere", trainer={"devices": 8}, data={"threads": 16, "batch_size": 8})
    assert run_folder.open_run(tmp_path, moved, first_rank=True) == before
    assert run_folder.digest({"seed": 0}) != run_folder.digest({"seed": 1})


def test_a_setting_that_came_or_went_is_a_difference(tmp_path: Path) -> None:
    run_folder.open_run(tmp_path, Config(), first_rank=True)
    with pytest.raises(Fault, match=r"data\.window: None → 4"):
        run_folder.open_run(
            tmp_path, replace(Config(), data={"threads": 2, "batch_size": 8, "window": 4}), first_rank=True
        )


SECRET = "https://me:hunter2@host/shards?token=hunter2&sig=hunter2"


def test_no_secret_of_a_url_is_in_a_runs_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["pretrain", "tile", f"data.shards=[{SECRET}]"])
    run_folder.open_run(tmp_path, Config(data={"shards": [SECRET]}), first_rank=True, data="a")
    changed = Config(data={"shards": [SECRET.replace("host", "other")]}, allow_changes=True)
    run_folder.open_run(tmp_path, changed, first_rank=True, data="b")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 2 and not [path for path in files if "hunter2" in path.read_text()]
    assert run_folder.read_config(tmp_path)["data"]["shards"] == ["https://***@other/shards?token=***&sig=***"]


def test_a_new_token_is_no_changed_setting_and_another_host_is(tmp_path: Path) -> None:
    def opened(url: str) -> str:
        return run_folder.open_run(tmp_path, Config(data={"shards": [url], "window": 4}), first_rank=True)

    assert opened(SECRET) == opened(SECRET.replace("hunter2", "hunter3"))
    with pytest.raises(Fault, match=r"data\.shards: .*host/shards\?token=\*\*\*.* → .*other/") as refused:
        opened(SECRET.replace("host", "other"))
    assert "hunter" not in str(refused.value)


def test_secrets_that_an_older_run_wrote_are_not_passed_on(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(asdict(Config(data={"shards": [SECRET]}))))
    (tmp_path / "provenance.json").write_text(json.dumps({"starts": [{"command": [SECRET], "data": "a"}]}))
    run_folder.open_run(tmp_path, Config(data={"shards": [SECRET]}), first_rank=True, data="a")
    assert "hunter2" not in (tmp_path / "config.yaml").read_text() + (tmp_path / "provenance.json").read_text()


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ({"shards": ["a"]}, {"shards": ["b"]}),
        ({"embeddings": "a"}, {"embeddings": "b"}),
        ({"slides": ["a"], "grids": "g"}, {"slides": ["b"], "grids": "h"}),
        ({"members": {"x": {"shards": ["a"]}}}, {"members": {"x": {"shards": ["b"]}}}),
    ],
)
@pytest.mark.parametrize("saved", [False, True])
def test_data_that_was_moved_is_the_same_if_its_digest_is(
    tmp_path: Path, before: dict[str, Any], now: dict[str, Any], saved: bool
) -> None:
    hash_before = run_folder.open_run(tmp_path, Config(data=before), first_rank=True, data="digest")
    if saved:
        state = {"settings": asdict(Config(data=before)), "data": "digest"}
        (tmp_path / "checkpoints" / "step-00000001").mkdir()
        (tmp_path / "checkpoints" / "step-00000001" / "state.json").write_text(json.dumps(state))
    for digest in ("another", ""):
        with pytest.raises(Fault, match=r"data\."):
            run_folder.open_run(tmp_path, Config(data=now), first_rank=True, data=digest)
    assert run_folder.open_run(tmp_path, Config(data=now), first_rank=True, data="digest") == hash_before
    assert run_folder.read_config(tmp_path)["data"] == now
    with pytest.raises(Fault, match=r"seed: 0 → 1"):
        run_folder.open_run(tmp_path, Config(data=now, seed=1), first_rank=True, data="digest")


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(Fault, match="is not a run's folder"):
        run_folder.read_config(tmp_path)


def test_writing_replaces_a_file_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.txt"
    write_whole(path, "one")
    write_whole(path, "two")
    assert path.read_text() == "two" and list(path.parent.iterdir()) == [path]


def test_a_line_cut_short_by_a_kill_is_left_out_and_then_rewritten(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in (1, 2, 3, 4))
    (tmp_path / "metrics.jsonl").write_text(lines + '{"step": 5, "lo')
    assert [record["step"] for record in metrics_file.read_metrics(tmp_path)] == [1, 2, 3, 4]
    metrics_file.rewind(tmp_path, 2)
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]


def test_a_run_without_metrics_has_none(tmp_path: Path) -> None:
    assert metrics_file.read_metrics(tmp_path) == []


def test_a_loggers_secret_is_in_no_file_and_a_new_one_is_no_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for secret in ("hunter1", "hunter2"):
        monkeypatch.setattr(sys, "argv", ["pretrain", f"trainer.loggers=[{{_target_:x.L,api_key:{secret}}}]"])
        loggers = [{"_target_": "x.L", "api_key": secret}]
        config = Config(trainer={"loggers": loggers}, data={"source": {"password": secret, "batch_tokens": 4096}})
        run_folder.open_run(tmp_path, config, first_rank=True)
    assert run_folder.read_config(tmp_path)["data"]["source"] == {"password": "***", "batch_tokens": 4096}
    kept = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert "hunter" not in kept and kept.count("api_key:***") == 2 and '"changes"' not in kept
