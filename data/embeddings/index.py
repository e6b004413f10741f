"""Which slides a store of embeddings holds, and where: the journals and indexes beside its data files.

    journal-3.jsonl      while part 3 is written: a line per slide, appended once its bytes are on disk
    index-3.parquet      when part 3 is closed: the same facts, a row per slide, and whether it came to its end
    index.parquet        after `merge_job_indexes`: all of them in one

Parts are the tasks of a job array, counted from 1; a store that one process writes is part 0.
"""

import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data.fault import Fault
from data.files import appearing

ALIGNMENT = 64
FACTS_KEY = b"slidewright"  # the key of an index's own facts in its schema's metadata
MERGED = "index.parquet"
DATA_FILE = re.compile(r"embeddings-\d+-\d+\.bin")


@dataclass(frozen=True)
class Entry:
    """Where a slide lies in the store: a line of the journal, a row of the index."""

    slide: str
    file: str
    offset: int  # bytes; the coordinates follow at the next multiple of ALIGNMENT after the embeddings
    rows: int
    tile_size_level0: float
    mpp: float
    tile_size: int = 0  # delivered pixels; 0: not known
    slide_width: int = 0  # level-0 pixels; 0: not known
    slide_height: int = 0
    source: str = ""  # the slide's file, where it was read from there

    def coordinates_offset(self, width: int) -> int:
        """Where its coordinates begin, for embeddings of ``width`` dimensions."""
        return aligned(self.offset + self.rows * width * 2)

    def end(self, width: int) -> int:
        """Where the next slide may begin."""
        return aligned(self.coordinates_offset(width) + self.rows * 16)

    @property
    def part(self) -> int:
        """The part that wrote it."""
        return int(self.file.split("-")[1])


@dataclass(frozen=True)
class PartFacts:
    """What an index says about its part: ``without`` are the slides that gave no embeddings, each with the reason."""

    part: int
    parts: int
    finished: bool
    without: dict[str, str]


def read_entries(folder: Path) -> dict[str, Entry]:
    """All added slides: the lines of the journals and the rows of the indexes. A line cut short by a kill doesn't
    count.

    Journals come first: a writer that closes meanwhile puts its index in place before it empties its journal.
    """
    found: list[Entry] = []
    for path in sorted(folder.glob("journal-*.jsonl")):
        found += [Entry(**json.loads(line)) for line in path.read_bytes().split(b"\n")[:-1]]
    for path in sorted(folder.glob("index*.parquet")):
        try:
            found += read_index(path)
        except FileNotFoundError:  # merged meanwhile: its rows are in the index that comes below
            found += read_index(folder / MERGED)
    for entry in found:
        if not DATA_FILE.fullmatch(entry.file):  # it is written to when the store is continued
            raise Fault(
                f"the index of {folder} says that {entry.slide} lies in {entry.file!r}, which is no file of a store: it"
                " is damaged, or not to be trusted."
            )
    return {entry.slide: entry for entry in found}


def read_index(path: Path) -> list[Entry]:
    """The rows of one index. Raises Fault where it is damaged."""
    try:
        table = pq.read_table(path)
        columns = (column.to_pylist() for column in table.columns)  # three times as fast as row by row
        return [Entry(**dict(zip(table.column_names, row, strict=True))) for row in zip(*columns, strict=True)]
    except FileNotFoundError:
        raise
    except (pa.ArrowInvalid, OSError, TypeError) as error:
        raise Fault(
            f"{path} is damaged ({str(error).splitlines()[0]}): the slides that it lists can't be found without it. Put"
            " back a copy, or embed into a new folder."
        ) from error


def write_embedding_index(path: Path, entries: list[Entry], facts: PartFacts | None) -> None:
    """Write an index; it appears under its name only when it is whole."""
    kinds: dict[Any, pa.DataType] = {str: pa.string(), int: pa.int64(), float: pa.float64()}
    schema = pa.schema([(field.name, kinds[field.type]) for field in fields(Entry)])
    if facts is not None:
        schema = schema.with_metadata({FACTS_KEY: json.dumps(asdict(facts)).encode()})
    with appearing(path) as partial:
        pq.write_table(pa.Table.from_pylist([asdict(entry) for entry in entries], schema=schema), partial)


def read_part_facts(folder: Path) -> dict[int, PartFacts]:
    """What the index of each closed part says about it, by its number."""
    found = {}
    for path in folder.glob("index-*.parquet"):
        said = (pq.read_schema(path).metadata or {}).get(FACTS_KEY)
        if said is not None:
            facts = PartFacts(**json.loads(said))
            found[facts.part] = facts
    return found


def merge_job_indexes(folder: Path) -> None:
    """Put the indexes of a finished job array into one, ``index.parquet``; the data files stay as they are.

    May be repeated, and interrupted. Raises Fault where a part hasn't come to its end, naming it.
    """
    facts = read_part_facts(folder)
    journals = [path for path in sorted(folder.glob("journal-*.jsonl")) if path.stat().st_size]
    if journals:
        name = journals[0].stem.removeprefix("journal-")
        raise Fault(f"part {name} of {folder} is being written, or was killed: run its task again, then merge.")
    if not facts:
        if (folder / MERGED).exists():
            return
        raise Fault(
            f"{folder} holds no parts to merge: make them with 'pretrain embed … out={folder} part=1/40' and so on."
        )
    arrays = {one.parts for one in facts.values() if one.part}

    def unfinished(parts: int) -> list[int]:
        good = {part for part, one in facts.items() if one.finished and one.parts == parts}
        return [part for part in range(1, parts + 1) if part not in good]

    if arrays and all(unfinished(parts) for parts in arrays):
        parts = max(arrays)
        left = unfinished(parts)
        raise Fault(
            f"{len(left)} of the {parts} parts of {folder} have not come to their end, the first of them"
            f" part={left[0]}/{parts}: run that task again, then merge."
        )
    entries = read_entries(folder)
    write_embedding_index(folder / MERGED, [entries[slide] for slide in sorted(entries)], None)
    for part in facts:
        (folder / f"index-{part}.parquet").unlink()
        (folder / f"journal-{part}.jsonl").unlink(missing_ok=True)


def aligned(offset: int) -> int:
    """The next multiple of `ALIGNMENT`."""
    return -(-offset // ALIGNMENT) * ALIGNMENT
