"""Slide embeddings as Parquet, a row a slide: ``pandas.read_parquet(folder / "slides.parquet")``.

    slide_store.json            both encoders and their hashes, and which pooling is the default: one folder, one of each
    clusters.json               the clusters of tiles that cluster_means and cluster_moments are of
    pieces/0-000000.parquet …   what was embedded since, some slides each; part numbers keep a job array's tasks apart
    finished/1-of-2 …           empty: that part of a job array has come to its end; 0-of-0: one process has embedded all
    slides.parquet              all of them, after `gather_pieces`; what slide_store.json says is its schema's metadata

    slide, patient              null where the patient isn't known
    tiles                       their number
    vector                      the default: one of the poolings below, which is repeated
    mean_tiles                  (D)       mean of the tile embeddings: the baseline that needs no slide encoder
    pooled                      (width)   mean of the slide encoder's output tiles
    mean_std                    (2 width) with their standard deviation
    cluster_means               (k width) their mean within each cluster of input tiles; where it has none, within all
    cluster_moments             (2 (k + 1) width) mean_std; then of each cluster its mean times its share of the tiles, and
                                its standard deviation times that share's root: what it adds to the mean and the variance
    pooled_layers               ((depth + 1) width)  of the embedding and of every layer, one after another
    cls, cls_layers             of the class token

All vectors are float32. Files are published whole, by a rename.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data import lease
from data.embeddings.index import FACTS_KEY
from data.embeddings.store import claim
from data.fault import Fault
from data.files import appearing, write_whole
from data.json_files import read_object

ABOUT, GATHERED, PIECES, FINISHED = "slide_store.json", "slides.parquet", "pieces", "finished"
MAPS = "maps.json"  # what slide_store.json is in a folder of maps
OF_CLUSTERS = ("cluster_means", "cluster_moments")  # poolings that need clusters of tiles
POOLINGS = ("pooled", "mean_std", "cluster_means", "cluster_moments", "pooled_layers", "cls", "cls_layers")
SLIDE_VECTORS = ("vector", "mean_tiles", *POOLINGS)
OF_ANOTHER_TIME = "it is of an earlier version or broken: embed into a new folder"
FACTS = {"format", "encoder", "encoder_hash", "width", "pooling"}


def claim_slide_store(folder: Path, about: dict[str, object], name: str = ABOUT) -> None:
    """Write what a folder holds (``encoder``, ``encoder_hash``, ``width``, and how it was made) into its file ``name``,
    or hold it to what it already is. Raises Fault where it is something else."""
    if (folder / name).exists():
        there = read_object(folder / name, {"encoder_hash"}, OF_ANOTHER_TIME)
        for setting in about:
            if there["encoder_hash"] == about["encoder_hash"] and there.get(setting) != about[setting]:
                raise Fault(
                    f"{folder} was made with {setting}={there.get(setting)}, not {setting}={about[setting]}: choose"
                    " another folder for these."
                )
    claim(folder, about, name)


def slide_store_facts(folder: Path) -> dict[str, Any]:
    """What `ABOUT` says. Raises Fault where it isn't there, or is damaged."""
    if not (folder / ABOUT).is_file():
        raise Fault(f"{folder} holds no slide embeddings: make them with 'pretrain embed stage=slide'.")
    return read_object(folder / ABOUT, FACTS, OF_ANOTHER_TIME)


def slides_in(folder: Path) -> set[str]:
    """The slides whose embeddings are there."""
    return {slide for table in _tables(folder, ["slide"]) for slide in table["slide"].to_pylist()}


def add_rows(folder: Path, part: int, rows: Sequence[Mapping[str, object]]) -> None:
    """Publish some slides' rows, each with ``slide``, ``tiles``, ``mean_tiles`` and `POOLINGS`, in a piece of their
    own."""
    about = slide_store_facts(folder)
    number = len(list((folder / PIECES).glob(f"{part}-*.parquet")))
    while (path := folder / PIECES / f"{part}-{number:06d}.parquet").exists():  # some were gathered meanwhile
        number += 1
    columns: dict[str, pa.Array] = {
        "slide": pa.array([row["slide"] for row in rows], pa.string()),
        "patient": pa.nulls(len(rows), pa.string()),
        "tiles": pa.array([row["tiles"] for row in rows], pa.int64()),
    }
    for name in SLIDE_VECTORS:
        of = about["pooling"] if name == "vector" else name
        values = np.stack([np.asarray(row[of], np.float32).ravel() for row in rows])
        columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
    metadata = {FACTS_KEY: (folder / ABOUT).read_bytes()}
    with appearing(path) as partial:
        pq.write_table(pa.table(columns, metadata=metadata), partial)


