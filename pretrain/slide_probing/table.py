"""The rows of a slide probe as lines for a terminal."""

from typing import Any

TITLES = {
    "auroc": "AUROC",
    "balanced_accuracy": "balanced accuracy",
    "quadratic_kappa": "quadratic κ",
    "spearman": "Spearman",
    "r2": "R²",
    "c_index": "c-index",
}


def heads(result: dict[str, Any]) -> list[str]:
    """What the columns behind a row's name hold."""
    return [*(f"{TITLES[name]} (95 % interval)" for name in result["measures"]), "above the mean of tiles"]


def rows_in_words(result: dict[str, Any]) -> list[list[str]]:
    """Each row's name and its figures with their intervals, as `heads` says."""
    rows = []
    for name, row in result["rows"].items():
        first = row[result["measure"]]
        cells = [with_interval(row[measure]["value"], row[measure]["interval"]) for measure in result["measures"]]
        rows.append([name, *cells, with_interval(first["above_mean"], first["above_mean_interval"], "+")])
    return rows


def judged_in_words(result: dict[str, Any]) -> str:
    """What was judged: ``24 slides of 12 cases, labelled with 2 classes``."""
    labels = result["labels"]
    kind = {"classes": f"{len(labels['classes'])} classes", "number": "a number", "survival": "time and event"}
    return f"{labels['slides']} slides of {labels['cases']} cases, labelled with {kind[labels['kind']]}"


def slide_table(result: dict[str, Any]) -> str:
    """The table, what is beside it, and what was left out."""
    labels, measures = result["labels"], result["measures"]
    width = max(map(len, result["rows"])) + 2
    lines = [
        judged_in_words(result),
        "",
        f"{'':<{width}}" + "".join(f"{TITLES[name]:>27}" for name in measures) + f"{'above the mean':>29}",
    ]
    for name, *cells, above in rows_in_words(result):
        lines.append(f"{name:<{width}}{''.join(f'{cell:>27}' for cell in cells)}{above:>29}")
    lines += ["", *result["how"], *labels["said"]]
    return "\n".join(lines)


def with_interval(value: float | None, interval: list[float | None], sign: str = "") -> str:
    """``0.612 (0.540 to 0.671)``, a dash where it can't be told."""
    low, high = interval
    if value is None or low is None or high is None:
        return "–"
    return f"{value:{sign}.3f} ({low:{sign}.3f} to {high:{sign}.3f})"
