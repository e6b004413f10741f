"""A run's folder: named by the user, and all that a run leaves behind.

    runs/<name>/  config.yaml  provenance.json  metrics.jsonl  checkpoints/  samples/  report.html

Running the same command on it resumes it. Settings other than those of its newest checkpoint are refused with the
difference, because a run that silently went on under others could never be explained; ``allow_changes=true`` lets them
through, and provenance.json keeps what changed. The folders of the data may be others, if its digest says that it is
the same; and so may the places of what an objective was given, a teacher's, if their hashes do.

What is private in a URL is written nowhere (`data.redaction`), and compared without it: a new token is not a change.
"""

import hashlib
import json
import platform
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from data.fault import Fault
from data.files import make_folder, write_whole
from data.lease import Lease, alone
from data.redaction import redacted, redacted_settings
from pretrain.run import checkpoints, signals
from pretrain.run.launched import rank
from pretrain.run.progress import say

REPLAY = "replay"
"""In a run's folder: networks before its last skipped step, and what replays found."""

# What may differ between two starts of one run: where and how fast it runs and what it says, not what it computes.
FREE = re.compile(
    r"trainer\.(?!precision$)|wandb\.|watch\.|run$|allow_(changes|plugins)$|resume$|data\.(threads|processes_per_slide)$|model\.attention$"
)
# Where the data lies. What it is, its digest says.
PLACE_SETTINGS = re.compile(r"data\.(members\.[^.]+\.)?(shards|slides|slides_share|grids|embeddings|sample)$")
RECORDED_PACKAGES = (
    "slidewright",
    "torch",
    "torchvision",
    "lightning",
    "timm",
    "webdataset",
    "openslide-python",
    "numpy",
)


@contextmanager
def held(run: Path) -> Iterator[Lease | None]:
    """Hold a run's folder for the processes of this run while a block runs; the first of them does, and has the lease.

    Raises Fault, which ends the others too, where another job is training there.
    """
    if rank():
        yield None
        return
    with alone(run, doing="another job", while_waiting=signals.heed) as lease:
        yield lease


