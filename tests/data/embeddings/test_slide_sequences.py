import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.embeddings.sequences import Sequence, SlideBatch, SlideSequences, cut_fields, spread_by_size
from data.embeddings.standardisation import Statistics
from data.embeddings.store import EmbeddingStore, EmbeddingWriter
from data.embeddings.views import augment_sequence, block_mask, masked_count, random_mask
from data.fault import Fault
from data.keyed import rng
from data.slides.coordinates import row_major

DEFAULTS = {
    "batch_size": 4,
    "batch_tokens": None,
    "lanes": 4,
    "seed": 1,
    "field_cells": 0,
    "validation_fraction": 0.25,
    "crop": 0.875,
    "shift_grid": 100,
    "flip": 0.5,
    "mask": "random",
    "mask_ratio": 0.75,
    "block_cells": 3,
}


def make_store(folder: Path, slides: int, side: int = 10) -> EmbeddingStore:
    """Slides whose embedding of a tile is (slide, column, row)."""
    y, x = (a.ravel() for a in np.mgrid[:side, :side])
    with EmbeddingWriter(folder, 3, "synthetic", "abc") as out:
        for number in range(slides):
            keep = rng("tissue", number).random(len(x)) < 0.8
            values = np.stack([np.full_like(x, number), x, y], axis=1)[keep]
            out.add(f"s{number:02d}", values.astype(np.float32), np.stack([x, y], axis=1)[keep] * 256, 256.0, 0.5)
    return EmbeddingStore.open(folder)


def sequences(store: EmbeddingStore, **changes) -> SlideSequences:
    return SlideSequences(store, Statistics.of(store), **DEFAULTS | changes)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> EmbeddingStore:
    return make_store(tmp_path_factory.mktemp("store"), 12)


def same(one: SlideBatch, other: SlideBatch) -> bool:
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(vars(one).values(), vars(other).values(), strict=True)
    )


def joined(parts: list[SlideBatch]) -> tuple:
    """What the ranks hold together, and which of it is masked."""
    masked = [torch.zeros(len(p.cells), dtype=torch.bool).index_fill(0, p.masked, True) for p in parts]
    return (
        torch.cat([p.embeddings for p in parts]),
        torch.cat([p.cells for p in parts]),
        torch.cat(masked),
        [position for p in parts for position in p.positions],
    )


def test_a_global_batch_is_the_same_at_any_world_size_and_after_a_restart(store):
    whole = sequences(store)
    for step in (0, 1, 7):
        expected = joined([whole.batch(step)])
        for world in (2, 4):
            parts = [sequences(store).batch(step, rank, world) for rank in range(world)]
            for one, other in zip(joined(parts), expected, strict=True):
                assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    stream = whole.batches(0)
    in_a_row = [next(stream) for _ in range(5)]
    assert same(next(sequences(store).batches(4)), in_a_row[4])


def test_every_pass_holds_every_training_sequence_once_in_an_order_of_its_own(store):
    found = sequences(store)
    n = len(found.training)
    passes = [[found.sequence_at(p * n + k).slide for k in range(n)] for p in range(3)]
    assert all(sorted(order) == sorted(s.slide for s in found.training) for order in passes)
    assert passes[0] != passes[1] != passes[2]
    assert [sequences(store, seed=2).sequence_at(k).slide for k in range(n)] != passes[0]


def test_the_same_slide_is_augmented_and_masked_differently_each_time(store):
    found = sequences(store)
    n = len(found.training)
    first = [k for k in range(3 * n) if found.sequence_at(k).slide == found.training[0].slide]
    views = [found._item(found.sequence_at(k), k, "train") for k in first]
    assert len(views) == 3 and len({view.cells.tobytes() for view in views}) == 3


