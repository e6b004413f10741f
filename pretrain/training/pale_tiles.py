"""How many tiles of each slide were taken, and how many were passed over for being pale: counted by every rank, kept in
checkpoints, so that a resumed run counts on, and written to ``pale_tiles.csv`` with each."""

import csv
import io
from collections import Counter
from pathlib import Path
from typing import Any

from data.files import Refused, write_whole
from data.redaction import redacted
from data.tiles.loader import RankBatch
from data.tiles.source import TileSource
from pretrain.run.across_ranks import together
from pretrain.run.progress import say

SLIDES_SAID = 3  # slides, in the last sentence
UNKNOWN = "unknown"  # slide, of a source that names none


class PaleTiles:
    """``taken`` and ``passed_over``: tiles of each slide, of all ranks up to the last time they were gathered."""

    def __init__(self, tiles: TileSource) -> None:
        self.tiles = tiles
        self.taken, self.passed_over = Counter[str](), Counter[str]()
        self._new = Counter[str](), Counter[str]()  # this rank's since

    def restore(self, state: dict[str, Any]) -> None:
        """Count on from a checkpoint's ``state``."""
        kept = state.get("pale_tiles", {})
        self.taken = Counter({slide: taken for slide, (taken, _) in kept.items()})
        self.passed_over = Counter({slide: passed for slide, (_, passed) in kept.items()})

    def count(self, batch: RankBatch) -> None:
        """Take note of this rank's share of a step."""
        taken, passed_over = self._new
        taken.update(self._slide(number) for part in batch.parts for number in part.numbers.tolist())
        passed_over.update(map(self._slide, batch.pale))

    def gathered(self) -> dict[str, dict[str, list[int]]]:
        """Add up what all ranks counted, and give it as a checkpoint's state has it; every rank calls it."""
        for taken, passed_over in together(self._new):
            self.taken += taken
            self.passed_over += passed_over
        self._new = Counter[str](), Counter[str]()
        slides = self.taken.keys() | self.passed_over.keys()
        return {"pale_tiles": {slide: [self.taken[slide], self.passed_over[slide]] for slide in sorted(slides)}}

    def tell(self, run: Path, last: bool) -> None:
        """Write the table, the slides with most passed over first, and say it where it is the run's ``last``. Where there
        is no room, training goes on."""
        slides = sorted(
            self.taken.keys() | self.passed_over.keys(), key=lambda slide: (-self.passed_over[slide], slide)
        )
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(("slide", "taken", "passed_over"))
        table.writerows((slide, self.taken[slide], self.passed_over[slide]) for slide in slides)
        try:
            write_whole(run / "pale_tiles.csv", text.getvalue())
        except Refused as refused:
            say(f"{str(refused).partition('): ')[0]}); training goes on without that table")
        if last:
            most = ", ".join(f"{slide} ({self.passed_over[slide]:,})" for slide in slides[:SLIDES_SAID])
            passed, taken = self.passed_over.total(), self.taken.total()
            where = f", most of {most}" if passed else ""
            say(
                f"{passed:,} pale tiles were passed over for the {taken:,} that were taken{where}; {run}/pale_tiles.csv"
            )

    def _slide(self, number: int) -> str:
        return redacted(self.tiles.slide(number) or UNKNOWN)
