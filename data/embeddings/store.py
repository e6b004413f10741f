"""The store of slide embeddings: one row-major float16 matrix per slide, packed into large files that are
memory-mapped.

    store.json                        width, encoder and its hash: one store, one encoder
    embeddings-0-000000.bin           slide after slide: (n, width) float16, then (n, 2) int64 level-0 x, y; 64-byte aligned
    journal-0.jsonl, index-0.parquet  which slides there are, and where: see `data.embeddings.index`

A slide counts as added when its line is in the journal, so a kill leaves every added slide readable and nothing half:
bytes past the last line are cut off when writing goes on. Parts let the tasks of a job array write into one store, each
its own.
"""

import hashlib
import json
import os
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from data.embeddings.index import MERGED, Entry, PartFacts, read_entries, read_index, write_embedding_index
from data.fault import Fault
from data.files import create_whole, make_folder, refused
from data.lease import hold
from data.slides.coordinates import cell_of, row_major

FILE_BYTES = 2**32  # a new data file is begun once one is this large


@dataclass(frozen=True)
class SlideEmbeddings:
    """One slide's tiles in row-major order."""

    slide: str
    embeddings: np.ndarray  # (n, width) float16, memory-mapped: only rows that are used are read
    coordinates: np.ndarray  # (n, 2) int64 level-0 pixels (x, y)
    tile_size_level0: float
    mpp: float
    tile_size: int = 0  # delivered pixels a side; 0: not known
    slide_width: int = 0  # level-0 pixels; 0: not known
    slide_height: int = 0

    @property
    def cells(self) -> np.ndarray:
        """(n, 2) int64: each tile's (column, row) in the slide's grid."""
        return cell_of(self.coordinates, self.tile_size_level0)


