"""Runs side by side on one page: what differs in their settings, how far they came, how good they are, their curves."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from data.fault import Fault
from data.files import write_whole
from pretrain.pages import page
from pretrain.pages.page import Section
from pretrain.probing.score_file import read_scores
from pretrain.report.ending import last_error
from pretrain.report.figures import LINE_COLOURS, Panel, curves
from pretrain.report.parts import ReportedRun, inputs, last_step, read_run
from pretrain.report.training import ends

ROAD = {"tile", "slide"}  # stages of one road, in folders of these names
JUDGED = {  # figures that tell which run is better, the first that all have; larger is better, or smaller
    "probe_knn": ("k-NN accuracy on labelled tiles", 1),
    "labels_score": ("score on labelled slides", 1),
    "validation_loss": ("loss of held-out data", -1),
    "r2": ("R² of hidden tiles", 1),
    "loss": ("loss", -1),
}
SIDE_BY_SIDE_FIGURES = {
    "loss": "Loss",
    "validation_loss": "Loss of held-out data",
    "probe_knn": "k-NN accuracy on labelled tiles",
    "r2": "R² of hidden tiles",
    "slide_knn": "Slide of a tile recognised by k-NN",
    "rankme": "RankMe",
    "lr": "Learning rate",
    "grad_norm": "Gradient norm",
}
OF_THE_FOLDER = {"run"}  # settings that differ by themselves
MOST_SETTINGS = 6  # columns
OF_ONE_OBJECTIVE = {"loss", "validation_loss"}  # figures that mean something else under another


def runs_in(folder: Path) -> list[ReportedRun]:
    """The runs in a folder that is no run and no road itself, by name; none where there are fewer than two."""
    if (folder / "config.yaml").is_file() or not folder.is_dir():
        return []
    found = sorted(path.parent for path in folder.glob("*/config.yaml"))
    return [read_run(path) for path in found] if len(found) > 1 and not {path.name for path in found} <= ROAD else []


def build_comparison(title: str, runs: Sequence[ReportedRun], out: Path, command: str) -> None:
    """Write the page about ``runs`` to ``out``. Raises Fault for runs of both stages."""
    stages = {"slide" if "embeddings" in inputs(run) else "tile" for run in runs}
    if len(stages) > 1:
        raise Fault("runs of 'pretrain tile' and of 'pretrain slide' have no figures in common: compare them apart.")
    named, differing = dict(zip(_names(runs), runs, strict=True)), differing_settings([run.config for run in runs])
    apart = OF_ONE_OBJECTIVE if len({_objective(run) for run in runs}) > 1 else set()
    judged = next((name for name in JUDGED if name not in apart and all(name in run.metrics for run in runs)), None)
    order, how = list(named), "as they were given: losses of different objectives can’t be compared"
    if judged or not apart:
        judged = judged or "loss"
        words, sign = JUDGED[judged]
        scores = {name: _score(run, judged, sign) for name, run in named.items()}
        order.sort(key=lambda name: (bool(last_error(named[name])), np.isnan(scores[name]), -sign * scores[name]))
        how = f"by their {words}, the best first"
    text = page.document(
        title=title,
        kicker="Slidewright comparison",
        lead=f"{len(runs)} runs of 'pretrain {stages.pop()}', ordered {how}.",
        opening="",
        sections=[
            Section("runs", "Runs", _table(named, order, differing, highlighted=judged is not None)),
            Section("curves", "Side by side", _curves(named, order, apart)),
        ],
        footer=(
            f"Written by <code>{page.escape(command)}</code> on {datetime.now(UTC):%Y-%m-%d %H:%M} UTC. Not a medical"
            " device."
        ),
    )
    write_whole(out, text)


def differing_settings(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The settings, dotted, that aren't the same in all, each with its value in every one; "–" where one hasn't it."""
    flat = [_flat(config) for config in configs]
    names = dict.fromkeys(name for settings in flat for name in settings if name not in OF_THE_FOLDER)
    values = {name: [str(settings.get(name, "–")) for settings in flat] for name in names}
    return {name: found for name, found in values.items() if len(set(found)) > 1}


