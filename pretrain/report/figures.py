"""A run's charts: small multiples of curves over steps, and dots with their errors."""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pretrain.pages.drawing import FAINT, INK, LINE_COLOURS, VIOLET, WIDTH, charts, pyplot, svg

MOST_POINTS = 600
LETTERS_PER_INCH = 11  # of a bold title, beside its axis


@dataclass
class Panel:
    """One small chart: lines by name over steps, each steps (n,) and values (n,)."""

    title: str
    lines: dict[str, tuple[np.ndarray, np.ndarray]]
    unit: str = ""
    dashed: set[str] = field(default_factory=set)  # lines that are something to compare with
    smooth: bool = True  # show a running mean over the faint raw line
    faint: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)  # further lines, behind and unnamed


def curves(panels: Sequence[Panel], columns: int, height: float = 2.1) -> str:
    """Small multiples of curves over steps, ``columns`` a row, half as many where the page is narrow: an SVG each."""
    plt, drawn = pyplot(), []
    for panel in panels:
        figure, axis = plt.subplots(figsize=(WIDTH / columns, height), layout="constrained")
        draw_panel(axis, panel, int(LETTERS_PER_INCH * WIDTH / columns))
        axis.set_xlabel("step")
        drawn.append(svg(figure))
    return charts(drawn, columns)


def draw_panel(axis: Any, panel: Panel, letters: int) -> None:
    """One panel: lines in the order given, named in a legend where there are several; its title in lines of so many
    letters."""
    exponent = common_exponent([values for _, values in (*panel.lines.values(), *panel.faint.values())])
    unit = " ".join(part for part in (f"×10{superscript(exponent)}" if exponent else "", panel.unit) if part)
    for steps, values in panel.faint.values():
        axis.plot(*thin(steps, values / 10.0**exponent), color=FAINT, alpha=0.6, linewidth=0.8)
    for (name, (steps, values)), colour in zip(panel.lines.items(), LINE_COLOURS, strict=False):
        values = values / 10.0**exponent
        style: dict[str, Any] = (
            {"linestyle": (0, (4, 2)), "linewidth": 1.2} if name in panel.dashed else {"linewidth": 1.5}
        )
        if panel.smooth and len(steps) >= 60:
            axis.plot(*thin(steps, values), color=colour, alpha=0.28, linewidth=0.7)
            values = running_mean(values, max(2, len(values) // 60))
        if len(steps) <= 12:
            style |= {"marker": "o", "markersize": 3.5}
        axis.plot(*thin(steps, values), color=colour, label=name, **style)
    axis.set_title(textwrap.fill(panel.title + (f" ({unit})" if unit else ""), letters))
    if len(panel.lines) > 2:
        axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    elif len(panel.lines) == 2:
        axis.legend()
    axis.margins(x=0.01)


def common_exponent(series: Sequence[np.ndarray]) -> int:
    """The power of ten to take out of very small or very large values, 0 where they read well as they are."""
    largest = max(
        (float(np.nanmax(np.abs(values[np.isfinite(values)]), initial=0.0)) for values in series), default=0.0
    )
    return 0 if largest == 0 or 0.01 <= largest < 1e5 else math.floor(math.log10(1.01 * largest))


def superscript(exponent: int) -> str:
    """``-3`` → ``"⁻³"``."""
    return str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def dots(
    rows: Sequence[str], panels: dict[str, list[tuple[float, float]]], marks: dict[str, float], errors: float
) -> str:
    """Values with error bars, one row each, one panel a kind, as SVG.

    ``panels[kind][i]`` is (value, standard error) of ``rows[i]``; ``marks`` are values to compare with, dashed. The
    bars are so many standard ``errors`` to each side. The first row is the one that is judged.
    """
    plt = pyplot()
    height = 0.55 + 0.36 * len(rows)
    figure, axes = plt.subplots(
        1, len(panels), figsize=(WIDTH, height), squeeze=False, sharey=True, layout="constrained"
    )
    figure.get_layout_engine().set(w_pad=0.15)
    places = np.arange(len(rows))[::-1]
    for axis, (kind, values) in zip(axes.flat, panels.items(), strict=True):
        for place, (value, error), first in zip(places, values, [True] + [False] * len(rows), strict=False):
            colour = VIOLET if first else INK
            axis.errorbar(value, place, xerr=errors * error, fmt="o", markersize=5, color=colour, elinewidth=1.2)
            axis.annotate(
                f"{value:.3f}",
                (value, place),
                (0, 6),
                textcoords="offset points",
                ha="center",
                color=colour,
                fontsize=9,
            )
        for name, value in marks.items():
            axis.axvline(value, color=FAINT, linestyle=(0, (4, 2)), linewidth=1)
            axis.annotate(
                name, (value, len(rows) - 0.45), (3, 0), textcoords="offset points", fontsize=8.5, color=FAINT
            )
        axis.set_title(kind)
        axis.set_ylim(-0.6, len(rows) - 0.1)
        axis.set_yticks(places, rows)
        axis.tick_params(axis="y", length=0)
        axis.grid(visible=True, axis="x")
        axis.grid(visible=False, axis="y")
        axis.margins(x=0.12)
    return svg(figure)


def running_mean(values: np.ndarray, reach: int) -> np.ndarray:
    """The mean over each value and its ``reach`` neighbours to either side, fewer at the ends; only finite ones
    count."""
    finite = np.isfinite(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    count = np.concatenate([[0], np.cumsum(finite)])
    first = np.maximum(np.arange(len(values)) - reach, 0)
    last = np.minimum(np.arange(len(values)) + reach + 1, len(values))
    n = count[last] - count[first]
    return np.where(n > 0, (total[last] - total[first]) / np.maximum(n, 1), np.nan)


def thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most about 600 points that keep every spike: of each stretch its smallest and its largest value."""
    if len(steps) <= MOST_POINTS:
        return steps, values
    kept = {0, len(steps) - 1}
    for part in np.array_split(np.arange(len(steps)), MOST_POINTS // 2):
        if np.isfinite(values[part]).any():
            kept |= {int(part[np.nanargmin(values[part])]), int(part[np.nanargmax(values[part])])}
    chosen = np.array(sorted(kept))
    return steps[chosen], values[chosen]
