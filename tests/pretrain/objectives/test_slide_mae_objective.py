"""The slide stage's objective: exact sums, honest baselines, and a training run that learns what neighbours can't
explain."""

import inspect
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch.utils._python_dispatch import TorchDispatchMode

from data.embeddings.sequences import SlideBatch, SlideSequences
from data.embeddings.standardisation import Statistics
from data.embeddings.store import EmbeddingStore, EmbeddingWriter
from data.keyed import rng
from models.initialise import initialise
from models.longnet import LongNet
from pretrain.objectives import slide_mae
from pretrain.objectives.interface import Moment
from pretrain.objectives.slide_mae import BASELINE_NEIGHBOURS, SlideMAE, baseline_errors

WIDTH = 16


def waves(folder: Path, slides: int, side: int = 12) -> EmbeddingStore:
    """Slides that carry one pattern of short waves over the grid, each with a sign and an offset of its own, and noise.

    The waves are 6.3 cells long: the nearest visible tiles, about a cell away, explain part of them. The sign and the
    offset can only be read off the visible tiles together with their places. Noise is 0.09 of about 1.3.
    """
    y, x = (a.ravel() for a in np.mgrid[:side, :side])
    pattern = np.stack([np.cos(x), np.sin(x), np.cos(y), np.sin(y)], axis=1) @ rng("waves").normal(size=(4, WIDTH))
    with EmbeddingWriter(folder, WIDTH, "synthetic", "abc") as out:
        for number in range(slides):
            random = rng("slide", number)
            sign, offset = random.choice([-1, 1]), random.normal(size=WIDTH) / 2
            values = offset + sign * pattern + 0.3 * random.normal(size=pattern.shape)
            out.add(f"s{number:02d}", values.astype(np.float32), np.stack([x, y], axis=1) * 256, 256.0, 0.5)
    return EmbeddingStore.open(folder)


@pytest.fixture(scope="module")
def sequences(tmp_path_factory) -> SlideSequences:
    return whole_slides(waves(tmp_path_factory.mktemp("store"), 64))


def whole_slides(store: EmbeddingStore, **further) -> SlideSequences:
    """Sequences of whole slides as they lie there, three quarters of their tiles masked."""
    return SlideSequences(
        store,
        Statistics.of(store),
        batch_size=8,
        batch_tokens=None,
        lanes=4,
        seed=0,
        field_cells=0,
        validation_fraction=0.25,
        crop=1.0,
        shift_grid=0,
        flip=0.0,
        mask="random",
        mask_ratio=0.75,
        block_cells=3,
        **further,
    )


def objective(weighting: str = "slide", dropout: float = 0.0, width: int = 32, **settings) -> SlideMAE:
    def encoder() -> LongNet:
        return LongNet(
            input_width=WIDTH,
            width=width,
            depth=2,
            heads=4,
            feed_forward_width=2 * width,
            segment_lengths=[64, 256],
            dilated_ratios=[1, 2],
            dropout=dropout,
            drop_path=0.0,
            compatible=False,
        )

    built = SlideMAE(
        encoder,
        decoder_width=width,
        decoder_depth=2,
        decoder_heads=4,
        decoder_feed_forward_width=2 * width,
        weighting=weighting,
        **settings,
    )
    initialise(built, seed=0)
    return built


def evaluated(model: SlideMAE, sequences: SlideSequences) -> dict[str, float]:
    """The figures of all held-out sequences."""
    with torch.no_grad():
        rows = [model.judged(sequences.held_out(numbers)) for numbers in sequences.held_out_batches(1000)]
    return model.evaluate({name: torch.cat([part[name] for part in rows]).double() for name in rows[0]})


@pytest.mark.slow  # the small recipe's run in test_slide_training.py learns it too
def test_it_learns_what_the_nearest_visible_neighbours_cannot_explain(sequences):
    model, steps = objective(), 260
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    before, losses = evaluated(model, sequences), []
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 3e-3 * min(1, step / 20) * (1 - step / steps)
        moment = Moment(step, steps, seed=0)
        loss, _ = model.loss(model.prepare([sequences.batch(step)], moment)[0], moment)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    after = evaluated(model, sequences)
    assert np.mean(losses[-10:]) < 0.4 * np.mean(losses[:10])
    assert after["r2_slide_mean"] < after["r2_neighbours"] < 0.4
    assert after["r2"] > after["r2_neighbours"] + 0.2
    assert after["shuffled_rise"] > 1 > abs(before["shuffled_rise"])  # places carry the sign
    assert after["effective_rank"] > 2


