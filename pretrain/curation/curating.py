"""From stores of embeddings to a table of the tiles to train on: fit levels, find every tile's clusters, share out, write.

    <out>/curated.json              what was asked, and when all is done what came of it
    <out>/centres-1.npy …           each level's centres, once they are fitted
    <out>/labels-000000.npy …       the finest cluster of every tile, while they are being found
    <out>/curated.parquet           the table, when all is done

Each appears whole, and whoever is stopped goes on behind the last one. In memory are three times the finest centres, those
that their start is drawn among (eight for each), half a GiB of chunks, and the tiles that are nearest to them; nothing grows
with the number of tiles but a list of slides.

Several processes find centres and labels together, each from rows of its own (`pretrain.curation.own_rows`); the first one
keeps what they found, and has the rest to itself.
"""

import csv
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.embeddings.store import EmbeddingStore
from data.fault import Fault
from data.files import appearing, remove, write_whole
from data.json_files import read_object
from data.keyed import drawn
from pretrain.curation.balance import Lots, balanced
from pretrain.curation.kept_arrays import keep_array, kept_array
from pretrain.curation.labels import TileLabels
from pretrain.curation.levels import fitted_level
from pretrain.curation.nearest import nearest_of_many
from pretrain.curation.own_rows import own_rows
from pretrain.curation.rows import Rows, RowsInMemory, StoreRows, chunk_rows
from pretrain.curation.table import SeenClusters, SlideShare, write_curated
from pretrain.run.across_ranks import from_first
from pretrain.run.counted import counted_as
from pretrain.run.peers import Peers
from pretrain.run.progress import Progress, say

TABLE, FACTS = "curated.parquet", "curated.json"
RANKS_KEPT = 200  # points of a curve of sizes


@dataclass(frozen=True)
class Wanted:
    """What is to be curated, and how; see ``configs/curate.yaml``."""

    size: int
    clusters: list[int]
    repeats: int
    distance: str
    iterations: int
    resampling_steps: list[int]
    nearest: float
    fit_tiles: int | None
    shown: int
    tiles: int
    seed: int


def require_possible(store: EmbeddingStore, wanted: Wanted) -> int:
    """How many tiles the store has. Raises Fault where they are too few for what is wanted of them."""
    tiles = sum(map(store.rows, store.slides))
    if wanted.size > tiles * wanted.repeats:
        raise Fault(
            f"size={wanted.size} is more than the {tiles:,} tiles that there are, each at most {wanted.repeats} times: ask"
            " for fewer, or set repeats= higher."
        )
    fitting = tiles if wanted.fit_tiles is None else min(tiles, wanted.fit_tiles * wanted.clusters[0])
    if wanted.clusters[0] > fitting:
        raise Fault(
            f"clusters={wanted.clusters} asks for {wanted.clusters[0]:,} clusters of {fitting:,} tiles: ask for fewer, a"
            " hundredth of the tiles, say."
        )
    return tiles


def curate(
    out: Path, store: EmbeddingStore, wanted: Wanted, device: torch.device, peers: Peers
) -> dict[str, Any] | None:
    """Curate into ``out``, going on with what is there; returns what came of it, as ``curated.json`` keeps it, to the first
    of ``peers``, who all call this, and None to the others. Raises Fault where that folder holds what was made
    otherwise."""
    asked = json.loads(json.dumps(vars(wanted) | {"store": store.digest}))
    kept = _kept(out, asked) if peers.first else None
    if peers.agreed(kept is not None):
        say(f"{out} holds these tiles already, nothing to do")
        return kept
    if peers.agreed(asked) != asked:
        raise Fault(
            f"process {peers.number} finds other tiles in {store.folder} than the first one does: wait until they are all"
            " written, and curate then."
        )
    if peers.first:
        write_whole(out / FACTS, json.dumps({"asked": asked}))
    rows = StoreRows(store, device, wanted.distance)
    centres = _centres(out, rows, wanted, peers)
    labels = TileLabels(out, len(rows))
    own = peers.agreed(labels.missing())[peers.number :: peers.count]
    tiles = sum(last - first for first, last in map(labels.bounds, own))
    with _watched(tiles, "clusters of all tiles", "tiles") as watched:
        labels.make(own, rows, centres[0], watched)
    peers.meet()
    if not peers.first:
        return None
    if missing := labels.missing():
        raise Fault(f"{out} lacks labels-{missing[0]:06d}.npy, which another process wrote: is it one folder for all?")
    return _chosen(out, store, wanted, asked, rows, centres, labels)


def _chosen(
    out: Path,
    store: EmbeddingStore,
    wanted: Wanted,
    asked: dict[str, Any],
    rows: StoreRows,
    centres: list[Tensor],
    labels: TileLabels,
) -> dict[str, Any]:
    """Share out, and write the table and what came of it."""
    parents = [
        torch.cat([nearest_of_many(chunk, above)[0] for chunk in own.split(chunk_rows(*above.shape))]).cpu().numpy()
        for own, above in pairwise(centres)
    ]
    sizes = [labels.sizes(wanted.clusters[0])]
    for above, count in zip(parents, wanted.clusters[1:], strict=True):
        sizes.append(np.bincount(above, sizes[-1], minlength=count).astype(np.int64))
    amounts = balanced(sizes, parents, wanted.size, wanted.repeats, wanted.seed)
    seen = SeenClusters(_ranked(sizes[-1], wanted.shown), wanted.tiles)
    with _watched(len(rows), "drawing tiles", "tiles") as watched:
        shares = write_curated(
            out / TABLE, rows, labels, parents, Lots(sizes[0], amounts[0]), seen, wanted.seed, asked, watched
        )
    facts = _facts(store, sizes, amounts, seen, shares)
    _write_slides(out / "slides.csv", shares)
    write_whole(out / FACTS, json.dumps({"asked": asked, "found": facts}))
    for path in out.glob("labels-*.npy"):
        remove(path)
    return facts


