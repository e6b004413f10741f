"""``--multirun``: a run for each combination of values, here one after the other, with SLURM as one array of jobs."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from data.fault import Fault
from data.lease import alone as hold_alone
from launch import sweeping
from launch.entry import run_command_line
from pretrain.settings.sweeps import Sweep, sweep_of
from tests.data.shards.tile_folders import write_tiles
from tests.pretrain.training.test_tile_training import TINY, finish, start

TILE = ["run=runs/sweep", "data.shards=shards"]


def sweep(*words: str) -> Sweep:
    return sweep_of("tile", [*TILE, *words], [])


def test_each_combination_is_a_run_in_a_folder_that_names_it_and_the_last_word_changes_fastest() -> None:
    found = sweep("recipe=small", "optim.lr=1e-4,3e-4", "seed=range(0,2)", "data.crops.global_scale=[0.3,1],[0.5,1]")
    names = [
        f"optim.lr={lr},seed={seed},data.crops.global_scale={scale}"
        for lr in ("1e-4", "3e-4")
        for seed in (0, 1)
        for scale in ("_0.3_1_", "_0.5_1_")
    ]
    assert list(found.points) == names
    configs = [composed.object() for composed in found.points.values()]
    assert [config.run for config in configs] == [f"runs/sweep/{name}" for name in names]
    assert [(config.optim.lr, config.seed, config.data.crops.global_scale) for config in configs] == [
        (lr, seed, [low, 1.0]) for lr in (1e-4, 3e-4) for seed in (0, 1) for low in (0.3, 0.5)
    ]


@pytest.mark.parametrize(
    ("word", "values"),
    [
        ("recipe=small,small_dino", ["small", "small_dino"]),
        ("recipe=choice(small,small_dino)", ["small", "small_dino"]),
        ("recipe=glob(dinov3*,exclude=*gram)", ["dinov3_highres", "dinov3_vitl16"]),
        ("watch.probe=2024_01,'a,b'", ["2024_01", "a,b"]),
        ("watch.probe=null,probe", ["None", "probe"]),
        ("seed=range(0,5,2)", ["0", "2", "4"]),
        ("seed=sort(3,1,2)", ["1", "2", "3"]),
    ],
)
def test_values_are_taken_as_they_are_written(word: str, values: list[str]) -> None:
    key = word.partition("=")[0]
    found = sweep(word).points.values()
    if key == "recipe":
        assert [composed.words[-1] for composed in found] == [f"recipe={value}" for value in values]
    else:
        configs = [composed.object() for composed in found]
        assert [str(config.seed if key == "seed" else config.watch.probe) for config in configs] == values


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["tile", *TILE, "-m"], "--multirun without a setting of several values is one run: give some, optim.lr=1e-4,3e-4."),
        (["tile", "data.shards=a", "seed=0,1", "-m"], "a sweep has one run=, the folder below which each of its runs has its own."),
        (["tile", "data.shards=a", "run=a,b", "-m"], "a sweep has one run=, "),
        (["tile", *TILE, "optim.lr=interval(0,1)", "-m"], "optim.lr=interval(0,1) has no end of values: list some, optim.lr=0.1,0.2"),
        (["tile", *TILE, "recipe=glob(x*)", "-m"], "recipe=glob(x*) fits none of recipe: "),
        (["tile", *TILE, "seed=1,1", "-m"], "two runs of the sweep are the same, seed=1 and seed=1: leave one out."),
        (["tile", *TILE, "optim.lrr=1,2", "--multirun"], "there is no setting 'optim.lrr'"),
        (["tile", "run=a", "seed=1,2", "--multirun"], "data.shards must be given"),
        (["tile", *TILE, "seed=1,2", "-m", "--cfg", "job"], "--cfg job is of one run: leave --multirun out"),
        (["embed", "out=a", "stage=tile,slide", "-m"], "--multirun is of runs, 'pretrain tile' and 'pretrain slide', and not of 'pretrain embed'."),
        (["tile", *TILE, "seed=1,2", "hydra.sweep.dir=a", "-m"], "hydra.sweep.dir=a: Hydra's own settings have no effect here; run="),
    ],
)  # fmt: skip
def test_what_is_no_sweep_is_said_before_anything_runs(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_command_line(words)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith(f"pretrain: {sentence}") and said.count("\n") == 1, said


def test_runs_are_told_apart_by_what_they_are_and_not_by_how_they_are_written(tmp_path: Path) -> None:
    for words in ("optim.lr=1e-4,0.0001", "seed=1,01"):
        with pytest.raises(Fault, match=r"two runs of the sweep are the same, (.*)=.* and \1=.*: leave one out"):
            sweep(words)
    both = sweep("data.sample=a/b,a_b").points
    assert next(iter(both)) == "data.sample=a_b" and len(both) == 2
    assert [composed.object().data.sample for composed in both.values()] == ["a/b", "a_b"]
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    with pytest.raises(Fault, match="is a run, and a sweep's runs lie below a folder of their own"):
        sweep_of("tile", [f"run={tmp_path}", "data.shards=shards", "seed=1,2"], [])


def test_a_long_name_of_a_folder_is_cut_and_stays_its_own() -> None:
    shards = [f"data.shards={','.join('x' * 250 + end for end in 'ab')}"]
    names = list(sweep_of("tile", ["run=runs/sweep", *shards], []).points)
    assert len(set(names)) == 2 and all(len(name.encode()) < 255 for name in names)


def ending(monkeypatch: pytest.MonkeyPatch, folder: Path, codes: list[int]) -> list[str]:
    """Let the runs of a sweep end with these codes; the numbers of those that ran are written to a file."""
    left = iter(codes)

    def arguments(composed: object, words: list[str]) -> list[str]:
        code = next(left)
        return ["-c", f"open({str(folder / 'ran')!r}, 'a').write('{code} '); raise SystemExit({code})"]

    monkeypatch.setattr(sweeping, "python_arguments", arguments)
    return ["tile", *TILE, "seed=range(0,3)", "--multirun"]


@pytest.mark.parametrize(
    ("codes", "ran", "code", "says"),
    [
        ([0, 0, 0], "0 0 0 ", 0, "all 3 runs are done; 'pretrain report run=runs/sweep' sets them side by side"),
        ([0, 1, 0], "0 1 0 ", 1, "pretrain: 1 of 3 runs failed, as said above: seed=1; the same command tries them again."),
        ([0, 75, 0], "0 75 ", 75, "the sweep ends here, 2 of its runs aren't done; the same command continues"),
        ([130, 0, 0], "130 ", 130, "the sweep ends here, 3 of its runs aren't done; the same command continues"),
    ],
)  # fmt: skip
def test_a_run_that_fails_leaves_the_others_and_one_that_was_stopped_ends_the_sweep(
    codes: list[int],
    ran: str,
    code: int,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ending(monkeypatch, tmp_path, codes)
    if code:
        with pytest.raises(SystemExit) as ended:
            run_command_line(words)
        assert ended.value.code == code
    else:
        run_command_line(words)
    assert (tmp_path / "ran").read_text() == ran
    assert says in capsys.readouterr().err


def test_a_run_that_another_process_holds_goes_on_elsewhere_and_has_not_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ending(monkeypatch, tmp_path, [0, 1, 0])
    with hold_alone(tmp_path / "runs" / "sweep" / "seed=1"), pytest.raises(SystemExit) as ended:
        run_command_line(words)
    said = capsys.readouterr().err
    assert ended.value.code == 75 and "goes on elsewhere, as said above: seed=1, 1 of 3 runs;" in said
    assert "failed" not in said and "all 3 runs are done" not in said


def test_a_refusal_names_its_point_unless_it_is_every_points(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm = ["launch=slurm", "launch.gpus_per_node=4", "launch.dry_run=true"]
    for words, sentence in (
        (["data.lanes=4,2", *slurm], "data.lanes=2: data.lanes=2 can't be shared evenly by 4 processes"),
        (["optim.lr=1e-4,-1"], "optim.lr=-1: optim.lr=-1"),
        (["seed=1,2", "optim.lr=-1"], "optim.lr=-1"),
    ):
        with pytest.raises(SystemExit):
            run_command_line(["tile", "--multirun", *TILE, *words])
        assert capsys.readouterr().err.startswith(f"pretrain: {sentence}")


def test_each_job_of_the_array_runs_the_command_of_its_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [*TILE, "optim.lr=1e-4,3e-4", "seed=0,1", "launch=slurm", "launch.gpus_per_node=1", "launch.dry_run=true"]
    run_command_line(["tile", "--multirun", *words])
    text = capsys.readouterr().out
    assert "#SBATCH --array=0-3\n" in text
    (tmp_path / "srun").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    for number, (name, composed) in enumerate(sweep("optim.lr=1e-4,3e-4", "seed=0,1").points.items()):
        environment = {
            "PATH": f"{tmp_path}:/usr/bin:/bin",
            "SLURM_ARRAY_TASK_ID": str(number),
            "SLURM_ARRAY_JOB_ID": "7",
            "SLURM_JOB_ID": str(8 + number),
        }
        done = subprocess.run(["bash", "-c", text], env=environment, capture_output=True, text=True, check=True)
        called = done.stdout.splitlines()
        assert called[called.index(sys.executable) :] == [
            *(sys.executable, "-P", "-m", "pretrain", "tile", f"run=runs/sweep/{name}"),
            *composed.words[1:],
            *("trainer.nodes=1", "trainer.devices=1", "trainer.accelerator=gpu"),
        ]
    assert shlex.split(text.splitlines()[1].removeprefix("# Written by: ")) == [
        "pretrain",
        "tile",
        "--multirun",
        *words,
    ]


@pytest.mark.slow  # two runs
def test_a_sweep_trains_each_of_its_runs_and_the_same_command_says_that_they_are_done(tmp_path: Path) -> None:
    shards = write_tiles(tmp_path / "shards", [11, 13])
    words = ["tile", f"run={tmp_path / 'sweep'}", f"data.shards={shards}", *TINY, "optim.steps=2", "seed=0,1", "-m"]
    said = finish(start(words))
    assert "run 1 of 2" in said and "all 2 runs are done" in said
    for seed in (0, 1):
        lines = (tmp_path / "sweep" / f"seed={seed}" / "metrics.jsonl").read_text().splitlines()
        assert max(json.loads(line)["step"] for line in lines) == 2
    assert finish(start(words)).count(" is done: 2 steps") == 2
