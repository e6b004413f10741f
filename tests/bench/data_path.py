"""How fast tiles get from shards and slides to the network, beside how it is usually done: CPU time a tile, on one
core.

    python tests/bench/data_path.py [SHARED]      SHARED: a folder with slides/whole/*.svs and tiles/**/*.jpg; about four minutes

Both ways make two crops of 224 px and eight of 98 px, with DINOv2's settings, from the same JPEG tiles in the same
tars, in a DataLoader with one worker. *Usual* is WebDataset, PIL, and torchvision's v2 transforms for each tile. *Ours*
is the product's own loader, which ends at uint8 crops, and then its batched augmentation. Clocks count the CPU time of
every process and thread that takes part, from the second batch on. Rounds of all of them alternate, and the fastest
round of each counts, since other work on the machine only ever adds. Without SHARED the tiles are cut from the slide
that 'make setup' fetched.

The same tiles lie in Parquet files too, a path and a JPEG a row and 64 rows a group, as public tiles of the field do.
*Plain* is pyarrow, PIL and torchvision as one would write them: a random row's group is read, its row taken, decoded
and put through the same transforms. Our loader reads row groups so far ahead that the clock misses part of it; a whole
pass of such reading alone is added to its figure.

    loader_ratio      usual loader / our loader (ours is without colour, which the device adds)
    end_to_end_ratio  usual loader / (our loader + our augmentation on the same core)
    raw_read_ratio    webdataset, shuffled, bytes only / our reads of the same tiles at random
    online_ratio      our reading of random tiles of a slide / openslide's read_region alone
    floor_share       (JPEG decoding + resampling alone) / our loader: 1 would be no overhead at all
    parquet_of_shards our loader from Parquet in tiles per core-second / the same from shards
    parquet_ratio     plain Parquet reader / (our loader from Parquet + our augmentation on the same core)
    colour_ratio      colour by torch, as on a GPU / by numba, as on a CPU, of these crops; the median of paired turns
    colour_ratio_small  the same of the small recipe's crops, two of 96 px and four of 48 px, 64 tiles at a time
"""

import io
import itertools
import json
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import openslide
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg
import torch
import torch.nn.functional as F
import webdataset
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset
from torchvision.transforms import v2

from data.keyed import rng
from data.masks import Masking
from data.parquet.files import list_parquet
from data.parquet.index import ParquetIndex, ParquetQuestion, scan_parquet
from data.shards.scan import scan
from data.slides.coordinates import plan_grid
from data.slides.reading import Slide
from data.tiles.augment import augment, augment_together
from data.tiles.augment_parameters import Colour, draw_parameters
from data.tiles.crops import NUMBERS_A_CROP, CropSizes, box
from data.tiles.loader import RankBatch, TileBatches
from data.tiles.of_parquet import ParquetTiles
from data.tiles.of_shards import ShardTiles
from data.tiles.source import TileSource
from data.tiles.stream import Stream
from tests.data.shards.tars import write_tar

ROUNDS = 5
BATCH = 16  # tiles
BATCHES, USUAL_BATCHES = 12, 4  # measured in a round, after one that isn't
SIZES = CropSizes(2, 224, (0.32, 1.0), 8, 98, (0.05, 0.32))
SMALL, SMALL_BATCH = CropSizes(2, 96, (0.32, 1.0), 4, 48, (0.05, 0.32)), 64  # recipe=small's
COLOUR_TURNS = 15
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ONLINE_TILES = 40
TILES_A_TAR = 1000  # and in a Parquet file
ROWS_A_GROUP = 64
FETCHED = Path(__file__).resolve().parents[2] / ".venv/share/slidewright/CMU-1-Small-Region.svs"


# What there is to read -------------------------------------------------------------------------------------------


def jpegs(shared: Path, slide: Path) -> list[bytes]:
    """The shared tiles, or else tiles of the slide."""
    files = sorted(shared.glob("tiles/**/*.jpg"))
    if files:
        return [file.read_bytes() for file in files]
    with Slide(slide) as opened:
        grid = plan_grid(opened.dimensions, opened.mpp(), 0.5, 256, str(slide))
        places = [(int(grid.origin(c)), int(grid.origin(r))) for r in range(grid.rows) for c in range(grid.columns)]
        return [simplejpeg.encode_jpeg(np.ascontiguousarray(opened.read_tile(grid, *at)), 90) for at in places] * 8


def write_shards(folder: Path, tiles: list[bytes]) -> None:
    """The tiles in tars, in a random order, as 'pretrain shard' writes them, with their index."""
    order = rng(0, "order").permutation(len(tiles))
    for which, first in enumerate(range(0, len(tiles), TILES_A_TAR)):
        numbers = order[first : first + TILES_A_TAR].tolist()
        pairs = [((f"s_{number}_0.jpg", tiles[number]), (f"s_{number}_0.json", b"{}")) for number in numbers]
        write_tar(folder / f"tiles-{which:06d}.tar", itertools.chain(*pairs), tarfile.GNU_FORMAT)
    scan(folder)