def test_a_batch_packs_embeddings_with_their_cells_and_splits_them_into_visible_and_masked(store):
    batch = sequences(store, crop=1.0, shift_grid=0, flip=0.0).batch(0)
    assert sum(batch.lengths) == len(batch.embeddings) == len(batch.cells)
    assert batch.embeddings.dtype == torch.float16 and batch.cells.dtype == torch.int64
    indices = torch.cat([batch.visible, batch.masked])
    assert indices.sort().values.equal(torch.arange(len(batch.cells)))
    assert batch.visible.diff().gt(0).all() and batch.masked.diff().gt(0).all()
    # the embedding of a tile is (slide, column, row), and unaugmented cells are moved to the grid's corner at most
    for values, cells, visible, masked, name in zip(
        batch.embeddings.split(batch.lengths),
        batch.cells.split(batch.lengths),
        batch.visible_lengths,
        batch.masked_lengths,
        batch.slides,
        strict=True,
    ):
        assert values[:, 0].eq(int(name[1:])).all()
        assert (values[:, 1:] - cells).unique(dim=0).shape[0] == 1
        assert masked == round(0.75 * (visible + masked)) and visible + masked == len(cells)
    targets = batch.targets()
    everything = np.concatenate([store.read(slide).embeddings for slide in store.slides]).astype(np.float64)
    expected = (batch.embeddings.numpy() - everything.mean(0)) / everything.std(0)
    np.testing.assert_allclose(targets.numpy(), expected, atol=1e-5)


def test_held_out_slides_are_never_trained_on_and_always_masked_the_same_way(store):
    found = sequences(store)
    assert len(found.validation) == 3
    assert not {s.slide for s in found.training} & {s.slide for s in found.validation}
    first, again = (
        [one.held_out(numbers) for numbers in one.held_out_batches(100)] for one in (sequences(store), sequences(store))
    )
    assert all(same(one, other) for one, other in zip(first, again, strict=True))
    assert [slide for batch in first for slide in batch.slides] == [s.slide for s in found.validation]
    for batch in first:  # not augmented: cells are the slide's own
        assert torch.equal(batch.embeddings[:, 1:].long(), batch.cells)


def test_the_slides_to_judge_by_are_as_long_and_as_short_as_all_of_them():
    sizes = (rng(0, "sizes").permutation(1000) + 8).tolist()
    chosen = spread_by_size(sizes, 50, seed=3)
    found = sorted(sizes[k] for k in chosen)
    assert chosen == sorted(set(chosen)) and chosen != spread_by_size(sizes, 50, seed=4)
    assert [(size - 8) // 20 for size in found] == list(range(50))  # one of each fiftieth
    assert spread_by_size(sizes, 1000, seed=3) == list(range(1000))


def test_no_more_slides_than_asked_for_are_judged_in_batches_of_a_lanes_size(store):
    found = sequences(store, validation_fraction=0.6)
    batches = found.held_out_batches(5)
    assert len(found.validation) > 5 and sum(map(len, batches)) == 5
    assert max(map(len, batches)) <= found.packing.most


def test_a_single_slide_is_split_into_regions_without_a_common_tile(tmp_path):
    single = make_store(tmp_path, 1, side=16)
    for seed in range(8):
        found = sequences(single, field_cells=6, seed=seed)
        trained = np.unique(np.concatenate([s.rows for s in found.training]))
        held_out = np.unique(np.concatenate([s.rows for s in found.validation]))
        assert len(np.intersect1d(trained, held_out)) == 0
        assert len(trained) + len(held_out) == single.rows("s00")
        assert 0.2 < len(held_out) / single.rows("s00") < 0.4
        assert len(found.training) > 4


def test_fields_are_squares_that_overlap_and_cover_the_slide():
    y, x = (a.ravel() for a in np.mgrid[3:20, 5:28])
    cells = np.stack([x, y], axis=1)
    fields = cut_fields(Sequence("s", np.arange(len(cells))), cells, 8)
    assert all(len(field.rows) == 64 and np.ptp(cells[field.rows], axis=0).tolist() == [7, 7] for field in fields)
    assert np.unique(np.concatenate([field.rows for field in fields])).tolist() == list(range(len(cells)))
    assert all((np.diff(field.rows) > 0).all() for field in fields)
    small = cut_fields(Sequence("s", np.arange(len(cells))), cells, 100)
    assert len(small) == 1 and len(small[0].rows) == len(cells)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(4, 60), crop=st.floats(0.3, 1), shift=st.sampled_from([0, 5, 1000]))
