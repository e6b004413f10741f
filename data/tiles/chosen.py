"""Some tiles of any source, each as often as a table says: what ``data.sample`` makes of it.

    the source's tiles   0 1 2 3 4 5 6 7 8 9 …          its blocks  ├── a ──┤├── b ──┤
    their weights        1 0 0 3 0 0 1 2 0 0 …
    this one's tiles     0 3 6 7 … | 3 7 … | 3 …                    ├ a ┤├ b ┤ | ├a┤├b┤ | ├a┤

A tile that comes three times in a pass has three numbers here, in three rounds over the source: blocks of a round are
those of the source with what is left of them, so that a tile's turns lie apart, and neighbours are read together as
before. Everything else is the stream's: each number once a pass, the same for any number of processes.

Which tiles these are is found once, by slide and place, and kept in a file beside the table, which is mapped.
"""

import hashlib
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.fault import Fault
from data.files import appearing
from data.npz_files import SPOILT, mapped, place_of, write_column
from data.recently_made import RecentlyMade
from data.tiles.places import TilePlaces, place_keys
from data.tiles.sample_table import SampleTable
from data.tiles.source import TileSource, UnreadableTile, cut_blocks
from data.tiles.stream import Part

SAME_SIDE = 0.001  # share by which a tile's side may differ: it is rounded where others write it
NAMES_SHOWN = 2
SLIDES_KEPT = 64  # of the table, where a source has tiles of several slides mixed


@dataclass(frozen=True)
class Chosen:
    """What a table chooses of a source: ``numbers`` of its tiles, part after part, and in a part round after round
    (``rounds`` of each, with their lengths), ascending in each; and what was counted."""

    numbers: np.ndarray  # (n,) int64
    rounds: list[list[int]]
    digest: str
    tiles: int  # of the source that come at all
    left: int  # of the source that the table says not to take
    unknown: int  # of the source that the table hasn't got
    lost: int  # tiles to take that the source hasn't got


class ChosenTiles(TileSource):
    """The tiles of ``source`` that are ``chosen``, with ``group`` as for other sources. Raises Fault where tiles of one
    slide are too few to be dealt out by the group."""

    def __init__(self, source: TileSource, chosen: Chosen, group: int = 1) -> None:
        self.source, self.chosen, self.numbers = source, chosen, chosen.numbers
        self.digest = f"{source.digest} of {chosen.digest}"
        lengths = [length for rounds in chosen.rounds for length in rounds]
        self._round_starts = np.cumsum([0, *lengths])
        rounds_of = list(map(len, chosen.rounds))
        self._first_round = np.repeat(np.cumsum([0, *rounds_of[:-1]]), rounds_of)  # of the part of each round
        self._span = 1  # blocks of the source that one of these lies in, at most
        self.parts, first, which = [], 0, 0
        for part, rounds in zip(source.parts, chosen.rounds, strict=True):
            starts = first + np.cumsum([0, *part.block_sizes.tolist()])
            ends = [self._round_starts[which + turn : which + turn + 2] for turn in range(len(rounds))]
            counts = [np.diff(np.searchsorted(self.numbers[begin:end], starts)) for begin, end in ends]
            sizes = [self._dealt_out(of_round, starts[:-1], group, not turn) for turn, of_round in enumerate(counts)]
            self.parts.append(Part(np.concatenate(sizes), part.weight, part.name))
            first, which = int(starts[-1]), which + len(rounds)

    def _dealt_out(self, counts: np.ndarray, starts: np.ndarray, group: int, whole: bool) -> np.ndarray:
        """Sizes of the blocks of a round of which ``counts`` tiles are in each block of the source; ``whole``: of the
        round that has every tile."""
        starts, counts = starts[counts > 0], counts[counts > 0]
        if group == 1:
            return counts
        slides = [self.source.slide(int(start)) for start in starts]
        begins = [at for at, name in enumerate(slides) if not at or name is None or name != slides[at - 1]]
        runs = np.add.reduceat(counts, begins)
        if whole and runs.mean() < group:
            raise Fault(
                f"data.slides_per_lane deals out {group} tiles of one slide together, and data.sample takes"
                f" {runs.mean():.3g} of a slide: leave data.slides_per_lane null, or choose more tiles."
            )
        self._span = max(self._span, int(np.diff([*begins, len(counts)]).max()))
        return cut_blocks(runs, group)

    def held_out(self) -> TileSource | None:
        return self.source.held_out()

    def name(self, number: int) -> str:
        return self.source.name(int(self.numbers[number]))

    def slide(self, number: int) -> str | None:
        return self.source.slide(int(self.numbers[number]))

    def mpp(self, number: int, seed: int = 0, sample: int = 0) -> float | None:
        return self.source.mpp(int(self.numbers[number]), seed, sample)

    def places(self) -> Iterator[TilePlaces]:
        raise Fault("data.sample is given twice, of a mixture and of a member of it: leave one out.")

    def read(self, number: int, seed: int = 0, sample: int = 0) -> np.ndarray:
        try:
            return self.source.read(int(self.numbers[number]), seed, sample)
        except UnreadableTile as error:
            # The next of the same round that may be sound again; where none is left, one of the first round, which has
            # every tile of the part.
            turn = int(np.searchsorted(self._round_starts, number, side="right")) - 1
            following, end = self._from(error.next, turn)
            if not number < following < end:
                first = int(self._first_round[turn])
                following, end = self._from(error.next, first)
                following = following if following < end else int(self._round_starts[first])
            raise UnreadableTile(str(error), following) from error

    def _from(self, number: int, turn: int) -> tuple[int, int]:
        """The first tile of a round that is ``number`` of the source or a later one, and the round's end."""
        begin, end = self._round_starts[turn : turn + 2].tolist()
        return begin + int(np.searchsorted(self.numbers[begin:end], number)), end

    def hold(self, blocks: int) -> None:
        self.source.hold(blocks * self._span)

    def expect(self, numbers: np.ndarray) -> None:
        self.source.expect(self.numbers[numbers])


