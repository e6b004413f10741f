"""Which members of a tar are tiles, which JSON tells about which tile, and what is left out of an index, and why.

A tile is a ``.jpg``, ``.jpeg``, ``.png`` or ``.webp``; beside a JPEG of the same sample the other kinds are something else,
a mask for instance. Its key is its name without that ending, dots and all: ``S12.3456_0_0`` of
``S12.3456_0_0.jpg``. Its JSON has the same key, or else the key that WebDataset gives the sample, which ends at the
first dot (``a.json`` is also that of ``a.image.jpg``).

What the webdataset package would take for several samples, or refuse, is no tile here either: members of one key with
another sample between them, and a name that comes twice.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from data.shards.tar_members import Member
from data.slides.coordinates import FARTHEST

JPEGS = ("jpg", "jpeg")
TILE_ENDINGS = (*JPEGS, "png", "webp")
PLACED_KEY = re.compile(r"(.+)_([0-9]+)_([0-9]+)", re.DOTALL)  # a key that says slide, x and y
LONGEST_EXAMPLE = 200  # letters of an example
PICTURES = ("tif", "tiff", "bmp", "gif", "jp2", "jxl", "avif")

Json = TypeVar("Json")


@dataclass
class LeftOut:
    """A kind of thing that an index leaves out: ``count`` of it, one of them as an ``example``, and why. ``kind`` is
    empty for a single file."""

    kind: str
    why: str
    count: int
    example: str

    def __str__(self) -> str:
        if not self.kind:
            return f"{self.example}: {self.why}"
        noun, joint, rest = re.match(r"(.+?)( (?:with|without|at) |$)(.*)", self.kind).groups()  # type: ignore[union-attr]
        return f"{self.count:,} {noun}{'s' if self.count != 1 else ''}{joint}{rest} (as {self.example}): {self.why}"


def leave_out(left: dict[str, LeftOut], kind: str, why: str, example: str, count: int = 1) -> None:
    """Count ``count`` things of a kind, left out for one reason, in a table of such; the first of them is its example."""
    example = example if len(example) <= LONGEST_EXAMPLE else f"{example[:LONGEST_EXAMPLE]}…"
    left.setdefault(f"{kind}: {why}" if kind else example, LeftOut(kind, why, 0, example)).count += count


def split_member(name: str) -> tuple[str, str]:
    """A member's key and its ending in lower case: ``folder/S1.2_0_0.JPG`` → ``folder/S1.2_0_0``, ``jpg``."""
    folder, slash, base = name.rpartition("/")
    stem, dot, ending = base.rpartition(".")
    return (f"{folder}{slash}{stem}", ending.lower()) if dot else (name, "")


def place_in(key: str) -> tuple[str, int, int] | None:
    """Slide, x and y of a key ``<slide>_<x>_<y>``, None of another; a number of any length that no slide has is
    `FARTHEST`."""
    if (match := PLACED_KEY.fullmatch(key)) is None:
        return None
    x, y = (int(digits) if len(digits) <= 20 else FARTHEST for digits in match.groups()[1:])
    return match[1], min(x, FARTHEST), min(y, FARTHEST)


def is_tile(member: Member) -> bool:
    """Whether a member is a picture that is read."""
    return member.is_file and not _is_hidden(member) and split_member(member.name)[1] in TILE_ENDINGS


@dataclass
class SampleOrder:
    """How a tar's tiles and JSON lie among its samples, as its members are met one after another."""

    _stretches: dict[str, int] = field(default_factory=dict)  # by key: in which stretch of one sample it was met first
    _apart: set[str] = field(default_factory=set)
    _names: set[tuple[str, str]] = field(default_factory=set)
    _twice: set[str] = field(default_factory=set)
    _stretch: int = 0
    _last: str | None = None

    def meet(self, member: Member) -> None:
        """The next member."""
        key, ending = split_member(member.name)
        if not member.is_file or not ending or _is_hidden(member):
            return
        if (sample := _sample(key)) != self._last:
            self._last, self._stretch = sample, self._stretch + 1
        if ending in (*TILE_ENDINGS, "json"):
            if self._stretches.setdefault(key, self._stretch) != self._stretch:
                self._apart.add(key)
            if (key, ending) in self._names:
                self._twice.add(key)
            self._names.add((key, ending))

    def why_refused(self, key: str, of_json: str) -> tuple[str, str] | None:
        """The kind of a tile that isn't read, and why; None of one that is. ``of_json``: `json_key`."""
        keys = {key, of_json}
        if keys & self._twice:
            return (
                "tile with a name that comes twice",
                "nobody can tell which is meant; unpack the tar and pack it anew, which keeps the last of them, and leave"
                " one of those that differ in capitals",
            )
        if keys & self._apart or len({self._stretches[one] for one in keys}) > 1:
            return (
                "tile with other samples between its members",
                "WebDataset's readers take them for samples of their own; unpack the tar and pack it anew with tar"
                " --sort=name",
            )
        return None


