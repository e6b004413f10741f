"""One process of `online.py`: reads tiles of slides for some batches, by `data=online` or by wsistream, and tells what it
cost.

    python tests/bench/online_rank.py '{"who": "ours", "slides": folder, "grids": folder, "rank": 0, "ranks": 1, "batches": 8}'

Ends with one JSON line: processor seconds of this process and its worker, GiB that they held at most, seconds to the
first batch, and a hash of the pixels of the first ``hashed`` batches.
"""

import hashlib
import itertools
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

BATCH, TILE, MPP, MIN_TISSUE = 16, 256, 0.5, 0.4
GLOBALS, LOCALS = (2, 224, (0.32, 1.0)), (8, 98, (0.05, 0.32))  # number, pixels, share of the tile


Start = Callable[[], Iterator[list[Tensor]]]
"""Begins to read; what is to be imported was."""


def ours(asked: dict) -> Start:
    """The loader process of a rank, as training has it: uint8 views, by size."""
    from data.masks import Masking
    from data.slides.survey import known_survey
    from data.tiles.augment_parameters import Colour
    from data.tiles.crops import CropSizes
    from data.tiles.loader import TileBatches, loader_of
    from data.tiles.of_slides import SlideTiles
    from data.tiles.stream import Stream
    from tests.bench.online import look_at

    def start() -> Iterator[list[Tensor]]:
        paths, settings, mpp = look_at(Path(asked["slides"]))
        surveyed = known_survey(Path(asked["grids"]), paths, settings, mpp)
        assert surveyed is not None
        tiles = SlideTiles(surveyed)
        batches = TileBatches(
            tiles,
            Stream(tiles.parts, batch_size=BATCH * asked["ranks"], lanes=4, window=16, seed=0),
            CropSizes(*GLOBALS, *LOCALS),
            Colour(),
            Masking(0.5, 0.1, 0.5, 16),
            seed=0,
            start=0,
            stop=asked["batches"],
            rank=asked["rank"],
            world_size=asked["ranks"],
            accumulate=1,
            threads=1,
        )
        for batch in loader_of(batches, pin_memory=False):
            yield [views for part in batch.parts for views in part.views]

    return start


def theirs(asked: dict) -> Start:
    """wsistream's data set in a DataLoader with one worker: the same views as uint8, resized as it comes (bilinear, without
    antialiasing)."""
    from torch.utils.data import DataLoader
    from wsistream.backends import OpenSlideBackend
    from wsistream.sampling import RandomSampler
    from wsistream.tissue import OtsuTissueDetector
    from wsistream.torch import WsiStreamDataset, partition_slides_by_rank
    from wsistream.transforms import RandomFlipRotate
    from wsistream.views import RandomResizedCrop, ViewConfig

    def views(name: str, count: int, size: int, scale: tuple[float, float]) -> ViewConfig:
        mirrored = RandomFlipRotate(p_hflip=0.5, p_vflip=0.0, p_rot90=0.0)
        return ViewConfig(name=name, crop=RandomResizedCrop(size=size, scale=scale), transforms=mirrored, count=count)

    def start() -> Iterator[list[Tensor]]:
        data = WsiStreamDataset(
            slide_paths=partition_slides_by_rank(asked["slides"], asked["rank"], asked["ranks"]),
            backend=OpenSlideBackend(),
            tissue_detector=OtsuTissueDetector(),
            sampler=RandomSampler(patch_size=TILE, target_mpp=MPP, tissue_threshold=MIN_TISSUE),
            views=[views("global", *GLOBALS), views("local", *LOCALS)],
            seed=asked["rank"],
            tissue_mask_cache_size=8,
            output_dtype="uint8",
        )
        for batch in itertools.islice(DataLoader(data, batch_size=BATCH, num_workers=1), asked["batches"]):
            yield [batch[name] for name in sorted(batch) if name.startswith(("global", "local"))]

    return start


def main(asked: dict) -> None:
    torch.set_num_threads(1)
    if asked["who"] == "wsistream":
        sys.path.append(asked["peer"])  # behind our environment: torch, numpy and openslide are the same for both
    start = (theirs if asked["who"] == "wsistream" else ours)(asked)
    pixels, first = hashlib.blake2b(), None
    began = time.monotonic()
    batches = start()
    for number, batch in enumerate(batches):
        first = first or time.monotonic() - began
        if number < asked["hashed"]:
            for views in batch:
                pixels.update(views.contiguous().numpy().tobytes())
    del batches
    of_both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(
        json.dumps(
            {
                "cpu": sum(usage.ru_utime + usage.ru_stime for usage in of_both),
                "gib": sum(usage.ru_maxrss for usage in of_both) / 2**20,
                "first_batch": first,
                "pixels": pixels.hexdigest(),
            }
        )
    )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
