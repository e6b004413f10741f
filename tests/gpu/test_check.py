"""The script for GPUs has no fault of its own: its sections run on the CPU, small."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu.check import SECTIONS

ROOT = Path(__file__).resolve().parents[2]
CHECK = [sys.executable, str(ROOT / "tests" / "gpu" / "check.py")]


def lines_of(*sections: str) -> dict[str, dict]:
    done = subprocess.run([*CHECK, "--tiny", *sections], cwd=ROOT, capture_output=True, text=True)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert {line["section"]: line for line in found if not line["ok"]} == {}, done.stderr[-2000:]
    return {line["section"]: line for line in found}


@pytest.mark.slow
def test_all_sections_run_on_a_cpu() -> None:
    assert len(lines_of()) == len(SECTIONS)


def test_all_sections_together_take_less_than_nine_minutes() -> None:
    assert sum(section.limit for section in SECTIONS.values()) < 9 * 60


def test_without_a_gpu_it_says_so_and_does_nothing() -> None:
    done = subprocess.run(CHECK, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("skipped: torch sees no CUDA device here")
