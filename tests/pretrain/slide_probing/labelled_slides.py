"""A store of made-up slides whose label is known: of equal composition, their two tissues in one nest each, or mixed."""

from pathlib import Path

import numpy as np

from data.embeddings.store import EmbeddingStore, EmbeddingWriter
from data.keyed import rng

WIDTH = 16


def write_labelled_slides(folder: Path, slides: int, side: int = 10) -> list[tuple[str, int]]:
    """Slides of ``side`` × ``side`` tiles, half of them of each tissue: side by side (1) or at random places (0)."""
    directions = rng("tissues").normal(size=(2, WIDTH))
    places = np.stack(np.meshgrid(np.arange(side), np.arange(side)), axis=-1).reshape(-1, 2)
    labels = []
    with EmbeddingWriter(folder, WIDTH, "made up", "0" * 16) as writer:
        for number in range(slides):
            draw, label = rng("labelled", number), number % 2
            tissue = np.arange(len(places)) >= len(places) // 2
            if not label:
                tissue = draw.permutation(tissue)
            values = (
                directions[tissue.astype(int)]
                + 0.3 * draw.normal(size=WIDTH)
                + 0.5 * draw.normal(size=(len(places), WIDTH))
            )
            writer.add(f"slide{number:02d}", values.astype(np.float32), places * 256, 256.0, 0.5)
            labels.append((f"slide{number:02d}", label))
    return labels


def copy_slides(store: EmbeddingStore, slides: list[str], folder: Path, encoder_hash: str | None = None) -> Path:
    """Some slides of a store in a store of their own."""
    with EmbeddingWriter(folder, store.width, store.encoder, encoder_hash or store.encoder_hash) as writer:
        for name in slides:
            slide = store.read(name)
            writer.add(name, slide.embeddings, slide.coordinates, slide.tile_size_level0, slide.mpp)
    return folder
