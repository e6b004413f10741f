"""Sources of tiles that fail as a user's own code does."""

import errno
import os
import signal
from typing import Any

import numpy as np

from data.tiles.of_shards import ShardTiles

FAILS_FROM = 160  # samples: the loader is some steps ahead, and a few are taken before it fails


class FailingTiles(ShardTiles):
    """Raises, or kills its process, as ``PRETRAIN_TEST_FAILURE`` says."""

    def read(self, number: int, *key: Any) -> np.ndarray:
        if key and key[-1] >= FAILS_FROM:
            failure = os.environ["PRETRAIN_TEST_FAILURE"]
            if failure == "KeyError":
                raise KeyError("stain")
            if failure == "OSError":
                raise OSError(errno.EMFILE, "Too many open files")
            if failure == "MemoryError":
                raise MemoryError
            os.kill(os.getpid(), signal.Signals[failure])
        return super().read(number, *key)
