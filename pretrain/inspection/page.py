"""Pictures and numbers as PNG files and one HTML page over them."""

import html
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from data.files import appearing, write_whole


@dataclass
class Page:
    """Pictures and numbers for one HTML page; a picture without words above it tells its own."""

    title: str
    facts: list[tuple[str, str]] = field(default_factory=list)
    pictures: list[tuple[str, str, Image.Image]] = field(default_factory=list)  # file stem, caption, picture


def write_page(out: Path, page: Page) -> None:
    """Write the pictures as PNG and ``index.html`` over them."""
    figures = []
    for stem, caption, picture in page.pictures:
        with appearing(out / f"{stem}.png") as partial:
            picture.save(partial, format="PNG")
        words = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
        figures.append(
            f'<figure>{words}<a href="{stem}.png"><img src="{stem}.png" alt="{html.escape(caption or stem)}"></a></figure>'
        )
    rows = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in page.facts)
    write_whole(
        out / "index.html",
        f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(page.title)}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #282c34; max-width: 1500px; margin: 2em auto; padding: 0 1.5em }}
h1 {{ font-size: 1.5em }} th {{ text-align: left; padding-right: 2em; font-weight: 600; vertical-align: top }}
main {{ display: flex; flex-wrap: wrap; gap: 1.5em; margin-top: 1.5em; align-items: flex-start }}
figure {{ margin: 0 }} figcaption {{ font-weight: 600; margin-bottom: .4em }} img {{ max-width: 100%; border: 1px solid #ddd }}
</style></head><body><h1>{html.escape(page.title)}</h1><table>{rows}</table><main>{"".join(figures)}</main></body></html>
""",
    )
