"""Tiles read straight from slides: data=online beside wsistream, the same slides, tiles and views, one process and two.

    make bench-online                   five minutes; wsistream comes into a folder of its own, .venv-peers/online
    python tests/bench/online.py ../shared .venv-peers/online

Four copies of CMU-1-Small-Region, tiles of 256 px at 0.5 µm/px with 40 % tissue, ten views each as uint8, one worker with
one thread a process. Processor seconds are those of a long run less those of a short one, so that what starts a process
isn't counted. Without wsistream its rows are left out, and the line says so.

    tiles_per_core_second  of the slowest process; all of them wait for it in a run of several
    tiles_per_second       that, times the processes: what so many cores give
    gib                    that a process and its worker held at most, the largest of them
    first_batch            seconds from the imports to it, the longest of them; ours is behind the survey
    same_pixels            whether two runs gave the same first batches
    ratio                  tiles_per_core_second, ours / wsistream's

What isn't the same: wsistream resizes bilinearly without antialiasing, ours bicubically with it; its processes share out
the slides, ours the order of tiles.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.slides.lists import list_slides
from data.slides.mpp import SlidesMpp
from data.slides.survey import survey_slides
from data.slides.tiling import TilingSettings
from data.slides.tissue import tissue_needed
from tests.bench.data_path import FETCHED
from tests.bench.online_rank import BATCH, MIN_TISSUE, MPP, TILE

COPIES = 4
SHORT, LONG = 8, 48  # batches
INSTALL = "pip install --target .venv-peers/online --no-deps wsistream==0.1.6 opencv-python-headless, as 'make bench-online' does"


def look_at(slides: Path) -> tuple[list[Path], TilingSettings, SlidesMpp]:
    """The slides, and what their survey is asked for."""
    return list_slides([str(slides)]), TilingSettings(MPP, TILE, tissue_needed(["otsu"], [MIN_TISSUE])), SlidesMpp()


def run(who: str, ranks: int, batches: int, folder: Path, peer: str) -> list[dict]:
    """All processes at once: what each tells."""
    own = {"slides": str(folder / "slides"), "grids": str(folder / "grids"), "peer": peer, "hashed": SHORT}
    asked = own | {"who": who, "ranks": ranks, "batches": batches}
    program = [sys.executable, str(Path(__file__).with_name("online_rank.py"))]
    started = [
        subprocess.Popen(
            [*program, json.dumps(asked | {"rank": rank})],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for rank in range(ranks)
    ]
    told = [json.loads(process.communicate()[0].splitlines()[-1]) for process in started]
    return told


def measured(who: str, ranks: int, folder: Path, peer: str) -> dict:
    short, long = (run(who, ranks, batches, folder, peer) for batches in (SHORT, LONG))
    seconds = max(more["cpu"] - less["cpu"] for less, more in zip(short, long, strict=True))
    rate = (LONG - SHORT) * BATCH / seconds
    return {
        "tiles_per_core_second": round(rate, 1),
        "tiles_per_second": round(rate * ranks, 1),
        "gib": round(max(one["gib"] for one in long), 2),
        "first_batch": round(max(one["first_batch"] for one in long), 2),
        "same_pixels": [one["pixels"] for one in short] == [one["pixels"] for one in long],
    }


def main() -> None:
    shared, peer = Path(sys.argv[1] if len(sys.argv) > 1 else "none"), sys.argv[2] if len(sys.argv) > 2 else ""
    slide = shared / "slides/whole/CMU-1-Small-Region.svs"
    slide = slide if slide.exists() else FETCHED
    if not slide.exists():
        raise SystemExit(f"there is no slide at {slide}: run 'make setup' first, or name a folder that has slides")
    there = bool(peer) and (Path(peer) / "wsistream").is_dir()
    found: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "slides").mkdir()
        for number in range(COPIES):
            shutil.copy(slide, folder / "slides" / f"copy{number}.svs")
        began = time.monotonic()
        for _ in survey_slides(folder / "grids", *look_at(folder / "slides"), 1):
            pass
        found["survey_seconds"] = round(time.monotonic() - began, 2)
        for ranks, words in ((1, "one"), (2, "two")):
            rows = {who: measured(who, ranks, folder, peer) for who in ["ours"] + ["wsistream"] * there}
            for who, row in rows.items():
                print(f"{words} process{'es' * (ranks > 1)}, {who}: {row}", flush=True)
            found[words] = rows
            if there:
                ratio = rows["ours"]["tiles_per_core_second"] / rows["wsistream"]["tiles_per_core_second"]
                found[f"ratio_{words}"] = round(ratio, 2)
    if not there:
        found["wsistream"] = f"not there: {INSTALL}"
    print(json.dumps(found))


if __name__ == "__main__":
    main()
