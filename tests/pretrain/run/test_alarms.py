"""Alarms are functions of the record: each speaks on a curve made for it, and none on a healthy one."""

import math

import numpy as np
import pytest

from data.keyed import rng
from pretrain.run import alarms
from pretrain.run.history import Alarm, Facts, History, known_facts

K = 512
KNOWN = Facts({"dino": K}, settled=100, chance_losses={"dino": ("dino_global", "dino_local")})
Curves = dict[str, tuple[np.ndarray, np.ndarray]]


def healthy(steps: int = 2000, every: int = 100) -> Curves:
    """A run that learns: the loss falls, gradients and throughput scatter, features spread a little more from look to
    look."""
    draw, step, look = rng(0, "healthy"), np.arange(1, steps + 1), np.arange(every, steps + 1, every)
    fall = np.exp(-step / 800)
    return {
        "loss": (step, 6 + 4 * fall + 0.2 * draw.normal(size=steps)),
        "dino_global": (step, (4.5 + 1.7 * fall) / 3),
        "dino_local": (step, (4.5 + 1.7 * fall) / 3 * 2),
        "grad_norm": (step, 1 + step / steps + 0.2 * draw.random(steps)),
        "tiles_per_second": (step, 100 + 20 * draw.normal(size=steps)),
        "data_wait": (step, 0.3 * draw.random(steps)),
        "teacher_entropy/dino": (look, 5.0 - look / steps),
        "teacher_information/dino": (look, 0.8 + look / steps),
        "prototype_use/dino": (look, 0.6 + 0.1 * draw.random(len(look))),
        "rankme": (look, 5 + 10 * look / steps),
        "feature_cosine": (look, 0.9 - 0.5 * look / steps),
    }


def record(curves: Curves) -> list[dict[str, float]]:
    """The curves as the lines of metrics.jsonl."""
    lines: dict[int, dict[str, float]] = {}
    for name, (steps, values) in curves.items():
        for step, value in zip(steps.tolist(), values.tolist(), strict=True):
            lines.setdefault(step, {"step": step})[name] = value
    return [lines[step] for step in sorted(lines)]


def found(curves: Curves, known: Facts = KNOWN) -> list[Alarm]:
    return alarms.find_alarms(History(record(curves)), known)


def spoilt(name: str, begin: int, value: float) -> Curves:
    """The healthy run, but for one figure that has another value from a step on."""
    curves = healthy()
    steps, values = curves[name]
    return curves | {name: (steps, np.where(steps >= begin, value, values))}


def test_a_healthy_record_is_silent_at_every_length() -> None:
    lines = record(healthy())
    for length in range(50, len(lines) + 1, 150):
        assert alarms.find_alarms(History(lines[:length]), KNOWN) == [], length


def test_an_empty_record_is_silent() -> None:
    assert alarms.find_alarms(History(), KNOWN) == [] and alarms.find_alarms(History(), Facts({}, 0)) == []


@pytest.mark.parametrize(
    ("figure", "value", "begin", "name", "words"),
    [
        ("teacher_entropy/dino", 0.995 * math.log(K), 1400, "uniform teacher", "entropy 6.21 of at most 6.24 nats since step 1400"),
        ("teacher_entropy/dino", 0.02, 1400, "certain teacher", "one prototype each, without doubt: entropy 0.020 nats since step 1400"),
        ("teacher_information/dino", 0.01, 1400, "same target", "the same for every tile: they tell 0.010 nats about it since step 1400"),
        ("prototype_use/dino", 0.05, 1400, "few prototypes", "5.0% of those that could be, since step 1400"),
        ("rankme", 2.0, 1400, "low rank", "RankMe 2.0 since step 1400"),
        ("feature_cosine", 0.999, 1400, "parallel features", "mean cosine 0.9990 since step 1400"),
        ("loss", 30.0, 1500, "jump of the loss", "to 30.000 or more at step 1500"),
        ("grad_norm", 6.0, 1900, "growing gradient", "the gradient norm is 6 "),
        ("tiles_per_second", 30.0, 1900, "slow", "30 tiles/s since about step"),
        ("data_wait", 0.8, 1900, "waiting for data", "80% of a step goes in waiting for data"),
    ],
)  # fmt: skip
def test_each_ill_raises_its_alarm_alone_and_says_since_when(
    figure: str, value: float, begin: int, name: str, words: str
) -> None:
    (alarm,) = found(spoilt(figure, begin, value))
    assert alarm.name == name and words in alarm.says
    assert begin - 5 <= alarm.since <= begin + 55
    assert "Usually helps: " in alarm.says or "Look at " in alarm.says


