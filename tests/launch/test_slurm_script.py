"""What ``launch=`` makes of its settings, without a cluster: the script's text, torchrun's command, and what is
refused."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from launch import failures
from launch.entry import run_command_line
from launch.processes import Processes, arrange
from launch.slurm import seconds
from launch.submit import submit
from pretrain.settings.annotation import annotated
from pretrain.settings.composition import load
from pretrain.settings.config_files import CONFIGS

TILE = ["tile", "run=runs/first", "data.shards=shards"]


def script(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    run_command_line([*words, "launch=slurm", "launch.dry_run=true"])
    return capsys.readouterr().out


def options(text: str) -> dict[str, str]:
    """sbatch's options in a script."""
    lines = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def test_the_script_of_a_training_job_says_what_was_set_and_nothing_else(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = script(
        capsys,
        *TILE,
        "recipe=midnight",
        "launch.nodes=4",
        "launch.gpus_per_node=8",
        "launch.partition=gpu",
        "launch.account=lab",
        "launch.qos=long",
        "launch.time=2-00:00:00",
        "launch.cpus_per_task=12",
        "launch.mem=0",
        "launch.after=12,13",
        "launch.sbatch=['--constraint=h100']",
        "launch.setup=[module load cuda]",
        "launch.container='apptainer exec --nv it.sif'",
        "launch.python=python3",
    )
    logs = tmp_path / "runs" / "first" / "logs"
    assert options(text) == {
        "job-name": "tile-first",
        "chdir": str(tmp_path),
        "output": f"{logs}/%j.log",
        "open-mode": "append",
        "partition": "gpu",
        "account": "lab",
        "qos": "long",
        "time": "2-00:00:00",
        "nodes": "4",
        "ntasks-per-node": "8",
        "gpus-per-node": "8",
        "cpus-per-task": "12",
        "mem": "0",
        "dependency": "afterok:12:13",
        "kill-on-invalid-dep": "yes",
        "signal": "USR1@120",
        "requeue": "",
        "constraint": "h100",
    }
    body = " ".join(text.replace("\\\n", " ").split())
    assert (
        "--cpus-per-task=12 apptainer exec --nv it.sif python3 -P -m pretrain tile run=runs/first data.shards=shards"
        " recipe=midnight trainer.nodes=4 " in body
    )
    assert "trainer.devices=8 trainer.accelerator=gpu code=$?" in body
    assert (
        text.index("export MASTER_ADDR") < text.index("\nmodule load cuda\n") < text.index("srun")
    )  # so that set-up lines may change it
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        [*TILE, "launch.gpus_per_node=2", "launch.doctor=true"],
        ["shard", "slides='a b.svs c'", "out='my shards'", "launch.array=3"],
        ["export", "checkpoint=runs/first", "out=encoder"],
    ],
)
def test_every_script_is_a_shell_script(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    checked = subprocess.run(["bash", "-n"], input=script(capsys, *words), capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")


@pytest.mark.parametrize(
    ("words", "doctor"),
    [
        ([*TILE, "launch.gpus_per_node=2"], ["doctor", "run=runs/first", "data.shards=shards", "trainer.nodes=1", "trainer.devices=2"]),
        (["slide", "run=runs/slide", "data.embeddings=it", "launch.processes_per_node=2"], ["doctor", "slide", "run=runs/slide", "data.embeddings=it", "trainer.nodes=1"]),
        (["embed", "checkpoint=it", "shards=shards", "out='my it'"], ["doctor", "machine", "run='my it'"]),
    ],
)  # fmt: skip
def test_the_doctor_is_asked_about_the_jobs_own_run(
    capsys: pytest.CaptureFixture[str], words: list[str], doctor: list[str]
) -> None:
    text = script(capsys, *words, "launch.doctor=true").partition("# Is every node fit for it?\n")[2]
    _, _, arguments = text.partition(" || exit 1")[0].replace("\\\n", " ").partition(" -m pretrain ")
    assert shlex.split(arguments)[: len(doctor)] == doctor


def test_the_words_of_a_command_reach_it_unharmed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The part of the script that runs the command is run, with a python that prints what it is given."""
    printing = tmp_path / "python"
    printing.write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n')
    printing.chmod(0o755)
    text = script(
        capsys,
        "shard",
        "slides=['it is $a.svs']",
        "out='$HOME and more'",
        "launch.array=40",
        f"launch.python={printing}",
    )
    run = text[text.index("srun") : text.index(" &\nwait")].partition("\\\n")[2]
    said = subprocess.run(["bash", "-c", run], env={"SLURM_ARRAY_TASK_ID": "2"}, capture_output=True, text=True).stdout
    assert said.splitlines() == [
        "-P",
        "-m",
        "pretrain",
        "shard",
        "slides=['it is $a.svs']",
        "out='$HOME and more'",
        "part=3/40",
    ]


@pytest.mark.parametrize(
    ("words", "merging"),
    [
        (["shard", "slides=a", "out=b"], "shards index \\\n    shards=b &"),
        (
            ["embed", "slides=a", "out=b", "checkpoint=c", "launch.gpus_per_node=1"],
            "embed \\\n    out=b \\\n    merge=true &",
        ),
    ],
)
def test_an_array_is_followed_by_the_job_that_merges_it(
    capsys: pytest.CaptureFixture[str], words: list[str], merging: str
) -> None:
    array, merge = script(capsys, *words, "launch.array=40", "launch.array_at_once=5").split("\n#!/bin/bash\n")
    assert options(array)["array"] == "0-39%5" and options(merge)["dependency"] == "afterok:ARRAY"
    assert merging in merge and "part=" not in merge.partition("export")[2] and "gpus-per-node" not in options(merge)
    assert options(array)["signal"] == "B:USR1@120"


@pytest.mark.parametrize("url", ["https://me:hunter2@host/s", "https://host/s?token=hunter2", "s3://k:hunter2@b/s"])
def test_a_secret_in_the_command_is_refused_and_not_put_into_a_script(
    url: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for dry in ("true", "false"):
        with pytest.raises(SystemExit):
            run_command_line(
                [
                    "tile",
                    "run=r",
                    f"data.shards='{url}'",
                    "launch=slurm",
                    "launch.gpus_per_node=1",
                    f"launch.dry_run={dry}",
                ]
            )
        said = capsys.readouterr()
        assert (
            "data.shards= holds a password or a token: put a variable of the environment in its place, '${oc.env:NAME}'"
            in said.err
        )
        assert said.err.count("\n") == 1 and "hunter2" not in said.err + said.out and not list(tmp_path.iterdir())


def test_a_variable_in_place_of_a_secret_is_read_where_the_job_runs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKEN", "hunter2")
    word = "data.shards='https://host/s?token=${oc.env:TOKEN}'"
    text = script(capsys, "tile", "run=r", word, "launch.gpus_per_node=1")
    assert shlex.quote(word) in text and "hunter2" not in text
    assert load("tile", ["run=r", word]).object().data.shards == ["https://host/s?token=hunter2"]
    run_command_line(["tile", "run=r", word, "--cfg", "job"])
    assert "https://host/s?token=***" in (shown := capsys.readouterr().out) and "hunter2" not in shown


def test_a_submitted_script_is_its_owners_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho 7\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (tmp_path / "a.sbatch").write_text("before")
    assert submit(tmp_path / "a.sbatch", "text", tmp_path / "logs") == "7"
    assert (tmp_path / "a.sbatch").stat().st_mode & 0o777 == 0o600 and (tmp_path / "a.sbatch").read_text() == "text"


def test_where_it_runs_is_no_part_of_what_it_computes() -> None:
    plain, submitted = load(TILE[0], TILE[1:]), load(TILE[0], [*TILE[1:], "launch=slurm", "launch.nodes=2"])
    assert plain.tree == submitted.tree and submitted.words == TILE[1:]
    text = annotated(submitted)
    assert "launch:" in text and "nodes: 2 " in text and text.count("[command line]") == 3
    assert "launch" not in annotated(plain)


def test_a_clusters_own_values_are_a_file_of_the_users(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "ours.yaml").write_text(
        "defaults:\n  - slurm\n  - _self_\npartition: gpu  # of the hospital\n"
    )
    run_command_line(
        [*TILE, "--config-dir", str(tmp_path), "launch=ours", "launch.gpus_per_node=1", "launch.dry_run=true"]
    )
    text = capsys.readouterr().out
    assert options(text)["partition"] == "gpu" and f"pretrain tile --config-dir {tmp_path} \\\n" in text


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["launch=slrum"], "there is no launch 'slrum'; did you mean 'slurm'?"),
        (["launch=slurm", "launch.node=2"], "there is no setting 'launch.node' in 'pretrain tile'; did you mean 'launch.nodes'?"),
        (["launch=slurm", "+launch.node=2"], "there is no setting 'launch.node' in 'pretrain tile'; did you mean 'launch.nodes'?"),
        (["launch.partition=gpu"], "launch.partition is a setting of launch=slurm: give that too"),
        (["launch=slurm", "launch.nodes=two"], "launch.nodes: "),
        (["launch=slurm"], "launch.gpus_per_node must be given"),
        (["launch=slurm", "launch.gpus_per_node=4", "trainer.devices=3"], "trainer.devices=3 contradicts launch.*, by which it is 4"),
        (["launch=slurm", "launch.gpus_per_node=4", "trainer.accelerator=cpu"], "trainer.accelerator=cpu contradicts launch.*, by which it is gpu"),
        (["launch=slurm", "launch.gpus_per_node=4", "launch.processes_per_node=2"], "a process runs on each GPU"),
        (["launch=slurm", "launch.gpus_per_node=4", "launch.array=3"], "launch.array= is for commands that take part="),
        (["launch=torchrun", "launch.nodes=2", "launch.gpus_per_node=1"], "launch.endpoint must be given"),
        (["trainer.nodes=2", "trainer.devices=2"], "trainer.nodes=2 needs somebody who starts it on every node"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_line(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run_command_line([*TILE, *words])
    said = capsys.readouterr()
    assert sentence in said.err and said.err.count("\n") == 1 and said.out == ""


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["launch.nodes=0"], "launch.nodes=0 is not allowed: it must be at least 1."),
        (["launch.gpus_per_node=-2"], "launch.gpus_per_node=-2 is not allowed: it must be at least 0."),
        (["launch.processes_per_node=0"], "launch.processes_per_node=0 is not allowed: it must be at least 1."),
        (["launch.cpus_per_task=-2"], "launch.cpus_per_task=-2 is not allowed: it must be at least 1."),
        (["launch.mem=much"], "launch.mem=much is not allowed: it must be a number of megabytes, or one with a unit: 64G."),
        (["launch.time=banana"], "launch.time=banana is not allowed: it must be minutes, minutes:seconds, hours:minutes:seconds, "),
        (["launch.time=2", "launch.signal_seconds=120"], "launch.signal_seconds=120 is not less than launch.time=2, so a job "),
        (["launch.array=0"], "launch.array=0 is not allowed: it must be at least 1."),
        (["launch.array=-1"], "launch.array=-1 is not allowed: it must be at least 1."),
        (["launch.array_at_once=-3"], "launch.array_at_once=-3 is not allowed: it must be at least 1."),
        (["launch.after=[abc]"], "launch.after holds 'abc', which is not allowed: each must be the number of a job: 4711, or 4711_3 of an array."),
        (["launch.after=12,abc"], "launch.after holds 'abc'"),
        (["launch.exclude=['n 1']"], "launch.exclude holds 'n 1', which is not allowed: each must be the name of a node"),
        (["launch.signal_seconds=-5"], "launch.signal_seconds=-5 is not allowed: it must be at least 1 and at most 65535."),
        (["launch.srun=[gpu-bind]"], "launch.srun holds 'gpu-bind', which is not allowed: each must be an option"),
        (["launch.srun=['--gpu-bind=closest']"], "launch.srun holds --gpu-bind=closest, by which a process sees some of its node's GPUs alone: leave"),
        (["launch.sbatch=['--gpus-per-task 1']"], "launch.sbatch holds --gpus-per-task 1, by which a process sees some"),
        (["launch.chain=1"], "launch.chain=1 is not allowed: it must be at least 2 and at most 1000."),
        (["launch.chain=2", "launch.array=2"], "launch.chain= and launch.array= exclude each other"),
        (["launch.time=0"], "launch.time=0 is no time: give it some, or launch.time=UNLIMITED"),
        (["launch.sbatch=['--array=1-3']"], "launch.sbatch holds --array=1-3, and the script says that itself: give launch.array=."),
        (["launch.sbatch=['-t 3']"], "the script says that itself: give launch.time=."),
        (["launch.sbatch=['--output=/x']"], "the script says that itself: the logs lie in the run's folder, or launch.folder=."),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_refused_before_anything_is_written(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        run_command_line(["shard", "slides=a", "out=b", "launch=slurm", *words])
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert sentence in said.err and said.err.count("\n") == 1 and said.out == "" and list(tmp_path.iterdir()) == []


def test_a_run_s_folder_of_other_settings_is_refused_before_the_job_waits(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text("seed: 4\n")
    with pytest.raises(SystemExit):
        run_command_line(
            [
                "tile",
                f"run={tmp_path}",
                "data.shards=s",
                "launch=slurm",
                "launch.gpus_per_node=1",
                "launch.dry_run=true",
            ]
        )
    assert "holds a run with other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("time", "found"),
    [("90", 5400), ("90:30", 5430), ("1:30:00", 5400), ("2-12", 216000), ("1-1:30", 91800), ("1-00:00:10", 86410), ("0", 0), ("UNLIMITED", 0)],
)  # fmt: skip
def test_a_time_limit_is_read_as_sbatch_reads_it(time: str, found: int) -> None:
    assert seconds(time) == found


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["tile", "run=r", "data.shards=s", "launch.nodes=3", "launch.gpus_per_node=1"], "data.lanes=4 can't be shared evenly by 3 processes"),
        (["tile", "run=r", "data.shards=s", "launch.gpus_per_node=4", "data.batch_size=40"], "data.batch_size=40 can't be shared by 4 processes"),
        (["tile", "run=r", "data.shards=s", "launch.gpus_per_node=2", "data.batch_size=30"], "data.batch_size=30 is not a multiple of data.lanes=4"),
        (["tile", "run=r", "data.shards=s", "launch.gpus_per_node=4", "trainer.shard_size=3"], "trainer.shard_size=3 does not divide the 4 processes"),
        (["slide", "run=r", "data.embeddings=e", "launch.gpus_per_node=3"], "data.lanes=4 can't be shared evenly by 3 processes × trainer.accumulate=1"),
        (["slide", "run=r", "data.embeddings=e", "launch.gpus_per_node=4", "data.processes_per_slide=3"], "data.processes_per_slide=3 doesn't divide the run's 4 processes"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("launch", ["slurm", "torchrun"])
def test_processes_that_do_not_divide_the_batch_are_found_out_before_the_job(
    words: list[str], sentence: str, launch: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_command_line(
            [
                *words,
                f"launch={launch}",
                "launch.dry_run=true",
                *(["launch.endpoint=a:1"] if launch == "torchrun" else []),
            ]
        )
    said = capsys.readouterr()
    assert ended.value.code == 2 and sentence in said.err and said.out == ""


def test_gpus_without_cores_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    for words, warns in (
        (["launch.gpus_per_node=1"], True),
        (["launch.gpus_per_node=1", "launch.cpus_per_task=8"], False),
        (["launch.processes_per_node=1"], False),
        (["launch.gpus_per_node=1", "launch.sbatch=['--cpus-per-gpu=8']"], False),
    ):
        run_command_line([*TILE, "launch=slurm", "launch.dry_run=true", *words])
        assert ("launch.cpus_per_task isn't given" in capsys.readouterr().err) == warns


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["launch.setup=module load cuda"], ["module load cuda"]),
        (["launch.exclude=n7,n9"], ["#SBATCH --exclude=n7,n9"]),
        (["launch.exclude=n7"], ["#SBATCH --exclude=n7"]),
        (["launch.exclude=['n[1-3]']"], ["#SBATCH --exclude='n[1-3]'"]),
    ],
)
def test_a_list_of_one_is_written_as_on_a_command_line(
    words: list[str], found: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert set(found) <= set(script(capsys, *TILE, "launch.gpus_per_node=1", *words).splitlines())


def test_the_examples_in_the_settings_can_be_typed_as_they_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    shown = re.findall(r"'launch\..*?'(?= |$)", (CONFIGS / "launch" / "slurm.yaml").read_text(), re.MULTILINE)
    assert len(shown) == 4
    lines = script(
        capsys, *TILE, "launch.gpus_per_node=1", "launch.doctor=true", *shlex.split(" ".join(shown))
    ).splitlines()
    for line in (
        "module load cuda",
        "export NCCL_SOCKET_IFNAME=ib0",
        "#SBATCH --constraint=h100",
        "#SBATCH --mail-user=me@lab.org",
        "#SBATCH --mail-type=FAIL",
    ):
        assert line in lines
    steps = [line for line in lines if line.startswith("srun ")]
    assert len(steps) == 2  # the doctor's, and the run's
    for step in steps:
        assert " --container-image=slidewright.sqsh --container-mounts=/data:/data " in step


@pytest.mark.parametrize(
    ("words", "step"),
    [
        (["launch.container='apptainer exec --nv --bind /data slidewright.sif'", "launch.python=python3"], "apptainer exec --nv --bind /data slidewright.sif python3 -P -m pretrain"),
        (["launch.srun=['--container-image=slidewright.sqsh','--container-mounts=/data:/data','--cpu-bind=cores']", "launch.python=python3"],
         "--container-image=slidewright.sqsh --container-mounts=/data:/data --cpu-bind=cores python3 -P -m pretrain"),
    ],
)  # fmt: skip
def test_the_doctor_is_where_the_run_is_in_its_container_and_with_its_cores(
    words: list[str], step: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = script(capsys, *TILE, "launch.gpus_per_node=2", "launch.cpus_per_task=12", "launch.doctor=true", *words)
    doctor, run = (line for line in text.splitlines() if line.startswith("srun "))
    following = text.splitlines()[text.splitlines().index(run) + 1]
    assert doctor.startswith(f"srun --ntasks=1 --ntasks-per-node=1 --cpus-per-task=12 {step} doctor ")
    assert f"{run} {following.strip()}".replace(" \\ ", " ").endswith(f"--cpus-per-task=12 {step} tile \\")


def test_a_percent_sign_in_a_folders_name_is_no_replacement_of_slurms(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = script(capsys, "tile", f"run={tmp_path}/50%j", "data.shards=s", "launch.gpus_per_node=1")
    assert options(text)["output"] == f"{tmp_path}/50%%j/logs/%j.log"
    assert f"export PRETRAIN_LOGS={tmp_path}/50%j/logs/$SLURM_JOB_ID" in text
    step = next(line for line in text.splitlines() if line.startswith("srun "))
    said = subprocess.run(
        ["bash", "-c", step.replace("srun ", "echo ")], env={"PRETRAIN_LOGS": "/50%j/7"}, capture_output=True, text=True
    )
    assert "--output=/50%%j/7/rank-%5t.log" in said.stdout


@pytest.mark.parametrize("out", ["++out", "out"])
def test_an_array_finds_its_folder_however_it_was_given(out: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = script(capsys, "shard", "slides=a", f"{out}=b", "launch.array=4", "launch.doctor=true")
    assert "shards index \\\n    shards=b &" in text and "doctor machine \\\n    run=b ||" in text


def test_a_chain_is_of_jobs_that_start_when_the_one_before_has_ended(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    programs, calls = tmp_path / "bin", tmp_path / "calls"
    programs.mkdir()
    (programs / "sbatch").write_text(f'#!/bin/sh\necho "$@" >> {calls}\nwc -l < {calls} | tr -d " "\n')
    (programs / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    run_command_line([*TILE, "launch=slurm", "launch.processes_per_node=1", "launch.chain=3", "launch.after=77"])
    said = capsys.readouterr()
    assert said.out.split() == ["1", "2", "3"] and "1 → 2 → 3" in said.err
    path = "runs/first/tile.sbatch"
    assert calls.read_text().splitlines() == [
        f"--parsable {path}",
        f"--parsable --dependency=afterok:77,afterany:1 {path}",
        f"--parsable --dependency=afterok:77,afterany:2 {path}",
    ]
    found = options(Path(path).read_text())
    # The time's signal comes, for the checkpoint; what goes on is the next job, not this one once more.
    assert found["signal"] == "USR1@120" and "no-requeue" in found and found["dependency"] == "afterok:77"


def test_a_chained_command_that_does_not_train_ends_when_its_time_is_over(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The part of the script that runs the command is run, with an srun that waits, and told what SLURM would tell
    it."""
    text = script(capsys, "shard", "slides=a", "out=b", "launch.chain=2")
    assert text.rstrip().endswith("# and then: sbatch --dependency=afterany:THE_ONE_BEFORE b/shard.sbatch")
    body = text[text.index("trap ") : text.index("if [ $code")]
    waiting = f"srun() {{ exec sleep 60; }}\n(sleep 0.3; kill -USR1 $$) &\n{body}"
    ended = subprocess.run(["bash", "-c", waiting], capture_output=True, text=True, timeout=30)
    assert ended.returncode == 75 and "the next job of the chain goes on" in ended.stdout


def test_the_node_of_the_rank_that_failed_first_is_named_with_how_to_leave_it_out(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = script(capsys, *TILE, "launch.processes_per_node=2")
    end = text[text.index("if [ $code") :]
    monkeypatch.setenv("PRETRAIN_LOGS", str(tmp_path))
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    failures.record(ZeroDivisionError("of a broken GPU"))
    said = subprocess.run(["bash", "-c", f"code=1\n{end}"], capture_output=True, text=True)
    assert said.returncode == 1
    assert (
        said.stdout.splitlines()[-1]
        == f"pretrain: exit code 1; the logs of all ranks are in {tmp_path}; launch.exclude=n7 leaves that node out,"
        " should it be at fault"
    )


@pytest.mark.parametrize("word", ["launch=slurm", "+launch=slurm", "launch=null"])
def test_a_plan_is_not_launched_elsewhere(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_command_line(["plan", word])
    said = capsys.readouterr()
    assert said.err.startswith("pretrain: 'pretrain plan' runs here") and said.err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["launch=slurm", "launch.nodes=2"], "'pretrain shard' is one process: launch.nodes"),
        (["launch=slurm", "launch.array=2", "part=1/2"], "leave part= out"),
        (["launch=torchrun"], "launch=torchrun is for 'tile', 'slide' and 'curate'"),
    ],
)
def test_one_process_is_not_spread(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_command_line(["shard", "slides=a", "out=b", *words])
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "nodes", "gpus", "each", "found"),
    [
        ([], 4, 8, None, Processes(4, 8, 8)),
        ([], 2, 0, 3, Processes(2, 3, 0)),
        ([], 2, None, 3, Processes(2, 3, 0)),
        ([], 1, 0, None, Processes(1, 1, 0)),
        (["trainer.devices=2"], 1, None, None, Processes(1, 2, 2)),
        (["trainer.devices=2", "trainer.accelerator=cpu"], 3, None, None, Processes(3, 2, 0)),
    ],
)
def test_launch_and_trainer_settings_agree(
    words: list[str], nodes: int, gpus: int | None, each: int | None, found: Processes
) -> None:
    processes, words = arrange(load("tile", [*TILE[1:], *words]), nodes, gpus, each)
    trainer = load("tile", words).tree.trainer
    assert processes == found
    assert (trainer.nodes, trainer.devices, trainer.accelerator) == (
        found.nodes,
        found.each,
        "gpu" if found.gpus else "cpu",
    )


