"""``pretrain curate processes=``: processes that share the work find what one does."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from data.embeddings.store import EmbeddingStore
from data.fault import Fault
from pretrain.curation import curating, labels, rows
from pretrain.curation.curating import Wanted, curate
from pretrain.curation.own_rows import own_rows
from pretrain.run.peers import Peers, met
from tests.pretrain.curation.test_curating import command, long_tail

ROOT = Path(__file__).resolve().parents[3]
GROUP = {"MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "NODE_RANK"}
WANTED = Wanted(500, [150, 30], 1, "euclidean", 4, [1, 1], 0.5, None, 4, 3, 0)
FEW = replace(WANTED, clusters=[1000, 2], distance="cosine", iterations=2)  # tiles in a cluster, and none in some
NAMES = ("curated.parquet", "centres-1.npy", "centres-2.npy", "slides.csv", "curated.json")


def curated(folder: Path, out: str, peers: Peers, wanted: Wanted = WANTED) -> None:
    """What these processes make, of chunks that are so small that each has many."""
    with patch.multiple(rows, MOST_ROWS=256, COMPARED=1), patch.object(labels, "TILES_OF_A_FILE", 1000):
        found = curate(folder / out, EmbeddingStore.open(folder / "store"), wanted, torch.device("cpu"), peers)
    assert (found is not None) == peers.first


def meet(folder: Path, number: int, count: int) -> Peers:
    where = f"file://{folder / f'meeting of {count}'}"
    dist.init_process_group("gloo", init_method=where, rank=number, world_size=count)
    return Peers("cpu", dist.group.WORLD)


def worker(number: int, folder: Path) -> None:
    torch.set_num_threads(1)
    peers = meet(folder, number, 2)
    with patch.object(curating, "_chosen", side_effect=KeyboardInterrupt):  # stopped before the table is written
        try:
            curated(folder, "by two and one", peers)
        except KeyboardInterrupt:
            assert peers.first
    curated(folder, "few by two", peers, FEW)
    dist.destroy_process_group()


def test_two_processes_find_what_one_does_to_the_last_bit(tmp_path: Path) -> None:
    long_tail(tmp_path / "store")
    mp.spawn(worker, (tmp_path,), nprocs=2)
    curated(tmp_path, "by one", Peers("cpu"))
    curated(tmp_path, "few by one", Peers("cpu"), FEW)
    centres = (tmp_path / "by two and one" / "centres-2.npy").stat().st_mtime_ns
    assert len(list((tmp_path / "by two and one").glob("labels-*"))) == 7
    curated(tmp_path, "by two and one", Peers("cpu"))  # goes on where two were stopped
    assert (tmp_path / "by two and one" / "centres-2.npy").stat().st_mtime_ns == centres
    for name in NAMES:
        for one, two in (("by one", "by two and one"), ("few by one", "few by two")):
            assert (tmp_path / one / name).read_bytes() == (tmp_path / two / name).read_bytes(), (name, one)


def test_rows_are_cut_into_the_same_chunks_for_any_number(monkeypatch: pytest.MonkeyPatch) -> None:
    for count, size, ranks in ((1000, 64, 3), (1000, 64, 40), (5, 64, 2), (640, 64, 5)):
        found, module = [], "pretrain.curation.own_rows"
        monkeypatch.setattr(f"{module}.world_size", lambda ranks=ranks: ranks)
        for rank in range(ranks):
            monkeypatch.setattr(f"{module}.own_rank", lambda rank=rank: rank)
            first, last = own_rows(count, size)
            assert first % size == 0 or first == last
            found += range(first, last)
        assert found == list(range(count))


def test_those_who_see_other_tiles_are_refused(tmp_path: Path) -> None:
    long_tail(tmp_path / "store", 2)

    class Other(Peers):
        number = 1

        def agreed(self, value: object) -> object:
            return value | {"store": "another"} if isinstance(value, dict) else value

    with pytest.raises(Fault, match=r"process 1 finds other tiles in .*store than the first one does: wait until"):
        curate(tmp_path / "out", EmbeddingStore.open(tmp_path / "store"), WANTED, torch.device("cpu"), Other("cpu"))
    assert not (tmp_path / "out").exists()


def test_processes_that_nobody_started_or_told_where_to_meet_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*GROUP, "SLURM_STEP_ID", "SLURM_STEPID"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(Fault, match="processes=3, and 1 process was started"), met("processes", 3, "cpu"):
        pass
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "3")
    with pytest.raises(Fault, match="nothing says where they meet: launch=slurm writes"), met("processes", 3, "cpu"):
        pass


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name not in GROUP}
    return subprocess.Popen(
        [sys.executable, "-m", "pretrain", *command(folder, "fit_tiles=20", *words)],
        cwd=ROOT,
        env=environment | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_the_command_starts_and_stops_them_goes_on_with_another_number_and_outlives_a_killed_one(
    tmp_path: Path,
) -> None:
    long_tail(tmp_path / "store")
    first = start(tmp_path, "processes=2", "iterations=3000", "resampling_steps=[0,150]")
    while not (tmp_path / "out" / "centres-1.npy").exists():
        assert first.poll() is None, first.communicate()
        time.sleep(0.01)
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=60)
    assert first.returncode != 0 and not (tmp_path / "out" / "curated.parquet").exists()
    for out, words in (("out", ["processes=3"]), ("once", [])):
        again = start(tmp_path, "iterations=3000", "resampling_steps=[0,150]", f"out={tmp_path / out}", *words)
        said, errors = again.communicate(timeout=300)
        assert again.returncode == 0, errors
        (line,) = said.splitlines()
        assert json.loads(line)["taken"] == 600
    assert (tmp_path / "out" / "curated.parquet").read_bytes() == (tmp_path / "once" / "curated.parquet").read_bytes()
    # Who is killed doesn't leave the others waiting.
    broken = start(tmp_path, "processes=2", "iterations=3000", "resampling_steps=[0,150]", f"out={tmp_path / 'broken'}")
    while not (tmp_path / "broken" / "centres-1.npy").exists():
        assert broken.poll() is None, broken.communicate()
        time.sleep(0.01)
    (rank,) = of_rank(tmp_path / "broken", 1)
    os.kill(rank, signal.SIGKILL)
    _, errors = broken.communicate(timeout=60)
    assert broken.returncode == 128 + signal.SIGKILL and "rank 1 was killed by SIGKILL" in errors


def of_rank(out: Path, rank: int) -> list[int]:
    """The process of a rank that works in that folder."""
    found, words = [], {f"PRETRAIN_LOGS={out / 'logs' / 'local'}".encode(), f"RANK={rank}".encode()}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # which has ended meanwhile
            if words <= set((process / "environ").read_bytes().split(b"\0")):
                found.append(int(process.name))
    return found
