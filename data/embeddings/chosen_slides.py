"""Which slides of a store are used: a list of the user's."""

from pathlib import Path

from data.embeddings.store import EmbeddingStore
from data.fault import Fault
from data.slides.lists import TABLES, read_table, read_text


def open_chosen(store: Path, table: Path | None) -> EmbeddingStore:
    """A store with the slides that ``table`` names: a CSV with the column slide, or a text with one a line; None: all.
    Raises Fault where it names none, or one that the store hasn't got."""
    found = EmbeddingStore.open(store)
    return found if table is None else found.only(named_in(table))


def named_in(table: Path) -> set[str]:
    """The slides that a table names. Raises Fault where it can't be read, or names none."""
    try:
        if table.suffix.lower() in TABLES:
            header, *rows = read_table(table)
            if "slide" not in header:
                columns = ", ".join(header)
                raise Fault(f"{table} has no column slide (it has {columns}): call the one with the slides so.")
            names = {row[header.index("slide")] for row in rows}
        else:
            names = {line.strip() for line in read_text(table).splitlines()}
    except OSError as error:
        raise Fault(f"{table} can't be read as a list of slides ({error}): give a CSV or a text.") from error
    names.discard("")
    if not names:
        raise Fault(f"{table} names no slide: give one a line.")
    return names
