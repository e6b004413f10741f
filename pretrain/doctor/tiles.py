"""Do the tiles fit the run? Blocks against lanes and ranks, tiles against their index, and how fast one process
delivers."""

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from data.fault import Fault
from data.loader_process import SHARED_MEMORY, shared_memory_room
from data.masks import Masking
from data.tiles.loader import TileBatches, shared_memory_needed
from data.tiles.of_shards import ShardTiles
from data.tiles.source import TileSource, UnreadableTile
from data.tiles.stream import Stream, group_size
from pretrain.doctor.finding import Finding, failed, passed, warned
from pretrain.doctor.rate import fast_enough
from pretrain.run.counted import counted_as
from pretrain.training.even_shares import tiles_of
from pretrain.training.tile_settings import ColourSettings, Crops, colour, crop_sizes
from pretrain.training.tile_sources import build_source

SAMPLED_TILES = 64  # tiles that are read beside those of the rate
WARM_UP, MEASURED = 2, 8  # steps' shares of one process


def check_tiles(
    data: Mapping[str, Any],
    processes: int,
    accumulate: int,
    patch_size: int,
    needed: float | None,
    seed: int,
    here: int = 1,
    opened: tuple[TileSource, Stream] | None = None,
) -> list[Finding]:
    """All checks of a run's ``data:``; ``needed`` is the tiles a second that all its processes together are to get,
    ``here`` how many run here; ``opened`` what `open_stream` would open, where it is open already."""
    try:
        source, stream = opened or open_stream(data, seed)
        tiles_of(data, processes, accumulate, 1)
        read_ends_of_source(source)
        blocks = min(len(part.block_sizes) for part in source.parts)
        batches = loading(source, stream, data, processes, accumulate, patch_size, seed)
        memory = shared_memory(batches, here)
        rate = tiles_per_second(batches)
    except Fault as fault:
        return [failed("tiles", str(fault))]
    found = [
        passed(
            "tiles",
            f"{counted_as(len(source), 'tile')} in {counted_as(blocks, 'block')} for {counted_as(data['lanes'], 'lane')} on"
            f" {counted_as(processes, 'process', 'processes')}; {SAMPLED_TILES} of them read as the index says",
        )
    ]
    if blocks < 2 * data["lanes"]:
        found = [
            warned(
                "tiles",
                f"{counted_as(blocks, 'block')} for {counted_as(data['lanes'], 'lane')}: a lane hardly mixes its tiles;"
                f" set data.lanes lower (a multiple of the {processes} processes), or take more data",
            )
        ]
    does = f"one process with data.threads={data['threads']} reads, decodes and cuts"
    remedy = "raise data.threads and the cores for each process, or put the tiles on faster storage"
    return [*found, *memory, fast_enough(rate, needed, processes, "tiles", does, remedy)]


def open_stream(data: Mapping[str, Any], seed: int) -> tuple[TileSource, Stream]:
    """The source that ``data`` names and the stream over it. Raises Fault where they don't fit."""
    shape = {name: data[name] for name in ("batch_size", "lanes", "slides_per_lane")}
    source = build_source(data, group_size(**shape))
    return source, Stream(source.parts, **shape, window=data["window"], seed=seed)


def read_ends_of_source(source: TileSource) -> None:
    """Read tiles from one end of the source to the other. Raises Fault for one that isn't what the index says."""
    for number in np.linspace(0, len(source) - 1, SAMPLED_TILES).astype(int).tolist():
        try:
            source.read(number)
        except UnreadableTile as error:
            finds = "'pretrain shards verify' finds all that are; " if isinstance(source, ShardTiles) else ""
            raise Fault(f"{error}: {finds}restore them, or delete their index, which is made anew") from error


def loading(
    source: TileSource,
    stream: Stream,
    data: Mapping[str, Any],
    processes: int,
    accumulate: int,
    patch_size: int,
    seed: int,
) -> TileBatches:
    """What one process's loader makes, by the run's own crops and threads."""
    sizes = crop_sizes(Crops(**data["crops"]))
    return TileBatches(
        source,
        stream,
        sizes,
        colour(ColourSettings(**data["colour"])),
        Masking(grid=sizes.global_size // patch_size, **data["masks"]),
        seed=seed,
        start=0,
        stop=WARM_UP + MEASURED,
        rank=0,
        world_size=processes,
        accumulate=accumulate,
        threads=data["threads"],
        min_saturated=data["min_saturated"],
    )


def shared_memory(batches: TileBatches, here: int) -> list[Finding]:
    """Has /dev/shm room for the batches on their way to ``here`` processes? A container's is often small."""
    needed, room = shared_memory_needed(batches, here), shared_memory_room()
    if room is None or needed <= room:
        return []
    return [
        warned(
            "shared memory",
            f"{SHARED_MEMORY} has {room / 1e6:,.0f} MB free, and {here} processes need {needed / 1e6:,.0f} MB for"
            " batches on their way: they would go through a pipe, which is slower; give the container more (docker run"
            " --shm-size=8g)",
        )
    ]


def tiles_per_second(batches: TileBatches) -> float:
    """What one process's loader delivers."""
    count, began = 0, 0.0
    for step, batch in enumerate(batches):
        if step >= WARM_UP:
            count += sum(len(part.numbers) for part in batch.parts)
        elif step == WARM_UP - 1:
            began = time.monotonic()
    return count / (time.monotonic() - began)
