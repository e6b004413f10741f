"""A slide probe as one HTML page: the table, ROC curves, and the slides on two principal components."""

from typing import Any

import numpy as np
from sklearn.decomposition import PCA
from sklearn.metrics import roc_curve
from sklearn.preprocessing import StandardScaler

from pretrain.pages.drawing import FAINT, LINE_COLOURS, WIDTH, charts, pyplot, svg
from pretrain.pages.page import Section, document, figure, html_table, paragraph, sentences
from pretrain.slide_probing.answer import (
    ATTENTION_ROW,
    ENCODER_ROW,
    MEAN_ROW,
    RANDOM_ROW,
    Answers,
)
from pretrain.slide_probing.judge import Judged
from pretrain.slide_probing.labels import LabelledSlides
from pretrain.slide_probing.table import heads, rows_in_words
from pretrain.slide_probing.vectors import DEFAULT_POOLING

PANELS_ACROSS, MOST_PANELS = 3, 6  # of ROC curves
LINES = ("-", "--", ":")  # of the first rows, of those after them
MOST_COLOURS = 10  # of classes; further ones are grey
SMOOTHED_STD_ROW = "mean + std + smoothed std"
CURVES = (
    MEAN_ROW,
    SMOOTHED_STD_ROW,
    ATTENTION_ROW,
    *(f"{row}, {way}" for row in (ENCODER_ROW, RANDOM_ROW) for way in (DEFAULT_POOLING, "fine-tuned")),
)


def slide_probe_page(result: dict[str, Any], found: Answers) -> str:
    """The whole page."""
    labels = result["labels"]
    sections = [
        Section(
            "rows",
            "What each kind of vector tells",
            html_table(["", *heads(result)], rows_in_words(result))
            + sentences([*result["how"], *result["labels"]["said"]]),
        )
    ]
    if labels["kind"] == "classes":
        curves = _roc(found)
        caption = "All that was judged, of all rounds together."
        if len(labels["classes"]) > 2:
            caption = f"Each class against all others, the {MOST_PANELS} most frequent ones at most. {caption}"
        sections.append(Section("roc", "ROC curves", figure(curves, caption)))
    pictures = [
        _components(found, name) for name in (MEAN_ROW, f"{ENCODER_ROW}, {DEFAULT_POOLING}") if name in found.vectors
    ]
    shown = charts(pictures, 2)
    caption = "The first two principal components of the standardised vectors, coloured by label."
    sections.append(Section("slides", "The slides", figure(shown, caption)))
    who = result["slide_encoder"]["name"] if result["slide_encoder"] else "no slide encoder"
    return document(
        "Of use?",
        "Slidewright slide probe",
        f"{labels['slides']} slides of {labels['cases']} cases: {who}, beside rows that need none.",
        "",
        sections,
        paragraph("The JSON beside this page has every figure."),
    )


def _roc(found: Answers) -> str:
    """Of two classes, of the second; of more, of each against the rest: an SVG each."""
    labelled = found.judge.labelled
    two = len(labelled.classes) == 2
    shown = [1] if two else _most_frequent(labelled, MOST_PANELS)
    across = min(max(2, len(shown)), PANELS_ACROSS)
    drawn = []
    for code in shown:
        figure, axes = pyplot().subplots(figsize=(WIDTH / across, WIDTH / across), layout="constrained")
        for number, name in enumerate(row for row in CURVES if row in found.rows):
            truth, score = _together(found, found.rows[name], code)
            false, true, _ = roc_curve(truth, score)
            colour, line = LINE_COLOURS[number % len(LINE_COLOURS)], LINES[number // len(LINE_COLOURS)]
            axes.plot(false, true, label=name, linewidth=1.4, color=colour, linestyle=line)
        axes.plot([0, 1], [0, 1], color=FAINT, linewidth=0.8, linestyle="--")
        axes.set(xlabel="False positive rate", ylabel="True positive rate", aspect="equal")
        other = labelled.classes[0] if two else "all others"
        axes.set_title(_plain(f"{labelled.classes[code]} against {other}"))
        axes.legend(fontsize=7, loc="lower right")
        drawn.append(svg(figure))
    return charts(drawn, across)


def _together(found: Answers, judged: Judged, code: int) -> tuple[np.ndarray, np.ndarray]:
    """Who is of a class (n,), and with which share of it, of all rounds."""
    values = found.judge.labelled.values
    truth = np.concatenate([values[who] == code for _, who in found.judge.rounds])
    return truth, np.concatenate([shares[:, code] for shares in judged.predictions])


def _components(found: Answers, name: str) -> str:
    labelled = found.judge.labelled
    scaled = StandardScaler().fit_transform(found.vectors[name])
    components = min(2, *scaled.shape)
    places = np.zeros((len(scaled), 2))  # what has one dimension lies on a line
    places[:, :components] = PCA(components).fit_transform(scaled)
    drawn, axes = pyplot().subplots(figsize=(WIDTH / 2, 3.6), layout="constrained")
    if labelled.kind == "classes":
        named = _most_frequent(labelled, MOST_COLOURS)
        rest = ~np.isin(labelled.values, named)
        if rest.any():
            axes.scatter(places[rest, 0], places[rest, 1], s=14, alpha=0.5, c="#bbbbbb", label="other classes")
        for code in named:
            across, up = places[labelled.values == code].T
            axes.scatter(across, up, s=14, alpha=0.75, label=_plain(labelled.classes[code]))
        drawn.legend(frameon=False, fontsize=8, loc="outside right upper")
    else:
        value = labelled.values if labelled.kind == "number" else labelled.values[:, 0]
        drawn.colorbar(axes.scatter(places[:, 0], places[:, 1], s=14, c=value), ax=axes)
    axes.set(title=name, xticks=[], yticks=[])
    return svg(drawn)


def _most_frequent(labelled: LabelledSlides, most: int) -> list[int]:
    """The classes of most cases, by number, in their order."""
    return sorted(np.argsort(-np.bincount(labelled.values), kind="stable")[:most].tolist())


def _plain(text: str) -> str:
    """As matplotlib takes it for no formula."""
    return text.replace("$", r"\$")
