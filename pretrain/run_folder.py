"""A run's folder: named by the user, and all that a run leaves behind.

    runs/<name>/  config.yaml  provenance.json  metrics.jsonl  checkpoints/  samples/  report.html

Running the same command on it resumes it. A changed configuration is refused with the difference, because a run that
silently went on under other settings could never be explained.
"""

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from data.fault import Fault

# What may differ between two starts of one run: where and how fast it runs and what it says, not what it computes.
FREE = re.compile(
    r"trainer\.(?!precision$)|wandb\.|watch\.|run$|data\.(threads|processes_per_slide)$|model\.attention$"
)
PACKAGES = ("slidewright", "torch", "torchvision", "lightning", "timm", "webdataset", "openslide-python", "numpy")


def open_run(run: Path, config: Any, first_rank: bool) -> str:
    """Create or reopen a run's folder for ``config`` (a dataclass); returns the configuration's hash.

    Rank 0 writes ``config.yaml`` and adds a start to ``provenance.json``. Raises Fault where the folder holds a run of
    another configuration, with what differs.
    """
    settings = asdict(config)
    path = run / "config.yaml"
    if path.exists():
        before = flat(yaml.safe_load(path.read_text()))
        now = flat(settings)
        changed = sorted(
            key for key in before.keys() | now.keys() if before.get(key) != now.get(key) and not FREE.match(key)
        )
        if changed:
            shown = "; ".join(f"{key}: {before.get(key)} → {now.get(key)}" for key in changed[:8])
            raise Fault(
                f"{run} holds a run with other settings ({shown}{' …' if len(changed) > 8 else ''}); give another run=, or the same settings."
            )
    if first_rank:
        for name in ("checkpoints", "samples"):
            (run / name).mkdir(parents=True, exist_ok=True)
        write(path, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
        _add_start(run)
    return digest(settings)


def digest(settings: dict[str, Any]) -> str:
    """A hash of everything in a configuration that changes what a run computes."""
    bound = {key: value for key, value in sorted(flat(settings).items()) if not FREE.match(key)}
    return hashlib.blake2b(json.dumps(bound).encode(), digest_size=12).hexdigest()


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one dictionary with dotted keys; tuples become lists, as YAML has them."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return found


def write(path: Path, text: str) -> None:
    """Replace a small file in one step: whole or as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


def read_config(run: Path) -> dict[str, Any]:
    """A run's resolved configuration. Raises Fault where ``run`` is no run's folder."""
    path = run / "config.yaml"
    if not path.exists():
        raise Fault(f"{run} is not a run's folder: it has no config.yaml.")
    return yaml.safe_load(path.read_text())


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The records of ``metrics.jsonl``, oldest first; a last line that a kill cut short is left out."""
    path = run / "metrics.jsonl"
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def rewind_metrics(run: Path, step: int) -> None:
    """Drop what was recorded after ``step``: the steps that are about to be taken again."""
    kept: Iterable[dict[str, Any]] = [record for record in read_metrics(run) if record["step"] <= step]
    write(run / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in kept))


def _add_start(run: Path) -> None:
    path = run / "provenance.json"
    starts = json.loads(path.read_text())["starts"] if path.exists() else []
    starts.append(
        {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": ["pretrain", *sys.argv[1:]],
            "host": platform.node(),
            "python": platform.python_version(),
            "packages": {name: _version(name) for name in PACKAGES},
            "git": _git_revision(),
        }
    )
    write(path, json.dumps({"starts": starts}, indent=1))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _git_revision() -> str:
    here = Path(__file__).resolve().parent
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=here, capture_output=True, text=True
        )
    except FileNotFoundError:
        return "git is not installed"
    return answer.stdout.strip() or "not a git checkout"
