"""Checkpoints: whole or not there, the newest published one counts, one network can be read alone."""

import errno
import io
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict

from data.fault import Fault
from pretrain.run import checkpoints
from pretrain.run.saving import Saver


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
    assert checkpoints.restore(path, model, optimiser) == {"step": 7, "skipped": 0, "data": "abc"}
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), wanted.state_dict().values(), strict=True)
    )
    for one, other in zip(optimiser.state.values(), wanted_optimiser.state.values(), strict=True):
        assert (
            torch.equal(one["exp_avg"], other["exp_avg"])
            and torch.equal(one["exp_avg_sq"], other["exp_avg_sq"])
            and one["step"] == other["step"] == 1
        )


def test_a_checkpoint_holds_what_torch_would_put_into_one() -> None:
    model, optimiser = trained()
    model.register_buffer("centre", torch.ones(3))
    networks, state = get_state_dict(model, optimiser)
    found = checkpoints.contents(model, optimiser)
    assert found["model"].keys() == networks.keys() and found["optimiser"].keys() == state.keys()
    assert all(found["model"][name].data_ptr() == networks[name].data_ptr() for name in networks)
    assert found["optimiser"]["state"] == state["state"]
    assert found["optimiser"]["param_groups"] == state["param_groups"]


def test_copies_are_made_once_and_then_overwritten_all_together() -> None:
    model, optimiser = trained()
    staged = Saver(Path(), 1, None).stager
    first = staged.stage(checkpoints.contents(model, optimiser))
    places = {name: tensor.data_ptr() for name, tensor in first["model"].items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    optimiser.param_groups[0]["lr"] = 0.5
    second = staged.stage(checkpoints.contents(model, optimiser))
    assert {name: tensor.data_ptr() for name, tensor in second["model"].items()} == places
    assert not set(places.values()) & {parameter.data_ptr() for parameter in model.parameters()}
    assert all(torch.equal(second["model"][name], tensor) for name, tensor in model.state_dict().items())
    assert second["optimiser"]["param_groups"][0]["lr"] == 0.5
    model.register_buffer("centre", torch.ones(3))
    assert torch.equal(staged.stage(checkpoints.contents(model, optimiser))["model"]["centre"], torch.ones(3))


@pytest.mark.parametrize("broken", ["weight", "moment", "buffer", None])
def test_numbers_that_are_not_finite_are_found_wherever_they_are(broken: str | None) -> None:
    model, optimiser = trained()
    model.register_buffer("centre", torch.ones(3, dtype=torch.float64))
    model.register_buffer("nothing", torch.ones(0))
    model.register_buffer("count", torch.ones(2, dtype=torch.int64))
    with torch.no_grad():
        if broken == "weight":
            model["teacher"].weight[3, 4] = torch.nan
        elif broken == "moment":
            next(iter(optimiser.state.values()))["exp_avg_sq"][1, 1] = torch.inf
        elif broken == "buffer":
            model.centre[1] = -torch.inf
    assert checkpoints.is_finite(model, optimiser) == (broken is None)


def test_a_parameter_that_no_loss_reaches_is_no_reason_not_to_go_on(tmp_path: Path) -> None:
    """A mask token where nothing is masked."""

    def beside(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model = nn.ModuleDict({"used": nn.Linear(4, 4), "unused": nn.Linear(4, 4)})
        optimiser = torch.optim.AdamW(model.parameters(), lr=0.1)
        model["used"](torch.ones(1, 4)).sum().backward()
        optimiser.step()
        return model, optimiser

    model, optimiser = beside(1)
    unused = model["unused"].weight.detach().clone()
    path = checkpoints.save(tmp_path, 1, model, optimiser, {}, 0)
    again, its = beside(2)
    checkpoints.restore(path, again, its)
    assert torch.equal(again["unused"].weight, unused)
    for each, one in ((model, optimiser), (again, its)):
        one.zero_grad()
        each["used"](torch.ones(1, 4)).sum().backward()
        one.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert torch.equal(again["unused"].weight, unused)


def test_the_newest_published_one_counts_and_half_written_ones_do_not(tmp_path: Path) -> None:
    assert checkpoints.newest(tmp_path) is None
    save(tmp_path, 2)
    last = save(tmp_path, 10)
    half = last.with_name("step-00000020.partial")
    half.mkdir()
    (half / "state.json").write_text("{}")
    (last.with_name("step-00000030")).mkdir()  # nothing inside: no state, no checkpoint
    assert checkpoints.newest(tmp_path) == last
    assert [path.name for path in checkpoints.complete(tmp_path)] == ["step-00000002", "step-00000010"]


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
    assert [int(path.name[-8:]) for path in checkpoints.complete(tmp_path)] == left


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
    assert checkpoints.restore(good, model, optimiser)["step"] == 1
    assert checkpoints.newest(tmp_path) != save(tmp_path, 2, keep=1).with_suffix(".partial")
    assert [path.name for path in checkpoints.folder(tmp_path).iterdir()] == ["step-00000002"]


def test_one_network_is_read_without_a_model(tmp_path: Path) -> None:
    path = save(tmp_path, 1, seed=3)
    found = checkpoints.read_network(path, "teacher.")
    expected = trained(3)[0]["teacher"].state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_a_network_that_is_not_there_and_a_folder_that_is_no_checkpoint_are_named(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    with pytest.raises(Fault, match="holds no decoder"):
        checkpoints.read_network(path, "decoder.")
    with pytest.raises(Fault, match="is no checkpoint of ours"):
        checkpoints.read_network(tmp_path, "teacher.")


# Beside training ---------------------------------------------------------------------------------------------------


def test_a_save_beside_training_holds_the_moment_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, wanted_optimiser = trained(1)
    model, optimiser = trained(1)
    changed, plan = threading.Event(), checkpoints.Writer.prepare_global_plan

    def late(self: checkpoints.Writer, plans: list[Any]) -> list[Any]:
        assert changed.wait(60)
        return plan(self, plans)

    monkeypatch.setattr(checkpoints.Writer, "prepare_global_plan", late)
    saver = Saver(tmp_path, keep=0, milestones=None)
    for step in (1, 2):  # the second copy is made in the memory of the first
        saver.begin(step, model, optimiser, {})
        assert saver.outcome() is None
        with torch.no_grad():
            for tensor in (*model.parameters(), *(state["exp_avg"] for state in optimiser.state.values())):
                tensor.add_(1.0)
        optimiser.param_groups[0]["lr"] = 0.5
        assert checkpoints.newest(tmp_path) is None or step == 2
        changed.set()
        assert saver.wait() is None
        changed.clear()
    found, found_optimiser = trained(2)
    checkpoints.restore(checkpoints.folder(tmp_path) / "step-00000001", found, found_optimiser)
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), wanted.parameters(), strict=True))
    for one, other in zip(found_optimiser.state.values(), wanted_optimiser.state.values(), strict=True):
        assert torch.equal(one["exp_avg"], other["exp_avg"])
    assert found_optimiser.param_groups[0]["lr"] == 0.1
    checkpoints.restore(checkpoints.folder(tmp_path) / "step-00000002", found, found_optimiser)
    assert all(torch.equal(a, b + 1) for a, b in zip(found.parameters(), wanted.parameters(), strict=True))
    assert found_optimiser.param_groups[0]["lr"] == 0.5


