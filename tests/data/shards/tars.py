"""Tars as any program writes them, and a tile's two members as WebDataset's tools keep them."""

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

Member = tuple[str, bytes]
"""A member's name and content."""


def write_tar(path: Path, members: Iterable[Member], format: int = tarfile.DEFAULT_FORMAT) -> None:
    """A tar of these members, in that order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def tile_members(
    jpeg: bytes, slide: str, x: int, y: int, side: int, *, mpp: float = 0.5, key: str = "", **more: object
) -> list[Member]:
    """A tile of ``side`` pixels at ``(x, y)``, its JPEG and a JSON of its facts with ``more``, both called ``key``."""
    key = key or f"{slide}_{x}_{y}"
    facts = {"slide": slide, "x": x, "y": y, "mpp": mpp, "tile_size": side, "tile_size_level0": float(side)} | more
    return [(f"{key}.jpg", jpeg), (f"{key}.json", json.dumps(facts).encode())]