def test_a_class_token_loss_at_log_k_is_flat() -> None:
    curves = healthy()
    step = curves["loss"][0]
    flat = {
        "dino_global": (step, np.full(len(step), math.log(K) / 3)),
        "dino_local": (step, np.full(len(step), math.log(K) * 2 / 3)),
    }
    (alarm,) = found(curves | flat)
    assert alarm.name == "flat loss" and alarm.since == 100 and "log K = 6.24 since step 100" in alarm.says


def test_slide_embeddings_have_a_rank_too() -> None:
    look = np.arange(100, 1100, 100)
    (alarm,) = found({"effective_rank": (look, np.where(look < 800, 9.0, 1.2))}, Facts({}, 0))
    assert alarm.name == "low rank" and alarm.since == 800 and "slide embeddings" in alarm.says


def test_what_has_passed_is_not_said_but_for_a_jump() -> None:
    for figure, value in (("rankme", 1.0), ("feature_cosine", 1.0), ("data_wait", 0.9)):
        curves = spoilt(figure, 1000, value)
        steps, values = curves[figure]
        passed = np.where(steps < 1500, values, healthy()[figure][1])
        assert found(curves | {figure: (steps, passed)}) == []
    curves = spoilt("loss", 1000, 30.0)
    steps, values = curves["loss"]
    (alarm,) = found(curves | {"loss": (steps, np.where(steps < 1010, values, healthy()["loss"][1]))})
    assert alarm.name == "jump of the loss" and alarm.since == 1000


def test_one_bad_look_and_a_single_spike_are_no_alarm() -> None:
    assert found(spoilt("rankme", 2000, 1.0)) == []
    curves = healthy()
    curves["loss"][1][1500] = 50.0
    assert found(curves) == []


def test_nothing_is_said_of_features_before_they_can_be_judged() -> None:
    assert found(spoilt("feature_cosine", 1, 0.999), Facts({"dino": K}, settled=1950)) == []
    assert [alarm.name for alarm in found(spoilt("feature_cosine", 1, 0.999))] == ["parallel features"]


def test_figures_that_are_not_finite_or_no_numbers_are_left_out() -> None:
    history = History(
        [
            {"step": 1, "loss": None},
            {"step": 2, "loss": 1.0, "alarm": "slow"},
            {"step": 3, "loss": math.inf, "done": True},
        ]
    )
    assert history.of("loss")[0].tolist() == [2] and not len(history.of("done")[0]) and not len(history.of("alarm")[0])


def test_the_facts_of_a_configuration() -> None:
    assert known_facts({"dino": 64, "ibot": 32}, 300, {}, {}) == Facts({"dino": 64, "ibot": 32}, 300, {}, {})
    assert known_facts({"dino": 64}, 10**5, {}, {}) == Facts({"dino": 64}, 1000, {}, {})


def test_advice_names_no_setting_that_the_run_has_not_got() -> None:
    says = "it fell. Usually helps: a lower optim.lr, a spread regulariser (objective.spread=koleo, or kde), stronger data.colour."
    known = Facts(
        {}, 0, settings={"optim.lr": 1, "optim.clip": 3, "objective.spread_weight": 0.1, "data.colour.hue": 0}
    )
    assert alarms.that_can_be_taken(says, known) == "it fell. Usually helps: a lower optim.lr, stronger data.colour."
    assert alarms.that_can_be_taken(says, Facts({}, 0, settings={})) == "it fell."
    assert alarms.that_can_be_taken(says, Facts({}, 0)) == says
    says = "it fell. Usually helps: a lower optim.lr, objective.centring=sinkhorn."
    has = {"optim.lr": 1, "objective.centring": "sinkhorn"}
    assert alarms.that_can_be_taken(says, Facts({}, 0, settings=has)) == "it fell. Usually helps: a lower optim.lr."
    assert alarms.that_can_be_taken(says, Facts({}, 0, settings=has | {"objective.centring": "mean"})) == says
