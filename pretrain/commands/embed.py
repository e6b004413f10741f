"""Turn every slide of a folder of tile shards into a sequence of tile embeddings.

The encoder is frozen. out= becomes a store with one float16 matrix per slide, tiles in row-major order, which
'pretrain slide' trains on. A store belongs to one encoder: another one's embeddings are refused. h5=true also writes
<out>/h5/<slide>.h5 with features and coords as TRIDENT has them.

Stopped at any moment, the same command goes on with the first slide that isn't whole.

Examples:

    pretrain embed checkpoint=runs/tile shards=shards out=embeddings
    pretrain embed checkpoint=encoder shards=shards out=embeddings h5=true batch=256
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from data.embeddings import EmbeddingStore, EmbeddingWriter
from data.embeddings_h5 import export_h5
from data.fault import Fault
from data.shard_index import UNKNOWN, ShardIndex, read_jpeg
from pretrain.ahead import map_ahead
from pretrain.progress import Progress, say, track


@dataclass
class Config:
    checkpoint: str
    shards: str
    out: str
    h5: bool
    batch: int
    threads: int
    max_bad_fraction: float
    device: str | None
    precision: str


Embed = Callable[[Sequence[np.ndarray]], np.ndarray]
"""From n tiles, each uint8 (height, width, 3), to embeddings float32 (n, width)."""


def run(config: Config) -> None:
    """Embed what isn't embedded yet."""
    from pretrain.encoders import load_encoder

    index = ShardIndex.open(Path(config.shards))
    encoder = load_encoder(config.checkpoint, config.device or "", config.precision)
    out = Path(config.out)
    with EmbeddingWriter(out, encoder.width, encoder.name, encoder.hash) as writer:
        pending = [slide for slide in range(len(index.slides)) if not writer.done(index.slides[slide])]
        if pending:
            say(f"{encoder.name} ({encoder.hash}): {encoder.preprocessing}")
            embed_slides(encoder.embed_each, encoder.width, index, pending, writer, config)
    store = EmbeddingStore.open(out)
    if config.h5:
        write_h5(store, out / "h5")
    tiles = sum(store.rows(slide) for slide in store.slides)
    done = f"{out}: {len(store.slides)} slides, {tiles} tiles, {store.width} wide"
    say(done if pending else f"{done}; all were there already, nothing to do")


def embed_slides(
    embed: Embed, width: int, index: ShardIndex, pending: Sequence[int], writer: EmbeddingWriter, config: Config
) -> None:
    """Embed the slides ``pending`` in batches that run on from one slide into the next; add each as soon as it is whole.

    A tile that can't be decoded is named and left out of its slide. Raises `Fault` when that is more than
    ``max_bad_fraction`` of a slide, or when the shards don't say where tiles lie.
    """
    tiles_of: list[int] = index.meta["slides"]["tiles"]
    left = sum(tiles_of[slide] for slide in pending)
    progress = Progress(len(index), "embed", "tiles", done=len(index) - left)
    rows_of: dict[int, np.ndarray] = {}  # of slides that are begun and not yet added
    vectors: list[np.ndarray] = []
    whole: list[bool] = []

    def tiles_in_order() -> Iterator[tuple[int, int]]:
        for slide in pending:
            rows_of[slide] = placed_rows(index, slide)
            yield from ((slide, int(row)) for row in rows_of[slide])

    def decode(batch: list[tuple[int, int]]) -> list[np.ndarray | Fault]:
        return read_tiles(index, [row for _, row in batch])

    try:
        for batch, tiles in zip_ahead(decode, batches(tiles_in_order(), config.batch), config.threads):
            good = [tile for tile in tiles if not isinstance(tile, Fault)]
            embedded = iter(embed(good) if good else np.empty((0, width), np.float32))
            for (slide, _row), tile in zip(batch, tiles, strict=True):
                if isinstance(tile, Fault):
                    say(f"left out: {tile}")
                    whole.append(False)
                else:
                    vectors.append(next(embedded))
                    whole.append(True)
                if len(whole) == len(rows_of[slide]):
                    matrix = np.array(vectors, dtype=np.float32).reshape(-1, width)
                    add(index, slide, rows_of.pop(slide), matrix, np.array(whole), writer, config.max_bad_fraction)
                    vectors, whole = [], []
            progress.advance(len(batch), index.slides[batch[-1][0]])
    finally:
        progress.close()


