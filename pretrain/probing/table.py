"""The scores of a probe as lines for a terminal, with what flatters them said below."""

import math
from typing import Any

from pretrain.probing.given_sides import ON_BOTH_SIDES
from pretrain.probing.splits import ALL_OF_ONE, LIKELY, SAME_SLIDES


def score_table(result: dict[str, Any]) -> str:
    """The scores as lines for a terminal."""
    train, test = result["train"], result["test"]
    lines = [
        (
            f"{result['encoder']['name']}: {train['images']} training and {test['images']} test images "
            f"in {len(result['classes'])} classes ({result['split']})"
        ),
        f"input: {result['encoder']['input']}",
        "",
        f"{'features':<18}{'width':>7}{'k-NN':>16}{'linear':>16}{'RankMe':>9}",
    ]
    for name, got in result["scores"].items():
        linear = accuracy(got["linear"], got["linear_se"]) + (" " if got["linear_converged"] else "*")
        lines.append(
            f"{name:<18}{got['width']:>7}{accuracy(got['knn'], got['knn_se']):>16}{linear:>17}{got['rankme']:>8.1f}"
        )
    lines.append(f"{'largest class':<18}{'':>7}{result['chance']:>8.3f}        {result['chance']:>8.3f}")
    lines.append("")
    for baseline, kinds in result["gains"].items():
        k, linear = kinds["knn"], kinds["linear"]
        lines.append(
            f"gain over {baseline:<18}{k['gain']:>+8.3f} ± {k['se']:.3f}{linear['gain']:>+8.3f} ± {linear['se']:.3f}"
        )
    lines += ["", f"k-NN: {result['method']['knn']}", f"linear: {result['method']['linear']}"]
    lines.append(f"±: one standard error ({result['method']['standard_error']})")
    lines += cautions(result)
    if not all(got["linear_converged"] for got in result["scores"].values()):
        lines.append("*: the linear fit stopped at 1000 iterations before it converged")
    unreadable = len(train["unreadable"]) + len(test["unreadable"])
    if unreadable:
        lines.append(f"{unreadable} images could not be read and were left out; the JSON names them")
    return "\n".join(lines)


def cautions(result: dict[str, Any]) -> list[str]:
    """What flatters the scores, a sentence each."""
    said = []
    if result["split"].startswith(SAME_SLIDES):
        said.append(
            "same slides: tiles of one patient may be on both sides, which flatters every row; give test=, or groups="
            " with their slides"
        )
    if result["split"].startswith(LIKELY):
        said.append("likely other slides: a guess; give test=, or groups= with their slides, to be sure")
    if result["split"].startswith(ALL_OF_ONE):
        said.append(
            "all images are of one patient or slide: these figures and their errors tell nothing of any other, and tiles"
            " that lie side by side flatter every row; give test= of others"
        )
    if ON_BOTH_SIDES in result["split"]:
        said.append(
            "beware: patients or slides of test are in train too, which flatters every row; give a test= without them"
        )
    within, across = result.get("histogram_same_slides"), result["scores"]["colour histogram"]["knn"]
    chance = 3 * math.sqrt(across * (1 - across) / result["test"]["images"])  # three standard errors over tiles
    if (
        within is not None
        and not result["split"].startswith((SAME_SLIDES, ALL_OF_ONE))
        and within - across > max(0.1, chance)
    ):
        said.append(
            f"beware: with tiles of the same slides on both sides the colour histogram reaches {within:.3f}, on others"
            f" {across:.3f}: a random split of these images measures how well slides are recognised"
        )
    return said


def accuracy(value: float, error: float) -> str:
    """``0.613 ± 0.022``."""
    return f"{value:.3f} ± {error:.3f}"
