"""The command line takes words as a shell hands them over, and says in one sentence what to write instead of what it
doesn't take."""

from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st

from data.fault import Fault
from launch.entry import run_command_line
from pretrain.settings.composition import load
from pretrain.settings.shell_words import quoted


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), max_size=30))
@settings(max_examples=100, deadline=None)
def test_what_is_quoted_is_read_back_whatever_it_is(value: str) -> None:
    assert OverridesParser.create().parse_override(f"run={quoted(value)}").value() == value


NAMES = [
    "Müller",
    "张三",
    "a b",
    "a (2)",
    "a=b",
    "run(1)=ä ~",
    "2024_01",
    "007",
    "1e3",
    "true",
    "it's",
    'a"b',
    "x\\y",
    "a:b;c",
    "*",
    "100%",
    "a&b",
    "a|b",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_may_have_any_name(name: str) -> None:
    assert load("tile", [f"run={name}", "data.shards=b"]).object().run == name


@pytest.mark.parametrize("name", ["Müller", "a (2)", "a=b", "it's"])
def test_so_may_the_run_of_a_plan_and_a_list_of_one(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    assert load("shard", [f"slides={tmp_path / name}", "out=b"]).object().slides == [str(tmp_path / name)]


def test_the_home_folders_sign_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/homes/me")
    config = load("tile", ["run=~/runs/a", "data.shards=[~/tiles,b,Müller 2]", "watch.probe=~"]).object()
    assert (config.run, config.data.shards, config.watch.probe) == (
        "/homes/me/runs/a",
        ["/homes/me/tiles", "b", "Müller 2"],
        "/homes/me",
    )
    assert load("tile", ["run=~other", "data.shards=a~b"]).object().data.shards == ["a~b"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["-sc", "install=bash"], "there is no option -sc here: --help prints all settings of a command"),
        (["--config-name", "x"], "there is no option --config-name here: the command says which configuration it is, recipe=NAME chooses"),
        (["--config-name=x"], "there is no option --config-name here: "),
        (["--config-path=x"], "there is no option --config-path here: --config-dir DIR adds"),
        (["--info"], "there is no option --info here: --cfg job prints every value with the file that set it."),
        (["--cfg", "hydra"], "--cfg takes the word 'job': "),
        (["--cfg=all"], "--cfg takes the word 'job': "),
        (["--cfg"], "--cfg takes the word 'job': "),
        (["--config-dir=nowhere"], "--config-dir nowhere is not a folder; it may hold recipe/"),
        (["--config-dir"], "--config-dir without a name is not a folder; it may hold recipe/"),
        (["optim.lr=1,2"], "optim.lr=1,2: a list is written in brackets, optim.lr=[1,2], one value with a comma in quotes"),
        (["run=a,b"], "run=a,b: a list is written in brackets, run=[a,b], one value with a comma in quotes, run=\"'a,b'\", and a run for each value is asked for by --multirun."),
        (["optim.lr=range(1,3)"], "optim.lr=range(1,3): a list is written in brackets"),
        (["hydra.run.dir=/x"], "hydra.run.dir=/x: Hydra's own settings have no effect here; run= or out= names the folder that is written to."),
        (["+hydra.searchpath=[x]"], "+hydra.searchpath=[x]: Hydra's own settings have no effect here; --config-dir DIR."),
        (["run=${oc.env:NOT_SET_HERE}"], "run: the environment variable NOT_SET_HERE is not set."),
        (["data.shards=${oc.env:NOT_SET_HERE}"], "data.shards: the environment variable NOT_SET_HERE is not set."),
        (["optim.lr=${oc.env:NOT_SET_HERE}"], "optim.lr: the environment variable NOT_SET_HERE is not set."),
        (["run=${nothing}"], "run: Interpolation key 'nothing' not found."),
        (["launch=slurm", "launch.name=${oc.env:NOT_SET_HERE}"], "launch.name: the environment variable NOT_SET_HERE is not set."),
        (["optim.schedule_steps=None"], "optim.schedule_steps=None: nothing is written null, optim.schedule_steps=null"),
        (["watch.probe=None"], "watch.probe=None: nothing is written null, watch.probe=null"),
        (["run=[a"], "'run=[a' can't be read as key=value"),
    ],
)  # fmt: skip
def test_what_hydra_would_take_and_this_command_line_does_not_is_said_with_what_to_use(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_command_line(["tile", *words])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith(f"pretrain: {sentence}") and said.count("\n") == 1, said


def test_options_may_hold_their_value(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text("# @package _global_\noptim:\n  lr: 0.25\n")
    run_command_line(["tile", f"--config-dir={tmp_path}", "recipe=mine", "--cfg=job"])
    assert "lr: 0.25" in capsys.readouterr().out


def test_an_environment_variable_that_is_set_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SHARDS", "/tiles")
    assert load("tile", ["run=a", "data.shards=${oc.env:MY_SHARDS}"]).object().data.shards == ["/tiles"]


def test_a_file_of_yaml_that_is_none_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text("# @package _global_\noptim: {lr: [0.25\n")
    with pytest.raises(Fault, match=r"mine\.yaml") as refused:
        load("tile", ["recipe=mine"], [tmp_path])
    assert "\n" not in str(refused.value)
