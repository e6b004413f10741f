"""What is read off a trace, on one that is made up."""

import gzip
import json
from pathlib import Path

import pytest

from tests.gpu.device_trace import ON_GPU, idle, longest_kernels, number_of, read_trace, waits


def test_idle_time_is_what_no_kernel_covers_and_marks_on_the_gpu_are_no_work(tmp_path: Path) -> None:
    made = [("kernel", "matmul", 0, 40), ("kernel", "softmax", 20, 30), ("gpu_memcpy", "copy", 70, 10)]
    made += [("kernel", "matmul", 80, 20), ("gpu_user_annotation", "step", 0, 100), ("cuda_runtime", "launch", 0, 90)]
    made += [("cuda_runtime", "cudaStreamSynchronize", 55, 5)]
    events = [{"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur} for cat, name, ts, dur in made]
    file = tmp_path / "trace.json.gz"
    with gzip.open(file, "wt") as text:
        json.dump({"traceEvents": [*events, {"ph": "M", "name": "process_name"}]}, text)
    found = read_trace(file)
    assert idle(found, ON_GPU) == pytest.approx((0.2, 0.02))
    assert longest_kernels(found, ON_GPU, steps=2, count=2) == {"matmul": 0.03, "softmax": 0.015}
    assert waits(found) == 1 and number_of(found, ON_GPU) == 4
