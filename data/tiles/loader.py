"""From the stream to batches: read, decode, cut, draw; one loader process a rank, its work done in threads.

The loader's share is bytes only: uint8 crops and the parameters for what the device does to them. JPEG decoding and
resampling release the interpreter's lock, so threads are enough, and a slide or shard is opened once.
"""

import itertools
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from data.fault import Fault
from data.keyed import rng
from data.loader_process import LoaderProcess, shared_memory_room
from data.masks import Masking
from data.shared_memory import Slots
from data.slides.tissue import saturated_share
from data.stochastic_depth import StochasticDepth
from data.tiles.augment_parameters import Colour, draw_parameters
from data.tiles.crops import CropSizes, cut
from data.tiles.source import TileSource, UnreadableTile
from data.tiles.stream import Stream

STEPS_AHEAD = 3
EXPECTED_AHEAD = 24  # steps; a source that fetches from afar begins that early
REPLACEMENTS_TRIED = 100
PALE_TRIED = 30  # other tiles of the block, before the most coloured of them is taken


@dataclass
class MicroBatch:
    """Uncoloured views of ``tiles`` consecutive tiles of the global batch, the first of which is its ``first``-th."""

    first: int
    numbers: Tensor  # (tiles,) int64: which tiles
    mpp: Tensor  # (tiles,) float32: µm/px at which each was read, NaN where its source doesn't know
    views: list[Tensor]  # per crop size uint8 (views * tiles, 3, side, side), view after view
    parameters: list[Tensor]  # per crop size float32 (views * tiles, WIDTH): see data.tiles.augment
    masks: Tensor  # bool (global views * tiles, rows, columns)
    masked: Tensor  # int64 (M,): which of masks.flatten() are true
    kept: list[Tensor]  # per crop size int64 (blocks, 2, kept): see `StochasticDepth.draw`; empty without it

    def __reduce__(self) -> tuple[object, ...]:
        # As bytes: between processes a tensor travels as a file of shared memory of its own, which costs more than
        # these hold.
        tensors = (self.numbers, self.mpp, self.masks, self.masked, *self.parameters, *self.kept)
        return _unpickled, (self.first, self.views, [tensor.numpy() for tensor in tensors])

    def pin_memory(self) -> "MicroBatch":
        """The same in page-locked memory, for copies to the device that don't wait."""
        views = [of_size.pin_memory() for of_size in self.views]
        mpp, masks, masked, *kept = (tensor.pin_memory() for tensor in (self.mpp, self.masks, self.masked, *self.kept))
        return MicroBatch(self.first, self.numbers, mpp, views, self.parameters, masks, masked, kept)


def _unpickled(first: int, views: list[Tensor], small: list[np.ndarray]) -> MicroBatch:
    numbers, mpp, patches, masked, *rest = map(torch.from_numpy, small)
    parameters, kept = rest[: len(views)], rest[len(views) :]
    return MicroBatch(first, numbers, mpp, views, parameters, patches, masked, kept)


@dataclass
class RankBatch:
    """A rank's share of global batch ``step``, in micro-batches; ``bad`` names the tiles that could not be read, and
    ``pale`` are the numbers of those passed over."""

    step: int
    parts: list[MicroBatch]
    bad: list[str]
    pale: list[int]

    def pin_memory(self) -> "RankBatch":
        """See `MicroBatch.pin_memory`."""
        return RankBatch(self.step, [part.pin_memory() for part in self.parts], self.bad, self.pale)


class LoadedTile(NamedTuple):
    """What is known of a tile once its views are cut."""

    number: int
    rows: np.ndarray  # (views, WIDTH) float32: colour parameters
    bad: list[str]  # tiles that couldn't be read in its place
    pale: list[int]  # tiles that were passed over


