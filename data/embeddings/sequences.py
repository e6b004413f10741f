"""Sequences of tile embeddings for the slide stage: what they are, in which order they come, how they are cut and
masked.

A sequence is a slide, or a *field*, a square of ``field_cells`` × ``field_cells`` cells of its tile grid, where there
are too few slides to learn from. Its tiles are in row-major order. The order of sequences and what a batch holds are in
`data.embeddings.packing`; what happens to a sequence (crop, shift, flip, mask) is keyed by (seed, position) too. So the
only state is the number of steps done, and it holds at any world size.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.embeddings.packing import Packing
from data.embeddings.standardisation import Statistics
from data.embeddings.store import EmbeddingStore, SlideEmbeddings
from data.embeddings.views import FEWEST_VISIBLE, augment_sequence, block_mask, random_mask
from data.fault import Fault
from data.keyed import rng

INPUTS = ("raw", "standardised")


@dataclass(frozen=True)
class Sequence:
    """A slide or a field: rows of the store in row-major order."""

    slide: str
    rows: (
        np.ndarray | range
    )  # (n,) int64, ascending; a whole slide's are a range, since a million slides' would fill the memory


class TilesOfStore(NamedTuple):
    """What a further store has of a batch's tiles: those of another tile encoder."""

    embeddings: Tensor  # (T, D) float16
    mean: Tensor  # (D,) float32
    std: Tensor  # (D,) float32


@dataclass
class SlideBatch:
    """Packed sequences: B of them with T tiles in all, of which V are visible and M are masked (V + M = T)."""

    embeddings: Tensor  # (T, D) float16, as stored: half the bytes to copy to a device, where they become float32
    cells: Tensor  # (T, 2) int64 (column, row)
    lengths: list[int]  # tiles per sequence
    visible: Tensor  # (V,) int64 indices into T, ascending
    visible_lengths: list[int]
    masked: Tensor  # (M,) int64 indices into T, ascending
    masked_lengths: list[int]
    mean: Tensor  # (D,) float32, of the data set
    std: Tensor  # (D,) float32
    positions: list[int]  # each sequence's position in the stream: what its random draws are keyed by
    slides: list[str]
    extent: int  # all cells are below it
    standardised: bool = False  # whether encoders are given embeddings so, or as stored
    centres: Tensor | None = None  # (K, D) float32, standardised: of the clusters that an objective asked for
    further: list[TilesOfStore] = field(default_factory=list)  # the same tiles by other tile encoders, from number 1 on

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "SlideBatch":
        """The same batch with its tensors on ``device``."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "SlideBatch":
        """The same batch in page-locked memory, from which copies to a GPU don't wait. Called by DataLoader."""
        return self._with(Tensor.pin_memory)

    def _with(self, change: Callable[[Tensor], Tensor]) -> "SlideBatch":
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        further = [TilesOfStore(*map(change, store)) for store in self.further]
        return replace(self, **{name: change(tensor) for name, tensor in tensors.items()}, further=further)  # type: ignore[arg-type]

    def of_store(self, number: int) -> TilesOfStore:
        """What the store of that number has, from 0."""
        return self.further[number - 1] if number else TilesOfStore(self.embeddings, self.mean, self.std)

    def targets(self, store: int = 0) -> Tensor:
        """(T, D) float32 embeddings of a store standardised by the data set's statistics: what is predicted."""
        embeddings, mean, std = self.of_store(store)
        return (embeddings - mean) / std

    def inputs(self, tiles: Tensor | slice = slice(None), store: int = 0) -> Tensor:
        """(t, D) float32 or better: what an encoder is given of those ``tiles`` of a store."""
        embeddings, mean, std = self.of_store(store)
        some = embeddings[tiles]
        if self.standardised:
            return (some - mean) / std
        return some.to(torch.promote_types(some.dtype, torch.float32))


