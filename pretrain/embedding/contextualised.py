"""A slide encoder's output for every tile, as a store of the same layout as the one that it read."""

from pathlib import Path

import numpy as np

from data.embeddings.store import EmbeddingStore, EmbeddingWriter
from pretrain.embedding.slides import output_hash, packed, seen_by
from pretrain.encoders.slide_encoders import SlideEncoder
from pretrain.run.progress import Progress


def embed_tiles_in_context(
    store: EmbeddingStore, encoder: SlideEncoder, out: Path, *, part: int, parts: int, tokens: int, precision: str
) -> int:
    """Add the slides of the store, or of this part of it, that the store ``out`` doesn't hold yet; returns how many.
    Its encoder is this one over the tile encoder. Raises Fault as `embed_store`."""
    encoder.require_fits(store)
    name, hash_ = f"{encoder.name} over {store.encoder}", output_hash(encoder, store, precision)
    with EmbeddingWriter(out, encoder.network.width, name, hash_, part, parts) as writer:
        mine = store.slides[part - 1 :: parts] if part else store.slides
        pending = [slide for slide in mine if not writer.done(slide)]
        progress = Progress(len(mine), "embed", "slides", done=len(mine) - len(pending))
        for batch in packed(store, pending, tokens):
            outputs = np.empty((0, encoder.network.width), np.float32)
            full = [slide for slide in batch if len(slide.embeddings)]
            if full:
                _, _, seen = seen_by(encoder.network, full, encoder.device, precision, all_layers=False)
                outputs = seen.tiles.float().cpu().numpy()
            start = 0
            for slide in batch:
                end = start + len(slide.embeddings)
                writer.add(
                    slide.slide,
                    outputs[start:end],
                    slide.coordinates,
                    slide.tile_size_level0,
                    slide.mpp,
                    tile_size=slide.tile_size,
                    slide_width=slide.slide_width,
                    slide_height=slide.slide_height,
                )
                start = end
                progress.advance()
        progress.close()
        writer.finish({})
    return len(pending)
