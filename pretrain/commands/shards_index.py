"""Make the index of a folder of tile shards.

Of shards that a job array cut ('pretrain shard part=3/40'): one index and one slides.csv over all parts, once every part is done.
Of shards that another program wrote: one pass over the tars, WebDataset samples with a .jpg and perhaps a .json that says
slide, x, y, mpp, tile_size, tile_size_level0 and patient; checksums are taken on the way. Of shards that 'pretrain shard' wrote in one
piece: the index again, should it be lost or damaged.

Shards that you can't write to, or that lie behind a URL, get their index in a folder of yours with out=; train on that folder.
Tars and records that are indexed already are not read again.

Examples:

    pretrain shards index shards=shards
    pretrain shards index shards="/data/their_shards /data/more_of_theirs"
    pretrain shards index shards=s3://bucket/their_shards out=their_index
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from data.fault import Fault
from data.job_array import merge_parts, parts_in
from data.shard_folder import FAILED, NO_TISSUE, TILED, alone, load_plan
from data.shard_index import ShardIndex, merge, scan
from data.shards import is_published
from pretrain.commands.shard import counted_as, holdings
from pretrain.progress import say


@dataclass
class Config:
    shards: list[str]
    out: str | None


def run(config: Config) -> None:
    """Index every folder. Raises Fault where shards are unfinished or damaged."""
    if config.out is not None:
        if len(config.shards) != 1:
            raise Fault(f"out={config.out} keeps the index of one folder, and shards= names {len(config.shards)}: run the command once for each")  # fmt: skip
        say(f"{config.shards[0]}: {holdings(scan(config.shards[0], Path(config.out)))}, indexed in {config.out}")
        return
    for name in config.shards:
        folder = Path(name)
        if parts_in(folder):
            with alone(folder):
                rows = merge_parts(folder)
            outcomes = Counter(row.outcome for row in rows.values())
            counted = ", ".join(
                f"{outcomes[outcome]} {outcome}" for outcome in (TILED, NO_TISSUE, FAILED) if outcomes[outcome]
            )
            say(f"{counted_as(len(rows), 'slide')}: {counted}")
            for row in [row for row in rows.values() if row.outcome == FAILED][:20]:
                say(f"  failed: {row.message}")
        elif (folder / "plan.json").exists():
            with alone(folder):
                made, plan = load_plan(folder)
                names = [shard.name for shard in plan if is_published(folder, shard.name)]
                if not names:
                    raise Fault(f"no shard in {folder} is finished: run the same 'pretrain shard' command again")
                merge(folder, names, made)
            if len(names) < len(plan):
                say(
                    f"{len(plan) - len(names)} of {len(plan)} planned shards are missing: 'pretrain shard', run again, makes them"
                )
        else:
            scan(name)
        say(f"{folder}: {holdings(ShardIndex.open(folder))}, indexed")
