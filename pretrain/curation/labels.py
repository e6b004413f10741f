"""The finest cluster of every tile, in files of a million tiles each that appear whole: who is stopped goes on with the
next."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pretrain.curation.kept_arrays import keep_array, kept_array
from pretrain.curation.lloyd import assigned
from pretrain.curation.rows import Rows, chunk_rows

TILES_OF_A_FILE = 2**20


class TileLabels:
    """Cluster numbers, int32, of ``tiles`` tiles in ``folder``, in the order of the rows that they are of."""

    def __init__(self, folder: Path, tiles: int) -> None:
        self.folder, self.tiles = folder, tiles
        self._piece, self._values = -1, np.empty(0, np.int32)

    def make(self, rows: Rows, centres: Tensor, watched: Callable[[int], object]) -> None:
        """Find those that aren't there yet."""
        for piece in range(-(-self.tiles // TILES_OF_A_FILE)):
            first, last = piece * TILES_OF_A_FILE, min((piece + 1) * TILES_OF_A_FILE, self.tiles)
            if self._path(piece).exists():
                watched(last - first)
                continue
            found = []
            for chunk in rows.only(np.arange(first, last)).chunks(chunk_rows(*centres.shape)):
                found.append(assigned(chunk, centres)[0].to(torch.int32).cpu().numpy())
                watched(len(chunk))
            keep_array(self._path(piece), np.concatenate(found))

    def read(self, first: int, last: int) -> np.ndarray:
        """Those of tiles ``first … last − 1``. Quickest in order."""
        parts = []
        while first < last:
            piece, begin = divmod(first, TILES_OF_A_FILE)
            if piece != self._piece:
                self._piece, self._values = piece, self._load(piece)
            parts.append(self._values[begin : begin + last - first])
            first += len(parts[-1])
        return np.concatenate(parts) if parts else self._values[:0]

    def sizes(self, clusters: int) -> np.ndarray:
        """How many tiles each cluster has, (clusters,) int64."""
        found = np.zeros(clusters, dtype=np.int64)
        for first in range(0, self.tiles, TILES_OF_A_FILE):
            found += np.bincount(self.read(first, min(first + TILES_OF_A_FILE, self.tiles)), minlength=clusters)
        return found

    def _load(self, piece: int) -> np.ndarray:
        return kept_array(self._path(piece), (min(TILES_OF_A_FILE, self.tiles - piece * TILES_OF_A_FILE),))

    def _path(self, piece: int) -> Path:
        return self.folder / f"labels-{piece:06d}.npy"