def test_torchruns_command_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    run_command_line(
        [
            *TILE,
            "recipe=midnight",
            "launch=torchrun",
            "launch.nodes=2",
            "launch.gpus_per_node=8",
            "launch.endpoint=node1:29400",
            "launch.dry_run=true",
        ]
    )
    environment, _, command = capsys.readouterr().out.partition(" -m launch.torchrun_agent ")
    words = ["python", "-m", "launch.torchrun_agent", *command.split()]
    assert environment.startswith("env PRETRAIN_LOGS=") and "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in environment
    assert words[1:10] == [
        "-m",
        "launch.torchrun_agent",
        "--nnodes=2",
        "--nproc-per-node=8",
        "--max-restarts=3",
        "--shutdown-timeout=600",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=node1:29400",
        "--rdzv-id=first",
    ]
    assert words[10:13] == ["-m", "pretrain", "tile"] and words[-3:] == [
        "trainer.nodes=2",
        "trainer.devices=8",
        "trainer.accelerator=gpu",
    ]


def test_no_slurm_here_is_said(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(SystemExit):
        run_command_line(
            ["export", "checkpoint=a", f"out={tmp_path / 'b'}", "launch=slurm", f"launch.folder={tmp_path / 'there'}"]
        )
    assert "sbatch is not here" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_line_breaks_stay_in_their_comment_and_are_refused_where_they_would_end_an_option(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [*TILE, "launch=slurm", "launch.gpus_per_node=4", "launch.dry_run=true"]
    run_command_line([*words, 'launch.setup=["export A=1\nexport B=2"]'])
    lines = capsys.readouterr().out.splitlines()
    assert "export A=1\\nexport B=2" in lines[1] and lines[2].startswith("#SBATCH") and "export B=2" in lines
    with pytest.raises(SystemExit):
        run_command_line([*words, "launch.partition='a\nrm x'"])
    assert "launch.partition holds a line break" in capsys.readouterr().err


CURATE = ["curate", "embeddings=e", "size=10", "out=chosen"]


def test_what_shares_its_work_is_as_many_tasks_as_are_asked_for_and_the_script_is_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = script(capsys, *CURATE, "launch.nodes=2", "launch.gpus_per_node=4", "launch.cpus_per_task=8")
    asked = options(text)
    assert (asked["nodes"], asked["ntasks-per-node"], asked["gpus-per-node"]) == ("2", "4", "4")
    assert asked["signal"] == "B:USR1@120" and "export MASTER_ADDR=" in text and "processes=8" in text
    assert asked["output"].endswith("/chosen/logs/%j.log")
    text = script(capsys, *CURATE, "processes=6", "launch.nodes=2")
    assert options(text)["ntasks-per-node"] == "3" and text.count("processes=6") == 2  # and in its first line
    assert "MASTER_ADDR" not in script(capsys, *CURATE)
    run_command_line([*CURATE, "launch=torchrun", "launch.processes_per_node=3", "launch.dry_run=true"])
    assert re.search(r"--nproc-per-node=3 .* processes=3$", capsys.readouterr().out.strip())
    for words, sentence in (
        (["processes=5", "launch.gpus_per_node=4"], "processes=5 contradicts launch.*, by which it is 4"),
        (["processes=5", "launch.nodes=2"], "processes=5 contradicts launch.*, by which it is 4"),
        (["launch.processes_per_node=2", "launch.gpus_per_node=4"], "a process runs on each GPU"),
    ):
        with pytest.raises(SystemExit):
            script(capsys, *CURATE, *words)
        assert sentence in capsys.readouterr().err
