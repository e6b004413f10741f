"""The paper of every page: one HTML document with its style inside, and the few elements that sections are made of.

Nothing is fetched: a report's pictures are data URIs, an inspection's lie beside its page; charts are inline SVG, fonts
are the reader's own.
"""

import base64
import html
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from PIL import Image

STYLE = """
:root {
  --paper: #fdfcfb; --card: #f5f2f3; --ink: #221c26; --soft: #5f5766; --faint: #a79fae; --rule: #ddd6df;
  --violet: #5a3b98; --pink: #c2436f; --teal: #1f7f86; --ochre: #a8741a;
  --serif: Charter, "Bitstream Charter", "Iowan Old Style", "Palatino Linotype", Georgia, serif;
  --sans: system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif;
  --mono: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  color-scheme: light dark;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --paper: #17141a; --card: #211d26; --ink: #ece7ef; --soft: #b0a7b8; --faint: #756c7e; --rule: #3a3341;
    --violet: #b79cf0; --pink: #f08aac; --teal: #6cc7cd; --ochre: #e0b25f;
  }
}
* { box-sizing: border-box; }
html { background: var(--paper); }
body { margin: 0 auto; padding: 3.5rem 1.5rem 5rem; max-width: 62rem; background: var(--paper); color: var(--ink);
  font: 1.0625rem/1.6 var(--serif); text-rendering: optimizeLegibility; }
h1, h2, h3, p, ul.missing, dl.facts { max-width: 42rem; }
h1 { font-size: 2.3rem; line-height: 1.15; font-weight: 600; letter-spacing: -.015em; margin: 0 0 .6rem; }
h2 { font-size: 1.45rem; line-height: 1.25; font-weight: 600; margin: 3.6rem 0 .7rem; padding-top: 1rem; border-top: 1px solid var(--rule); max-width: none; }
h3 { font: 600 .95rem/1.4 var(--sans); margin: 2rem 0 .5rem; }
p { margin: 0 0 1rem; }
.kicker { font: 600 .78rem/1 var(--sans); letter-spacing: .09em; text-transform: uppercase; color: var(--pink); margin: 0 0 1rem; }
.lead { font-size: 1.2rem; line-height: 1.5; color: var(--soft); }
a { color: var(--violet); text-underline-offset: .15em; }
nav { font: .9rem/1.9 var(--sans); margin: 1.6rem 0 0; }
nav a { margin-right: 1.1rem; text-decoration: none; white-space: nowrap; }
nav a:hover { text-decoration: underline; }
figure { margin: 1.6rem 0 2rem; }
figure svg, figure img { display: block; max-width: 100%; height: auto; }
figure svg { width: 100%; overflow: visible; }
.charts { display: grid; grid-template-columns: repeat(var(--columns), minmax(0, 1fr)); gap: .8rem 1.2rem; }
figure img { border-radius: 3px; }
figure img.crisp { image-rendering: pixelated; }
figcaption { font: .87rem/1.5 var(--sans); color: var(--soft); margin-top: .7rem; max-width: 46rem; }
figcaption b { color: var(--ink); font-weight: 600; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); gap: 1rem; align-items: start; }
.pair img { width: 100%; }
.pair > :only-child { max-width: 34rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font: .92rem/1.45 var(--sans); font-variant-numeric: tabular-nums; }
th, td { padding: .38rem 1.4rem .38rem 0; text-align: left; vertical-align: baseline; border-bottom: 1px solid var(--rule); }
thead th { font-weight: 600; color: var(--soft); border-bottom: 1px solid var(--faint); }
tbody th { font-weight: 400; min-width: 11rem; }
td.number, th.number { text-align: right; white-space: nowrap; }
td:last-child, th:last-child { padding-right: 0; }
tr.ours th, tr.ours td { font-weight: 600; color: var(--violet); }
dl.facts { display: grid; grid-template-columns: max-content 1fr; gap: .35rem 1.6rem; font: .92rem/1.5 var(--sans); margin: 0 0 1.4rem; }
dl.facts dt { color: var(--soft); }
dl.facts dd { margin: 0; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
code, pre { font-family: var(--mono); font-size: .86em; }
code { background: var(--card); padding: .1em .32em; border-radius: 3px; overflow-wrap: anywhere; }
pre { background: var(--card); padding: 1rem 1.2rem; border-radius: 4px; overflow-x: auto; line-height: 1.5; font-size: .8rem; }
details { margin: 0 0 1rem; }
summary { cursor: pointer; font: .92rem/1.6 var(--sans); color: var(--violet); }
ul.missing { padding-left: 1.1rem; }
footer { margin-top: 4rem; padding-top: 1rem; border-top: 1px solid var(--rule); font: .84rem/1.5 var(--sans); color: var(--soft); }
@media screen and (max-width: 44rem) {
  figure { overflow-x: auto; }
  figure svg { min-width: 40rem; }
  figure .charts { grid-template-columns: repeat(var(--narrow), minmax(0, 1fr)); }
  figure .charts svg { min-width: 0; }
  figcaption { position: sticky; left: 0; }
  th, td { padding-right: .9rem; }
  tbody th { min-width: 7rem; }
}
@media print {
  body { max-width: none; padding: 0; font-size: 10.5pt; }
  nav { display: none; }
  h2, h3 { break-after: avoid; }
  figure, table, dl.facts { break-inside: avoid; }
  figure img { max-height: 15cm; width: auto; }
  :root { --paper: white; }
  a { color: inherit; text-decoration: none; }
  details:not([open]) { display: none; }
  @page { margin: 18mm; }
}
"""