def parts_of(batch: SlideBatch, sequences: SlideSequences) -> list[SlideBatch]:
    return [sequences.batch(0, rank, 4) for rank in range(4)]


@pytest.mark.parametrize("weighting", ["slide", "token"])
def test_sums_and_counts_of_the_ranks_make_the_loss_of_the_global_batch_with_dropout_on(sequences, weighting):
    model, batch = objective(weighting, dropout=0.2), sequences.batch(0)
    whole = model(batch, 7)
    parts = parts_of(batch, sequences)
    results = [model(part, 7) for part in parts]
    apart = sum(part["sum"] for part in results) / sum(part["count"] for part in results)
    torch.testing.assert_close(apart, whole["sum"] / whole["count"], atol=1e-6, rtol=0)
    moment = Moment(0, 1, seed=7)
    losses = [model.loss(part, moment)[0] for part in model.prepare(parts, moment)]
    torch.testing.assert_close(torch.stack(losses).mean(), apart, atol=1e-6, rtol=0)


def test_weighting_counts_slides_or_masked_tiles():
    """Two slides with 3 and 1 masked tiles; the prediction is what the model says, the error recomputed by hand."""
    random = torch.Generator().manual_seed(0)
    batch = SlideBatch(
        embeddings=torch.randn(8, WIDTH, generator=random),
        cells=torch.tensor([[i % 4, i // 4] for i in range(8)]),
        lengths=[4, 4],
        visible=torch.tensor([0, 4, 5, 6]),
        visible_lengths=[1, 3],
        masked=torch.tensor([1, 2, 3, 7]),
        masked_lengths=[3, 1],
        mean=torch.full((WIDTH,), 0.5),
        std=torch.full((WIDTH,), 2.0),
        positions=[0, 1],
        slides=["a", "b"],
        extent=4,
    )
    for weighting in ("slide", "token"):
        result = objective(weighting)(batch, None)
        wanted = (batch.embeddings[batch.masked] - 0.5) / 2
        error = ((result["prediction"] - wanted) ** 2).mean(dim=1)
        expected = (error[:3].mean() + error[3]) / 2 if weighting == "slide" else error.mean()
        torch.testing.assert_close(result["sum"] / result["count"], expected)


def test_targets_carry_no_gradient_and_masked_embeddings_never_reach_the_model(sequences):
    model, batch = objective(), sequences.batch(0)
    result = model(batch, None)
    assert not batch.targets().requires_grad
    blind = SlideBatch(**vars(batch) | {"embeddings": batch.embeddings.index_fill(0, batch.masked, torch.nan)})
    assert torch.equal(model(blind, None)["prediction"], result["prediction"])
    result["sum"].backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None]
    assert unused == []


def test_baselines_equal_a_search_by_hand(sequences):
    batch = sequences.held_out(sequences.held_out_batches(1000)[0])
    targets = batch.targets()
    found = baseline_errors(batch, targets)
    for i, (visible, masked) in enumerate(
        zip(batch.visible.split(batch.visible_lengths), batch.masked.split(batch.masked_lengths), strict=True)
    ):
        of_mean, of_near = 0.0, np.zeros(len(BASELINE_NEIGHBOURS))
        for tile in masked.tolist():
            distances = (batch.cells[visible] - batch.cells[tile]).square().sum(dim=1)
            nearest = visible[distances.argsort(stable=True)]
            of_mean += (targets[visible].mean(dim=0) - targets[tile]).square().sum().item()
            of_near += [
                (targets[nearest[:k]].mean(0) - targets[tile]).square().sum().item() for k in BASELINE_NEIGHBOURS
            ]
        assert found["slide_mean"][i].item() == pytest.approx(of_mean, rel=1e-5)
        assert found["neighbours"][i].tolist() == pytest.approx(of_near, rel=1e-5)


class Largest(TorchDispatchMode):
    """The most numbers of any tensor that was made."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, operator, kinds, args=(), kwargs=None):
        made = operator(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor) and not operator.is_view:
                self.numbers = max(self.numbers, tensor.numel())
        return made


def test_baselines_are_the_same_in_blocks_and_never_hold_more(sequences, monkeypatch):
    batch = sequences.held_out(sequences.held_out_batches(1000)[0])
    targets, block = batch.targets(), 4096
    whole = baseline_errors(batch, targets)
    monkeypatch.setattr(slide_mae, "BLOCK", block)
    with Largest() as largest:
        found = baseline_errors(batch, targets)
    torch.testing.assert_close(found, whole)
    assert block / 2 < largest.numbers <= block


def test_neighbours_are_looked_for_once_a_sequence_and_anew_where_others_are_hidden(sequences, monkeypatch):
    batch = sequences.held_out(sequences.held_out_batches(1000)[0])
    model, asked, search = objective(), [], slide_mae.neighbour_means
    monkeypatch.setattr(slide_mae, "neighbour_means", lambda *given: asked.append(len(given[2])) or search(*given))
    with torch.no_grad():
        first, again = model.judged(batch), model.judged(batch)
    assert sum(asked) == sum(batch.masked_lengths)
    for name in ("slide_mean", "neighbours"):
        assert again[name].equal(first[name]) and again[name].equal(baseline_errors(batch, batch.targets())[name])
    swapped = SlideBatch(
        **vars(batch)
        | {"visible": batch.masked, "visible_lengths": batch.masked_lengths}
        | {"masked": batch.visible, "masked_lengths": batch.visible_lengths}
    )
    with torch.no_grad():
        other = model.judged(swapped)["neighbours"]
    assert other.equal(baseline_errors(swapped, batch.targets())["neighbours"]) and not other.equal(first["neighbours"])


def test_predicting_the_data_set_mean_has_r2_zero_and_a_perfect_model_one(sequences, monkeypatch):
    model = objective()
    for parameter in model.decoder.head.parameters():
        torch.nn.init.zeros_(parameter)
    figures = evaluated(model, sequences)
    assert figures["r2"] == pytest.approx(0, abs=1e-12) and figures["shuffled_rise"] == 0

    def perfect(batch: SlideBatch, step_seed: int | None) -> dict[str, torch.Tensor]:
        return {"prediction": batch.targets()[batch.masked] * 0.5, "pooled": torch.eye(16)[batch.positions]}

    monkeypatch.setattr(model, "forward", perfect)
    figures = evaluated(model, sequences)
    assert figures["r2"] == pytest.approx(0.75) and figures["effective_rank"] == pytest.approx(16, rel=1e-3)


def test_the_recipe_names_every_setting_of_encoder_and_objective_and_builds_the_released_encoder():
    recipe = yaml.safe_load((Path(__file__).parents[3] / "configs" / "recipe" / "gigapath_slide.yaml").read_text())
    model, settings = recipe["model"], recipe["objective"]
    for plugin, target in ((model, LongNet), (settings, SlideMAE)):
        assert plugin.pop("_target_") == f"{target.__module__}.{target.__name__}"
        signature = inspect.signature(target.__init__).parameters.values()
        settings_of = {p.name for p in signature if p.kind is p.KEYWORD_ONLY}
        assert set(plugin) == settings_of - {"attention"}  # the kernel is the machine's affair, not the recipe's
    with torch.device("meta"):
        built = SlideMAE(lambda: LongNet(1536, **model), **settings)
    assert sum(p.numel() for p in built.encoder.parameters()) == 86_330_880
    asked = {p.name for p in inspect.signature(SlideSequences.__init__).parameters.values() if p.kind is p.KEYWORD_ONLY}
    assert set(recipe["data"]) == asked - {"seed", "centres", "further"}


def test_every_value_of_the_recipe_says_where_it_is_from():
    lines = (Path(__file__).parents[3] / "configs" / "recipe" / "gigapath_slide.yaml").read_text().splitlines()
    values = [line for line in lines if line.startswith("  ") and "_target_" not in line]
    assert len(values) > 30
    assert [line for line in values if not re.search(r"# (P: .|S(:|$)|M: .|\?: our choice — .)", line)] == []
