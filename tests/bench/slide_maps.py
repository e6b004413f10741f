"""Made-up slides whose labels are known: maps of tissue classes on a grid, and embeddings laid out by them.

A map is 24 × 24 cells: irregular tissue of 300 to 500 tiles, each of one class, smooth in space. What a slide's label
decides:

    composition   the share of A: about .12 or about .28
    arrangement   nests of A border on nests of B, or stay 3 cells away; equal numbers and shapes of both
    nests         as many tiles of A in one nest or in eight
    rare          one tile in a hundred is of A, or none
    enclosure     A around B, beside empty rings of B and lone nests of A; or all this with A and B exchanged
    far           nests of B 8 to 10 cells from the nest of A, or anywhere beyond 5 cells

In *enclosure* both classes have the same shapes in the same numbers, each once alone and once within the other: all
second moments are the same at any distance, whatever is around (see `enclosed`). In *far* what lies within 5 cells of
A or B is the same. So neither is decided by the spread of smoothed tiles.

Everything is keyed by (seed, label, slide): a slide is the same whichever others are made.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count

import numpy as np
from scipy.ndimage import gaussian_filter

from data.keyed import rng

LABELS = ("composition", "arrangement", "nests", "rare", "enclosure", "far")
SIDE = 24  # cells
TISSUE = (300, 500)  # tiles
A, B, NOTHING = 0, 1, -1
SMOOTH, TISSUE_SMOOTH = 2.0, 4.0  # cells: of the fields that classes and tissue are cut from
SHARES, SHARE_SPREAD = (0.12, 0.28), 0.04  # of A in *composition*
PAIRS, HALF = 4, 10  # of nests in *arrangement*, and tiles of each
APART = 3.0  # cells between classes that don't border on each other
NESTED, NESTS = 48, 8  # tiles of A in *nests*, and in how many they are where they are many
RARE = 0.01
INNER, OUTER = 1.5, 2.5  # radii in *enclosure*: of what is enclosed, and of the ring around it
SETS = 2  # of each structure in *enclosure*
NEAR, FAR, SHY = 8.0, 10.0, 5.0  # cells between centres in *far*
FAR_NESTS, FAR_APART = 5, 3.0  # nests of B in *far*, and cells between their centres at least
STAIN, NOISE = 0.3, 0.7  # norms of a slide's shift and of a tile's noise, beside classes' vectors of norm 1


@dataclass(frozen=True)
class SlideMap:
    """``classes`` (rows, columns) int, `NOTHING` where there is no tissue; ``label``: 0 or 1."""

    classes: np.ndarray
    label: int

    @property
    def cells(self) -> np.ndarray:
        """(n, 2) int64 (column, row) of the tiles, in row-major order."""
        return np.argwhere(self.classes != NOTHING)[:, ::-1].astype(np.int64)

    @property
    def of_tiles(self) -> np.ndarray:
        """(n,) their classes."""
        return self.classes[self.classes != NOTHING]


def slide_map(kind: str, classes: int, seed: int, slide: int) -> SlideMap:
    """The map of a slide of label ``kind`` with so many ``classes``, the first two of which are A and B; even slides
    have label 0, odd ones 1. Drawn anew, whole, until everything finds its place."""
    for attempt in count():
        draw = rng(seed, "slide map", kind, slide, attempt)
        where = tissue(draw)
        special = {A} if kind in ("composition", "nests", "rare") else {A, B}
        found = background(draw, where, [one for one in range(classes) if one not in special])
        if PLACED[kind](draw, found, slide % 2):
            return SlideMap(found, slide % 2)
    raise AssertionError


def tissue(draw: np.random.Generator) -> np.ndarray:
    """(side, side) bool: a smooth field, higher in the middle, cut where so many tiles are above."""
    field = gaussian_filter(draw.normal(size=(SIDE, SIDE)), TISSUE_SMOOTH)
    away = np.hypot(*(np.indices((SIDE, SIDE)) - (SIDE - 1) / 2))
    height = field / field.std() - np.square(away / (SIDE / 2))
    return height >= np.sort(height, axis=None)[-draw.integers(TISSUE[0], TISSUE[1] + 1)]


def background(draw: np.random.Generator, where: np.ndarray, classes: list[int]) -> np.ndarray:
    """Classes by which of smooth fields is highest, each raised by a level of its own."""
    fields = np.stack([gaussian_filter(draw.normal(size=where.shape), SMOOTH) for _ in classes])
    levels = draw.normal(scale=0.5, size=(len(classes), 1, 1))
    return np.where(where, np.array(classes)[(fields / fields.std() + levels).argmax(0)], NOTHING)


def nest(draw: np.random.Generator, free: np.ndarray, centre: np.ndarray, tiles: int) -> np.ndarray:
    """(tiles, 2) the cells (row, column) of ``free`` nearest to ``centre``, with a ragged edge; fewer where there are
    fewer."""
    cells = np.argwhere(free)
    away = np.hypot(*(cells - centre).T) + draw.uniform(0, 0.8, len(cells))
    return cells[np.argsort(away, kind="stable")[:tiles]]


def somewhere(draw: np.random.Generator, free: np.ndarray) -> np.ndarray:
    """A cell (row, column) of ``free``."""
    cells = np.argwhere(free)
    return cells[draw.integers(len(cells))]


def distance_to(cells: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Of every place to the nearest of ``cells`` (n, 2); infinite where there are none."""
    if not len(cells):
        return np.full(shape, np.inf)
    places = np.indices(shape).reshape(2, -1).T
    return np.sqrt(np.square(places[:, None] - cells).sum(-1).min(1)).reshape(shape)


