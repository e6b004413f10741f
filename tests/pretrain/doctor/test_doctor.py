"""Every check of the doctor, sound once and made to fail once, with what it says to do."""

import os
import subprocess
import threading
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from data.fault import Fault
from data.lease import alone
from launch.entry import run_command_line
from pretrain.doctor import embeddings, folder, machine, services, tiles
from pretrain.doctor.finding import Finding
from pretrain.doctor.rate import fast_enough
from pretrain.inspection.views import recipe_settings
from pretrain.objectives.slide_mae import SlideMAE
from pretrain.settings import plugins
from pretrain.settings.composition import load
from pretrain.training.slide_settings import SlideData
from tests.data.parquet.tables import write_table
from tests.data.shards.tile_folders import spoil, write_tiles
from tests.pretrain.training.test_slide_training import SMALL
from tests.pretrain.training.test_tile_training import TINY
from tests.pretrain.training.wavy_slides import write_wavy_slides


def only(findings: list[Finding]) -> tuple[str, str]:
    (finding,) = findings
    return finding.status, finding.says


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiles(tmp_path_factory.mktemp("doctor") / "shards", [30, 30, 30, 30])


# Machine -----------------------------------------------------------------------------------------------------------

HERE = {"torch": "2.14.1", "lightning": "2.6.4", "numpy": "2.1"}


def installed(name: str) -> str:
    if name not in HERE:
        raise PackageNotFoundError(name)
    return HERE[name]


@pytest.mark.parametrize(
    ("wanted", "torchvision", "status", "words"),
    [
        (["torch>=2.14,<2.15"], ["torch==2.14.1"], "ok", "1 packages are as pyproject.toml asks"),
        (["torch>=2.15"], [], "FAIL", "torch is 2.14.1, and >=2.15 is needed: pip install 'torch>=2.15'"),
        (["timm>=1"], [], "FAIL", "timm is not installed: pip install 'timm>=1'"),
        ([], ["torch==2.13.0"], "FAIL", "was built for torch ==2.13.0, and torch is 2.14.1"),
        (["nothing>=1; extra == 'test'"], [], "ok", "0 packages"),
    ],
)
def test_versions(
    wanted: list[str], torchvision: list[str], status: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(HERE, "torchvision", "0.29")
    found = only(machine.versions(wanted, installed, torchvision))
    assert found[0] == status and words in found[1]


@pytest.mark.parametrize("release", ["2.6.2", "2.6.3"])
def test_a_compromised_lightning_is_named(release: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(HERE, "lightning", release)
    status, says = only(machine.versions(["lightning>=2.6"], installed, []))
    assert status == "FAIL" and f"lightning {release} was a compromised release" in says


def test_this_environment_is_as_pyproject_asks() -> None:
    assert only(machine.versions())[0] == "ok"


def test_accelerators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    status, says = only(machine.accelerators("gpu", 8, "bf16", {}))
    assert status == "FAIL" and "0 GPUs are visible and trainer.devices=8: ask for more GPUs" in says
    assert only(machine.accelerators("cpu", 1, "float32", {}))[0] == "ok"
    assert only(machine.accelerators("auto", 1, "float32", {}))[0] == "warn"


def test_tasks_with_a_gpu_each_are_told_to_see_all_of_their_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    status, says = only(machine.accelerators("gpu", 8, "bf16", {"SLURM_GPUS_PER_TASK": "1"}))
    assert status == "FAIL" and "1 GPUs are visible and trainer.devices=8" in says
    assert "(--gpus-per-task); give --gpus-per-node in its place" in says
    bound = {"SLURM_GPU_BIND": "closest", "SLURM_NTASKS_PER_GPU": "1"}
    assert "(--ntasks-per-gpu, --gpu-bind); give" in only(machine.accelerators("gpu", 8, "bf16", bound))[1]
    assert "ask for more GPUs" in only(machine.accelerators("gpu", 8, "bf16", {"SLURM_GPU_BIND": "none"}))[1]


@pytest.mark.slow
def test_processes_add_up_and_one_that_is_not_let_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert only(machine.all_reduce(2, gpu=False))[0] == "ok"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-interface")
    status, says = only(machine.all_reduce(2, gpu=False, seconds=60))
    assert status == "FAIL" and "2 processes can't add up a tensor with gloo" in says and "GLOO_SOCKET_IFNAME" in says


def test_openslide(tmp_path: Path) -> None:
    assert only(machine.slides([]))[0] == "ok"
    bad = tmp_path / "bad.svs"
    bad.write_bytes(b"no slide")
    status, says = only(machine.slides([bad]))
    assert status == "FAIL" and "bad.svs cannot be read as a slide" in says and "leave it out" in says


# Folder ------------------------------------------------------------------------------------------------------------


def test_a_folder_is_written_and_left_as_it_was(tmp_path: Path) -> None:
    status, says = only(folder.write_and_rename(tmp_path / "not" / "yet" / "there"))
    assert status == "ok" and str(tmp_path) in says and list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named() -> None:
    status, says = only(folder.write_and_rename(Path("/proc/run")))
    assert status == "FAIL" and "/proc can't be written" in says and "give a run=" in says


def test_links_and_locks_are_looked_for_and_what_stands_in_for_each_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, says = only(folder.links_and_locks(tmp_path / "not" / "yet"))
    assert status == "ok" and "has hard links, symbolic links and locks" in says

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    for module, function, words in [
        (os, "link", "no hard links"),
        (os, "symlink", "no symbolic links"),
        (folder.fcntl, "flock", "no locks by flock"),
    ]:
        with monkeypatch.context() as lacking:
            lacking.setattr(module, function, refuse)
            status, says = only(folder.links_and_locks(tmp_path))
        assert status == "ok" and words in says and says.count("no ") == 1
    assert list(tmp_path.iterdir()) == []
    assert folder.links_and_locks(Path("/proc/run")) == []  # which the first check says


def test_a_reader_that_sees_something_else_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, "old", ""))
    status, says = only(folder.write_and_rename(tmp_path))
    assert status == "FAIL" and "is not what another process reads" in says


