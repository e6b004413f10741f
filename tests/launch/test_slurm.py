"""Jobs on a real SLURM of two nodes: whatever happens to them, their losses are those of a run here."""

import io
import os
import re
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from data.embeddings.store import EmbeddingStore
from data.shards.index import ShardIndex
from launch.entry import run_command_line
from pretrain.run.metrics import read_metrics
from tests.data.shards.tile_folders import write_tiles
from tests.data.slides.synthetic_slides import stained, write_slide
from tests.launch.slurm_cluster import Cluster
from tests.launch.test_failures import failing_run
from tests.pretrain.training import test_slide_training as slide_stage
from tests.pretrain.training.test_tile_training import GROUP, ROOT, assert_close, command
from tests.pretrain.training.wavy_slides import write_wavy_slides

SLOWLY = "objective._target_=tests.launch.slow_steps.SlowDINOv2"


def environment(own: Path | None = None, **variables: str) -> dict[str, str]:
    """Ours for a command, with a folder of the user's own modules."""
    kept = {name: value for name, value in os.environ.items() if name not in GROUP}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{own}" if own else str(ROOT)} | variables


def submit(cluster: Cluster, *words: str, variables: dict[str, str] | None = None) -> list[str]:
    """What ``pretrain … launch=slurm`` prints: the numbers of the jobs."""
    printed, said = io.StringIO(), io.StringIO()
    theirs = (variables or environment()) | cluster.environment
    with mock.patch.dict(os.environ, theirs, clear=True), redirect_stdout(printed), redirect_stderr(said):
        run_command_line([*words, "launch=slurm"])
    assert "tail -F " in said.getvalue() and "squeue --jobs=" in said.getvalue()
    return printed.getvalue().split()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiles(tmp_path_factory.mktemp("tiles") / "shards", [40, 37])


