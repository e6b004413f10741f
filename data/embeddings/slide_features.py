"""Slide embeddings as Parquet: one row per slide, which ``pandas.read_parquet(folder)`` reads as one table.

    slide_store.json            both encoders and their hashes: one folder, one slide encoder on one tile encoder
    slides-0-000000.parquet …   slide, tiles (their number), and per slide
        mean_tiles              (D)               mean of the tile embeddings: the baseline that needs no slide encoder
        pooled, cls             (width)           the slide encoder's two summaries
        pooled_layers           ((depth + 1) · width)  of the embedding and of every layer, one after another
        cls_layers              ((depth + 1) · width)

All are float32. Files are published whole, by a rename; part numbers keep the tasks of a job array apart.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.fault import Fault
from data.files import appearing

ABOUT = "slide_store.json"
SLIDE_VECTORS = ("mean_tiles", "pooled", "cls", "pooled_layers", "cls_layers")


def slides_in(folder: Path) -> set[str]:
    """The slides whose embeddings are there."""
    return {slide for file in _files(folder) for slide in pq.read_table(file, columns=["slide"])["slide"].to_pylist()}


def add_rows(folder: Path, part: int, rows: list[dict[str, object]]) -> None:
    """Publish some slides' rows, each with ``slide``, ``tiles`` and the arrays of `SLIDE_VECTORS`, in a file of their
    own."""
    number = len(list(folder.glob(f"slides-{part}-*.parquet")))
    path = folder / f"slides-{part}-{number:06d}.parquet"
    columns: dict[str, pa.Array] = {
        "slide": pa.array([row["slide"] for row in rows]),
        "tiles": pa.array([row["tiles"] for row in rows], pa.int64()),
    }
    for kind in SLIDE_VECTORS:
        values = np.stack([np.asarray(row[kind], np.float32).ravel() for row in rows])
        columns[kind] = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
    with appearing(path) as partial:
        pq.write_table(pa.table(columns), partial)


def read_slide_features(folder: Path) -> tuple[list[str], dict[str, np.ndarray]]:
    """Slides, sorted, and an array (slides, dimensions) float32 for each of `SLIDE_VECTORS`. Fault where there are
    none."""
    files = _files(Path(folder))
    if not files:
        raise Fault(f"{folder} holds no slide embeddings: make them with 'pretrain embed stage=slide'.")
    table = pa.concat_tables([pq.read_table(file) for file in files]).sort_by("slide")
    n = table.num_rows
    arrays = {kind: table[kind].combine_chunks().flatten().to_numpy().reshape(n, -1) for kind in SLIDE_VECTORS}
    return table["slide"].to_pylist(), arrays


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("slides-*.parquet"))
