"""Make the index of a folder of tile shards.

Of shards that a job array cut ('pretrain shard part=3/40'): one index and one slides.csv over all parts, once every
part is done. Of shards that another program wrote: one pass over the tars, WebDataset samples with a picture (.jpg, .png, .webp) and
perhaps a .json that says slide, x, y, mpp, tile_size, tile_size_level0 and patient; checksums are taken on the way.
What can't be read is counted, named with the reason, and left out: members of other kinds, tiles whose .json can't be
true, tars that are damaged or empty, files that are no .tar. What the .json of one slide's tiles contradict one another
in is named, and counts as not known; so are tiles that come twice. Of shards that 'pretrain shard' wrote in one piece:
the index again, should it be lost or damaged.

Shards that you can't write to, or that lie behind a URL, get their index in a folder of yours with out=; train on that
folder. Tars and records that are indexed already are not read again.

Examples:

    pretrain shards index shards=shards
    pretrain shards index shards="/data/their_shards /data/more_of_theirs"
    pretrain shards index shards=s3://bucket/their_shards out=their_index
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from data.fault import Fault
from data.shards.folder import FAILED, NO_TISSUE, TILED, load_plan, written_by_one
from data.shards.index import ShardIndex
from data.shards.job_array import merge_parts, parts_in
from data.shards.named_tars import named_tars
from data.shards.records import merge_records, record_path
from data.shards.scan import describe_left_out, disputed, scan
from data.shards.tile_members import LeftOut
from data.shards.writing import is_published
from models.allowed import ON_DISK, SOME
from pretrain.cutting.summary import holdings
from pretrain.run.counted import counted_as
from pretrain.run.progress import say

KINDS_SAID = 20  # kinds of what was left out
MOST_TARS = 5  # that the last line names


@dataclass
class Config:
    shards: Annotated[list[str], SOME]
    out: Annotated[str | None, ON_DISK]


def run(config: Config) -> None:
    """Index every folder. Raises Fault where shards are unfinished or damaged."""
    folders: list[str] = []
    for named in config.shards:
        for where, tars in named_tars(named).items():
            folders.append(where)
            if tars is not None:
                raise Fault(
                    f"{named} names tars, and an index is of all that lie in a folder: pretrain shards index"
                    f" shards={where}; which of them are read is said where they are used, data.shards={named}."
                )
    if config.out is not None:
        if len(folders) != 1:
            raise Fault(
                f"out={config.out} keeps the index of one folder, and shards= names {len(folders)}: run the command once"
                " for each"
            )
        index = scan(folders[0], Path(config.out))
        say(f"{folders[0]}: {holdings(index)}, indexed in {config.out}{_said_left_out(index)}")
        return
    for name in folders:
        folder = Path(name)
        if parts_in(folder):
            with written_by_one(folder):
                rows = merge_parts(folder)
            outcomes = Counter(row.outcome for row in rows.values())
            counted = ", ".join(
                f"{outcomes[outcome]} {outcome}" for outcome in (TILED, NO_TISSUE, FAILED) if outcomes[outcome]
            )
            say(f"{counted_as(len(rows), 'slide')}: {counted}")
            for row in [row for row in rows.values() if row.outcome == FAILED][:20]:
                say(f"  failed: {row.message}")
        elif (folder / "plan.json").exists():
            with written_by_one(folder):
                made, plan = load_plan(folder)
                names = [shard.name for shard in plan if is_published(folder, shard.name)]
                if not names:
                    raise Fault(f"no shard in {folder} is finished: run the same 'pretrain shard' command again")
                merge_records(folder, names, made)
            if len(names) < len(plan):
                say(
                    f"{len(plan) - len(names)} of {len(plan)} planned shards are missing: 'pretrain shard', run again,"
                    " makes them"
                )
        else:
            scan(name)
        index = ShardIndex.open(folder)
        say(f"{folder}: {holdings(index)}, indexed{_said_left_out(index)}")


def _said_left_out(index: ShardIndex) -> str:
    """Say what isn't in the index, kind by kind; the end of the last line, which counts it."""
    members, files = describe_left_out(index)
    if "made_by" not in index.meta:
        files = [
            LeftOut(
                "",
                "'pretrain shard' has no record of it: move shards of others into a folder of their own",
                1,
                tar.name,
            )
            for tar in sorted(index.folder.glob("*.tar"))
            if not record_path(index.folder, tar.stem).exists()
        ]
    for kind in [*members, *files][:KINDS_SAID]:
        say(f"left out: {kind}")
    if (kinds := len(members) + len(files)) > KINDS_SAID:
        say(f"… and {kinds - KINDS_SAID} more; {index.folder}/index.npz has them all, in its meta.json")
    for kind in disputed(index) if "made_by" in index.meta else ():
        say(f"to look at: {kind}")
    tars = [kind.example for kind in files if not kind.kind and kind.example.lower().endswith(".tar")]
    others = sum(kind.count for kind in files) - len(tars)
    counted = [counted_as(sum(kind.count for kind in members), "member")] if members else []
    if tars:
        more = f" and {len(tars) - MOST_TARS} more" if len(tars) > MOST_TARS else ""
        counted.append(f"{counted_as(len(tars), 'tar')} ({', '.join(tars[:MOST_TARS])}{more})")
    counted += [counted_as(others, "other file")] if others else []
    return (
        f"; left out: {', '.join(counted[:-1])}{' and ' if counted[1:] else ''}{counted[-1]}, as said above"
        if counted
        else ""
    )