def composed(draw: np.random.Generator, found: np.ndarray, label: int) -> bool:
    """Smooth patches of A, so many tiles as the share says."""
    where = found != NOTHING
    share = draw.normal(SHARES[label], SHARE_SPREAD)
    field = np.where(where, gaussian_filter(draw.normal(size=where.shape), SMOOTH), -np.inf)
    tiles = round(max(share, 0.02) * where.sum())
    found.flat[np.argsort(field, axis=None)[-tiles:]] = A
    return True


def arranged(draw: np.random.Generator, found: np.ndarray, label: int) -> bool:
    """Halves of nests: with label 1 both halves of each, A and B; else halves of A and of B apart from each other."""
    where, taken = found != NOTHING, {A: np.empty((0, 2), int), B: np.empty((0, 2), int)}
    for wanted in [(A, B)] * PAIRS if label else [(A,), (B,)] * PAIRS:
        others = np.concatenate(list(taken.values())) if len(wanted) == 2 else taken[B if wanted[0] == A else A]
        own = np.concatenate([taken[one] for one in wanted])
        far_enough = (distance_to(others, where.shape) >= APART) & (distance_to(own, where.shape) > 1.5)
        free = where & far_enough
        if free.sum() < 4 * HALF:
            return False
        centre = somewhere(draw, free)
        cells = nest(draw, free, centre, 2 * HALF)
        angle = draw.uniform(0, 2 * np.pi)
        order = np.argsort((cells - centre) @ [np.sin(angle), np.cos(angle)], kind="stable")
        for one, half in zip(wanted, (order[:HALF], order[HALF:]), strict=False):
            taken[one] = np.concatenate([taken[one], cells[half]])
    for one, cells in taken.items():
        found[tuple(cells.T)] = one
    return True


