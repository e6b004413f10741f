"""Pair prediction: pairs as they are meant, drawn by key alone, and judged beside baselines that are found by hand."""

from dataclasses import replace

import pytest
import torch

from data.embeddings.sequences import SlideBatch, SlideSequences
from data.embeddings.standardisation import Statistics
from models.initialise import initialise
from models.longnet import LongNet
from models.slide_pairs import PairPredictor
from models.slide_vit import SlideViT
from pretrain.objectives.interface import Moment
from pretrain.objectives.slide_pairs import Pairs, SlidePairs, draw_pairs, slide_means_and_spreads
from tests.pretrain.objectives.test_slide_mae_objective import WIDTH, evaluated, waves

FARTHEST = 3


@pytest.fixture(scope="module")
def sequences(tmp_path_factory: pytest.TempPathFactory) -> SlideSequences:
    store = waves(tmp_path_factory.mktemp("store"), 32)
    return SlideSequences(
        store, Statistics.of(store), batch_size=8, batch_tokens=None, lanes=4, seed=0, field_cells=0,
        validation_fraction=0.25, crop=1.0, shift_grid=0, flip=0.0, mask="block", mask_ratio=0.75, block_cells=3,
    )  # fmt: skip


def encoder(kind: str) -> LongNet | SlideViT:
    sizes = {"width": 32, "depth": 1, "heads": 4, "feed_forward_width": 64, "dropout": 0.0, "drop_path": 0.0}
    if kind == "slide_vit":
        return SlideViT(WIDTH, **sizes, registers=1, slopes="fixed", reach=None)  # type: ignore[arg-type]
    return LongNet(WIDTH, **sizes, segment_lengths=[64], dilated_ratios=[1], compatible=False)  # type: ignore[arg-type]


def objective(kind: str = "longnet", pooled: str = "mean") -> SlidePairs:
    built = SlidePairs(
        lambda: encoder(kind), pairs=40, farthest=FARTHEST, pooled=pooled, predictor_width=32, predictor_depth=1
    )
    initialise(built, seed=0)
    return built


def test_pairs_are_of_a_hidden_and_a_near_visible_tile_of_one_slide(sequences: SlideSequences) -> None:
    batch = sequences.batch(0)
    pairs = draw_pairs(batch, 200, FARTHEST, seed=1)
    own = torch.repeat_interleave(torch.arange(len(batch.lengths)), torch.tensor(batch.lengths))
    assert torch.equal(own[pairs.hidden], pairs.slide) and torch.equal(own[pairs.other], pairs.slide)
    assert set(pairs.hidden.tolist()) <= set(batch.masked.tolist())
    assert set(pairs.other.tolist()) <= set(batch.visible.tolist())
    away = batch.cells[pairs.hidden] - batch.cells[pairs.other]
    assert torch.equal(pairs.displacements, away * pairs.valid[:, None])
    assert away[pairs.valid].abs().max() == FARTHEST and away[~pairs.valid].abs().amax(dim=1).gt(FARTHEST).all()
    visible = [batch.cells[some] for some in batch.visible.split(batch.visible_lengths)]
    for hidden, slide, valid in zip(pairs.hidden, pairs.slide, pairs.valid, strict=True):
        near = (visible[slide] - batch.cells[hidden]).abs().amax(dim=1) <= FARTHEST
        assert bool(near.any()) == bool(valid)


def test_pairs_hang_on_seed_and_position_alone(sequences: SlideSequences) -> None:
    whole, parts = sequences.batch(0), [sequences.batch(0, rank, 4) for rank in range(4)]
    pairs, start = draw_pairs(whole, 16, FARTHEST, 1), 0
    for number, part in enumerate(parts):
        alone = draw_pairs(part, 16, FARTHEST, 1)
        of_part = slice(16 * 2 * number, 16 * 2 * (number + 1))
        assert torch.equal(alone.hidden + start, pairs.hidden[of_part])
        assert torch.equal(alone.other + start, pairs.other[of_part])
        start += len(part.embeddings)
    assert not torch.equal(draw_pairs(whole, 16, FARTHEST, 2).hidden, pairs.hidden)
    assert not torch.equal(draw_pairs(sequences.batch(1), 16, FARTHEST, 1).hidden, pairs.hidden)


