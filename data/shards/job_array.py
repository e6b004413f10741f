"""One folder of shards cut by many jobs, each of which takes a part of the slides, and the merging of what they made.

A part keeps state files of its own (``plan-003-of-040.json``, ``slides-003-of-040.csv``) and names its tars after
itself (``tiles-003-of-040-000000.tar``), so jobs never write to the same file and never wait for one another. A slide
belongs to the part that its id's hash names, whatever other slides there are: slides that are added later move nobody
else.
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from data.fault import Fault
from data.shards.folder import FAILED, PENDING, SlideRow, load_plan, load_rows, save_rows, sweep, written_by_one
from data.shards.records import merge_records
from data.shards.writing import is_published


@dataclass(frozen=True)
class JobPart:
    """Part ``number`` (from 1) ``of`` so many."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> "JobPart":
        """``"3/40"`` → the third of forty. Raises Fault for anything else."""
        match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise Fault(f"part={text} is not a part: part=3/40 is the third of forty, and they are counted from 1")
        return cls(int(match[1]), int(match[2]))

    @property
    def state(self) -> str:
        """What the part's files are called after: ``-003-of-040``."""
        return f"-{self.number:03d}-of-{self.of:03d}"

    def owns(self, slide: str) -> bool:
        """Whether the slide of this id is this part's to cut."""
        return int.from_bytes(hashlib.blake2b(slide.encode(), digest_size=8).digest()) % self.of == self.number - 1

    def __str__(self) -> str:
        return f"part {self.number} of {self.of}"


def parts_in(out: Path) -> dict[JobPart, Path]:
    """The parts that have a plan in the folder. Raises Fault where they are of different divisions."""
    found = {}
    for path in sorted(out.glob("plan-*-of-*.json")):
        if match := re.fullmatch(r"plan-(\d+)-of-(\d+)\.json", path.name):
            found[JobPart(int(match[1]), int(match[2]))] = path
    divisions = sorted({part.of for part in found})
    if len(divisions) > 1:
        raise Fault(
            f"{out} was cut in {divisions[0]} parts and in {divisions[1]}: the jobs of one folder use one number of"
            " parts"
        )
    return found


def check_division(out: Path, part: JobPart | None) -> None:
    """Raises Fault where the folder was begun in another number of parts, or in one piece and not in parts."""
    found = {other.of for other in parts_in(out)}
    whole = (out / "plan.json").exists()
    if part is None and found:
        raise Fault(f"{out} is being cut in {found.pop()} parts: say which with part=, or choose another out=")
    if part is not None and (whole or found - {part.of}):
        before = "in one piece" if whole else f"in {found.pop()} parts"
        raise Fault(f"{out} was begun {before}, and this is {part}: go on as it was begun, or choose another out=")


def known_slides(out: Path) -> dict[Path, str]:
    """The file and the id of every slide that any run on the folder has named."""
    known: dict[Path, str] = {}
    for path in sorted(out.glob("slides*.csv")):
        state = path.stem.removeprefix("slides")
        known |= {Path(row.path): row.slide for row in load_rows(out, state).values()}
    return known


def merge_parts(out: Path) -> dict[str, SlideRow]:
    """Make one ``index.npz`` and one ``slides.csv`` of what all parts made, and return the slides' rows.

    Raises Fault where a part is missing or unfinished, or two of them don't fit together.
    """
    found = parts_in(out)
    of = next(iter(found)).of
    missing = [number for number in range(1, of + 1) if JobPart(number, of) not in found]
    if missing:
        raise Fault(
            f"{_numbers(missing)} of {of} {'has' if len(missing) == 1 else 'have'} not been cut into {out} yet: run"
            f" 'pretrain shard' with part={missing[0]}/{of}"
        )
    names: list[str] = []
    rows: dict[str, SlideRow] = {}
    made: dict[str, object] | None = None
    for part in sorted(found, key=lambda part: part.number):
        with written_by_one(out, part.state):
            settings, plan = load_plan(out, part.state)
            its_rows = load_rows(out, part.state)
        if made is not None and settings != made:
            raise Fault(
                f"{part} of {out} was cut with other settings than the parts before it: cut it into another folder"
            )
        made = settings
        unfinished = [
            shard.name for shard in plan if not is_published(out, shard.name) and not _failed(shard.parts, its_rows)
        ]
        if unfinished or any(row.outcome == PENDING for row in its_rows.values()):
            raise Fault(
                f"{part} of {out} is not finished: run 'pretrain shard' with part={part.number}/{part.of} again"
            )
        twice = sorted(rows.keys() & its_rows.keys())
        if twice:
            raise Fault(
                f"{rows[twice[0]].path} and {its_rows[twice[0]].path} are both called {twice[0]}, in two parts that"
                " were given different slides: rename one"
            )
        rows |= its_rows
        names += [shard.name for shard in plan if is_published(out, shard.name)]
    assert made is not None
    sweep(out)
    merge_records(out, names, made)
    save_rows(out, rows)
    return rows


def _failed(parts: list, rows: dict[str, SlideRow]) -> bool:
    """Whether a shard is missing because none of its slides could be cut."""
    return all(rows[part.slide].outcome == FAILED for part in parts)


def _numbers(missing: list[int]) -> str:
    named = ", ".join(map(str, missing[:10])) + (f" and {len(missing) - 10} more" if len(missing) > 10 else "")
    return f"part {named}" if len(missing) == 1 else f"parts {named}"
