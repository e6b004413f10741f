"""The demo walks the whole road on the real slide, continues where it was stopped, and says when it is done."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SLIDE = Path(sys.prefix) / "share" / "slidewright" / "CMU-1-Small-Region.svs"


def demo(folder: Path, *settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pretrain", "demo", "tile_steps=3", "slide_steps=3", *settings],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_demo_makes_every_product_and_a_second_run_says_that_it_is_done(tmp_path: Path) -> None:
    if not SLIDE.exists():
        pytest.skip(f"the real slide is not at {SLIDE}: 'make setup' brings it")
    first = demo(tmp_path)
    assert first.returncode == 0, first.stderr[-4000:]
    out = tmp_path / "demo" / "CMU-1-Small-Region"
    for made in (
        "shards/index.npz",
        "tile/metrics.jsonl",
        "embeddings/index-0.parquet",
        "slide/metrics.jsonl",
        "encoder/model.safetensors",
        "slide_encoder/slide_encoder.pth",
        "report.html",
        "road.png",
    ):
        assert (out / made).exists(), made
    assert "left in all" in first.stderr and "Where to look" in first.stderr and "fields" in first.stderr
    second = demo(tmp_path)
    assert second.returncode == 0 and "is done" in second.stderr and "Where to look" in second.stderr


def test_a_missing_slide_ends_in_one_line(tmp_path: Path) -> None:
    done = demo(tmp_path, "slides=nowhere.svs")
    assert done.returncode == 1
    assert "nowhere.svs" in done.stderr and "Traceback" not in done.stderr
