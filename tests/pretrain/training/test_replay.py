"""A step that wasn't finite is computed again, and the tiles that did it are found."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from data.fault import Fault
from launch.entry import run_command_line
from pretrain.objectives.dinov2 import DINOv2
from pretrain.run import checkpoints
from pretrain.training.replay import first_not_finite, narrowed, networks_before, was_skipped
from tests.data.shards.tile_folders import write_tiles
from tests.pretrain.training.test_tile_training import WAYS, command

pytestmark = pytest.mark.usefixtures("one_thread")
STEP = 3  # as the record counts; the run has 16 tiles a step, in two micro-batches
PLACES = [2, 11]  # in the global batch


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiles(tmp_path_factory.mktemp("replay") / "shards", [40, 37])


def spoil(monkeypatch: pytest.MonkeyPatch, by: Callable[[Tensor, list[bool]], Tensor]) -> None:
    """Let ``by`` spoil the loss of a micro-batch; it is told which of the tiles at PLACES of step STEP are in it. A tile
    is known by its pixels, wherever it stands."""
    loss, known = DINOv2.loss, list[float]()

    def spoilt(self: DINOv2, batch: Any, moment: Any) -> tuple[Tensor, dict[str, Tensor]]:
        value, figures = loss(self, batch, moment)
        images, views = batch.crops[0]
        sums = images.double().flatten(1).sum(1)[: len(images) // views].tolist()
        if moment.step == STEP - 1 and len(known) < len(PLACES):
            known.extend(sums[place - moment.first] for place in PLACES if 0 <= place - moment.first < len(sums))
        if moment.step != STEP - 1:
            return value, figures
        figures["spread"] = by(figures["spread"], [one in sums for one in known])
        return value + figures["spread"], figures

    monkeypatch.setattr(DINOv2, "loss", spoilt)


def by_value(term: Tensor, there: Sequence[bool]) -> Tensor:
    return term * float("inf") if any(there) else term


def by_gradient(term: Tensor, there: Sequence[bool]) -> Tensor:
    return term + (term * 0).sqrt() if any(there) else term  # 0, whose gradient is not a number


def anyway(term: Tensor, there: Sequence[bool]) -> Tensor:
    return term * float("nan")


@pytest.mark.parametrize(
    ("by", "networks", "tiles"),
    [(by_value, False, [[2], [11]]), (by_gradient, True, [[2], [11]]), (anyway, False, [])],
)
def test_the_tiles_and_the_term_that_did_it_are_named(
    by: Any,
    networks: bool,
    tiles: list[list[int]],
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    spoil(monkeypatch, by)
    run_command_line(command(shards, run, *WAYS["everything"], "optim.steps=4"))
    assert f"step {STEP} skipped" in (said := capsys.readouterr().err)
    assert f"'pretrain tile run={run} replay={STEP}'" in said
    before = (run / "metrics.jsonl").read_bytes(), (run / "config.yaml").read_bytes()
    run_command_line(["tile", f"run={run}", f"replay={STEP}", "accelerator=cpu"])
    said, found = capsys.readouterr().err, json.loads((run / "replay" / f"step-0000000{STEP}.json").read_text())
    assert [[one["place"] for one in together] for together in found["tiles"]] == tiles
    assert found["terms"] == ["spread"] and bool(found["networks"]) == networks and "(spread)" in said
    assert found["samples"] == [32, 48] and found["began"] is None
    assert (run / "replay" / f"step-0000000{STEP}.png").exists() == bool(tiles)
    assert all(f"{one['tile']} does it by itself" in said for together in found["tiles"] for one in together)
    assert ("whatever tiles stand in for them do it too" in said) == (not tiles)
    assert ((run / "metrics.jsonl").read_bytes(), (run / "config.yaml").read_bytes()) == before


def test_tiles_that_are_common_are_found_though_the_next_step_has_some_too(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, loss, expected = tmp_path / "run", DINOv2.loss, list[int]()

    def spoilt(self: DINOv2, batch: Any, moment: Any) -> tuple[Tensor, dict[str, Tensor]]:
        value, figures = loss(self, batch, moment)
        images, views = batch.crops[0]
        first_views = images.double().flatten(1).sum(1)[: len(images) // views]
        bad = [int(1000 * one) % 2 == 0 for one in first_views.tolist()]
        if len(seen) < 2 and moment.step == STEP - 1:
            seen.append(moment.first)
            expected.extend(moment.first + i for i, one in enumerate(bad) if one)
        return (value * float("inf") if any(bad) and moment.step == STEP - 1 else value), figures

    seen: list[int] = []
    monkeypatch.setattr(DINOv2, "loss", spoilt)
    run_command_line(command(shards, run, "trainer.accumulate=2", "optim.steps=4"))
    run_command_line(["tile", f"run={run}", f"replay={STEP}", "accelerator=cpu", "most=16"])
    found = json.loads((run / "replay" / f"step-0000000{STEP}.json").read_text())
    assert len(expected) > 1 and found["terms"] == []
    assert [one["place"] for together in found["tiles"] for one in together] == expected


def test_the_page_of_a_failed_run_says_what_stopped_it_and_what_a_replay_found(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    spoil(monkeypatch, by_value)
    with pytest.raises(SystemExit):
        run_command_line(command(shards, run, "optim.max_skipped=0"))
    run_command_line(["report", f"run={run}", f"out={tmp_path / 'before.html'}"])
    run_command_line(["tile", f"run={run}", f"replay={STEP}", "accelerator=cpu"])
    run_command_line(["report", f"run={run}", f"out={tmp_path / 'after.html'}"])
    before, after = ((tmp_path / f"{name}.html").read_text() for name in ("before", "after"))
    assert "How it ended" in before and "more than optim.max_skipped=0" in before
    assert f"pretrain tile run={run} replay={STEP}" in before and "computed again" not in before
    assert f"Step {STEP}, computed again" in after and f"replay={STEP}</code>" not in after
    found = json.loads((run / "replay" / f"step-0000000{STEP}.json").read_text())
    assert all(one["tile"] in after for together in found["tiles"] for one in together)
    monkeypatch.undo()
    run_command_line(command(shards, run, "optim.max_skipped=0"))
    run_command_line(["report", f"run={run}", f"out={tmp_path / 'done.html'}"])
    assert "How it ended" not in (tmp_path / "done.html").read_text()


def test_a_finite_step_is_said_to_be_and_one_whose_networks_are_not_kept_is_refused(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run_command_line(command(shards, run, "optim.steps=4"))
    run_command_line(["tile", "replay", f"run={run}", "replay=3", "accelerator=cpu"])
    said = capsys.readouterr().err
    assert "step 3 is finite in float32" in said and "step 3 was finite in the run too" in said and "GPU" not in said
    with pytest.raises(Fault, match=r"just before step 2: .*: 3\.$"):
        networks_before(run, 2)
    with pytest.raises(Fault, match=r"step 5 was never taken: the run has 4\.$"):
        networks_before(run, 5)


def test_only_a_step_that_the_run_skipped_and_is_finite_here_is_a_gpus(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        spoil(patch, anyway)
        run_command_line(command(shards, run, "optim.steps=4"))
    assert [was_skipped(run, step) for step in (2, STEP, 4)] == [False, True, False]
    capsys.readouterr()
    run_command_line(["tile", f"run={run}", f"replay={STEP}", "accelerator=cpu"])
    said = capsys.readouterr().err
    assert f"what happened in step {STEP} doesn't come back here" in said and "finite in the run too" not in said


def test_a_skipped_step_is_the_one_that_a_run_without_the_fault_takes(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_command_line(command(shards, tmp_path / "sound", "optim.steps=2"))
    spoil(monkeypatch, anyway)
    run_command_line(command(shards, tmp_path / "spoilt", "optim.steps=4", "optim.schedule_steps=2"))
    kept = networks_before(tmp_path / "spoilt", STEP)
    sound = checkpoints.complete(tmp_path / "sound")[-1]
    first, second = (checkpoints.read_network(one, "") for one in (kept, sound))
    assert kept.parent.parent.name == "replay" and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("guilty", "expected"),
    [([{5}], [[5]]), ([{0}, {7}], [[0], [7]]), ([{1, 6}], [[0, 1, 2, 3, 4, 5, 6, 7]]), ([{4, 5}], [[4, 5]])],
)
def test_halves_leave_the_smallest_sets_that_fail_by_themselves(
    guilty: list[set[int]], expected: list[list[int]]
) -> None:
    assert list(narrowed(list(range(8)), lambda tiles: any(one <= set(tiles) for one in guilty))) == expected


def test_the_first_layer_whose_numbers_are_not_finite_is_named() -> None:
    network = nn.Sequential(nn.Identity(), nn.Sequential(nn.Linear(2, 2), nn.LogSoftmax(1)), nn.ReLU())
    for value, expected in ((1.0, []), (float("inf"), ["0", "1.0", "1.1", "1", "2"])):
        with first_not_finite(network) as found:
            network(torch.full((1, 2), value))
        assert found == expected
    assert not network[0]._forward_hooks
