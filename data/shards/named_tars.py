"""Shards as people name them: a folder, or some tars of one: a file, a glob, WebDataset's lists in braces.

shards                                   the folder
shards/tiles-{000000..000123}.tar        these tars of it, every one of them
shards/tiles-*.tar                       those that there are
cohorts/*                                the folders that there are
s3://bucket/tiles-{000..123}.tar         the same behind a URL
"""

import fnmatch
import glob
import os
from collections.abc import Iterable
from pathlib import Path

from data.fault import Fault
from data.remote import is_remote
from data.shards.index import ShardIndex

PIPE = "pipe:"
GAPS_NAMED = 5


def open_shards(named: Iterable[str]) -> list[ShardIndex]:
    """The tiles of folders of shards, or of the tars that are named, an index for each folder: a tar that several names
    lead to is there once. Raises Fault as `ShardIndex.open` does, for a tar that isn't in its folder's index, and for a
    pipe."""
    wanted: dict[str, tuple[str, list[str] | None, list[str]]] = {}
    for one in map(str, named):
        for folder, names in named_tars(one).items():
            there = folder if is_remote(folder) else os.path.realpath(folder)
            as_named, before, by = wanted.get(there, (folder, [], []))
            wanted[there] = as_named, None if names is None or before is None else [*before, *names], [*by, one]
    return [
        ShardIndex.open(folder) if names is None else _only(folder, names, ", ".join(by))
        for folder, names, by in wanted.values()
    ]


def named_tars(named: str) -> dict[str, list[str] | None]:
    """The folders that are meant, each with the names (globs among them) of its tars that are; None: all of them. Raises
    Fault for a pipe."""
    named = str(named)
    if named.startswith(PIPE):
        raise Fault(
            f"{named} is a command, which can only be read from front to back, and tiles are read where they lie: give"
            " the shards' own address (s3://, gs://, https://, hf://), or copy them to a disk."
        )
    wanted: dict[str, list[str] | None] = {}
    for url in _expanded(named) if _names_tars(named) else [named]:
        if folders := [url] if not _names_tars(url) else _folders_like(url):
            wanted |= dict.fromkeys(folders)
            continue
        path, mark, query = _parted(url)
        folder, slash, name = path.rpartition("/")
        names = wanted.setdefault(f"{folder}{mark}{query}" if slash else ".", [])
        if names is not None:
            names.append(name)
    return wanted


def tars_among(names: list[str], there: list[str]) -> tuple[list[str], list[str]]:
    """Which of the tars that are ``there`` are named, and which names lead to none."""
    known = set(there)
    found = {name: [name] if name in known else fnmatch.filter(there, name) for name in names}
    return [tar for tars in found.values() for tar in tars], [name for name, tars in found.items() if not tars]


def gap(named: str, lost: list[str], folder: str) -> Fault:
    """What to say of names that lead to no tar."""
    more = f" and {len(lost) - GAPS_NAMED} more" if len(lost) > GAPS_NAMED else ""
    return Fault(
        f"{named} names {', '.join(lost[:GAPS_NAMED])}{more}, which {folder} doesn't have, or its index doesn't: put"
        f" the tars there and run 'pretrain shards index shards={folder}', or leave them out."
    )


def _names_tars(named: str) -> bool:
    path, folder = _parted(named)[0], not is_remote(named) and Path(named).is_dir()
    return not folder and (path.endswith(".tar") or "{" in path or glob.has_magic(path.rpartition("/")[2]))


def _parted(named: str) -> tuple[str, str, str]:
    """A URL without and with its query; on a disk ``?`` is any character."""
    return named.partition("?") if is_remote(named) else (named, "", "")


def _folders_like(named: str) -> list[str]:
    """The folders on a disk that a glob leads to."""
    return [] if is_remote(named) else sorted(filter(os.path.isdir, glob.glob(named)))


def _expanded(named: str) -> list[str]:
    if "{" not in named and "::" not in named:
        return [named]
    from webdataset.shardlists import expand_urls  # costs a second, and few need it

    try:
        return list(expand_urls(named))
    except ValueError as error:
        raise Fault(
            f"{named} can't be read as a list of tars ({error}): write it as tiles-{{000000..000123}}.tar."
        ) from error


def _only(folder: str, names: list[str], named: str) -> ShardIndex:
    index = ShardIndex.open(folder, complete=False)
    numbers = {file: number for number, file in enumerate(index.files)}
    found, lost = tars_among(names, index.files)
    lost += [] if index.remote else [file for file in found if not index.path(numbers[file]).exists()]
    if lost:
        raise gap(named, lost, folder)
    return index.only(found)
