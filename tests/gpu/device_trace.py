"""What a trace of torch.profiler says of a device: how long it stood still, and what took its time."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

ON_GPU = frozenset(
    {"kernel", "gpu_memcpy", "gpu_memset"}
)  # categories of what a GPU does; others are marks and the host
ON_CPU = frozenset({"cpu_op"})
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def read_trace(file: Path) -> list[dict[str, Any]]:
    """The events of a Chrome trace, ``.json.gz``, that last for a time: ``ts`` and ``dur`` in µs."""
    with gzip.open(file, "rt") as text:
        return [event for event in json.load(text)["traceEvents"] if event.get("ph") == "X"]


def idle(events: list[dict[str, Any]], kinds: frozenset[str]) -> tuple[float, float]:
    """The share of the time from the first of ``kinds`` to the last in which there is none, and the longest such
    stretch in ms."""
    spans = sorted((event["ts"], event["ts"] + event["dur"]) for event in events if event.get("cat") in kinds)
    still = longest = 0.0
    end = spans[0][0]
    for begins, ends in spans:
        still += max(0.0, begins - end)
        longest = max(longest, begins - end)
        end = max(end, ends)
    return still / (end - spans[0][0]), longest / 1e3


def longest_kernels(
    events: list[dict[str, Any]], kinds: frozenset[str], steps: int, count: int = 12
) -> dict[str, float]:
    """Milliseconds a step by name, the longest first."""
    sums: Counter[str] = Counter()
    for event in events:
        if event.get("cat") in kinds:
            sums[event["name"]] += event["dur"]
    return {name: round(micros / 1e3 / steps, 3) for name, micros in sums.most_common(count)}


def number_of(events: list[dict[str, Any]], kinds: frozenset[str]) -> int:
    """How many there are of ``kinds``."""
    return sum(event.get("cat") in kinds for event in events)


def waits(events: list[dict[str, Any]]) -> int:
    """How often the host waited for the device."""
    return sum(event["name"] in WAITS for event in events)
