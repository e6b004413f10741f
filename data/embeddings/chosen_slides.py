"""Which slides of a store are used: those that a list of the user's names, or whose patients it names, and a share of
them by a hash of their names."""

from collections.abc import Collection
from pathlib import Path

from data.embeddings.slide_tables import (
    as_the_store_calls,
    column_of,
    empty_for_nothing,
    patient_by_name,
    read_slide_table,
)
from data.embeddings.store import EmbeddingStore
from data.fault import Fault
from data.keyed import place_of_name
from data.slides.lists import TABLES, read_text


def open_chosen(store: Path, table: Path | None, share: float = 1.0) -> EmbeddingStore:
    """A store with the slides that ``table`` names: a table with the column slide, or patient (its slides are known by
    TCGA's names), or a text with one slide a line; None: all. Of these, the ``share`` of patients, or of slides that
    name none, whose hash is lowest: the same ones in any store, and all of them in any larger share. Raises Fault
    where none is named or left, or one is named that the store hasn't got."""
    found = EmbeddingStore.open(store)
    chosen = found if table is None else found.only(named_in(table, found.slides))
    if share == 1:
        return chosen
    some = [slide for slide in chosen.slides if place_of_name(patient_by_name(slide) or slide) < share]
    if not some:
        raise Fault(
            f"a share of {share:g} holds none of these {len(chosen.slides)} slides of {store}: whole patients are taken,"
            " or slides, by a hash of their names; give a larger one, or 1."
        )
    return chosen.only(some)


def named_in(table: Path, known: Collection[str]) -> set[str]:
    """The slides that a table names, as the store of the slides ``known`` calls them. Raises Fault where it can't be
    read, or names none."""
    try:
        if table.suffix.lower() not in (*TABLES, ".parquet", ".pq"):
            named = {line.strip() for line in read_text(table).splitlines()}
        else:
            columns, lines = read_slide_table(table)
            slide, patient = column_of("slide", columns), column_of("patient", columns)
            if slide is None and patient is None:
                raise Fault(
                    f"{table} has no column slide, and none of patients (it has {', '.join(columns)}): call the one with"
                    " the slides slide, or the one with the patients patient."
                )
            named = {line[slide or patient] for line in lines}  # type: ignore[index]
            if slide is None:
                return _of_patients(table, {name for name in map(empty_for_nothing, named) if name}, known)
    except OSError as error:
        raise Fault(f"{table} can't be read as a list of slides ({error}): give a CSV or a text.") from error
    named.discard("")
    if not named:
        raise Fault(f"{table} names no slide: give one a line.")
    return {as_the_store_calls(name, known) for name in named}


def _of_patients(table: Path, patients: Collection[str], known: Collection[str]) -> set[str]:
    """Their slides, by these' names."""
    whose = {slide: patient for slide in known if (patient := patient_by_name(slide))}
    if not patients:
        raise Fault(f"{table} names no patient: give one a line.")
    if lacking := sorted(set(patients) - set(whose.values())):
        raise Fault(
            f"{table} names patient {lacking[0]!r}, of whom no slide's name tells ({len(lacking)} of those named are so;"
            f" a slide is {min(known, default='none')!r}): names like TCGA's do; otherwise give a column slide."
        )
    return {slide for slide, patient in whose.items() if patient in patients}
