"""How well slide vectors tell a table of labels while the slide encoder is trained: at every checkpoint, by all ranks
together.

A slide's vector is the mean and the standard deviation of the encoder's outputs; beside it stands that of its tiles
alone, which training doesn't change. Labels are told by linear models in folds that keep patients together, as
``pretrain probe slide`` does, whose other rows and intervals are not for every checkpoint.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.embeddings.store import EmbeddingStore
from data.fault import Fault
from models.slide_network import SlideNetwork
from pretrain.embedding.poolings import mean_and_deviation
from pretrain.embedding.slides import of_at_most, on_the_device
from pretrain.slide_probing.folds import most_folds, rounds_of
from pretrain.slide_probing.judge import Judge
from pretrain.slide_probing.labels import read_labels
from pretrain.slide_probing.linear import predicted
from pretrain.slide_probing.vectors import of_bags
from pretrain.training.fixed_images import agreed
from pretrain.training.judged_together import rows_of_all

FOLDS, REPEATS = 5, 2
TOKENS = 65_536  # tiles of a pass; a larger slide goes alone


class SlideLabelSet:
    """The slides of ``store`` that ``table`` labels, by its ``column`` (None: as `read_labels` finds it). Raises Fault
    for a table that can't be read, or has fewer than two cases of a class."""

    def __init__(self, store: EmbeddingStore, table: Path, column: str | None) -> None:
        self.store = store
        self.labelled = read_labels(table, column, {slide: store.rows(slide) for slide in store.slides})
        fewest, _ = most_folds(self.labelled)
        if self.labelled.rounds is None and fewest < 2:
            raise Fault(f"{table} has a class with one case, which can't be judged by others: leave it out.")
        self.judge = Judge(self.labelled, rounds_of(self.labelled, min(FOLDS, fewest), REPEATS, 0), 0, resamples=0)
        self.slides = [slide for bag in self.labelled.bags for slide in bag]

    @property
    def main(self) -> str:
        """The figure by which checkpoints are compared, higher is better."""
        return f"labels_{self.judge.main}"

    @property
    def said(self) -> str:
        """What is judged, in words."""
        cases, slides = len(self.labelled.bags), len(self.slides)
        of = f"{cases} patients, {slides} slides" if cases < slides else f"{slides} slides"
        return "; ".join([f"watch.slide_labels: {of}, {len(self.judge.rounds)} rounds", *self.labelled.said])

    def score(
        self,
        encoder: SlideNetwork,
        device: torch.device,
        share: Callable[[list[list[int]]], Iterable[tuple[Sequence[int], bool]]],
        given: Callable[[Tensor], Tensor],
    ) -> dict[str, float]:
        """``labels_auroc`` and so on, each beside ``labels_auroc_tiles``, of the tiles alone. Every process calls it, and
        gets the same. ``share``: this process's passes, as `own_passes` says; ``given``: what the encoder takes of
        stored embeddings (T, D)."""
        passes = share(list(of_at_most([self.store.rows(slide) for slide in self.slides], TOKENS)))

        def judged(numbers: Sequence[int]) -> dict[str, Tensor]:
            x, cells, lengths = on_the_device([self.store.read(self.slides[number]) for number in numbers], device)
            tiles = encoder(given(x), cells, lengths).tiles.float()
            return {
                "encoder": torch.stack([mean_and_deviation(of_slide) for of_slide in tiles.split(lengths)]),
                "tiles": torch.stack([mean_and_deviation(of_slide) for of_slide in x.split(lengths)]),
            }

        with torch.no_grad():
            rows = rows_of_all(passes, judged, range(len(self.slides)), device)
        figures: dict[str, float] = {}
        for ending, vectors in (("", rows["encoder"]), ("_tiles", rows["tiles"])):
            table = of_bags(vectors.float().numpy(), self.slides, self.labelled.bags)
            if not np.isfinite(table).all():
                figures |= {f"labels_{name}{ending}": float("nan") for name in self.judge.measures}
                continue
            found = self.judge(
                lambda fitted, asked, table=table: predicted(  # type: ignore[misc]
                    self.labelled.kind,
                    len(self.labelled.classes),
                    table[fitted],
                    self.labelled.values[fitted],
                    table[asked],
                )
            )
            figures |= {f"labels_{name}{ending}": value for name, value in found.figures.items()}
        return agreed(figures, device)