def _objective(run: ReportedRun) -> str:
    objective = run.config.get("objective")
    return str(objective.get("_target_")) if isinstance(objective, dict) else ""


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def _names(runs: Sequence[ReportedRun]) -> list[str]:
    """The runs' folders, by as few of their last parts as tell them apart."""
    parts = [run.folder.resolve().parts for run in runs]
    for kept in range(1, max(map(len, parts)) + 1):
        names = ["/".join(one[-kept:]) for one in parts]
        if len(set(names)) == len(names):
            return names
    raise Fault("the same run is given twice.")


def _score(run: ReportedRun, name: str, sign: int) -> float:
    """A run's best value of a figure; of the loss, which scatters, the mean of its last tenth."""
    if name not in run.metrics:
        return float("nan")
    values = run.metrics[name][1][np.isfinite(run.metrics[name][1])]
    if name == "loss":
        change = ends(run.metrics, name)
        return change[1] if change else float(values[-1]) if len(values) else float("nan")
    return float(sign * (sign * values).max()) if len(values) else float("nan")


def _table(
    runs: Mapping[str, ReportedRun], order: Sequence[str], differing: Mapping[str, list[str]], highlighted: bool
) -> str:
    """Results first: a narrow window shows the columns that are on the left."""
    shown, places = list(differing)[:MOST_SETTINGS], {name: place for place, name in enumerate(runs)}
    probes = {name: run.folder / "probe.json" for name, run in runs.items()}
    scores = {
        name: read_scores(path, f"write it again with pretrain probe out={path}")["scores"]["encoder"]
        for name, path in probes.items()
        if path.is_file()
    }
    figures = [name for name in JUDGED if any(name in run.metrics for run in runs.values())]
    head = [
        *("Run", "state", "steps"),
        *(f"{'' if name == 'loss' else 'best '}{JUDGED[name][0]}" for name in figures),
        *(("k-NN, probed", "linear, probed") if scores else ()),
        *shown,
    ]
    rows = []
    for place, name in enumerate(order, 1):
        run = runs[name]
        own = [f"{score:.4g}" for score in (_score(run, figure, JUDGED[figure][1]) for figure in figures)]
        probed = (
            [f"{scores[name][kind]:.3f}" if name in scores else "–" for kind in ("knn", "linear")] if scores else []
        )
        rows.append(
            (
                f"{place}. {name}",
                _state(run),
                f"{last_step(run):,}",
                *own,
                *probed,
                *(differing[key][places[name]] for key in shown),
            )
        )
    left = f" {len(differing) - len(shown)} more settings differ: {', '.join(list(differing)[MOST_SETTINGS:])}."
    caption = f"Only settings that differ are shown.{left if len(differing) > len(shown) else ''}"
    return page.html_table(head, rows, caption, ours=0 if highlighted else None)


def _state(run: ReportedRun) -> str:
    """How far a run came, and what its record raised alarms about."""
    wanted = int((run.config.get("optim") or {}).get("steps", 0))
    words = ["done" if last_step(run) >= wanted else f"at {last_step(run) / max(1, wanted):.0%}"]
    if error := last_error(run):
        words = [f"failed {words[0]}: {error.split(': ')[0]}"]
    return ", ".join([*words, *dict.fromkeys(str(alarm["alarm"]) for alarm in run.alarms)])


def _curves(runs: Mapping[str, ReportedRun], order: Sequence[str], apart: set[str]) -> str:
    """A panel for each figure that some run has, but for those that are ``apart``; the first few runs have colours and
    their place in the table, the others are faint."""
    named, rest = order[: len(LINE_COLOURS)], order[len(LINE_COLOURS) :]
    panels = []
    for figure, title in SIDE_BY_SIDE_FIGURES.items():
        has = {name: run.metrics[figure] for name, run in runs.items() if figure in run.metrics}
        lines = {str(place): has[name] for place, name in enumerate(named, 1) if name in has}
        faint = {name: has[name] for name in rest if name in has}
        if has and figure not in apart:
            panels.append(Panel(title, lines, smooth=figure in ("loss", "grad_norm"), faint=faint))
    words = f"Numbers are the runs' places in the table{'; those behind are faint' if rest else ''}."
    return page.figure(curves(panels, columns=2, height=2.6), words, "The same figures of all runs, over steps.")
