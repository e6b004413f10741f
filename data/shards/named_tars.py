"""Shards as people name them: a folder, or some tars of one: a file, a glob, WebDataset's lists in braces.

shards                                   the folder
shards/tiles-{000000..000123}.tar        these tars of it, every one of them
shards/tiles-*.tar                       those that there are
s3://bucket/tiles-{000..123}.tar         the same behind a URL
"""

import fnmatch
from pathlib import Path

from data.fault import Fault
from data.remote import is_remote
from data.shards.index import ShardIndex

PIPE = "pipe:"
GAPS_NAMED = 5


def open_shards(named: str) -> list[ShardIndex]:
    """The tiles of a folder of shards, or of the tars that are named, an index for each folder of theirs. Raises Fault
    as `ShardIndex.open` does, for a tar that isn't in its folder's index, and for a pipe."""
    named = str(named)
    if named.startswith(PIPE):
        raise Fault(
            f"{named} is a command, which can only be read from front to back, and tiles are read where they lie: give"
            " the shards' own address (s3://, gs://, https://, hf://), or copy them to a disk."
        )
    if not _names_tars(named):
        return [ShardIndex.open(named)]
    wanted: dict[str, list[str]] = {}
    for url in _expanded(named):
        path, mark, query = url.partition("?")
        folder, slash, name = path.rpartition("/")
        wanted.setdefault(f"{folder}{mark}{query}" if slash else ".", []).append(name)
    return [_only(folder, names, named) for folder, names in wanted.items()]


def _names_tars(named: str) -> bool:
    path, folder = named.partition("?")[0], not is_remote(named) and Path(named).is_dir()
    return not folder and (path.endswith(".tar") or "{" in path or "*" in path.rpartition("/")[2])


def _expanded(named: str) -> list[str]:
    if "{" not in named and "::" not in named:
        return [named]
    from webdataset.shardlists import expand_urls  # costs a second, and few need it

    return list(expand_urls(named))


def _only(folder: str, names: list[str], named: str) -> ShardIndex:
    index = ShardIndex.open(folder, complete=False)
    numbers = {file: number for number, file in enumerate(index.files)}
    chosen: list[str] = []
    lost: list[str] = []
    for name in names:
        found = [name] if name in numbers else fnmatch.filter(index.files, name)
        there = [file for file in found if index.remote or index.path(numbers[file]).exists()]
        chosen += there
        lost += [name] if not found else [file for file in found if file not in there]
    if lost:
        more = f" and {len(lost) - GAPS_NAMED} more" if len(lost) > GAPS_NAMED else ""
        raise Fault(
            f"{named} names {', '.join(lost[:GAPS_NAMED])}{more}, which {folder} doesn't have, or its index doesn't: put"
            f" the tars there and run 'pretrain shards index shards={folder}', or leave them out."
        )
    return index.only(chosen)
