"""Which slides of a store are used: a list of the user's."""

import csv
from pathlib import Path

from data.embeddings.store import EmbeddingStore
from data.fault import Fault


def open_chosen(store: Path, table: Path | None) -> EmbeddingStore:
    """A store with the slides that ``table`` names: a CSV with the column slide, or a text with one a line; None: all.
    Raises Fault where it names none, or one that the store hasn't got."""
    found = EmbeddingStore.open(store)
    return found if table is None else found.only(named_in(table))


def named_in(table: Path) -> set[str]:
    """The slides that a table names. Raises Fault where it can't be read, or names none."""
    try:
        with table.open(newline="", encoding="utf-8-sig") as lines:
            if table.suffix.lower() == ".csv":
                reader = csv.DictReader(lines)
                if "slide" not in (reader.fieldnames or []):
                    columns = ", ".join(reader.fieldnames or []) or "none"
                    raise Fault(f"{table} has no column slide (it has {columns}): call the one with the slides so.")
                names = {(row["slide"] or "").strip() for row in reader}
            else:
                names = {line.strip() for line in lines}
    except (OSError, ValueError, csv.Error) as error:
        raise Fault(f"{table} can't be read as a list of slides ({error}): give a CSV or a text.") from error
    names.discard("")
    if not names:
        raise Fault(f"{table} names no slide: give one a line.")
    return names
