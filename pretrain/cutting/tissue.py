"""The tissue of slides that no shard holds yet: found, told, and written into their rows."""

from functools import partial
from pathlib import Path

from data.fault import Fault
from data.parallel import in_processes
from data.shards.folder import FAILED, NO_TISSUE, PENDING, ShardFolder
from data.slides.coordinates_h5 import coordinates_path, read_tiling
from data.slides.mpp import SAME_MPP, SlidesMpp
from data.slides.survey import survey
from data.slides.tiling import TilingSettings
from pretrain.run.progress import say, track

OVERRULED_ONE_BY_ONE = 10  # slides whose overruled µm per pixel is said one by one


def find_tissue(
    folder: ShardFolder,
    names: dict[Path, str],
    settings: TilingSettings,
    slides_mpp: SlidesMpp,
    patient_pattern: str,
    coordinates: Path | None,
    workers: int,
) -> dict[str, int]:
    """Look at every slide of ``names`` that isn't planned yet; returns how many tiles each new one may give.

    Outcomes go into the folder's rows, which are not saved here.
    """
    planned, rows = folder.planned, folder.rows
    undecided = [
        (path, slide) for path, slide in names.items() if slide not in planned and rows[slide].outcome != NO_TISSUE
    ]
    look = partial(
        survey,
        out=folder.out,
        settings=settings,
        slides_mpp=slides_mpp,
        patient_pattern=patient_pattern,
        coordinates=coordinates,
    )
    new: dict[str, int] = {}
    overruled = 0
    surveyed = in_processes(look, undecided, workers)
    for (_, slide), result in track(surveyed, len(undecided), "finding tissue", "slides") if undecided else ():
        row = rows[slide]
        if isinstance(result, Fault):
            row.outcome, row.message = FAILED, str(result)
            say(f"skipped: {result}")
            continue
        tiling, left = result.tiling, result.left
        if result.overruled:
            overruled += 1
            if overruled <= OVERRULED_ONE_BY_ONE:
                say(result.overruled)
        if left.outside or left.double:
            say(
                f"{row.path}: left out {left.outside:,} given tiles that hang over its edge, and {left.double:,} that"
                " were given twice"
            )
        row.describe(tiling)
        candidates = int(sum(row.__dict__[name] for name in ("kept", "empty", "damaged", "pale")))
        row.outcome, row.message = (PENDING, "") if candidates else (NO_TISSUE, "")
        if candidates:
            new[slide] = candidates
        else:
            say(f"no tissue found on {row.path}")
    if overruled > OVERRULED_ONE_BY_ONE:
        say(f"… and what {overruled - OVERRULED_ONE_BY_ONE} more slides say is overruled")
    return new


def hold_to_same_mpp(folder: ShardFolder, names: dict[Path, str], slides_mpp: SlidesMpp) -> None:
    """Where an earlier run took a slide for one of other µm per pixel than the user says now: look at it again if it
    gave no tile; raises Fault if it is cut."""
    planned, rows = folder.planned, folder.rows
    for path, slide in names.items():
        looked_at = slide in planned or (slide in rows and rows[slide].outcome == NO_TISSUE)
        if (mpp := slides_mpp.of(path)) is None or not looked_at:
            continue
        then = read_tiling(coordinates_path(folder.out, slide)).grid.mpp_level0
        if abs(then / mpp - 1) <= SAME_MPP:
            continue
        if slide in planned:
            raise Fault(
                f"{path} was cut as one of {then:.4g} µm per pixel, and slides_mpp= says {mpp:g} now: choose another"
                " out="
            )
        rows[slide].outcome = PENDING
