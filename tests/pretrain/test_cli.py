"""Help that teaches, options, and errors of one line."""

from pathlib import Path

import pytest

from data.fault import Fault
from launch.entry import run_command_line
from pretrain import cli
from pretrain.run.counted import counted_as
from pretrain.settings.command_schema import file_stem
from pretrain.settings.config_files import CONFIGS


def said(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.parse(arguments) is None
    return capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_the_overview_names_every_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    text = said(arguments, capsys)
    assert all(f"\n  {command} " in text for command in cli.COMMANDS)


def test_every_command_has_its_module_and_its_configuration() -> None:
    folder = Path(cli.__file__).parent / "commands"
    assert {file_stem(command) for command in cli.COMMANDS} == {file.stem for file in folder.glob("*.py")} - {
        "__init__"
    }
    assert {file_stem(command) for command in cli.COMMANDS} == {file.stem for file in CONFIGS.glob("*.yaml")}


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_shows_examples_and_every_setting_with_its_comment(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = said([*command.split(), "--help"], capsys)
    assert f"pretrain {command} " in text.partition("Settings (")[0]
    for line in (CONFIGS / f"{file_stem(command)}.yaml").read_text().splitlines():
        if " # " in line and not line.startswith(("#", "  -")):
            assert line.strip() in text


def test_the_help_of_tile_shows_its_groups_and_their_choices(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(["tile", "--help"], capsys)
    assert "recipe= one of: " in text and "(default small)" in text
    assert "teacher_momentum: 0.992" in text and "# of the moving average" in text


@pytest.mark.parametrize(
    ("stage", "objectives"),
    [
        ("tile", "dino, dinov2, dinov3, distil, distil_heads, jepa, lejepa, mae"),
        ("slide", "slide_context, slide_ibot, slide_mae, slide_pairs"),
    ],
)
def test_help_offers_the_objectives_of_its_own_stage(
    stage: str, objectives: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"objective= one of: {objectives} (default " in said([stage, "--help"], capsys)


def test_cfg_job_prints_the_resolved_configuration_and_runs_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = said(["tile", f"run={tmp_path / 'never'}", "optim.lr=0.125", "--cfg", "job"], capsys)
    assert "[recipe/_small]" in text and "[command line]" in text and "lr: 0.125" in text
    assert "shards: ???" in text  # what is missing is shown, not refused
    assert not (tmp_path / "never").exists()


def test_a_users_folder_of_settings_is_searched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text("# @package _global_\nseed: 41\n")
    assert "seed: 41" in said(["tile", "recipe=mine", "--config-dir", str(tmp_path), "--cfg", "job"], capsys)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["tlie"], "there is no command 'tlie'; did you mean 'tile'?"),
        (["shards", "verfy"], "there is no command 'shards verfy'; did you mean 'shards verify'?"),
        (["shards"], "there is no command 'shards'"),
        (["doctor", "tile", "run=r"], "there is no command 'doctor tile': 'pretrain doctor' is the one for tiles."),
        (["tile", "--devices", "2"], "there is no option '--devices'"),
        (["tile", "--cfg", "hydra"], "--cfg takes the word 'job'"),
        (["tile", "run=r", "--resolve"], "--resolve is of --cfg job"),
        (["tile", "optim.learning_rate=1"], "'pretrain tile'; did you mean 'optim.lr'?"),
        (["probe", "store=s", "labels=l"], "store is a setting of 'pretrain probe stage=slide': give stage=slide too."),
        (["slide", "run=r", "data.embeddings=e", "optim.steps=0"], "'pretrain embed stage=slide random=true' embeds"),
        (["slide", "batch=3"], "'pretrain slide'; did you mean 'data.batch_size'?"),
        (["embed", "output_dir=a"], "'pretrain embed'; did you mean 'out'?"),
        (["tile", "~watch.patience"], "~watch.patience: there is nothing to delete, as watch.patience is null"),
        (["tile", "~watch.nothing"], "there is no setting 'watch.nothing' in 'pretrain tile'"),
        (["tile", "~watch.every=3"], "Could not delete from config. The value of 'watch.every' is "),
        (["tile", "--config-dir", "/no/such/place"], "--config-dir /no/such/place is not a folder"),
    ],
)
def test_a_slip_is_answered_in_one_sentence(arguments: list[str], sentence: str) -> None:
    with pytest.raises(Fault) as refused:
        cli.parse(arguments)
    assert sentence in str(refused.value)


def test_a_mistake_of_the_command_line_ends_the_command_with_one_line_and_exit_code_two(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_command_line(["tile", "data.batchsize=3"])
    captured = capsys.readouterr()
    assert ended.value.code == 2 and captured.out == ""
    assert captured.err.splitlines() == [
        "pretrain: there is no setting 'data.batchsize' in 'pretrain tile'; did you mean 'data.batch_size'?"
    ]


def test_ctrl_c_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(_: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "parse", interrupted)
    with pytest.raises(SystemExit) as ended:
        run_command_line([])
    assert ended.value.code == 130 and "the same command continues" in capsys.readouterr().err


def test_what_is_counted_is_named_as_one_or_as_several() -> None:
    assert [counted_as(number, "block") for number in (1, 2)] == ["1 block", "2 blocks"]
    assert [counted_as(number, "process", "processes") for number in (1, 2)] == ["1 process", "2 processes"]


def test_the_version_is_the_distributions(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(["--version"], capsys).startswith("slidewright 0.")
    assert said(["tile", "--version"], capsys) == said(["--version"], capsys)
