"""Drawn parameters have the distributions that were asked for."""

import numpy as np
import pytest

from data.keyed import rng
from data.tiles.augment_parameters import GREY, JITTER, ORDER, SIGMA, SOLARISE, Colour, draw_parameters


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_drawn_parameters_follow_their_settings(kind: int) -> None:
    colour, count = Colour(), 4000
    table = draw_parameters(colour, np.full(count, kind), rng(0, kind))
    wanted = {JITTER: 0.8, GREY: 0.2, SIGMA: colour.blur_probability[kind], SOLARISE: colour.solarise_probability[kind]}
    for column, share in wanted.items():
        assert abs((table[:, column] > 0).mean() - share) <= 4 * np.sqrt(share * (1 - share) / count)
    for column, (low, high) in zip(range(4, 8), [(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)], strict=True):
        drawn = table[:, column]
        span = high - low
        assert low <= drawn.min() < low + 0.02 * span and high - 0.02 * span < drawn.max() <= high
        assert abs(drawn.mean() - (low + high) / 2) < 4 * span / np.sqrt(12 * count)
    blurred = table[table[:, SIGMA] > 0, SIGMA]
    assert not len(blurred) or (0.1 <= blurred.min() < 0.13 and 1.97 < blurred.max() <= 2.0)
    orders, often = np.unique(table[:, ORDER], axis=0, return_counts=True)
    assert len(orders) == 24 and np.abs(often - count / 24).max() < 5 * np.sqrt(count / 24)


def test_a_brightness_of_more_than_one_never_makes_a_negative_factor() -> None:
    factors = draw_parameters(Colour(brightness=1.5), np.zeros(300, dtype=int), rng(0))[:, 4]
    assert factors.min() >= 0 and factors.max() > 2.3
