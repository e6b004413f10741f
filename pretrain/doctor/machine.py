"""Is this machine fit? Versions of packages, accelerators, processes that can talk to each other, slides that open."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import numpy as np
import openslide
import torch

from data.fault import Fault
from data.slides.reading import Slide
from pretrain.doctor.finding import Finding, failed, passed, warned
from pretrain.run.launched import way_out_of_own_gpus
from pretrain.settings.hardware import machine_called

COMPROMISED = {"lightning": {"2.6.2", "2.6.3"}}  # releases that carried malicious code
PROCESSES_TIMEOUT = (
    120  # that processes may take to find each other; starting Python and torch on a busy shared disk is most of it
)
SOUND_EXCHANGE = (
    0.25  # choice: of the links' bandwidth; sound ones do 70 to 90 % of it, a way through the host 10 or less
)
VALUES = {"gloo": 2**20, "nccl": 2**26}  # of float32 that are added up: 4 MiB, and on GPUs 256, which fill their links
DOCTORS_PORT = 43_000  # and the job's number behind it: where processes of a job's nodes meet


def versions(
    wanted: Sequence[str] | None = None,
    installed: Callable[[str], str] = version,
    torchvision: Sequence[str] | None = None,
) -> list[Finding]:
    """Every requirement of pyproject.toml against what is installed; torchvision against its own torch; known bad
    releases."""
    from packaging.requirements import Requirement

    wrong, seen = [], 0
    for line in requires("slidewright") or [] if wanted is None else wanted:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        seen += 1
        try:
            found = installed(requirement.name)
        except PackageNotFoundError:
            wrong.append(failed("versions", f"{requirement.name} is not installed: pip install '{line}'"))
            continue
        if found in COMPROMISED.get(requirement.name, ()):
            wrong.append(
                failed(
                    "versions",
                    f"{requirement.name} {found} was a compromised release: pip install '{line}', and change the"
                    " secrets that this machine holds",
                )
            )
        elif not requirement.specifier.contains(found, prereleases=True):
            wrong.append(
                failed(
                    "versions",
                    f"{requirement.name} is {found}, and {requirement.specifier} is needed: pip install '{line}'",
                )
            )
    for line in requires("torchvision") or [] if torchvision is None else torchvision:
        requirement = Requirement(line)
        if requirement.name == "torch" and not requirement.specifier.contains(installed("torch"), prereleases=True):
            wrong.append(
                failed(
                    "versions",
                    f"torchvision {installed('torchvision')} was built for torch {requirement.specifier}, and torch is"
                    f" {installed('torch')}: install them together, from one index",
                )
            )
    return wrong or [
        passed(
            "versions",
            f"{seen} packages are as pyproject.toml asks; torch {installed('torch')} and its torchvision match",
        )
    ]


def on_gpu(accelerator: str) -> bool:
    """Whether a run with this ``trainer.accelerator`` is on GPUs here."""
    return accelerator == "gpu" or (accelerator == "auto" and torch.cuda.device_count() > 0)


def accelerators(accelerator: str, devices: int, precision: str, environment: Mapping[str, str]) -> list[Finding]:
    """Are there as many GPUs as a run's processes, and can they compute in its precision?"""
    count = torch.cuda.device_count()
    if accelerator == "cpu":
        return [passed("accelerators", "no GPU is used")]
    if accelerator == "auto" and not count:
        return [
            warned(
                "accelerators",
                "no GPU is used; if there should be GPUs: is the driver loaded (nvidia-smi), and is torch one that was"
                " built for CUDA?",
            )
        ]
    if count < devices:
        way_out = way_out_of_own_gpus(environment) or (
            "ask for more GPUs, look at CUDA_VISIBLE_DEVICES and nvidia-smi, or set it lower"
        )
        return [
            failed(
                "accelerators",
                f"{count} GPUs are visible and trainer.devices={devices}: {way_out} (built for CUDA"
                f" {torch.version.cuda})",
            )
        ]
    found = []
    for i in range(devices):
        about = torch.cuda.get_device_properties(i)
        free, whole = torch.cuda.mem_get_info(i)
        if free < 0.9 * whole:
            found.append(
                warned(
                    "accelerators",
                    f"GPU {i} ({about.name}): {(whole - free) / 2**30:.1f} GiB of {whole / 2**30:.1f} are in use by"
                    " others: nvidia-smi shows by whom",
                )
            )
    if precision == "bf16" and torch.cuda.get_device_capability(0) < (8, 0):
        found.append(
            warned(
                "accelerators",
                f"{torch.cuda.get_device_name(0)} has no bf16 units: trainer.precision=float32 is as fast there",
            )
        )
    return found or [
        passed("accelerators", f"{devices} of {count} × {torch.cuda.get_device_name(0)}, CUDA {torch.version.cuda}")
    ]


