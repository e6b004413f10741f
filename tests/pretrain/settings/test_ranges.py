"""What a setting allows is declared beside its type, and held wherever the setting is."""

from dataclasses import dataclass
from typing import Annotated, Any

import pytest

from data.fault import Fault
from pretrain.settings.ranges import hints, matching, require_allowed, within

SHARE = within(least=0, below=1)


@dataclass
class Inner:
    share: Annotated[float, SHARE]


class Plugged:
    def __init__(self, *, depth: Annotated[int, within(least=1)], name: str) -> None:
        pass


@dataclass
class Outer:
    count: Annotated[int | None, within(least=1, most=8)]
    jobs: Annotated[list[str], matching(r"\d+", "a number")]
    inner: Inner
    many: dict[str, Inner]
    model: dict[str, Any]
    free: int
    settings: dict[str, Any]  # of no plug-in


GOOD: dict[str, Any] = {
    "count": 1,
    "jobs": ["1", "22"],
    "inner": {"share": 0.5},
    "many": {"a": {"share": 0}},
    "free": -1,
    "settings": {"a": 0},
    "model": {"_target_": "tests.pretrain.settings.test_ranges.Plugged", "depth": 1, "name": "x"},
}


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"count": 0}, "count=0 is not allowed: it must be at least 1 and at most 8."),
        ({"count": 9}, "count=9 is not allowed: it must be at least 1 and at most 8."),
        ({"jobs": ["1", "x"]}, "jobs holds 'x', which is not allowed: each must be a number."),
        ({"inner": {"share": 1.0}}, "inner.share=1.0 is not allowed: it must be at least 0 and less than 1."),
        (
            {"inner": {"share": float("nan")}},
            "inner.share=nan is not allowed: it must be a finite number, at least 0 and less than 1.",
        ),
        ({"many": {"a": {"share": -0.1}}}, "many.a.share=-0.1 is not allowed: it must be at least 0 and less than 1."),
        ({"model": GOOD["model"] | {"depth": 0}}, "model.depth=0 is not allowed: it must be at least 1."),
    ],
)
def test_a_value_that_is_not_allowed_is_named_with_what_is(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(Fault) as refused:
        require_allowed(GOOD | values, hints(Outer))
    assert str(refused.value) == sentence


@pytest.mark.parametrize("values", [{}, {"count": None}, {"count": "???"}, {"jobs": []}, {"free": 10**9}])
def test_what_is_allowed_or_not_given_yet_passes(values: dict[str, Any]) -> None:
    require_allowed(GOOD | values, hints(Outer))


def test_infinity_is_within_no_bounds() -> None:
    assert not within(least=0).holds(float("inf")) and within(above=0).holds(1e-9) and not within(above=0).holds(0)