def test_nodes_see_each_other_or_say_whom_they_miss(tmp_path: Path) -> None:
    assert folder.seen_by_all_nodes(tmp_path, {}) == []
    found: dict[int, tuple[str, str]] = {}

    def node(number: int) -> None:
        environment = {"SLURM_NNODES": "2", "SLURM_NODEID": str(number), "SLURM_JOB_ID": "7"}
        found[number] = only(folder.seen_by_all_nodes(tmp_path, environment, seconds=20))

    both = [threading.Thread(target=node, args=(number,)) for number in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert [found[number][0] for number in range(2)] == ["ok", "ok"] and list(tmp_path.iterdir()) == []
    alone = {"SLURM_NNODES": "2", "SLURM_NODEID": "0", "SLURM_JOB_ID": "8"}
    status, says = only(folder.seen_by_all_nodes(tmp_path, alone, seconds=0.2))
    assert status == "FAIL" and "node 0 doesn't see" in says and "what node 1 of the job writes" in says


def test_room_on_the_disk(tmp_path: Path) -> None:
    assert only(folder.check_room(tmp_path, 1000, 2, 100, 10))[0] == "ok"
    status, says = only(folder.check_room(tmp_path, 10**15, 2, 100, 10))
    assert status == "FAIL" and "4 checkpoints of 1,000,000.00 GB" in says and "trainer.keep_checkpoints" in says
    assert "12 checkpoints" in only(folder.check_room(tmp_path, 1000, 0, 100, 10))[1]  # all are kept


def test_the_size_of_a_checkpoint_is_that_of_the_tensors_in_a_real_one(shards: Path, tmp_path: Path) -> None:
    words = [*TINY, "optim.steps=1", "optim.warmup_steps=1"]
    run_command_line(["tile", f"run={tmp_path / 'run'}", f"data.shards={shards}", *words])
    stored = FileSystemReader(tmp_path / "run" / "checkpoints" / "step-00000001").read_metadata().state_dict_metadata
    tensors = [entry for entry in stored.values() if isinstance(entry, TensorStorageMetadata)]
    real = sum(entry.size.numel() * entry.properties.dtype.itemsize for entry in tensors)
    config = load("doctor", words).object()
    objective = folder.built(lambda: plugins.build(config.objective, lambda: plugins.build(config.model)))
    assert folder.checkpoint_bytes(objective) == pytest.approx(
        real, rel=1e-3
    )  # it also holds a count for each parameter


# Tiles -------------------------------------------------------------------------------------------------------------


def data(shards: Path, *words: str) -> dict[str, Any]:
    small = ["data.batch_size=8", "data.lanes=2", "data.threads=1", *words]
    return load("doctor", [f"data.shards={shards}", *small]).object().data


def test_tiles_that_fit_are_read_and_timed(shards: Path) -> None:
    looked, rate = tiles.check_tiles(data(shards), 2, 1, 16, None, 0)
    assert looked.status == "ok" and "120 tiles in 4 blocks for 2 lanes on 2 processes" in looked.says
    assert rate.status == "ok" and "say tiles_per_second=" in rate.says
    assert tiles.check_tiles(data(shards), 2, 1, 16, 1e9, 0)[1].status == "FAIL"


@pytest.mark.parametrize(
    ("words", "processes", "accumulate", "sentence"),
    [
        (["data.lanes=2"], 4, 1, "lanes"),
        (["data.lanes=8"], 1, 1, "holds 5 tiles, fewer than data.lanes=8"),
        (["data.batch_size=6"], 2, 2, "data.batch_size=6 can't be shared by 2 processes × trainer.accumulate=2"),
    ],
)
def test_lanes_and_processes_that_do_not_fit(
    words: list[str], processes: int, accumulate: int, sentence: str, tmp_path: Path
) -> None:
    few = write_tiles(tmp_path / "few", [5])
    status, says = only(tiles.check_tiles(data(few, *words), processes, accumulate, 16, None, 0))
    assert status == "FAIL" and sentence in says


def test_parquet_files_are_read_and_timed_and_what_is_wrong_with_them_is_no_shards(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_table(tmp_path / f"{name}.parquet", range(40))
    words = [f"data.files={tmp_path}", "data.batch_size=4", "data.lanes=1"]
    settings = load("doctor", ["data=parquet", *words]).object().data
    looked, rate = tiles.check_tiles(settings, 1, 1, 16, None, 0)
    assert "80 tiles in 2 blocks for 1 lane on 1 process; 64 of them read" in looked.says
    assert rate.status == "ok" and tiles.check_tiles(settings, 1, 1, 16, 1e9, 0)[1].status == "FAIL"
    told = (tmp_path / "a.parquet").stat()
    with (tmp_path / "a.parquet").open("r+b") as file:
        file.write(bytes(told.st_size - 3000))
    os.utime(tmp_path / "a.parquet", ns=(told.st_atime_ns, told.st_mtime_ns))  # a disk that fails changes no time
    status, says = only(tiles.check_tiles(settings, 1, 1, 16, None, 0))
    assert status == "FAIL" and "can't be read" in says and "pretrain shards verify" not in says


def test_few_blocks_a_damaged_tile_and_no_shards(shards: Path, tmp_path: Path) -> None:
    looked, _ = tiles.check_tiles(data(shards, "data.lanes=4"), 1, 1, 16, None, 0)
    assert looked.status == "warn" and "4 blocks for 4 lanes" in looked.says
    damaged = write_tiles(tmp_path / "damaged", [40, 40])
    spoil(damaged, list(range(80)))
    status, says = only(tiles.check_tiles(data(damaged), 1, 1, 16, None, 0))
    assert status == "FAIL" and "can't be read" in says and "pretrain shards verify" in says
    status, says = only(tiles.check_tiles(data(tmp_path / "nothing"), 1, 1, 16, None, 0))
    assert status == "FAIL" and "there are no tile shards in" in says


@pytest.mark.parametrize(("needed", "status"), [(None, "ok"), (400, "ok"), (700, "warn"), (1600, "FAIL")])
def test_the_rate_is_judged_against_a_processs_share(needed: float | None, status: str) -> None:
    found = fast_enough(100, needed, 8, "tiles", "one process reads", "raise data.threads")
    assert found.status == status and found.says.startswith("one process reads 100.0 tiles/s (measured here, alone)")
    if status == "FAIL":
        assert "200.0 are needed (1,600.0 over 8 processes): raise data.threads" in found.says


# Embeddings --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six slides of up to 8 × 6 tiles."""
    return write_wavy_slides(tmp_path_factory.mktemp("doctor") / "embeddings", 6, columns=8, rows=6, fewer=6)


def slide_data(store: Path, *words: str) -> SlideData:
    small = ["data.batch_size=4", "data.batch_tokens=null", "data.lanes=2", "data.field_cells=0", *words]
    return load("doctor slide", [f"data.embeddings={store}", *small]).object().data


def test_embeddings_that_fit_are_read_and_timed(store: Path) -> None:
    looked, rate = embeddings.check_embeddings(slide_data(store), SlideMAE, 2, 1, None, 0)
    assert looked.status == "ok" and "6 slides with " in looked.says and "2 lanes on 2 processes" in looked.says
    assert rate.status == "ok" and "say slides_per_second=" in rate.says
    assert embeddings.check_embeddings(slide_data(store), SlideMAE, 2, 1, 1e9, 0)[1].status == "FAIL"
    looked, _ = embeddings.check_embeddings(slide_data(store, "data.batch_size=8"), SlideMAE, 1, 1, None, 0)
    assert looked.status == "warn" and "a step takes up to 8" in looked.says


@pytest.mark.parametrize(
    ("words", "processes", "accumulate", "sentence"),
    [
        ([], 4, 1, "data.lanes=2 can't be shared evenly by 4 processes × trainer.accumulate=1"),
        ([], 2, 2, "data.lanes=2 can't be shared evenly by 2 processes × trainer.accumulate=2"),
        (["data.processes_per_slide=2"], 3, 1, "data.processes_per_slide=2 doesn't divide the run's 3 processes"),
    ],
)
def test_sequences_and_processes_that_do_not_fit(
    store: Path, words: list[str], processes: int, accumulate: int, sentence: str
) -> None:
    status, says = only(
        embeddings.check_embeddings(slide_data(store, *words), SlideMAE, processes, accumulate, None, 0)
    )
    assert status == "FAIL" and sentence in says


def test_processes_that_share_a_slide_take_what_one_does(store: Path) -> None:
    looked, rate = embeddings.check_embeddings(slide_data(store, "data.processes_per_slide=2"), SlideMAE, 4, 1, 1e9, 0)
    assert looked.status == "ok" and "over 2 processes" in rate.says


def test_embeddings_that_are_cut_off_or_no_numbers_are_named(tmp_path: Path) -> None:
    store = write_wavy_slides(tmp_path / "embeddings", 3, columns=8, rows=6, fewer=6)
    (file,) = store.glob("*.bin")
    whole = file.read_bytes()
    file.write_bytes(b"\xff" * 64 + whole[64:])  # float16's NaN
    status, says = only(embeddings.check_embeddings(slide_data(store), SlideMAE, 1, 1, None, 0))
    assert status == "FAIL" and "embeddings of " in says and "are not finite" in says
    file.write_bytes(whole[:-64])
    status, says = only(embeddings.check_embeddings(slide_data(store), SlideMAE, 1, 1, None, 0))
    assert status == "FAIL" and "shorter than its index says" in says


# Services ----------------------------------------------------------------------------------------------------------


def test_wandb() -> None:
    assert only(services.wandb("off", lambda: False))[0] == only(services.wandb("offline", lambda: False))[0] == "ok"
    assert only(services.wandb("online", lambda: True))[0] == "ok"
    status, says = only(services.wandb("online", lambda: False))
    assert status == "warn" and "'wandb login'" in says
    assert only(services.wandb("on", lambda: False))[0] == "FAIL"


SINFO = "cpu*|up|1-00:00:00|4\ngpu|down|infinite|2\n"


@pytest.mark.parametrize(
    ("partition", "environment", "nodes", "status", "words"),
    [
        (None, {}, 1, "ok", "partitions: cpu (4 nodes, at most 1-00:00:00), gpu"),
        ("cpu", {}, 4, "ok", "cpu"),
        ("fast", {}, 1, "FAIL", "there is no partition 'fast'; there are: cpu"),
        ("gpu", {}, 1, "FAIL", "partition gpu is down"),
        ("cpu", {}, 9, "FAIL", "has 4 nodes and trainer.nodes=9"),
        (None, {"SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "bash"}, 1, "warn", "for which Lightning ignores SLURM"),
        (None, {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"}, 1, "warn", "--ntasks-per-node, which Lightning needs"),
        (None, {"SLURM_JOB_ID": "1", "SLURM_NTASKS_PER_NODE": "4", "SLURM_NNODES": "2"}, 1, "warn", "--ntasks-per-node=4 and trainer.devices=8"),
        (None, {"SLURM_JOB_ID": "1", "SLURM_NTASKS_PER_NODE": "8", "SLURM_NTASKS": "16"}, 1, "ok", "partitions"),
    ],
)  # fmt: skip
def test_slurm(partition: str | None, environment: dict[str, str], nodes: int, status: str, words: str) -> None:
    found = only(services.slurm(environment, partition, 8, nodes, lambda _: SINFO, lambda _: "sbatch"))
    assert found[0] == status and words in found[1]


def test_a_cluster_that_is_not_there_or_does_not_answer() -> None:
    def silent(_: list[str]) -> str:
        raise OSError("Unable to contact slurm controller\nmore")

    assert only(services.slurm({}, None, 1, 1, silent, lambda _: None)) == ("ok", "not on this machine")
    assert only(services.slurm({}, "gpu", 1, 1, silent, lambda _: None))[0] == "FAIL"
    status, says = only(services.slurm({}, None, 1, 1, silent, lambda _: "sbatch"))
    assert status == "warn" and "(Unable to contact slurm controller): is the controller up" in says
    assert only(services.slurm({}, "gpu", 1, 1, silent, lambda _: "sbatch"))[0] == "FAIL"


# The command -------------------------------------------------------------------------------------------------------


def test_the_command_says_a_line_a_check_and_ends_with_one_where_something_fails(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services.shutil, "which", lambda _: None)
    words = [
        "trainer.accelerator=cpu",
        f"run={tmp_path / 'run'}",
        *(word for word in TINY if not word.startswith("trainer")),
    ]
    run_command_line(["doctor", f"data.shards={shards}", *words])
    lines = capsys.readouterr().out.splitlines()
    about = [line.split()[1] for line in lines]
    assert about == [
        "versions",
        "accelerators",
        "cores",
        "all-reduce",
        "folder",
        "links",
        "openslide",
        "run",
        "tiles",
        "rate",
        "disk",
        "wandb",
        "slurm",
    ]
    assert not any(line.startswith("FAIL") for line in lines) and not (tmp_path / "run").exists()

    monkeypatch.setattr(machine, "all_reduce", lambda *_: [])
    with pytest.raises(SystemExit) as ended:
        run_command_line(["doctor", f"data.shards={tmp_path / 'none'}", *words])
    assert ended.value.code == 1
    said = capsys.readouterr()
    assert (
        said.out.count("there are no tile shards in") == 1
        and "FAIL  run" in said.out
        and "what says FAIL above" in said.err
    )


def test_under_srun_one_process_of_a_node_speaks_with_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "all_reduce", lambda *_: [])
    monkeypatch.setattr(services.shutil, "which", lambda _: None)
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    for local, lines in (("1", 0), ("0", 10)):
        monkeypatch.setenv("SLURM_LOCALID", local)
        run_command_line(["doctor", "trainer.accelerator=cpu", f"run={tmp_path}"])
        said = capsys.readouterr().out.splitlines()
        assert len(said) == lines and all(line.startswith(f"{os.uname().nodename}: ") for line in said)


def test_a_run_of_the_slide_stage_is_looked_at_too_and_one_without_embeddings_fails(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "all_reduce", lambda *_: [])
    monkeypatch.setattr(services.shutil, "which", lambda _: None)
    words = ["doctor", "slide", f"run={tmp_path / 'run'}", "trainer.accelerator=cpu", *SMALL]
    run_command_line([*words, f"data.embeddings={store}"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == [
        "versions",
        "accelerators",
        "cores",
        "folder",
        "links",
        "run",
        "embeddings",
        "rate",
        "disk",
        "wandb",
        "slurm",
    ]
    assert not any(line.startswith("FAIL") for line in lines) and not (tmp_path / "run").exists()
    with pytest.raises(SystemExit):
        run_command_line([*words, f"data.embeddings={tmp_path / 'none'}"])
    said = capsys.readouterr().out
    assert "FAIL  embeddings" in said and "FAIL  disk" in said and said.count("no store.json") == 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["trainer.shard_size=3"], "trainer.shard_size=3 does not divide the 1 processes"),
        (["trainer.precision=fp8"], "trainer.precision=fp8 is not allowed: it must be float32, bf16 or float64."),
        (["trainer.activation_checkpointing=banana"], "=banana is not allowed: it must be none, full or selective."),
        (["trainer.accumulate=0"], "trainer.accumulate"),
        (["trainer.devices=-1"], "trainer.devices"),
        (["watch.probe=/nonexistent"], "/nonexistent"),
        (["init=/nonexistent"], "/nonexistent"),
        (["objective.group_size=3"], "not a multiple of objective.group_size=3"),
        (["data.crops.global_size=33"], "data.crops.global_size=33, data.crops.global_count="),
        (["resume=banana"], "resume=banana is not allowed: it must be newest or previous."),
    ],
)
def test_what_the_run_would_refuse_the_doctor_refuses_in_the_same_words(
    settings: list[str],
    words: str,
    shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    unmeasured: None,
) -> None:
    common = [f"data.shards={shards}", f"run={tmp_path / 'run'}", *TINY, *settings]
    for command in ("doctor", "tile"):
        with pytest.raises(SystemExit) as ended:
            run_command_line([command, *common])
        said = capsys.readouterr()
        assert ended.value.code != 0 and words in said.out + said.err and "Traceback" not in said.err, said
    assert not list((tmp_path / "run").rglob("step-*"))


def test_what_a_table_chooses_is_said_once_and_that_tiles_of_it_are_held_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], unmeasured: None
) -> None:
    rows = {"slide": [f"s{number // 5}" for number in range(80)], "x": [48 * n for n in range(80)], "y": [0] * 80}
    write_table(tmp_path / "a.parquet", range(80), **rows)
    pq.write_table(pa.table(rows), tmp_path / "table.parquet")
    words = [f"data.files={tmp_path / 'a.parquet'}", "data.hold_out=0.3", f"data.sample={tmp_path / 'table.parquet'}"]
    run_command_line(["doctor", "data=parquet", *words, f"run={tmp_path / 'run'}", *TINY])
    assert capsys.readouterr().err.count("are held out or aren't in this source") == 1


def test_another_run_s_folder_and_one_that_is_in_use_are_said(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], unmeasured: None
) -> None:
    common = [f"data.shards={shards}", f"run={tmp_path / 'run'}", *TINY]
    run_command_line(["tile", *common, "optim.steps=1", "optim.warmup_steps=1"])
    with alone(tmp_path / "run"), pytest.raises(SystemExit):
        run_command_line(["doctor", *common, "optim.steps=2", "optim.warmup_steps=1"])
    said = capsys.readouterr().out
    assert "holds a run with other settings (optim.steps: 1 → 2)" in said, said
    assert f"another job is writing to {tmp_path / 'run'}: process {os.getpid()} on" in said


@pytest.mark.slow
def test_nodes_of_a_job_talk_to_each_other_or_say_that_they_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    common = {"SLURM_STEP_ID": "0", "SLURM_NNODES": "2", "SLURM_JOB_ID": str(os.getpid()), "MASTER_ADDR": "127.0.0.1"}
    found: dict[int, Finding] = {}

    def node(number: int, seconds: float) -> None:
        (found[number],) = machine.between_nodes(common | {"SLURM_NODEID": str(number)}, seconds)

    together = [threading.Thread(target=node, args=(number, 60.0)) for number in range(2)]
    for thread in together:
        thread.start()
    for thread in together:
        thread.join()
    assert [found[number].status for number in range(2)] == ["ok", "ok"] and "2 nodes" in found[0].says
    assert machine.between_nodes({}) == [] and machine.between_nodes({"SLURM_STEP_ID": "0"}) == []
    lonely = common | {"SLURM_NODEID": "1", "MASTER_ADDR": "no-such-host.invalid"}
    assert only(machine.between_nodes(lonely, 2.0))[0] == "FAIL"


def test_the_doctor_of_many_processes_is_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(machine, "all_reduce", lambda processes, _: asked.append(processes) or [])
    run_command_line(["doctor", "trainer.devices=8", "data.lanes=8", "trainer.accelerator=cpu", f"run={tmp_path}"])
    assert asked == [8]


def test_a_machine_is_looked_at_without_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services.shutil, "which", lambda _: None)
    run_command_line(["doctor", "machine", f"run={tmp_path}"])
    about = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    assert about == ["versions", "accelerators", "cores", "folder", "links", "openslide", "slurm"]