def chosen_path(table: Path, source: TileSource) -> Path:
    """Where what a table chooses of a source is kept, by what both are: another table of that name has another. Raises
    Fault where there is no table."""
    try:
        told = table.stat()
    except OSError as error:
        raise Fault(
            f"there is no table of tiles at {table} ({error.strerror}): 'pretrain curate' makes one."
        ) from error
    asked = json.dumps(
        [source.digest, [int(part.block_sizes.sum()) for part in source.parts], told.st_size, told.st_mtime_ns]
    )
    return table.with_name(f"{table.stem}-{hashlib.blake2b(asked.encode(), digest_size=8).hexdigest()}.npz")


def find_chosen(
    path: Path,
    table: SampleTable,
    source: TileSource,
    progress: Callable[[Iterable[TilePlaces]], Iterable[TilePlaces]],
) -> None:
    """Look up every tile of a source in a table, and write what is chosen to ``path``; ``progress`` passes on what it
    is given.

    In memory is 16 bytes a chosen tile. Raises Fault where a part of the source has none, or lies on another grid.
    """
    found = [np.empty((0, 2), np.int64)]  # number and weight
    met: dict[str, np.ndarray] = {}  # of each slide, which rows of the table the source has
    first = left = unknown = taken = placed = 0
    names: list[str] = []
    samples = RecentlyMade(table.of, SLIDES_KEPT)
    for places in progress(source.places()):
        keys = place_keys(places.x, places.y)
        weights = np.full(len(keys), -1, dtype=np.int64)
        order = np.argsort(places.slide, kind="stable")
        bounds = np.flatnonzero(np.diff(places.slide[order], prepend=-1, append=-1))
        for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            rows = order[begin:end]
            slide = places.slides[int(places.slide[rows[0]])]
            names += [slide] if len(names) < NAMES_SHOWN and slide not in names else []
            sample = samples.get(slide)
            if sample is None:
                continue
            side = float(places.sides[int(places.slide[rows[0]])])
            if side and sample.side and abs(side / sample.side - 1) > SAME_SIDE:
                raise Fault(
                    f"tiles of {slide} are {side:g} level-0 pixels a side in this source and {sample.side:g} in"
                    f" {table.path}: take tiles of the size and µm/px that were embedded, or curate embeddings of these."
                )
            at = np.minimum(np.searchsorted(sample.keys, keys[rows]), len(sample.keys) - 1)
            there = sample.keys[at] == keys[rows]
            weights[rows[there]] = sample.weights[at[there]]
            mine = met.setdefault(slide, np.zeros(len(sample.keys), bool))
            fresh = np.unique(at[there])
            fresh = fresh[~mine[fresh]]
            mine[fresh], taken = True, taken + int((sample.weights[fresh] > 0).sum())
        numbers = np.flatnonzero(weights > 0)
        found.append(np.stack([numbers + first, weights[numbers]], 1))
        left, unknown = left + int((weights == 0).sum()), unknown + int((weights < 0).sum())
        first, placed = first + len(keys), placed + int((keys >= 0).sum())
    if not placed:
        raise Fault(
            f"{table.path} chooses tiles by slide and place, and nobody recorded where this source's lie: make shards of"
            " them by 'pretrain shard', or leave data.sample out."
        )
    chosen = np.concatenate(found)
    if not len(chosen):
        raise Fault(
            f"this source has none of the {table.chosen:,} tiles that {table.path} chooses: its slides are called"
            f" {', '.join(names)} …, and the table's {', '.join(table.slides[:NAMES_SHOWN])} …; take the source whose"
            " tiles were embedded, under the same names."
        )
    _write(path, source, chosen, left, unknown, table.chosen - taken)


def _write(path: Path, source: TileSource, chosen: np.ndarray, left: int, unknown: int, lost: int) -> None:
    ends = np.cumsum([int(part.block_sizes.sum()) for part in source.parts])
    bounds = np.searchsorted(chosen[:, 0], [0, *ends.tolist()])
    pieces, rounds = [], []
    for part, begin, end in zip(source.parts, bounds[:-1], bounds[1:], strict=True):
        numbers, weights = chosen[begin:end].T
        if not len(numbers):
            raise Fault(f"data.sample chooses no tile of {part.name}: leave that out, or choose some of it.")
        of_part = [numbers[weights > turn] for turn in range(int(weights.max()))]
        pieces += of_part
        rounds.append([len(numbers) for numbers in of_part])
    digest = hashlib.blake2b(json.dumps(rounds).encode(), digest_size=8)
    for piece in pieces:
        digest.update(piece.astype("<i8").tobytes())
    facts = {"tiles": len(chosen), "left": left, "unknown": unknown, "lost": lost}
    with appearing(path) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        write_column(archive, "numbers", np.dtype(np.int64), sum(map(len, pieces)), pieces)
        archive.writestr("meta.json", json.dumps({"rounds": rounds, "digest": digest.hexdigest()} | facts))


def read_chosen(path: Path) -> Chosen:
    """What `find_chosen` wrote. Raises Fault where it is damaged."""
    try:
        with path.open("rb") as raw, zipfile.ZipFile(raw) as archive:
            meta = json.loads(archive.read("meta.json"))
            numbers = mapped(path, place_of(archive, raw, "numbers"))
        return Chosen(numbers, **meta)
    except (*SPOILT, TypeError) as error:
        raise Fault(f"{path} is damaged ({error}): delete it, and the same command makes it anew.") from error
