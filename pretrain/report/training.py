"""What the training and the judging sections show: curves, R² beside its baselines, probe scores."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.pages import page
from pretrain.pages.page import Section
from pretrain.probing.scores import errors_that_count
from pretrain.probing.table import cautions
from pretrain.report.ending import last_start
from pretrain.report.figures import Panel, curves, dots
from pretrain.report.parts import ReportedRun, Series, last_step
from pretrain.run import checkpoints
from pretrain.slide_probing.table import heads, judged_in_words, rows_in_words

TILE_LOSSES = [
    ("Total loss", "", ["loss"]),
    ("DINO: class tokens", "", ["dino_global", "dino_local"]),
    ("iBOT: masked patches", "", ["ibot"]),
    ("Spread of features", "KoLeo or KDE", ["spread", "koleo"]),
    ("Gram anchoring: patches' likeness", "", ["gram"]),
]
TILE_COURSE = [
    ("Learning rate", "", ["lr"]),
    ("Weight decay", "", ["weight_decay"]),
    ("Teacher momentum", "", ["momentum"]),
    ("Teacher temperature", "", ["teacher_temperature"]),
    ("Gradient norm", "", ["grad_norm"]),
    ("Throughput", "tiles/s", ["tiles_per_second"]),
    ("Waiting for data", "share", ["data_wait"]),
    ("Peak memory", "GiB", ["peak_memory_gib"]),
    ("FLOP utilisation", "share of the peak", ["flop_utilisation"]),
]
TILE_WATCH = [
    ("Teacher entropy", "nats", ["teacher_entropy/dino", "teacher_entropy/ibot"]),
    ("What a target tells of its tile", "nats", ["teacher_information/dino", "teacher_information/ibot"]),
    ("Prototypes used", "share", ["prototype_use/dino", "prototype_use/ibot"]),
    ("Prototypes in use (perplexity)", "", ["prototype_perplexity/dino", "prototype_perplexity/ibot"]),
    ("RankMe", "", ["rankme", "probe_rankme"]),
    ("Mean cosine of two tiles", "", ["feature_cosine"]),
    ("Spread of features", "1: over the sphere", ["feature_std"]),
    ("Mean cosine of patches", "", ["patch_cosine", "neighbour_cosine", "class_patch_cosine"]),
    ("k-NN accuracy on labelled tiles", "", ["probe_knn", "probe_knn_same_slides"]),
    ("Slide of a tile recognised by k-NN", "", ["slide_knn", "slide_chance"]),
]
UNSHOWN = [("", "", ["look_seconds", "evaluation_seconds", "probe_knn_se", "probe_knn_se_tiles", "probe_groups"])]
SLIDE_COURSE = [
    ("Loss", "", ["loss"]),
    ("Learning rate", "", ["lr"]),
    ("Gradient norm", "", ["grad_norm"]),
    ("Throughput", "slides/s", ["slides_per_second"]),
    ("Tiles in a step", "", ["tiles"]),
    ("Peak memory", "GiB", ["peak_memory_gib"]),
    ("FLOP utilisation", "share of the peak", ["flop_utilisation"]),
]
BASELINES = {
    "r2_neighbours": ("Mean of the nearest visible tiles", "knows that neighbours look alike"),
    "r2_slide_mean": ("Mean of the slide’s visible tiles", "knows the slide’s stain and tissue"),
    "r2_other_tile": ("The other tile of a pair, at its best scale", "knows that tiles that far apart are alike"),
    "r2_dataset_mean": ("Mean of the data set", "knows nothing of the slide"),
}
SLIDE_ALARMS = {"slides recognised", "no tissue learned"}  # alarms
SCHEDULED = {"lr", "weight_decay", "momentum", "teacher_temperature"}  # drawn as they are: they don't scatter
LABELS = {
    "dino_global": "global",
    "dino_local": "local",
    "r2": "slide encoder",
    "rankme": "training tiles",
    "probe_rankme": "labelled tiles",
    "probe_knn": "labelled tiles",
    "probe_knn_same_slides": "same slides",
    "slide_knn": "features",
    "patch_cosine": "any two",
    "neighbour_cosine": "two neighbours",
    "class_patch_cosine": "one and its class token",
    "slide_chance": "a guess",
}


def panels(metrics: Series, wanted: list[tuple[str, str, list[str]]]) -> list[Panel]:
    """A panel for each entry of ``wanted`` (title, unit, metric names) that has anything to show."""
    found = []
    for title, unit, names in wanted:
        lines = {
            LABELS.get(name, name.rpartition("/")[2]): metrics[name]
            for name in names
            if name in metrics and len(metrics[name][0])
        }
        if lines:
            found.append(Panel(title, lines, unit, smooth=not SCHEDULED.intersection(names)))
    return found


def everything_else(metrics: Series, *shown: list[tuple[str, str, list[str]]]) -> list[tuple[str, str, list[str]]]:
    """The metrics that no list shows, those named ``group/part`` together: another objective's losses have a place too.

    What was zero throughout, such as the count of skipped steps, is left out.
    """
    known = {name for wanted in shown for _, _, names in wanted for name in names}
    groups: dict[str, list[str]] = {}
    for name, (_, values) in sorted(metrics.items()):
        if name not in known and np.any(values != 0):
            groups.setdefault(name.partition("/")[0] if "/" in name else name, []).append(name)
    titles = {"grad_norm": "Gradient norm by part"}
    return [(titles.get(group, group.replace("_", " ").capitalize()), "", names) for group, names in groups.items()]


def last(metrics: Series, name: str) -> float | None:
    """The last value of a metric, None where it was never logged."""
    return float(metrics[name][1][-1]) if name in metrics and len(metrics[name][1]) else None


def ends(metrics: Series, name: str) -> tuple[float, float] | None:
    """The mean of the first and of the last tenth of a metric's finite values."""
    values = metrics[name][1][np.isfinite(metrics[name][1])] if name in metrics else np.array([])
    if len(values) < 2:
        return None
    part = max(1, len(values) // 10)
    return float(values[:part].mean()), float(values[-part:].mean())


def tile_section(run: ReportedRun, reading: str) -> Section | None:
    """Losses and the course of a tile run; ``reading``: what its objective says of them."""
    if "loss" not in run.metrics:
        return None
    values = run.metrics["loss"][1]
    text = f"{last_step(run):,} steps are on record."
    if change := ends(run.metrics, "loss"):
        text += (
            f" The total loss went from {change[0]:.3f} to {change[1]:.3f} (means of the first and last tenth)."
            f" {reading}".rstrip()
        )
    bad = int((~np.isfinite(values)).sum())
    if bad:
        text += f" {bad} logged losses are not finite."
    body = alarms_list(run) + page.paragraph(text)
    body += page.figure(
        curves(panels(run.metrics, TILE_LOSSES), columns=2, height=2.4),
        "Pale: as logged. Strong: a running mean.",
        "Losses over steps.",
    )
    taught = any(name.startswith("teacher_") for name in run.metrics)
    if shown := panels(run.metrics, TILE_WATCH):
        body += page.figure(
            curves(shown, columns=4, height=1.75),
            f"{'The teacher’s features and targets' if taught else 'Features'} on the training tiles of a step, and"
            " their k-NN accuracy where labelled tiles were given. Collapse shows as RankMe near 1, a cosine near 1"
            f"{', or targets that tell nothing' if taught else ''}.{about_slides(run)}",
            "Looks at the features.",
        )
    if watched := how_watched(run):
        body += page.fact_list(watched)
    course = TILE_COURSE + everything_else(run.metrics, TILE_LOSSES, TILE_COURSE, TILE_WATCH, UNSHOWN)
    if shown := panels(run.metrics, course):
        body += page.figure(
            curves(shown, columns=4, height=1.75),
            "What was scheduled, and how the machine kept up.",
            "Course of the run.",
        )
    return Section("tile-training", "Training the tile encoder", body)


def about_slides(run: ReportedRun) -> str:
    """What the panel of slides told by k-NN says, and which alarm was raised of it, behind a space."""
    if "slide_knn" not in run.metrics:
        return ""
    raised = [f"“{alarm['alarm']}” at step {alarm['step']:,}" for alarm in run.alarms if alarm["alarm"] in SLIDE_ALARMS]
    text = " A slide that is told better while labelled tiles are told no better is a slide learned by heart"
    return f"{text}: the alarm {' and '.join(raised)} was raised of it." if raised else f"{text}."


def how_watched(run: ReportedRun) -> list[tuple[str, str]]:
    """How the run split its labelled tiles, and why it doesn't say how well slides are told; as its newest start
    has it."""
    return list(last_start(run).get("watched", {}).items())


def alarms_list(run: ReportedRun) -> str:
    """What went wrong while the run trained, in its own words; nothing where nothing did."""
    if not run.alarms:
        return ""
    found = [(f"alarm at step {alarm['step']:,}", f"{alarm['alarm']}: {alarm['says']}") for alarm in run.alarms]
    return page.paragraph("While the run trained, its record raised alarms, each of them once:") + page.fact_list(found)


def slide_section(run: ReportedRun, reading: str) -> Section | None:
    """Loss, R² beside its baselines, and signs of collapse of a slide run; ``reading``: what its objective says of
    them."""
    metrics = run.metrics
    if "loss" not in metrics:
        return None
    r2, text = last(metrics, "r2"), f"{int(metrics['loss'][0][-1]):,} steps are on record. {reading}".rstrip()
    body = alarms_list(run) + page.paragraph(text)
    if r2 is not None:
        body += r2_results(metrics, r2)
    evaluated = {"r2", *BASELINES, "shuffled_rise", "effective_rank"}
    course = SLIDE_COURSE + everything_else(
        {k: v for k, v in metrics.items() if k not in evaluated}, SLIDE_COURSE, UNSHOWN
    )
    body += page.figure(
        curves(panels(metrics, course), columns=4, height=1.75),
        "Pale: as logged. Strong: a running mean.",
        "Course of the run.",
    )
    return Section("slide-training", "Training the slide encoder", body)


def r2_results(metrics: Series, r2: float) -> str:
    """The R² chart and table, and what shuffled coordinates and the effective rank say."""
    lines = {"slide encoder": metrics["r2"]} | {
        BASELINES[name][0]: metrics[name] for name in BASELINES if name in metrics
    }
    chart = curves(
        [Panel("R² of hidden tile embeddings, held out", lines, dashed=set(lines) - {"slide encoder"}, smooth=False)],
        1,
        3.0,
    )
    rows = [("Slide encoder", signed(r2, plus=False), "")]
    for name, (label, knows) in BASELINES.items():
        value = 0.0 if name == "r2_dataset_mean" else last(metrics, name)  # 0 by definition, so it is not logged
        if value is not None:
            rows.append((f"{label} ({knows})", signed(value, plus=False), signed(r2 - value)))
    body = page.figure(
        chart, "Solid: the slide encoder. Dashed: the baselines, which need no training.", "R² over steps."
    )
    body += page.html_table(("At the last evaluation", "R²", "encoder’s lead"), rows, r2_verdict(metrics), ours=0)
    signs = []
    rise, rank = last(metrics, "shuffled_rise"), last(metrics, "effective_rank")
    if rise is not None:
        signs.append(
            f"With the visible tiles’ places shuffled the loss is {100 * abs(rise):.0f} %"
            f" {'higher' if rise >= 0 else 'lower'}: "
            + ("the encoder uses where tiles lie." if rise >= 0.01 else "the encoder makes nothing of where tiles lie.")
        )
    if rank is not None:
        signs.append(f"The effective rank (RankMe) of pooled slide embeddings is {rank:.1f}; 1 would be collapse.")
    return body + (page.paragraph(" ".join(signs)) if signs else "")


def r2_verdict(metrics: Series) -> str:
    """One sentence on whether the slide encoder beats the strongest baseline it was compared with."""
    r2, neighbours = last(metrics, "r2"), last(metrics, "r2_neighbours")
    if r2 is None or neighbours is None:
        return ""
    if r2 > neighbours:
        return (
            f"It beats the mean of the nearest visible tiles by {r2 - neighbours:.3f}: it has learned more than to"
            " average neighbours."
        )
    return (
        f"It is {neighbours - r2:.3f} below the mean of the nearest visible tiles: it has not yet learned more than"
        " that."
    )


def of_what_else(probe: dict[str, Any], run: ReportedRun | None) -> str:
    """A sentence where scores in a tile run's folder are of another run, or of a checkpoint before its newest one."""
    judged, newest = Path(str(probe["encoder"].get("source"))), checkpoints.newest(run.folder) if run else None
    if run is None or newest is None or judged.parent.name != newest.parent.name:
        return ""
    if judged.parent.parent.name != run.folder.resolve().name:
        return f"These scores are of {probe['encoder']['name']}, and not of this run."
    if judged.name != newest.name:
        return f"These scores are of {judged.name}, and this run has come to {newest.name} since."
    return ""


def labels_section(probe: dict[str, Any]) -> Section:
    """Scores of a slide encoder by labels of slides, as 'pretrain probe stage=slide' finds them."""
    who = probe["slide_encoder"]["name"] if probe["slide_encoder"] else "no slide encoder"
    body = page.paragraph(f"{who[0].upper()}{who[1:]}, beside rows that need none: {judged_in_words(probe)}.")
    body += page.html_table(["", *heads(probe)], rows_in_words(probe))
    body += page.sentences([*probe["how"], *probe["labels"]["said"]])
    return Section("labels", "Labels of slides", body)


def probe_section(probe: dict[str, Any], of_another: str = "") -> Section:
    """Probe scores: a chart with error bars, the table, the method; ``of_another``: what else than the run was judged."""
    scores, enough = probe["scores"], errors_that_count(probe["test"].get("groups"))
    chart = dots(
        list(scores),
        {
            "k-NN accuracy": [(got["knn"], got["knn_se"]) for got in scores.values()],
            "Linear accuracy": [(got["linear"], got["linear_se"]) for got in scores.values()],
        },
        {"largest class": probe["chance"]},
        enough,
    )
    rows = [
        (
            name,
            f"{got['width']}",
            f"{got['knn']:.3f} ± {got['knn_se']:.3f}",
            f"{got['linear']:.3f} ± {got['linear_se']:.3f}",
            f"{got['rankme']:.1f}",
        )
        for name, got in scores.items()
    ]
    train, test = probe["train"], probe["test"]
    body = page.paragraph(
        f"Encoder {probe['encoder']['name']}, frozen, on {train['images']:,} training and {test['images']:,} test"
        f" images in {len(probe['classes'])} classes ({probe['split']}). " + probe_verdict(probe)
    )
    body += page.paragraph(of_another) if of_another else ""
    body += page.sentences(cautions(probe))
    body += page.figure(
        chart,
        f"Points: accuracy on the test images. Bars: {enough:.3g} standard errors to each side, 95 % of the time.",
        "Probe scores.",
    )
    body += page.html_table(("Features", "width", "k-NN", "linear", "RankMe"), rows, "±: one standard error.", ours=0)
    method = [("Input", probe["encoder"]["input"])] + [(name, text) for name, text in labelled(probe["method"])]
    body += page.fact_list(method)
    return Section("probe", "Probe scores", body)


def labelled(method: dict[str, str]) -> list[tuple[str, str]]:
    """The method's parts with names for readers."""
    names = {"knn": "k-NN", "linear": "Linear", "rankme": "RankMe", "standard_error": "Standard error"}
    return [(names.get(key, key), text) for key, text in method.items()]


def probe_verdict(probe: dict[str, Any]) -> str:
    """In words, where the encoder stands to its baselines: a gain counts from two standard errors on, and later where
    they are over few groups."""
    parts, enough = [], errors_that_count(probe["test"].get("groups"))
    for baseline, kinds in probe["gains"].items():
        for kind, label in (("knn", "k-NN"), ("linear", "linear")):
            gain, error = kinds[kind]["gain"], kinds[kind]["se"]
            clear = math.isfinite(error) and abs(gain) > enough * error
            place = ("above" if gain > 0 else "below") if clear else "not clearly different"
            parts.append((baseline, label, f"{signed(gain)} ± {error:.3f}", place))
    sentences = []
    for baseline in probe["gains"]:
        mine = [part for part in parts if part[0] == baseline]
        words = " and ".join(f"{place} in {label} ({number})" for _, label, number, place in mine)
        sentences.append(f"Against {'the ' if 'histogram' in baseline else ''}{baseline}: {words}.")
    return " ".join(sentences)


def signed(value: float, plus: bool = True) -> str:
    """A number to three places with a typographer's minus, and a plus where ``plus``."""
    return (f"{value:+.3f}" if plus else f"{value:.3f}").replace("-", "−")
