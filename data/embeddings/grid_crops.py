"""Square crops of a slide's grid of tiles, for objectives that compare views of a slide.

    tiles of a slide ──▶ squares of cells with enough tissue ──▶ flips, quarter turn, shift ──▶ block masks ──▶ `CropBatch`

Places, orientations and masks are keyed by (seed, position, view). Exactly a share of the global batch's global crops is
masked, with ratios spread evenly over the batch (see `data.masks`), so any number of ranks makes the same crops.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.embeddings.sequences import Sequence, SlideBatch, SlideSequences, TilesOfSequence
from data.embeddings.standardisation import Statistics
from data.embeddings.store import EmbeddingStore
from data.keyed import rng
from data.masks import exact_blocks, ratios

TRIES = 3  # places that are looked at for a crop with enough tissue


@dataclass(kw_only=True)
class CropBatch(SlideBatch):
    """Packed crops of N slides, each a sequence by itself: view after view, the global ones first, each view's slides in
    stream order. ``positions`` and ``slides`` are those of the N slides; ``lengths`` and the like go by crop."""

    global_count: int  # views of each slide
    local_count: int
    valid: Tensor | None  # (T,) bool, False for cells without a tile; None: all have one
    valid_lengths: list[int] | None  # how many have one, per crop, where ``valid`` says which

    @property
    def global_crops(self) -> int:
        """How many of the crops are global: the first ones."""
        return self.global_count * len(self.positions)

    @property
    def global_tiles(self) -> int:
        """How many of the T tiles are theirs: the first ones."""
        return sum(self.lengths[: self.global_crops])


class CropSequences(SlideSequences):
    """Sequences of which a batch holds crops.

    global_count, local_count: crops of each; global_side, local_side: in cells. tissue: share of a crop's cells that
    hold a tile, at least; after `TRIES` places the best one is taken. flip, vertical_flip, quarter_turn: probabilities
    for each crop. shift_grid: a crop lands anywhere in a grid of so many cells. masked_share: of a global batch's global
    crops, so many are masked; mask_ratios: from least to most of a crop's tiles. empty_cells: whether cells without a
    tile are in the batch, with zeros, and marked. ``settings``: see `SlideSequences`, whose crop and masks aren't used.
    """

    def __init__(
        self,
        store: EmbeddingStore,
        statistics: Statistics,
        *,
        global_count: int,
        global_side: int,
        local_count: int,
        local_side: int,
        tissue: float,
        vertical_flip: float,
        quarter_turn: float,
        masked_share: float,
        mask_ratios: list[float],
        empty_cells: bool,
        **settings: Any,
    ) -> None:
        self.global_count, self.local_count = global_count, local_count
        self.sides = [global_side] * global_count + [local_side] * local_count
        self.tissue, self.vertical_flip, self.quarter_turn = tissue, vertical_flip, quarter_turn
        self.masked_share, (self.least, self.most) = masked_share, mask_ratios
        self.empty_cells = empty_cells
        super().__init__(store, statistics, **settings)

    def size(self, sequence: Sequence) -> int:
        """The most tiles that a batch holds of a sequence, in all its crops."""
        return sum(side**2 if self.empty_cells else min(side**2, len(sequence.rows)) for side in self.sides)

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> CropBatch:
        """A rank's share of global batch ``step``; see `Packing.batch`."""
        positions, start = self.packing.batch(step, rank, world_size), self.packing.start(step)
        drawn = self._mask_ratios(self.packing.start(step + 1) - start, step)
        return self._pack_crops("train", [(self.sequence_at(k), k, drawn[k - start]) for k in positions])

    def held_out(self, numbers: list[int]) -> CropBatch:
        """Crops of held-out sequences by number, the same every time."""
        found = [(self.validation[k], k, self._mask_ratios(1, k)[0]) for k in numbers]
        return self._pack_crops("validation", found)

    def _mask_ratios(self, slides: int, number: int) -> np.ndarray:
        """Of each global crop of so many slides ``(slides, global_count)``, 0 for those that aren't masked."""
        crops = slides * self.global_count
        drawn = ratios(crops, self.masked_share, self.least, self.most, self.seed, number)
        return drawn.reshape(slides, self.global_count)

    def _pack_crops(self, what: str, slides: Iterable[tuple[Sequence, int, np.ndarray]]) -> CropBatch:
        found = [self._crops_of(sequence, position, drawn, what) for sequence, position, drawn in slides]
        crops = [of_slide[view] for view in range(len(self.sides)) for of_slide in found]
        packed, valid = self._pack(crops), np.concatenate([crop.valid for crop in crops])
        of_slides = {"positions": packed.positions[: len(found)], "slides": packed.slides[: len(found)]}
        return CropBatch(
            **vars(packed) | of_slides,
            global_count=self.global_count,
            local_count=self.local_count,
            valid=torch.from_numpy(valid) if self.empty_cells else None,
            valid_lengths=[int(crop.valid.sum()) for crop in crops] if self.empty_cells else None,
        )

    def _crops_of(self, sequence: Sequence, position: int, drawn: np.ndarray, what: str) -> list["_Crop"]:
        slide = self.store.read(sequence.slide)
        rows = np.asarray(sequence.rows)
        cells, crops = slide.cells[rows], []
        for view, side in enumerate(self.sides):
            random = rng(self.seed, f"slide crop {what}", position, view)
            corner = crop_corner(cells, side, self.tissue, random)
            inside = inside_square(cells, corner, side)
            own, own_rows = cells[inside] - corner, rows[inside]
            own = oriented(own, side, self.flip, self.vertical_flip, self.quarter_turn, random)
            shift = random.integers(0, max(self.shift_grid - side, 0) + 1, size=2)
            places, first = np.unique(own[:, 1] * side + own[:, 0], return_index=True)  # row-major, a tile a cell
            embeddings = slide.embeddings[own_rows[first]]
            valid = np.zeros((side, side), dtype=bool)
            valid.flat[places] = True
            kept, masked = valid, np.zeros((side, side), dtype=bool)
            if view < self.global_count and drawn[view]:
                masked = exact_blocks(valid, drawn[view], random)
            if self.empty_cells:
                every = np.zeros((side * side, embeddings.shape[1]), embeddings.dtype)
                every[places] = embeddings
                embeddings, kept = every, np.ones((side, side), dtype=bool)
            at = np.argwhere(kept)[:, ::-1] + shift
            crops.append(_Crop(sequence.slide, position, embeddings, at, masked[kept], [], valid[kept]))
        return crops