def all_reduce(processes: int, gpu: bool, seconds: float = PROCESSES_TIMEOUT) -> list[Finding]:
    """Start so many processes here and let them add up a tensor of `VALUES`: gloo on CPUs, NCCL on GPUs."""
    backend = "nccl" if gpu else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-P", "-m", "pretrain.doctor.reduce_once"]
        started = [
            subprocess.Popen(
                [*command, str(rank), str(processes), backend, f"file://{folder}/meeting", str(seconds)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
            for rank in range(processes)
        ]
        answers = []
        for process in started:
            try:
                said, error = process.communicate(timeout=seconds)
                answers.append(said.strip() or f"it ended with an error ({' '.join(error.split())[-200:]})")
            except subprocess.TimeoutExpired:
                process.kill()
                answers.append(f"no answer in {seconds:.0f} s ({' '.join(process.communicate()[1].split())[-200:]})")
    expected = f"sum {processes * (processes + 1) // 2}"
    wrong = [f"rank {rank}: {answer}" for rank, answer in enumerate(answers) if not answer.startswith(expected)]
    if wrong:
        remedy = (
            "NCCL_DEBUG=INFO shows more; NCCL_SOCKET_IFNAME and NCCL_P2P_DISABLE=1 are what usually helps"
            if gpu
            else "GLOO_SOCKET_IFNAME=lo or another interface is what usually helps, and a firewall what hinders"
        )
        return [
            failed(
                "all-reduce",
                f"{processes} processes can't add up a tensor with {backend} ({'; '.join(wrong)[:300]}): {remedy}",
            )
        ]
    slowest = max(float(answer.split()[-1]) for answer in answers)
    rate = bus_bandwidth(processes, 4 * VALUES[backend], slowest)
    return [judge_exchange(processes, backend, rate, torch.cuda.get_device_name(0) if gpu else None)]


def bus_bandwidth(processes: int, size: int, seconds: float) -> float:
    """Bytes a second that each process's link carries in an all-reduce of ``size`` bytes, whatever their number: ``2 (n
    − 1) / n`` times them.

    Source: nccl-tests, doc/PERFORMANCE.md (``busbw``).
    """
    return 2 * (processes - 1) / processes * size / seconds


def judge_exchange(processes: int, backend: str, rate: float, gpu_name: str | None) -> Finding:
    """The bandwidth between a node's processes, against what configs/hardware says of GPUs of that name."""
    says = f"{processes} processes, {backend}: {_in_words(processes, rate)}"
    kind = machine_called(gpu_name) if gpu_name else None
    if processes == 1 or kind is None:
        return passed("all-reduce", says)
    says += f", {100 * rate / 1e9 / kind.intra_node_gb_s:.0f} % of what configs/hardware says of its links"
    if rate >= SOUND_EXCHANGE * kind.intra_node_gb_s * 1e9:
        return passed("all-reduce", says)
    return warned(
        "all-reduce",
        f"{says}, and a sound node does {100 * SOUND_EXCHANGE:.0f} or more: 'nvidia-smi topo -m' shows how GPUs are"
        " linked, NCCL_DEBUG=INFO which way NCCL takes",
    )


def _in_words(processes: int, rate: float) -> str:
    return f"{rate / 1e9:,.3g} GB/s of bus bandwidth" if processes > 1 else "nothing to exchange"


def between_nodes(environment: Mapping[str, str], seconds: float = PROCESSES_TIMEOUT) -> list[Finding]:
    """On every node of a SLURM job at once: can a process of each add up a tensor with those of the others? Nothing on
    one node."""
    nodes, own = int(environment.get("SLURM_NNODES", 1)), int(environment.get("SLURM_NODEID", 0))
    if nodes == 1 or "SLURM_STEP_ID" not in environment:
        return []
    where = environment.get("MASTER_ADDR") or environment.get("SLURM_LAUNCH_NODE_IPADDR", "")
    if not where:
        return [
            warned(
                "network",
                "which node is the first isn't known here, so the network between nodes wasn't tried: MASTER_ADDR says"
                " it, which launch.doctor=true sets",
            )
        ]
    meeting = f"tcp://{where}:{DOCTORS_PORT + int(environment['SLURM_JOB_ID']) % 10_000}"
    command = [
        sys.executable,
        "-P",
        "-m",
        "pretrain.doctor.reduce_once",
        str(own),
        str(nodes),
        "gloo",
        meeting,
        str(seconds),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=2 * seconds)
        answer, error = done.stdout.strip(), " ".join(done.stderr.split())[-200:]
    except subprocess.TimeoutExpired:
        answer, error = "", f"no answer in {2 * seconds:.0f} s"
    if not answer.startswith(f"sum {nodes * (nodes + 1) // 2}"):
        return [
            failed(
                "network",
                f"node {own} can't add up a tensor with the other {nodes - 1} by way of {meeting} ({error}): is a"
                " firewall between them? GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the interface to use",
            )
        ]
    return [
        passed(
            "network",
            f"{nodes} nodes, one process each, gloo:"
            f" {_in_words(nodes, bus_bandwidth(nodes, 4 * VALUES['gloo'], float(answer.split()[-1])))}",
        )
    ]


def slides(given: Sequence[Path]) -> list[Finding]:
    """Does openslide open a slide made here, and those that were given?"""
    import tifffile

    found = []
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "made.tiff"
        pixels = np.full((512, 512, 3), 200, dtype=np.uint8)
        tifffile.imwrite(
            made, pixels, tile=(256, 256), photometric="rgb", resolution=(20000, 20000), resolutionunit="CENTIMETER"
        )
        for path in (made, *given):
            finding = _opens(path)
            if path is not made or finding.status != "ok":
                found.append(finding)
    about = (
        f"openslide {openslide.__library_version__} (openslide-python {openslide.__version__}) reads a slide made here"
    )
    return found if any(f.status == "FAIL" for f in found) else [passed("openslide", about), *found]


def _opens(path: Path) -> Finding:
    """Opened, its scale known, and read once at its coarsest."""
    try:
        with Slide(path) as slide:
            mpp = slide.mpp()
            slide.thumbnail(slide.downsamples[-1])
            size = f"{slide.width:,} × {slide.height:,} pixels of {mpp:.3g} µm"
    except Fault as fault:
        return failed("openslide", str(fault))
    return passed("openslide", f"{path.name}: {openslide.OpenSlide.detect_format(path)}, {size}")
