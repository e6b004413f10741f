"""The figures of a look, against a second way of computing them; the probe's k-NN; which checkpoint is best."""

import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from data.fault import Fault
from data.keyed import rng
from models.initialise import initialise
from pretrain.encoders.preprocessing import Preprocessing
from pretrain.objectives.figures import (
    assignment_figures,
    features_of,
    rankme,
    spread,
    spread_of_slides,
    watched_encoder,
)
from pretrain.objectives.interface import Moment
from pretrain.probing.images import read_image
from pretrain.probing.scores import knn_predict
from pretrain.run import best, checkpoints
from pretrain.training.fixed_images import FixedImages
from pretrain.training.probe_set import ProbeSet
from tests.pretrain.objectives.tile_objectives import batch, dino, dinov2, encoder, mae, part


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_spread_is_that_of_all_pairs() -> None:
    features = draw(20, 6) + 0.5
    unit = features / features.norm(dim=1, keepdim=True)
    pairs = [float(unit[i] @ unit[j]) for i in range(20) for j in range(20) if i != j]
    found = spread(features)
    assert found["feature_cosine"] == pytest.approx(np.mean(pairs), abs=1e-6)
    assert found["feature_std"] == pytest.approx(np.mean(np.std(unit.numpy(), axis=0)) * math.sqrt(6), abs=1e-6)
    assert found["rankme"] == pytest.approx(rankme(features.numpy()))


def test_spread_at_its_ends() -> None:
    one = spread(torch.ones(10, 4))
    assert one["feature_cosine"] == pytest.approx(1) and one["feature_std"] == pytest.approx(0, abs=1e-9)
    assert one["rankme"] == pytest.approx(1, rel=1e-4)
    every = spread(torch.cat([torch.eye(64), -torch.eye(64)]))
    assert every["feature_std"] == pytest.approx(1) and every["rankme"] == pytest.approx(64, rel=1e-3)


def test_few_samples_tell_no_spread_so_that_one_slide_is_no_collapse() -> None:
    assert spread(draw(3, 6)) == spread_of_slides(draw(1, 6)) == spread_of_slides(draw(3, 2, 6)) == {}
    several = draw(4, 2, 6)
    assert spread_of_slides(several)["effective_rank"] == pytest.approx(rankme(several.flatten(0, 1).numpy()))
    assert spread_of_slides(several)["feature_std"] == spread(several.flatten(0, 1))["feature_std"]


@pytest.mark.parametrize(
    ("targets", "entropy", "perplexity", "use", "information"),
    [
        ([[1.0, 0, 0, 0]] * 3, 0, 1, 1 / 3, 0),  # all tiles get one prototype
        ([[0.25] * 4] * 3, math.log(4), 4, 1 / 3, 0),  # all tiles get any
        ([[1.0, 0, 0, 0], [0, 1.0, 0, 0]], 0, 2, 1, math.log(2)),  # each its own
        ([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]], math.log(2), 4, 1, math.log(2)),
    ],
)
def test_assignments_by_hand(
    targets: list[list[float]], entropy: float, perplexity: float, use: float, information: float
) -> None:
    rows = torch.tensor(targets)
    found = assignment_figures([rows[:1], rows[1:]], "dino")
    expected = {
        "teacher_entropy": entropy,
        "prototype_perplexity": perplexity,
        "prototype_use": use,
        "teacher_information": information,
    }
    assert found == pytest.approx({f"{name}/dino": value for name, value in expected.items()}, abs=1e-6)


MOMENT = Moment(step=5, steps=10, seed=0)


@pytest.mark.parametrize("centring", ["centre", "sinkhorn"])
def test_a_look_is_at_the_targets_that_the_loss_uses_and_micro_batches_change_nothing(centring: str) -> None:
    objective = dinov2(centring)
    objective.dino_centre.copy_(draw(1, 24))
    whole = batch(8)
    found = objective.look([whole], MOMENT)
    (prepared,) = objective.prepare([whole], MOMENT)
    assert prepared.targets is not None
    for kind in ("dino", "ibot"):
        target = prepared.targets[kind]()
        assert found[f"teacher_entropy/{kind}"] == pytest.approx(float(-(target * target.log()).nansum() / len(target)))
    objective.after_skip()
    assert objective.look([part(whole, 0, 4), part(whole, 4, 8)], MOMENT) == pytest.approx(found, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("make", [dino, dinov2, mae])
def test_the_encoder_that_an_export_takes_is_watched_and_its_features_lie_in_the_order_of_the_batch(make) -> None:  # type: ignore[no-untyped-def]
    objective, whole = make(), batch(6)
    watched = watched_encoder(objective)
    assert watched is (objective.encoder if make is mae else objective.teacher.encoder)
    expected = watched.features(whole.crops[0][0])[0]
    assert torch.allclose(features_of(watched, [whole]), expected, atol=1e-6)
    assert torch.allclose(features_of(watched, [part(whole, 0, 3), part(whole, 3, 6)]), expected, atol=1e-6)


# The probe ---------------------------------------------------------------------------------------------------------


def write_classes(folder: Path, counts: dict[str, int], gap: int = 90) -> Path:
    """Class folders of noise, as many images of 24 pixels as ``counts`` says, each class ``gap`` lighter than the one
    before."""
    for number, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng(1, "probe image", name, i).integers(0, 60, (24, 24, 3)) + gap * number
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i:03d}.png")
    return folder