@dataclass(frozen=True)
class _Crop(TilesOfSequence):
    valid: np.ndarray  # (n,) bool


def inside_square(cells: np.ndarray, corner: np.ndarray, side: int) -> np.ndarray:
    """(n,) bool: which ``cells`` (n, 2) lie in the square of ``side`` cells at ``corner``."""
    return np.asarray(((cells >= corner) & (cells < corner + side)).all(axis=1))


def crop_corner(cells: np.ndarray, side: int, tissue: float, random: np.random.Generator) -> np.ndarray:
    """The corner (2,) of a square among ``cells`` (n, 2): the first of `TRIES` that holds a tile in a share ``tissue``
    of its cells, or the fullest of them; where all are empty, one with a tile in it.

    It lies inside of the grid that the cells fill, or at its corner where that is smaller than a square.
    """
    low = cells.min(axis=0)
    last = np.maximum(cells.max(axis=0) + 1 - side, low)
    best, most = low, 0
    for _ in range(TRIES):
        corner = random.integers(low, last + 1)
        tiles = int(inside_square(cells, corner, side).sum())
        if tiles > most:
            best, most = corner, tiles
        if tiles >= tissue * side**2:
            break
    return best if most else np.clip(cells[random.integers(len(cells))] - random.integers(side, size=2), low, last)


def oriented(
    cells: np.ndarray, side: int, flip: float, vertical_flip: float, quarter_turn: float, random: np.random.Generator
) -> np.ndarray:
    """``cells`` (n, 2) of a square, flipped left to right, top to bottom, and turned by a quarter, each with its
    probability: one half each makes all eight orientations alike."""
    x, y = cells[:, 0], cells[:, 1]
    if random.random() < flip:
        x = side - 1 - x
    if random.random() < vertical_flip:
        y = side - 1 - y
    if random.random() < quarter_turn:
        x, y = side - 1 - y, x
    return np.stack([x, y], axis=1)
