"""A damaged checkpoint is named with what is wrong, and the whole one before it is the way on."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.entry import run_command_line
from pretrain.encoders.run_checkpoint import find_checkpoint
from pretrain.run import checkpoints
from tests.pretrain.training.test_tile_training import STEPS, command, metrics, refused


def cut(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def forget(path: Path) -> None:
    path.write_text("{}")


DAMAGES: list[tuple[str, Callable[[Path], None], str]] = [
    ("state.json", empty, "state.json is empty"),
    ("state.json", cut, "state.json is damaged"),
    ("state.json", forget, "state.json lacks step"),
    (".metadata", Path.unlink, ".metadata is gone"),
    (".metadata", cut, ".metadata is damaged"),
    ("__0_0.distcp", Path.unlink, "__0_0.distcp is gone"),
    ("__0_0.distcp", cut, "__0_0.distcp is cut: "),
]


@pytest.fixture(scope="module")
def finished(tile_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 2, 4 and 6."""
    run = tmp_path_factory.mktemp("damage") / "run"
    run_command_line(command(tile_shards, run, "trainer.checkpoint_every=2", "trainer.keep_checkpoints=0"))
    return run


@pytest.mark.parametrize(("name", "do", "wrong"), DAMAGES, ids=[f"{name}-{do.__name__}" for name, do, _ in DAMAGES])
def test_what_is_damaged_is_named_and_others_take_the_one_before(
    finished: Path,
    tile_shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    do: Callable[[Path], None],
    wrong: str,
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    newest = checkpoints.newest(run)
    assert newest is not None and checkpoints.damage(newest) is None
    do(newest / name)
    line = refused(command(tile_shards, run, "trainer.checkpoint_every=2", "trainer.keep_checkpoints=0"), capsys)
    assert wrong in line and str(newest) in line and "step 4 is whole" in line and "resume=previous" in line
    assert find_checkpoint(run).folder.name == "step-00000004"
    assert wrong in capsys.readouterr().err
    with pytest.raises(Exception, match="step 4 is whole"):
        find_checkpoint(newest)


def test_a_run_told_to_goes_on_from_the_one_before_to_the_same_end(
    finished: Path, tile_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    empty(run / "checkpoints" / f"step-{STEPS:08d}" / "state.json")
    cut(run / "provenance.json")
    empty(run / "config.yaml")
    again = command(tile_shards, run, "trainer.checkpoint_every=2", "trainer.keep_checkpoints=0", "resume=previous")
    run_command_line(again)
    said = capsys.readouterr().err
    assert "resuming after step 4 of 6" in said and "provenance.json.damaged" in said
    assert metrics(run) == metrics(finished)
    assert (run / "checkpoints" / f"damaged-step-{STEPS:08d}").is_dir()
    assert checkpoints.newest_whole(run) == run / "checkpoints" / f"step-{STEPS:08d}"


def test_without_its_configuration_a_run_is_read_by_its_checkpoint_s(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    empty(run / "config.yaml")
    assert find_checkpoint(run).config == find_checkpoint(finished).config
    assert "config.yaml is empty; the settings are taken from" in capsys.readouterr().err
