"""Class folders, splits, classifiers and the effective rank."""

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.fault import Fault
from data.keyed import rng
from pretrain.objectives.figures import rankme
from pretrain.probing import features, scores, splits
from pretrain.probing.images import read_class_folders, read_image, require_same_classes
from pretrain.probing.question import asked_of


def write_class_folders(folder: Path, counts: dict[str, int], size: tuple[int, int] = (24, 32)) -> Path:
    """One flat colour per class plus noise, so that colour tells classes apart."""
    for index, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            noise = rng(0, name, i).integers(0, 60, size=(*size, 3))
            noise[..., index % 3] += 120
            Image.fromarray(noise.astype(np.uint8)).save(folder / name / f"{i}.png")
    return folder


def test_class_folders_are_read_in_one_order_with_their_labels(tmp_path):
    images = read_class_folders(write_class_folders(tmp_path / "set", {"b": 2, "a": 3}))
    assert images.classes == ["a", "b"]
    assert images.labels.tolist() == [0, 0, 0, 1, 1]
    assert [path.name for path in images.files] == ["0.png", "1.png", "2.png", "0.png", "1.png"]


@pytest.mark.parametrize(
    ("counts", "message"), [({}, "at least two"), ({"a": 2}, "1 class folder,"), ({"a": 2, "b": 0}, "has no jpg")]
)
def test_a_folder_that_cannot_be_probed_is_refused_by_name(tmp_path, counts, message):
    (tmp_path / "set").mkdir()
    write_class_folders(tmp_path / "set", counts)
    with pytest.raises(Fault, match=message) as refused:
        read_class_folders(tmp_path / "set")
    assert str(tmp_path / "set") in str(refused.value)


