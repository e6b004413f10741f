"""On slides whose labels known tiles decide, maps of a linear model's logit are high on these.

Slides are the benchmark's, the network has random weights: by its moments within clusters a linear model tells both
labels (``make bench-slide``). How high is told by the AUROC of a slide's scores for the tiles that decide.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from data.embeddings.store import EmbeddingStore, EmbeddingWriter
from models.initialise import initialise
from models.slide_vit import SlideViT
from pretrain.embedding.poolings import pooled_vectors
from pretrain.embedding.slides import packed, seen_by
from pretrain.embedding.tile_clusters import clusters_of
from pretrain.encoders.slide_encoders import EncoderInput, SlideEncoder
from pretrain.probing.scores import logistic_regression
from pretrain.slide_maps.scores import WAYS
from pretrain.slide_probing.measures import auroc
from tests.bench.slide_maps import A, class_vectors, made_up_tiles, slide_map

SLIDES, MAPPED, CLASSES, WIDTH = 160, 8, 6, 64  # of a label, the last of which are mapped, and fitted on none of these


@pytest.fixture(scope="module")
def encoder() -> SlideEncoder:
    network = SlideViT(
        WIDTH, width=48, depth=2, heads=8, feed_forward_width=96, registers=0, slopes="fixed", reach=None, dropout=0.0,
        drop_path=0.0,
    ).eval()  # fmt: skip
    initialise(network, 0)
    return SlideEncoder(network, "random weights", "0", [EncoderInput()], [], torch.device("cpu"))


@pytest.mark.parametrize("kind", ["rare", "nests"])
def test_a_logit_is_most_sensitive_to_the_tiles_that_decide_its_label(
    kind: str, encoder: SlideEncoder, tmp_path: Path
) -> None:
    maps = [slide_map(kind, CLASSES, 2, number) for number in range(SLIDES)]
    vectors = class_vectors(CLASSES, WIDTH, 0)
    with EmbeddingWriter(tmp_path / "store", WIDTH, "made up", "0") as out:
        for number, found in enumerate(maps):
            out.add(f"{number:04d}", made_up_tiles(found, vectors, 2, kind, number), found.cells * 256, 256.0, 0.5)
    store = EmbeddingStore.open(tmp_path / "store")
    clusters = clusters_of(store, store.slides, 0)
    rows = []
    for batch in packed(store, store.slides, 8192):
        x, lengths, seen = seen_by(encoder.network, batch, encoder.device, "float32")
        rows.append(pooled_vectors(x, lengths, seen, clusters)["cluster_moments"])
    fitted, labels = torch.cat(rows).numpy()[:-MAPPED], np.array([found.label for found in maps])[:-MAPPED]
    model, _ = logistic_regression(fitted, labels)
    scaler, linear = model.steps[0][1], model.steps[-1][1]
    logit = linear.coef_[0] / scaler.scale_

    areas = []
    for number in range(SLIDES - MAPPED, SLIDES):
        if maps[number].label:
            batch = [store.read(store.slides[number])]
            (scores,) = WAYS["sensitivity"](encoder, batch, "cluster_moments", clusters, logit)
            areas.append(auroc((maps[number].of_tiles == A).astype(int), np.stack([-scores, scores], axis=1)))
    assert np.mean(areas) > 0.8  # .5 by chance
