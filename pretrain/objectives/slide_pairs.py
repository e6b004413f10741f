"""Pair prediction: a hidden tile's embedding from one visible tile, their displacement, and the slide's vector.

    visible tiles ──encoder──▶ tiles ─────────────▶ one of them ─┐
                                 └─ pooled ─▶ the slide's vector ─┼─▶ predictor ─▶ the hidden tile's embedding
                                  how far the hidden tile is away ┘

Ours. What one tile doesn't say of another must come from the slide's vector: masked autoencoding never touches that, here
it is trained. Targets are those of `SlideMAE`, fixed, so it can't collapse.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from data.embeddings.sequences import SlideBatch
from data.keyed import rng
from models.allowed import Agreements, one_of, within
from models.operations import Operations, total_operations
from models.positions import check_sines
from models.sequence_parallel import Group
from models.slide_network import SlideNetwork
from models.slide_pairs import PairPredictor
from pretrain.objectives.figures import spread_of_slides
from pretrain.objectives.interface import Moment, SlideObjective
from pretrain.objectives.losses.precision import at_least_float32
from pretrain.objectives.slide_mae import dropout_seeds
from pretrain.run.across_ranks import total, world_size

LEAST_VARIANCE = 1e-6  # of a slide's outputs, before the root: one visible tile has none


class Pairs(NamedTuple):
    """P pairs of a batch: indices into its tiles."""

    hidden: Tensor  # (P,) int64
    other: Tensor  # (P,) int64, visible
    valid: Tensor  # (P,) bool; False where no visible tile is near enough
    slide: Tensor  # (P,) int64, which of the batch's sequences
    displacements: Tensor  # (P, 2) int64 cells from the other tile to the hidden one; 0 where not valid


def slide_means(tiles: Tensor) -> Tensor:
    """(n, width) → (width,)."""
    return tiles.mean(dim=0)


def slide_means_and_spreads(tiles: Tensor) -> Tensor:
    """(n, width) → (2 width,): the mean, and the standard deviation."""
    variance, mean = torch.var_mean(at_least_float32(tiles), dim=0, correction=0)
    return torch.cat([mean, (variance + LEAST_VARIANCE).sqrt()]).to(tiles.dtype)


SLIDE_VECTORS_OF_PAIRS = {"mean": (slide_means, 1), "mean_std": (slide_means_and_spreads, 2)}
"""By name, what makes a slide's vector of its tiles, and how many times their width it has."""


