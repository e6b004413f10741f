"""The state of a folder of shards while it is being made, on disk and readable by a person.

plan.json     how tiles are cut, and which tiles go into which shard: what makes a second run continue the first
slides.csv    one row per slide: its id, its file, what came of it, tiles by verdict, and the reason where it failed

A part of a job array (`data.shards.job_array`) has its own: ``plan-003-of-040.json``. What follows the name is its
``state``.
"""

import csv
import json
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from data import lease
from data.fault import Fault
from data.files import appearing, write_whole
from data.lease import Lease
from data.shards.writing import PlannedShard, TileRange, is_published
from data.slides.tiling import Tiling

PENDING, TILED, NO_TISSUE, FAILED = "pending", "tiled", "no tissue", "failed"


@dataclass
class SlideRow:
    """What came of one slide. ``outcome`` is pending, tiled, no tissue or failed; ``message`` says why it failed."""

    slide: str
    path: str
    outcome: str = PENDING
    kept: int = 0
    background: int = 0
    pen: int = 0
    empty: int = 0
    damaged: int = 0
    pale: int = 0
    mpp: float = 0.0
    width: int = 0
    height: int = 0
    patient: str = ""
    message: str = ""

    def describe(self, tiling: Tiling) -> None:
        """Take over the numbers of a tiling."""
        for name, count in tiling.counts().items():
            setattr(self, name, count)
        self.mpp, self.width, self.height = tiling.grid.mpp, tiling.grid.width, tiling.grid.height
        self.patient = tiling.patient


@dataclass
class ShardFolder:
    """A folder of shards in the making. ``plan`` and ``rows`` are in memory until they are saved."""

    out: Path
    made: dict[str, Any]  # how tiles are cut
    state: str  # "", or that of a part of a job array
    plan: list[PlannedShard]
    rows: dict[str, SlideRow]  # by slide id

    @classmethod
    def take_up(cls, out: Path, made: dict[str, Any], state: str = "") -> "ShardFolder":
        """A new one, or an earlier run's to go on with. Raises Fault where the folder's tiles were cut differently."""
        return cls(out, made, state, prepare(out, made, state), load_rows(out, state))

    @property
    def planned(self) -> set[str]:
        """The slides whose tiles have a place in a shard."""
        return {part.slide for shard in self.plan for part in shard.parts}

    @property
    def published(self) -> list[PlannedShard]:
        """The shards that are there, whole."""
        return [shard for shard in self.plan if is_published(self.out, shard.name)]

    def save_rows(self) -> None:
        """Write ``slides.csv``, whole or not at all."""
        save_rows(self.out, self.rows, self.state)

    def save_plan(self) -> None:
        """Write ``plan.json``, whole or not at all."""
        save_plan(self.out, self.made, self.plan, self.state)


def prepare(out: Path, settings: dict[str, Any], state: str = "") -> list[PlannedShard]:
    """Make the folder for shards cut with ``settings``, or take up an earlier run's: the shards planned so far.

    Leftovers of a killed run are removed. Raises Fault where the folder's tiles were cut differently.
    """
    for folder in (out, out / "index", out / "coordinates", out / "thumbnails"):
        folder.mkdir(parents=True, exist_ok=True)
    sweep(out, state)
    if not (out / f"plan{state}.json").exists():
        if any(out.glob("*.tar")) and not any(out.glob("plan*.json")):
            raise Fault(
                f"{out} holds shards that another program wrote: choose an empty folder, or index them with 'pretrain"
                f" shards index shards={out}'"
            )
        save_plan(out, settings, [], state)
        return []
    then, shards = load_plan(out, state)
    changed = [f"{key}={then.get(key)} then, {value} now" for key, value in settings.items() if then.get(key) != value]
    if changed and not shards and not any((out / "coordinates").iterdir()):
        save_plan(out, settings, [], state)  # nothing came of it: a rule, say, that failed on every slide
    elif changed:
        raise Fault(f"the tiles in {out} were cut with other settings ({'; '.join(changed)}): choose another out=")
    return shards


def sweep(out: Path, state: str = "") -> None:
    """Remove what killed runs left half written; of a part of a job array only what is surely its own."""
    for folder in (out, out / "index", out / "coordinates", out / "thumbnails"):
        for leftover in folder.glob(f".*{state}*.[0-9]*" if state else ".*.[0-9]*"):
            leftover.unlink()


def load_plan(out: Path, state: str = "") -> tuple[dict[str, Any], list[PlannedShard]]:
    """The settings and the shards of ``plan.json``. Raises Fault where it is damaged."""
    path = out / f"plan{state}.json"
    try:
        plan = json.loads(path.read_text())
        return plan["settings"], [
            PlannedShard(shard["name"], [TileRange(*part) for part in shard["parts"]]) for shard in plan["shards"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise Fault(f"{path} is damaged ({error}): shard into another folder") from error


def save_plan(out: Path, settings: dict[str, Any], shards: list[PlannedShard], state: str = "") -> None:
    """Write ``plan.json``, whole or not at all."""
    planned = [{"name": shard.name, "parts": [[p.slide, p.first, p.last] for p in shard.parts]} for shard in shards]
    write_whole(out / f"plan{state}.json", json.dumps({"settings": settings, "shards": planned}))


def load_rows(out: Path, state: str = "") -> dict[str, SlideRow]:
    """The rows of ``slides.csv`` by slide id; empty where there is none yet. Raises Fault where it can't be read."""
    path = out / f"slides{state}.csv"
    if not path.exists():
        return {}
    kinds = {field.name: field.type for field in fields(SlideRow)}
    try:
        with path.open(newline="") as file:
            rows = [SlideRow(**{name: kinds[name](text) for name, text in row.items()}) for row in csv.DictReader(file)]  # type: ignore[operator,misc]
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise Fault(f"{path} was changed and can't be read any more ({error}): delete it, it is made anew") from error
    return {row.slide: row for row in rows}


def save_rows(out: Path, rows: dict[str, SlideRow], state: str = "") -> None:
    """Write ``slides.csv``, whole or not at all, sorted by slide id."""
    path = out / f"slides{state}.csv"
    with appearing(path) as partial, partial.open("w", newline="") as file:
        table = csv.DictWriter(file, [field.name for field in fields(SlideRow)])
        table.writeheader()
        table.writerows(asdict(rows[slide]) for slide in sorted(rows))


def written_by_one(out: Path, state: str = "") -> AbstractContextManager[Lease]:
    """Hold the folder for this process. Raises Fault where another one is writing to it; ends with the process, however
    that ends."""
    return lease.alone(out, f".lease{state}", "another 'pretrain shard'")
