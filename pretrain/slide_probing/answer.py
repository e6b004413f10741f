"""What slides' vectors tell of their labels, row by row: the JSON of ``pretrain probe stage=slide``."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from data.embeddings.store import EmbeddingStore
from pretrain.embedding.random_weights import with_random_weights
from pretrain.embedding.tile_clusters import clusters_of
from pretrain.encoders.slide_encoders import SlideEncoder
from pretrain.run.progress import Progress, track
from pretrain.slide_probing import vectors
from pretrain.slide_probing.attention_mil import predicted_by_attention
from pretrain.slide_probing.fine_tuning import FineTuning
from pretrain.slide_probing.judge import Judge, Judged, Predict
from pretrain.slide_probing.labels import LabelledSlides
from pretrain.slide_probing.linear import predicted
from pretrain.slide_probing.measures import MEASURES
from pretrain.slide_probing.vectors import DEFAULT_POOLING

MEAN_ROW = "mean of tiles"
ATTENTION_ROW = "attention over tiles, trained"
ENCODER_ROW, RANDOM_ROW = "slide encoder", "random weights"
# Of a patient's several slides, which vectors attention is trained over too.
ATTENDED = ("mean + std", *(f"{row}, {DEFAULT_POOLING}" for row in (ENCODER_ROW, RANDOM_ROW)))


@dataclass(frozen=True)
class SlideQuestion:
    """What is asked: which labels of which slides, by whom, and which rows beside those that take a minute.

    attention: the rows that are trained on the labels; fine_tune: so many steps for a slide encoder that is, 0 for none.
    """

    folders: Sequence[str]  # that the slides lie in
    store: EmbeddingStore  # which holds the slides of all of them
    labelled: LabelledSlides
    judge: Judge
    encoder: SlideEncoder | None
    how: Sequence[str]  # sentences about what is done
    seed: int
    precision: str
    attention: bool
    fine_tune: int

    @property
    def hash(self) -> str:
        """The same for what has the same answer."""
        labelled, judge = self.labelled, self.judge
        slides = [slide for bag in labelled.bags for slide in bag]
        asked = [
            self.store.only(slides).digest,
            self.encoder.hash if self.encoder else None,
            [labelled.bags, labelled.patients, labelled.values.tolist()],
            [labelled.kind, labelled.classes, labelled.ordered],
            [[fitted.tolist(), judged.tolist()] for fitted, judged in judge.rounds],
            [len(judge.times), list(self.how), self.seed, self.precision, self.attention, self.fine_tune],
        ]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Answers:
    """Rows by name, and the vectors ``(bags, D)`` of those that have some."""

    judge: Judge
    rows: dict[str, Judged]
    vectors: dict[str, np.ndarray]


def answers(question: SlideQuestion, tokens: int, device: torch.device) -> Answers:
    """Ask every row. ``tokens``: tiles of a forward pass; ``device``: of what is trained where there is no encoder."""
    store, labelled, encoder, seed = question.store, question.labelled, question.encoder, question.seed
    slides = [slide for bag in labelled.bags for slide in bag]
    tables = vectors.of_tiles_alone(
        track((store.read(slide) for slide in slides), len(slides), "tiles alone", "slides")
    )
    if encoder is not None:
        clusters = clusters_of(store, slides, seed)
        networks = {ENCODER_ROW: encoder.network, RANDOM_ROW: with_random_weights(encoder, seed)}
        for name, network in networks.items():
            progress = Progress(len(slides), name, "slides")
            found = vectors.of_encoder(
                store,
                slides,
                encoder,
                network,
                clusters,
                tokens=tokens,
                precision=question.precision,
                advance=progress.advance,
            )
            progress.close()
            tables |= {f"{name}, {pooling}": rows for pooling, rows in found.items()}
    by_bag = {name: vectors.of_bags(rows, slides, labelled.bags) for name, rows in tables.items()}
    rows = {name: question.judge(_by_linear_model(labelled, table)) for name, table in by_bag.items()}
    if encoder is not None and question.fine_tune:
        for name, network in networks.items():
            rows[f"{name}, fine-tuned"] = _trained(
                question,
                f"{name}, fine-tuned",
                "steps",
                question.fine_tune,
                lambda advance, name=name, network=network: FineTuning(  # type: ignore[misc]
                    store,
                    labelled,
                    network,
                    clusters,
                    by_bag[f"{name}, {DEFAULT_POOLING}"],
                    steps=question.fine_tune,
                    seed=seed,
                    tokens=tokens,
                    precision=question.precision,
                    device=encoder.device,
                    advance=advance,
                ),
            )
    if question.attention:
        rows[ATTENTION_ROW] = _by_attention(
            question,
            ATTENTION_ROW,
            lambda bag: np.concatenate([store.read(slide).embeddings for slide in bag]),
            device,
        )
        if any(len(bag) > 1 for bag in labelled.bags):
            place = {slide: i for i, slide in enumerate(slides)}
            for name in (row for row in ATTENDED if row in tables):
                rows[f"attention over slides: {name}"] = _by_attention(
                    question,
                    f"attention over slides: {name}",
                    lambda bag, table=tables[name]: table[[place[slide] for slide in bag]],  # type: ignore[misc]
                    device,
                )
    return Answers(question.judge, rows, by_bag)


def _by_linear_model(labelled: LabelledSlides, table: np.ndarray) -> Predict:
    """By a linear model of the vectors ``table`` (bags, D)."""
    kind, classes, values = labelled.kind, len(labelled.classes), labelled.values
    return lambda fitted, judged: predicted(kind, classes, table[fitted], values[fitted], table[judged])


def _by_attention(
    question: SlideQuestion, row: str, of_bag: Callable[[Sequence[str]], np.ndarray], device: torch.device
) -> Judged:
    """By attention over the rows ``(n, D)`` of a bag's slides."""
    labelled = question.labelled

    def made(advance: Callable[[], None]) -> Predict:
        def predict(fitted: np.ndarray, judged: np.ndarray) -> np.ndarray:
            found = predicted_by_attention(
                labelled.kind,
                len(labelled.classes),
                lambda bag: of_bag(labelled.bags[bag]),
                fitted,
                labelled.values[fitted],
                judged,
                question.seed,
                device,
            )
            advance()
            return found

        return predict

    return _trained(question, row, "rounds", 1, made)