@pytest.fixture(scope="module")
def here(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the tile stage in one process."""
    run = tmp_path_factory.mktemp("here") / "run"
    run_command_line(command(shards, run))
    return run


def slide_run(store: Path, run: Path) -> list[str]:
    return [
        "slide",
        f"run={run}",
        f"data.embeddings={store}",
        "optim.steps=6",
        "optim.warmup_steps=6",
        "trainer.checkpoint_every=3",
        "trainer.accelerator=cpu",
        *slide_stage.SMALL,
    ]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wavy_slides(tmp_path_factory.mktemp("slides") / "embeddings", 6, columns=8, rows=6, fewer=6)


@pytest.fixture(scope="module")
def slides_here(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the slide stage in one process."""
    run = tmp_path_factory.mktemp("slides_here") / "run"
    run_command_line(slide_run(store, run))
    return run


def assert_slides_close(found: Path, expected: Path) -> None:
    for ours, theirs in zip(slide_stage.metrics(found), slide_stage.metrics(expected), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)


def nodes(nodes: int, each: int) -> list[str]:
    return [f"launch.nodes={nodes}", f"launch.processes_per_node={each}"]


@pytest.mark.slow
def test_an_array_of_jobs_cuts_what_one_cuts_and_another_job_merges_it(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "slides").mkdir()
    for name in ("a", "b", "c"):
        write_slide(
            tmp_path / "slides" / f"{name}.tiff", stained(400, 600, [(200, 200, 150), (450, 200, 100)]), mpp=0.5
        )
    words = ["shard", f"slides={tmp_path / 'slides'}", "tile_size=64", "workers=1"]
    folder = tmp_path / "100%A"  # in which a job's log must not be looked for under the job's number
    jobs = submit(cluster, *words, f"out={folder}", "launch.array=2")
    run_command_line([*words, f"out={tmp_path / 'whole'}"])
    for job in jobs:
        cluster.wait(job, "COMPLETED", "PENDING" if job == jobs[0] else "COMPLETED", seconds=240)
    ours, expected = (ShardIndex.open(path) for path in (folder, tmp_path / "whole"))
    assert sorted(ours.slides) == sorted(expected.slides) and len(ours.file) == len(expected.file) > 0
    assert {f"{jobs[0]}_{task}.log" for task in range(2)} < {path.name for path in (folder / "logs").iterdir()}


@pytest.mark.slow
def test_an_array_embeds_what_one_process_does_after_the_run_whose_encoder_it_takes(
    cluster: Cluster, shards: Path, tmp_path: Path
) -> None:
    """``launch.after=``: submitted with the training job, when there is no encoder yet."""
    (training,) = submit(cluster, *command(shards, tmp_path / "run"), *nodes(1, 1))
    words = ["embed", f"checkpoint={tmp_path / 'run'}", f"shards={shards}", "batch=8", "threads=1", "device=cpu"]
    array, merge = submit(cluster, *words, f"out={tmp_path / 'array'}", "launch.array=2", f"launch.after=[{training}]")
    assert set(cluster.states(array)) == set(cluster.states(merge)) == {"PENDING"}
    assert cluster.states(training) != ["COMPLETED"]
    for job in (training, array, merge):
        cluster.wait(job, "COMPLETED", seconds=240)
    run_command_line([*words, f"out={tmp_path / 'whole'}"])
    ours, expected = (EmbeddingStore.open(tmp_path / name) for name in ("array", "whole"))
    assert sorted(ours.slides) == sorted(expected.slides) and len(ours.slides) > 1
    for slide in ours.slides:
        one, other = ours.read(slide), expected.read(slide)
        np.testing.assert_array_equal(one.coordinates, other.coordinates)
        np.testing.assert_allclose(np.array(one.embeddings), np.array(other.embeddings), atol=2e-3)


@pytest.mark.slow
def test_a_job_after_one_that_fails_is_not_run(cluster: Cluster, shards: Path, tmp_path: Path) -> None:
    words, variables = failing_run(tmp_path, shards, rank=0)
    (failing,) = submit(cluster, *words, *nodes(1, 1), variables=variables)
    words = ["embed", f"checkpoint={tmp_path / 'run'}", f"shards={shards}", f"out={tmp_path / 'out'}"]
    (late,) = submit(cluster, *words, f"launch.after=[{failing}]")
    cluster.wait(late, "CANCELLED", seconds=120)
    assert not (tmp_path / "out" / "store.json").exists()


@pytest.mark.slow
def test_the_first_error_of_any_rank_is_the_last_thing_in_the_jobs_log(
    cluster: Cluster, shards: Path, tmp_path: Path
) -> None:
    words, variables = failing_run(tmp_path, shards, rank=1)
    (job,) = submit(cluster, *words, *nodes(2, 1), variables=variables)
    cluster.wait(job, "FAILED")
    *_, error, where = (tmp_path / "run" / "logs" / f"{job}.log").read_text().splitlines()
    assert error.startswith("pretrain: rank 1 on ") and error.endswith("ZeroDivisionError: the third step of this rank")
    assert where.startswith("pretrain: exit code 1; the logs of all ranks are in ")
    # On which of the two nodes the second rank was, is SLURM's choice; its name there is not this machine's.
    assert re.search(r"; launch\.exclude=n[12] leaves that node out, should it be at fault$", where)


@pytest.mark.slow
@pytest.mark.parametrize("failure", ["KeyError", "SIGKILL"])
def test_a_loader_that_fails_or_is_killed_on_one_node_ends_the_job(
    cluster: Cluster, shards: Path, tmp_path: Path, failure: str
) -> None:
    source = "data._target_=tests.pretrain.training.failing_sources.FailingTiles"
    words = command(shards, tmp_path / "run", source, "optim.steps=400")
    (job,) = submit(cluster, *words, *nodes(2, 1), variables=environment(PRETRAIN_TEST_FAILURE=failure))
    cluster.wait(job, "FAILED", seconds=120)
    *_, error, _ = (tmp_path / "run" / "logs" / f"{job}.log").read_text().splitlines()
    assert error.startswith("pretrain: rank ") and ("KeyError: 'stain'" in error or "ended by Killed" in error), error


@pytest.mark.slow
def test_a_chain_goes_on_where_its_last_job_was_stopped_and_ends_at_once_where_the_run_is_done(
    cluster: Cluster, shards: Path, here: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    limit = ["launch.time=2", "launch.signal_seconds=60", "launch.chain=3"]
    jobs = submit(cluster, *command(shards, run, SLOWLY), *nodes(1, 1), *limit)
    assert len(jobs) == 3
    cluster.wait(jobs[2], "COMPLETED", seconds=500)
    assert cluster.states(jobs[0]) == ["FAILED"] and cluster.states(jobs[1]) == ["COMPLETED"]
    said = [(run / "logs" / job / "rank-00000.log").read_text() for job in jobs]
    assert "stopped by SIGUSR1" in said[0] and f"will not start job {jobs[0]} again, as it was submitted" in said[0]
    assert "resuming after step" in said[1] and "6 steps in" in said[1] and " is done: 6 steps" in said[2]
    assert_close(run, here)


@pytest.mark.slow
def test_runs_of_both_stages_do_as_well_after_the_doctor_has_looked_at_their_node(
    cluster: Cluster, shards: Path, here: Path, store: Path, slides_here: Path, tmp_path: Path
) -> None:
    tile, slide = tmp_path / "tile", tmp_path / "slide"
    (first,) = submit(cluster, *command(shards, tile), *nodes(1, 2), "launch.doctor=true")
    (second,) = submit(cluster, *slide_run(store, slide), *nodes(1, 2), "launch.doctor=true")
    for job, run, what in ((first, tile, " tiles "), (second, slide, " embeddings ")):
        cluster.wait(job, "COMPLETED", seconds=300)
        said = (run / "logs" / f"{job}.log").read_text()
        assert said.count(what) == said.count(" rate ") == said.count(" disk ") == 1 and "warn  slurm" not in said
    assert_close(tile, here)
    assert_slides_close(slide, slides_here)


@pytest.mark.slow
def test_what_the_doctor_fails_on_any_node_keeps_the_job_from_starting(cluster: Cluster, tmp_path: Path) -> None:
    (job,) = submit(cluster, *command(tmp_path / "none", tmp_path / "run"), *nodes(2, 1), "launch.doctor=true")
    cluster.wait(job, "FAILED", seconds=300)
    said = (tmp_path / "run" / "logs" / f"{job}.log").read_text()
    assert said.count("FAIL  run") == 2 and said.count("there are no tile shards in") == 2, said
    assert "one folder on all 2 nodes" in said
    assert not list((tmp_path / "run" / "logs" / job).glob("rank-*"))


# Stopped and put back into the queue
# ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(cluster: Cluster, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Slow jobs side by side on two nodes, and what stops each of them. The folders of their runs."""
    folder = tmp_path_factory.mktemp("stopped")
    runs = {name: folder / name for name in ("limit", "requeue")}
    # SLURM looks at time limits twice a minute and tells a job up to half a minute early: here, within its second half
    # minute.
    limit = ["launch.time=2", "launch.signal_seconds=60"]
    submit(cluster, *command(shards, runs["limit"], SLOWLY), *nodes(2, 1), *limit)
    (job,) = submit(cluster, *command(shards, runs["requeue"], SLOWLY), *nodes(1, 2))
    until_steps(runs["requeue"], 2)
    cluster.ask("scontrol", "requeue", job)
    return runs


@pytest.fixture(scope="module")
def preempted(cluster: Cluster, shards: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A job on all cores of both nodes, and one that takes its place on one of them."""
    folder = tmp_path_factory.mktemp("preempted")
    runs = {name: folder / name for name in ("priority", "slide on one node")}
    wide = ["launch.cpus_per_task=6", "launch.setup=['export OMP_NUM_THREADS=1']"]
    submit(cluster, *command(shards, runs["priority"], SLOWLY), *nodes(2, 1), *wide, "launch.partition=low")
    until_steps(runs["priority"], 2)
    submit(cluster, *slide_run(store, runs["slide on one node"]), *nodes(1, 2), "launch.partition=high")
    return runs


def until_steps(run: Path, steps: int) -> None:
    end = time.monotonic() + 240
    while len(read_metrics(run)) < steps:
        assert time.monotonic() < end
        time.sleep(0.1)


def job_of(run: Path) -> str:
    (folder,) = (path for path in (run / "logs").iterdir() if path.is_dir())
    return folder.name


@pytest.mark.slow
@pytest.mark.parametrize(("way", "number"), [("requeue", "SIGTERM"), ("limit", "SIGUSR1")])
def test_a_job_that_is_put_back_into_the_queue_ends_as_if_it_had_not_been(
    cluster: Cluster, here: Path, stopped: dict[str, Path], way: str, number: str
) -> None:
    ends_as_if_it_had_not_been_put_back(cluster, here, stopped[way], number)


@pytest.mark.slow
def test_a_job_that_another_takes_the_place_of_ends_as_if_it_had_not(
    cluster: Cluster, here: Path, preempted: dict[str, Path]
) -> None:
    ends_as_if_it_had_not_been_put_back(cluster, here, preempted["priority"], "SIGTERM")


def ends_as_if_it_had_not_been_put_back(cluster: Cluster, here: Path, run: Path, number: str) -> None:
    job = job_of(run)
    cluster.wait(job, "COMPLETED", seconds=500)
    assert cluster.restarts(job) >= 1
    logs = run / "logs"
    assert {path.name for path in (logs / job).iterdir()} == {"rank-00000.log", "rank-00001.log"}
    said = (logs / job / "rank-00000.log").read_text()
    assert f"stopped by {number}" in said and "resuming after step" in said and "6 steps in" in said
    assert (run / "tile.sbatch").read_text().startswith("#!/bin/bash\n# Written by: pretrain tile run=")
    assert_close(run, here)


@pytest.mark.slow
def test_the_slide_stage_trains_on_two_nodes_to_the_losses_of_one_process_here(
    cluster: Cluster, slides_here: Path, store: Path, tmp_path: Path
) -> None:
    (job,) = submit(cluster, *slide_run(store, tmp_path / "run"), *nodes(2, 1))
    cluster.wait(job, "COMPLETED", seconds=300)
    assert_slides_close(tmp_path / "run", slides_here)


@pytest.mark.slow
def test_the_slide_stage_trains_on_one_node_to_the_losses_of_one_process_here(
    cluster: Cluster, slides_here: Path, preempted: dict[str, Path]
) -> None:
    cluster.wait(job_of(preempted["slide on one node"]), "COMPLETED", seconds=300)
    assert_slides_close(preempted["slide on one node"], slides_here)


# The same tiles, whatever the time that cutting one takes.
SLOW_TILES = """
import os
import time

from data.slides.reading import Slide

if seconds := float(os.environ.get("SECONDS_A_TILE", "0")):
    at_once = Slide.tile_pixels

    def tile_pixels(slide, *arguments):
        time.sleep(seconds)
        return at_once(slide, *arguments)

    Slide.tile_pixels = tile_pixels
"""


def slow_slides(folder: Path, slides: int) -> Path:
    """Slides of nine tiles of 128 pixels, and beside them what makes cutting a tile take SECONDS_A_TILE."""
    (folder / "slides").mkdir()
    for number in range(slides):
        write_slide(folder / "slides" / f"{number}.tiff", stained(400, 400, [(200, 200, 180)]), mpp=0.5)
    (folder / "sitecustomize.py").write_text(SLOW_TILES)
    return folder / "slides"


@pytest.mark.slow
def test_a_job_of_an_array_that_runs_out_of_time_goes_on_behind_its_last_shard(
    cluster: Cluster, tmp_path: Path
) -> None:
    # SLURM tells a job up to a minute early: of two minutes less than one may be left, which is enough for two slides.
    words = ["shard", f"slides={slow_slides(tmp_path, 16)}", "tile_size=128", "tiles_per_shard=9", "workers=1"]
    array, merge = submit(
        cluster,
        *words,
        f"out={tmp_path / 'array'}",
        "launch.array=2",
        "launch.time=2",
        "launch.signal_seconds=20",
        variables=environment(tmp_path, SECONDS_A_TILE="2"),
    )
    run_command_line([*words, f"out={tmp_path / 'whole'}"])
    for job in (array, merge):
        cluster.wait(job, "COMPLETED", seconds=1200)
    for task in range(2):
        assert "pretrain: out of time, requeued" in (tmp_path / "array" / "logs" / f"{array}_{task}.log").read_text()
    ours, expected = (ShardIndex.open(tmp_path / name) for name in ("array", "whole"))
    assert sorted(ours.slides) == sorted(expected.slides) and len(ours.file) == len(expected.file) == 16 * 9


@pytest.mark.slow
@pytest.mark.parametrize("what", ["shard", "embed"])
def test_a_job_whose_time_is_too_short_for_anything_fails_instead_of_starting_for_ever(
    cluster: Cluster, here: Path, tmp_path: Path, what: str
) -> None:
    own = {"shard": ["workers=1"], "embed": [f"checkpoint={here}", "mpp=0.5", "threads=1", "device=cpu"]}
    (job,) = submit(
        cluster,
        what,
        f"slides={slow_slides(tmp_path, 1)}",
        f"out={tmp_path / 'out'}",
        "tile_size=128",
        *own[what],
        "launch.time=1",
        "launch.signal_seconds=20",
        variables=environment(tmp_path, SECONDS_A_TILE="20"),
    )
    cluster.wait(job, "FAILED", seconds=900)
    said = (tmp_path / "out" / "logs" / f"{job}.log").read_text()
    assert "pretrain: out of time with nothing finished" in said and "launch.time=" in said