def test_losses_of_micro_batches_make_the_mean_over_all_valid_pairs(sequences: SlideSequences) -> None:
    model, moment = objective(), Moment(0, 1, seed=7)
    parts = [sequences.batch(0, rank, 4) for rank in range(4)]
    losses = [model.loss(part, moment)[0] for part in model.prepare(parts, moment)]
    batch = sequences.batch(0)
    pairs = draw_pairs(batch, model.pairs, FARTHEST, 7)
    assert 0 < int(pairs.valid.sum()) < len(pairs.valid)  # of some hidden tiles no visible one is near enough
    prediction, _ = model(batch, pairs, None)
    error = ((prediction - batch.targets()[pairs.hidden])[pairs.valid] ** 2).mean()
    torch.testing.assert_close(torch.stack(losses).mean(), error)


@pytest.mark.parametrize(("kind", "pooled"), [("longnet", "mean"), ("longnet", "mean_std"), ("slide_vit", "mean_std")])
def test_every_parameter_learns_from_visible_tiles_alone(kind: str, pooled: str, sequences: SlideSequences) -> None:
    model, batch = objective(kind, pooled), sequences.batch(0)
    pairs = draw_pairs(batch, 40, FARTHEST, 1)
    prediction, slides = model(batch, pairs, None)
    blind = replace(batch, embeddings=batch.embeddings.index_fill(0, batch.masked, torch.nan))
    assert torch.equal(model(blind, pairs, None)[0], prediction)
    assert slides.shape == (8, 32 if pooled == "mean" else 64)
    prediction.square().sum().backward()
    # The class token isn't read, but what is attended to learns by it.
    unused = {"encoder.mask_token"}
    assert {name for name, parameter in model.named_parameters() if parameter.grad is None} <= unused


def test_a_prediction_hangs_on_the_sign_of_the_displacement_and_on_the_slide() -> None:
    predictor = PairPredictor(tile_width=8, slide_width=8, output_width=4, width=16, depth=1, farthest=2)
    initialise(predictor, seed=0)
    tiles, slides = torch.ones(4, 8), torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    displacements = torch.tensor([[1, 0], [-1, 0], [0, 1], [1, 0]])
    found = predictor(tiles, displacements, slides, torch.tensor([0, 0, 0, 1]))
    assert torch.pdist(found).min() > 1e-2


def test_the_spread_of_one_tile_has_a_gradient() -> None:
    tile = torch.randn(1, 4, requires_grad=True)
    slide_means_and_spreads(tile).sum().backward()
    assert tile.grad is not None and tile.grad.isfinite().all()


def test_figures_are_those_of_a_search_by_hand(sequences: SlideSequences) -> None:
    model = objective()
    figures = evaluated(model, sequences)  # type: ignore[arg-type]
    away = energy = of_mean = 0.0
    hidden, other = [], []
    for numbers in sequences.held_out_batches(1000):
        batch: SlideBatch = sequences.held_out(numbers)
        pairs: Pairs = draw_pairs(batch, model.pairs, FARTHEST, 0)
        targets = batch.targets().double()
        means = torch.stack([targets[some].mean(0) for some in batch.visible.split(batch.visible_lengths)])
        with torch.no_grad():
            prediction = model(batch, pairs, None)[0].double()
        valid = pairs.valid
        away += float((prediction - targets[pairs.hidden])[valid].square().sum())
        of_mean += float((means[pairs.slide] - targets[pairs.hidden])[valid].square().sum())
        energy += float(targets[pairs.hidden][valid].square().sum())
        hidden.append(targets[pairs.hidden][valid].flatten())
        other.append(targets[pairs.other][valid].flatten())
    assert figures["r2"] == pytest.approx(1 - away / energy, rel=1e-6)
    assert figures["r2_slide_mean"] == pytest.approx(1 - of_mean / energy, rel=1e-6)
    t, o = torch.cat(hidden), torch.cat(other)
    best = float(torch.linalg.lstsq(o[:, None], t[:, None]).solution)
    assert figures["r2_other_tile"] == pytest.approx(1 - float((t - best * o).square().sum()) / energy, rel=1e-6)


@pytest.mark.slow
def test_it_learns_what_neither_the_other_tile_nor_the_slides_mean_knows(sequences: SlideSequences) -> None:
    model, steps = objective(), 300
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 3e-3 * min(1, step / 20) * (1 - step / steps)
        moment = Moment(step, steps, seed=0)
        loss, _ = model.loss(model.prepare([sequences.batch(step)], moment)[0], moment)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    figures = evaluated(model, sequences)  # type: ignore[arg-type]
    assert figures["r2"] > max(figures["r2_slide_mean"], figures["r2_other_tile"]) + 0.1