def nested(draw: np.random.Generator, found: np.ndarray, label: int) -> bool:
    """One nest with label 1, else many."""
    where, taken = found != NOTHING, np.empty((0, 2), int)
    parts = 1 if label else NESTS
    for _ in range(parts):
        free = where & (distance_to(taken, where.shape) >= 2)
        if free.sum() < NESTED // parts:
            return False
        taken = np.concatenate([taken, nest(draw, free, somewhere(draw, free), NESTED // parts)])
    found[tuple(taken.T)] = A
    return True


def scattered(draw: np.random.Generator, found: np.ndarray, label: int) -> bool:
    """Single tiles of A with label 1."""
    cells = np.argwhere(found != NOTHING)
    chosen = cells[draw.permutation(len(cells))[: label * round(RARE * len(cells))]]
    found[tuple(chosen.T)] = A
    return True


def enclosed(draw: np.random.Generator, found: np.ndarray, label: int) -> bool:
    """With label 1 rings of A around B, empty rings of B and lone nests of A, `SETS` of each; else A and B exchanged.

    A then has as many rings and nests as B has, the rings of both border once on what they enclose and once on
    nothing but what is around; and since rings and nests are symmetric, A's place beside B is B's beside A.
    """
    where = found != NOTHING
    first, second = (A, B) if label else (B, A)
    structures = [((first, OUTER), (second, INNER)), ((second, OUTER), (NOTHING, INNER)), ((first, INNER),)] * SETS
    around, put = np.indices(where.shape), []
    free = where.copy()
    for number in draw.permutation(len(structures)).tolist():
        room = distance_to(np.argwhere(~np.pad(free, 1)) - 1, where.shape) > OUTER  # for nests too: no place is theirs
        if not room.any():
            return False
        centre = somewhere(draw, room)
        away = np.hypot(*(around - centre[:, None, None]))
        put += [(one, away <= within) for one, within in structures[number]]
        free &= away > OUTER + 2  # so that no tile is within 2 cells of another structure's
    kept = found.copy()
    for one, cells in put:
        found[cells] = kept[cells] if one == NOTHING else one
    return True


def far_apart(draw: np.random.Generator, found: np.ndarray, label: int) -> bool:
    """A nest of A with nests of B around it: with label 1 at a set distance, else anywhere but near."""
    where = found != NOTHING
    outside = distance_to(np.argwhere(~np.pad(where, 1)) - 1, where.shape)
    inside, around = outside > 1, np.indices(where.shape)

    def away_from(centre: np.ndarray) -> np.ndarray:
        return np.hypot(*(around - centre[:, None, None]))

    middle = somewhere(draw, outside > 2)
    away = away_from(middle)
    ring, anywhere = inside & (away >= NEAR) & (away <= FAR), inside & (away >= SHY)
    if ring.sum() < anywhere.sum() / 4:  # the same for both labels: where A may be tells nothing
        return False
    free, cells = ring if label else anywhere, []
    for _ in range(FAR_NESTS):
        if not free.any():
            return False
        centre = somewhere(draw, free)
        cells.append(away_from(centre) <= 1)
        free = free & (away_from(centre) > FAR_APART)
    found[away <= 2] = A
    for one in cells:
        found[one] = B
    return True


Placed = Callable[[np.random.Generator, np.ndarray, int], bool]
"""Puts into a background what makes the label; False where it finds no place."""
PLACED: dict[str, Placed] = dict(zip(LABELS, (composed, arranged, nested, scattered, enclosed, far_apart), strict=True))


def class_vectors(classes: int, width: int, seed: int) -> np.ndarray:
    """(classes, width) of norm 1, in directions of their own."""
    return unit(rng(seed, "class vectors").normal(size=(classes, width)))


def made_up_tiles(found: SlideMap, vectors: np.ndarray, *key: int | str) -> np.ndarray:
    """(n, width) float32: each tile's class, the slide's stain and the tile's own noise."""
    draw, width = rng(*key, "made-up tiles"), vectors.shape[1]
    stain = STAIN * unit(draw.normal(size=width))
    noise = draw.normal(scale=NOISE / width**0.5, size=(len(found.of_tiles), width))
    return (vectors[found.of_tiles] + stain + noise).astype(np.float32)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Scaled to norm 1 along the last axis."""
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def maps(kind: str, slides: int, classes: int, seed: int) -> Iterator[SlideMap]:
    """The first ``slides`` of a label."""
    return (slide_map(kind, classes, seed, number) for number in range(slides))
