"""What a person is told of the slides that were cut: their names, a table, and what comes next."""

from collections import Counter
from pathlib import Path

from data.shards.folder import FAILED, NO_TISSUE, TILED, ShardFolder
from data.shards.index import ShardIndex
from data.shards.job_array import JobPart
from pretrain.run.counted import counted_as
from pretrain.run.progress import say

RENAMED_ONE_BY_ONE = 10  # slides under another name than their file's that are said one by one


def say_renamed(names: dict[Path, str]) -> None:
    """Name the slides that are called otherwise than their files."""
    renamed = [(path, slide) for path, slide in names.items() if slide != path.stem]
    for path, slide in renamed[:RENAMED_ONE_BY_ONE]:
        say(f"called {slide}: {path}")
    if len(renamed) > RENAMED_ONE_BY_ONE:
        say(
            f"… and {len(renamed) - RENAMED_ONE_BY_ONE} more slides under another name than their file's; slides.csv"
            " has them all"
        )


def holdings(index: ShardIndex) -> str:
    """``212 tiles of 10 slides in 2 shards``."""
    parts = (
        counted_as(len(index), "tile"),
        counted_as(len(index.slides), "slide"),
        counted_as(len(index.files), "shard"),
    )
    return "{} of {} in {}".format(*parts)


def say_outcomes(folder: ShardFolder, asked: set[str], part: JobPart | None) -> None:
    """A table of what came of the slides that were asked for, and what comes next."""
    out, chosen = folder.out, [folder.rows[slide] for slide in sorted(asked)]
    say("")
    if 0 < len(chosen) <= 40:
        width = max(len(row.slide) for row in chosen)
        columns = ["kept", "background", "pen", "empty", "damaged"] + ["pale"] * any(row.pale for row in chosen)
        say(f"{'slide':<{width}}  {'outcome':<9}  {'µm/px':<6}" + "".join(f"{name:>12}" for name in columns))
        for row in chosen:
            mpp = f"{row.mpp:.4g}" if row.mpp else ""
            numbers = "".join(f"{getattr(row, name):>12,}" for name in columns)
            say(f"{row.slide:<{width}}  {row.outcome:<9}  {mpp:<6}{numbers}")
        say("")
    outcomes = Counter(row.outcome for row in chosen)
    counted = ", ".join(f"{outcomes[name]} {name}" for name in (TILED, NO_TISSUE, FAILED) if outcomes[name])
    say(f"{counted_as(len(chosen), 'slide')}: {counted or 'nothing to do'}")
    if outcomes[FAILED]:
        say(f"why they failed: {out}/slides{folder.state}.csv; running the same command again retries them")
    if part is not None:
        say(f"{part} is done; when all are: pretrain shards index shards={out}")
    elif (out / "index.npz").exists() and any(out.glob("*.tar")):
        index = ShardIndex.open(out)
        size = sum(index.meta["sizes"]) / 1e6
        say(f"{out}: {holdings(index)} ({size:,.1f} MB)")
        say(f"look at them: pretrain inspect shards={out} out=inspect")
