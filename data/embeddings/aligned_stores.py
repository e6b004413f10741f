"""Several stores of the same tiles, each of another tile encoder: whether they are."""

from collections.abc import Callable, Iterable

import numpy as np

from data.embeddings.store import EmbeddingStore
from data.fault import Fault


def require_same_slides(first: EmbeddingStore, other: EmbeddingStore) -> None:
    """Raise Fault unless both hold the same slides with as many tiles each, by their indices alone, and are of two tile
    encoders."""
    if first.encoder_hash == other.encoder_hash:
        raise Fault(
            f"{first.folder} and {other.folder} hold embeddings of one tile encoder ({first.encoder},"
            f" {first.encoder_hash}): give stores of different ones."
        )
    if apart := set(first.slides) ^ set(other.slides):
        slide = min(apart)
        where = first if slide in set(first.slides) else other
        _differ(first, other, slide, f"only {where.folder} has it")
    for slide in first.slides:
        counts = first.rows(slide), other.rows(slide)
        if counts[0] != counts[1]:
            _differ(first, other, slide, f"{counts[0]} tiles against {counts[1]}")


def require_same_tiles(
    first: EmbeddingStore, other: EmbeddingStore, watched: Callable[[list[str]], Iterable[str]] = iter
) -> None:
    """Raise Fault unless the tiles of every slide lie at the same coordinates in both. Reads all coordinates; ``watched``
    as in `Statistics.of`."""
    for slide in watched(first.slides):
        here, there = first.read(slide), other.read(slide)
        if not np.array_equal(here.coordinates, there.coordinates):
            row = int(np.flatnonzero((here.coordinates != there.coordinates).any(axis=1))[0])
            places = (tuple(store.coordinates[row].tolist()) for store in (here, there))
            _differ(first, other, slide, " against ".join(f"a tile at {place}" for place in places))
        if here.tile_size_level0 != there.tile_size_level0:
            sizes = f"tiles of {here.tile_size_level0:g} against {there.tile_size_level0:g} pixels of level 0"
            _differ(first, other, slide, sizes)


def _differ(first: EmbeddingStore, other: EmbeddingStore, slide: str, how: str) -> None:
    raise Fault(
        f"{first.folder} and {other.folder} don't hold the same tiles, at first of slide {slide} ({how}): embed the same"
        " shards or slides with both tile encoders, or choose slides that are alike with data.slides=."
    )
