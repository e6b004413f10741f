"""What ``pip install`` installs works from an empty folder, without the checkout."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.shards.tile_folders import write_tiles
from tests.pretrain.training.test_tile_training import GROUP, TINY
from tests.test_house import ROOT, kept


@pytest.mark.slow
def test_a_wheel_brings_its_configs_and_trains(tmp_path: Path) -> None:
    for file in kept():
        copy = tmp_path / "source" / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    site, empty = tmp_path / "site", tmp_path / "empty"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", str(site)]
    subprocess.run([*pip, str(tmp_path / "source")], check=True, timeout=300)
    shutil.rmtree(tmp_path / "source")
    empty.mkdir()
    shards = write_tiles(tmp_path / "shards", [40, 37])
    kept_variables = {name: value for name, value in os.environ.items() if name not in (*GROUP, "PYTHONPATH")}
    # Before the editable installation of this environment, whose finder comes last.
    environment = kept_variables | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}

    def pretrain(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "pretrain", *words],
            cwd=empty,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    assert "models.vit.VisionTransformer" in pretrain("tile", "--cfg", "job", "recipe=midnight")
    assert pretrain("--version").split()[0] == "slidewright"
    pretrain("tile", "run=run", f"data.shards={shards}", *TINY, "optim.steps=3")
    assert (empty / "run" / "checkpoints" / "step-00000003").is_dir()
    where = "import pretrain.settings.config_files, configs; print(pretrain.settings.config_files.CONFIGS)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", where], cwd=empty, env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == str(site / "configs")