def open_run(run: Path, config: Any, first_rank: bool, data: str = "", givens: Mapping[str, str] | None = None) -> str:
    """Create or reopen a run's folder for ``config`` (a dataclass); returns the configuration's hash.

    Rank 0 writes ``config.yaml`` and adds a start, on the data of this digest, to ``provenance.json``. Raises Fault
    where the folder holds a run of another configuration, with what differs, unless ``config.allow_changes``.
    ``givens``: as in `allowed_changes`.
    """
    settings = redacted_settings(asdict(config))
    changes, shown = allowed_changes(run, config, data, givens)
    if changes and first_rank:
        say(f"{run} goes on under other settings: {shown}")
    if first_rank:
        for name in ("checkpoints", "samples"):
            make_folder(run / name)
        write_whole(run / "config.yaml", yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
        _add_start(run, data, changes)
    return digest(settings)


def allowed_changes(
    run: Path, config: Any, data: str | None, givens: Mapping[str, str] | None = None
) -> tuple[dict[str, tuple[Any, Any]], str]:
    """What ``config`` changes of the run in a folder, and the same in words. Raises Fault unless
    ``config.allow_changes``.

    ``data``: the digest of its data, ``givens``: the hashes of what its objective was given, by the settings that name
    it; None where nobody read them, and then their places aren't judged.
    """
    changes = _changes(run, redacted_settings(asdict(config)), data, givens)
    listed = [f"{key}: {before} → {now}" for key, (before, now) in changes.items()]
    shown = "; ".join(listed[:8]) + (" …" if len(listed) > 8 else "")
    if changes and not config.allow_changes:
        raise Fault(
            f"{run} holds a run with other settings ({shown}); give another run=, or the same settings, or "
            "allow_changes=true to go on under these."
        )
    return changes, shown


def _changes(
    run: Path, settings: dict[str, Any], data: str | None, givens: Mapping[str, str] | None
) -> dict[str, tuple[Any, Any]]:
    """What differs between the settings of a run's newest checkpoint (or its ``config.yaml``) and ``settings``: before
    and now.

    Where the data lies is no difference, if that was of the digest ``data`` too; nor where something lies that the
    checkpoint's hash says is the same.
    """
    newest, path = checkpoints.newest(run), run / "config.yaml"
    state = checkpoints.read_state(newest) if newest else {}
    last, data_before = state.get("settings"), state.get("data")
    if last is None and path.exists() and path.stat().st_size:
        last = read_config(run)
    if last is None:
        return {}
    if data_before is None and (starts := read_starts(run)):
        data_before = starts[-1].get("data")
    same_data = data is None or (data != "" and data_before == data)
    before, now = flat(redacted_settings(last)), flat(settings)
    differing = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    free = [key for key in differing if FREE.match(key) or (same_data and PLACE_SETTINGS.match(key))]
    free += [name for name, hash in givens_of(state).items() if givens is None or givens.get(name) == hash]
    return {key: (before.get(key), now.get(key)) for key in differing if key not in free}


def givens_of(state: Mapping[str, Any]) -> dict[str, str]:
    """The hashes of what a checkpoint's objective was given, by the settings that name it. Checkpoints of before have
    the settings' values there too, behind a =."""
    return {name.partition("=")[0]: hash for name, hash in state.get("rests_on", {}).items()}


def digest(settings: dict[str, Any]) -> str:
    """A hash of everything in a configuration that changes what a run computes, but for its data, which has a digest of
    its own."""
    kept = {
        key: value for key, value in flat(settings).items() if not FREE.match(key) and not PLACE_SETTINGS.match(key)
    }
    bound = dict(sorted(kept.items()))
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


def read_config(run: Path) -> dict[str, Any]:
    """A run's resolved configuration. Raises Fault where ``run`` is no run's folder. It may be anybody's: see
    `pretrain.settings.plugins.locate_class`."""
    path = run / "config.yaml"
    if not path.exists():
        raise Fault(f"{run} is not a run's folder: it has no config.yaml.")
    try:
        config = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        config = f"damaged ({' '.join(str(error).split())})"
    if isinstance(config, dict):
        return redacted_settings(config)
    whole = checkpoints.newest_whole(run)
    settings = checkpoints.read_state(whole).get("settings") if whole else None
    wrong = f"{path} is {config or 'empty'}"
    if settings is None:
        raise Fault(f"{wrong}, and no checkpoint there says its settings: put the file back as it was.")
    say(f"{wrong}; the settings are taken from {whole}")
    return redacted_settings(settings)


def read_starts(run: Path) -> list[dict[str, Any]]:
    """The starts that ``provenance.json`` lists, oldest first; none where there is no such file, or a damaged one."""
    path = run / "provenance.json"
    try:
        return redacted_settings(json.loads(path.read_text())["starts"]) if path.exists() else []
    except (ValueError, KeyError, TypeError):
        return []


def _add_start(run: Path, data: str, changes: dict[str, tuple[Any, Any]]) -> None:
    path = run / "provenance.json"
    starts = read_starts(run)
    if not starts and path.exists():
        aside = path.with_name(f"{path.name}.damaged")
        path.replace(aside)
        say(f"{path} is damaged: it is kept as {aside}, and begun anew")
    starts.append(
        {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": redacted_settings(["pretrain", *sys.argv[1:]]),
            "host": platform.node(),
            "data": data,
            **({"changes": changes} if changes else {}),
            **software(),
        }
    )
    write_whole(path, json.dumps({"starts": starts}, indent=1))


def note_of_start(run: Path, facts: dict[str, Any]) -> None:
    """Add what was found while a run began to the newest start that ``provenance.json`` lists."""
    if starts := read_starts(run):
        starts[-1] |= facts
        write_whole(run / "provenance.json", json.dumps({"starts": starts}, indent=1))


@contextmanager
def noting_how_it_ended(run: Path) -> Iterator[None]:
    """Note, with the start that is made while a block runs, what ended it if it was no end of its own: an error's
    sentence. The first process does."""
    before = len(read_starts(run))

    def note(how: str) -> None:
        if not rank() and len(read_starts(run)) > before:
            note_of_start(run, {"ended_by": redacted(how)})

    try:
        yield
    except Fault as fault:
        note(str(fault))
        raise
    except Exception as error:
        note("".join(traceback.format_exception_only(error)).strip())
        raise


def software() -> dict[str, Any]:
    """What computes: the versions of Python and of the packages that matter, and this checkout's revision."""
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in RECORDED_PACKAGES},
        "git": _git_revision(),
    }


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
