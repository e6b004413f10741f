"""Tissue rules by name and by class: they combine, travel to other processes, and what is wrong is said in a
sentence."""

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.fault import Fault
from data.shards.folder import load_plan
from data.slides.coordinates_h5 import coordinates_path, read_tiling
from data.slides.tiling import KEPT
from data.slides.tissue import TISSUE_RULES, TissueRule
from launch.entry import run_command_line
from pretrain.settings.composition import load
from pretrain.settings.tissue_rules import chosen_rules
from tests.data.slides.synthetic_slides import stained, write_slide

OWN = "tests.pretrain.settings.pixel_network.PixelNetwork"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Of a network whose logit is how much redder a pixel is than green, beyond 0.2."""
    network = torch.nn.Conv2d(3, 1, kernel_size=1)
    with torch.no_grad():
        network.weight[:] = torch.tensor([1.0, -1.0, 0.0]).view(1, 3, 1, 1)
        network.bias[:] = -0.2
    torch.save(network.state_dict(), tmp_path / "tissue.pt")
    return tmp_path / "tissue.pt"


def test_rules_take_their_own_shares_or_those_that_are_given() -> None:
    one, other = chosen_rules(["otsu", "hsv"], None)
    assert (one.share, other.share) == (0.25, 0.6) and other.rule is TISSUE_RULES["hsv"]
    assert [needed.share for needed in chosen_rules(["otsu", "hsv"], [0.4, 0.7])] == [0.4, 0.7]


def test_a_rule_of_ones_own_cuts_slides_beside_a_known_one_and_is_remembered_with_its_settings(
    weights: Path, tmp_path: Path
) -> None:
    image = stained(640, 640, [(320, 320, 250)])
    image[:, :320] = image[:, :320].mean(axis=2, keepdims=True)  # dark enough, and not red
    slide = write_slide(tmp_path / "s.tiff", image, 0.5)
    words = ["shard", f"slides={slide}", f"out={tmp_path / 'out'}", "tile_size=64", "workers=1"]
    rule = f"{{_target_: {OWN}, weights: {weights}}}"
    run_command_line([*words, f"tissue=[gigapath,{rule}]", "min_tissue=[0.4,0.9]"])
    tiling = read_tiling(coordinates_path(tmp_path / "out", "s"))
    assert (tiling.verdict == KEPT)[:, 5:].sum() > 10 and not (tiling.verdict == KEPT)[:, :5].any()
    assert (tiling.further[0][tiling.verdict == KEPT] >= 0.9).all()
    made, _ = load_plan(tmp_path / "out")
    assert made["tissue"] == ["gigapath", {"_target_": OWN, "weights": str(weights)}]
    with pytest.raises(SystemExit):
        run_command_line([*words, f"tissue=[gigapath,{rule}]", "min_tissue=[0.4,0.8]"])


def test_a_rule_alone_needs_no_list_and_is_the_same_in_another_process(weights: Path) -> None:
    words = ["slides=s", "out=o", f"tissue={{_target_: {OWN}, weights: {weights}}}", "min_tissue=0.5"]
    config = load("shard", words).object()
    (needed,) = chosen_rules(config.tissue, config.min_tissue)
    image = stained(60, 80, [(40, 30, 20)])
    assert needed.share == 0.5 and 0.1 < needed.mask(image, "s").mean() < 0.5
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(needed)).mask(image, "s"), needed.mask(image, "s"))


class Wrong(TissueRule):
    """Gives a share in place of a mask, and says no scale."""

    min_tissue = 0.5

    def __init__(self, *, mpp: float | None = None) -> None:
        if mpp is not None:
            self.mpp = mpp

    def mask(self, rgb: np.ndarray) -> np.ndarray:
        return rgb.mean(axis=2)


class Failing(TissueRule):
    """Fails as it is told to, or has what isn't allowed."""

    def __init__(self, *, how: str, mpp: float = 8.0, min_tissue: float = 0.1) -> None:
        self.how, self.mpp, self.min_tissue = how, mpp, min_tissue
        self.hidden = (lambda: how) if how == "closure" else None

    def mask(self, rgb: np.ndarray) -> Any:
        if self.how == "raises":
            raise MemoryError("boom\nline two")
        return [[True], [True, False]] if self.how == "ragged" else rgb[..., 0] < 240


