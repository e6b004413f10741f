"""k-means over rows that are gone through by chunks is k-means."""

from pathlib import Path

import numpy as np
import pytest
import torch

from data.embeddings.clusters import nearest_centres
from data.embeddings.store import EmbeddingStore, EmbeddingWriter
from data.keyed import rng
from pretrain.curation import nearest
from pretrain.curation import rows as module
from pretrain.curation.levels import nearest_of_each
from pretrain.curation.lloyd import first_centres, fitted, improved
from pretrain.curation.nearest import nearest_of_many
from pretrain.curation.rows import RowsInMemory, StoreRows

CPU = torch.device("cpu")


def quiet(*_: object) -> None:
    pass


def points(count: int, width: int = 8, kinds: int = 6) -> np.ndarray:
    """As a store holds them."""
    draw = rng(count, "points")
    found = draw.normal(0, 3, (kinds, width))[draw.integers(kinds, size=count)] + draw.normal(0, 1, (count, width))
    return found.astype(np.float16).astype(np.float32)


def rounds(values: np.ndarray, first: np.ndarray, count: int) -> tuple[torch.Tensor, float]:
    centres, spread = torch.from_numpy(first), 0.0
    for _ in range(count):
        centres, spread = improved(RowsInMemory(torch.from_numpy(values)), centres, quiet)
    return centres, spread


@pytest.mark.parametrize("far", [False, True])
def test_centres_equal_scikit_learn_s_from_the_same_first_values(monkeypatch: pytest.MonkeyPatch, far: bool) -> None:
    """``far``: one of the first centres is where no row is, and gets another."""
    cluster = pytest.importorskip("sklearn.cluster")
    monkeypatch.setattr(module, "MOST_ROWS", 50)
    monkeypatch.setattr(module, "FEWEST_ROWS", 50)
    values = points(700)
    first = values[:9].copy()
    if far:
        first[4] = 1000.0
    theirs = cluster.KMeans(9, init=first, n_init=1, max_iter=5, tol=0, algorithm="lloyd").fit(values)
    ours, _ = rounds(values, first, 5)
    assert np.abs(ours.numpy() - theirs.cluster_centers_).max() < 1e-4
    labels, apart = nearest_centres(torch.from_numpy(values), ours)
    assert (labels.numpy() == theirs.predict(values)).all()
    assert float(apart.sum()) == pytest.approx(-theirs.score(values), rel=1e-4)


def test_rounds_never_make_it_worse_and_end_where_nothing_moves() -> None:
    values = points(300)
    centres, spreads = torch.from_numpy(values[:12].copy()), []
    for _ in range(40):
        centres, spread = improved(RowsInMemory(torch.from_numpy(values)), centres, quiet)
        spreads.append(spread)
    assert spreads == sorted(spreads, reverse=True) and spreads[-1] == spreads[-2] < spreads[0]
    fit = fitted(RowsInMemory(torch.from_numpy(values)), 12, 100, quiet, 0)
    assert torch.equal(improved(RowsInMemory(torch.from_numpy(values)), fit, quiet)[0], fit)


def test_faiss_finds_the_centres_that_torch_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss")
    values, centres = (torch.from_numpy(points(count, 24)) for count in (3000, 40))
    labels, apart = nearest_of_many(values, centres)
    monkeypatch.setattr(nearest, "installed_faiss", lambda: None)
    wanted, wanted_apart = nearest_of_many(values, centres)
    two = (values[:, None] - centres).square().sum(2).topk(2, largest=False).values
    clear = two[:, 1] - two[:, 0] > 1e-3
    assert clear.float().mean() > 0.99 and torch.equal(labels[clear], wanted[clear]) and labels.dtype == wanted.dtype
    assert torch.allclose(apart, wanted_apart, atol=1e-2) and apart.dtype == wanted_apart.dtype


def test_fewer_different_rows_than_clusters_leave_some_empty() -> None:
    values = np.repeat(points(3), 5, axis=0)
    centres = fitted(RowsInMemory(torch.from_numpy(values)), 6, 10, quiet, 0)
    assert torch.isfinite(centres).all()
    assert {tuple(row) for row in centres.tolist()} == {tuple(row) for row in values.tolist()}


def test_the_first_centres_lie_in_different_heaps() -> None:
    heaps = np.eye(8, dtype=np.float32) * 100
    values = torch.from_numpy(np.repeat(heaps, [500, 300, 100, 50, 20, 10, 5, 2], axis=0))
    chosen = first_centres(values, 8, rng(0))
    assert sorted(chosen.argmax(1).tolist()) == list(range(8))


def test_the_nearest_of_each_cluster_are_those_that_sorting_all_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_ROWS", 16)
    monkeypatch.setattr(module, "FEWEST_ROWS", 16)
    values = torch.from_numpy(points(400))
    centres = values[:7].clone()
    labels, apart = nearest_centres(values, centres)
    wanted = []
    for cluster in range(7):
        own = torch.nonzero(labels == cluster).flatten()
        wanted += own[apart[own].argsort()[:5]].tolist()
    found = nearest_of_each(RowsInMemory(values), centres, 5, quiet)
    assert found.tolist() == sorted(wanted)


def test_rows_of_a_store_are_its_tiles_in_order_and_some_of_them(tmp_path: Path) -> None:
    values = points(60)
    with EmbeddingWriter(tmp_path, 8, "made up", "0") as writer:
        for name, first, last in (("a", 0, 25), ("b", 25, 25), ("c", 25, 60)):
            places = np.stack([np.arange(last - first) * 100, np.zeros(last - first, int)], 1)
            writer.add(name, values[first:last], places, 100.0, 0.5)
    rows = StoreRows(EmbeddingStore.open(tmp_path), CPU, "euclidean")
    half = values.astype(np.float16).astype(np.float32)
    assert len(rows) == 60 and np.array_equal(torch.cat(list(rows.chunks(7))).numpy(), half)
    some = np.array([0, 3, 24, 25, 59])
    assert np.array_equal(torch.cat(list(rows.only(some).chunks(2))).numpy(), half[some])
    assert np.array_equal(torch.cat(list(rows.only(some).only(np.array([1, 4])).chunks(9))).numpy(), half[[3, 59]])
    cosine = StoreRows(EmbeddingStore.open(tmp_path), CPU, "cosine")
    assert torch.cat(list(cosine.chunks(11))).norm(dim=1).numpy() == pytest.approx(np.ones(60), abs=1e-6)