def test_augmentation_moves_tiles_as_one_piece_and_sorts_them_again(seed, n, crop, shift):
    random = np.random.default_rng(seed)
    places = random.permutation(144)[:n]
    cells = np.stack([places % 12, places // 12], axis=1) + 40
    cells = cells[row_major(cells[:, 0], cells[:, 1])]
    rows, moved = augment_sequence(np.arange(n), cells, random, crop, shift, 0.5)
    assert 4 <= len(rows) == len(moved) <= n and len(np.unique(rows)) == len(rows)
    assert row_major(moved[:, 0], moved[:, 1]).tolist() == list(range(len(moved)))
    assert moved.min() >= 0
    extent = np.ptp(moved, axis=0) + 1
    assert (moved.max(axis=0) < np.maximum(shift, extent)).all()
    original = cells[rows]
    assert len(np.unique(moved[:, 1] - original[:, 1])) == 1
    assert 1 in (len(np.unique(moved[:, 0] - original[:, 0])), len(np.unique(moved[:, 0] + original[:, 0])))


def test_augmentation_flips_crops_and_shifts_as_often_and_as_far_as_asked():
    y, x = (a.ravel() for a in np.mgrid[:8, :8])
    cells = np.stack([x, y], axis=1)
    drawn = [augment_sequence(np.arange(64), cells, rng(k), 0.875, 20, 0.5) for k in range(400)]
    assert all(len(rows) == 49 for rows, _ in drawn)  # 7 × 7 of 8 × 8
    flipped = sum(rows[0] % 8 > rows[1] % 8 for rows, _ in drawn)
    assert 150 < flipped < 250
    corners = np.array([moved.min(axis=0) for _, moved in drawn])
    assert corners.min() == 0 and corners.max() == 13


@settings(max_examples=100, deadline=None)
@given(n=st.integers(2, 80), ratio=st.floats(0.05, 0.95), seed=st.integers(0, 1000))
def test_masks_hide_the_asked_share_and_leave_something_on_both_sides(n, ratio, seed):
    cells = np.stack([np.arange(n) % 9, np.arange(n) // 9], axis=1)
    for mask in (random_mask(n, ratio, rng(seed)), block_mask(cells, ratio, 3, rng(seed))):
        assert mask.sum() == masked_count(n, ratio) == min(max(round(ratio * n), 1), n - 1)


def test_block_masks_hide_whole_blocks_and_leave_fewer_visible_neighbours():
    y, x = (a.ravel() for a in np.mgrid[:24, :24])
    cells = np.stack([x, y], axis=1)

    def share_with_a_visible_neighbour(mask: np.ndarray) -> float:
        grid = mask.reshape(24, 24)
        seen = np.pad(~grid, 1)
        beside = seen[:-2, 1:-1] | seen[2:, 1:-1] | seen[1:-1, :-2] | seen[1:-1, 2:]
        return (beside & grid).sum() / grid.sum()

    block = np.mean([share_with_a_visible_neighbour(block_mask(cells, 0.75, 4, rng(k))) for k in range(20)])
    single = np.mean([share_with_a_visible_neighbour(random_mask(576, 0.75, rng(k))) for k in range(20)])
    assert block < 0.35 < 0.6 < single


def test_settings_that_make_no_sense_are_faults(store, tmp_path):
    for changes, named in (
        ({"mask": "rows"}, "mask=rows"),
        ({"mask_ratio": 1.0}, "mask_ratio=1.0"),
        ({"mask": "block", "block_cells": 0}, "block_cells=0"),
    ):
        with pytest.raises(Fault, match=named):
            sequences(store, **changes)
    with pytest.raises(Fault, match="lanes=4"):
        sequences(store).batch(0, 0, 3)
    with pytest.raises(Fault, match="too small"):
        sequences(make_store(tmp_path / "small", 1, side=3), validation_fraction=0.5)
    EmbeddingWriter(tmp_path / "empty", 3, "synthetic", "abc").close()
    with pytest.raises(Fault, match="no tiles"):
        Statistics.of(EmbeddingStore.open(tmp_path / "empty"))


def test_every_tensor_of_a_batch_is_pinned_for_a_copy_that_does_not_wait(monkeypatch) -> None:
    numbers = torch.arange(3)
    batch = SlideBatch(numbers, numbers, [3], numbers, [2], numbers, [1], numbers, numbers, [0], ["a"], 3)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 100)
    pinned = batch.pin_memory()
    for field in dataclasses.fields(SlideBatch):
        before, after = getattr(batch, field.name), getattr(pinned, field.name)
        assert torch.equal(after, before + 100) if isinstance(before, torch.Tensor) else after == before