class EmbeddingWriter:
    """Adds slides to a store, making it if need be. Use it as a context manager, or `close` it.

    ``part`` of ``parts`` is the number of this writer among those that write into the same folder at once (a job
    array's task, counted from 1); 0 where it is alone. Raises Fault when the folder holds embeddings of another encoder
    or width, or another process is writing this part.
    """

    def __init__(
        self, folder: Path, width: int, encoder: str, encoder_hash: str, part: int = 0, parts: int = 1
    ) -> None:
        self.folder, self.width, self.part, self.parts = Path(folder), width, part, parts
        self.encoder, self.encoder_hash = encoder, encoder_hash
        self._finished, self._without = False, dict[str, str]()
        make_folder(self.folder)
        claim(self.folder, {"format": 1, "width": width, "encoder": encoder, "encoder_hash": encoder_hash})
        self._lease = hold(self.folder, f".lease-{part}", f"another process, of part {part} of these embeddings,")
        # Unbuffered: a line that the disk refused isn't tried again behind our back.
        self._journal = open(self.folder / f"journal-{part}.jsonl", "ab", buffering=0)  # noqa: SIM115
        _cut_torn_line(self.folder / f"journal-{part}.jsonl")
        self._entries = read_entries(self.folder)
        self._cut_unfinished()

    def done(self, slide: str) -> bool:
        """Whether the store already holds this slide."""
        return slide in self._entries

    def sources(self) -> dict[Path, str]:
        """The ids of slides that were read from their own files, by file."""
        return {Path(entry.source): entry.slide for entry in self._entries.values() if entry.source}

    def mpp_level0(self, slide: str) -> float | None:
        """Microns per level-0 pixel that a slide in the store was taken for; None where it isn't there, or its tiles'
        size in pixels isn't known."""
        entry = self._entries.get(slide)
        return entry.mpp * entry.tile_size / entry.tile_size_level0 if entry is not None and entry.tile_size else None

    def add(
        self,
        slide: str,
        embeddings: np.ndarray,
        coordinates: np.ndarray,
        tile_size_level0: float,
        mpp: float,
        *,
        tile_size: int = 0,
        slide_width: int = 0,
        slide_height: int = 0,
        source: str = "",
    ) -> None:
        """Add one slide: embeddings (n, width) of any float type, coordinates (n, 2) integer level-0 (x, y), in any
        order.

        tile_size_level0, tile_size: a tile's side in level-0 and in delivered pixels; mpp: µm per delivered pixel;
        slide_width, slide_height: of level 0, in pixels; source: the slide's file. Those with a default have it where
        they aren't known. On return its bytes and its line are on disk. Raises Fault for values that float16 can't hold
        (NaN, infinity, beyond 65504), Refused where the disk does, ValueError for shapes that don't fit or a slide that
        is there already.
        """
        if slide in self._entries:
            raise ValueError(f"{slide} is in {self.folder} already; ask done() first")
        n = len(embeddings)
        if (
            embeddings.shape != (n, self.width)
            or coordinates.shape != (n, 2)
            or not np.issubdtype(coordinates.dtype, np.integer)
        ):
            raise ValueError(
                f"{slide}: embeddings {embeddings.shape} and {coordinates.dtype} coordinates {coordinates.shape} are"
                f" not (n, {self.width}) and integer (n, 2)"
            )
        order = row_major(coordinates[:, 0], coordinates[:, 1])
        with np.errstate(over="ignore"):
            half = embeddings[order].astype(np.float16)
        if not np.isfinite(half).all():
            bad = coordinates[order][~np.isfinite(half).all(axis=1)][0]
            raise Fault(
                f"{slide}: the embedding of the tile at {tuple(bad.tolist())} is not finite in float16; the encoder is"
                " not usable as it is."
            )
        entry = Entry(
            slide,
            self._file.name,
            self._end,
            n,
            float(tile_size_level0),
            float(mpp),
            tile_size,
            slide_width,
            slide_height,
            source,
        )
        try:
            with open(self._file, "r+b" if self._file.exists() else "w+b") as file:
                file.seek(entry.offset)
                file.write(half.tobytes())
                file.seek(entry.coordinates_offset(self.width))
                file.write(coordinates[order].astype("<i8").tobytes())
                file.truncate(entry.end(self.width))
                file.flush()
                os.fsync(file.fileno())
            self._journal.write((json.dumps(asdict(entry)) + "\n").encode())
            os.fsync(self._journal.fileno())
        except OSError as error:
            raise refused(self._file, error) from error
        self._entries[slide] = entry
        self._advance(entry)

    def finish(self, without: dict[str, str]) -> None:
        """Say that every slide of this part was seen to; ``without``: those that gave no embeddings, each with the
        reason."""
        self._finished, self._without = True, without

    def close(self) -> None:
        """Write this part's index and drop its journal; harmless when repeated."""
        if self._journal.closed:
            return
        try:
            merged = (
                {entry.slide for entry in read_index(self.folder / MERGED)} if (self.folder / MERGED).exists() else ()
            )
            own = [entry for entry in self._entries.values() if entry.part == self.part and entry.slide not in merged]
            facts = PartFacts(self.part, self.parts, self._finished, self._without)
            write_embedding_index(self.folder / f"index-{self.part}.parquet", own, facts)
            os.ftruncate(self._journal.fileno(), 0)
        finally:
            self._journal.close()
            self._lease.end()

    def __enter__(self) -> "EmbeddingWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _cut_unfinished(self) -> None:
        """Find where the last added slide of this part ends, and cut off what a killed writer left behind it."""
        self._file, self._end = self.folder / f"embeddings-{self.part}-000000.bin", 0
        for entry in sorted(self._entries.values(), key=lambda entry: (entry.file, entry.offset)):
            if entry.part == self.part:
                self._file = self.folder / entry.file
                self._advance(entry)
        if self._file.exists():
            os.truncate(self._file, self._end)

    def _advance(self, entry: Entry) -> None:
        self._end = entry.end(self.width)
        if self._end >= FILE_BYTES:
            number = int(entry.file.removesuffix(".bin").rsplit("-", 1)[1]) + 1
            self._file, self._end = self.folder / f"embeddings-{self.part}-{number:06d}.bin", 0


