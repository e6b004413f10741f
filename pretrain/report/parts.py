"""What there is to report: a tile run, a slide run, or a folder that holds the whole road."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.fault import Fault
from data.redaction import redacted_settings
from pretrain.probing.score_file import scores_in
from pretrain.run.folder import read_config
from pretrain.run.metrics import thinned
from pretrain.run.progress import say

Series = dict[str, tuple[np.ndarray, np.ndarray]]
"""Of each metric its steps int64 (n,) and its values float64 (n,)."""


@dataclass(frozen=True)
class ReportedRun:
    """A training run's folder and what it recorded."""

    folder: Path
    config: dict[str, Any]
    provenance: dict[str, Any]
    metrics: Series
    samples: list[Path]
    alarms: list[dict[str, Any]]  # lines of metrics.jsonl: step, alarm, since, says


@dataclass(frozen=True)
class Parts:
    """The parts of the road that were found; None for those that weren't."""

    folder: Path
    tile: ReportedRun | None
    slide: ReportedRun | None
    shards: Path | None
    embeddings: Path | None
    probe: dict[str, Any] | None  # scores by labels of tiles
    slide_probe: dict[str, Any] | None  # and of slides


def find_parts(run: Path, shards: Path | None, embeddings: Path | None, probe: Path | None) -> Parts:
    """Find what ``run`` is and what belongs to it; a part that is given by the caller wins over the one that was found.

    Raises `Fault` when ``run`` is no run and holds none, or a given part isn't there.
    """
    for given in (shards, embeddings, probe):
        if given is not None and not given.exists():
            raise Fault(f"there is no {given}")
    tile = slide = None
    if (run / "config.yaml").is_file():
        found = read_run(run)
        tile, slide = (None, found) if "embeddings" in inputs(found) else (found, None)
    else:
        tile = read_run(run / "tile") if (run / "tile" / "config.yaml").is_file() else None
        slide = read_run(run / "slide") if (run / "slide" / "config.yaml").is_file() else None
    parts = Parts(
        folder=run,
        tile=tile,
        slide=slide,
        shards=shards or first_folder(run / "shards", tile and inputs(tile).get("shards")),
        embeddings=embeddings or first_folder(run / "embeddings", slide and inputs(slide).get("embeddings")),
        probe=first_of(0, probe, run / "probe.json", run / "tile" / "probe.json"),
        slide_probe=first_of(1, probe, run / "probe.json", run / "slide" / "probe.json"),
    )
    if not any((parts.tile, parts.slide, parts.shards, parts.embeddings, parts.probe, parts.slide_probe)):
        raise Fault(
            f"{run} holds nothing to report: give a run's folder, or a folder that holds shards/, tile/, embeddings/ or"
            " slide/"
        )
    return parts


def inputs(run: ReportedRun) -> dict[str, Any]:
    """The run's ``data`` settings."""
    data = run.config.get("data")
    return data if isinstance(data, dict) else {}


def last_step(run: ReportedRun) -> int:
    """The last step on record."""
    return max((int(steps[-1]) for steps, _ in run.metrics.values() if len(steps)), default=0)


def first_folder(*candidates: object) -> Path | None:
    """The first candidate that is a folder; a candidate may be a path, a list of them, or nothing."""
    for candidate in candidates:
        for one in candidate if isinstance(candidate, list) else [candidate]:
            if one and Path(str(one)).is_dir():
                return Path(str(one))
    return None


def read_run(folder: Path) -> ReportedRun:
    """A run's configuration, provenance, metrics and sample pictures."""
    provenance = folder / "provenance.json"
    records = thinned(folder)
    return ReportedRun(
        folder=folder,
        config=read_config(folder),
        provenance=_read_provenance(provenance),
        metrics=series(records),
        samples=sorted((folder / "samples").glob("*.png")),
        alarms=[record for record in records if "alarm" in record],
    )


def _read_provenance(path: Path) -> dict[str, Any]:
    try:
        return redacted_settings(json.loads(path.read_text())) if path.is_file() else {}
    except ValueError as error:
        say(f"{path} is damaged ({error}); the page does without it")
        return {}


def series(records: list[dict[str, Any]]) -> Series:
    """The records of ``metrics.jsonl`` by metric, in order of steps; of a step that was recorded twice the later one
    counts."""
    by_name: dict[str, dict[int, float]] = {}
    for record in records:
        for name, value in record.items():
            if name not in ("step", "since") and isinstance(value, int | float) and not isinstance(value, bool):
                by_name.setdefault(name, {})[int(record["step"])] = float(value)
    return {
        name: (np.array(sorted(values), dtype=np.int64), np.array([values[step] for step in sorted(values)]))
        for name, values in by_name.items()
    }


def first_of(kind: int, *candidates: Path | None) -> dict[str, Any] | None:
    """The first of the files' scores of one `scores_in` kind."""
    found = (scores_in(path)[kind] for path in candidates if path is not None)
    return next((scores for scores in found if scores is not None), None)
