"""What slides' vectors tell of their labels, row by row: the JSON of ``pretrain probe stage=slide``."""

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
from pretrain.slide_probing.judge import Judge, Judged
from pretrain.slide_probing.labels import LabelledSlides
from pretrain.slide_probing.linear import predicted
from pretrain.slide_probing.measures import MEASURES

MEAN_ROW = "mean of tiles"
ATTENTION_ROW = "attention over tiles, trained"
OVER_SLIDES = "attention over slides, trained"
RANDOM_ROW = "random weights"

OfBag = Callable[[Sequence[str]], np.ndarray]
"""The rows ``(n, D)`` of a bag's slides."""


@dataclass(frozen=True)
class Answers:
    """Rows by name, and the vectors ``(bags, D)`` of those that have some."""

    judge: Judge
    rows: dict[str, Judged]
    vectors: dict[str, np.ndarray]


def answers(
    store: EmbeddingStore,
    labelled: LabelledSlides,
    judge: Judge,
    encoder: SlideEncoder | None,
    *,
    seed: int,
    tokens: int,
    precision: str,
    attention: bool,
    device: torch.device,
) -> Answers:
    """Ask every row. ``attention``: the supervised rows too, which are the slowest."""
    slides = [slide for bag in labelled.bags for slide in bag]
    kind, classes = labelled.kind, len(labelled.classes)
    tables = vectors.of_tiles_alone(
        track((store.read(slide) for slide in slides), len(slides), "tiles alone", "slides")
    )
    if encoder is not None:
        clusters = clusters_of(store, slides, seed)
        networks = {"slide encoder": encoder.network, RANDOM_ROW: with_random_weights(encoder, seed)}
        for name, network in networks.items():
            progress = Progress(len(slides), name, "slides")
            found = vectors.of_encoder(
                store, slides, encoder, network, clusters, tokens=tokens, precision=precision, advance=progress.advance
            )
            progress.close()
            tables |= {f"{name}, {pooling}": rows for pooling, rows in found.items()}
    by_bag = {name: vectors.of_bags(rows, slides, labelled.bags) for name, rows in tables.items()}
    rows = {
        name: judge(
            lambda fitted, judged, table=table: predicted(  # type: ignore[misc]
                kind, classes, table[fitted], labelled.values[fitted], table[judged]
            )
        )
        for name, table in by_bag.items()
    }
    if attention:
        rows[ATTENTION_ROW] = _by_attention(
            judge, labelled, lambda bag: np.concatenate([store.read(slide).embeddings for slide in bag]), seed, device
        )
        if any(len(bag) > 1 for bag in labelled.bags):
            place = {slide: i for i, slide in enumerate(slides)}
            best = tables["slide encoder, mean + std" if encoder is not None else "mean + std"]
            rows[OVER_SLIDES] = _by_attention(
                judge, labelled, lambda bag: best[[place[slide] for slide in bag]], seed, device
            )
    return Answers(judge, rows, by_bag)


def _by_attention(judge: Judge, labelled: LabelledSlides, of_bag: OfBag, seed: int, device: torch.device) -> Judged:
    progress = Progress(len(judge.rounds), "attention", "rounds")

    def predict(fitted: np.ndarray, judged: np.ndarray) -> np.ndarray:
        found = predicted_by_attention(
            labelled.kind,
            len(labelled.classes),
            lambda bag: of_bag(labelled.bags[bag]),
            fitted,
            labelled.values[fitted],
            judged,
            seed,
            device,
        )
        progress.advance()
        return found

    found = judge(predict)
    progress.close()
    return found


def as_json(found: Answers, store: EmbeddingStore, encoder: SlideEncoder | None, how: Sequence[str]) -> dict[str, Any]:
    """The rows with their intervals, and how they were found."""
    labelled, judge = found.judge.labelled, found.judge
    beside = found.rows[MEAN_ROW]
    return {
        "store": str(store.folder),
        "tile_encoder": {"name": store.encoder, "hash": store.encoder_hash},
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
        "how": list(how),
        "cases": labelled.names,
        "truth": labelled.values.tolist(),
        "judged": [judged.tolist() for _, judged in judge.rounds],
        "rows": {name: judge.row(judged, beside) for name, judged in found.rows.items()},
    }