def write_parquet(folder: Path, tiles: list[bytes]) -> None:
    """The tiles in Parquet files, in the same random order, with their index."""
    order = rng(0, "order").permutation(len(tiles))
    for which, first in enumerate(range(0, len(tiles), TILES_A_TAR)):
        numbers = order[first : first + TILES_A_TAR].tolist()
        paths = [f"s/{number}_0.jpg" for number in numbers]
        table = pa.table({"path": paths, "jpeg": pa.array([tiles[number] for number in numbers], pa.binary())})
        pq.write_table(table, folder / f"shard-{which:05d}.parquet", row_group_size=ROWS_A_GROUP)
    scan_parquet(folder, parquet_question(folder), lambda files, _: files)


def parquet_question(folder: Path) -> ParquetQuestion:
    return ParquetQuestion.of(list_parquet([str(folder)]), None, None, None, None)


# The usual way -----------------------------------------------------------------------------------------------------


class Usual:
    """DINOv2's views of one PIL image by torchvision's v2 transforms: ten normalised float tensors."""

    def __init__(self) -> None:
        colour = Colour()
        jitter = v2.RandomApply(
            [v2.ColorJitter(colour.brightness, colour.contrast, colour.saturation, colour.hue)],
            colour.jitter_probability,
        )
        end = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
        kinds = [(SIZES.global_size, SIZES.global_scale)] * 2 + [(SIZES.local_size, SIZES.local_scale)]
        self.views = [
            v2.Compose(
                [
                    v2.RandomResizedCrop(side, scale, interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
                    v2.RandomHorizontalFlip(),
                    jitter,
                    v2.RandomGrayscale(colour.grey_probability),
                    v2.RandomApply([v2.GaussianBlur(9, colour.blur_sigma)], colour.blur_probability[kind]),
                    v2.RandomApply([v2.RandomSolarize(128, 1.0)], colour.solarise_probability[kind]),
                    *end,
                ]
            )
            for kind, (side, scale) in enumerate(kinds)
        ]

    def __call__(self, image: Image.Image) -> list[torch.Tensor]:
        first, other, local = self.views
        return [first(image), other(image), *(local(image) for _ in range(SIZES.local_count))]


def usual_tiles(tars: list[str]) -> Any:
    """WebDataset's samples, shuffled, as bytes."""
    return webdataset.WebDataset(tars, shardshuffle=False, nodesplitter=None).repeat().shuffle(1000, initial=500)


def usual_batches(tars: list[str]) -> Iterator[list[torch.Tensor]]:
    transform = Usual()
    samples = iter(usual_tiles(tars))
    while True:
        tiles = [Image.open(io.BytesIO(next(samples)["jpg"])).convert("RGB") for _ in range(BATCH)]
        views = [transform(tile) for tile in tiles]
        yield [torch.stack([tile[view] for tile in views]) for view in range(len(views[0]))]


def plain_parquet_batches(files: list[str]) -> Iterator[list[torch.Tensor]]:
    """Rows at random, each out of its own row group: PIL's decoder, torchvision's views."""
    transform = Usual()
    opened = [pq.ParquetFile(file, memory_map=True) for file in files]
    rows = [(file, row) for file, reader in enumerate(opened) for row in range(reader.metadata.num_rows)]
    order = itertools.chain.from_iterable(rng(0, "plain", again).permutation(len(rows)) for again in itertools.count())
    while True:
        views = []
        for file, row in (rows[number] for number in itertools.islice(order, BATCH)):
            group, own = divmod(row, ROWS_A_GROUP)
            jpeg = opened[file].read_row_group(group, columns=["path", "jpeg"])["jpeg"][own].as_py()
            views.append(transform(Image.open(io.BytesIO(jpeg)).convert("RGB")))
        yield [torch.stack([tile[view] for tile in views]) for view in range(len(views[0]))]


def parquet_tiles(folder: Path) -> ParquetTiles:
    return ParquetTiles(ParquetIndex.open(folder, parquet_question(folder)))


def our_batches(tiles: TileSource) -> Iterator[RankBatch]:
    stream = Stream(tiles.parts, batch_size=BATCH, lanes=4, window=4, seed=0)
    for batch in TileBatches(
        tiles,
        stream,
        SIZES,
        Colour(),
        Masking(0.5, 0.1, 0.5, 16),
        seed=0,
        start=0,
        stop=BATCHES + 8,
        rank=0,
        world_size=1,
        accumulate=1,
        threads=1,
    ):
        assert isinstance(batch, RankBatch), batch
        yield batch


# Clocks ------------------------------------------------------------------------------------------------------------


class Timed(IterableDataset[tuple[float, Any]]):
    """Batches with the CPU time that their process had used when each was ready."""

    def __init__(self, batches: Callable[[], Iterator[Any]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[tuple[float, Any]]:
        torch.set_num_threads(1)
        for batch in self.batches():
            yield time.process_time(), batch


def in_a_loader(batches: Callable[[], Iterator[Any]], count: int) -> float:
    """CPU seconds a tile of worker and main process together, over ``count`` batches after the first, each let go for
    the next."""
    found = iter(DataLoader(Timed(batches), batch_size=None, num_workers=1, prefetch_factor=2))
    first, _ = next(found)
    began = time.process_time()
    for _ in range(count):
        worker, _ = next(found)
    return (worker - first + time.process_time() - began) / (count * BATCH)


def seconds(action: Callable[[], object]) -> float:
    began = time.process_time()
    action()
    return time.process_time() - began


# What is measured --------------------------------------------------------------------------------------------------


def colour(batches: list[RankBatch]) -> float:
    """Augmenting what the loader gave, on this core, a micro-batch at a time."""
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    parts = [part for batch in batches for part in batch.parts]

    def all_of_them() -> None:
        for part in parts:
            for views, parameters in zip(part.views, part.parameters, strict=True):
                augment(views, parameters, mean, std)

    return seconds(all_of_them) / (len(parts) * BATCH)


def colour_paths(sizes: CropSizes, tiles: int) -> tuple[float, float]:
    """CPU seconds a tile of colour by torch's kernels for a whole batch, and by numba, an image at a time: medians of
    turns, on noise with parameters as training draws them."""
    draw = rng(0, "colour paths")
    rows = np.stack([draw_parameters(Colour(), sizes.kinds(), draw) for _ in range(tiles)], 1)  # (views, tiles, WIDTH)
    groups, first = [], 0
    for count, side in sizes.sides():
        images = torch.from_numpy(draw.integers(0, 256, (count * tiles, 3, side, side), np.uint8))
        groups.append((images, torch.from_numpy(rows[first : first + count].reshape(count * tiles, -1))))
        first += count
    mean, std = torch.tensor(MEAN), torch.tensor(STD)

    def by_torch() -> None:
        for images, parameters in groups:
            augment_together(images, parameters.numpy(), 1 / std, -mean / std)

    def by_numba() -> None:
        for images, parameters in groups:
            augment(images, parameters, mean, std)

    turns = [(seconds(by_torch), seconds(by_numba)) for _ in range(COLOUR_TURNS + 1)][1:]  # the first one compiles
    torch_median, numba_median = (statistics.median(times) / tiles for times in zip(*turns, strict=True))
    return torch_median, numba_median


def floor(tiles: list[bytes]) -> float:
    """Only decoding, and only resampling of the same boxes: no reading, drawing, mirroring or collecting."""
    boxes = []
    for number in range(len(tiles)):
        header = simplejpeg.decode_jpeg_header(tiles[number])
        drawn = rng(0, "floor", number).random((10, NUMBERS_A_CROP)).tolist()
        boxes.append(
            [
                (side, box(header[0], header[1], scale, SIZES.aspect, u))
                for (side, scale), u in zip(SIZES.views(), drawn, strict=True)
            ]
        )

    def decode_and_cut() -> None:
        for jpeg, views in zip(tiles, boxes, strict=True):
            image = torch.from_numpy(simplejpeg.decode_jpeg(jpeg, colorspace="RGB")).permute(2, 0, 1).unsqueeze(0)
            for side, (top, left, h, w) in views:
                F.interpolate(image[..., top : top + h, left : left + w], (side, side), mode="bicubic", antialias=True)

    return seconds(decode_and_cut) / len(tiles)


def raw(folder: Path) -> float:
    """All tiles in random order, each as training reads it: found, read, and held to its header."""
    tiles = ShardTiles(shards=[str(folder)])
    order = rng(0, "raw").permutation(len(tiles)).tolist()

    def read() -> None:
        for number in order:
            tiles.jpeg(number)

    return seconds(read) / len(order)


def parquet_read(folder: Path) -> float:
    """All tiles of a pass in the stream's order, bytes only: row groups are read, kept while their tiles come, and let
    go."""
    tiles = parquet_tiles(folder)
    stream = Stream(tiles.parts, batch_size=BATCH, lanes=4, window=4, seed=0)
    steps = len(tiles) // BATCH

    def read() -> None:
        tiles.hold(stream.window * stream.lanes)
        for step in range(steps):
            for number in stream.batch(step).tolist():
                tiles.encoded(number)

    return seconds(read) / (steps * BATCH)


def usual_raw(tars: list[str], count: int) -> float:
    """As many samples of webdataset's as are asked for, once its shuffle buffer is full."""
    samples = iter(usual_tiles(tars))
    for _ in range(1200):
        next(samples)

    def read() -> None:
        for _ in range(count):
            next(samples)

    return seconds(read) / count


def online(slide: Path) -> tuple[float, float]:
    """A random tile by our reader, and by openslide's ``read_region`` alone, in turns."""
    ours = bare = 0.0
    with Slide(slide) as opened:
        grid = plan_grid(opened.dimensions, opened.mpp(0.5), opened.mpp(0.5), 256, str(slide))
        reader = openslide.OpenSlide(slide)
        draw = rng(time.monotonic_ns(), "online")
        for _ in range(ONLINE_TILES):
            for own in (True, False):
                x, y = int(draw.integers(0, grid.width - 256)), int(draw.integers(0, grid.height - 256))
                if own:
                    ours += seconds(lambda x=x, y=y: opened.read_tile(grid, x, y))
                else:
                    bare += seconds(lambda x=x, y=y: reader.read_region((x, y), 0, (256, 256)))
        reader.close()
    return ours / ONLINE_TILES, bare / ONLINE_TILES


def main() -> None:
    torch.set_num_threads(1)
    shared = Path(sys.argv[1] if len(sys.argv) > 1 else "none")
    slide = shared / "slides/whole/CMU-1-Small-Region.svs"
    slide = slide if slide.exists() else FETCHED
    if not slide.exists():
        raise SystemExit(f"there is no slide at {slide}: run 'make setup' first, or name a folder that has slides")
    fastest: dict[str, float] = {}

    def note(**figures: float) -> None:
        for name, value in figures.items():
            fastest[name] = min(value, fastest.get(name, float("inf")))

    with tempfile.TemporaryDirectory() as name:
        folder, tiles = Path(name), jpegs(shared, slide)
        write_shards(folder, tiles)
        rows = folder / "parquet"
        rows.mkdir()
        write_parquet(rows, tiles)
        files = sorted(str(file) for file in rows.glob("*.parquet"))
        tars = sorted(str(tar) for tar in folder.glob("*.tar"))
        shards = [str(folder)]
        batches = list(itertools.islice(our_batches(ShardTiles(shards=shards)), BATCHES))
        for _ in range(ROUNDS):
            note(usual=in_a_loader(lambda: usual_batches(tars), USUAL_BATCHES))
            note(plain_parquet=in_a_loader(lambda: plain_parquet_batches(files), USUAL_BATCHES))
            for _ in range(2):
                note(
                    loader=in_a_loader(lambda: our_batches(ShardTiles(shards=shards)), BATCHES),
                    parquet_loader=in_a_loader(lambda: our_batches(parquet_tiles(rows)), BATCHES),
                    floor=floor(tiles[: BATCHES * BATCH]),
                    colour=colour(batches),
                )
            note(usual_raw=usual_raw(tars, 1500), raw=raw(folder), parquet_read=parquet_read(rows))
            note(**dict(zip(("online", "bare"), online(slide), strict=True)))
    words = {
        "usual": "usual loader, colour included",
        "loader": "our loader, uint8 crops",
        "floor": "  of it decoding and resampling",
        "colour": "our augmentation",
        "usual_raw": "webdataset, bytes only",
        "raw": "our reads of a tile, bytes only",
        "plain_parquet": "plain Parquet reader, colour included",
        "parquet_loader": "our loader from Parquet",
        "parquet_read": "our reads of Parquet, bytes only",
        "online": "our reading of a slide",
        "bare": "openslide's read_region",
    }
    for key, meaning in words.items():
        print(f"{meaning:<37} {fastest[key] * 1e3:8.4f} ms a tile")
    whole_parquet = fastest["parquet_loader"] + fastest["parquet_read"]
    ratios = {}
    for name, sizes, together in (("colour_ratio", SIZES, BATCH), ("colour_ratio_small", SMALL, SMALL_BATCH)):
        by_torch, by_numba = colour_paths(sizes, together)
        print(f"{name}: colour by torch {by_torch * 1e3:.3f} ms a tile, by numba {by_numba * 1e3:.3f}")
        ratios[name] = round(by_torch / by_numba, 2)
    print(
        json.dumps(
            {
                "loader_ratio": round(fastest["usual"] / fastest["loader"], 2),
                "end_to_end_ratio": round(fastest["usual"] / (fastest["loader"] + fastest["colour"]), 2),
                "raw_read_ratio": round(fastest["usual_raw"] / fastest["raw"], 2),
                "parquet_of_shards": round(fastest["loader"] / whole_parquet, 3),
                "parquet_ratio": round(fastest["plain_parquet"] / (whole_parquet + fastest["colour"]), 2),
                "online_ratio": round(fastest["online"] / fastest["bare"], 3),
                "floor_share": round(fastest["floor"] / fastest["loader"], 3),
                **ratios,
            }
        )
    )


if __name__ == "__main__":
    main()