def test_a_link_to_nothing_is_named_for_what_it_is(tmp_path):
    folder = write_class_folders(tmp_path / "set", {"a": 2, "b": 2})
    (folder / "a" / "9.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(Fault, match=r"9\.png is a link to .*gone\.png, which isn't there"):
        read_class_folders(folder)


def test_a_missing_folder_is_refused_by_name(tmp_path):
    with pytest.raises(Fault, match="nowhere is not a folder"):
        read_class_folders(tmp_path / "nowhere")


def test_a_class_missing_on_either_side_is_named(tmp_path):
    both = read_class_folders(write_class_folders(tmp_path / "both", {"a": 1, "b": 1, "c": 1}))
    fewer = read_class_folders(write_class_folders(tmp_path / "fewer", {"a": 1, "b": 1}))
    with pytest.raises(Fault, match="fewer has no class folder c"):
        require_same_classes(both, fewer)
    with pytest.raises(Fault, match="fewer has no class folder c"):
        require_same_classes(fewer, both)


def test_a_split_is_stratified_disjoint_complete_and_keyed_by_its_seed(tmp_path):
    images = read_class_folders(write_class_folders(tmp_path / "set", {"a": 40, "b": 10}))
    train, test = map(images.subset, splits.stratified_split(images, 0.2, seed=1))
    assert np.bincount(test.labels).tolist() == [8, 2]
    assert sorted(train.files + test.files) == sorted(images.files)
    assert images.subset(splits.stratified_split(images, 0.2, seed=1)[1]).files == test.files
    assert images.subset(splits.stratified_split(images, 0.2, seed=2)[1]).files != test.files


def test_a_class_with_one_image_cannot_be_split(tmp_path):
    images = read_class_folders(write_class_folders(tmp_path / "set", {"a": 1, "b": 4}))
    with pytest.raises(Fault, match="single image"):
        splits.stratified_split(images, 0.2, seed=0)


def test_an_unreadable_image_is_named_counted_and_left_out(tmp_path, capsys):
    folder = write_class_folders(tmp_path / "set", {"a": 3, "b": 3})
    (folder / "a" / "1.png").write_bytes(b"not an image")
    got = features.extract(
        read_class_folders(folder), {"colour": features.colour_histogram}, batch=2, threads=2, label="train"
    )
    assert got.features["colour"].shape == (5, 96)
    assert got.labels.tolist() == [0, 0, 1, 1, 1]
    assert len(got.unreadable) == 1 and "1.png" in got.unreadable[0]
    printed = capsys.readouterr().err
    assert "1.png" in printed and "1 of 6" in printed


def test_a_class_that_has_no_readable_image_stops_the_probe(tmp_path):
    folder = write_class_folders(tmp_path / "set", {"a": 1, "b": 1})
    (folder / "a" / "0.png").write_bytes(b"")
    with pytest.raises(Fault, match="no image of class folder"):
        features.extract(read_class_folders(folder), {"c": features.colour_histogram}, 2, 1, "train")


def test_a_sixteen_bit_image_is_refused_instead_of_clipped(tmp_path):
    Image.fromarray(np.full((8, 8), 40_000, dtype=np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(Fault, match="8 bits"):
        read_image(tmp_path / "deep.png")


def test_a_colour_histogram_counts_each_channel_in_bins_of_eight_values():
    image = np.zeros((1, 4, 3), dtype=np.uint8)
    image[0, :, 0] = [0, 7, 8, 255]
    image[0, :, 2] = 16
    histogram = features.colour_histogram([image])[0]
    assert histogram.dtype == np.float32
    expected = np.zeros(96)
    expected[[0, 1, 31]] = [0.5, 0.25, 0.25]  # red
    expected[32] = 1  # green: all zero
    expected[64 + 2] = 1  # blue: all 16
    np.testing.assert_array_equal(histogram, expected)


def test_nearest_neighbours_vote_with_the_exponential_of_their_similarity():
    # Cosines with the test vector: class 0 at 1.0; class 1 twice at 0.9. exp(.1/.07) = 4.2 beats two votes of 1.
    angle = math.acos(0.9)
    train = np.array([[5.0, 0.0], [math.cos(angle), math.sin(angle)], [math.cos(angle), -math.sin(angle)]])
    labels = np.array([0, 1, 1])
    assert scores.knn_predict(train, labels, np.array([[1.0, 0.0]]), classes=2, k=3).tolist() == [0]
    # At 0.98 the near one has 1.33 against 2: the majority wins.
    angle = math.acos(0.98)
    train[1:] = [[math.cos(angle), math.sin(angle)], [math.cos(angle), -math.sin(angle)]]
    assert scores.knn_predict(train, labels, np.array([[1.0, 0.0]]), classes=2, k=3).tolist() == [1]


def test_nearest_neighbours_equal_a_second_computation_across_chunks():
    generator = rng(0, "knn")
    train, test = generator.normal(size=(60, 5)), generator.normal(size=(31, 5))
    labels = generator.integers(0, 3, 60)
    expected = []
    for row in test:
        cosine = np.array([row @ other / np.linalg.norm(row) / np.linalg.norm(other) for other in train])
        best = sorted(range(60), key=lambda i: -cosine[i])[:20]
        expected.append(
            int(np.argmax([sum(math.exp(cosine[i] / 0.07) for i in best if labels[i] == c) for c in range(3)]))
        )
    assert scores.knn_predict(train, labels, test, classes=3, chunk=7).tolist() == expected


def test_linear_accuracy_does_not_depend_on_the_scale_of_a_feature():
    generator = rng(0, "linear")
    labels = generator.integers(0, 2, 200)
    features = np.stack([labels + 0.1 * generator.normal(size=200), generator.normal(size=200)], axis=1)
    scaled = features * [1e-4, 1e4] + [3.0, -7.0]
    got = scores.score(features[:150], labels[:150], features[150:], labels[150:], classes=2)
    same = scores.score(scaled[:150], labels[:150], scaled[150:], labels[150:], classes=2)
    assert got.linear == same.linear == 1.0
    assert got.linear_converged


def test_rankme_counts_equal_directions_and_sees_collapse():
    orthogonal = np.linalg.qr(rng(0, "rank").normal(size=(50, 8)))[0]
    assert rankme(orthogonal) == pytest.approx(8, rel=1e-4)
    assert rankme(np.outer(np.arange(1, 51), np.ones(8))) == pytest.approx(1, rel=1e-4)
    # σ = (3, 1): p = (.75, .25), exp of its entropy.
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert rankme(np.diag([3.0, 1.0])) == pytest.approx(math.exp(entropy), rel=1e-5)
    assert math.isnan(rankme(np.diag([3.0, np.inf])))


def test_standard_errors_are_binomial_and_gains_are_paired():
    correct = np.array([True] * 60 + [False] * 40)
    assert scores.standard_error(correct) == pytest.approx(math.sqrt(0.6 * 0.4 / 100))
    better = np.array([True] * 70 + [False] * 30)
    difference, error = scores.gain(better, correct)
    assert difference == pytest.approx(0.1)
    assert error == pytest.approx(np.array([1.0] * 10 + [0.0] * 90).std() / 10)
    assert error < math.hypot(scores.standard_error(correct), scores.standard_error(better))


def test_the_standard_error_over_slides_is_the_scatter_of_the_mean_when_slides_are_drawn_anew():
    """1,000 times 20 slides of 12 tiles; of each slide another share is right."""
    draw, slides = rng(0, "slides"), np.repeat(np.arange(20), 12)
    means, over_slides, over_tiles, gains = [], [], [], []
    for _ in range(1000):
        right = draw.random(240) < draw.uniform(0, 1, 20)[slides]
        means.append(right.mean())
        over_slides.append(scores.standard_error(right, slides))
        over_tiles.append(scores.standard_error(right))
        gains.append(scores.gain(right, np.zeros(240, dtype=bool), slides)[1])
    assert np.mean(over_slides) == pytest.approx(np.std(means), rel=0.06)
    assert np.mean(over_tiles) < 0.6 * np.std(means)
    assert gains == over_slides


def test_an_error_over_slides_of_one_tile_each_is_that_over_tiles_and_one_slide_tells_none():
    right = np.array([True] * 60 + [False] * 40)
    alone = scores.standard_error(right, np.arange(100))
    assert alone == pytest.approx(scores.standard_error(right) * math.sqrt(100 / 99))
    assert scores.standard_error(right, np.zeros(100, int)) == scores.standard_error(right)


def test_what_an_error_is_over_is_said():
    assert scores.words_of_error(None, "").startswith("over tiles, which takes them for independent")
    assert scores.words_of_error(np.zeros(5, int), "slides").startswith("over tiles")
    assert scores.words_of_error(np.arange(20), "slides of t.csv").startswith(
        "over 20 groups of test images, since those of one slide err together (slides of t.csv); of a gain"
    )
    assert "few to tell an error by: a gain counts from 4.3 errors on" in scores.words_of_error(np.arange(3), "slides")


def test_two_slides_that_agree_by_chance_make_no_error_of_nothing_and_count_late():
    right = np.array([True, False] * 10)
    assert scores.standard_error(right, np.arange(20) // 10) == scores.standard_error(right) > 0.1
    assert scores.errors_that_count(2) == pytest.approx(12.706, abs=1e-3)
    assert scores.errors_that_count(None) == scores.errors_that_count(1) == scores.errors_that_count(500) == 2


def named_sides(folder: Path, test_patients: range) -> tuple[Path, Path]:
    """Tiles of patients 0 to 4 to train on, and of ``test_patients``, as TCGA names them."""
    for side, patients in (("fit", range(5)), ("ask", test_patients)):
        write_class_folders(folder / side, {"a": 2 * len(patients), "b": 2 * len(patients)}, size=(4, 4))
        for path in sorted((folder / side).rglob("*.png")):
            number = int(path.stem)
            path.rename(path.with_name(f"TCGA-AA-{3500 + patients[number // 2]}-01Z_{number}_0.png"))
    return folder / "fit", folder / "ask"


def test_patients_on_both_given_sides_are_counted_in_the_words_and_others_are_none(tmp_path):
    one = asked_of(*named_sides(tmp_path / "one", range(3, 7)), None, 0.2, 0, 1, 2)
    assert "; 2 of the 4 patients of test are in train too (patients, by the names: 'TCGA-AA-3500" in one.split
    assert one.groups is not None and len(np.unique(one.groups.of)) == 4
    other = asked_of(*named_sides(tmp_path / "other", range(5, 8)), None, 0.2, 0, 1, 2)
    assert other.split == "train and test given"


def test_one_folder_given_twice_is_refused(tmp_path):
    train, _ = named_sides(tmp_path, range(5))
    (tmp_path / "link").symlink_to(train)
    with pytest.raises(Fault, match="are the same images"):
        asked_of(train, tmp_path / "link", None, 0.2, 0, 1, 2)


def test_all_of_one_patient_is_said_and_not_called_other_slides(tmp_path):
    _, only = named_sides(tmp_path, range(7, 8))
    for path in sorted(only.rglob("*.png"))[:2]:
        path.with_name(f"{path.stem}1.png").write_bytes(path.read_bytes())
    found = asked_of(only, None, None, 0.5, 0, 1, 2)
    assert found.split.startswith("all of one patient (patients, by the names: 'TCGA-AA-3507-01Z_0_0.png' is of")