class SlidePairs(SlideObjective):
    """Keyword arguments are its settings. ``pairs`` of a slide are drawn by (seed, the sequence's position): a hidden
    tile, and a visible one at most ``farthest`` cells away along either axis, each as likely as the others."""

    masks = True
    learns = "to tell a hidden tile's embedding from another tile, how far it is away, and one vector of the slide"
    reading = (
        "Pairs of a hidden and a visible tile are drawn on each slide, and the hidden one is told from the other, their"
        " displacement and the slide's vector. Explained variance (R²) on slides held out from training is to be held"
        " against the slide's mean, and against the other tile by itself, at its best scale."
    )
    score = "r2"
    evaluation_passes = 1
    agreements: ClassVar[Agreements] = {("predictor_width",): check_sines}

    def __init__(
        self,
        make_encoder: Callable[[], SlideNetwork],
        *,
        pairs: Annotated[int, within(least=1)],
        farthest: Annotated[int, within(least=1)],
        pooled: Annotated[str, one_of(*SLIDE_VECTORS_OF_PAIRS)],
        predictor_width: Annotated[int, within(least=1)],
        predictor_depth: Annotated[int, within(least=0)],
    ) -> None:
        super().__init__()
        self.pairs, self.farthest = pairs, farthest
        self.pool, times = SLIDE_VECTORS_OF_PAIRS[pooled]
        self.encoder = make_encoder()
        self.predictor = PairPredictor(
            tile_width=self.encoder.width,
            slide_width=times * self.encoder.width,
            output_width=self.encoder.input_width,
            width=predictor_width,
            depth=predictor_depth,
            farthest=farthest,
        )

    def trained(self) -> dict[str, nn.Module]:
        return {"encoder": self.encoder, "predictor": self.predictor}

    def share_slides(self, group: Group) -> None:
        """Processes of ``group`` share the encoder's tokens, and each predicts all pairs."""
        self.encoder.encoder.share_slides(group)

    def forward(self, batch: SlideBatch, pairs: Pairs, seeds: Sequence[int] | None) -> tuple[Tensor, Tensor]:
        """Predictions (P, D), standardised, and the slides' vectors (B, ·)."""
        cells = batch.cells[batch.visible]
        seen = self.encoder(batch.inputs(batch.visible), cells, batch.visible_lengths, seeds, extent=batch.extent)
        slides = torch.stack([self.pool(some) for some in seen.tiles.split(batch.visible_lengths)])
        place = torch.zeros(len(batch.cells), dtype=torch.int64, device=cells.device)  # of a tile among visible ones
        place = place.index_copy(0, batch.visible, torch.arange(len(cells), device=cells.device))
        tiles = seen.tiles[place[pairs.other]]
        return self.predictor(tiles, pairs.displacements, slides, pairs.slide), slides

    def prepare(self, parts: Sequence[SlideBatch], moment: Moment) -> list[tuple[SlideBatch, Pairs, Tensor]]:
        """Each micro-batch with its pairs and what its sum is multiplied by, so that the mean over micro-batches and
        ranks is that over all valid pairs."""
        drawn = [draw_pairs(part, self.pairs, self.farthest, moment.seed) for part in parts]
        valid = torch.stack([pairs.valid.sum() for pairs in drawn]).sum()
        factor = world_size() * len(parts) / total(valid.float()).clamp(min=1)
        return [(part, pairs, factor) for part, pairs in zip(parts, drawn, strict=True)]

    def loss(self, batch: tuple[SlideBatch, Pairs, Tensor], moment: Moment) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean squared error of a micro-batch's pairs, over dimensions, as `prepare` gives them."""
        part, pairs, factor = batch
        prediction, _ = self(part, pairs, dropout_seeds(part, moment.seed))
        error = (at_least_float32(prediction) - part.targets()[pairs.hidden]).square().mean(dim=1)
        return (error * pairs.valid).sum() * factor, {}

    def operations(self, parts: Sequence[SlideBatch]) -> Operations:
        return total_operations(
            self.encoder.operations(part.visible_lengths)
            + self.predictor.operations(self.pairs * len(part.lengths), len(part.lengths))
            for part in parts
        )

    def judged(self, batch: SlideBatch) -> dict[str, Tensor]:
        """Of each sequence, over its pairs and their dimensions: summed squared errors of the ``model``, of zero, which
        is the data set's ``mean``, and of the mean of visible tiles, ``slide_mean``; squares of the ``other`` tile and
        its ``product`` with the hidden one; how many ``numbers`` those are; and its vector ``pooled``."""
        pairs, targets = draw_pairs(batch, self.pairs, self.farthest, 0), batch.targets()
        prediction, slides = self(batch, pairs, None)
        means = torch.stack([some.mean(dim=0) for some in targets[batch.visible].split(batch.visible_lengths)])
        hidden, other = targets[pairs.hidden].double(), targets[pairs.other].double()

        def summed(of_pairs: Tensor) -> Tensor:
            return (of_pairs.sum(dim=1) * pairs.valid).unflatten(0, (-1, self.pairs)).sum(dim=1)

        return {
            "model": summed((prediction - hidden).square()),
            "mean": summed(hidden.square()),
            "slide_mean": summed((means[pairs.slide] - hidden).square()),
            "other": summed(other.square()),
            "product": summed(other * hidden),
            "numbers": summed(torch.ones_like(hidden)),
            "pooled": slides,
        }

    def evaluate(self, rows: Mapping[str, Tensor]) -> dict[str, float]:
        """``r2`` = 1 - Σ (prediction - target)² / Σ (data-set mean - target)², over pairs and dimensions, beside that of
        the mean of the slide's visible tiles (``r2_slide_mean``) and of the other tile times the one factor that suits
        these pairs best (``r2_other_tile``): Σ(o·t)² / (Σ o² Σ t²). ``effective_rank``: RankMe of the slides' vectors
        (at most the number of sequences); ``feature_cosine`` and ``feature_std``: see `spread`. ``loss``: mean squared
        error."""
        sums = {name: values.sum(0) for name, values in rows.items() if name != "pooled"}
        energy, other = (torch.where(sums[name] > 0, sums[name], torch.nan) for name in ("mean", "other"))
        return {
            "loss": float(sums["model"] / sums["numbers"]),
            "r2": float(1 - sums["model"] / energy),
            "r2_slide_mean": float(1 - sums["slide_mean"] / energy),
            "r2_other_tile": float(sums["product"] ** 2 / (other * energy)),
            **spread_of_slides(rows["pooled"]),
        }


def draw_pairs(batch: SlideBatch, count: int, farthest: int, seed: int) -> Pairs:
    """``count`` pairs of each sequence, hidden tiles with replacement, drawn by (seed, the sequence's position) alone on
    the batch's device. Memory of ``count`` times a slide's visible tiles."""
    found, device = [], batch.cells.device
    slides = zip(
        batch.masked.split(batch.masked_lengths),
        batch.visible.split(batch.visible_lengths),
        batch.positions,
        strict=True,
    )
    for number, (masked, visible, position) in enumerate(slides):
        generator = torch.Generator(device).manual_seed(int(rng(seed, "pairs", position).integers(2**62)))
        hidden = masked[torch.randint(len(masked), (count,), generator=generator, device=device)]
        here, there = batch.cells[hidden], batch.cells[visible]
        near = (here[:, :1] - there[:, 0]).abs() <= farthest
        near &= (here[:, 1:] - there[:, 1]).abs() <= farthest
        chance = torch.rand((count, len(visible)), generator=generator, device=device)
        other, valid = visible[torch.where(near, chance, -1.0).argmax(dim=1)], near.any(dim=1)
        displacements = (here - batch.cells[other]) * valid[:, None]
        found.append(Pairs(hidden, other, valid, torch.full_like(hidden, number), displacements))
    return Pairs(*(torch.cat(part) for part in zip(*found, strict=True)))
