"""Features that recognise slides rather than tissue are noticed, and evenly scattered figures are not."""

from collections.abc import Sequence

import numpy as np
import pytest

from data.keyed import rng
from pretrain.probing.scores import standard_error
from pretrain.run.alarms import find_alarms
from pretrain.run.history import Facts, History
from pretrain.run.slide_alarms import chance_of_falls

KNOWN = Facts({}, settled=50)
Figures = tuple[float, float]
"""Accuracies for tissue and for slides."""


def raised(tissue: Sequence[float], slides: Sequence[float], error: float, first: Figures | None = None) -> set[str]:
    """All alarms of a run that is probed and looked at every 125 steps, asked at each of them; ``first``: the figures
    of its first weights."""
    history, names = History(), set()
    if first is not None:
        history.add(0, {"probe_knn": first[0], "probe_knn_se_tiles": error, "slide_knn": first[1]})
    for number, (told, slide) in enumerate(zip(tissue, slides, strict=True)):
        figures = {"probe_knn": told, "probe_knn_se": error, "slide_knn": slide, "slide_chance": 1 / 16}
        history.add(125 * (number + 1), figures)
        names |= {alarm.name for alarm in find_alarms(history, KNOWN)}
    return names


RISING = [0.60, 0.66, 0.72, 0.77, 0.81, 0.85]


@pytest.mark.parametrize(
    ("tissue", "slides", "error"),
    [
        ([0.456, 0.45, 0.445, 0.44, 0.434, 0.428], RISING, 0.022),  # the run that taught us
        ([0.60, 0.55, 0.50, 0.46, 0.44], [0.90, 0.93, 0.93, 0.93, 0.93], 0.02),  # slides were told well before
        ([0.50, 0.60, 0.60, 0.52, 0.50, 0.48, 0.45], [0.5, 0.90, 0.90, 0.92, 0.92, 0.92, 0.92], 0.02),
        ([0.52, 0.50, 0.48, 0.46, 0.44, 0.42], RISING, 0.046),  # few tiles are judged
        ([0.50, 0.55, 0.50, 0.47, 0.45], [0.3, 0.35, 0.5, 0.6, 0.7], 0.02),
    ],
)
def test_tissue_that_is_told_worse_while_slides_are_told_well_is_said(
    tissue: list[float], slides: list[float], error: float
) -> None:
    assert raised(tissue, slides, error) == {"slides recognised"}


def test_neither_alone_is_said() -> None:
    falling = [0.50, 0.55, 0.50, 0.47, 0.45, 0.44]
    assert raised([0.5, 0.55, 0.56, 0.57, 0.57, 0.57], RISING, 0.02) == set()
    assert raised(falling, [0.4] * 6, 0.02) == set()
    assert raised(falling, [0.9, 0.85, 0.8, 0.7, 0.6, 0.5], 0.02) == set()
    assert raised(falling[:3], RISING[:3], 0.02) == set()  # may be chance


def test_the_alarm_says_from_where_to_where_and_since_when() -> None:
    history = History()
    for number, told in enumerate([0.60, 0.60, 0.50, 0.46, 0.44]):
        history.add(100 * number + 100, {"probe_knn": told, "probe_knn_se": 0.02, "slide_knn": 0.7 + 0.05 * number})
    (alarm,) = find_alarms(history, KNOWN)
    assert alarm.since == 300
    assert "told by k-NN with 0.450, the mean of the last two checkpoints, 0.600 about step 200" in alarm.says
    assert "the slide of a tile is told with 0.875, 0.725 then" in alarm.says


@pytest.mark.parametrize("rise", [0.0, 0.15, 0.3])
def test_of_flat_runs_of_sixteen_checkpoints_fewer_than_one_in_twenty_raises_an_alarm_whatever_slides_do(
    rise: float,
) -> None:
    """Noise is independent at each checkpoint, which is more than that of a run, whose tiles are the same."""
    error, of_slides, alarmed = 0.031, 0.031, 0
    for number in range(400):
        draw = rng(0, "flat run", number)
        tissue = 0.6 + error * draw.standard_normal(16)
        slides = (0.6 + rise * np.arange(16) / 16 + of_slides * draw.standard_normal(16)).clip(0, 1)
        alarmed += bool(raised(tissue.tolist(), slides.tolist(), error))
    assert alarmed < 0.05 * 400


