"""Which files are slides: from paths, folders, globs, lists and tables, links followed under the names that the user
gave them."""

import csv
import glob
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from data.fault import Fault, Notice
from data.git_lfs import refuse_pointer
from data.slides.dicom_series import one_of_each

SLIDE_SUFFIXES = {".svs", ".tif", ".tiff", ".ndpi", ".vms", ".vmu", ".scn", ".mrxs", ".svslide", ".bif", ".czi", ".dcm"}
TABLES = {".csv", ".tsv"}
# What a table's column of files may be called; where none is, it is the column whose every entry is a file.
PATH_COLUMNS = ("path", "slide_path", "wsi_path", "file_path", "filepath", "file", "filename", "wsi", "slide", "image")
MPP_COLUMNS = ("mpp", "mpp_x", "slides_mpp", "microns_per_pixel", "mpp_level0")
MOST_ENDINGS = 10  # that a notice names
MARKED = ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))


def list_slides(named: list[str]) -> list[Path]:
    """Slide files, absolute, sorted and each once, from paths, folders (searched through), globs, ``.txt`` lists of
    these with one a line, and ``.csv`` tables with a column of paths.

    In a folder, files with an ending that openslide knows are slides; what else is there is counted in a notice. The
    ``.dcm`` files of one series in one folder are one slide. Links are followed and keep their own names. Raises Fault
    for a name that leads to nothing.
    """
    found = _each_once(path for name in named for path in _named(Path(name).expanduser()))
    dicom = [path for path in found if path.suffix.lower() == ".dcm"]
    return sorted({*found} - {*dicom} | {*one_of_each(dicom)})


