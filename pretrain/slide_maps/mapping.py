"""Every slide of a store is asked which of its tiles its vector looked at, and the answers are written."""

import hashlib
from pathlib import Path

import numpy as np
import torch

from data import lease
from data.embeddings.slide_features import MAPS, OF_CLUSTERS, claim_slide_store
from data.embeddings.store import EmbeddingStore
from data.fault import Fault
from data.files import Refused, make_folder
from data.slides.lists import list_slides
from data.slides.names import name_slides
from pretrain.embedding.poolings import pooled_vectors
from pretrain.embedding.slides import output_hash, packed, seen_by
from pretrain.embedding.tile_clusters import CLUSTERS_FILE, TileClusters, kept_clusters, read_clusters
from pretrain.encoders.slide_encoders import SlideEncoder
from pretrain.run.progress import Progress, say
from pretrain.slide_maps.files import is_mapped, write_map
from pretrain.slide_maps.scores import WAYS, read_direction


def map_store(
    store: EmbeddingStore,
    encoder: SlideEncoder,
    out: Path,
    *,
    way: str,
    pooling: str,
    direction: Path | None,
    clusters: Path | None,
    seed: int,
    slides: list[str],
    part: int,
    parts: int,
    tokens: int,
) -> tuple[int, dict[str, str]]:
    """Map the slides of the store, or of this part of it, whose files aren't all in ``out``; returns how many were, and
    why each of the others wasn't.

    way: one of `WAYS`. pooling, direction: of whose vectors, and a file with a direction among them; None: each
    vector's own. clusters: kept ones to use; None: those beside ``direction``, or as `kept_clusters`. slides: slides' own
    files, for their thumbnails. Raises Fault as `embed_store`, and for a direction whose clusters nobody names.
    """
    encoder.require_fits(store)
    files = {slide: path for path, slide in name_slides(list_slides(slides), {}).items()}
    mine = [slide for slide in store.slides if store.rows(slide)]
    if files and not files.keys() & set(mine):
        raise Fault(
            f"slides= names {min(files)}, say, and none of those in {store.folder} ({mine[0] if mine else '–'})"
        )
    if direction is not None and pooling in OF_CLUSTERS:
        clusters = clusters_of_direction(direction, clusters, store)
    make_folder(out)
    kept = kept_clusters(out, store, mine, seed, clusters) if pooling in OF_CLUSTERS else None  # of all parts' slides
    mine = mine[part - 1 :: parts] if part else mine
    weights, along = None, ""
    if direction is not None and mine:
        weights = read_direction(direction, width_of(store, mine[0], encoder, pooling, kept), pooling)
        along = hashlib.blake2b(weights.tobytes(), digest_size=8).hexdigest()
    about = {
        "encoder": encoder.name,
        "encoder_hash": output_hash(encoder, store, "float32"),
        "width": encoder.network.width,
        "maps": way,
        "pooling": pooling,
        "direction": along,
    }
    claim_slide_store(out, about, MAPS)
    failed: dict[str, str] = {}
    with lease.alone(out / f".part-{part}", doing="another 'pretrain embed'"):
        pending = [slide for slide in mine if not is_mapped(out, slide)]
        if absent := len(set(pending) - files.keys()):
            say(f"{absent} slides are drawn on white: slides= doesn't name their files")
        progress = Progress(len(mine), "map", "slides", done=len(mine) - len(pending))
        for batch in packed(store, pending, tokens):
            for slide, scores in zip(batch, WAYS[way](encoder, batch, pooling, kept, weights), strict=True):
                try:
                    told = {name: str(value) for name, value in about.items()}
                    write_map(out, slide, scores.astype(np.float32), files.get(slide.slide), told)
                except Refused:
                    raise
                except Fault as fault:
                    failed[slide.slide] = str(fault)
                    say(f"left out: {fault}")
                progress.advance()
        progress.close()
    return len(pending) - len(failed), failed


def clusters_of_direction(direction: Path, given: Path | None, store: EmbeddingStore) -> Path:
    """The clusters by which the vectors were made that ``direction`` was found among: those ``given``, or that lie
    beside it. Raises Fault where there are none, or those given are others than lie beside it."""
    beside = direction.parent / CLUSTERS_FILE
    if given is None and not beside.exists():
        raise Fault(
            f"direction={direction} counts on the clusters of tiles that its vectors were made by, and none lie beside"
            f" it: give the folder of those slide embeddings, clusters=…, or its {CLUSTERS_FILE}."
        )
    if given is not None and beside.exists():
        centres, others = (read_clusters(path, store).centres for path in (given, beside))
        if not torch.equal(centres, others):
            raise Fault(f"clusters={given} are others than those of direction={direction}, {beside}: leave them out.")
    return beside if given is None else given


def width_of(
    store: EmbeddingStore, slide: str, encoder: SlideEncoder, pooling: str, clusters: TileClusters | None
) -> int:
    """How wide the encoder's vectors of this pooling are, by one slide."""
    x, lengths, seen = seen_by(encoder.network, [store.read(slide)], encoder.device, "float32")
    return pooled_vectors(x, lengths, seen, clusters)[pooling].shape[1]
