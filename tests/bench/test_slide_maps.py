"""The benchmark's made-up slides are what their labels say, and nothing else tells them apart."""

from collections import Counter
from itertools import product

import numpy as np
import pytest
from scipy.ndimage import label as connected

from tests.bench.slide_maps import (
    APART,
    FAR,
    LABELS,
    NEAR,
    NESTED,
    NESTS,
    NOTHING,
    SHY,
    TISSUE,
    A,
    B,
    SlideMap,
    class_vectors,
    made_up_tiles,
    maps,
    slide_map,
)

SLIDES, CLASSES = 24, 6
MADE = {kind: list(maps(kind, SLIDES, CLASSES, seed=3)) for kind in LABELS}


def of(kind: str, label: int) -> list[SlideMap]:
    return [made for made in MADE[kind] if made.label == label]


def distances(made: SlideMap, one: int, other: int) -> np.ndarray:
    """From every tile of a class to every tile of another."""
    first, second = (np.argwhere(made.classes == each) for each in (one, other))
    return np.hypot(*(first[:, None] - second).transpose(2, 0, 1))


def pairs(made: SlideMap, one: int, other: int) -> Counter:
    """How often a tile of ``one`` has a tile of ``other`` at each displacement (rows, columns)."""
    first, second = (np.argwhere(made.classes == each) for each in (one, other))
    return Counter(map(tuple, (second - first[:, None]).reshape(-1, 2).tolist()))


@pytest.mark.parametrize("kind", LABELS)
def test_a_slide_is_the_same_whichever_others_are_made_and_has_as_many_tiles_as_is_said(kind: str) -> None:
    for number, made in enumerate(MADE[kind]):
        assert TISSUE[0] <= len(made.cells) <= TISSUE[1]
        assert made.label == number % 2
        assert set(made.of_tiles.tolist()) <= set(range(CLASSES))
    again = slide_map(kind, CLASSES, 3, 7)
    assert (again.classes == MADE[kind][7].classes).all()
    assert (slide_map(kind, CLASSES, 4, 7).classes != again.classes).any()


def test_composition_is_a_share() -> None:
    low, high = (np.mean([(made.of_tiles == A).mean() for made in of("composition", label)]) for label in (0, 1))
    assert low == pytest.approx(0.12, abs=0.03) and high == pytest.approx(0.28, abs=0.03)


def test_arrangement_has_equal_counts_that_border_or_stay_apart() -> None:
    assert {(int((made.of_tiles == one).sum()), one) for made in MADE["arrangement"] for one in (A, B)} == {
        (40, A),
        (40, B),
    }
    assert all(distances(made, A, B).min() == 1 for made in of("arrangement", 1))
    assert all(distances(made, A, B).min() >= APART for made in of("arrangement", 0))


def test_nests_hold_equally_many_tiles() -> None:
    assert {int((made.of_tiles == A).sum()) for made in MADE["nests"]} == {NESTED}
    parts = [[connected(made.classes == A, np.ones((3, 3)))[1] for made in of("nests", label)] for label in (0, 1)]
    assert min(parts[0]) >= NESTS and max(parts[1]) == 1


def test_rare_is_one_in_a_hundred_or_none() -> None:
    assert all((made.of_tiles == A).sum() == round(len(made.of_tiles) / 100) for made in of("rare", 1))
    assert not any((made.of_tiles == A).any() for made in of("rare", 0))


def test_enclosure_has_equal_counts_and_equally_many_pairs_within_structures_at_every_displacement() -> None:
    """A and B exchanged, and so both labels, count the same: of A beside A and B beside B at any displacement within a
    structure, and of A beside B seen from either."""
    for made in MADE["enclosure"]:
        assert (made.of_tiles == A).sum() == (made.of_tiles == B).sum() == 42
        near = [
            step for step in product(range(-2, 3), repeat=2) if np.hypot(*step) <= 2
        ]  # structures are farther apart
        of_both, back, of_a, of_b = (pairs(made, *two) for two in ((A, B), (B, A), (A, A), (B, B)))
        assert all(of_both[step] == back[step] and of_a[step] == of_b[step] for step in near)
        borders = Counter()
        for row, column in product(range(24), repeat=2):
            here = made.classes[row, column]
            for place in ((row + 1, column), (row, column + 1), (row - 1, column), (row, column - 1)):
                other = made.classes[place] if max(place) < 24 and min(place) >= 0 else NOTHING
                borders[here, other in (A, B)] += here in (A, B)
        assert borders[A, True] == borders[B, True] and borders[A, False] == borders[B, False]


def test_enclosure_says_who_is_within() -> None:
    for made in MADE["enclosure"]:
        inner, outer = (B, A) if made.label else (A, B)
        middle = [
            (row, column)
            for row, column in product(range(2, 22), repeat=2)
            if (made.classes[row - 1 : row + 2, column - 1 : column + 2] == inner).all()
        ]
        around = [made.classes[row - 2 : row + 3, column] for row, column in middle]
        assert sum(line[0] == line[-1] == outer for line in around) == 2
        assert not any(
            (made.classes[row - 1 : row + 2, column - 1 : column + 2] == outer).all()
            and made.classes[row - 2, column] == inner
            for row, column in product(range(2, 22), repeat=2)
        )


def test_far_sets_the_distance_and_leaves_the_neighbourhood_alone() -> None:
    near_enough = []
    for made in MADE["far"]:
        assert (made.of_tiles == B).sum() == 25 and (made.of_tiles == A).sum() == 13
        middle = np.argwhere(made.classes == A).mean(0)
        away = np.hypot(*(np.argwhere(made.classes == B) - middle).T)
        assert away.min() >= SHY - 1
        near_enough.append(((away >= NEAR - 1) & (away <= FAR + 1)).mean())
    assert min(near_enough[1::2]) == 1
    assert np.mean(near_enough[::2]) < 0.6


def test_tiles_are_their_class_the_slides_stain_and_noise_of_the_norms_that_are_said() -> None:
    made, vectors = MADE["far"][0], class_vectors(CLASSES, 64, 0)
    tiles = made_up_tiles(made, vectors, 0, "far", 0)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1)
    rest = tiles - vectors[made.of_tiles]
    assert np.linalg.norm(rest.mean(0)) == pytest.approx(0.3, abs=0.03)
    assert np.sqrt(np.square(rest - rest.mean(0)).sum(1).mean()) == pytest.approx(0.7, abs=0.02)
    assert (made_up_tiles(made, vectors, 0, "far", 0) == tiles).all()
