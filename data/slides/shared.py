"""One open slide for several threads, of which none suffers from what another reads.

After an error openslide refuses everything else on the same handle, whoever asks. So what fails on the shared handle
says nothing yet: the tile is read again through a handle of its own, and counts as damaged only if that fails too. The
shared handle is then closed and opened anew. Which tiles are damaged is so a property of the slide, not of timing.
"""

from pathlib import Path
from threading import Lock

import numpy as np

from data.fault import Fault
from data.slides.coordinates import TileGrid
from data.slides.reading import Slide


class SharedSlide:
    """The slide at ``path``, opened by `open` or else when its first tile is read, and again after `close`.

    Raises Fault where it can't be opened, as `read_tile` does for a damaged tile (see `Slide.read_tile`).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._slide: Slide | None = None
        self._lock = Lock()

    def open(self) -> Slide:
        """The handle that the threads share."""
        with self._lock:
            self._slide = self._slide or Slide(self.path)
            return self._slide

    def close(self) -> None:
        """Let go of the slide; it is closed when the last thread lets go of it."""
        with self._lock:
            self._slide = None

    def read_tile(self, grid: TileGrid, x: int, y: int) -> np.ndarray:
        """The tile whose corner is at level-0 ``(x, y)``: uint8 (tile_size, tile_size, 3)."""
        slide = self.open()
        try:
            return slide.read_tile(grid, x, y)
        except Fault:
            with self._lock:
                if self._slide is slide:
                    self._slide = None  # closed when the last thread lets go of it
            with Slide(self.path) as alone:
                return alone.read_tile(grid, x, y)
