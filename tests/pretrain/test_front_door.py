"""The command as a user starts it: from anywhere, and not fooled by another package of the same name."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain import __main__ as front_door

ROOT = Path(__file__).resolve().parents[2]


def test_our_own_packages_are_found_to_be_ours() -> None:
    assert front_door.shadowed() is None


def test_a_package_in_another_place_is_reported_with_both_places_and_the_way_out(tmp_path: Path) -> None:
    sentence = front_door.shadowed(tmp_path)
    assert (
        sentence is not None
        and str(tmp_path / "data") in sentence
        and str(ROOT / "data") in sentence
        and "an environment of its own" in sentence
    )


def test_a_shadowing_package_ends_the_command_with_that_sentence(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("")
    # Two entries on the path, the stranger's first, as when its distribution was installed before ours.
    program = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; from pretrain.__main__ import main; main()"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    assert (
        ended.stderr.startswith("pretrain: Python finds the package 'models' at")
        and len(ended.stderr.strip().splitlines()) == 1
    )


def test_the_command_runs_from_any_folder_and_errors_go_to_standard_error(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-m", "pretrain", "tile", "+optim.lrr=1"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 2 and ended.stdout == ""
    assert (
        ended.stderr.strip() == "pretrain: there is no setting 'optim.lrr' in 'pretrain tile'; did you mean 'optim.lr'?"
    )
    assert list(tmp_path.iterdir()) == []  # Hydra leaves no outputs/ behind


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps freed memory as it likes")
def test_memory_that_is_freed_is_not_fetched_from_the_system_again() -> None:
    told = (
        "import resource\n"
        "from pretrain.__main__ import keep_freed_memory\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    bytes([1]) * size\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "size = 2**26  # the product of constants would be computed while compiling\n"
        "faults(); before = faults(); keep_freed_memory(); faults(); print(before, faults())\n"
    )
    done = subprocess.run([sys.executable, "-c", told], cwd=ROOT, capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before > 1000 and after < 100


def test_settings_are_refused_and_explained_before_lightning_is_imported() -> None:
    program = """
import sys
from pretrain import cli
from data.fault import Fault
for command in ("tile", "slide", "plan", "doctor", "tile replay", "doctor slide"):
    try:
        cli.parse([*command.split(), "nothing=1"])
    except Fault as fault:
        assert "there is no setting 'nothing'" in str(fault), fault
    else:
        raise AssertionError(command)
    assert "lightning" not in sys.modules, command
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_lightning_brings_nothing_along_that_no_run_uses_and_extras_are_there_for_who_asks_later() -> None:
    program = """
import sys
from pretrain.lean_torchmetrics import import_lean
import_lean()
import lightning.pytorch, torchmetrics
brought = {"transformers", "torchvision", "scipy", "matplotlib", "onnxruntime"} & sys.modules.keys()
assert not brought, brought
from lightning_utilities.core.imports import RequirementCache, package_available
assert RequirementCache("scipy>=1.0") and package_available("matplotlib")
assert torchmetrics.MeanMetric()(3.0) == 3
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