def test_at_most_one_save_is_under_way(tmp_path: Path) -> None:
    saver = Saver(tmp_path, keep=0, milestones=None)
    saver.begin(1, *trained(1), {})
    with pytest.raises(AssertionError):
        saver.begin(2, *trained(2), {})
    assert saver.wait() is None and [path.name for path in checkpoints.complete(tmp_path)] == ["step-00000001"]


def test_a_failed_save_is_told_once_leaves_no_half_checkpoint_and_the_next_one_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, saver = save(tmp_path, 1), Saver(tmp_path, keep=1, milestones=None)

    def full(self: checkpoints.Writer, **_: Any) -> None:
        assert list(Path(self.path).glob("*.distcp"))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.Writer, "finish", full)
        saver.begin(2, *trained(), {})
        told = saver.wait()
        assert told and "step-00000002 could not be written" in told and "No space left on device" in told
        assert saver.outcome() is None and list(checkpoints.folder(tmp_path).iterdir()) == [good]
        with pytest.raises(Fault, match=r"free some room .* The newest whole one is .*step-00000001"):
            saver.save(3, *trained(), {})
    saver.begin(4, *trained(), {})
    assert saver.wait() is None and [path.name for path in checkpoints.complete(tmp_path)] == ["step-00000004"]


def test_an_error_that_is_not_the_disks_is_not_taken_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ValueError("a mistake of ours")

    monkeypatch.setattr(checkpoints.Writer, "finish", broken)
    saver = Saver(tmp_path, keep=1, milestones=None)
    saver.begin(2, *trained(), {})
    with pytest.raises(BaseException, match="a mistake of ours"):
        saver.wait()


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Any]:
    """``mount(folder, *options)``: a file system of its own on a folder, in memory. Only root may."""
    mounted = []

    def on(folder: Path, *options: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", folder], capture_output=True)
        if done.returncode:
            pytest.skip(f"a file system can't be mounted here: {done.stderr.decode().strip()}")
        mounted.append(folder)

    yield on
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


def test_a_full_disk_and_one_that_can_not_be_written_leave_the_last_checkpoint_whole(
    tmp_path: Path, mount: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoints.folder(tmp_path)
    mount(folder, "size=400k")  # room for two checkpoints
    good, saver = save(tmp_path, 1), Saver(tmp_path, keep=1, milestones=None)
    (folder / "ballast").write_bytes(bytes(200_000))
    told = saver.begin(2, *trained(), {})
    assert told and "step-00000002 could not be written (it takes " in told and saver.wait() is None
    with monkeypatch.context() as patch:  # and where it fills while it is written
        patch.setattr("pretrain.run.saving.free_bytes", lambda _: 2**40)
        assert saver.begin(2, *trained(), {}) is None
        assert "No space left on device" in (saver.wait() or "")
    (folder / "ballast").unlink()
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    saver.begin(3, *trained(), {})
    assert "Read-only file system" in (saver.wait() or "")
    assert checkpoints.newest(tmp_path) == good and checkpoints.restore(good, *trained(2))["step"] == 1
    subprocess.run(["mount", "-o", "remount,rw", folder], check=True)
    saver.begin(4, *trained(), {})
    assert saver.wait() is None and [path.name for path in folder.iterdir()] == ["step-00000004"]


def test_a_folder_without_permission_to_write_is_one_sentence(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    good, saver = save(tmp_path, 1), Saver(tmp_path, keep=1, milestones=None)
    good.parent.chmod(0o500)
    saver.begin(2, *trained(), {})
    assert "Permission denied" in (saver.wait() or "")
    good.parent.chmod(0o700)
    assert checkpoints.restore(good, *trained(2))["step"] == 1


@pytest.mark.slow
def test_a_save_beside_training_goes_from_any_number_of_processes_to_any_other(tmp_path: Path) -> None:
    """1 → 2 → 4 → 1 → 2 × 2 (two replicas) → 2 → 2 × 2 → 1; every number is checked on the way."""
    root = Path(__file__).resolve().parents[3]
    for step, (processes, replicas) in enumerate([(1, 1), (2, 1), (4, 1), (1, 1), (4, 2), (2, 1), (4, 2), (1, 1)]):
        running = [
            subprocess.Popen(
                [
                    sys.executable,
                    root / "tests" / "pretrain" / "training" / "sharded_saving.py",
                    tmp_path,
                    str(step),
                    str(replicas),
                ],
                env=os.environ | {"RANK": str(rank), "WORLD_SIZE": str(processes), "PYTHONPATH": str(root)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(processes)
        ]
        ended = [process.communicate(timeout=200)[0] for process in running]
        assert checkpoints.newest(tmp_path) == checkpoints.folder(tmp_path) / f"step-{step:08d}", "\n".join(ended)
        assert not any("AssertionError" in output for output in ended), "\n".join(ended)


# What is kept ------------------------------------------------------------------------------------------------------


def test_milestones_stay_beside_the_newest(tmp_path: Path) -> None:
    for step in range(1, 9):
        checkpoints.save(tmp_path, step, *trained(), {}, keep=2, milestones=3)
    assert [int(path.name[-8:]) for path in checkpoints.complete(tmp_path)] == [3, 6, 7, 8]


def test_a_kill_while_an_old_one_is_removed_leaves_none_that_looks_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Kill(BaseException):
        pass

    def dying(path: Path, **_: Any) -> None:
        next(path.glob("*.distcp")).unlink()
        raise Kill

    save(tmp_path, 1)
    with monkeypatch.context() as patch, pytest.raises(BaseException, match="Kill"):
        patch.setattr(shutil, "rmtree", dying)
        save(tmp_path, 2, keep=1)
    assert [path.name for path in checkpoints.complete(tmp_path)] == ["step-00000002"]
    save(tmp_path, 3)
    assert not list(checkpoints.folder(tmp_path).glob("*.partial"))


# No code -----------------------------------------------------------------------------------------------------------


def test_the_state_is_plain_json(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    assert json.loads((path / "state.json").read_text())["step"] == 1


class Code:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_neither_tensors_nor_metadata_nor_settings_of_an_optimiser_run_code(tmp_path: Path) -> None:
    path, ran = save(tmp_path, 1), tmp_path / "ran"
    shard, metadata = next(path.glob("*.distcp")), path / ".metadata"
    original, described = shard.read_bytes(), metadata.read_bytes()
    shard.write_bytes(pickle.dumps(Code(ran)) * 50)
    with pytest.raises(BaseException, match=r"(?i)checkpoint|weights|pickle|zip|read|archive"):
        checkpoints.read_network(path, "teacher.")
    metadata.write_bytes(pickle.dumps(Code(ran)))
    with pytest.raises(Fault, match=r"is no checkpoint of ours .*touch"):
        checkpoints.read_network(path, "teacher.")
    with pytest.raises(Fault, match=r"can't be loaded .*touch"):
        checkpoints.restore(path, *trained(2))
    # One of the values that are no tensors is replaced by code that is appended to the file.
    metadata.write_bytes(described)
    found = checkpoints.WeightsOnlyReader(path).read_metadata()
    value = io.BytesIO()
    torch.save(Code(ran), value)
    shard.write_bytes(original + value.getvalue())
    place = next(place for index, place in found.storage_data.items() if index.fqn.endswith("param_groups.0.lr"))
    place.offset, place.length = len(original), len(value.getvalue())
    metadata.write_bytes(pickle.dumps(found))
    with pytest.raises(Fault, match=r"can't be loaded .*[Ww]eights.only"):
        checkpoints.restore(path, *trained(2))
    assert not ran.exists()


def test_networks_of_another_shape_are_refused_in_one_sentence(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    other = nn.ModuleDict({"student": nn.Linear(32, 64), "teacher": nn.Linear(64, 64)})
    with pytest.raises(Fault, match=r"step-00000001 can't be loaded \(.*student.weight.*\); is it whole"):
        checkpoints.restore(path, other, torch.optim.AdamW(other.parameters()))


def test_a_persons_copy_of_a_checkpoint_is_left_alone(tmp_path: Path) -> None:
    for name in ("step-00000002", "step-00000004.bak", "step-00000006-good", "step-00000004"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "state.json").write_text("{}")
    assert [path.name for path in checkpoints.complete(tmp_path)] == ["step-00000002", "step-00000004"]


def test_the_writing_thread_keeps_to_its_process_s_gpu_and_waits_for_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copying ahead would wait for the compute stream at every few tensors, and a new thread's device is the first."""
    chosen: list[tuple[str, int]] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: chosen.append((threading.current_thread().name, device))
    )
    monkeypatch.setattr(checkpoints.dcp.FileSystemWriter, "write_data", lambda *_: chosen.append(("written", 0)))
    writer = checkpoints.Writer(tmp_path, 1, {}, keep=0)
    assert writer.per_thread_copy_ahead == 0
    thread = threading.Thread(target=writer.write_data, args=(None, None), name="writer")
    thread.start()
    thread.join()
    assert chosen == [("writer", 3), ("written", 0)]