class TileBatches(IterableDataset["RankBatch"]):
    """A rank's share of the global batches ``start … stop − 1``, each cut into ``accumulate`` micro-batches.

    A tile that can't be read is replaced by the next one of its source that can, is named once, and is counted: the run
    goes on while the tiles that were bad stay under the trainer's limit, and every rank still takes the same number of
    tiles. A tile of whose pixels fewer than ``min_saturated`` are coloured (`saturated_share`; nanopath's rule) is
    passed over for others of its block, drawn by its position, and counted.
    """

    def __init__(
        self,
        tiles: TileSource,
        stream: Stream,
        sizes: CropSizes,
        colour: Colour,
        masking: Masking,
        *,
        seed: int,
        start: int,
        stop: int,
        rank: int,
        world_size: int,
        accumulate: int,
        threads: int,
        min_saturated: float | None = None,
        depth: StochasticDepth | None = None,
    ) -> None:
        self.tiles, self.stream, self.sizes, self.colour, self.masking = tiles, stream, sizes, colour, masking
        self.min_saturated, self.depth = min_saturated, depth
        self.seed, self.start, self.stop = seed, start, stop
        self.rank, self.world_size, self.accumulate, self.threads = rank, world_size, accumulate, threads
        self.in_slots = True  # of shared memory
        self.share = stream.batch_size // world_size
        if self.share % accumulate:
            raise Fault(
                f"a rank's {self.share} tiles don't split into trainer.accumulate={accumulate} equal micro-batches."
            )

    def __iter__(self) -> Iterator[RankBatch]:
        self.tiles.hold(self.stream.window * len(self.stream.owned(self.rank, self.world_size)))
        expected: deque[np.ndarray] = deque()
        waiting: deque[tuple[int, list[list[Tensor]], list[Future]]] = deque()
        steps, slots = iter(range(self.start, self.stop)), Slots(self.in_slots)
        ahead = iter(range(self.start, self.stop))
        with ThreadPoolExecutor(self.threads) as pool:
            while True:
                for step in itertools.islice(ahead, STEPS_AHEAD + EXPECTED_AHEAD - len(waiting) - len(expected)):
                    expected.append(self.stream.batch(step, self.rank, self.world_size))
                    self.tiles.expect(expected[-1])
                for step in itertools.islice(steps, STEPS_AHEAD - len(waiting)):
                    waiting.append((step, *self._submit(pool, step, expected.popleft(), slots)))
                if not waiting:
                    return
                step, views, futures = waiting.popleft()
                yield self._collect(step, views, [future.result() for future in futures])

    def _submit(
        self, pool: ThreadPoolExecutor, step: int, numbers: np.ndarray, slots: Slots
    ) -> tuple[list[list[Tensor]], list[Future]]:
        """The memory of a step's views, by micro-batch and crop size, and what fills it."""
        first = step * self.stream.batch_size + self.rank * self.share
        size, sides = self.share // self.accumulate, self.sizes.sides()
        views = [slots.empty([(count * size, 3, side, side) for count, side in sides]) for _ in range(self.accumulate)]
        futures = []
        for i, number in enumerate(numbers.tolist()):
            own = [view for of_size in views[i // size] for view in of_size[i % size :: size]]
            futures.append(pool.submit(self._views, number, first + i, own))
        return views, futures

    def _views(self, number: int, sample: int, views: list[Tensor]) -> LoadedTile:
        """Cut one tile's views into ``views``. ``sample`` is its position in the run, the key of every draw."""
        bad: list[str] = []
        pale: list[int] = []
        number, tile = self._read(number, sample, bad)
        if self.min_saturated is not None:
            number, tile = self._coloured(number, tile, sample, self.min_saturated, bad, pale)
        generator = rng(self.seed, "colour", sample)
        rows = draw_parameters(self.colour, self.sizes.kinds(), generator)
        for view, crop in zip(views, cut(tile, self.sizes, self.seed, sample), strict=True):
            view.copy_(crop)
        return LoadedTile(number, rows, bad, pale)

    def _read(self, number: int, sample: int, bad: list[str]) -> tuple[int, np.ndarray]:
        """A tile, or the next that can be read, and its number; those that can't are named in ``bad``."""
        while True:
            try:
                return number, self.tiles.read(number, self.seed, sample)
            except UnreadableTile as error:
                bad.append(str(error))
                number = error.next % len(self.tiles)
            if len(bad) == REPLACEMENTS_TRIED:
                raise Fault(f"a hundred tiles in a row can't be read: {bad[0]}, and 99 after it; look there.")

    def _coloured(
        self, number: int, tile: np.ndarray, sample: int, least: float, bad: list[str], pale: list[int]
    ) -> tuple[int, np.ndarray]:
        """The tile, or another of its block with ``least`` of coloured pixels; where so many tries find none, the one
        that has most. The others are in ``pale``."""
        share = saturated_share(tile)
        if share >= least:
            return number, tile
        block = self.stream.block(number)
        others = rng(self.seed, "coloured", sample).permutation(len(block))[: PALE_TRIED + 1] + block.start
        for other in [other for other in others.tolist() if other != number][:PALE_TRIED]:
            other, found = self._read(other, sample, bad)
            its = saturated_share(found)
            pale.append(number if its > share else other)
            if its > share:
                number, tile, share = other, found, its
            if share >= least:
                break
        return number, tile

    def _collect(self, step: int, views: list[list[Tensor]], results: list[LoadedTile]) -> RankBatch:
        size = self.share // self.accumulate
        shares = self.masking.ratios(self.stream.batch_size * self.sizes.global_count, self.seed, step)
        shares = shares.reshape(self.stream.batch_size, self.sizes.global_count)
        parts = []
        counts, of_batch = [count for count, _ in self.sizes.sides()], step * self.stream.batch_size
        for begin, of_part in zip(range(0, self.share, size), views, strict=True):
            first = self.rank * self.share + begin
            part = results[begin : begin + size]
            rows = np.stack([of_tile.rows for of_tile in part], 1)  # (views, tiles, WIDTH)
            patches = self._masks(step, first, shares[first : first + size])
            parts.append(
                MicroBatch(
                    first,
                    torch.tensor([one.number for one in part]),
                    torch.tensor([self._mpp(one.number, sample) for sample, one in enumerate(part, of_batch + first)]),
                    of_part,
                    [of_size.flatten(0, 1) for of_size in torch.from_numpy(rows).split(counts)],
                    torch.from_numpy(patches),
                    torch.from_numpy(np.flatnonzero(patches)),
                    self._kept(step, first, size, counts),
                )
            )
        bad = [message for of_tile in results for message in of_tile.bad]
        return RankBatch(step, parts, bad, [number for of_tile in results for number in of_tile.pale])

    def _mpp(self, number: int, sample: int) -> float:
        found = self.tiles.mpp(number, self.seed, sample)
        return float("nan") if found is None else found

    def _kept(self, step: int, first: int, tiles: int, counts: list[int]) -> list[Tensor]:
        if self.depth is None:
            return []
        return [
            torch.from_numpy(crops) for crops in self.depth.draw(counts, tiles, seed=self.seed, step=step, first=first)
        ]

    def _masks(self, step: int, first: int, ratios: np.ndarray) -> np.ndarray:
        """Masks ``(views * tiles, grid, grid)`` of the global crops with these ``ratios`` ``(tiles, views)``."""
        grid, (tiles, views) = self.masking.grid, ratios.shape
        drawn = np.zeros((views, tiles, grid, grid), dtype=bool)
        for tile, view in zip(*np.nonzero(ratios), strict=True):
            sample = step * self.stream.batch_size + first + int(tile)
            drawn[view, tile] = self.masking.mask(ratios[tile, view], rng(self.seed, "mask", sample, int(view)))
        return drawn.reshape(views * tiles, grid, grid)


STEPS_ON_THE_WAY = STEPS_AHEAD + 5  # filled, prefetched, pinned, in use, and one kept for a look


def shared_memory_needed(batches: TileBatches, here: int = 1) -> int:
    """Bytes of shared memory that ``here`` processes of a machine need for their batches that are on the way."""
    tile = sum(3 * count * side * side for count, side in batches.sizes.sides())
    return here * STEPS_ON_THE_WAY * batches.share * tile


def loader_of(batches: TileBatches, pin_memory: bool, here: int = 1) -> LoaderProcess:
    """The loader process around ``batches``, ``here`` of which run on this machine.

    Where shared memory has no room for the steps that are on their way, batches go through a pipe, which is slower.
    """
    room = shared_memory_room()
    batches.in_slots = room is None or shared_memory_needed(batches, here) <= room
    return LoaderProcess(batches, pin_memory, through_pipe=not batches.in_slots)
