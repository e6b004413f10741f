"""The benchmark of slide encoders from its command line to its last line, as small as it goes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*words: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests" / "bench" / "slide.py"), *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_the_smallest_run_ends_with_a_line_of_figures_and_the_same_command_finds_it_done(tmp_path: Path) -> None:
    rows = ["mean", "mean_std", "smoothed", "filter", "mil", "random", "slide"]
    shown = [*rows, "filter_means", "random_means", "slide_means"]
    words = [f"OUT={tmp_path}", "SECONDS=1", "SLIDES=20", "SEEDS=0", "GROUNDS=made_up", "LABELS=rare,nests"]
    first = run(*words, f"ROWS={','.join(rows)}")
    assert first.returncode == 0, first.stderr
    figures = json.loads(first.stdout.splitlines()[-1])
    assert set(figures) == {f"made_up/{label}/{row}" for label in ("rare", "nests") for row in shown}
    assert all(0 <= figure <= 1 for figure in figures.values())
    record = sorted(tmp_path.rglob("*.json"))
    written = [file.stat().st_mtime_ns for file in record]
    assert json.loads(run(*words, f"ROWS={','.join(rows)}").stdout.splitlines()[-1]) == figures
    assert [file.stat().st_mtime_ns for file in record] == written


@pytest.mark.slow
@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("ROWS=best", "ROWS are some of mean, "),
        ("SLIDES=9", "need 10 at least"),
        ("TILES=nowhere", "nowhere is not there"),
        ("SEEDS=x", "no whole number"),
        ("mae:", "is not understood"),
    ],
)
def test_a_wrong_word_is_said_before_any_work(tmp_path: Path, word: str, said: str) -> None:
    found = run(f"OUT={tmp_path / 'out'}", word)
    assert found.returncode and said in found.stderr and not (tmp_path / "out").exists()
