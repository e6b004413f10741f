"""Which members of a tar are tiles, which JSON tells about which tile, and what is left out of an index, and why.

A tile is a ``.jpg``, ``.jpeg``, ``.png`` or ``.webp``; beside a JPEG of the same sample the other kinds are something else,
a mask for instance. Its key is its name without that ending, dots and all: ``S12.3456_0_0`` of
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
    return member.is_file and not _is_hidden(member) and split_member(member.name)[1] in TILE_ENDINGS


def beside_tiles(names: Sequence[str]) -> dict[int, str]:
    """Which of a tar's pictures are no tiles, by their place among ``names``, and why: of a sample's pictures a JPEG is
    the tile, or else the one that has nothing between key and ending; where there are several such, or none, nobody
    knows."""
    samples: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        samples.setdefault(_sample(split_member(name)[0]), []).append(number)
    found: dict[int, str] = {}
    for sample, pictures in samples.items():
        if len(pictures) == 1:
            continue
        parts = [split_member(names[number]) for number in pictures]
        jpegs = [number for number, (_, ending) in zip(pictures, parts, strict=True) if ending in JPEGS]
        plain = [number for number, (key, _) in zip(pictures, parts, strict=True) if key == sample]
        if jpegs:
            found |= dict.fromkeys(set(pictures) - set(jpegs), "its sample has a .jpg, which is the tile")
        elif len(plain) == 1:
            found |= dict.fromkeys(
                set(pictures) - set(plain), "its sample has a picture without further words, the tile"
            )
        else:
            found |= dict.fromkeys(pictures, "its sample has several pictures, and none of them is a .jpg: leave one")
    return found


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
