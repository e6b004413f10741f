"""What the doctor says of GPUs, by answers that are made up; the timing itself is tried on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from launch.entry import run_command_line
from pretrain.doctor import gpus, machine
from pretrain.doctor.gpus import VisibleGpu
from pretrain.settings.hardware import FOLDER
from tests.pretrain.doctor.test_doctor import only

CPU = torch.device("cpu")
H200 = [VisibleGpu(CPU, "NVIDIA H200", f"uuid-{i}") for i in range(3)]


def clocks_of(*values: str) -> str:
    """What nvidia-smi prints for `H200`, in an order of its own, and for a GPU that this process may not use."""
    lines = [f"GPU-uuid-{i}, {line}" for i, line in enumerate(values)]
    return "\n".join(["GPU-of-others, [N/A], [N/A], [N/A]", *reversed(lines)]) + "\n"


def hardware_with(name: str, bf16_tflops: float, folder: Path) -> Path:
    """A hardware folder with one machine in it, of another name and peak."""
    described = yaml.safe_load((FOLDER / "h200_141gb.yaml").read_text())
    described |= {"device_names": [name], "bf16_tflops": bf16_tflops}
    (folder / "made_up.yaml").write_text(yaml.safe_dump(described))
    return folder


@pytest.mark.parametrize(
    ("environment", "status"),
    [
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:True"}, "ok"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64, expandable_segments:True"}, "ok"),
        ({"PYTORCH_ALLOC_CONF": "roundup_power2_divisions:4"}, "warn"),
        ({}, "warn"),
    ],
)
def test_an_allocator_without_expandable_segments_is_named(environment: dict[str, str], status: str) -> None:
    found = only(gpus.check_allocator(environment))
    assert found[0] == status
    way_out = ",".join([*environment.values(), "expandable_segments:True"])
    assert status == "ok" or f"export PYTORCH_ALLOC_CONF={way_out} (" in found[1]


def test_of_both_names_of_the_allocators_setting_the_one_that_torch_reads_counts() -> None:
    both = {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    status, says = only(gpus.check_allocator(both))
    assert (
        status == "warn" and "export PYTORCH_CUDA_ALLOC_CONF=max_split_size_mb:512,expandable_segments:True (" in says
    )
    read = "import torch; print(torch._C._accelerator_getAllocatorSettings())"
    told = subprocess.run([sys.executable, "-c", read], env=os.environ | both, capture_output=True, text=True)
    assert told.stdout.strip() == "max_split_size_mb:512", told.stderr


def test_pairs_of_gpus_that_do_not_reach_each_other_are_named() -> None:
    assert gpus.check_peer_access(1, lambda *_: False) == []
    assert only(gpus.check_peer_access(4, lambda *_: True)) == ("ok", "all 6 pairs of 4 GPUs")
    status, says = only(gpus.check_peer_access(4, lambda i, j: (i, j) != (2, 0) and {i, j} != {1, 3}))
    assert status == "warn" and "GPUs 0–2, 1–3 (2 of 6 pairs) can't read each other's memory" in says


def test_clocks_under_load() -> None:
    sound = clocks_of("1980, 1980, 0x0000000000000000", "1755, 1980, 0x0000000000000004", "1740, 1980, 0x4")
    assert only(gpus.check_clocks(H200, lambda _: sound)) == (
        "ok",
        "1,740 to 1,980 of at most 1,980 MHz under load; the power limit holds some",
    )
    bad = clocks_of("1980, 1980, 0x0", "1200, 1980, 0x60", "345, 1980, 0x2")
    hot, low = gpus.check_clocks(H200, lambda _: bad)
    assert hot.status == low.status == "warn"
    assert (
        "GPU 1 (NVIDIA H200) runs at 1,200 of 1,980 MHz" in hot.says and "heat, by the driver and heat, by" in hot.says
    )
    assert "GPU 2 (NVIDIA H200) runs at 345 of 1,980 MHz under load, held by what nvidia-smi calls 0x2" in low.says


@pytest.mark.parametrize("said", [clocks_of(*["1980, [N/A], 0x0"] * 3), clocks_of("1980, 1980, 0x0"), "", "no devices"])
def test_clocks_that_nvidia_smi_does_not_tell_are_said_to_be_unknown(said: str) -> None:
    status, says = only(gpus.check_clocks(H200, lambda _: said))
    assert status == "warn" and says.startswith("not looked at, since nvidia-smi doesn't tell them (")


def test_a_machine_without_nvidia_smi_is_said_to_have_none() -> None:
    def absent(_: list[str]) -> str:
        raise FileNotFoundError(2, "No such file or directory", "nvidia-smi")

    assert "No such file or directory: 'nvidia-smi'" in only(gpus.check_clocks(H200, absent))[1]


def test_products_are_held_against_the_data_sheet_and_the_other_gpus() -> None:
    assert only(gpus.judge_products(H200, [770e12, 781e12, 790e12])) == (
        "ok",
        "3 × NVIDIA H200, 770 to 790 TFLOP/s in 16 bits, 78 to 80 % of the peak in configs/hardware",
    )
    status, says = only(gpus.judge_products(H200, [770e12, 410e12, 790e12]))
    assert status == "warn" and "GPU 1 (NVIDIA H200) multiplies 410 TFLOP/s in 16 bits, 41 % of the peak" in says
    status, says = only(gpus.judge_products(H200, [770e12, 650e12, 790e12]))
    assert status == "warn" and "650 TFLOP/s in 16 bits, 84 % of the median here" in says
    status, says = only(gpus.judge_products(H200, [770e12, "CUDA error: uncorrectable ECC error", 780e12]))
    assert status == "FAIL" and "GPU 1 (NVIDIA H200) can't multiply matrices (CUDA error: uncorrectable ECC" in says
    status, says = only(gpus.judge_products([VisibleGpu(CPU, "NVIDIA RTX of tomorrow", "")], [1e12]))
    assert status == "ok" and "configs/hardware doesn't describe it" in says


@pytest.mark.parametrize(("peak", "status"), [(1e-6, "ok"), (1e6, "warn")])
def test_products_are_timed_while_the_clocks_are_asked_for(peak: float, status: str, tmp_path: Path) -> None:
    described, gpu = hardware_with("Made up", peak, tmp_path), VisibleGpu(CPU, "Made up", "uuid-0")
    found = gpus.check_under_load([gpu], lambda _: clocks_of("9, 9, 0x0"), described, side=32, seconds=0.02)
    assert [(finding.about, finding.status) for finding in found] == [("matmul", status), ("clocks", "ok")]
    assert gpus.check_under_load([]) == []


def test_a_gpu_that_cannot_compute_is_no_crash_of_the_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore")

    monkeypatch.setattr(gpus, "products_per_second", full)
    found = gpus.check_under_load(H200[:1], lambda _: clocks_of("9, 9, 0x0"), seconds=0.01)
    assert (found[0].about, found[0].status) == ("matmul", "FAIL") and "(CUDA out of memory.)" in found[0].says


def test_bandwidth_is_what_each_link_carries_whatever_the_number_of_processes() -> None:
    assert machine.bus_bandwidth(2, 2**30, 1.0) == machine.bus_bandwidth(2, 2**31, 2.0) == 2**30
    assert machine.bus_bandwidth(8, 8 * 10**9, 0.035) == pytest.approx(400e9)


def test_the_exchange_between_gpus_is_held_against_what_their_links_carry() -> None:
    found = machine.judge_exchange(8, "nccl", 380e9, "NVIDIA H200")
    assert (found.status, "380 GB/s of bus bandwidth, 84 % of what" in found.says) == ("ok", True)
    found = machine.judge_exchange(8, "nccl", 24e9, "NVIDIA H200")  # through the host
    assert found.status == "warn" and "5 % of what configs/hardware says of its links" in found.says
    assert machine.judge_exchange(8, "nccl", 1e9, "NVIDIA RTX of tomorrow").says.endswith("1 GB/s of bus bandwidth")
    assert machine.judge_exchange(1, "nccl", 0.0, "NVIDIA H200").says == "1 processes, nccl: nothing to exchange"
    assert machine.judge_exchange(2, "gloo", 1e9, None).status == "ok"


def test_a_bad_gpu_node_is_told_line_by_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "all_reduce", lambda *_: [])
    monkeypatch.setattr(machine, "on_gpu", lambda _: True)
    monkeypatch.setattr(gpus, "visible_gpus", lambda _: H200)
    monkeypatch.setattr(gpus, "check_under_load", lambda some: gpus.judge_products(some, [770e12, 410e12, 790e12]))
    monkeypatch.setattr(gpus, "check_peer_access", lambda count: [gpus.failed("peer access", f"{count}")])
    monkeypatch.setenv("SLURM_JOB_CPUS_PER_NODE", "3")
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.setattr("pretrain.doctor.services.shutil.which", lambda _: None)
    with pytest.raises(SystemExit):
        run_command_line(["doctor", "trainer.devices=3", "trainer.accelerator=gpu", f"run={tmp_path}"])
    lines = capsys.readouterr().out.splitlines()
    assert [" ".join(line.split()[:2]) for line in lines[1:5]] == [
        "FAIL accelerators",
        "warn cores",
        "FAIL peer",
        "warn matmul",
    ]
    assert lines[5].startswith("warn  allocator ")