class SlideSequences:
    """The sequences of a store, split into those trained on and those held out, and the batches made of them.

    field_cells: side of the squares that sequences are cut to, 0 for whole slides. validation_fraction: share of slides
    held out, drawn by ``seed``; with a single slide, a band along one of its sides, so that no tile is in both. crop,
    shift_grid, flip: augmentation, see `augment_sequence`. batch_size, batch_tokens, lanes: see `Packing`; tiles are counted
    before the crop. mask: "random" or "block"; mask_ratio: share of tiles masked, 0 for none; block_cells: side of the blocks.
    inputs: "raw" or "standardised", what encoders are given. centres: see `SlideBatch`. further: stores of the same
    tiles by other tile encoders, with their statistics.

    Raises Fault where a setting makes no sense or leaves nothing to train on or to hold out.
    """

    def __init__(
        self,
        store: EmbeddingStore,
        statistics: Statistics,
        *,
        batch_size: int,
        batch_tokens: int | None,
        lanes: int,
        seed: int,
        field_cells: int,
        validation_fraction: float,
        crop: float,
        shift_grid: int,
        flip: float,
        mask: str,
        mask_ratio: float,
        block_cells: int,
        inputs: str = "raw",
        centres: np.ndarray | None = None,
        further: Collection[tuple[EmbeddingStore, Statistics]] = (),
    ) -> None:
        if mask not in ("random", "block"):
            raise Fault(f"mask={mask} is not known; choose random or block.")
        if not (0 <= mask_ratio < 1 and 0 < crop <= 1 and 0 <= flip <= 1 and 0 <= validation_fraction < 1):
            raise Fault(
                f"mask_ratio={mask_ratio}, crop={crop}, flip={flip} and validation_fraction={validation_fraction} are"
                " shares between 0 and 1."
            )
        if inputs not in INPUTS:
            raise Fault(f"inputs={inputs} is not known; choose raw or standardised.")
        if mask == "block" and block_cells < 1:
            raise Fault(f"block_cells={block_cells} must be at least 1 for block masks.")
        if statistics.mean.shape != (store.width,):
            raise Fault(
                f"the statistics are of {len(statistics.mean)} dimensions, the embeddings in {store.folder} of"
                f" {store.width}."
            )
        self.store, self.statistics, self.centres, self.further = store, statistics, centres, list(further)
        self.standardised = inputs == "standardised"
        self.seed = seed
        self.crop, self.shift_grid, self.flip = crop, shift_grid, flip
        self.mask, self.mask_ratio, self.block_cells = mask, mask_ratio, block_cells
        self.training, self.validation = split_sequences(store, field_cells, validation_fraction, seed)
        if not self.training:
            raise Fault(
                f"{store.folder} has no slide with at least {FEWEST_VISIBLE} tiles to train on; embed more slides."
            )
        if validation_fraction and not self.validation:
            raise Fault(
                f"{store.folder} is too small to hold out validation_fraction={validation_fraction} of it; raise the"
                " fraction, embed more slides, or set it to 0."
            )
        sizes = np.array([self.size(sequence) for sequence in self.training])
        self.packing = Packing(sizes, batch_size=batch_size, batch_tokens=batch_tokens, lanes=lanes, seed=seed)

    def size(self, sequence: Sequence) -> int:
        """The most tiles that a batch holds of a sequence."""
        return len(sequence.rows)

    def sequence_at(self, position: int) -> Sequence:
        """The training sequence at a position of the stream."""
        return self.training[self.packing.sequence_at(position)]

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> SlideBatch:
        """A rank's share of global batch ``step``, augmented and masked; see `Packing.batch`."""
        positions = self.packing.batch(step, rank, world_size)
        return self._pack([self._item(self.sequence_at(k), k, "train") for k in positions])

    def batches(self, step: int, rank: int = 0, world_size: int = 1) -> Iterator[SlideBatch]:
        """A rank's share of every global batch from ``step`` on, without end."""
        while True:
            yield self.batch(step, rank, world_size)
            step += 1

    def held_out_batches(self, most: int) -> list[list[int]]:
        """Numbers of the held-out sequences to judge by, ``most`` at most, a lane's share at a time."""
        batches: list[list[int]] = []
        tiles = 0
        for k in spread_by_size([self.size(sequence) for sequence in self.validation], most, self.seed):
            n, room = self.size(self.validation[k]), self.packing.room
            full = not batches or len(batches[-1]) == self.packing.most or (room is not None and tiles + n > room)
            if full:
                batches.append([])
                tiles = 0
            batches[-1].append(k)
            tiles += n
        return batches

    def held_out(self, numbers: list[int]) -> SlideBatch:
        """Held-out sequences by number: not augmented, and masked the same way every time."""
        return self._pack([self._item(self.validation[k], k, "validation") for k in numbers])

    def _item(self, sequence: Sequence, position: int, what: str) -> "TilesOfSequence":
        slide = self.store.read(sequence.slide)
        rows = np.asarray(sequence.rows)
        cells = slide.cells[rows]
        random = rng(self.seed, f"slide {what}", position)
        if what == "train":
            rows, cells = augment_sequence(rows, cells, random, self.crop, self.shift_grid, self.flip)
        if not self.mask_ratio:
            masked = np.zeros(len(rows), dtype=bool)
        elif self.mask == "random":
            masked = random_mask(len(rows), self.mask_ratio, random)
        else:
            masked = block_mask(cells, self.mask_ratio, self.block_cells, random)
        further = [store.read(sequence.slide).embeddings[rows] for store, _ in self.further]
        return TilesOfSequence(sequence.slide, position, slide.embeddings[rows], cells, masked, further)

    def _pack(self, items: Collection["TilesOfSequence"]) -> SlideBatch:
        masked = np.concatenate([item.masked for item in items])
        cells = np.concatenate([item.cells for item in items])
        return SlideBatch(
            embeddings=torch.from_numpy(np.concatenate([item.embeddings for item in items])),
            cells=torch.from_numpy(cells),
            lengths=[len(item.masked) for item in items],
            visible=torch.from_numpy(np.flatnonzero(~masked)),
            visible_lengths=[int((~item.masked).sum()) for item in items],
            masked=torch.from_numpy(np.flatnonzero(masked)),
            masked_lengths=[int(item.masked.sum()) for item in items],
            mean=torch.from_numpy(self.statistics.mean.astype(np.float32)),
            std=torch.from_numpy(self.statistics.std.astype(np.float32)),
            positions=[item.position for item in items],
            slides=[item.slide for item in items],
            extent=int(cells.max()) + 1,
            standardised=self.standardised,
            centres=None if self.centres is None else torch.from_numpy(self.centres),
            further=[
                TilesOfStore(
                    torch.from_numpy(np.concatenate([item.further[number] for item in items])),
                    torch.from_numpy(statistics.mean.astype(np.float32)),
                    torch.from_numpy(statistics.std.astype(np.float32)),
                )
                for number, (_, statistics) in enumerate(self.further)
            ],
        )


