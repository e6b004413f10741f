"""Pictures and numbers as PNG files and one HTML page over them."""

from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from data.files import appearing, write_whole
from pretrain.pages import page as paper


@dataclass
class Page:
    """Pictures and numbers for one HTML page; a picture without words below it tells its own."""

    title: str
    facts: list[tuple[str, str]] = field(default_factory=list)
    pictures: list[tuple[str, str, Image.Image]] = field(default_factory=list)  # file stem, caption, picture


def write_page(out: Path, page: Page) -> None:
    """Write the pictures as PNG and ``index.html`` over them."""
    figures = []
    for stem, caption, picture in page.pictures:
        with appearing(out / f"{stem}.png") as partial:
            picture.save(partial, format="PNG")
        figures.append(paper.figure(paper.linked_picture(f"{stem}.png", picture, caption or stem), caption))
    write_whole(
        out / "index.html",
        paper.document(
            title=page.title,
            kicker="Slidewright inspection",
            lead="",
            opening=paper.fact_list(page.facts),
            sections=[paper.Section("pictures", "Pictures", "\n".join(figures))],
            footer="Written by <code>pretrain inspect</code>. Not a medical device.",
        ),
    )