class EmbeddingStore:
    """Reads a store, finished or still being written."""

    def __init__(self, folder: Path, width: int, encoder: str, encoder_hash: str, entries: dict[str, Entry]) -> None:
        self.folder, self.width, self.encoder, self.encoder_hash = folder, width, encoder, encoder_hash
        self._entries = entries
        self._maps: dict[str, np.ndarray] = {}

    @classmethod
    def open(cls, folder: Path | str) -> "EmbeddingStore":
        """Raises Fault when the folder holds no embeddings."""
        folder = Path(folder)
        if not (folder / "store.json").is_file():
            raise Fault(f"{folder} holds no slide embeddings (no store.json): make them with `pretrain embed`.")
        about = _about(folder / "store.json")
        entries = read_entries(folder)
        return cls(folder, about["width"], about["encoder"], about["encoder_hash"], dict(sorted(entries.items())))

    def only(self, slides: Collection[str]) -> "EmbeddingStore":
        """The same store with some of its slides. Raises Fault for one that it hasn't got."""
        if unknown := sorted(set(slides) - set(self._entries)):
            raise Fault(
                f"{self.folder} holds no slide {unknown[0]!r} ({len(unknown)} of those named aren't there); it has"
                f" {len(self._entries)}, such as {next(iter(self._entries), 'none')!r}."
            )
        entries = {slide: entry for slide, entry in self._entries.items() if slide in set(slides)}
        return EmbeddingStore(self.folder, self.width, self.encoder, self.encoder_hash, entries)

    def with_slides_of(self, other: "EmbeddingStore") -> "EmbeddingStore":
        """The slides of two folders as one store. Raises Fault where two tile encoders made them, or a slide is in
        both."""
        made = [f"{one.encoder} ({one.encoder_hash}, width {one.width})" for one in (self, other)]
        if (self.encoder_hash, self.width) != (other.encoder_hash, other.width):
            raise Fault(
                f"{self.folder} holds embeddings of {made[0]}, and {other.folder} of {made[1]}: only slides of one tile"
                " encoder can be put together."
            )
        if twice := sorted(self._entries.keys() & other._entries.keys()):
            first = (self.folder / self._entries[twice[0]].file).parent
            raise Fault(
                f"{first} and {other.folder} both hold the slide {twice[0]!r} ({len(twice)} are in both): each may count"
                " once; leave one of the folders out."
            )
        # A whole path stays what it is behind this store's folder.
        theirs = {
            slide: replace(entry, file=str((other.folder / entry.file).absolute()))
            for slide, entry in other._entries.items()
        }
        entries = dict(sorted((self._entries | theirs).items()))
        return EmbeddingStore(self.folder, self.width, self.encoder, self.encoder_hash, entries)

    @property
    def slides(self) -> list[str]:
        """Slide ids, sorted: independent of the order and the parts in which they were written."""
        return list(self._entries)

    @property
    def digest(self) -> str:
        """A hash of the encoder and of which slides, with how many tiles, are here: the same for any parts and
        files."""
        facts = [[e.slide, e.rows, e.tile_size_level0, e.mpp] for e in self._entries.values()]
        text = json.dumps([self.width, self.encoder_hash, facts])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def in_numbers(self) -> dict[str, Any]:
        """What is here: ``slides``, ``tiles``, ``mpp`` [lowest, highest] of the tiles as they were embedded, and
        ``tile_size``, the delivered pixels a side that there are; lists are empty where that isn't known."""
        entries = self._entries.values()
        mpp, sizes = [e.mpp for e in entries if e.mpp > 0], {e.tile_size for e in entries if e.tile_size}
        rows = sum(e.rows for e in entries)
        bounds = [min(mpp), max(mpp)] if mpp else []
        return {"slides": len(entries), "tiles": rows, "mpp": bounds, "tile_size": sorted(sizes)}

    def rows(self, slide: str) -> int:
        """How many tiles a slide has, from the index alone."""
        return self._entries[slide].rows

    def read(self, slide: str) -> SlideEmbeddings:
        """One slide; nothing is copied until rows are used. Raises Fault for an unknown slide or a data file that is
        too short."""
        if slide not in self._entries:
            raise Fault(
                f"{self.folder} holds no slide {slide!r}; it has {len(self._entries)}, such as"
                f" {next(iter(self._entries), 'none')!r}."
            )
        entry = self._entries[slide]
        of = (entry.tile_size_level0, entry.mpp, entry.tile_size, entry.slide_width, entry.slide_height)
        if entry.rows == 0:
            return SlideEmbeddings(
                slide,
                np.empty((0, self.width), np.float16),
                np.empty((0, 2), np.int64),
                *of,
            )
        data = self._map(entry)
        middle = entry.coordinates_offset(self.width)
        embeddings = (
            data[entry.offset : entry.offset + entry.rows * self.width * 2].view("<f2").reshape(entry.rows, self.width)
        )
        coordinates = (
            data[middle : middle + entry.rows * 16].view("<i8").reshape(entry.rows, 2).astype(np.int64, copy=False)
        )
        return SlideEmbeddings(slide, embeddings, coordinates, *of)

    def scattered_rows(self, slide: str, stride: int) -> np.ndarray:
        """Every ``stride``-th embedding of a slide, (…, width) float16, read one by one: a map would read what lies
        around each too. Raises Fault as `read` does."""
        entry = self._entries[slide]
        path, size = self.folder / entry.file, 2 * self.width
        starts = range(entry.offset, entry.offset + entry.rows * size, stride * size)
        try:
            with open(path, "rb", buffering=0) as file:
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
                data = b"".join(os.pread(file.fileno(), size, start) for start in starts)
        except FileNotFoundError:
            data = b""
        if len(data) < len(starts) * size:
            raise self._too_short(entry)
        return np.frombuffer(data, "<f2").reshape(-1, self.width)

    def _too_short(self, entry: Entry) -> Fault:
        return Fault(
            f"{self.folder / entry.file} is missing or shorter than its index says; embed {entry.slide} again into a new"
            " folder."
        )

    def _map(self, entry: Entry) -> np.ndarray:
        path, end = self.folder / entry.file, entry.end(self.width)
        if len(self._maps.get(entry.file, ())) < end:
            if not path.is_file() or path.stat().st_size < end:
                raise self._too_short(entry)
            # As a plain array: rows are looked up faster than in a memmap.
            self._maps[entry.file] = np.asarray(np.memmap(path, np.uint8, "r"))
        return self._maps[entry.file]


def claim(folder: Path, about: dict[str, object], name: str = "store.json") -> None:
    """Write what a folder holds (``encoder``, ``encoder_hash``, ``width``) into its file ``name``, or hold it to what
    it already is.

    Embeddings of two encoders never mix: raises Fault where it is another's.
    """
    path = folder / name
    if not path.exists():
        create_whole(path, json.dumps(about))
    there = _about(path)
    if there != about:
        raise Fault(
            f"{folder} holds embeddings of {there['encoder']} ({there['encoder_hash']}, width {there['width']}), not of"
            f" {about['encoder']} ({about['encoder_hash']}, width {about['width']}): choose another folder for these."
        )


def _about(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except ValueError:
        found = None
    if not isinstance(found, dict) or not found.keys() >= {"encoder", "encoder_hash", "width"}:
        raise Fault(
            f"{path} is damaged, and says which encoder made these embeddings: put back a copy, or embed into a new"
            " folder."
        )
    return found


def _cut_torn_line(journal: Path) -> None:
    whole = journal.read_bytes().rfind(b"\n") + 1
    os.truncate(journal, whole)
