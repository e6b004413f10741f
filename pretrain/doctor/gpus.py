"""Do this node's GPUs do what they can? How their memory is given out, whether they reach each other, and what they
multiply, at which clocks, while all of them work."""

import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch

from pretrain.doctor.finding import Finding, failed, passed, warned
from pretrain.doctor.services import Ask, answer
from pretrain.settings.hardware import FOLDER, machine_called

SIDE, SECONDS = 8192, 2.0  # of the square matrices, and of multiplying them
PRODUCTS_AT_ONCE = 16  # between two looks at the time: tens of milliseconds on a GPU, beside which waiting is nothing
SOUND_SHARE = 0.55  # choice: of the data sheet's peak, of which sound GPUs do 60 to 85 %, those with little power least
EVEN_SHARE = 0.9  # choice: of the node's median; GPUs of one kind differ by a few per cent
HALF_CLOCK = 0.5  # choice: of the highest clock; the power limit alone takes up to a third of it
POWER_LIMIT = 0x4
SLOWED = {
    0x8: "a hardware slowdown",
    0x20: "heat, by the driver",
    0x40: "heat, by the hardware",
    0x80: "the power supply's brake",
}
"""Bits of what nvidia-smi names as reasons of a clock, of which a sound GPU under load has none (P: nvml.h,
nvmlClocksEventReason…). Power limit, idleness and clocks that somebody has set are not among them."""


@dataclass(frozen=True)
class VisibleGpu:
    """One that a run's process would use; ``uuid`` as torch writes it, without nvidia-smi's ``GPU-``."""

    device: torch.device
    name: str
    uuid: str


def visible_gpus(devices: int) -> list[VisibleGpu]:
    """The first ``devices`` of those that torch sees, or all if these are fewer."""
    found = []
    for i in range(min(devices, torch.cuda.device_count())):
        about = torch.cuda.get_device_properties(i)
        found.append(VisibleGpu(torch.device("cuda", i), about.name, str(about.uuid)))
    return found


