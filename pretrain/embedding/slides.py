"""Slides of a store of tile embeddings through a frozen slide encoder, several slides at a time, packed to a number of
tiles."""

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data import lease
from data.embeddings.slide_features import add_rows, claim_slide_store, finish_part, slides_in
from data.embeddings.store import EmbeddingStore, SlideEmbeddings
from data.files import make_folder
from models.slide_network import SlideFeatures, SlideNetwork
from pretrain.embedding.poolings import pooled_vectors
from pretrain.embedding.tile_clusters import TileClusters, kept_clusters
from pretrain.encoders.frozen import computing_in
from pretrain.encoders.slide_encoders import SlideEncoder
from pretrain.run.peers import Peers
from pretrain.run.progress import say, track

SECONDS_BETWEEN_FILES = 60.0  # what a kill loses at most


def embed_store(
    store: EmbeddingStore,
    encoder: SlideEncoder,
    out: Path,
    peers: Peers,
    *,
    part: int,
    parts: int,
    tokens: int,
    precision: str,
    pooling: str,
    clusters: Path | None,
    seed: int,
) -> int:
    """Add the slides of the store, or of this part of it, that ``out`` doesn't hold yet; returns how many. All
    ``peers`` call it, and share the slides that the encoder is asked about.

    pooling: which vector is the default. clusters: kept ones to use; None: those in ``out``, or new ones, drawn by
    ``seed``. Raises Fault where the slide encoder was trained on embeddings of another tile encoder, or ``out`` holds
    another one's.
    """
    encoder.require_fits(store)
    make_folder(out)
    about = {
        "format": 2,
        "encoder": encoder.name,
        "encoder_hash": output_hash(encoder, store, precision),
        "width": encoder.network.width,
        "tile_encoder": store.encoder,
        "pooling": pooling,
    }
    claim_slide_store(out, about)
    held = lease.alone(out / f".part-{part}", doing="another 'pretrain embed'") if peers.first else nullcontext()
    with held:
        there = slides_in(out)
        wanted = [slide for slide in store.slides if store.rows(slide)]
        mine = wanted[part - 1 :: parts] if part else wanted
        pending = peers.agreed([slide for slide in mine if slide not in there])
        rows: list[dict[str, object]] = []
        began = time.monotonic()
        if wanted:  # other clusters than those of the slides that are there are refused, whether or not any is pending
            kept = kept_clusters(out, store, wanted, seed, clusters)
        if pending:
            for row in track(_rows(store, encoder, pending, kept, tokens, precision), len(pending), "embed", "slides"):
                if peers.first:
                    rows.append(row)
                if rows and time.monotonic() - began > SECONDS_BETWEEN_FILES:
                    add_rows(out, part, rows)
                    rows, began = [], time.monotonic()
        if rows:
            add_rows(out, part, rows)
        if peers.first:
            finish_part(out, part, parts if part else 0)
    if len(wanted) < len(store.slides):
        say(f"{len(store.slides) - len(wanted)} slides without tissue have no embedding")
    return len(pending)


def output_hash(encoder: SlideEncoder, store: EmbeddingStore, precision: str) -> str:
    """What tells outputs of one slide encoder, tile encoder and precision from all others."""
    return f"{encoder.hash} on {store.encoder_hash}, {precision}"


def _rows(
    store: EmbeddingStore,
    encoder: SlideEncoder,
    slides: Sequence[str],
    clusters: TileClusters,
    tokens: int,
    precision: str,
) -> Iterator[dict[str, object]]:
    for batch in packed(store, slides, tokens):
        x, lengths, found = seen_by(encoder.network, batch, encoder.device, precision)
        vectors = pooled_vectors(x, lengths, found, clusters)
        vectors["mean_tiles"] = torch.stack([tiles.mean(dim=0) for tiles in x.split(lengths)])
        by_slide = {name: tensor.cpu().numpy() for name, tensor in vectors.items()}
        for i, slide in enumerate(batch):
            summaries = {name: array[i] for name, array in by_slide.items()}
            yield {"slide": slide.slide, "tiles": lengths[i]} | summaries


def seen_by(
    network: SlideNetwork,
    batch: Sequence[SlideEmbeddings],
    device: torch.device,
    precision: str,
    all_layers: bool = True,
) -> tuple[Tensor, list[int], SlideFeatures]:
    """Slides' tiles (T, D) float32 on the device, how many each slide has, and what ``network`` makes of them, with or
    without ``all_layers``."""
    x, cells, lengths = on_the_device(batch, device)
    with torch.inference_mode(), computing_in(precision, device):
        return x, lengths, network(x, cells, lengths, all_layers=all_layers)


def on_the_device(batch: Sequence[SlideEmbeddings], device: torch.device) -> tuple[Tensor, Tensor, list[int]]:
    """Slides' tiles (T, D) float32 and their cells (T, 2), and how many each slide has."""
    cells = torch.from_numpy(np.concatenate([slide.cells for slide in batch])).to(device)
    x = torch.from_numpy(np.concatenate([slide.embeddings for slide in batch])).to(device).float()
    return x, cells, [len(slide.embeddings) for slide in batch]


def packed(store: EmbeddingStore, slides: Sequence[str], tokens: int) -> Iterator[list[SlideEmbeddings]]:
    """Slides as `of_at_most` puts them together, read."""
    for numbers in of_at_most([store.rows(slide) for slide in slides], tokens):
        yield [store.read(slides[number]) for number in numbers]


def of_at_most(sizes: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Numbers of consecutive slides with at most ``tokens`` tiles together; a larger one alone."""
    batch: list[int] = []
    tiles = 0
    for number, size in enumerate(sizes):
        if batch and tiles + size > tokens:
            yield batch
            batch, tiles = [], 0
        batch.append(number)
        tiles += size
    if batch:
        yield batch