def _named(path: Path, lists: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Slides that a name stands for. ``lists``: those that lead to it, one in the other."""
    if path.suffix.lower() == ".txt":
        if not path.is_file():
            raise Fault(f"there is no list of slides at {path}")
        if path.resolve() in lists:
            raise Fault(f"the list of slides {path} names itself, or a list that names it: take that line out")
        lines = [line.strip() for line in read_text(path).splitlines()]
        lines = [line for line in lines if line and not line.startswith("#")]
        if not lines:
            raise Fault(f"the list {path} names no slide: give one a line, a file, a folder or a glob")
        for line in lines:
            yield from _named(_beside(path, line), (*lists, path.resolve()))
    elif path.suffix.lower() in TABLES and path.is_file():
        yield from _slides_of_table(path)
    elif path.is_dir():
        inside = _slides_in(path)
        if not inside:
            endings = " ".join(sorted(SLIDE_SUFFIXES))
            raise Fault(f"the folder {path} holds no slide (files ending in {endings})")
        yield from inside
    elif path.is_file():
        yield path
    else:
        matches = [match for match in glob.glob(str(path), recursive=True) if os.path.isfile(match)]
        if not matches:
            raise Fault(f"there is no slide at {path}")
        yield from map(Path, matches)


def read_text(path: Path) -> str:
    """A list or table as text: UTF-8, or what its byte order mark says. Raises Fault where it is neither, or a pointer
    of Git LFS."""
    refuse_pointer(path)
    content = path.read_bytes()
    encoding = next((encoding for mark, encoding in MARKED if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise Fault(f"{path} is no UTF-8 text (byte {error.start}): save it as UTF-8") from error
    if "\0" in text:
        raise Fault(
            f"{path} holds bytes of 0, as UTF-16 without its mark has, or a file that is no text: save it as UTF-8"
        )
    return text


def read_table(path: Path) -> list[list[str]]:
    """As `read_rows`, of a table whose columns have names of their own. Raises Fault where two are called the same."""
    rows = read_rows(path)
    header = [cell.lower() for cell in rows[0] if cell]
    if twice := next((cell for cell in header if header.count(cell) > 1), None):
        raise Fault(f"the table {path} has several columns called {twice}: leave the one that counts")
    return rows


def read_rows(path: Path) -> list[list[str]]:
    """The rows of a table, its header first, cells stripped; its separator is whichever of comma, semicolon and tab the
    header has most of. Raises Fault where there is no row."""
    lines = read_text(path).splitlines()
    separator = max(",;\t", key=lines[0].count) if lines else ","
    reader = csv.reader(lines, delimiter=separator)
    try:
        rows = [[cell.strip() for cell in row] for row in reader]
    except csv.Error as error:
        raise Fault(
            f"the table {path} can't be read at line {reader.line_num} ({error}): does a quote lack its end?"
        ) from error
    rows = [row for row in rows if any(row)]
    if not rows:
        raise Fault(f"the table {path} is empty")
    width = len(rows[0])
    return [row + [""] * (width - len(row)) for row in rows]


def _slides_of_table(table: Path) -> Iterator[Path]:
    rows = read_table(table)
    header = [cell.lower() for cell in rows[0]]
    column = next((header.index(name) for name in PATH_COLUMNS if name in header), None)
    rows = rows[1:] if column is not None else rows
    if column is None:
        column = next(
            (c for c in range(len(header)) if all(_beside(table, row[c]).is_file() for row in rows[1:] or rows)), None
        )
        if column is None:
            raise Fault(f"{table} has no column of slides' files (it has {', '.join(rows[0])}): call that column path")
        rows = rows if _beside(table, rows[0][column]).is_file() else rows[1:]
    if not rows:
        raise Fault(f"{table} names no slide: it has a header and no row")
    if said := next((name for name in MPP_COLUMNS if name in header), None):
        warnings.warn(f"{table}: its column {said} counts where slides_mpp={table} is given too", Notice, stacklevel=2)
    for row in rows:
        path = _beside(table, row[column])
        if not path.is_file():
            raise Fault(f"there is no slide at {path}, which {table} names")
        yield path


def _beside(source: Path, name: str) -> Path:
    """A path that a list or table names: as it stands, or from where the list lies if it is only there."""
    if "://" in name:
        raise Fault(f"{source} names {name}: slides are read from a disk, and no URL; copy them there")
    path = Path(name).expanduser()
    return source.parent / path if not path.exists() and (source.parent / path).exists() else path


def _slides_in(folder: Path) -> list[Path]:
    slides: list[Path] = []
    others: list[str] = []
    seen: set[str] = set()

    def unreadable(error: OSError) -> None:
        warnings.warn(f"left out: the folder {error.filename} can't be listed ({error.strerror})", Notice, stacklevel=2)

    for inside, folders, files in os.walk(folder, followlinks=True, onerror=unreadable):
        seen.add(os.path.realpath(inside))
        # Links may lead in circles: a folder is gone through once.
        folders[:] = [
            name
            for name in sorted(folders)
            if not name.startswith(".") and os.path.realpath(os.path.join(inside, name)) not in seen
        ]
        files = [name for name in sorted(files) if not name.startswith(".")]
        names = [name for name in files if Path(name).suffix.lower() in SLIDE_SUFFIXES]
        if not os.path.isfile(f"{inside}.mrxs"):  # the files that belong to that slide
            others += [name for name in files if name not in names]
        for name in [name for name in names if not _may_be_opened(os.path.join(inside, name))]:
            names.remove(name)
            warnings.warn(f"left out: {name!a} in {inside}: it is no file", Notice, stacklevel=2)
        for name in [name for name in names if not _is_text(name)]:
            names.remove(name)
            warnings.warn(f"left out: {name!a} in {inside}: its name is no UTF-8, rename it", Notice, stacklevel=2)
        # A link that leads nowhere stays: opening it says so, by name.
        slides += [Path(inside, name) for name in names]
    if others:
        warnings.warn(f"left alone in {folder}: {_counted(others)}", Notice, stacklevel=2)
    return slides


def _may_be_opened(path: str) -> bool:
    return os.path.isfile(path) or (os.path.islink(path) and not os.path.exists(path))


def _counted(names: list[str]) -> str:
    """Files that are no slides by their endings, the commonest first: ``3 .txt (as a.txt), 1 .xml (as a.xml)``."""
    first: dict[str, str] = {}
    counts = Counter[str]()
    for name in names:
        ending = Path(name).suffix.lower() or "without an ending"
        first.setdefault(ending, name)
        counts[ending] += 1
    said = [f"{count:,} {ending} (as {first[ending]!a})" for ending, count in counts.most_common(MOST_ENDINGS)]
    rest = sum(counts.values()) - sum(count for _, count in counts.most_common(MOST_ENDINGS))
    return ", ".join(said) + (f" and {rest:,} of other endings" if rest else "")


def _is_text(name: str) -> bool:
    """Whether a file's name can be written to tables and indices."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _each_once(paths: Iterable[Path]) -> list[Path]:
    """Absolute and sorted; of several names of one file the shortest, one that is no link before one that is."""
    absolute = {_absolute(path) for path in paths}
    files: dict[str, Path] = {}
    double: list[tuple[Path, Path]] = []
    for path in sorted(absolute, key=lambda path: (path.is_symlink(), len(path.parts), path)):
        kept = files.setdefault(os.path.realpath(path), path)
        if kept != path:
            double.append((path, kept))
    if double:
        warnings.warn(
            f"{len(double)} of the slides' names lead to a file that has another, which is read once (as"
            f" {double[0][0]}, which is {double[0][1]})",
            Notice,
            stacklevel=3,
        )
    return sorted(files.values())


def _absolute(path: Path) -> Path:
    """Without following a link in it, but for what ``..`` stands behind."""
    path = path.absolute()
    return path.parent.resolve() / path.name if ".." in path.parts else path
