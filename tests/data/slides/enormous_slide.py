"""A slide of any logical size in a few megabytes: a tiled BigTIFF pyramid in which most tiles are one and the same
piece of glass."""

import struct
from pathlib import Path

import numpy as np
import simplejpeg

from tests.data.slides.synthetic_slides import stained


def write_enormous(
    path: Path, width: int, height: int, tissue: tuple[int, int, int, int], mpp: float, step: int = 4, square: int = 512
) -> Path:
    """Write a pyramid of ``width`` × ``height`` pixels, each level ``1 / step`` of the last, in JPEG squares of
    ``square`` pixels, with tissue on the level-0 squares ``left, top, right, bottom`` (right and bottom excluded)."""
    pictures = [stained(square, square, [(0, 0, 9999)] if seed else [], seed) for seed in range(5)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(
            struct.pack("<2sHHHQ", b"II", 43, 8, 0, 0)
        )  # the place of the first directory is filled in at the end
        places = []
        for picture in pictures:
            data = simplejpeg.encode_jpeg(picture, quality=80, colorsubsampling="420")
            places.append((file.tell(), len(data)))
            file.write(data)
        link, level, scale = 8, 0, 1
        while level == 0 or max(width, height) // scale > 2 * square:
            across, down = width // scale, height // scale
            rows, columns = np.mgrid[: -(-down // square), : -(-across // square)]
            left, top, right, bottom = tissue
            inside = (
                (columns * scale < right)
                & ((columns + 1) * scale > left)
                & (rows * scale < bottom)
                & ((rows + 1) * scale > top)
            )
            which = np.where(inside, 1 + (rows * 7 + columns * 3) % 4, 0).ravel()
            table = np.array(places, dtype="<u8")[which]
            offsets = file.tell()
            file.write(table[:, 0].tobytes())
            counts = file.tell()
            file.write(table[:, 1].tobytes())
            bits = struct.pack("<HHHH", 8, 8, 8, 0)
            entries = [
                (254, 4, 1, struct.pack("<Q", int(level > 0))),
                (256, 4, 1, struct.pack("<Q", across)),
                (257, 4, 1, struct.pack("<Q", down)),
                (258, 3, 3, bits),
                (259, 3, 1, struct.pack("<Q", 7)),
                (262, 3, 1, struct.pack("<Q", 6)),
                (277, 3, 1, struct.pack("<Q", 3)),
                (282, 5, 1, struct.pack("<II", round(1e7 / (mpp * scale)), 1000)),
                (283, 5, 1, struct.pack("<II", round(1e7 / (mpp * scale)), 1000)),
                (284, 3, 1, struct.pack("<Q", 1)),
                (296, 3, 1, struct.pack("<Q", 3)),
                (322, 4, 1, struct.pack("<Q", square)),
                (323, 4, 1, struct.pack("<Q", square)),
                (324, 16, len(which), struct.pack("<Q", offsets)),
                (325, 16, len(which), struct.pack("<Q", counts)),
                (530, 3, 2, struct.pack("<HHI", 2, 2, 0)),
            ]
            directory = file.tell()
            file.write(struct.pack("<Q", len(entries)))
            for tag, kind, count, value in entries:
                file.write(struct.pack("<HHQ", tag, kind, count) + value)
            following = file.tell()
            file.write(struct.pack("<Q", 0))
            file.seek(link)
            file.write(struct.pack("<Q", directory))
            file.seek(0, 2)
            link, level, scale = following, level + 1, scale * step
    return path
