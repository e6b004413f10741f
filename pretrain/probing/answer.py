"""What an encoder answers to a probe's question, beside random weights and a colour histogram: the JSON of
``pretrain probe``."""

from typing import Any

import numpy as np

from pretrain.encoders.tile_encoder import TileEncoder
from pretrain.probing import features, scores
from pretrain.probing.question import Question

BASELINE_FEATURES = ("random weights", "colour histogram")


def answered(question: Question, encoder: TileEncoder, seed: int, batch: int, threads: int) -> dict[str, Any]:
    """Scores of the three kinds of features, the encoder's gains over the other two, and how they were found."""
    extractors: dict[str, features.Extractor] = {
        "encoder": encoder.embed_each,
        "random weights": encoder.random_twin(seed).embed_each,
        "colour histogram": features.colour_histogram,
    }
    fitted, tested = (
        features.extract(images, extractors, batch, threads, label)
        for images, label in ((question.train, "train"), (question.test, "test"))
    )
    classes, groups = len(question.train.classes), question.groups
    of = None if groups is None else groups.of[tested.positions]
    found = {
        name: scores.score(fitted.features[name], fitted.labels, tested.features[name], tested.labels, classes, of)
        for name in extractors
    }
    result = {
        "encoder": {
            "name": encoder.name,
            "source": encoder.source,
            "hash": encoder.hash,
            "width": encoder.width,
            "input": str(encoder.preprocessing),
            "precision": encoder.precision,
        },
        "train": used(question.train.folder, fitted),
        "test": used(question.test.folder, tested) | {"groups": None if of is None else len(np.unique(of))},
        "classes": question.train.classes,
        "split": question.split,
        "chance": float(np.bincount(tested.labels).max() / len(tested.labels)),
        "method": {
            "knn": (
                f"{min(scores.KNN_NEIGHBOURS, len(fitted.labels))} nearest by cosine, votes weighted exp(cosine /"
                f" {scores.TEMPERATURE})"
            ),
            "linear": (
                f"logistic regression on standardised features, L2, C = {scores.INVERSE_REGULARISATION:g}, up to 1000"
                " iterations"
            ),
            "rankme": "of the test features, not centred (Garrido 2023)",
            "standard_error": scores.words_of_error(of, "" if groups is None else groups.how),
        },
        "scores": {name: of_features(got, fitted.features[name].shape[1]) for name, got in found.items()},
        "gains": {name: scores.gains(found["encoder"], found[name], of) for name in BASELINE_FEATURES},
    }
    if not question.given:
        colours = [part.features["colour histogram"] for part in (fitted, tested)]
        result["histogram_same_slides"] = scores.knn_within(
            colours[0], fitted.labels, colours[1], tested.labels, classes, seed
        )
    return result


def used(folder: object, extracted: features.Extracted) -> dict[str, Any]:
    """How many images of a folder were used, and which were not."""
    return {"folder": str(folder), "images": len(extracted.labels), "unreadable": extracted.unreadable}


def of_features(got: scores.Score, width: int) -> dict[str, Any]:
    """A score as the JSON has it."""
    names = ("knn", "knn_se", "linear", "linear_se", "linear_converged", "rankme")
    return {name: getattr(got, name) for name in names} | {"width": width}
