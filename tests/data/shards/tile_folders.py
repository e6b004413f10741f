"""Small folders of tile shards, written as any WebDataset tool writes them and indexed by a scan."""

import itertools
import tarfile
from pathlib import Path

import numpy as np
import simplejpeg

from data.keyed import rng
from data.shards.scan import scan
from tests.data.shards.tars import tile_members, write_tar

SIDE = 48


def picture(number: int, side: int = SIDE) -> np.ndarray:
    """A smooth coloured tile, another one for every ``number``: uint8 ``(side, side, 3)``."""
    draw = rng(number, "picture")
    down, right = np.mgrid[0:side, 0:side] / side
    waves = [np.sin(6.3 * (a * down + b * right + c)) for a, b, c in draw.uniform(0.3, 2.0, (3, 3))]
    return (140 + 80 * np.stack(waves, -1) + draw.normal(0, 8, (side, side, 3))).clip(0, 255).astype(np.uint8)


def write_tiles(folder: Path, tiles_per_tar: list[int], side: int = SIDE) -> Path:
    """Shards of so many tiles each, tile ``n`` being ``picture(n)``, with their index."""
    numbers = itertools.count()
    for which, tiles in enumerate(tiles_per_tar):
        members = []
        for number in itertools.islice(numbers, tiles):
            jpeg = simplejpeg.encode_jpeg(picture(number, side), quality=95)
            members += tile_members(jpeg, f"slide{which}", number % 8 * side, number // 8 * side, side)
        write_tar(folder / f"tiles-{which:06d}.tar", members, tarfile.GNU_FORMAT)
    scan(folder)
    return folder


def spoil(folder: Path, numbers: list[int]) -> None:
    """Overwrite the bytes of these tiles, as a bad disk does: lengths and places stay, the JPEG is gone."""
    index = scan(folder)
    for number in numbers:
        with index.path(int(index.file[number])).open("r+b") as tar:
            tar.seek(int(index.offset[number]))
            tar.write(bytes(int(index.length[number])))
