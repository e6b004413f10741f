"""Checkpoints: whole or not there, the newest published one counts, one network can be read alone."""

import json
import pickle
import resource
from pathlib import Path

import pytest
import torch
from torch import nn

from data.fault import Fault
from pretrain import checkpoints


def trained(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.ModuleDict({"student": nn.Linear(64, 64), "teacher": nn.Linear(64, 64)})
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1)
    model["student"](torch.ones(1, 64)).sum().backward()
    model["teacher"](torch.ones(1, 64)).sum().backward()
    optimiser.step()
    return model, optimiser


def save(run: Path, step: int, seed: int = 0, keep: int = 0) -> Path:
    return checkpoints.save(run, step, *trained(seed), {"skipped": step // 10, "data": "abc"}, keep)


def test_loading_restores_networks_optimiser_and_state(tmp_path: Path) -> None:
    path = save(tmp_path, 7, seed=1)
    wanted, wanted_optimiser = trained(1)
    model, optimiser = trained(2)
    assert checkpoints.load(path, model, optimiser) == {"step": 7, "skipped": 0, "data": "abc"}
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), wanted.state_dict().values(), strict=True)
    )
    for one, other in zip(optimiser.state.values(), wanted_optimiser.state.values(), strict=True):
        assert (
            torch.equal(one["exp_avg"], other["exp_avg"])
            and torch.equal(one["exp_avg_sq"], other["exp_avg_sq"])
            and one["step"] == other["step"] == 1
        )


def test_the_newest_published_one_counts_and_half_written_ones_do_not(tmp_path: Path) -> None:
    assert checkpoints.newest(tmp_path) is None
    save(tmp_path, 2)
    last = save(tmp_path, 10)
    half = last.with_name("step-00000020.partial")
    half.mkdir()
    (half / "state.json").write_text("{}")
    (last.with_name("step-00000030")).mkdir()  # nothing inside: no state, no checkpoint
    assert checkpoints.newest(tmp_path) == last
    assert [path.name for path in checkpoints.published(tmp_path)] == ["step-00000002", "step-00000010"]


def test_the_next_save_sweeps_what_a_kill_left_behind(tmp_path: Path) -> None:
    half = checkpoints.folder(tmp_path) / "step-00000005.partial"
    half.mkdir(parents=True)
    (half / "__0_0.distcp").write_bytes(b"half")
    save(tmp_path, 5)
    assert [path.name for path in checkpoints.folder(tmp_path).iterdir()] == ["step-00000005"]


@pytest.mark.parametrize(("keep", "left"), [(1, [3]), (2, [2, 3]), (0, [1, 2, 3])])
def test_as_many_are_kept_as_was_asked(keep: int, left: list[int], tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, keep=keep)
    assert [int(path.name[-8:]) for path in checkpoints.published(tmp_path)] == left


def test_a_full_disk_is_one_sentence_and_the_last_checkpoint_stays_whole(tmp_path: Path) -> None:
    good = save(tmp_path, 1, keep=1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))  # every write beyond 4 KiB fails as on a full disk
    try:
        with pytest.raises(Fault, match=r"step-00000002 could not be written .*free some room"):
            save(tmp_path, 2, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert checkpoints.newest(tmp_path) == good
    model, optimiser = trained(2)
    assert checkpoints.load(good, model, optimiser)["step"] == 1
    assert checkpoints.newest(tmp_path) != save(tmp_path, 2, keep=1).with_suffix(".partial")
    assert [path.name for path in checkpoints.folder(tmp_path).iterdir()] == ["step-00000002"]


def test_one_network_is_read_without_a_model(tmp_path: Path) -> None:
    path = save(tmp_path, 1, seed=3)
    found = checkpoints.read(path, "teacher.")
    expected = trained(3)[0]["teacher"].state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_a_network_that_is_not_there_and_a_folder_that_is_no_checkpoint_are_named(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    with pytest.raises(Fault, match="holds no decoder"):
        checkpoints.read(path, "decoder.")
    with pytest.raises(Fault, match="is no checkpoint of ours"):
        checkpoints.read(tmp_path, "teacher.")


def test_the_state_is_plain_json_and_the_tensors_load_as_weights_only(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    assert json.loads((path / "state.json").read_text())["step"] == 1

    class Code:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "ran",)

    shard = next(path.glob("*.distcp"))
    shard.write_bytes(pickle.dumps(Code()) * 50)
    with pytest.raises(BaseException, match=r"(?i)checkpoint|weights|pickle|zip|read|archive"):
        checkpoints.read(path, "teacher.")
    assert not (tmp_path / "ran").exists()