def placed_rows(index: ShardIndex, slide: int) -> np.ndarray:
    """Rows of a slide's tiles in the index, in the order in which they lie in the tars, so that each tar is read once through.

    Raises `Fault` when nobody recorded where the tiles lie on the slide.
    """
    rows = index.rows_of(slide)
    if not index.facts(slide)["tile_size_level0"] or (np.asarray(index.x[rows]) == UNKNOWN).any():
        raise Fault(
            f"{index.folder} doesn't say where the tiles of {index.slides[slide]} lie (x, y and tile_size_level0 in each tile's .json), "
            "and a slide's sequence needs their places: make the shards with 'pretrain shard'"
        )
    return rows


def add(
    index: ShardIndex,
    slide: int,
    rows: np.ndarray,
    vectors: np.ndarray,
    whole: np.ndarray,
    writer: EmbeddingWriter,
    max_bad_fraction: float,
) -> None:
    """Add one slide to the store: ``vectors`` (m, width) of those m of its tiles whose ``whole`` (n,) is true."""
    name, facts = index.slides[slide], index.facts(slide)
    bad = int((~whole).sum())
    if bad > max_bad_fraction * len(whole):
        raise Fault(
            f"{bad} of {len(whole)} tiles of {name} in {index.folder} can't be decoded: make the shard again, or allow it with "
            f"max_bad_fraction={bad / len(whole):.3g}"
        )
    kept = rows[whole]
    coordinates = np.stack([index.x[kept], index.y[kept]], axis=1).astype(np.int64)
    mpp = float(facts["mpp"]) if facts["mpp"] else float("nan")
    writer.add(name, vectors, coordinates, float(facts["tile_size_level0"]), mpp)


def batches(stream: Iterator[tuple[int, int]], size: int) -> Iterator[list[tuple[int, int]]]:
    """Consecutive items in lists of ``size``, the last one shorter."""
    while batch := list(islice(stream, size)):
        yield batch


def zip_ahead(
    decode: Callable[[list[tuple[int, int]]], list[np.ndarray | Fault]],
    items: Iterator[list[tuple[int, int]]],
    threads: int,
) -> Iterator[tuple[list[tuple[int, int]], list[np.ndarray | Fault]]]:
    """Each batch with its decoded tiles, decoded ``threads`` batches ahead."""
    return map_ahead(lambda batch: (batch, decode(batch)), items, threads, ahead=threads + 1)


def read_tiles(index: ShardIndex, rows: list[int]) -> list[np.ndarray | Fault]:
    """Decode tiles of the index: uint8 (height, width, 3) each, or the `Fault` that says which one can't be and why."""
    import simplejpeg

    tiles: list[np.ndarray | Fault] = []
    descriptors: dict[int, int] = {}
    try:
        for row in rows:
            file = int(np.searchsorted(index.file_start, row, side="right")) - 1
            if file not in descriptors:
                descriptors[file] = os.open(index.path(file), os.O_RDONLY)
            try:
                jpeg = read_jpeg(descriptors[file], int(index.offset[row]), int(index.length[row]))
                tiles.append(simplejpeg.decode_jpeg(jpeg))
            except (ValueError, Fault) as error:
                place = f"({int(index.x[row])}, {int(index.y[row])}) in {index.path(file)}"
                tiles.append(Fault(f"the tile at {place} can't be decoded ({error})"))
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)
    return tiles


def write_h5(store: EmbeddingStore, folder: Path) -> None:
    """One h5 per slide that has none yet."""
    folder.mkdir(exist_ok=True)
    absent = [slide for slide in store.slides if not (folder / f"{slide}.h5").exists()]
    for slide in track(absent, len(absent), "h5", "slides"):
        export_h5(store, slide, folder / f"{slide}.h5")