@dataclass(frozen=True)
class TilesOfSequence:
    """What a batch has of one sequence."""

    slide: str
    position: int
    embeddings: np.ndarray  # (n, D) float16
    cells: np.ndarray  # (n, 2) int64
    masked: np.ndarray  # (n,) bool
    further: list[np.ndarray]  # (n, D) float16 of each further store


def split_sequences(
    store: EmbeddingStore, field_cells: int, validation_fraction: float, seed: int
) -> tuple[list[Sequence], list[Sequence]]:
    """Training and validation sequences of a store.

    Slides are held out whole, at least one. A single slide is cut into two regions instead, a band along a side drawn
    by ``seed`` being held out; fields overlap, so holding out fields would leak their tiles into training.
    """
    slides = [slide for slide in store.slides if store.rows(slide) >= FEWEST_VISIBLE]
    whole = [Sequence(slide, range(store.rows(slide))) for slide in slides]
    held_out: list[Sequence] = []
    if not validation_fraction:
        training = whole
    elif len(whole) == 1:
        training, held_out = _split_one(whole[0], store.read(slides[0]), validation_fraction, seed)
    else:
        out = set(
            rng(seed, "held-out slides")
            .permutation(len(whole))[: max(1, round(validation_fraction * len(whole)))]
            .tolist()
        )
        training = [sequence for index, sequence in enumerate(whole) if index not in out]
        held_out = [sequence for index, sequence in enumerate(whole) if index in out]
    if field_cells:
        training, held_out = (
            [field for part in parts for field in cut_fields(part, store.read(part.slide).cells, field_cells)]
            for parts in (training, held_out)
        )
    return training, held_out


def spread_by_size(sizes: list[int], most: int, seed: int) -> list[int]:
    """Numbers of ``most`` sequences, ascending, as long and as short as all of them: of ``most`` equal parts of the
    order by size, one each, drawn by ``seed``. All where they aren't more."""
    if len(sizes) <= most:
        return list(range(len(sizes)))
    draw, order = rng(seed, "judged"), np.argsort(sizes, kind="stable")
    return sorted(int(part[draw.integers(len(part))]) for part in np.array_split(order, most))


def _split_one(
    sequence: Sequence, slide: SlideEmbeddings, fraction: float, seed: int
) -> tuple[list[Sequence], list[Sequence]]:
    side = int(rng(seed, "held-out band").integers(4))  # left, right, top, bottom
    along = slide.cells[:, side // 2] * (1 if side % 2 else -1)
    order = np.argsort(along, kind="stable")
    edge = along[
        order[len(order) - max(1, round(fraction * len(order)))]
    ]  # whole columns or rows: the band's inner edge
    parts = [np.flatnonzero(along < edge), np.flatnonzero(along >= edge)]
    if min(map(len, parts)) < FEWEST_VISIBLE:
        return [sequence], []
    return [Sequence(sequence.slide, parts[0])], [Sequence(sequence.slide, parts[1])]


def cut_fields(sequence: Sequence, cells: np.ndarray, side: int) -> list[Sequence]:
    """Cover a sequence with squares of ``side`` cells, half overlapping; those with under a quarter of their cells
    filled are left out.

    ``cells``: (tiles of the slide, 2). A sequence smaller than a square gives the one square that holds it. The last
    square of a row or column is moved back to end at the edge.
    """
    rows = np.asarray(sequence.rows)
    own = cells[rows]
    low, high = own.min(axis=0), own.max(axis=0) + 1
    starts = []
    for axis in (0, 1):
        last = max(low[axis], high[axis] - side)
        starts.append(np.unique(np.append(np.arange(low[axis], last, max(1, side // 2)), last)))
    area = np.minimum(high - low, side).prod()
    fields = []
    for row in starts[1]:
        for column in starts[0]:
            inside = ((own >= (column, row)) & (own < (column + side, row + side))).all(axis=1)
            if inside.sum() >= max(FEWEST_VISIBLE, area / 4):
                fields.append(Sequence(sequence.slide, rows[inside]))
    return fields
