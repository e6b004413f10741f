"""What MAE's ablations choose from: each target and loss by hand, mask tokens in the encoder, standardised inputs."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data.embeddings.clusters import fit_clusters, load_clusters, save_clusters
from data.embeddings.sequences import SlideBatch, SlideSequences
from data.embeddings.standardisation import Statistics
from data.fault import Fault
from launch.entry import run_command_line
from models.slide_mae import LinearPrediction
from models.slide_vit import SlideViT
from pretrain.embedding.random_weights import with_random_weights
from pretrain.encoders.export.gigapath import export_gigapath
from pretrain.encoders.slide_encoders import load_slide_encoder
from pretrain.objectives.slide_mae import SlideMAE
from pretrain.objectives.slide_targets import SLIDE_LOSSES, SLIDE_TARGETS
from pretrain.settings.composition import load
from tests.pretrain.objectives.test_slide_mae_objective import WIDTH, evaluated, objective, waves, whole_slides
from tests.pretrain.training.test_slide_training import SMALL, metrics, words

PAIRS = [
    (target, loss)
    for target in SLIDE_TARGETS
    for loss in SLIDE_LOSSES
    if (target == "clusters") == (loss == "cross_entropy")
]


@pytest.fixture(scope="module")
def sequences(tmp_path_factory) -> SlideSequences:
    store = waves(tmp_path_factory.mktemp("store"), 12)
    centres = fit_clusters(store, Statistics.of(store), 24, seed=0)
    return whole_slides(store, inputs="standardised", centres=centres)


def of_distance(dropout: float = 0.0) -> SlideViT:
    return SlideViT(
        WIDTH, width=32, depth=2, heads=4, feed_forward_width=64, registers=1, slopes="learned", reach=None,
        dropout=dropout, drop_path=0.0,
    )  # fmt: skip


@pytest.mark.parametrize(("target", "loss"), PAIRS)
def test_a_loss_is_that_of_its_formula(target: str, loss: str, sequences: SlideSequences) -> None:
    batch = sequences.batch(0)
    model = objective("token", target=target, loss=loss, clusters=24)
    found = model(batch, None)
    given = found["prediction"]
    stored = batch.embeddings.float()
    standard = (stored - batch.mean) / batch.std
    centred = standard - standard.mean(dim=1, keepdim=True)
    wanted = {
        "embedding": stored,
        "standardised": standard,
        "layer_norm": centred / (centred.square().mean(dim=1, keepdim=True) + 1e-5).sqrt(),
        "clusters": torch.cdist(standard.double(), torch.from_numpy(sequences.centres).double()).argmin(dim=1),
    }[target][batch.masked]
    away = None if target == "clusters" else (given - wanted).abs()
    if loss == "mean_squared":
        expected = (away**2).mean()
    elif loss == "smooth_l1":
        expected = torch.where(away < 1, away**2 / 2, away - 0.5).mean()
    elif loss == "cosine":
        expected = 1 - ((given * wanted).sum(1) / given.norm(dim=1) / wanted.norm(dim=1)).mean()
    else:
        expected = -given.log_softmax(dim=1)[torch.arange(len(wanted)), wanted].mean()
    torch.testing.assert_close(found["sum"] / found["count"], expected)


@pytest.mark.parametrize(("target", "loss"), PAIRS)
def test_r2_of_every_target_is_of_the_same_embeddings_and_perfect_where_the_prediction_is(
    target: str, loss: str, sequences: SlideSequences, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = objective(target=target, loss=loss, clusters=24)

    def perfect(batch: SlideBatch, step_seed: int | None) -> dict[str, torch.Tensor]:
        wanted = model.target.of(batch)[batch.masked]
        prediction = 1e4 * F.one_hot(wanted, 24).float() if target == "clusters" else wanted
        return {"prediction": prediction, "pooled": torch.eye(16)[batch.positions]}

    monkeypatch.setattr(model, "forward", perfect)
    figures = evaluated(model, sequences)
    # A direction and a cluster leave something open: how long a tile's vector is, and where in its cluster it lies.
    least = {"cosine": 0.9, "cross_entropy": 0.5}.get(loss, 1 - 1e-6)
    assert least < figures["r2"] <= 1
    assert abs(figures["loss"]) < 1e-6
    if target != "layer_norm":
        plain = evaluated(objective(), sequences)
        assert figures["r2_neighbours"] == plain["r2_neighbours"]


@pytest.mark.parametrize("kind", ["longnet", "slide_vit"])
def test_an_encoder_of_mask_tokens_sees_all_places_and_no_hidden_embedding(
    kind: str, sequences: SlideSequences
) -> None:
    torch.manual_seed(0)
    model = objective(mask_tokens="encoder")
    if kind == "slide_vit":
        settings = {f"decoder_{name}": 8 for name in ("width", "depth", "heads", "feed_forward_width")}
        model = SlideMAE(of_distance, weighting="slide", mask_tokens="encoder", **settings)
    assert isinstance(model.decoder, LinearPrediction)
    batch = sequences.batch(0)
    found = model(batch, None)
    blind = replace(batch, embeddings=batch.embeddings.index_fill(0, batch.masked, torch.nan))
    again = model(blind, None)
    assert torch.equal(again["prediction"], found["prediction"])
    assert found["prediction"].std(dim=0).min() > 0  # places tell masked tiles apart
    again["prediction"].square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert model.encoder.mask_token.grad.abs().sum() > 0


def test_clusters_are_drawn_by_the_seed_alone_kept_exactly_and_never_more_than_tiles(
    sequences: SlideSequences, tmp_path: Path
) -> None:
    store, statistics = sequences.store, sequences.statistics
    first, other = (fit_clusters(store, statistics, 8, seed) for seed in (1, 2))
    assert np.array_equal(first, fit_clusters(store, statistics, 8, 1)) and not np.array_equal(first, other)
    save_clusters(tmp_path / "clusters.txt", first)
    assert np.array_equal(load_clusters(tmp_path / "clusters.txt"), first)
    with pytest.raises(Fault, match=r"tiles to find objective\.clusters=5000 among"):
        fit_clusters(store, statistics, 5000, 1)
    (tmp_path / "clusters.txt").write_text("1 2\n3\n")
    with pytest.raises(Fault, match="damaged"):
        load_clusters(tmp_path / "clusters.txt")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["objective.target=clusters"], "clusters are learned by cross_entropy"),
        (["objective.loss=cross_entropy"], "clusters are learned by cross_entropy"),
        (["objective.mask_tokens=encoder"], "there is no decoder that could start so"),  # the small recipe's is nearby
        (["data.inputs=scaled"], "must be raw or standardised"),
    ],
)
def test_settings_that_make_no_sense_together_are_refused_in_one_sentence(settings: list[str], said: str) -> None:
    with pytest.raises(Fault, match=said):
        load("slide", ["run=r", "data.embeddings=e", *settings])


@pytest.mark.usefixtures("one_thread")
def test_a_run_remembers_that_its_inputs_were_standardised_wherever_it_is_used(tmp_path: Path) -> None:
    store = waves(tmp_path / "store", 6, side=8)
    ablation = [
        "data.inputs=standardised",
        "objective.mask_tokens=encoder",
        "objective.decoder_start=token",
        "objective.target=clusters",
        "objective.loss=cross_entropy",
        "objective.clusters=8",
        "optim.steps=2",
        "optim.warmup_steps=1",
    ]
    run_command_line(words(tmp_path / "run", tmp_path / "store", *SMALL, *ablation))
    assert np.isfinite(metrics(tmp_path / "run")[-1]["r2"])

    encoder = load_slide_encoder(str(tmp_path / "run"), "cpu")
    statistics, slide = Statistics.load(tmp_path / "run" / "statistics.json"), store.read("s00")
    tiles, cells = torch.from_numpy(slide.embeddings.astype(np.float32)), torch.from_numpy(slide.cells)
    found = encoder.network(tiles, cells, [len(tiles)])
    state = encoder.network.state_dict()
    bare = load_slide_encoder(str(tmp_path / "run"), "cpu").network
    bare._forward_pre_hooks.clear()
    standard = (tiles - torch.from_numpy(statistics.mean).float()) / torch.from_numpy(statistics.std).float()
    torch.testing.assert_close(found.tiles, bare(standard, cells, [len(tiles)]).tiles)
    random = with_random_weights(encoder, 0)
    values = random(tiles, cells, [len(tiles)]).tiles
    random._forward_pre_hooks.clear()
    torch.testing.assert_close(values, random(standard, cells, [len(tiles)]).tiles)

    export_gigapath(tmp_path / "run", tmp_path / "released", "mit")
    released = torch.load(tmp_path / "released" / "slide_encoder.pth", weights_only=True)["model"]
    assert "mask_token" in state and "mask_token" not in released
    bare.load_state_dict(released | {"mask_token": state["mask_token"]})
    torch.testing.assert_close(bare(tiles, cells, [len(tiles)]).tiles, found.tiles, atol=1e-5, rtol=1e-5)

    (tmp_path / "run" / "statistics.json").unlink()
    with pytest.raises(Fault, match=r"statistics.json, which says by what, is missing"):
        load_slide_encoder(str(tmp_path / "run"), "cpu")
