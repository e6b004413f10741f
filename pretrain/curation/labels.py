"""The finest cluster of every tile, in files of a quarter of a million tiles each that appear whole: who is stopped goes on
with the next, and processes that share the work make some each."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pretrain.curation.kept_arrays import keep_array, kept_array
from pretrain.curation.nearest import nearest_of_many
from pretrain.curation.rows import Rows, chunk_rows

TILES_OF_A_FILE = 2**18


class TileLabels:
    """Cluster numbers, int32, of ``tiles`` tiles in ``folder``, in the order of the rows that they are of."""

    def __init__(self, folder: Path, tiles: int) -> None:
        self.folder, self.tiles = folder, tiles
        self._piece, self._values = -1, np.empty(0, np.int32)

    def missing(self) -> list[int]:
        """Numbers of the files that aren't there yet."""
        there = set(self.folder.iterdir())  # which asks a network file system what others have made by now
        return [piece for piece in range(-(-self.tiles // TILES_OF_A_FILE)) if self._path(piece) not in there]

    def bounds(self, piece: int) -> tuple[int, int]:
        """The first tile of a file, and the one behind its last."""
        return piece * TILES_OF_A_FILE, min((piece + 1) * TILES_OF_A_FILE, self.tiles)

    def make(self, pieces: list[int], rows: Rows, centres: Tensor, watched: Callable[[int], object]) -> None:
        """Find those of some files."""
        for piece in pieces:
            first, last = self.bounds(piece)
            found = []
            for chunk in rows.chunks(chunk_rows(*centres.shape), first, last):
                found.append(nearest_of_many(chunk, centres)[0].to(torch.int32).cpu().numpy())
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
        first, last = self.bounds(piece)
        return kept_array(self._path(piece), (last - first,))

    def _path(self, piece: int) -> Path:
        return self.folder / f"labels-{piece:06d}.npy"