def said_first(error: Exception) -> str:
    """The first line of what an error says; its kind where it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def check_allocator(environment: Mapping[str, str]) -> list[Finding]:
    """Does torch's allocator join freed pieces? A step's tensors change size from step to step."""
    # Where the older name is set, torch doesn't look at the newer one.
    name = "PYTORCH_CUDA_ALLOC_CONF" if "PYTORCH_CUDA_ALLOC_CONF" in environment else "PYTORCH_ALLOC_CONF"
    given = environment.get(name, "").replace(" ", "").split(",")
    if "expandable_segments:True" in given:
        return [passed("allocator", "expandable segments")]
    others = [one for one in given if one and not one.startswith("expandable_segments:")]
    return [
        warned(
            "allocator",
            f"{name} lacks expandable_segments:True, and a step's tensors change size, so free memory breaks"
            f" into pieces that nothing fits: export {name}={','.join([*others, 'expandable_segments:True'])}"
            " (a line of launch.setup=)",
        )
    ]


def check_peer_access(
    count: int, reaches: Callable[[int, int], bool] = torch.cuda.can_device_access_peer
) -> list[Finding]:
    """Can every two of a node's GPUs read each other's memory? Nothing for one GPU."""
    pairs = list(combinations(range(count), 2))
    apart = [f"{i}–{j}" for i, j in pairs if not (reaches(i, j) and reaches(j, i))]
    if apart:
        return [
            warned(
                "peer access",
                f"GPUs {', '.join(apart)} ({len(apart)} of {len(pairs)} pairs) can't read each other's memory, so what"
                " they exchange goes through the host: ask for GPUs that are linked ('nvidia-smi topo -p2p r' shows"
                " which), and in a virtual machine for its host's leave",
            )
        ]
    return [passed("peer access", f"all {len(pairs)} pairs of {count} GPUs")] if pairs else []


def check_under_load(
    gpus: Sequence[VisibleGpu],
    ask: Ask = answer,
    described_in: Path = FOLDER,
    side: int = SIDE,
    seconds: float = SECONDS,
) -> list[Finding]:
    """What all of ``gpus`` multiply while all of them work, and nvidia-smi's view of their clocks in the midst of it.
    Nothing for none."""
    if not gpus:
        return []

    def work(gpu: VisibleGpu, seconds: float) -> float | str:
        try:
            return products_per_second(gpu.device, side, seconds)
        except RuntimeError as error:  # torch's, of a GPU that is full or broken
            return said_first(error)

    with ThreadPoolExecutor(len(gpus)) as pool:
        list(pool.map(lambda gpu: work(gpu, 0), gpus))  # so that all have begun when the clocks are asked for
        rates = [pool.submit(work, gpu, seconds) for gpu in gpus]
        time.sleep(seconds / 2)
        clocks = check_clocks(gpus, ask)
        return judge_products(gpus, [rate.result() for rate in rates], described_in) + clocks


def products_per_second(device: torch.device, side: int, seconds: float) -> float:
    """Floating-point operations a second in bf16 products of two square matrices of random numbers; in float16 ones of a
    GPU that has no bf16 units, as configs/hardware has its peak."""
    older = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
    dtype = torch.float16 if older else torch.bfloat16
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out, count, began = torch.empty_like(a), 0, time.monotonic()
    while True:
        for _ in range(PRODUCTS_AT_ONCE):
            torch.mm(a, b, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        count += PRODUCTS_AT_ONCE
        if (took := time.monotonic() - began) >= seconds:
            return 2 * side**3 * count / took


def judge_products(
    gpus: Sequence[VisibleGpu], rates: Sequence[float | str], described_in: Path = FOLDER
) -> list[Finding]:
    """Operations a second of each, or why there are none, against its kind's peak in configs/hardware and against the
    others."""
    numbers = [rate for rate in rates if not isinstance(rate, str)]
    middle = statistics.median(numbers) if numbers else 0.0
    found = []
    for i, (gpu, rate) in enumerate(zip(gpus, rates, strict=True)):
        who = f"GPU {i} ({gpu.name})"
        if isinstance(rate, str):
            found.append(
                failed(
                    "matmul",
                    f"{who} can't multiply matrices ({rate}): 'nvidia-smi -q' shows who uses it and its errors, and"
                    " launch.exclude= leaves its node out",
                )
            )
            continue
        kind = machine_called(gpu.name, described_in)
        if kind and rate < SOUND_SHARE * kind.peaks["bf16"]:
            share = 100 * rate / kind.peaks["bf16"]
            low = f"{share:.0f} % of the peak in configs/hardware, and a sound one does {100 * SOUND_SHARE:.0f} or more"
        elif rate < EVEN_SHARE * middle:
            low = f"{100 * rate / middle:.0f} % of the median here, and the others would wait for it in every step"
        else:
            continue
        found.append(
            warned(
                "matmul",
                f"{who} multiplies {rate / 1e12:,.3g} TFLOP/s in 16 bits, {low}: nvidia-smi shows its clocks and who else"
                " uses it, and launch.exclude= leaves its node out",
            )
        )
    if found:
        return found
    says = f"{len(gpus)} × {gpus[0].name}, {_range(numbers, 1e12)} TFLOP/s in 16 bits"
    kind = machine_called(gpus[0].name, described_in)
    if kind is None:
        return [passed("matmul", f"{says}; configs/hardware doesn't describe it, so that isn't judged")]
    return [passed("matmul", f"{says}, {_range(numbers, kind.peaks['bf16'] / 100)} % of the peak in configs/hardware")]


def check_clocks(gpus: Sequence[VisibleGpu], ask: Ask = answer) -> list[Finding]:
    """Does something hold the clocks of ``gpus`` down? Ask while they work: idle ones are slow on purpose."""
    fields = "uuid,clocks.sm,clocks.max.sm,clocks_event_reasons.active"
    try:
        said = ask(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"])
        lines = {uuid: values for uuid, *values in (line.split(", ") for line in said.splitlines())}
        by_gpu = [(i, *(int(value, 0) for value in lines[f"GPU-{gpu.uuid}"])) for i, gpu in enumerate(gpus)]
    except (OSError, subprocess.TimeoutExpired, ValueError, KeyError) as error:
        return [warned("clocks", f"not looked at, since nvidia-smi doesn't tell them ({said_first(error)})")]
    found = []
    for i, clock, highest, reasons in by_gpu:
        slowed = [words for bit, words in SLOWED.items() if reasons & bit]
        if slowed or clock < HALF_CLOCK * highest:
            found.append(
                warned(
                    "clocks",
                    f"GPU {i} ({gpus[i].name}) runs at {clock:,} of {highest:,} MHz under load, held by"
                    f" {' and '.join(slowed) or f'what nvidia-smi calls {reasons:#x}'}: have its cooling, its power and"
                    " its set clocks looked at ('nvidia-smi -q -d PERFORMANCE,CLOCK'), and leave its node out till then"
                    " with launch.exclude=",
                )
            )
    if found:
        return found
    limited = "; the power limit holds some" if any(line[3] & POWER_LIMIT for line in by_gpu) else ""
    clocks, most = [line[1] for line in by_gpu], max(line[2] for line in by_gpu)
    return [passed("clocks", f"{_range(clocks, 1)} of at most {most:,} MHz under load{limited}")]


def _range(numbers: Sequence[float], unit: float) -> str:
    """``700``, or ``700 to 710``, in whole ``unit``."""
    low, high = (f"{bound(numbers) / unit:,.0f}" for bound in (min, max))
    return low if low == high else f"{low} to {high}"
