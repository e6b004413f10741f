"""Cores of each process, by what SLURM, the scheduler and control groups say."""

import math
from pathlib import Path

import pytest

from pretrain.doctor.cores import check_cores, cores_of_each, cpu_quota, usable_cores
from tests.pretrain.doctor.test_doctor import only


@pytest.mark.parametrize(
    ("environment", "here", "each"),
    [
        ({}, 96, 12),
        ({"SLURM_JOB_CPUS_PER_NODE": "96", "SLURM_CPUS_PER_TASK": "12"}, 12, 12),  # the doctor is one task of a job
        ({"SLURM_JOB_CPUS_PER_NODE": "8"}, 1, 1),  # the cluster's default: a core a task
        ({"SLURM_JOB_CPUS_PER_NODE": "96", "SLURM_CPUS_PER_TASK": "4"}, 4, 4),
        ({"SLURM_JOB_CPUS_PER_NODE": "16", "SLURM_CPUS_PER_TASK": "16"}, 16, 2),  # one task, which starts eight
        ({"SLURM_JOB_CPUS_PER_NODE": "96(x2),32"}, 96, 4),
    ],
)
def test_a_node_s_cores_are_shared_by_its_processes(environment: dict[str, str], here: int, each: float) -> None:
    assert cores_of_each(8, environment, here) == each


def test_too_few_cores_for_the_loader_are_said_with_the_number_to_ask_for() -> None:
    assert only(check_cores(8, 2, True, {}, 24)) == ("ok", "3 cores for each of 8 processes")
    status, says = only(check_cores(8, 2, True, {"SLURM_JOB_CPUS_PER_NODE": "8"}, 1))
    assert status == "warn" and "1 core for each of 8 processes, and each needs 3 (one to feed its GPU," in says
    assert "launch.cpus_per_task=3, docker run --cpus=24), set data.threads lower" in says
    assert only(check_cores(1, 2, False, {}, 2))[0] == "ok"
    status, says = only(check_cores(1000, 2, False, {}, 2))
    assert status == "warn" and "each needs 2 (data.threads=2 to decode)" in says
    status, says = only(check_cores(8, None, True, {}, 8))  # the slide stage's loader has no setting to lower
    assert status == "warn" and "one to read" in says and "data.threads" not in says


def test_a_control_group_s_share_of_time_counts_as_cores(tmp_path: Path) -> None:
    assert 0 < usable_cores() < math.inf
    second = tmp_path / "v2" / "pod" / "container"
    second.mkdir(parents=True)
    assert cpu_quota(tmp_path / "v2", "0::/pod/container\n") == math.inf
    (second / "cpu.max").write_text("max 100000\n")
    (second.parent / "cpu.max").write_text("250000 100000\n")  # the group above limits those in it
    assert cpu_quota(tmp_path / "v2", "0::/pod/container\n") == 2.5
    first = tmp_path / "v1" / "cpu" / "pod"
    first.mkdir(parents=True)
    (first / "cpu.cfs_quota_us").write_text("400000\n")
    (first / "cpu.cfs_period_us").write_text("100000\n")
    assert cpu_quota(tmp_path / "v1", "4:memory:/pod\n3:cpu,cpuacct:/pod\n0::/\n") == 4
    (first / "cpu.cfs_quota_us").write_text("-1\n")
    assert cpu_quota(tmp_path / "v1", "3:cpu,cpuacct:/pod\n") == math.inf
