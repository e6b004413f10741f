"""What numba compiles is kept on disk, and a run that resumes finds there what another process has compiled."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data.fault import Fault
from data.tiles import augment_cpu

ROOT = Path(__file__).resolve().parents[3]
AUGMENT = """
import numpy as np
import torch
from data.tiles.augment import augment
from data.tiles.augment_parameters import Colour, draw_parameters

generator = np.random.default_rng(0)
images = torch.from_numpy(generator.integers(0, 256, (64, 3, 40, 52), dtype=np.uint8))
rows = torch.from_numpy(draw_parameters(Colour(), np.arange(64) % 3, generator))
mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
print(augment(images, rows, mean, std).numpy().tobytes().hex())
"""


@pytest.mark.slow
def test_what_was_just_compiled_and_what_is_found_on_disk_give_the_same_bits(tmp_path: Path) -> None:
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    found = [
        subprocess.run(
            [sys.executable, "-c", AUGMENT], env=environment, capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    ]
    assert list(tmp_path.rglob("*.nbi")) and len(found[0]) > 10_000
    assert found[0] == found[1]


def test_where_numba_can_keep_nothing_the_error_says_what_to_set() -> None:
    of_no_file: dict[str, Any] = {}
    exec("def same(x):\n    return x", of_no_file)
    with pytest.raises(Fault, match=r"no folder to keep .* set NUMBA_CACHE_DIR"):
        augment_cpu.compiled(of_no_file["same"])
