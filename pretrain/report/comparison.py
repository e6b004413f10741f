"""Runs side by side on one page: what differs in their settings, how far they came, how good they are, their curves."""

import re
import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from data.fault import Fault
from data.files import write_whole
from pretrain.pages import page
from pretrain.pages.drawing import LINE_COLOURS
from pretrain.pages.page import Section
from pretrain.probing.score_file import scores_in
from pretrain.report.ending import last_error, last_start
from pretrain.report.figures import Panel, curves
from pretrain.report.parts import ReportedRun, inputs, last_step, read_run
from pretrain.report.training import ends
from pretrain.settings.shell_words import key_of
from pretrain.slide_probing.answer import ENCODER_ROW
from pretrain.slide_probing.vectors import DEFAULT_POOLING

ROAD = {"tile", "slide"}  # stages of one road, in folders of these names
JUDGED = {  # figures that tell which run is better, the first that all have; larger is better, or smaller
    "probe_knn": ("k-NN accuracy on labelled tiles", 1),
    "probed_knn": ("k-NN, probed", 1),
    "probed_linear": ("linear, probed", 1),
    "labels_score": ("score on labelled slides", 1),
    "probed_labels": ("labels of slides, probed", 1),
    "validation_loss": ("loss of held-out data", -1),
    "r2": ("R² of hidden tiles", 1),
    "loss": ("loss", -1),
}
PROBED = {  # in a run's probe.json, by their names there
    "probed_knn": "knn",
    "probed_linear": "linear",
    "probed_labels": f"{ENCODER_ROW}, {DEFAULT_POOLING}",
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
OF_THE_FOLDER = {"run", "launch"}  # settings that differ by themselves, or for the machine
MOST_SETTINGS = 6  # columns
OF_ONE_OBJECTIVE = {"loss", "validation_loss", "grad_norm"}  # figures that mean something else under another
NOT_COMPARED = "losses of different objectives or data can’t be compared"
SOURCES = ("data.shards", "data.slides", "data.files", "data.embeddings", "data.members")  # settings that name the data


def runs_in(folder: Path) -> list[ReportedRun]:
    """The runs in a folder that is no run and no road itself, by name."""
    if (folder / "config.yaml").is_file() or not folder.is_dir():
        return []
    found = sorted(path.parent for path in folder.glob("*/config.yaml"))
    return [read_run(path) for path in found] if not {path.name for path in found} <= ROAD else []


def runs_named(words: Sequence[str]) -> list[ReportedRun]:
    """The runs that words name, a sweep's folder all of its runs. A name with commas, as those of a sweep's runs are,
    may have been taken apart at them. Raises Fault for what is neither."""
    found, rest = [], list(words)
    while rest:
        names = [",".join(rest[:count]) for count in range(1, len(rest) + 1)]
        count = next((i for i, name in enumerate(names, 1) if (Path(name) / "config.yaml").is_file()), 1)
        folder, rest = Path(names[count - 1]), rest[count:]
        found += runs_in(folder) or [read_run(folder)]
    return found


def build_comparison(title: str, runs: Sequence[ReportedRun], out: Path, command: str) -> None:
    """Write the page about ``runs`` to ``out``. Raises Fault for runs of both stages."""
    stages = {"slide" if "embeddings" in inputs(run) else "tile" for run in runs}
    if len(stages) > 1:
        raise Fault("runs of 'pretrain tile' and of 'pretrain slide' have no figures in common: compare them apart.")
    named = dict(zip(_names(runs), runs, strict=True))
    apart = set() if len({_learned(run) for run in runs}) == 1 else set(OF_ONE_OBJECTIVE)
    apart |= set() if len(_questions(runs)) <= 1 else set(PROBED)
    results = {figure: found for figure in JUDGED if (found := _results(named, figure))}
    sound = [name for name, run in named.items() if not last_error(run)]
    judged = next((figure for figure in results if figure not in apart and set(sound) <= results[figure].keys()), None)
    order, how = sound, f"as they were given: {NOT_COMPARED}"
    if sound and (judged or not apart & OF_ONE_OBJECTIVE):
        judged = judged or "loss"
        scores, (words, sign) = results.get(judged, {}), JUDGED[judged]
        order = sorted(sound, key=lambda name: -sign * scores.get(name, -sign * np.inf))
        how = f"by their {words}, the best first"
        how += "" if len({last_step(named[name]) for name in sound}) == 1 else ", though not all are equally far"
    order = [*order, *(name for name in named if name not in sound)]
    how += "; their probes asked different questions" if apart & PROBED.keys() else ""
    how += "; those that failed stand last" if len(sound) < len(named) else ""
    best = order[0] if judged and order[0] in results.get(judged, {}) and sound else None
    text = page.document(
        title=title,
        kicker="Slidewright comparison",
        lead=f"{len(runs)} runs of 'pretrain {stages.pop()}', ordered {how}.",
        opening="",
        sections=[
            Section("runs", "Runs", _table(named, order, results, best) + _failures(named)),
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


def _learned(run: ReportedRun) -> tuple[str, ...]:
    """What a run learns, and from what: losses of others can't be held beside its own."""
    settings = _flat(run.config)
    named = (value for name, value in settings.items() if name.startswith(SOURCES))
    return (str(settings.get("objective._target_")), *map(str, named))


def _questions(runs: Sequence[ReportedRun]) -> set[str]:
    """What the runs' probes asked: of which images, in which classes, taught by which others."""
    asked = [found for run in runs for found in scores_in(run.folder / "probe.json") if found is not None]
    return {
        str([one.get(name) for name in ("train", "test", "classes", "split", "labels", "measure")]) for one in asked
    }


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


def _results(runs: Mapping[str, ReportedRun], figure: str) -> dict[str, float]:
    """The best finite value of a figure of each run that has one; of the loss, which scatters, the mean of its last
    tenth."""
    found, sign = {}, JUDGED[figure][1]
    for name, run in runs.items():
        change = ends(run.metrics, figure) if figure == "loss" else None
        if change:
            found[name] = change[1]
        elif values := _values(run, figure):
            found[name] = values[-1] if figure == "loss" else sign * max(sign * value for value in values)
    return found


def _values(run: ReportedRun, figure: str) -> list[float]:
    """The finite values of a figure that are on record, or the one in the run's probe.json."""
    if figure not in PROBED:
        values = run.metrics[figure][1] if figure in run.metrics else np.array([])
        return [float(value) for value in values[np.isfinite(values)]]
    of_tiles, of_slides = scores_in(run.folder / "probe.json")
    if of_tiles is not None and figure != "probed_labels":
        return [float(of_tiles["scores"]["encoder"][PROBED[figure]])]
    row = of_slides["rows"].get(PROBED[figure]) if of_slides is not None else None
    value = row[of_slides["measure"]]["value"] if of_slides is not None and row is not None else None
    return [] if value is None else [float(value)]


def _asked_for(runs: Sequence[ReportedRun], differing: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """What the command lines of runs say unlike: a sweep's own keys, and a recipe in place of all that it sets."""
    said = [
        {key_of(word): word.partition("=")[2] for word in map(str, last_start(run).get("command") or []) if "=" in word}
        for run in runs
    ]
    settings = set().union(*(_flat(run.config) for run in runs))
    found = {}
    for key in dict.fromkeys(key for words in said for key in words if key not in OF_THE_FOLDER):
        values = differing.get(key) or [words.get(key, "–") for words in said]
        is_choice = "." not in key and key not in settings
        if key in differing or (is_choice and len(set(values)) > 1):
            found[key] = values
    return found


def _table(
    runs: Mapping[str, ReportedRun], order: Sequence[str], results: Mapping[str, Mapping[str, float]], best: str | None
) -> str:
    """Results first: a narrow window shows the columns that are on the left. Then what was asked for; what else differs
    is folded."""
    differing = differing_settings([run.config for run in runs.values()])
    columns = dict(list((_asked_for(list(runs.values()), differing) or differing).items())[:MOST_SETTINGS])
    rest, places = [key for key in differing if key not in columns], [list(runs).index(name) for name in order]
    numbered = {name: f"{place}. {name}" for place, name in enumerate(order, 1)}
    head = [
        *("Run", "state", "steps"),
        *(JUDGED[figure][0] if figure in ("loss", *PROBED) else f"best {JUDGED[figure][0]}" for figure in results),
        *columns,
    ]
    rows = [
        [
            *(numbered[name], _state(runs[name]), f"{last_step(runs[name]):,}"),
            *(f"{found[name]:.4g}" if name in found else "–" for found in results.values()),
            *(values[place] for values in columns.values()),
        ]
        for name, place in zip(order, places, strict=True)
    ]
    body = page.html_table(head, rows, ours=order.index(best) if best else None)
    if rest:
        settings = [[key, *(differing[key][place] for place in places)] for key in rest]
        count = f"{len(rest)} {'more ' if columns else ''}setting{'s differ' if len(rest) > 1 else ' differs'}"
        body += page.folded(count, page.html_table(["Setting", *numbered.values()], settings))
    return body


def _failures(runs: Mapping[str, ReportedRun]) -> str:
    """What failed, why in a sentence, and the command that tells more."""
    told = []
    for name, run in runs.items():
        if why := last_error(run):
            first = re.split(r"(?<=[.!?])\s|;\s|\n", why)[0].rstrip(".")
            told.append((f"{name} failed: {first}.", shlex.join(["pretrain", "report", f"run={run.folder}"])))
    return page.missing(told) if told else ""


def _state(run: ReportedRun) -> str:
    """How far a run came, and what its record raised alarms about."""
    wanted = int((run.config.get("optim") or {}).get("steps", 0))
    share = f"at {last_step(run) / max(1, wanted):.0%}"
    state = f"failed {share}" if last_error(run) else "done" if last_step(run) >= wanted else share
    return ", ".join([state, *dict.fromkeys(str(alarm["alarm"]) for alarm in run.alarms)])


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
    if apart:
        words += f" Losses and the norms of their gradients are left out: {NOT_COMPARED}."
    return page.figure(curves(panels, columns=2, height=2.6), words, "The same figures of all runs, over steps.")
