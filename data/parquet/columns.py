"""Which columns of Parquet files hold the images of tiles, and what their slides are called.

Images are encoded bytes: a column of bytes, or the hub's struct of ``bytes`` and ``path``.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pyarrow as pa

from data.fault import Fault

SLIDE_NAMES = ("slide", "slide_id", "slide_name", "wsi", "wsi_id")
PATIENT_NAMES = ("patient", "patient_id", "case", "case_id", "submitter_id", "subject_id", "donor_id")


@dataclass(frozen=True)
class ImageColumns:
    """Names as Parquet has them, dotted where they lie in a struct: of the encoded images, and of what tells a tile's
    slide and patient."""

    image: str
    slide: str | None
    patient: str | None


def find_columns(
    schema: pa.Schema,
    file: str,
    image: str | None,
    slide: str | None,
    patient: str | None,
    holding: Callable[[list[str]], list[str]],
) -> ImageColumns:
    """The columns to read: those that are named, or else what there is; ``holding`` tells which of several columns of
    bytes hold images. Raises Fault where a named one is not there or of another type, and where not one alone holds
    images."""
    columns = _leaves(schema)
    images = [name for name, kind in columns.items() if _is_bytes(kind)]
    if image is None:
        if not images:
            kinds = ", ".join(f"{name} ({kind})" for name, kind in columns.items())
            raise Fault(
                f"{file} has no column of bytes: it has {kinds}. Encoded images are plain bytes, or the hub's struct of"
                " bytes and path: write it anew like that."
            )
        encoded = images if len(images) == 1 else holding(images)
        if len(encoded) != 1:
            of, names = ("encoded images", encoded) if encoded else ("bytes", images)
            found = f"several columns of {of} ({', '.join(names)})"
            raise Fault(f"{file} has {found}: say which holds the images by data.image={'|'.join(names)}.")
        image = encoded[0]
    elif f"{image}.bytes" in images:
        image = f"{image}.bytes"
    elif image not in images:
        has = f"is {columns[image]}" if image in columns else "is not there"
        raise Fault(f"data.image={image} {has} in {file}, whose columns of bytes are {', '.join(images) or 'none'}.")
    return ImageColumns(
        image,
        _text(columns, file, "slide", slide, SLIDE_NAMES),
        _text(columns, file, "patient", patient, PATIENT_NAMES),
    )


def unusable_names(schema: pa.Schema, columns: ImageColumns, slide_pattern: str | None) -> Iterator[str]:
    """What to say of files in which no column names slides, and of a column that can't name them, or patients that a
    pattern doesn't tell, although it is called so."""
    told = "(?P<patient>" in (slide_pattern or "")
    wrong = {
        setting: next((column for name in names for column in schema if column.name == name), None)
        for setting, names, found in (
            ("slide", SLIDE_NAMES, columns.slide),
            ("patient", PATIENT_NAMES, columns.patient or told),
        )
        if not found
    }
    for setting, column in wrong.items():
        ways = f"data.{setting}=COLUMN names one" + (
            ", and data.slide_pattern what of it is the slide" if setting == "slide" else ""
        )
        if column is not None:
            yield (
                f"no tile has a {setting}: the column {column.name} is {column.type}, and names are text or whole numbers;"
                f" {ways}"
            )
        elif setting == "slide":
            yield f"no tile has a slide: no column is called {', '.join(SLIDE_NAMES[:-1])} or {SLIDE_NAMES[-1]}; {ways}"


def _leaves(schema: pa.Schema) -> dict[str, pa.DataType]:
    found: dict[str, pa.DataType] = {}
    for column in schema:
        if pa.types.is_struct(column.type):
            found |= {f"{column.name}.{inner.name}": inner.type for inner in column.type}
        else:
            found[column.name] = column.type
    return found


def _text(
    columns: dict[str, pa.DataType], file: str, setting: str, named: str | None, names: tuple[str, ...]
) -> str | None:
    if named is None:
        return next((name for name in names if name in columns and _is_name(columns[name])), None)
    if named not in columns:
        raise Fault(f"data.{setting}={named} is no column of {file}, which has {', '.join(columns)}.")
    if not _is_name(columns[named]):
        raise Fault(f"data.{setting}={named} is {columns[named]} in {file}, and names are text or whole numbers.")
    return named


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _is_name(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return any(
        is_kind(kind)
        for is_kind in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_integer)
    )