def finish_part(folder: Path, part: int, parts: int) -> None:
    """Note that a part's slides are all there, for `require_parts_finished`; part 0 of 0 is all slides."""
    write_whole(folder / FINISHED / f"{part}-of-{parts}", "")


def require_parts_finished(folder: Path) -> None:
    """Raise Fault where no division of a job array has come to its end in all of its parts, naming one that hasn't."""
    finished: dict[int, set[int]] = {}
    for path in (folder / FINISHED).glob("*-of-*"):
        part, of = map(int, path.name.split("-of-"))
        finished.setdefault(of, set()).add(part)
    left = {parts: [part for part in range(1, parts + 1) if part not in done] for parts, done in finished.items()}
    if left and all(left.values()):
        most = max(left)
        raise Fault(
            f"{len(left[most])} of the {most} parts of {folder} have not come to their end, the first of them"
            f" part={left[most][0]}/{most}: run that task again, then merge."
        )


def gather_pieces(folder: Path, patients: Mapping[str, str]) -> int:
    """Put all pieces into one file, with the ``patients`` that are known now, by slide; others keep the one that they
    have. Returns how many slides there are. May be repeated, and interrupted; pieces that are added meanwhile stay."""
    with lease.alone(folder, ".gathering", doing="another 'pretrain embed'"):
        pieces = sorted((folder / PIECES).glob("*.parquet"))
        whole = folder / GATHERED
        seen: set[str] = set()
        if whole.exists():
            table = pq.read_table(whole, columns=["slide", "patient"])
            kept = dict(zip(table["slide"].to_pylist(), table["patient"].to_pylist(), strict=True))
            if not pieces and all(kept[slide] == patient for slide, patient in patients.items() if slide in kept):
                return len(kept)
        with appearing(whole) as partial:
            writer: pq.ParquetWriter | None = None
            for path in [*([whole] if whole.exists() else []), *pieces]:
                with pq.ParquetFile(path) as file:
                    for batch in file.iter_batches(batch_size=1024):
                        some = _with_patients(pa.Table.from_batches([batch], file.schema_arrow), patients, seen)
                        writer = writer or pq.ParquetWriter(partial, some.schema)
                        writer.write_table(some)
            if writer is not None:
                writer.close()
        for path in pieces:
            path.unlink()
    return len(seen)


def read_slide_features(folder: Path) -> tuple[list[str], dict[str, np.ndarray]]:
    """Slides, sorted, and an array (slides, dimensions) float32 for each of `SLIDE_VECTORS`. Fault where there are
    none."""
    slide_store_facts(Path(folder))
    tables = list(_tables(Path(folder), ["slide", *SLIDE_VECTORS]))
    if not tables:
        raise Fault(f"{folder} holds no slide embeddings yet: run 'pretrain embed stage=slide' to its end.")
    table = pa.concat_tables(tables)
    slides, rows = np.unique(np.array(table["slide"].to_pylist()), return_index=True)
    arrays = {name: table[name].combine_chunks().flatten().to_numpy() for name in SLIDE_VECTORS}
    return slides.tolist(), {name: array.reshape(table.num_rows, -1)[rows] for name, array in arrays.items()}


def _tables(folder: Path, columns: list[str]) -> Iterator[pa.Table]:
    """All files; pieces come first, since what was gathered since they were listed is in the whole one."""
    for path in [*sorted((folder / PIECES).glob("*.parquet")), folder / GATHERED]:
        if path.exists():
            yield pq.read_table(path, columns=columns, partitioning=None)


def _with_patients(table: pa.Table, patients: Mapping[str, str], seen: set[str]) -> pa.Table:
    """The rows whose slides weren't ``seen`` yet, with patients filled in."""
    slides = table["slide"].to_pylist()
    table = table.filter(pa.array([slide not in seen for slide in slides], pa.bool_()))
    seen |= set(slides)
    told = [
        patients.get(slide, patient)
        for slide, patient in zip(table["slide"].to_pylist(), table["patient"].to_pylist(), strict=True)
    ]
    return table.set_column(table.schema.get_field_index("patient"), "patient", pa.array(told, pa.string()))
