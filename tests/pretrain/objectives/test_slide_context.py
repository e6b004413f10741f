"""Masked modelling over several stores: one store is MAE, another's embeddings come in by their own projection, and stores
that don't agree are refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data.embeddings.aligned_stores import require_same_slides, require_same_tiles
from data.embeddings.sequences import SlideSequences
from data.embeddings.slide_features import read_slide_features
from data.embeddings.standardisation import Statistics
from data.embeddings.store import EmbeddingStore
from data.fault import Fault
from launch.entry import run_command_line
from models.initialise import initialise
from models.longnet import LongNet
from models.slide_vit import SlideViT
from pretrain.encoders.slide_encoders import load_slide_encoder
from pretrain.objectives.interface import Moment
from pretrain.objectives.slide_context import SlideContext
from pretrain.objectives.slide_mae import SlideMAE
from pretrain.settings.composition import load
from tests.pretrain.objectives.test_slide_mae_objective import WIDTH, waves
from tests.pretrain.training.test_slide_training import SMALL, seen_otherwise, words

OTHER = 24  # the width of the second tile encoder
DECODER = {"decoder_width": 32, "decoder_depth": 1, "decoder_heads": 4, "decoder_feed_forward_width": 64}


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> list[EmbeddingStore]:
    folder = tmp_path_factory.mktemp("stores")
    first = waves(folder / "first", 16, side=8)
    return [first, seen_otherwise(first, folder / "other")]


def sequences(stores: list[EmbeddingStore], **settings: str) -> SlideSequences:
    first, *further = ((store, Statistics.of(store)) for store in stores)
    return SlideSequences(
        *first, batch_size=8, batch_tokens=None, lanes=4, seed=0, field_cells=0, validation_fraction=0.25, crop=0.8,
        shift_grid=10, flip=0.5, mask="random", mask_ratio=0.75, block_cells=3, further=further, **settings,
    )  # fmt: skip


def encoder(kind: str, further: list[int]) -> LongNet | SlideViT:
    sizes = {"width": 32, "depth": 1, "heads": 4, "feed_forward_width": 64, "dropout": 0.0, "drop_path": 0.0}
    network: LongNet | SlideViT
    if kind == "slide_vit":
        network = SlideViT(WIDTH, **sizes, registers=1, slopes="fixed", reach=None)  # type: ignore[arg-type]
    else:
        network = LongNet(WIDTH, **sizes, segment_lengths=[64], dilated_ratios=[1], compatible=False)  # type: ignore[arg-type]
    for width in further:
        network.add_input(width)
    return network


def context(kind: str, further: list[int]) -> SlideContext:
    built = SlideContext(lambda: encoder(kind, further), **DECODER, weighting="slide", decoder_start="token")
    initialise(built, seed=0)
    return built


def test_one_store_is_the_plain_case(stores: list[EmbeddingStore]) -> None:
    given = sequences(stores[:1])
    ours, mae = context("longnet", []), SlideMAE(lambda: encoder("longnet", []), **DECODER, weighting="slide")
    initialise(mae, seed=0)
    moment = Moment(3, 10, seed=7)
    losses = []
    for model in (ours, mae):
        (part,) = model.prepare([given.batch(0)], moment)
        losses.append(model.loss(part, moment)[0])
    assert losses[0].item() == losses[1].item()
    with torch.no_grad():
        rows = [model.judged(given.held_out([0, 1])) for model in (ours, mae)]
    for name in rows[0]:
        torch.testing.assert_close(rows[0][name], rows[1][name])


@pytest.mark.parametrize("kind", ["longnet", "slide_vit"])
def test_all_encoders_are_reconstructed_from_the_one_that_the_step_draws(
    kind: str, stores: list[EmbeddingStore]
) -> None:
    model, batch = context(kind, [OTHER]), sequences(stores).batch(0)
    drawn = []
    for step in range(12):
        moment = Moment(step, 12, seed=1)
        model.zero_grad()
        (part,) = model.prepare([batch], moment)
        loss, _ = model.loss(part, moment)
        loss.backward()
        inputs = [linear.weight.grad is not None for linear in model.encoder.patch_embed.values()]
        assert sum(inputs) == 1 and model.encoder.chosen_input == inputs.index(True)
        heads = model.decoder.head.weight.grad.split([WIDTH, OTHER])
        assert all(rows.abs().sum(dim=1).gt(0).all() for rows in heads)
        drawn.append(inputs.index(True))
    assert set(drawn) == {0, 1}
    model.encoder.choose_input(drawn[-1])
    found = model(batch, None)
    wanted = [batch.targets(store)[batch.masked] for store in (0, 1)]
    errors = [
        (a - b).square().mean(1) for a, b in zip(found["prediction"].split([WIDTH, OTHER], 1), wanted, strict=True)
    ]
    slides = (sum(errors) / 2).split(batch.masked_lengths)
    torch.testing.assert_close(found["sum"] / found["count"], torch.stack([some.mean() for some in slides]).mean())


def test_hidden_embeddings_of_no_store_reach_the_model(stores: list[EmbeddingStore]) -> None:
    model, batch = context("longnet", [OTHER]), sequences(stores, inputs="standardised").batch(0)
    hidden = [
        store._replace(embeddings=store.embeddings.index_fill(0, batch.masked, torch.nan)) for store in batch.further
    ]
    blind = replace(batch, embeddings=batch.embeddings.index_fill(0, batch.masked, torch.nan), further=hidden)
    for number in (0, 1):
        model.encoder.choose_input(number)
        assert torch.equal(model(blind, None)["prediction"], model(batch, None)["prediction"])
    moved = batch.to("meta")
    assert moved.further[0].embeddings.is_meta and moved.embeddings.is_meta


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("slide", "at first of slide s01 (only {first} has it)"),
        ("tile", "at first of slide s01 (64 tiles against 63)"),
        ("place", "at first of slide s01 (a tile at (1792, 1792) against a tile at (2048, 2048))"),
    ],
)
def test_stores_of_other_tiles_are_refused_by_the_first_slide_that_differs(
    change: str, said: str, stores: list[EmbeddingStore], tmp_path: Path
) -> None:
    other = seen_otherwise(stores[0], tmp_path / "other", change)
    with pytest.raises(Fault) as refused:
        require_same_slides(stores[0], other)
        require_same_tiles(stores[0], other)
    assert said.format(first=stores[0].folder) in str(refused.value)


def test_one_tile_encoder_twice_and_an_objective_of_one_store_are_refused(stores: list[EmbeddingStore]) -> None:
    with pytest.raises(Fault, match="hold embeddings of one tile encoder"):
        require_same_slides(stores[0], stores[0])
    require_same_slides(*stores)
    require_same_tiles(*stores)
    with pytest.raises(Fault, match="it reads one store; objective=slide_context reads several"):
        load("slide", ["run=r", "data.embeddings=e", "data.further=[f]"])


@pytest.mark.usefixtures("one_thread")
def test_the_store_decides_by_which_projection_its_embeddings_come_in(
    stores: list[EmbeddingStore], tmp_path: Path
) -> None:
    settings = [*SMALL, "objective=slide_context", "objective.decoder_heads=4", "data.inputs=standardised"]
    settings += ["objective.decoder_feed_forward_width=64", f"data.further=[{stores[1].folder}]"]
    run = words(tmp_path / "run", stores[0].folder, *settings, "optim.steps=2", "optim.warmup_steps=1")
    run_command_line(run)
    encoder = load_slide_encoder(str(tmp_path / "run"), "cpu")
    vectors = []
    for number, store in enumerate(stores):
        out = tmp_path / f"out{number}"
        given = [f"checkpoint={tmp_path / 'run'}", f"embeddings={store.folder}", f"out={out}", "device=cpu"]
        run_command_line(["embed", "stage=slide", *given])
        found = read_slide_features(out)[1]["pooled"]
        slide = store.read("s00")
        tiles = torch.from_numpy((slide.embeddings - Statistics.of(store).mean) / Statistics.of(store).std).float()
        encoder.require_fits(store)
        bare = encoder.network
        hooks = dict(bare._forward_pre_hooks)
        bare._forward_pre_hooks.clear()
        projection = bare.patch_embed["proj1" if number else "proj"]
        assert projection.in_features == store.width == bare.input_widths[bare.chosen_input]
        expected = bare(tiles, torch.from_numpy(slide.cells), [len(tiles)]).pooled[0]
        bare._forward_pre_hooks.update(hooks)
        np.testing.assert_allclose(found[0], expected.numpy(), atol=2e-5)
        vectors.append(found)
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-3
    stranger = EmbeddingStore(stores[0].folder, WIDTH, "a third", "xyz", {})
    with pytest.raises(Fault, match=r"another tile encoder \(abc, def\) than"):
        encoder.require_fits(stranger)
    (tmp_path / "run" / "tile_encoder.json").unlink()
    with pytest.raises(Fault, match="embeddings of 2 tile encoders, and tile_encoder"):
        load_slide_encoder(str(tmp_path / "run"), "cpu")
