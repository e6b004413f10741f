"""Parquet files of tiles for tests, as others write them."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.data.shards.tile_folders import picture


def encoded(number: int, kind: str = "JPEG") -> bytes:
    """Picture ``number``, encoded."""
    written = io.BytesIO()
    Image.fromarray(picture(number)).save(written, kind, quality=95)
    return written.getvalue()


def write_table(path: Path, numbers: Sequence[int], group: int = 4, **columns: Sequence[Any]) -> Path:
    """A file of these pictures in a column ``jpeg``, beside other ``columns``, ``group`` rows together."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"jpeg": [encoded(number) for number in numbers], **columns})
    pq.write_table(table, path, row_group_size=group)
    return path
