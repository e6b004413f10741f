"""``pretrain probe stage=slide``: arrangement is told by smoothed tiles, and by no mean."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from data.embeddings.store import EmbeddingStore
from launch.entry import run_command_line
from pretrain.embedding.random_weights import with_random_weights
from pretrain.encoders.slide_encoders import load_slide_encoder
from pretrain.slide_probing import judge
from pretrain.slide_probing.attention_mil import GatedAttention
from pretrain.slide_probing.vectors import smoothed
from tests.pretrain.slide_probing.labelled_slides import write_labelled_slides
from tests.pretrain.training.test_slide_training import SMALL

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store, its labels, and a slide run on it."""
    folder = tmp_path_factory.mktemp("of_use")
    labels = write_labelled_slides(folder / "store", 40)
    lines = [f"{slide},{'nests' if label else 'mixed'}" for slide, label in labels]
    (folder / "labels.csv").write_text("slide,label\n" + "\n".join(lines))
    words = ["optim.steps=2", "optim.warmup_steps=1", "trainer.accelerator=cpu", "data.validation_fraction=0", *SMALL]
    run_command_line(["slide", f"run={folder / 'run'}", f"data.embeddings={folder / 'store'}", *words])
    return folder


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "RESAMPLES", 50)


def test_every_row_is_judged_with_its_interval_and_written_as_json_and_page(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"store={place / 'store'}", f"labels={place / 'labels.csv'}", f"checkpoint={place / 'run'}"]
    run_command_line(["probe", "stage=slide", *words, f"out={place / 'probe.json'}", "repeats=1", "device=cpu"])
    printed = capsys.readouterr().out
    found = json.loads((place / "probe.json").read_text())
    rows = found["rows"]
    poolings = ("mean", "mean + std", "per-cluster means", "moments by cluster", "all layers", "class token")
    encoders = {f"{who}, {pooling}" for who in ("slide encoder", "random weights") for pooling in poolings}
    alone = {"mean of tiles", "mean + std", "mean + std + smoothed std", "attention over tiles, trained"}
    assert set(rows) == encoders | alone and all(name in printed for name in rows)
    assert rows["mean + std + smoothed std"]["auroc"]["value"] > 0.95 > 0.75 > rows["mean of tiles"]["auroc"]["value"]
    for row in rows.values():
        low, high = row["auroc"]["interval"]
        assert low <= row["auroc"]["value"] <= high or np.isclose(low, high)
    assert found["labels"]["classes"] == ["mixed", "nests"] and found["rounds"] == 5
    judged = np.concatenate(found["judged"])
    shares = np.concatenate(rows["mean + std"]["predictions"])
    expected = roc_auc_score(np.array(found["truth"])[judged], shares[:, 1])
    assert rows["mean + std"]["auroc"]["value"] == pytest.approx(expected, abs=1e-6)
    page = (place / "probe.html").read_text()
    assert "ROC curves" in page and page.count("data:image/jpeg") == 3


def test_without_a_slide_encoder_the_rows_are_those_that_need_none(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"store={place / 'store'}", f"labels={place / 'labels.csv'}", "attention=false", "repeats=1"]
    run_command_line(["probe", "slide", *words])
    assert "slide encoder" not in capsys.readouterr().out


def test_a_smoothed_tile_is_the_weighted_mean_of_the_tiles_around_it() -> None:
    draw = torch.Generator().manual_seed(0)
    cells = np.array([[0, 0], [1, 0], [3, 0], [1, 2], [2, 2]]) + 7
    tiles = torch.randn(5, 70, generator=draw).numpy()
    weights = np.exp(-np.square(cells[:, None] - cells).sum(-1) / 2)  # within the filter's reach of four cells
    expected = weights @ tiles / weights.sum(1, keepdims=True)
    np.testing.assert_allclose(smoothed(tiles, cells, 1.0), expected, rtol=1e-4, atol=1e-5)


def test_random_weights_have_residual_branches_at_full_strength(place: Path) -> None:
    encoder = load_slide_encoder(str(place / "run"), "cpu")
    slide = EmbeddingStore.open(place / "store").read("slide00")
    tiles, cells = torch.from_numpy(slide.embeddings.astype(np.float32)), torch.from_numpy(slide.cells)
    one, same, other = (
        with_random_weights(encoder, seed)(tiles, cells, [len(tiles)], all_layers=True).pooled_layers
        for seed in (0, 0, 1)
    )
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert (one[-1] - one[0]).norm() > 0.5 * one[0].norm()


def test_attention_pools_each_bag_by_itself() -> None:
    torch.manual_seed(0)
    model, tiles = GatedAttention(6, 3), torch.randn(9, 6)
    together = model(tiles, [4, 5])
    torch.testing.assert_close(together, torch.cat([model(tiles[:4], [4]), model(tiles[4:], [5])]))
