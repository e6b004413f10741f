"""Where every tile lies in Parquet files: one scan of their footers and of the columns that name slides.

    <folder>/parquet-1f3a5c7e9b2d4f60.npz     columns uncompressed, so that they are memory-mapped

    files     ├────────── a.parquet ──────────┤├── b.parquet ──┤
    groups    ├── 64 ──┤├── 64 ──┤├── 64 ──┤├9┤├── 64 ──┤├─ 31 ─┤     rows that were compressed together
    chunks    ├───────── 192 ───────────────┤├9┤├───── 95 ──────┤     row groups that are read together

The name of the file is the hash of the files' names, sizes and times of writing and of the columns, so that others give
another index. A row costs 4 bytes there, of its slide, where slides are known.

What an index is of is told by its ``digest``, of what was found and not of when it was written: a copy of the files is
looked through anew, and is the same data.
"""

import hashlib
import json
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data.fault import Fault
from data.files import appearing
from data.npz_files import SPOILT, mapped, place_of, write_column
from data.parquet.columns import ImageColumns, find_columns, unusable_names
from data.parquet.row_groups import column_place, columns_of_images, read_footer, read_raw_footer
from data.remote import RemotePath, is_remote, size_and_version

INDEX_COLUMNS = ("file_groups", "group_rows", "group_bytes", "slide")
SCANNED_AT_ONCE = 8  # files
UNREADABLE = (OSError, pa.ArrowException, KeyError, Fault)


@dataclass(frozen=True)
class ParquetQuestion:
    """What an index answers: which files, and what is asked of them. Names and patterns are None where they are to be
    found out."""

    files: list[str]
    sizes: list[int]
    versions: list[str]
    image: str | None
    slide: str | None
    patient: str | None
    slide_pattern: str | None

    @classmethod
    def of(
        cls, files: list[str], image: str | None, slide: str | None, patient: str | None, slide_pattern: str | None
    ) -> "ParquetQuestion":
        """The same, with the files' sizes looked up, and when they were written (what a server calls their content)."""
        with ThreadPoolExecutor(SCANNED_AT_ONCE) as pool:
            sizes, versions = zip(*pool.map(_size_and_version, files), strict=True)
        return cls(files, list(sizes), list(versions), image, slide, patient, slide_pattern)

    @property
    def names(self) -> list[str]:
        """The files' names below the folder that they have in common: the same on every machine."""
        parents = [PurePosixPath(file).parent.parts for file in self.files]
        common = 0
        while all(len(parts) > common and parts[common] == parents[0][common] for parts in parents):
            common += 1
        return ["/".join(PurePosixPath(file).parts[common:]) for file in self.files]

    def digest_with(self, more: object) -> str:
        """A hash of what is asked, of all but the versions the same on every machine, and of ``more``."""
        asked = [self.names, self.sizes, self.image, self.slide, self.patient, self.slide_pattern, more]
        return hashlib.blake2b(json.dumps(asked).encode(), digest_size=8).hexdigest()

    def path(self, folder: Path) -> Path:
        """Where the index lies in a folder of indices: another place where a file was written anew."""
        return folder / f"parquet-{self.digest_with(self.versions)}.npz"


def _size_and_version(file: str) -> tuple[int, str]:
    if is_remote(file):
        return size_and_version(file)
    try:
        told = Path(file).stat()
    except OSError:  # a link to nothing, say: it is left out when it is looked through, with the reason
        return 0, ""
    return told.st_size, str(told.st_mtime_ns)


class ParquetIndex:
    """The rows of Parquet files, in their order.

    ``file_groups`` (files + 1,) are the row groups at which the files begin; ``group_rows`` and ``group_bytes``
    (groups,) the rows of each and the bytes of its images; ``slide`` (rows,) int32 says which of ``slides`` a row is
    of, and is empty where slides aren't known. ``patients`` are those of the slides, "" where not known. ``left_out``
    says which files can't be used, and why; ``unclear`` what keeps patients from being told apart, "" where nothing does;
    ``unnamed`` why tiles have no slide or patient, where that may not be meant.
    """

    def __init__(self, question: ParquetQuestion, columns: dict[str, np.ndarray], meta: dict[str, Any]) -> None:
        self.file_groups, self.group_rows, self.group_bytes, self.slide = (columns[name] for name in INDEX_COLUMNS)
        self.files = [question.files[number] for number in meta["files"]]
        self.image: str = meta["image"]
        self.slides: list[str] = meta["slides"]
        self.patients: list[str] = meta["patients"]
        self.left_out: list[str] = meta["left_out"]
        self.unclear: str = meta["unclear"]
        self.unnamed: list[str] = meta.get("unnamed", [])  # an older index doesn't say
        self.digest: str = meta["digest"]

    def __len__(self) -> int:
        return int(self.group_rows.sum())

    @classmethod
    def open(cls, folder: Path, question: ParquetQuestion) -> "ParquetIndex":
        """The index that was made for a question, memory-mapped. Raises Fault where it is damaged."""
        path = question.path(folder)
        try:
            with path.open("rb") as raw, zipfile.ZipFile(raw) as archive:
                meta = json.loads(archive.read("meta.json"))
                columns = {name: mapped(path, place_of(archive, raw, name)) for name in INDEX_COLUMNS}
            return cls(question, columns, meta)
        except SPOILT as error:
            raise Fault(f"{path} is damaged ({error}): delete it, and the same command makes it anew.") from error