class Positional(TissueRule):
    """Takes a threshold in an ordinary way, and so has no settings."""

    mpp, min_tissue = 8.0, 0.5

    def __init__(self, least_red: int = 150) -> None:
        self.least_red = least_red

    def mask(self, rgb: np.ndarray) -> np.ndarray:
        return rgb[..., 0] >= self.least_red


POSITIONAL = "tests.pretrain.settings.test_tissue_rules.Positional"
FAILING = "tests.pretrain.settings.test_tissue_rules.Failing"
WRONG = "tests.pretrain.settings.test_tissue_rules.Wrong"


@pytest.mark.parametrize(
    ("given", "shares", "sentence"),
    [
        (["otsu", "hsv"], [0.4], "min_tissue=[0.4] is 1 long, and tissue= 2: each rule"),
        ([{"_target_": WRONG}], None, f"tissue: {WRONG} doesn't say its mpp"),
        ([{"_target_": FAILING, "how": "", "mpp": True}], None, f"tissue: {FAILING} doesn't say its mpp"),
        ([{"_target_": FAILING, "how": "", "mpp": -1.0}], None, f"tissue: {FAILING} has mpp=-1.0: µm per pixel are"),
        ([{"_target_": FAILING, "how": "", "mpp": float("nan")}], None, f"tissue: {FAILING} has mpp=nan"),
        ([{"_target_": FAILING, "how": "", "min_tissue": 2.0}], None, f"{FAILING} has min_tissue=2.0: a share is 0"),
        ([{"_target_": FAILING, "how": "closure"}], None, f"tissue: {FAILING} can't be sent to other processes"),
        ([{"_target_": WRONG, "scale": 4}], None, f"tissue: {WRONG} has no setting 'scale'; it has mpp."),
        (
            [{"_target_": POSITIONAL, "least_red": 4}],
            None,
            f"tissue: {POSITIONAL} has no setting 'least_red', as the settings of {POSITIONAL} are the arguments behind a"
            " * in its constructor, and least_red isn't one: write it as def __init__(self, …, *, least_red: int).",
        ),
        (
            [{"_target_": POSITIONAL, "red": 4}],
            None,
            "no setting 'red'; it has none: settings are the arguments behind a",
        ),
        ([{"_target_": "data.tiles.stream.Stream"}], None, "data.tiles.stream.Stream is no TissueRule"),
        ([{"_target_": "nowhere.Rule"}], None, "nowhere.Rule can't be imported"),
    ],
)
def test_what_is_wrong_with_rules_is_said_in_a_sentence(given: list[Any], shares: Any, sentence: str) -> None:
    with pytest.raises(Fault, match=re.escape(sentence)):
        chosen_rules(given, shares)


def test_a_mask_that_is_none_is_refused_by_its_rules_name() -> None:
    (needed,) = chosen_rules([{"_target_": WRONG, "mpp": 4.0}], None)
    with pytest.raises(
        Fault, match=r"Wrong.*s\.svs, 20×30 .*float64 \(20, 30\); it must be bool, a value for each pixel"
    ):
        needed.mask(stained(20, 30, []), "s.svs")


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("raises", r"MemoryError: boom line two \(test_tissue_rules\.py:\d+\)"),
        ("ragged", "is a list that is no array; it must be bool"),
    ],
)
def test_a_rule_that_fails_costs_its_slide_a_sentence_and_its_settings_are_not_kept(
    tmp_path: Path, how: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    slide = write_slide(tmp_path / "s.tiff", stained(640, 640, [(320, 320, 250)]), 0.5)
    words = ["shard", f"slides={slide}", f"out={tmp_path / 'out'}", "tile_size=64", "workers=1"]
    with pytest.raises(SystemExit):
        run_command_line([*words, f"tissue={{_target_: {FAILING}, how: {how}}}"])
    shown = capsys.readouterr()
    skipped = " ".join((shown.out + shown.err).split())
    assert re.search(rf"skipped: tissue=.*Failing.*{re.escape(str(slide))}.*{said}", skipped)
    run_command_line([*words, f"tissue={{_target_: {FAILING}, how: well}}"])
    assert load_plan(tmp_path / "out")[0]["tissue"]["how"] == "well"
    with pytest.raises(SystemExit):
        run_command_line([*words, "tissue=otsu"])


def test_what_is_no_rule_is_refused_when_composing() -> None:
    for word in ("tissue=[otsu,otzu]", "tissue=[{target: a}]"):
        with pytest.raises(Fault, match=r"each must be otsu, gigapath, clam, hsv or \{_target_: CLASS\} of yours"):
            load("shard", ["slides=s", "out=o", word])
