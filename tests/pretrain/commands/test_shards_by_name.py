"""Every command takes shards as they are named, or says what it can't."""

import json
from pathlib import Path

import pytest

from launch.entry import run_command_line
from tests.data.shards.tile_folders import spoil, write_tiles


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four tars of a tile or two, ``tiles-000000.tar`` and so on."""
    return write_tiles(tmp_path / "shards", [2, 1, 2, 1])


def test_named_tars_alone_are_verified(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil(folder, [0])
    run_command_line(["shards", "verify", f"shards={folder}/tiles-{{000001..000003}}.tar", "workers=1"])
    assert json.loads(capsys.readouterr().out)["folders"][0]["shards"] == 3
    with pytest.raises(SystemExit):
        run_command_line(["shards", "verify", f"shards={folder}/tiles-{{000002..000007}}.tar", "workers=1"])
    assert "names tiles-000004.tar, tiles-000005.tar" in capsys.readouterr().err


PIPE_WORDS = {
    "tile": ["data.shards=PIPE", "run=r"],
    "tile of a mixture": ["data=mixture", "data.members={a:{shards:PIPE,weight:1}}", "run=r"],
    "embed": ["shards=PIPE", "checkpoint=c", "out=o"],
    "inspect": ["shards=PIPE", "out=o"],
    "shards verify": ["shards=PIPE"],
    "shards index": ["shards=PIPE"],
}


@pytest.mark.parametrize("command", PIPE_WORDS)
def test_a_pipe_is_refused_with_the_way_out_wherever_shards_are_named(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [word.replace("PIPE", '["pipe:aws s3 cp s3://b/tiles-0.tar -"]') for word in PIPE_WORDS[command]]
    with pytest.raises(SystemExit):
        run_command_line([*command.partition(" of ")[0].split(), *words])
    said = capsys.readouterr().err
    assert "is a command, which can only be read from front to back" in said and "give the shards' own address" in said


def test_an_index_is_of_a_folder_and_not_of_some_tars(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_command_line(["shards", "index", f"shards={folder}/tiles-*.tar"])
    assert f"an index is of all that lie in a folder: pretrain shards index shards={folder}" in capsys.readouterr().err