PREPROCESSING = Preprocessing(16, 16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


class Colour(nn.Module):
    """An encoder whose class token is the image's mean colour and a constant."""

    def forward(self, crops: list[Tensor], wanted: object = None):  # type: ignore[no-untyped-def]
        class Seen:
            cls = torch.cat([crops[0].mean((2, 3)), torch.ones(len(crops[0]), 1)], dim=1)

        return [Seen]


def probe(folder: Path, most: int = 1000) -> ProbeSet:
    found = ProbeSet(folder, most)
    found.load(PREPROCESSING, 0, 1, torch.device("cpu"))
    return found


def test_classes_that_colour_tells_apart_are_told_apart_and_those_it_does_not_are_not(tmp_path: Path) -> None:
    easy = probe(write_classes(tmp_path / "easy", {"a": 30, "b": 30})).score(Colour(), torch.device("cpu"))
    assert easy["probe_knn"] == 1 and easy["probe_knn_se"] == 0
    hard = probe(write_classes(tmp_path / "hard", {"a": 40, "b": 40}, gap=0)).score(Colour(), torch.device("cpu"))
    assert 0.2 < hard["probe_knn"] < 0.8 and hard["probe_knn_se"] > 0.04


def test_the_score_is_that_of_pretrain_probes_neighbours_on_the_same_images(tmp_path: Path) -> None:
    for name in ("train", "test"):
        write_classes(tmp_path / name, {"a": 12, "b": 9}, gap=8)
    images = probe(tmp_path)
    network = encoder()()
    initialise(network, 0)
    found = images.score(network, torch.device("cpu"))
    features = images.images.features(network, torch.device("cpu")).detach().numpy()
    labels = np.array([0] * 12 + [1] * 9)
    assert len(features) == 42 and 0 < found["probe_knn_same_slides"] <= 1
    assert found["probe_knn"] == np.mean(knn_predict(features[:21], labels, features[21:], 2) == labels)
    assert found["probe_rankme"] == pytest.approx(rankme(features))


def test_as_many_images_are_used_as_asked_for_and_every_class_keeps_its_share(tmp_path: Path) -> None:
    images = ProbeSet(write_classes(tmp_path / "classes", {"a": 40, "b": 20, "c": 2}), 30)
    assert [int((images.set.labels == label).sum()) for label in range(3)] == [19, 10, 2]
    again = ProbeSet(tmp_path / "classes", 30)
    assert images.set.files == again.set.files


@pytest.mark.parametrize(
    ("train", "test", "most", "kept"), [(190, 25, 100, (75, 25)), (190, 90, 100, (50, 50)), (20, 90, 100, (20, 80))]
)
def test_of_given_parts_as_many_images_are_asked_as_half_of_them_and_the_others_are_the_bank(
    train: int, test: int, most: int, kept: tuple[int, int], tmp_path: Path
) -> None:
    write_classes(tmp_path / "train", {"a": train, "b": train})
    write_classes(tmp_path / "test", {"a": test, "b": test})
    bank, asked = ProbeSet(tmp_path, 2 * most).given or ((), ())
    assert (len(bank), len(asked)) == (2 * kept[0], 2 * kept[1])


def test_with_given_parts_a_random_split_of_both_is_beside_them(tmp_path: Path) -> None:
    """The test part is of another brightness, so that only a random split tells its classes by colour."""
    write_classes(tmp_path / "train", {"a": 20, "b": 20}, gap=60)
    for path in write_classes(tmp_path / "test", {"a": 20, "b": 20}, gap=60).rglob("*.png"):
        Image.fromarray(255 - read_image(path)).save(path)
    found = probe(tmp_path).score(Colour(), torch.device("cpu"))
    assert found["probe_knn"] <= 0.5 < 0.6 < found["probe_knn_same_slides"]


def test_the_error_of_the_probe_is_over_slides_where_names_tell_them(tmp_path: Path) -> None:
    folder = write_classes(tmp_path / "set", {"a": 60, "b": 60}, gap=0)
    plain = probe(folder).score(Colour(), torch.device("cpu"))["probe_knn_se"]
    for path in sorted(folder.rglob("*.png")):
        path.rename(path.with_name(f"case{int(path.stem) // 10}_{path.stem}.png"))
    images = probe(folder)
    assert images.groups is not None and len(np.unique(images.groups)) == 6
    found = images.score(Colour(), torch.device("cpu"))
    assert found["probe_knn_se"] >= plain and found["probe_groups"] == 6


def test_the_shares_of_any_number_of_ranks_are_all_images_and_equally_long(tmp_path: Path) -> None:
    images = ProbeSet(write_classes(tmp_path / "classes", {"a": 7, "b": 6}), 1000)
    images.load(PREPROCESSING, 0, 1, torch.device("cpu"))
    whole = images.images.images
    shares = []
    for rank in range(4):
        shares.append(FixedImages(13, lambda i: read_image(images.set.files[i]), PREPROCESSING, rank, 4).images)
    assert [len(share) for share in shares] == [4] * 4
    assert torch.equal(torch.stack(shares, 1).flatten(0, 1)[:13], whole)


def test_an_image_that_cannot_be_read_stops_the_run_before_it_starts(tmp_path: Path) -> None:
    folder = write_classes(tmp_path / "classes", {"a": 3, "b": 3})
    (folder / "a" / "001.png").write_bytes(b"no picture")
    with pytest.raises(Fault, match=r"001\.png can't be read as an image"):
        probe(folder)


# The best checkpoint -----------------------------------------------------------------------------------------------


def test_the_best_is_the_first_of_equals_and_waiting_counts_the_checkpoints_after_it() -> None:
    scored = [(2, 0.5), (4, 0.7), (6, 0.7), (8, 0.6)]
    assert best.best(scored) == (4, 0.7)
    assert best.waited(scored) == 2 and best.waited(scored[:2]) == 0 and best.waited([]) == 0


def test_the_best_checkpoint_is_kept_pointed_at_and_read_by_its_name(tmp_path: Path) -> None:
    model = nn.ModuleDict({"encoder": nn.Linear(3, 3)})
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    scored: list[tuple[int, float]] = []
    for step, score in ((2, 0.5), (4, 0.8), (6, 0.7), (8, 0.6)):
        scored.append((step, score))
        with torch.no_grad():
            model["encoder"].bias.fill_(step)
        checkpoints.save(tmp_path, step, model, optimiser, {}, keep=1)
        best.mark(tmp_path, scored)
    assert [checkpoints.step_of(path) for path in checkpoints.complete(tmp_path)] == [4, 8]
    link = checkpoints.folder(tmp_path) / "best"
    assert os.readlink(link) == "step-00000004"  # relative: the folder may move
    assert checkpoints.read_network(link, "encoder.")["bias"].tolist() == [4, 4, 4]
    newest = checkpoints.newest(tmp_path)
    assert newest is not None and newest.name == "step-00000008"


def test_without_symbolic_links_the_best_one_is_marked_by_a_file_kept_and_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    model = nn.Linear(2, 2)
    for step, score in ((2, 0.9), (4, 0.5), (6, 0.4)):
        checkpoints.save(tmp_path, step, model, torch.optim.SGD(model.parameters(), lr=0.1), {}, keep=1)
        best.mark(tmp_path, [(2, 0.9), (step, score)])
    assert [checkpoints.step_of(path) for path in checkpoints.complete(tmp_path)] == [2, 6]
    link = checkpoints.folder(tmp_path) / "best"
    assert link.is_file() and checkpoints.resolved(link).name == "step-00000002"
    assert [path.name for path in tmp_path.rglob("*.partial")] == []


@pytest.mark.parametrize("original", ["there", "gone"])
def test_a_best_one_that_was_copied_as_a_folder_gets_its_own_name_and_is_marked(tmp_path: Path, original: str) -> None:
    model = nn.Linear(2, 2)
    for step in (2, 4):
        checkpoints.save(tmp_path, step, model, torch.optim.SGD(model.parameters(), lr=0.1), {}, keep=0)
    two, link = checkpoints.folder(tmp_path) / "step-00000002", checkpoints.folder(tmp_path) / "best"
    shutil.copytree(two, link)
    if original == "gone":
        shutil.rmtree(two)
    best.mark(tmp_path, [(2, 0.9), (4, 0.5)])
    assert checkpoints.damage(two) is None
    best.mark(tmp_path, [(2, 0.9), (4, 0.5)])
    assert os.readlink(link) == "step-00000002"


def test_a_best_checkpoint_that_is_gone_is_not_pointed_at(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    checkpoints.save(tmp_path, 6, model, torch.optim.SGD(model.parameters(), lr=0.1), {}, keep=0)
    best.mark(tmp_path, [(2, 0.9)])
    assert not (checkpoints.folder(tmp_path) / "best").exists()
    best.mark(tmp_path, [(2, 0.9), (6, 0.5)])
    assert os.readlink(checkpoints.folder(tmp_path) / "best") == "step-00000006"
