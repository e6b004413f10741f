"""Crops of slides' grids: the same on any number of ranks, with enough tissue, every orientation, exact masks."""

from pathlib import Path

import numpy as np
import pytest
import torch

from data.embeddings.grid_crops import CropBatch, CropSequences, crop_corner, inside_square, oriented
from data.embeddings.standardisation import Statistics
from data.embeddings.store import EmbeddingStore, EmbeddingWriter
from data.keyed import rng
from tests.data.embeddings.test_slide_sequences import DEFAULTS, make_store

CROPS = {
    "global_count": 2,
    "global_side": 7,
    "local_count": 3,
    "local_side": 4,
    "tissue": 0.25,
    "vertical_flip": 0.5,
    "quarter_turn": 0.5,
    "masked_share": 0.5,
    "mask_ratios": [0.2, 0.5],
    "empty_cells": False,
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EmbeddingStore:
    return make_store(tmp_path_factory.mktemp("store"), 12)


def sequences(store: EmbeddingStore, **changes: object) -> CropSequences:
    return CropSequences(store, Statistics.of(store), **(DEFAULTS | CROPS | changes))  # type: ignore[arg-type]


def by_crop(batch: CropBatch) -> list[tuple[int, int, np.ndarray, np.ndarray, np.ndarray]]:
    """Position, view, embeddings, cells and masks of each crop."""
    masked = torch.zeros(len(batch.cells), dtype=torch.bool).index_fill(0, batch.masked, True)
    parts = (part.split(batch.lengths) for part in (batch.embeddings, batch.cells, masked))
    n = len(batch.positions)
    return [
        (batch.positions[number % n], number // n, *(part.numpy() for part in one))  # type: ignore[misc]
        for number, one in enumerate(zip(*parts, strict=True))
    ]


@pytest.mark.parametrize("empty_cells", [False, True])
def test_any_number_of_ranks_makes_the_same_crops(store: EmbeddingStore, empty_cells: bool) -> None:
    for step in (0, 5):
        whole = by_crop(sequences(store, empty_cells=empty_cells).batch(step))
        for world in (2, 4):
            parts = [sequences(store, empty_cells=empty_cells).batch(step, rank, world) for rank in range(world)]
            found = sorted((crop for part in parts for crop in by_crop(part)), key=lambda crop: (crop[1], crop[0]))
            for ours, theirs in zip(found, whole, strict=True):
                assert ours[:2] == theirs[:2]
                assert all(np.array_equal(a, b) for a, b in zip(ours[2:], theirs[2:], strict=True))


def test_views_come_one_after_the_other_as_squares_of_one_slide_each(store: EmbeddingStore) -> None:
    found = sequences(store, shift_grid=0)
    batch = found.batch(3)
    assert (batch.global_crops, len(batch.lengths)) == (8, 20)
    assert batch.global_tiles == sum(batch.lengths[:8]) and batch.valid is None
    for position, view, embeddings, cells, _ in by_crop(batch):
        side = 7 if view < 2 else 4
        assert cells.min() >= 0 and cells.max() < side and len(cells) >= side**2 / 4
        flat = cells[:, 1] * side + cells[:, 0]
        assert (np.diff(flat) > 0).all()  # row-major
        assert np.unique(embeddings[:, 0]).tolist() == [int(found.sequence_at(position).slide[1:])]
        # Of an embedding (slide, column, row): neighbours in the crop are neighbours in the slide.
        places = embeddings[:, 1:].astype(int)
        apart = np.abs(cells[:, None] - cells[None]).sum(-1)
        assert np.array_equal(apart, np.abs(places[:, None] - places[None]).sum(-1))
    shifted = sequences(store, shift_grid=50).batch(3)
    assert shifted.extent > 20 and shifted.lengths == batch.lengths


@pytest.mark.parametrize("empty_cells", [False, True])
def test_exactly_half_of_the_global_crops_is_masked_with_ratios_of_their_tiles_spread_over_the_batch(
    store: EmbeddingStore, empty_cells: bool
) -> None:
    found = sequences(store, empty_cells=empty_cells)
    for step in range(3):
        batch = found.batch(step)
        hidden = np.array(batch.masked_lengths)
        assert (hidden[8:] == 0).all() and (hidden > 0).sum() == 4
        valid = torch.ones(len(batch.cells), dtype=torch.bool) if batch.valid is None else batch.valid
        assert valid[batch.masked].all()
        tiles = np.array([int(part.sum()) for part in valid.split(batch.lengths)])
        shares = np.sort((hidden / tiles)[hidden > 0])
        edges = np.linspace(0.2, 0.5, 5)
        rounding = 0.5 / tiles.min()
        assert (shares >= edges[:-1] - rounding).all() and (shares <= edges[1:] + rounding).all()
        if empty_cells:
            assert batch.lengths == [49] * 8 + [16] * 12
            assert batch.embeddings[~valid].eq(0).all() and not valid.all()


def test_held_out_crops_are_the_same_every_time_whoever_they_are_judged_with(store: EmbeddingStore) -> None:
    found = sequences(store)
    together, alone = by_crop(found.held_out([0, 2])), by_crop(sequences(store).held_out([2]))
    for ours, theirs in zip([crop for crop in together if crop[0] == 2], alone, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(ours[2:], theirs[2:], strict=True))
    assert max(found.size(sequence) for sequence in found.validation) <= 2 * 49 + 3 * 16


def test_a_crop_has_enough_tissue_or_is_the_best_of_three_and_never_empty() -> None:
    y, x = np.mgrid[:30, :30].reshape(2, -1)
    dense = np.stack([x, y], axis=1)[(x < 12) | (y > 28)]
    enough = [inside_square(dense, crop_corner(dense, 8, 0.25, rng("dense", n)), 8).sum() for n in range(200)]
    assert np.mean(np.array(enough) >= 16) > 0.7 and min(enough) > 0
    sparse = np.array([[0, 0], [99, 99], [50, 3], [3, 50]])
    for n in range(100):
        corner = crop_corner(sparse, 8, 0.25, rng("sparse", n))
        assert inside_square(sparse, corner, 8).any() and (corner >= 0).all() and (corner <= 92).all()
    small = np.array([[5, 6], [6, 6]])
    assert crop_corner(small, 8, 0.25, rng("small")).tolist() == [5, 6]


def test_flips_and_a_quarter_turn_make_all_eight_orientations_alike() -> None:
    corner = np.array([[0, 0], [1, 0]])
    found = [oriented(corner, 5, 0.5, 0.5, 0.5, rng("turn", n)).tobytes() for n in range(800)]
    assert len(set(found)) == 8 and min(found.count(one) for one in set(found)) > 60
    assert oriented(corner, 5, 0.0, 0.0, 1.0, rng("turn")).tolist() == [[4, 0], [4, 1]]
    assert oriented(corner, 5, 1.0, 0.0, 0.0, rng("turn")).tolist() == [[4, 0], [3, 0]]


def test_a_tile_a_cell_where_tiles_overlap(tmp_path: Path) -> None:
    places = np.array([[x, y] for y in range(6) for x in range(6) for _ in range(2)])
    with EmbeddingWriter(tmp_path, 3, "synthetic", "abc") as out:
        for number in range(5):
            values = np.arange(len(places) * 3, dtype=np.float32).reshape(-1, 3)
            out.add(f"s{number}", values, places * 256 + np.tile([[0, 0], [99, 99]], (36, 1)), 256.0, 0.5)
    for empty_cells in (False, True):
        batch = sequences(EmbeddingStore.open(tmp_path), empty_cells=empty_cells, global_side=6).batch(0)
        assert set(batch.lengths[: batch.global_crops]) == {36}
