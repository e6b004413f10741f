"""Drawings as inline SVG that follows the page: its fonts, and its colours in light, in dark and in print.

matplotlib draws in placeholder colours; each is replaced by a CSS variable of the page, so one drawing serves all
themes.
"""

import hashlib
import io
import re
from collections.abc import Sequence
from typing import Any

# Placeholder → CSS variable. The page defines them (page.py): violet and pink are haematoxylin's and eosin's.
INK, FAINT, VIOLET, PINK, TEAL, OCHRE = "#010101", "#020202", "#030303", "#040404", "#050505", "#060606"
STYLE_VARIABLES = {INK: "ink", FAINT: "faint", VIOLET: "violet", PINK: "pink", TEAL: "teal", OCHRE: "ochre"}
LINE_COLOURS = (VIOLET, PINK, TEAL, OCHRE)
WIDTH = 9.6  # inches; the page scales the drawing to its column


def charts(drawn: Sequence[str], columns: int) -> str:
    """Drawings in rows of ``columns``, of half as many where the page is narrow."""
    return f'<div class="charts" style="--columns:{columns};--narrow:{max(1, columns // 2)}">{"".join(drawn)}</div>'


def pyplot() -> Any:
    """matplotlib without a display, in the page's sober style."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "slidewright",
            "font.size": 9.5,
            "text.color": INK,
            "axes.edgecolor": FAINT,
            "axes.labelcolor": INK,
            "axes.labelsize": 9,
            "axes.titlesize": 10,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.linewidth": 0.8,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.grid.axis": "y",
            "axes.axisbelow": True,
            "axes.formatter.limits": (-9, 9),
            "axes.formatter.useoffset": False,
            "grid.color": FAINT,
            "grid.alpha": 0.35,
            "grid.linewidth": 0.6,
            "xtick.color": FAINT,
            "ytick.color": FAINT,
            "xtick.labelcolor": INK,
            "ytick.labelcolor": INK,
            "xtick.labelsize": 8.5,
            "ytick.labelsize": 8.5,
            "legend.frameon": False,
            "legend.fontsize": 8.5,
            "figure.facecolor": "none",
            "axes.facecolor": "none",
        }
    )
    return plt


def svg(figure: Any) -> str:
    """The figure as an ``<svg>`` element without fixed size, its colours the page's variables."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    pyplot().close(figure)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'\s*xmlns:\w+="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r"font: ([^;\"]*?)(\d[\d.]*px) [^;\"]*", r"font: \1\2 var(--sans)", text)
    for colour, variable in STYLE_VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    return own_ids(text)


def own_ids(text: str) -> str:
    """Drop every id that the drawing doesn't refer to, and make the others its own, so that drawings share one page."""
    used = set(re.findall(r"""(?:href="|url\()#([^")]+)""", text))
    mark = hashlib.sha256(text.encode()).hexdigest()[:8]
    text = re.sub(r' id="([^"]*)"', lambda found: f' id="{mark}-{found[1]}"' if found[1] in used else "", text)
    return re.sub(r"""(href="|url\()#""", rf"\g<1>#{mark}-", text)
