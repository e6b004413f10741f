"""Which members of a tar are tiles, which JSON tells about which tile, and what is left out of an index, and why.

A tile is a ``.jpg`` or ``.jpeg``. Its key is its name without that ending, dots and all: ``S12.3456_0_0`` of
``S12.3456_0_0.jpg``. Its JSON has the same key, or else the key that WebDataset gives the sample, which ends at the
first dot (``a.json`` is also that of ``a.image.jpg``). They need not be neighbours: some writers put all pictures
first.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from data.shards.tar_members import Member
from data.slides.coordinates import FARTHEST

JPEGS = ("jpg", "jpeg")
PLACED_KEY = re.compile(r"(.+)_([0-9]+)_([0-9]+)", re.DOTALL)  # a key that says slide, x and y
LONGEST_EXAMPLE = 200  # letters of an example
PICTURES = ("png", "webp", "tif", "tiff", "bmp", "gif", "jp2", "jxl", "avif")

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
    """Count ``count`` things of a kind in a table of kinds; the first of them is its example."""
    example = example if len(example) <= LONGEST_EXAMPLE else f"{example[:LONGEST_EXAMPLE]}…"
    left.setdefault(kind or example, LeftOut(kind, why, 0, example)).count += count


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
    return member.is_file and not _is_hidden(member) and split_member(member.name)[1] in JPEGS


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
        return kind, "tiles are read from .jpg and .jpeg: write these as such"
    return kind, "it is neither a tile (.jpg, .jpeg) nor what a .json tells of one"


def json_of_each(keys: Sequence[str], jsons: Mapping[str, Sequence[Json]]) -> list[Json | None]:
    """The JSON of each tile, by the tiles' ``keys`` in their order in the tar; ``jsons`` has those of each key in
    theirs.

    Where a key comes several times each tile takes the next JSON; where there are several and not one for each, none:
    whose they are can't be known.
    """
    times, met = Counter(keys), Counter[str]()
    found: list[Json | None] = []
    for key in keys:
        own = jsons.get(key) or jsons.get(_sample(key)) or ()
        found.append(own[0] if len(own) == 1 else own[met[key]] if len(own) == times[key] else None)
        met[key] += 1
    return found


def _sample(key: str) -> str:
    folder, slash, base = key.rpartition("/")
    return f"{folder}{slash}{base.partition('.')[0]}"


def _is_hidden(member: Member) -> bool:
    """As macOS's ``._a.jpg`` beside ``a.jpg``, which is no picture."""
    return member.name.rpartition("/")[2].startswith(".")
