"""The table that curation makes: a row for every tile of the stores, in their order, chosen or not.

slide, x, y, tile_size_level0     which tile (`data.tiles.sample_table`)
row                               its row among the slide's embeddings
cluster_1, cluster_2, …           the clusters that it lies in, from the finest level up
weight                            how often it is trained on in a pass; 0: never
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.embeddings.index import FACTS_KEY
from data.files import appearing
from data.keyed import rng
from data.tiles.sample_table import ROWS_AT_ONCE, SIDE_LEVEL0, WEIGHT
from pretrain.curation.balance import Lots
from pretrain.curation.labels import TileLabels
from pretrain.curation.rows import StoreRows


@dataclass
class SeenClusters:
    """Tiles that are shown of some clusters of the top level: ``each`` of all its tiles, drawn with equal chances."""

    clusters: list[int]
    each: int
    tiles: dict[int, list[tuple[float, str, int, int, int]]] = field(default_factory=dict)  # draw, slide, x, y, weight

    def look(self, table: pa.Table, clusters: np.ndarray, draw: np.random.Generator) -> None:
        """See what a slide has of them; ``clusters`` (n,) are its tiles' of the top level."""
        lots = draw.random(len(clusters))
        for cluster in self.clusters:
            rows = np.flatnonzero(clusters == cluster)
            rows = rows[np.argsort(lots[rows])[: self.each]]
            found = [
                (float(lots[row]), *(table.column(name)[row].as_py() for name in ("slide", "x", "y", WEIGHT)))
                for row in rows.tolist()
            ]
            self.tiles[cluster] = sorted([*self.tiles.get(cluster, []), *found])[: self.each]


@dataclass(frozen=True)
class SlideShare:
    """A slide's tiles, and how often its tiles are trained on in a pass."""

    slide: str
    tiles: int
    taken: int


def write_curated(
    path: Path,
    rows: StoreRows,
    labels: TileLabels,
    parents: list[np.ndarray],
    lots: Lots,
    seen: SeenClusters,
    seed: int,
    facts: dict[str, Any],
    watched: Callable[[int], object],
) -> list[SlideShare]:
    """Write the table, whole or not at all, ``facts`` in its metadata; returns what it takes of each slide."""
    levels = [f"cluster_{level + 1}" for level in range(len(parents) + 1)]
    kinds = {"slide": pa.dictionary(pa.int32(), pa.string()), "x": pa.int64(), "y": pa.int64()}
    kinds |= {SIDE_LEVEL0: pa.float64(), "row": pa.int32(), **dict.fromkeys(levels, pa.int32()), WEIGHT: pa.int32()}
    schema = pa.schema(kinds.items()).with_metadata({FACTS_KEY: json.dumps(facts).encode()})
    shares = []
    with (
        appearing(path) as partial,
        pq.ParquetWriter(partial, schema, compression="zstd", write_page_checksum=True) as writer,
    ):
        waiting: list[pa.Table] = []
        for slide, table in _of_slides(rows, labels, parents, lots, seed, schema):
            seen.look(table, np.asarray(table.column(levels[-1])), rng(seed, "seen", slide))
            shares.append(SlideShare(slide, len(table), int(np.asarray(table.column(WEIGHT)).sum())))
            waiting.append(table)
            if sum(map(len, waiting)) >= ROWS_AT_ONCE:
                writer.write_table(pa.concat_tables(waiting).unify_dictionaries(), ROWS_AT_ONCE)
                waiting = []
            watched(len(table))
        if waiting:
            writer.write_table(pa.concat_tables(waiting).unify_dictionaries(), ROWS_AT_ONCE)
    return shares


def _of_slides(
    rows: StoreRows, labels: TileLabels, parents: list[np.ndarray], lots: Lots, seed: int, schema: pa.Schema
) -> Iterator[tuple[str, pa.Table]]:
    for number, slide in enumerate(rows.slides):
        first, last = rows.numbering.starts[number : number + 2].tolist()
        found = rows.store.read(slide)
        clusters = [labels.read(first, last)]
        for above in parents:
            clusters.append(above[clusters[-1]])
        weights = lots.weights(clusters[0], rng(seed, "chosen", slide))
        count = last - first
        columns = [
            pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int32)), pa.array([slide])),
            *found.coordinates.T,
            np.full(count, found.tile_size_level0),
            np.arange(count),
            *clusters,
            weights,
        ]
        arrays = [
            one if isinstance(one, pa.Array) else pa.array(one).cast(kind)
            for one, kind in zip(columns, schema.types, strict=True)
        ]
        yield slide, pa.Table.from_arrays(arrays, schema=schema)
