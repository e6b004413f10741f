"""A slide probe as one HTML page: the table, ROC curves, and the slides on two principal components."""

import io
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.metrics import roc_curve
from sklearn.preprocessing import StandardScaler

from pretrain.pages.page import Section, document, figure, html_table, pair, paragraph, picture_tag
from pretrain.slide_probing.answer import ATTENTION_ROW, MEAN_ROW, Answers
from pretrain.slide_probing.judge import Judged
from pretrain.slide_probing.table import TITLES, with_interval

SMOOTHED_STD_ROW = "mean + std + smoothed std"
CURVES = (MEAN_ROW, SMOOTHED_STD_ROW, ATTENTION_ROW, "slide encoder, mean + std", "random weights, mean + std")


def slide_probe_page(result: dict[str, Any], found: Answers) -> str:
    """The whole page."""
    labels, measures = result["labels"], result["measures"]
    head = ["", *(f"{TITLES[name]} (95 % interval)" for name in measures), "above the mean of tiles"]
    rows = []
    for name, row in result["rows"].items():
        first = row[result["measure"]]
        cells = [with_interval(row[measure]["value"], row[measure]["interval"]) for measure in measures]
        rows.append([name, *cells, with_interval(first["above_mean"], first["above_mean_interval"], "+")])
    sections = [Section("rows", "What each kind of vector tells", html_table(head, rows) + _said(result))]
    if labels["kind"] == "classes" and len(labels["classes"]) == 2:
        curves = picture_tag(_roc(found), "ROC curves of the rows")
        sections.append(Section("roc", "ROC curves", figure(curves, "All that was judged, of all rounds together.")))
    pictures = [_components(found, name) for name in (MEAN_ROW, "slide encoder, mean + std") if name in found.vectors]
    shown = pair(*(picture_tag(picture, "Slides on two principal components") for picture in pictures))
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


def _said(result: dict[str, Any]) -> str:
    return "".join(paragraph(f"{sentence}.") for sentence in [*result["how"], *result["labels"]["said"]])


def _roc(found: Answers) -> Image.Image:
    drawn = Figure(figsize=(5.4, 5), dpi=110, layout="constrained")
    axes = drawn.subplots()
    for name in CURVES:
        if name in found.rows:
            truth, score = _together(found, found.rows[name])
            false, true, _ = roc_curve(truth, score)
            axes.plot(false, true, label=name, linewidth=1.4)
    axes.plot([0, 1], [0, 1], color="#999999", linewidth=0.8, linestyle="--")
    axes.set(xlabel="False positive rate", ylabel="True positive rate", aspect="equal")
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    return _image(drawn)


def _together(found: Answers, judged: Judged) -> tuple[np.ndarray, np.ndarray]:
    values = found.judge.labelled.values
    truth = np.concatenate([values[who] for _, who in found.judge.rounds])
    return truth, np.concatenate([shares[:, 1] for shares in judged.predictions])


def _components(found: Answers, name: str) -> Image.Image:
    labelled = found.judge.labelled
    scaled = StandardScaler().fit_transform(found.vectors[name])
    components = min(2, *scaled.shape)
    places = np.zeros((len(scaled), 2))  # what has one dimension lies on a line
    places[:, :components] = PCA(components).fit_transform(scaled)
    drawn = Figure(figsize=(4.6, 4.2), dpi=110, layout="constrained")
    axes = drawn.subplots()
    if labelled.kind == "classes":
        for code, one in enumerate(labelled.classes):
            across, up = places[labelled.values == code].T
            axes.scatter(across, up, s=14, alpha=0.75, label=one.replace("$", r"\$"))
        axes.legend(frameon=False, fontsize=8)
    else:
        value = labelled.values if labelled.kind == "number" else labelled.values[:, 0]
        drawn.colorbar(axes.scatter(places[:, 0], places[:, 1], s=14, c=value), ax=axes)
    axes.set(title=name, xticks=[], yticks=[])
    return _image(drawn)


def _image(drawn: Figure) -> Image.Image:
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")
