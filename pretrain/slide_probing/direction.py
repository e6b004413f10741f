"""A linear model's weights on the slide encoder's vector, kept for maps of the tiles that its answer depends on.

weights.npy       (D,) by how much the model's output rises with each of the vector's numbers
clusters.json     the clusters of tiles that the vector is made by
"""

from pathlib import Path

import numpy as np

from data.fault import Fault
from data.files import appearing, make_folder
from pretrain.embedding.tile_clusters import kept_clusters
from pretrain.slide_probing.answer import ENCODER_ROW, Answers, SlideQuestion
from pretrain.slide_probing.labels import LabelledSlides
from pretrain.slide_probing.linear import linear_model
from pretrain.slide_probing.vectors import DEFAULT_POOLING

WEIGHTS_FILE = "weights.npy"


def require_one_output(labelled: LabelledSlides) -> None:
    """Raise Fault for labels of more than two classes, whose model has an output each."""
    if labelled.kind == "classes" and len(labelled.classes) > 2:
        raise Fault(
            f"direction= is of one output, and a model of {len(labelled.classes)} classes has as many: give a table that"
            " asks for one class against the others."
        )


def write_direction(folder: Path, question: SlideQuestion, found: Answers) -> None:
    """Fit a linear model of the slide encoder's default vector on all labelled cases, and keep its weights."""
    labelled = question.labelled
    slides = [slide for bag in labelled.bags for slide in bag]
    kept_clusters(make_folder(folder), question.store, slides, question.seed, None)
    vectors = found.vectors[f"{ENCODER_ROW}, {DEFAULT_POOLING}"]
    model = linear_model(labelled.kind, len(labelled.classes), vectors, labelled.values)
    with appearing(folder / WEIGHTS_FILE) as partial, partial.open("wb") as file:
        np.save(file, model.weights[:, 0] / model.spread)