def scan_parquet(
    folder: Path, question: ParquetQuestion, progress: Callable[[Iterable[Any], int], Iterable[Any]]
) -> None:
    """Look through files and keep what was found in ``folder``. ``progress(files, how many)`` passes on what it is
    given.

    Files that can't be used are left out under a name and a reason; raises Fault where none is left, and where the
    columns that are asked for are not there.
    """
    found: list[tuple[int, pq.FileMetaData, ImageColumns]] = []

    def holding(file: str, names: list[str]) -> list[str]:
        as_first = [name for _, _, columns in found[:1] for name in names if name == columns.image]
        return as_first or columns_of_images(file, names)

    sizes: list[int] = []
    left_out: list[str] = []
    seen = hashlib.blake2b(digest_size=8)
    with ThreadPoolExecutor(SCANNED_AT_ONCE) as pool:
        footers = progress(pool.map(_footer, question.files, question.sizes), len(question.files))
        for number, (file, footer_or_error) in enumerate(zip(question.files, footers, strict=True)):
            if isinstance(footer_or_error, Exception):
                left_out.append(f"{file} can't be read ({' '.join(str(footer_or_error).split())})")
                continue
            footer, raw = footer_or_error
            if not footer.num_rows:
                left_out.append(f"{file} has no rows")
            else:
                try:
                    schema = footer.schema.to_arrow_schema()
                    columns = find_columns(
                        schema, file, question.image, question.slide, question.patient, partial(holding, file)
                    )
                except Fault as fault:
                    if not found and not left_out:
                        raise  # of the first file: it is likely what was asked that is wrong
                    left_out.append(str(fault))
                    continue
                if found and columns != found[0][2]:
                    first = question.files[found[0][0]]
                    left_out.append(f"{file} has other columns than {first}: {_difference(found[0][2], columns)}")
                    continue
                try:
                    places = [column_place(footer, group, columns.image) for group in range(footer.num_row_groups)]
                except UNREADABLE as error:
                    left_out.append(f"{file} can't be read ({error})")
                    continue
                sizes += [stop - start for start, stop in places]
                found.append((number, footer, columns))
                seen.update(raw)
    if not found:
        raise Fault(f"none of the Parquet files can be used: {left_out[0]}; fetch them again, or give others.")
    columns = found[0][2]
    slides = _Slides(columns, question.slide_pattern)
    rows = [footer.row_group(group).num_rows for _, footer, _ in found for group in range(footer.num_row_groups)]
    groups = np.cumsum([0, *(footer.num_row_groups for _, footer, _ in found)])
    known = sum(rows) if columns.slide else 0
    with appearing(question.path(folder)) as begun, zipfile.ZipFile(begun, "w", zipfile.ZIP_STORED) as archive:
        for name, values in (("file_groups", groups), ("group_rows", rows), ("group_bytes", sizes)):
            write_column(archive, name, np.dtype(np.int64), len(values), [np.asarray(values)])
        files = [question.files[number] for number, _, _ in found]
        named = (slides.of(file) for file in progress(iter(files), len(files))) if known else iter(())
        pieces = (piece for pieces in named for piece in pieces)
        write_column(archive, "slide", np.dtype(np.int32), known, _hashed(pieces, seen))
        meta = {"files": [number for number, _, _ in found], "image": columns.image} | slides.names()
        seen.update(json.dumps(meta).encode())
        unnamed = unusable_names(found[0][1].schema.to_arrow_schema(), columns, question.slide_pattern)
        meta["unnamed"] = list(unnamed)
        meta |= {"left_out": left_out, "unclear": slides.unclear(), "digest": question.digest_with(seen.hexdigest())}
        archive.writestr("meta.json", json.dumps(meta))


def _hashed(pieces: Iterable[np.ndarray], seen: "hashlib.blake2b") -> Iterator[np.ndarray]:
    for piece in pieces:
        seen.update(piece.astype("<i4").tobytes())
        yield piece


def _footer(file: str, size: int) -> tuple[pq.FileMetaData, bytes] | Exception:
    try:
        footer = read_footer(file)
        return footer, read_raw_footer(file, footer, size)
    except UNREADABLE as error:
        return error