@pytest.mark.parametrize("slides", [2, 4, 10])
def test_of_flat_runs_that_few_slides_judge_fewer_than_one_in_twenty_raises_an_alarm(slides: int) -> None:
    """Tiles of a slide are told better or worse together, anew at each checkpoint: the worst case. Errors are what the
    probe would record."""
    of, alarmed, runs = np.repeat(np.arange(slides), 200 // slides), 0, 100
    for number in range(runs):
        draw, history, names = rng(1, "few slides", slides, number), History(), set()
        for look in range(16):
            right = draw.random(len(of)) < np.clip(0.6 + draw.normal(0, 0.11, slides), 0, 1)[of]
            figures = {"probe_knn": float(right.mean()), "probe_knn_se": standard_error(right, of)}
            figures |= {"probe_groups": slides, "slide_knn": 0.6 + 0.02 * look, "slide_chance": 1 / 16}
            history.add(125 * (look + 1), figures)
            names |= {alarm.name for alarm in find_alarms(history, KNOWN)}
        alarmed += bool(names)
    assert alarmed < 0.05 * runs


def test_runs_that_learn_tissue_and_slides_raise_hardly_an_alarm() -> None:
    error, alarmed = 0.02, 0
    for number in range(200):
        draw = rng(0, "learning run", number)
        first = 0.5 + error * draw.standard_normal(), 0.5 + 0.03 * draw.standard_normal()
        tissue = 0.6 + 0.05 * np.arange(16) / 16 + error * draw.standard_normal(16)
        slides = 0.7 + 0.2 * np.arange(16) / 16 + 0.03 * draw.standard_normal(16)
        alarmed += bool(raised(tissue.tolist(), slides.tolist(), error, first))
    assert alarmed < 0.05 * 200


def test_runs_that_neither_learn_tissue_nor_slides_raise_hardly_an_alarm() -> None:
    error, alarmed = 0.02, 0
    for number in range(200):
        draw = rng(0, "idle run", number)
        first, *tissue = (0.5 + error * draw.standard_normal(17)).tolist()
        first_slides, *slides = (0.6 + 0.031 * draw.standard_normal(17)).tolist()
        alarmed += bool(raised(tissue, slides, error, (first, first_slides)))
    assert alarmed < 0.05 * 200


def test_tissue_that_is_told_no_better_than_by_the_first_weights_is_said_where_slides_are_told_better() -> None:
    low, slides = [0.45, 0.455, 0.448, 0.452, 0.449], [0.7, 0.8, 0.85, 0.85, 0.85]
    assert raised(low, slides, 0.022) == set()  # nobody knows what the first weights told
    assert raised(low, slides, 0.022, (0.514, 0.5)) == {"no tissue learned"}
    assert raised([0.52, 0.53, 0.51, 0.52, 0.53], slides, 0.022, (0.514, 0.5)) == {"no tissue learned"}
    assert raised([0.60, 0.61, 0.62, 0.62, 0.63], slides, 0.022, (0.514, 0.5)) == set()
    assert raised(low, [0.5] * 5, 0.022, (0.514, 0.5)) == set()


def test_a_steady_fall_is_as_unlikely_as_its_orders_are_few() -> None:
    assert chance_of_falls(np.arange(6.0)) == 1 and chance_of_falls(np.ones(6)) == 1
    draw = rng(0, "orders")
    seen = [chance_of_falls(draw.standard_normal(8)) for _ in range(4000)]
    for share in (0.2, 0.05, 0.01):
        assert np.mean(np.array(seen) <= share) == pytest.approx(share, rel=0.4)
