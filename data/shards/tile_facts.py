"""What the JSON of a tile may say, and what the tiles of one slide say together.

Read are slide, patient, x, y, mpp, mpp_level0, tile_size and tile_size_level0, and nothing else (another program's
``width`` may be the tile's). One rule for all of them: a value that can't be so costs its tile, which is counted with
the reason. Where tiles of one slide contradict one another they are kept, and what they disagree on counts as not
known.
"""

import json
import math
from typing import Any

from data.shards.tile_members import place_in
from data.slides.coordinates import FARTHEST, UNKNOWN_PLACE
from data.stated_numbers import decimal

PLACE_FACTS = ("x", "y")
NUMBER_FACTS = ("mpp", "mpp_level0", "tile_size", "tile_size_level0")
NAME_FACTS = ("slide", "patient")
OF_SLIDE = ("patient", *NUMBER_FACTS)  # what all tiles of a slide have in common
SAME_FACT = 1e-3  # but for rounding
WRONG = "it would be taken for another tile, or one of another size"
LONGEST_VALUE = 60  # letters of a value, in a message


def read_tile_facts(member: str, content: bytes) -> dict[str, Any] | str:
    """What the JSON ``member`` says of its tile, without what it leaves open (null); or why it can't be true."""
    try:
        return _facts(member, content)
    except (ValueError, OverflowError, RecursionError) as error:
        return str(error) if str(error).startswith(member) else f"{member} ({error})"


class Impossible(Exception):
    """A tile that is left out; ``args``: what kind of thing it is, why it is left out, and which one it is."""


def locate_tile(key: str, facts: dict[str, Any] | str | None, tar: str) -> tuple[str, int, int]:
    """Slide, x and y of the tile ``key`` in the tar called ``tar``, of which its JSON says ``facts`` (`read_tile_facts`;
    None where it has none). Raises Impossible."""
    from_key = place_in(key) or (tar, UNKNOWN_PLACE, UNKNOWN_PLACE)
    if isinstance(facts, str):
        raise Impossible("tile with an impossible .json", WRONG, facts)
    facts = facts or {}
    slide, x, y = (facts.get(name, value) for name, value in zip(("slide", *PLACE_FACTS), from_key, strict=True))
    if (x == UNKNOWN_PLACE) != (y == UNKNOWN_PLACE):
        only, no = PLACE_FACTS if y == UNKNOWN_PLACE else PLACE_FACTS[::-1]
        raise Impossible("tile with an impossible .json", WRONG, f"{key}.json says {only} and no {no}")
    if max(x, y) >= FARTHEST:
        raise Impossible("tile at an impossible place", "no slide has pixels there", key)
    return slide, x, y


def _facts(member: str, content: bytes) -> dict[str, Any]:
    said = json.loads(content)
    if not isinstance(said, dict):
        raise ValueError(f"{member} is no JSON object")
    facts = {name: said[name] for name in (*PLACE_FACTS, *NUMBER_FACTS, *NAME_FACTS) if said.get(name) is not None}
    for name, value in facts.items():
        wrong = ""
        if name in PLACE_FACTS and not _is_place(value):
            wrong = "a whole number of pixels, 0 or more,"
        elif name in NUMBER_FACTS and not (_is_number(value) and 0 < value < FARTHEST):
            wrong = "a positive number"
        elif name in NAME_FACTS and not (isinstance(value, str) or _is_whole(value)):
            wrong = "a name"
        if wrong:
            text = repr(value)
            raise ValueError(
                f"{member} says {name} = {text[:LONGEST_VALUE]}{'…' if len(text) > LONGEST_VALUE else ''}, where"
                f" {wrong} belongs"
            )
    facts |= {name: int(float(facts[name])) for name in PLACE_FACTS if name in facts}
    return facts | {name: str(facts[name]) for name in NAME_FACTS if name in facts}


def _is_place(value: Any) -> bool:
    place = decimal(value) if isinstance(value, str) else float(value) if _is_number(value) else -1.0
    return 0 <= place < FARTHEST and place.is_integer()


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or _is_whole(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def take_in(slide: dict[str, Any], facts: dict[str, Any]) -> None:
    """Add to what is known of a slide, ``slide``, what more of its tiles say: what they contradict is None from then
    on, and ``slide["disputed"]`` has two of the values by the fact's name."""
    disputed: dict[str, list[Any]] = slide.setdefault("disputed", {})
    disputed |= {name: values for name, values in facts.get("disputed", {}).items() if name not in disputed}
    for name in OF_SLIDE:
        new, known = facts.get(name), slide.get(name)
        if name in disputed:
            slide[name] = None
        elif known is None:
            slide[name] = new
        elif (
            new is not None and new != known and not (_is_number(known) and math.isclose(new, known, rel_tol=SAME_FACT))
        ):
            disputed[name], slide[name] = [known, new], None
