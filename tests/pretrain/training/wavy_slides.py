"""A small store of made-up slides, of the slide stage's tests."""

from pathlib import Path

import numpy as np

from data.embeddings.store import EmbeddingWriter
from data.keyed import rng


def write_wavy_slides(folder: Path, slides: int, columns: int, rows: int, fewer: int = 0) -> Path:
    """``slides`` slides of ``columns`` × ``rows`` tiles, each ``fewer`` tiles less than the one before; 16-wide
    embeddings that vary smoothly over the slide."""
    cells = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), axis=-1).reshape(-1, 2)
    with EmbeddingWriter(folder, 16, "made up", "0" * 16) as writer:
        for number in range(slides):
            draw = rng(number, "slide")
            waves = np.sin(cells @ draw.normal(0, 0.7, (2, 16)) + draw.uniform(0, 6, 16))
            kept = slice(0, len(cells) - fewer * number)
            writer.add(f"slide{number}", waves[kept].astype(np.float32), cells[kept] * 256, 256.0, 0.5)
    return folder
