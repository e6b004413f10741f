"""Fine-tuning begins where the frozen row is, learns from what it is fitted on alone, and is the same every time."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from data.embeddings.store import EmbeddingStore
from data.keyed import rng
from models.initialise import initialise
from models.longnet import LongNet
from models.slide_network import SlideNetwork
from models.slide_vit import SlideViT
from pretrain.embedding.tile_clusters import clusters_of
from pretrain.slide_probing import fine_tuning
from pretrain.slide_probing.fine_tuning import FineTuning
from pretrain.slide_probing.label_loss import label_loss
from pretrain.slide_probing.labels import LabelledSlides
from pretrain.slide_probing.linear import linear_model, predicted
from pretrain.slide_probing.measures import explained
from tests.pretrain.slide_probing.labelled_slides import WIDTH, write_labelled_slides

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = {"width": 32, "depth": 2, "heads": 4, "feed_forward_width": 32, "drop_path": 0.1}
FITTED, JUDGED = np.arange(8), np.arange(8, 12)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EmbeddingStore:
    folder = tmp_path_factory.mktemp("tuned")
    write_labelled_slides(folder, 18, side=5)
    return EmbeddingStore.open(folder)


def longnet() -> SlideNetwork:
    return LongNet(WIDTH, **SIZES, segment_lengths=[8, 32], dilated_ratios=[1, 2], dropout=0.1, compatible=False)


def slide_vit() -> SlideNetwork:
    return SlideViT(WIDTH, **SIZES, registers=1, slopes="fixed", reach=None, dropout=0.1)


def twelve_patients(store: EmbeddingStore, kind: str) -> LabelledSlides:
    """Six of them with two slides."""
    slides = store.slides
    bags = [slides[i::12] for i in range(12)]
    draw = rng("labels of twelve")
    values = {
        "classes": np.arange(12) % 2,
        "grades": np.arange(12) % 3,
        "number": draw.normal(loc=40, scale=9, size=12),
        "survival": np.stack([draw.integers(1, 9, 12), np.arange(12) % 3 > 0], 1).astype(float),
    }[kind]
    classes = {"classes": ["a", "b"], "grades": ["0", "1", "2"]}.get(kind, [])
    names = [str(i) for i in range(12)]
    return LabelledSlides(bags, names, names, "classes" if classes else kind, values, classes, False, None, [])


def tuning(store: EmbeddingStore, kind: str, network: SlideNetwork, steps: int, tokens: int = 4096) -> FineTuning:
    initialise(network, 0, "encoder")
    network.requires_grad_(False)
    labelled = twelve_patients(store, kind)
    clusters = clusters_of(store, store.slides, 0)
    found = FineTuning(
        store, labelled, network, clusters, np.empty(0), steps, 0, tokens, "float32", torch.device("cpu"), lambda: None
    )
    with torch.no_grad():
        vectors = [found._vectors(network, bag, None).mean(0).numpy() for bag in labelled.bags]
    return replace(found, vectors=np.stack(vectors))


@pytest.mark.parametrize("kind", ["classes", "grades", "number", "survival"])
def test_without_a_step_it_tells_what_the_linear_model_of_frozen_vectors_does(store: EmbeddingStore, kind: str) -> None:
    found = tuning(store, kind, longnet(), 0)
    labelled, table = found.labelled, found.vectors
    expected = predicted(labelled.kind, len(labelled.classes), table[FITTED], labelled.values[FITTED], table[JUDGED])
    np.testing.assert_allclose(found(FITTED, JUDGED), expected, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("make", [longnet, slide_vit])
def test_it_is_the_same_every_time_and_knows_nothing_of_what_is_judged(store: EmbeddingStore, make) -> None:  # type: ignore[no-untyped-def]
    found = tuning(store, "classes", make(), 4)
    before = [parameter.clone() for parameter in found.network.parameters()]
    told = found(FITTED, JUDGED)
    assert all(map(torch.equal, before, found.network.parameters()))  # the encoder itself stays as it is
    np.testing.assert_array_equal(found(FITTED, JUDGED), told)
    other = found.labelled.values.copy()
    other[JUDGED] = 1 - other[JUDGED]
    np.testing.assert_array_equal(replace(found, labelled=replace(found.labelled, values=other))(FITTED, JUDGED), told)
    assert not np.array_equal(replace(found, seed=1)(FITTED, JUDGED), told)


@pytest.mark.parametrize("kind", ["classes", "survival"])
def test_a_step_in_several_passes_is_that_in_one(
    store: EmbeddingStore, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = tuning(store, kind, longnet(), 3)
    passes: list[int] = []
    vectors = FineTuning._vectors

    def counted(self: FineTuning, network: SlideNetwork, slides: Sequence[str], seeds: Sequence[int] | None):  # type: ignore[no-untyped-def]
        passes.append(len(slides))
        return vectors(self, network, slides, seeds)

    monkeypatch.setattr(FineTuning, "_vectors", counted)
    one = found(FITTED, JUDGED)
    together = len(passes)
    monkeypatch.setattr(fine_tuning, "TOKENS_LEARNED", 75)  # three slides of 25 tiles
    several = found(FITTED, JUDGED)
    assert together == 3 + 1 and len(passes) - together > 2 * 3 * 4
    np.testing.assert_allclose(several, one, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("make", [longnet, slide_vit])
def test_it_learns_where_it_begins_with_a_model_that_tells_nothing(store: EmbeddingStore, make) -> None:  # type: ignore[no-untyped-def]
    found = tuning(store, "number", make(), 20)
    found = replace(found, vectors=np.zeros_like(found.vectors))
    assert explained(found.labelled.values[FITTED], replace(found, steps=0)(FITTED, FITTED)) == pytest.approx(0)
    assert explained(found.labelled.values[FITTED], found(FITTED, FITTED)) > 0.05


@pytest.mark.parametrize("kind", ["classes", "grades", "number", "survival"])
def test_the_linear_model_is_the_least_of_the_loss_with_its_penalty(store: EmbeddingStore, kind: str) -> None:
    labelled = twelve_patients(store, kind)
    values = labelled.values if kind != "number" else labelled.values / labelled.values.std()
    vectors = rng("vectors", kind).normal(size=(12, 5))
    model = linear_model(labelled.kind, len(labelled.classes), vectors, values)
    weights = torch.tensor(model.weights, requires_grad=True)
    scaled = torch.from_numpy((vectors - model.centre) / model.spread)
    outputs = (scaled @ weights + torch.from_numpy(model.bias)).float()
    loss = label_loss(labelled.kind, outputs, torch.from_numpy(values))
    (loss + model.penalty * weights.square().sum()).backward()
    assert weights.grad is not None and weights.grad.abs().max() < 2e-3 < 0.01 < weights.abs().max()
