"""A user's table of slides, a line a slide, with columns as Patho-Bench, eva and CLAM call them too; and whose slides
they are."""

import re
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

import pyarrow.parquet as pq

from data.fault import Fault
from data.slides.lists import read_rows

COLUMN_NAMES = {
    "slide": ("slide", "slide_id", "wsi_id", "file", "filename"),
    "patient": ("patient", "case_id", "patient_id", "case"),
    "label": ("label", "target"),
}
MAY_STAND_FOR_NOTHING = {"na", "n/a", "none", "null"}  # or be a class: the column tells
TCGA_PATIENT = re.compile(r"(TCGA-[A-Z0-9]{2}-[A-Z0-9]{4})-")


def read_slide_table(table: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and lines of a CSV, TSV or Parquet file. Raises Fault where it can't be read, or has a column twice."""
    try:
        if table.suffix in (".parquet", ".pq"):
            found = pq.read_table(table)
            return _once_each(table, found.column_names), [
                {name.strip(): _text(value) for name, value in row.items()} for row in found.to_pylist()
            ]
        header, *rows = read_rows(table)
        columns = _once_each(table, [name for name in header if name])
        return columns, [{name: _text(value) for name, value in zip(header, row, strict=False) if name} for row in rows]
    except (OSError, ValueError) as error:
        raise Fault(f"{table} can't be read as a table ({error}): give a CSV, TSV or Parquet file.") from error


def empty_for_nothing(text: str) -> str:
    """What a cell says, of a column where NA and none name nothing."""
    return "" if text.lower() in MAY_STAND_FOR_NOTHING else text


def column_of(kind: str, columns: Sequence[str]) -> str | None:
    """The column of one of the kinds of `COLUMN_NAMES`, or of that name, if there is one: as it is written, or else in
    other capitals."""
    names = COLUMN_NAMES.get(kind, (kind,))
    found = (one for name in names for one in columns if one == name)
    return next(found, next((one for name in names for one in columns if one.lower() == name), None))


def as_the_store_calls(name: str, known: Collection[str]) -> str:
    """A slide as the store calls it, where a table has its file's name."""
    if name in known:
        return name
    bare = name.replace("\\", "/").rpartition("/")[2]
    return next((short for short in (bare, bare.rpartition(".")[0]) if short in known), name)


def patient_by_name(slide: str) -> str | None:
    """The patient that a slide's name tells, as TCGA's do."""
    named = TCGA_PATIENT.match(slide)
    return named[1] if named else None


def patients_of(table: Path | None, known: Collection[str]) -> dict[str, str]:
    """The patients of the slides ``known``, as far as a table (None: there is none) or else their names tell. Raises
    Fault where the table has no such columns, or tells of none of these slides."""
    found = {slide: patient for slide in known if (patient := patient_by_name(slide))}
    if table is None:
        return found
    columns, lines = read_slide_table(table)
    slide, patient = column_of("slide", columns), column_of("patient", columns)
    if slide is None or patient is None:
        raise Fault(f"{table} has the columns {', '.join(columns)}: to tell patients it needs slide and patient.")
    named = ((line[slide], empty_for_nothing(line[patient])) for line in lines)
    told = {as_the_store_calls(name, known): one for name, one in named if one}
    if known and not told.keys() & set(known):
        raise Fault(f"{table} tells the patient of none of the slides ({min(known)}, say): its names must be theirs.")
    return found | {name: one for name, one in told.items() if name in known}


def _once_each(table: Path, columns: Sequence[str]) -> list[str]:
    names = [name.strip() for name in columns]
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise Fault(f"{table} has the column {twice[0]!r} twice: call one of them something else.")
    return names


def _text(value: object) -> str:
    """What a cell says, nothing for NaN, and 1 and 0 for true and false."""
    if isinstance(value, bool):
        return str(int(value))
    text = "" if value is None else str(value).strip()
    return "" if text.lower() == "nan" else text