def beside_tiles(names: Sequence[str]) -> dict[int, str]:
    """Which of a tar's pictures are no tiles, by their place among ``names``, and why. Where keys of a sample's pictures
    say places, the tiles are among these, of each place one. Of several pictures a JPEG is the tile, or else the one that
    has nothing between key and ending; where there are several such, or none, nobody knows."""
    samples: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        samples.setdefault(_sample(split_member(name)[0]), []).append(number)
    found: dict[int, str] = {}
    for sample, pictures in samples.items():
        placed: dict[str, list[int]] = {}
        for number in pictures if len(pictures) > 1 else ():
            if PLACED_KEY.fullmatch(key := split_member(names[number])[0]):
                placed.setdefault(key, []).append(number)
        if placed:
            among = {number for several in placed.values() for number in several}
            found |= dict.fromkeys(set(pictures) - among, "its sample's tile is the one named <slide>_<x>_<y>")
        for key, several in (placed or {sample: pictures}).items():
            found |= _beside(names, key, several)
    return found


def _beside(names: Sequence[str], sample: str, pictures: Sequence[int]) -> dict[int, str]:
    parts = [split_member(names[number]) for number in pictures]
    jpegs = [number for number, (_, ending) in zip(pictures, parts, strict=True) if ending in JPEGS]
    plain = [number for number, (key, _) in zip(pictures, parts, strict=True) if key == sample]
    if len(pictures) == 1:
        return {}
    if jpegs:
        return dict.fromkeys(set(pictures) - set(jpegs), "its sample has a .jpg, which is the tile")
    if len(plain) == 1:
        return dict.fromkeys(set(pictures) - set(plain), "its sample has a picture without further words, the tile")
    return dict.fromkeys(pictures, "its sample has several pictures, and none of them is a .jpg: leave one")


def is_json(member: Member) -> bool:
    """Whether a member may tell about a tile."""
    return member.is_file and not _is_hidden(member) and split_member(member.name)[1] == "json"


def why_not(member: Member) -> tuple[str, str] | None:
    """The kind of a member that is neither tile nor JSON, and why it is left out; None of a folder, in which there is
    nothing."""
    if member.is_folder:
        return None
    if not member.is_file:
        return "link", "it is no file: write the tar with what it leads to (tar --dereference --hard-dereference)"
    if _is_hidden(member):
        return "hidden member", "a name that begins with a dot is some program's own"
    ending = split_member(member.name)[1]
    kind = f".{ending} member" if ending else "member without an ending"
    if ending in PICTURES:
        return kind, "tiles are read from .jpg, .jpeg, .png and .webp: write these as such"
    return kind, "it is neither a tile (.jpg, .jpeg, .png, .webp) nor what a .json tells of one"


def json_of_each(keys: Sequence[str], jsons: Mapping[str, Sequence[Json]]) -> list[Json | None]:
    """The JSON of each tile, by the tiles' ``keys``; ``jsons`` has those of each key. None where there are several:
    whose they are can't be known."""
    return [own[0] if len(own := jsons.get(json_key(key, jsons), ())) == 1 else None for key in keys]


def json_key(key: str, jsons: Collection[str]) -> str:
    """The key of the JSON that tells of a tile, by the tile's, which it is where there is none; ``jsons`` are those that
    there are."""
    return sample if key not in jsons and (sample := _sample(key)) in jsons else key


def _sample(key: str) -> str:
    folder, slash, base = key.rpartition("/")
    return f"{folder}{slash}{base.partition('.')[0]}"


def _is_hidden(member: Member) -> bool:
    """As macOS's ``._a.jpg`` beside ``a.jpg``, which is no picture."""
    return member.name.rpartition("/")[2].startswith(".")
