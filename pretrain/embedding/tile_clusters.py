"""Clusters of tile embeddings, found once and kept: a slide's outputs are averaged within each, on any store.

clusters.json     centres, the tile encoder whose embeddings they are of, and the seed that drew the tiles they were
                  found by; none where they were taken over from elsewhere
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.embeddings.clusters import k_means, nearest_centres, sampled_tiles
from data.embeddings.store import EmbeddingStore
from data.fault import Fault
from data.files import write_whole
from data.json_files import read_object
from data.keyed import drawn
from data.lease import once

CLUSTERS = 8
SLIDES_SAMPLED, TILES_SAMPLED = 1000, 50  # that clusters are found by: 300 MB of tiles that are 1536 wide
CLUSTERS_FILE = "clusters.json"


@dataclass(frozen=True)
class TileClusters:
    """``centres`` (k, D) float32. ``seed``: by which they were drawn; None where that isn't known."""

    centres: Tensor
    seed: int | None = None

    def of(self, tiles: Tensor) -> Tensor:
        """(T, D) → (T,) int64: the cluster whose centre is nearest."""
        return nearest_centres(tiles, self.centres.to(tiles))[0]


def clusters_of(store: EmbeddingStore, slides: Sequence[str], seed: int) -> TileClusters:
    """k-means of `CLUSTERS` groups of tiles, by a keyed draw of the slides and of each one's tiles."""
    chosen = [slides[number] for number in drawn(len(slides), SLIDES_SAMPLED, seed, "slides of clusters")]
    tiles = sampled_tiles(store, chosen, TILES_SAMPLED, seed).astype(np.float32)
    return TileClusters(torch.from_numpy(k_means(tiles, min(CLUSTERS, len(tiles)), seed)), seed)


def kept_clusters(
    out: Path, store: EmbeddingStore, slides: Sequence[str], seed: int, given: Path | None
) -> TileClusters:
    """The clusters that lie in ``out``; where none do, those ``given`` (a file, or another such folder), or else new
    ones of the store, which are then kept there. Raises Fault where they are of another tile encoder, or others than
    those given, or of another ``seed``, lie there already."""
    path = out / CLUSTERS_FILE
    wanted = None if given is None else read_clusters(given, store)

    def make() -> None:
        made = clusters_of(store, slides, seed) if wanted is None else TileClusters(wanted.centres)
        about = {"tile_encoder_hash": store.encoder_hash, "seed": made.seed, "centres": made.centres.tolist()}
        write_whole(path, json.dumps(about))

    once(path, make)
    found = read_clusters(path, store)
    if wanted is None and found.seed not in (None, seed):
        raise Fault(
            f"{out} has clusters that seed={found.seed} drew, not seed={seed}: give the former, or choose another folder."
        )
    if wanted is not None and not torch.equal(wanted.centres, found.centres):
        raise Fault(f"{out} has other clusters than clusters={given}: leave that out, or choose another folder.")
    return found


def read_clusters(path: Path, store: EmbeddingStore) -> TileClusters:
    """The clusters in a file, or in a folder that has them. Raises Fault where they aren't of the store's embeddings."""
    path = path / CLUSTERS_FILE if path.is_dir() else path
    if not path.is_file():
        raise Fault(f"there are no clusters at {path}: give a folder of slide embeddings, or its {CLUSTERS_FILE}.")
    way_out = "give another, or embed into a new folder"
    found = read_object(path, {"tile_encoder_hash", "centres"}, way_out)
    if found["tile_encoder_hash"] != store.encoder_hash:
        raise Fault(
            f"{path} has clusters of another tile encoder's embeddings ({found['tile_encoder_hash']}) than"
            f" {store.folder} holds ({store.encoder_hash}): leave clusters= out."
        )
    try:
        centres = torch.tensor(found["centres"], dtype=torch.float32)
    except (ValueError, TypeError) as error:
        raise Fault(f"{path} is damaged ({error}): {way_out}.") from error
    if centres.ndim != 2 or centres.shape[1] != store.width or not centres.isfinite().all():
        raise Fault(f"{path} is damaged (its centres aren't {store.width} wide and finite): {way_out}.")
    return TileClusters(centres, found.get("seed"))
