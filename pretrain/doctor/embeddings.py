"""Do the embeddings fit the run? Sequences against lanes and ranks, files against their index, and how fast one process
delivers."""

import time

import numpy as np

from data.embeddings.standardisation import Statistics
from data.embeddings.store import EmbeddingStore
from data.fault import Fault
from pretrain.doctor.finding import Finding, failed, passed, warned
from pretrain.doctor.rate import fast_enough
from pretrain.objectives.interface import SlideObjective
from pretrain.training.even_shares import lanes_of
from pretrain.training.slide_batches import SlideBatches, sequences_of
from pretrain.training.slide_settings import SlideData, open_further, open_store

SAMPLED_SLIDES = 64  # slides that are read beside those of the rate
WARM_UP, MEASURED = 2, 8  # steps' shares of one process


def check_embeddings(
    data: SlideData, kind: type[SlideObjective], processes: int, accumulate: int, needed: float | None, seed: int
) -> list[Finding]:
    """All checks of a slide run's ``data:``; ``needed`` is the slides a second that all its processes together are to
    get."""
    together = data.processes_per_slide
    try:
        store = open_store(data)
        lanes_of(vars(data), processes, accumulate, together)
        further = [(one, unknown_statistics(one)) for one in open_further(data, store)]
        sequences = sequences_of(store, unknown_statistics(store), data, seed, kind, further=further)
        read_ends_of_store(store)
        rate = slides_per_second(SlideBatches(sequences, 0, WARM_UP + MEASURED, 0, processes // together, accumulate))
    except Fault as fault:
        return [failed("embeddings", str(fault))]
    tiles = [store.rows(slide) for slide in store.slides]
    what = (
        f"{len(tiles):,} slides with {sum(tiles):,} tiles in all × {store.width}, the largest of {max(tiles):,}:"
        f" {len(sequences.training):,} sequences to train on and {len(sequences.validation):,} held out, {data.lanes}"
        f" lanes on {processes} processes"
    )
    if len(sequences.training) < data.batch_size:
        found = warned(
            "embeddings",
            f"{what}; a step takes up to {data.batch_size}, so it sees a sequence more than once: embed more slides, or"
            " set data.field_cells, or data.batch_size lower",
        )
    else:
        found = passed("embeddings", f"{what}; {min(SAMPLED_SLIDES, len(tiles))} slides are there as the index says")
    does, remedy = "one process reads, cuts and masks", "put the embeddings on faster storage"
    return [found, fast_enough(rate, needed, processes // together, "slides", does, remedy)]


def unknown_statistics(store: EmbeddingStore) -> Statistics:
    """The mean and the spread of a published data set take minutes to find, and don't matter to its rate."""
    return Statistics(np.zeros(store.width), np.ones(store.width), 1)


def read_ends_of_store(store: EmbeddingStore) -> None:
    """Read slides from one end of the store to the other. Raises Fault for one that isn't there, or holds what is no
    number."""
    for number in sorted(set(np.linspace(0, len(store.slides) - 1, SAMPLED_SLIDES).astype(int).tolist())):
        slide = store.slides[number]
        rows = store.read(slide).embeddings
        if not np.isfinite(rows[:: max(1, len(rows) // SAMPLED_SLIDES)]).all():
            raise Fault(
                f"{store.folder}: embeddings of {slide} are not finite: embed it again into a new folder, with"
                " trainer.precision=float32 if its encoder overflows"
            )


def slides_per_second(batches: SlideBatches) -> float:
    """What one process's loader delivers, by the run's own crops and masks."""
    count, began = 0, 0.0
    for step, batch in enumerate(batches):
        if isinstance(batch, Fault):
            raise batch
        if step >= WARM_UP:
            count += sum(len(part.slides) for part in batch)
        elif step == WARM_UP - 1:
            began = time.monotonic()
    return count / (time.monotonic() - began)
