"""Write one HTML page about a run: what was trained and how, what it saw, and how good it is.

The page stands alone: pictures and charts are inside, nothing is fetched, it prints, and it follows the reader's light
or dark setting. It shows the tile grid, the crops, loss curves, tile embeddings as colours on the slide, the slide
encoder's R² beside its baselines, and probe scores. What isn't there is named with the command that makes it.

Examples:

    pretrain report run=runs/tile
    pretrain report run=demo out=demo/report.html
    pretrain report run=runs/tile probe=scores.json embeddings=embeddings shards=shards
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from data.files import appearing, require_writable
from models.allowed import ON_DISK
from pretrain.run.progress import say


@dataclass
class Config:
    run: Annotated[str, ON_DISK]
    out: Annotated[str | None, ON_DISK]
    shards: Annotated[str | None, ON_DISK]
    embeddings: Annotated[str | None, ON_DISK]
    probe: Annotated[str | None, ON_DISK]
    allow_plugins: list[str]


def run(config: Config) -> None:
    """Write the page."""
    from pretrain.report.build import build_page
    from pretrain.report.road import road_picture

    folder = Path(config.run)
    out = Path(config.out) if config.out else folder / "report.html"
    require_writable(out)
    shards, embeddings, probe = (
        Path(given) if given else None for given in (config.shards, config.embeddings, config.probe)
    )
    build_page(folder, out, shards=shards, embeddings=embeddings, probe=probe, plugins=config.allow_plugins)
    say(f"{out}: {out.stat().st_size / 1e6:.1f} MB, open it in a browser")
    if (road := road_picture(folder)) is not None:
        with appearing(out.with_name("road.png")) as partial:
            road.save(partial, format="PNG")
        say(f"{out.with_name('road.png')}: the same road as one picture")