def test_a_recipe_is_looked_at_as_a_run_of_it_would_be() -> None:
    config = load("doctor", ["recipe=midnight", "data.shards=none"]).object()
    run = recipe_settings("midnight")
    assert config.model == run.model and config.objective == run.objective and config.optim == run.optim
    assert config.data["crops"] == vars(run.data.crops) and config.data["batch_size"] == run.data.batch_size


@pytest.mark.parametrize(
    ("command", "doctor", "source"),
    [("tile", "doctor", "data.shards=any"), ("slide", "doctor slide", "data.embeddings=any")],
)
def test_every_setting_of_a_run_is_taken_and_means_the_same(command: str, doctor: str, source: str) -> None:
    ours, runs = (load(name, ["run=any", source]).object() for name in (doctor, command))
    for name, value in vars(runs).items():
        if (command, name) != ("tile", "data"):  # which may lack shards, and has no type for that
            assert getattr(ours, name) == value


def test_an_unknown_setting_is_refused() -> None:
    with pytest.raises(Fault, match=r"there is no setting 'optim\.lrr'"):
        load("doctor", ["+optim.lrr=1"])


@pytest.mark.parametrize("source", ["mixture", "nothing"])
def test_a_source_of_any_kind_is_looked_at_and_none_where_it_is_left_out(
    source: str,
    shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    unmeasured: None,
) -> None:
    given = [f"data.members={{a:{{shards:{shards},weight:1}},b:{{shards:{shards},weight:2}}}}"]
    run_command_line(["doctor", f"run={tmp_path}", *TINY, "data=mixture", *(given if source == "mixture" else [])])
    said = capsys.readouterr().out
    assert (" blocks for 4 lanes: " in said) == (source == "mixture") and "FAIL  tiles" not in said, said
