"""The script for GPUs has no fault of its own: its sections run on the CPU, small."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.gpu import check
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


def test_a_section_ends_at_its_limit_with_all_that_it_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "hangs.py"
    script.write_text(
        "import subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(tmp_path / 'child')!r}, 'w').write(str(child.pid))\n"
        "child.wait()\n"
    )
    monkeypatch.setattr(check, "__file__", str(script))
    assert check.as_process("kernels", 3)["error"] == "not over after 3 s"
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and ") Z" not in Path(f"/proc/{child}/stat").read_text():
        assert time.monotonic() < deadline, "what the section started runs on"
        time.sleep(0.05)
    assert "540 s are over" in check.as_process("kernels", 0)["error"]


def test_a_section_that_an_older_torch_cannot_do_is_skipped_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    line = check.as_process("checkpoints", 100)
    assert line["ok"] and line["skipped"] == "needs torch 2.14, and here is 2.11.0+cu130"


def test_without_a_gpu_it_says_so_and_does_nothing() -> None:
    done = subprocess.run(CHECK, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("skipped: torch sees no CUDA device here")


def test_what_is_lacking_is_said_before_anything_is_done_with_the_command_that_fetches_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check.lacking() == []
    here = [one for one in check.distributions() if check.name_of(str(one.metadata["Name"])) not in ("pyarrow", "h5py")]
    monkeypatch.setattr(check, "distributions", lambda: here)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sys, "argv", ["check.py"])
    assert check.main() == 1
    said = capsys.readouterr().out
    assert said.startswith("not here: h5py, pyarrow. Where there is a network:") and "pip download" in said
    monkeypatch.setattr(sys, "argv", ["check.py", "kernel"])
    assert check.main() == 2 and "there is no section kernel: environment, kernels," in capsys.readouterr().out
