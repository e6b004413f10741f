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
from pretrain.slide_probing import answer, attention_mil, judge
from pretrain.slide_probing.attention_mil import GatedAttention
from pretrain.slide_probing.vectors import smoothed
from tests.pretrain.slide_probing.labelled_slides import copy_slides, write_labelled_slides
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
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "RESAMPLES", 50)
    monkeypatch.setattr(attention_mil, "ATTENTION_EPOCHS", 3)


def test_every_row_is_judged_with_its_interval_and_written_as_json_and_page(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [f"store={place / 'store'}", f"labels={place / 'labels.csv'}", f"checkpoint={place / 'run'}"]
    words += [f"out={place / 'probe.json'}", "repeats=1", "device=cpu"]
    run_command_line(["probe", "stage=slide", *words])
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
    assert "ROC curves" in page and page.count("<svg") == 3

    def computed_again(*_: object) -> None:
        raise ArithmeticError

    monkeypatch.setattr(answer, "answers", computed_again)
    run_command_line(["probe", "stage=slide", *words])
    again = capsys.readouterr()
    assert again.out == printed and "holds this answer already" in again.err
    with pytest.raises(ArithmeticError):
        run_command_line(["probe", "stage=slide", *words, "seed=1"])
    (place / "probe.html").unlink()
    with pytest.raises(ArithmeticError):
        run_command_line(["probe", "stage=slide", *words])


def test_patients_slides_are_averaged_and_attended_over_and_encoders_fine_tuned_where_asked(place: Path) -> None:
    lines = [f"slide{i:02d},p{i // 4}{i % 2},{'ab'[i % 2]}" for i in range(16)]
    (place / "patients.csv").write_text("slide,patient,label\n" + "\n".join(lines))
    words = [f"store={place / 'store'}", f"labels={place / 'patients.csv'}", f"checkpoint={place / 'run'}"]
    words += [f"out={place / 'patients.json'}", "folds=2", "repeats=1", "fine_tune=2", "device=cpu"]
    run_command_line(["probe", "stage=slide", *words])
    found = json.loads((place / "patients.json").read_text())
    assert found["labels"]["cases"] == 8 and any("the mean of their vectors" in sentence for sentence in found["how"])
    over_slides = ("mean + std", "slide encoder, moments by cluster", "random weights, moments by cluster")
    trained = {f"attention over slides: {row}" for row in over_slides}
    trained |= {f"{row}, fine-tuned" for row in ("slide encoder", "random weights")}
    assert trained <= set(found["rows"])
    assert all(np.isfinite(found["rows"][row]["auroc"]["value"]) for row in trained)


def test_slides_of_several_folders_are_judged_together(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = {"whole": slice(12), "a": slice(0, 12, 2), "b": slice(1, 12, 2)}
    store = EmbeddingStore.open(place / "store")
    whole, *halves = (copy_slides(store, store.slides[some], tmp_path / name) for name, some in parts.items())
    words = [f"labels={place / 'labels.csv'}", "attention=false", "folds=2", "repeats=1"]
    tables = []
    for stores in (f"store={whole}", f"store=[{halves[0]},{halves[1]}]"):
        run_command_line(["probe", "slide", stores, *words])
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1]


def test_of_many_classes_the_page_has_a_curve_of_each_of_the_most_frequent(place: Path, tmp_path: Path) -> None:
    lines = [f"slide{i:02d},type {i % 7} of <seven>" for i in range(21)]
    (tmp_path / "types.csv").write_text("slide,label\n" + "\n".join(lines))
    words = [f"store={place / 'store'}", f"labels={tmp_path / 'types.csv'}", f"out={tmp_path / 'types.json'}"]
    run_command_line(["probe", "slide", *words, "attention=false", "folds=3", "repeats=1"])
    page = (tmp_path / "types.html").read_text()
    assert "Each class against all others, the 6 most frequent ones at most." in page
    assert page.count("<svg") == 6 + 1 and "<seven>" not in page


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["fine_tune=5"], "fine_tune= trains a slide encoder further: say which, checkpoint="),
        (["out=probe.txt"], "must end with .json"),
        (["fine_tune=-1"], "fine_tune=-1 is not allowed"),
        (["store=[]"], "store"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    place: Path, settings: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_command_line(["probe", "slide", f"store={place / 'store'}", f"labels={place / 'labels.csv'}", *settings])
    assert ended.value.code == 2 and sentence in capsys.readouterr().err


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