@dataclass(frozen=True)
class Section:
    """A part of the page: an anchor, a heading, and its HTML."""

    anchor: str
    heading: str
    body: str


def document(title: str, kicker: str, lead: str, opening: str, sections: Sequence[Section], footer: str) -> str:
    """The whole page. ``title``, ``kicker`` and ``lead``, which may be empty, are text; ``opening``, sections and
    footer are HTML."""
    first = f'<p class="lead">{escape(lead)}</p>\n' if lead else ""
    links = " ".join(f'<a href="#{section.anchor}">{escape(section.heading)}</a>' for section in sections)
    body = "\n".join(
        f'<section id="{section.anchor}">\n<h2>{escape(section.heading)}</h2>\n{section.body}\n</section>'
        for section in sections
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<p class="kicker">{escape(kicker)}</p>
<h1>{escape(title)}</h1>
{first}{opening}
<nav aria-label="Sections">{links}</nav>
</header>
<main>
{body}
</main>
<footer>{footer}</footer>
</body>
</html>
"""


def escape(text: object) -> str:
    """Text as HTML."""
    return html.escape(str(text))


def prose(text: str) -> str:
    """Text as HTML with a printer's apostrophe."""
    return escape(re.sub(r"(?<=\w)'(?=\w|\s)", "’", text))


def paragraph(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{prose(text)}</p>"


def sentences(told: Iterable[str]) -> str:
    """What is told without a capital and a full stop, a paragraph each."""
    return "".join(paragraph(f"{one[0].upper()}{one[1:]}.") for one in told)


def figure(content: str, caption: str, lead: str = "") -> str:
    """A figure: HTML content, and a caption, if any, whose first words ``lead`` stand out."""
    head = f"<b>{prose(lead)}</b> " if lead else ""
    words = f"<figcaption>{head}{prose(caption)}</figcaption>" if head or caption else ""
    return f"<figure>{content}{words}</figure>"


def picture_tag(image: Image.Image, alternative: str, crisp: bool = False) -> str:
    """A picture inside the page: PNG where every pixel counts (``crisp``), otherwise JPEG."""
    buffer = io.BytesIO()
    if crisp:
        image.save(buffer, format="PNG", optimize=True)
    else:
        image.convert("RGB").save(buffer, format="JPEG", quality=88)
    kind = "png" if crisp else "jpeg"
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return _img(f"data:image/{kind};base64,{data}", image, alternative, ' class="crisp"' if crisp else "")


def linked_picture(file: str, image: Image.Image, alternative: str) -> str:
    """A picture in a file beside the page, which leads to it in its full size."""
    return f'<a href="{escape(file)}">{_img(escape(file), image, alternative)}</a>'


def _img(source: str, image: Image.Image, alternative: str, marks: str = "") -> str:
    size = f'width="{image.width}" height="{image.height}"'
    return f'<img{marks} src="{source}" {size} alt="{escape(alternative)}">'


def pair(*pictures: str) -> str:
    """Pictures side by side where the page is wide enough."""
    return f'<div class="pair">{"".join(f"<div>{one}</div>" for one in pictures)}</div>'


def html_table(head: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "", ours: int | None = None) -> str:
    """A table whose first column names its rows and whose other columns hold numbers; ``ours`` is the row that is
    judged. Its caption stays where it is as a wide table scrolls."""
    cells = "".join(f'<th scope="col"{number_class(i)}>{escape(name)}</th>' for i, name in enumerate(head))
    body = []
    for index, row in enumerate(rows):
        columns = "".join(f"<td{number_class(i)}>{escape(value)}</td>" for i, value in enumerate(row) if i)
        marks = ' class="ours"' if index == ours else ""
        body.append(f'<tr{marks}><th scope="row">{escape(row[0])}</th>{columns}</tr>')
    table = f"<table><thead><tr>{cells}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    return figure(f'<div class="scroll">{table}</div>', caption)


def number_class(column: int) -> str:
    """The class of a column of numbers, which all but the first are."""
    return ' class="number"' if column else ""


def fact_list(pairs: Iterable[tuple[str, str]]) -> str:
    """Names and values."""
    return (
        f'<dl class="facts">{"".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in pairs)}</dl>'
    )


def folded(summary: str, content: str) -> str:
    """HTML behind a line that opens it."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def preformatted(text: str) -> str:
    """Text in the lines that it has."""
    return f"<pre>{escape(text)}</pre>"


def missing(wants: Iterable[tuple[str, str]]) -> str:
    """What isn't there yet: (a sentence, the command that makes it)."""
    items = "".join(f"<li>{escape(sentence)} <code>{escape(command)}</code></li>" for sentence, command in wants)
    return f'<ul class="missing">{items}</ul>'