def _kept(out: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """What came of it before, if it came to its end. Raises Fault where something else was asked."""
    try:
        before = read_object(out / FACTS, {"asked"}, "choose another out=, or remove that folder")
    except FileNotFoundError:
        return None
    differing = [key for key, value in asked.items() if before["asked"].get(key) != value]
    if differing:
        changed = ", ".join(f"{key} {before['asked'].get(key)} then, {asked[key]} now" for key in differing)
        raise Fault(f"{out} holds tiles that were chosen otherwise ({changed}): choose another out=, or remove it.")
    return before.get("found") if (out / TABLE).exists() else None


def _centres(out: Path, rows: StoreRows, wanted: Wanted, peers: Peers) -> list[Tensor]:
    """Each level's centres, the finest first: those that are kept, or else fitted."""
    found: list[Tensor] = []
    below: Rows = rows
    if wanted.fit_tiles is not None:
        below = rows.only(drawn(len(rows), wanted.fit_tiles * wanted.clusters[0], wanted.seed, "tiles to fit"))
    for level, count in enumerate(wanted.clusters):
        path = out / f"centres-{level + 1}.npy"
        if peers.agreed(path.exists()):
            centres = torch.empty(count, rows.width, device=rows.device)
            if peers.first:
                centres = torch.from_numpy(kept_array(path, (count, rows.width))).to(rows.device)
            found.append(from_first(centres))
        else:
            steps = wanted.resampling_steps[min(level, 1)]
            first, last = own_rows(len(below), chunk_rows(count, rows.width))
            with _watched(
                (steps + 1) * wanted.iterations * (last - first),
                f"finding {counted_as(count, 'cluster')}",
                "rows",
            ) as watched:
                centres = fitted_level(
                    below,
                    count,
                    iterations=wanted.iterations,
                    steps=steps,
                    share=wanted.nearest,
                    watched=watched,
                    key=(wanted.seed, "curate", level),
                )
            found.append(centres)
            if peers.first:
                keep_array(path, centres.cpu().numpy())
        below = RowsInMemory(found[-1])
    return found


@contextmanager
def _watched(total: int, label: str, unit: str) -> Iterator[Callable[..., None]]:
    """A function that takes how much more is done, and a word on it."""
    progress = Progress(total, label, unit)
    try:
        yield progress.advance
    finally:
        progress.close()


def _ranked(sizes: np.ndarray, count: int) -> list[int]:
    """``count`` clusters from the largest to the smallest that has tiles, as far apart in that order as can be."""
    order = np.argsort(-sizes, kind="stable")[: int((sizes > 0).sum())]
    return order[np.unique(np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int))].tolist()


def effective(sizes: np.ndarray) -> float:
    """How many clusters of equal size are as even as these: the exponential of their entropy."""
    shares = sizes[sizes > 0] / sizes.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def _curve(sizes: np.ndarray) -> list[list[float]]:
    """Shares of clusters from the largest down, at some of their ranks: ``[rank from 1, share]``."""
    ordered = np.sort(sizes)[::-1] / sizes.sum()
    ranks = np.unique(np.geomspace(1, len(ordered), RANKS_KEPT).round().astype(int))
    return [[int(rank), float(ordered[rank - 1])] for rank in ranks.tolist()]


def _facts(
    store: EmbeddingStore,
    sizes: list[np.ndarray],
    amounts: list[np.ndarray],
    seen: SeenClusters,
    shares: list[SlideShare],
) -> dict[str, Any]:
    taken = np.array([share.taken for share in shares])
    changed = sorted(shares, key=lambda share: (-share.taken, share.slide))
    return {
        "encoder": store.encoder,
        "tiles": int(sizes[0].sum()),
        "taken": int(amounts[0].sum()),
        "slides": len(shares),
        "slides_taken": int((taken > 0).sum()),
        "effective_slides": [effective(np.array([share.tiles for share in shares])), effective(taken)],
        "levels": [
            {
                "clusters": len(before),
                "empty": int((before == 0).sum()),
                "effective": [effective(before), effective(after)],
                "curves": [_curve(before), _curve(after)],
            }
            for before, after in zip(sizes, amounts, strict=True)
        ],
        "most_taken": [vars(share) for share in changed[:20]],
        "seen": [
            {
                "cluster": cluster,
                "tiles": int(sizes[-1][cluster]),
                "taken": int(amounts[-1][cluster]),
                "examples": [list(tile[1:]) for tile in seen.tiles.get(cluster, [])],
            }
            for cluster in seen.clusters
        ],
    }


def _write_slides(path: Path, shares: list[SlideShare]) -> None:
    with appearing(path) as partial, partial.open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["slide", "tiles", "taken"])
        rows.writerows((share.slide, share.tiles, share.taken) for share in shares)