def _difference(one: ImageColumns, other: ImageColumns) -> str:
    return ", ".join(
        (f"{what} in {theirs}" if theirs else f"no {what}")
        + f", where that has {f'them in {ours}' if ours else 'none'}"
        for what, ours, theirs in zip(
            ("images", "slides", "patients"), vars(one).values(), vars(other).values(), strict=True
        )
        if ours != theirs
    )


def _texts(names: pa.Array) -> pa.Array:
    """Names as text, "" for those that are missing."""
    names = names.dictionary_decode() if pa.types.is_dictionary(names.type) else names
    return pc.fill_null(pc.cast(names, pa.string()), "")


class _Slides:
    """Numbers for the slides that rows name, given out as they come."""

    def __init__(self, columns: ImageColumns, pattern: str | None) -> None:
        self.columns, self.pattern = columns, pattern
        self.numbers: dict[str, int] = {}
        self.patients: dict[str, str] = {}
        self.nameless, self.first_nameless = 0, ""  # rows, and the file of the first
        self.of_two = ""  # says which slide is of two patients
        if pattern is not None and columns.slide is None:
            raise Fault("data.slide_pattern is looked for in a column of names: say which, by data.slide=COLUMN.")
        if pattern is not None and "slide" not in re.compile(pattern).groupindex:
            raise Fault(
                f"data.slide_pattern={pattern} has no group (?P<slide>…), which says what of a name is the slide."
            )

    def of(self, file: str) -> Iterator[np.ndarray]:
        """The slides of a file's rows, int32, by pieces. Raises Fault where they can't be read."""
        assert self.columns.slide is not None
        wanted = [name for name in (self.columns.slide, self.columns.patient) if name]
        source = RemotePath(file).open() if is_remote(file) else file
        try:
            with pq.ParquetFile(source, page_checksum_verification=True) as opened:
                for batch in opened.iter_batches(65_536, columns=wanted):
                    table = pa.Table.from_batches([batch]).flatten()
                    yield self._numbers(file, *(_texts(table.column(name).combine_chunks()) for name in wanted))
        except (OSError, pa.ArrowException) as error:
            raise Fault(
                f"the slides of {file} can't be read ({' '.join(str(error).split())}): have the file written again, or"
                " leave it out of data.files."
            ) from error

    def _numbers(self, file: str, texts: pa.Array, patients: pa.Array | None = None) -> np.ndarray:
        if self.pattern is not None:
            try:
                found = pc.extract_regex(texts, self.pattern)
            except pa.ArrowInvalid as error:
                raise Fault(f"data.slide_pattern={self.pattern} is none that RE2 knows ({error}).") from error
            lost = pc.index(pc.is_null(found), True).as_py()
            if lost >= 0:
                raise Fault(
                    f"data.slide_pattern={self.pattern} finds no slide in '{texts[lost].as_py()}' of {file}: it must in"
                    " every row."
                )
            texts = found.field("slide")
            patients = found.field("patient") if "patient" in re.compile(self.pattern).groupindex else patients
        coded = pc.dictionary_encode(texts)
        kinds = coded.dictionary.to_pylist()
        numbers = np.array([self.numbers.setdefault(name, len(self.numbers)) for name in kinds], dtype=np.int32)
        indices = np.asarray(coded.indices)
        if nameless := int((indices == kinds.index("")).sum()) if "" in kinds else 0:
            self.nameless, self.first_nameless = self.nameless + nameless, self.first_nameless or file
        if patients is not None:
            whose = pc.dictionary_encode(patients)
            people = whose.dictionary.to_pylist()
            for pair in np.unique(indices.astype(np.int64) * len(people) + np.asarray(whose.indices)).tolist():
                self._note(file, kinds[pair // len(people)], people[pair % len(people)])
        return numbers[indices]

    def _note(self, file: str, slide: str, patient: str) -> None:
        """A slide is of a patient; "" is neither."""
        if slide and patient and (known := self.patients.setdefault(slide, patient)) != patient and not self.of_two:
            column = self.columns.patient
            alone = f", or hold out by patients alone, by data.slide={column}" if column else ""
            self.of_two = (
                f"slide {slide} is of patient {known}, and in {file} of patient {patient} too; give each slide a name of"
                f" its own, in the files or by data.slide_pattern{alone}"
            )

    def unclear(self) -> str:
        """What keeps patients from being told apart, and the way out."""
        if not self.nameless:
            return self.of_two
        return (
            f"{self.nameless:,} rows say no slide, the first of them in {self.first_nameless}; fill them in, or name"
            " another column by data.slide"
        )

    def names(self) -> dict[str, list[str]]:
        """``slides`` in the order of their numbers, and ``patients`` beside them."""
        return {"slides": list(self.numbers), "patients": [self.patients.get(name, "") for name in self.numbers]}
