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


def slide_table(result: dict[str, Any]) -> str:
    """The table, what is beside it, and what was left out."""
    labels, measures = result["labels"], result["measures"]
    kind = {"classes": f"{len(labels['classes'])} classes", "number": "a number", "survival": "time and event"}
    width = max(map(len, result["rows"])) + 2
    lines = [
        f"{labels['slides']} slides of {labels['cases']} cases, labelled with {kind[labels['kind']]}",
        "",
        f"{'':<{width}}" + "".join(f"{TITLES[name]:>27}" for name in measures) + f"{'above the mean':>29}",
    ]
    for name, row in result["rows"].items():
        cells = "".join(f"{with_interval(row[measure]['value'], row[measure]['interval']):>27}" for measure in measures)
        first = row[result["measure"]]
        lines.append(
            f"{name:<{width}}{cells}{with_interval(first['above_mean'], first['above_mean_interval'], '+'):>29}"
        )
    lines += ["", *result["how"], *labels["said"]]
    return "\n".join(lines)


def with_interval(value: float | None, interval: list[float | None], sign: str = "") -> str:
    """``0.612 (0.540 to 0.671)``, a dash where it can't be told."""
    low, high = interval
    if value is None or low is None or high is None:
        return "–"
    return f"{value:{sign}.3f} ({low:{sign}.3f} to {high:{sign}.3f})"