def _trained(
    question: SlideQuestion, row: str, unit: str, each: int, made: Callable[[Callable[[], None]], Predict]
) -> Judged:
    """A row that is trained in every round, with a progress over ``each`` units of a round."""
    progress = Progress(each * len(question.judge.rounds), row, unit)
    found = question.judge(made(progress.advance))
    progress.close()
    return found


def as_json(found: Answers, question: SlideQuestion) -> dict[str, Any]:
    """The rows with their intervals, and how they were found."""
    labelled, judge, encoder = question.labelled, question.judge, question.encoder
    beside = found.rows[MEAN_ROW]
    return {
        "question": question.hash,
        "stores": list(question.folders),
        "tile_encoder": {"name": question.store.encoder, "hash": question.store.encoder_hash},
        "slide_encoder": None if encoder is None else {"name": encoder.name, "hash": encoder.hash},
        "labels": {
            "kind": labelled.kind,
            "classes": labelled.classes,
            "cases": len(labelled.bags),
            "slides": sum(map(len, labelled.bags)),
            "said": labelled.said,
        },
        "rounds": len(judge.rounds),
        "measure": judge.main,
        "measures": list(MEASURES[judge.kind]),
        "how": list(question.how),
        "cases": labelled.names,
        "truth": labelled.values.tolist(),
        "judged": [judged.tolist() for _, judged in judge.rounds],
        "rows": {name: judge.row(judged, beside) for name, judged in found.rows.items()},
    }
