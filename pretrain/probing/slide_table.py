"""Which images are of one patient or slide, by a table of the user's."""

import csv
from pathlib import Path

from data.fault import Fault
from pretrain.probing.grouping import Groups, numbered


def by_table(files: list[Path], folder: Path, table: Path) -> Groups:
    """By a CSV with a column ``file`` (a path below ``folder``, a whole path, or a name) and one or both of ``patient`` and
    ``slide``.

    Raises Fault where the table can't be read, lacks a column or an image, says two things of one file, or names by its
    bare name a file that several class folders have.
    """
    try:
        with table.open(newline="", encoding="utf-8-sig") as lines:
            reader = csv.DictReader(lines)
            rows, columns = [(reader.line_num, row) for row in reader], reader.fieldnames or []
    except (OSError, ValueError, csv.Error) as error:
        raise Fault(
            f"{table} can't be read as a table ({error}): give a CSV with the columns file and slide"
        ) from error
    column = next((name for name in ("patient", "slide") if name in columns), None)
    if column is None or "file" not in columns:
        raise Fault(
            f"{table} has the columns {', '.join(columns) or 'of no table'}: it needs file, and patient or slide"
        )
    told: dict[str, tuple[str, int]] = {}
    for line, row in rows:
        file, name = (row["file"] or "").strip(), (row[column] or "").strip()
        if not file or not name:
            continue
        before, at = told.setdefault(file, (name, line))
        if before != name:
            raise Fault(
                f"{table} says in line {at} that {file} is of {column} {before}, and in line {line} of {name}: remove"
                " the wrong one"
            )
    names, by_bare_name, lacking = [], dict[str, Path](), []
    for path in files:
        found = told.get(path.relative_to(folder).as_posix()) or told.get(str(path)) or told.get(str(path.absolute()))
        if found is None and path.name in told:
            found, first = told[path.name], by_bare_name.setdefault(path.name, path)
            if first != path:
                raise Fault(
                    f"line {found[1]} of {table} says {path.name}, and both {first} and {path} have that name: give"
                    f" their paths below {folder} in the column file"
                )
        if found is None:
            lacking.append(path)
        else:
            names.append(found[0])
    if lacking:
        raise Fault(
            f"{table} says no {column} of {len(lacking)} of {len(files)} images, the first is {lacking[0]}: add them,"
            " or leave the table out"
        )
    return Groups(numbered(names), f"{column}s of {table.name}", known=True)
