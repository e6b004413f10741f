"""Write one HTML page about a run: what was trained and how, what it saw, and how good it is. Or one that sets the
runs of a sweep side by side.

The page stands alone: pictures and charts are inside, nothing is fetched, it prints, and it follows the reader's light
or dark setting. It shows the tile grid, the crops, loss curves, tile embeddings as colours on the slide, the slide
encoder's R² beside its baselines, and probe scores. What isn't there is named with the command that makes it.

Examples:

    pretrain report run=runs/tile
    pretrain report run=demo out=demo/report.html
    pretrain report run=runs/tile probe=scores.json embeddings=embeddings shards=shards
    pretrain report run=runs/sweep
    pretrain report run=runs/first beside=[runs/second,runs/sweep] out=compared.html
"""

import shlex
from dataclasses import dataclass, field
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
    beside: Annotated[list[str], ON_DISK] = field(default_factory=list)


def run(config: Config) -> None:
    """Write the page."""
    from pretrain.report.build import build_page
    from pretrain.report.comparison import build_comparison, runs_in, runs_named
    from pretrain.report.road import road_picture

    folder = Path(config.run)
    out = Path(config.out) if config.out else folder / ("compared.html" if config.beside else "report.html")
    require_writable(out)
    several = [*runs_named([config.run]), *runs_named(config.beside)] if config.beside else runs_in(folder)
    if several:
        words = [f"run={folder}", *([f"beside=[{','.join(config.beside)}]"] if config.beside else [])]
        build_comparison(folder.resolve().name, several, out, shlex.join(["pretrain", "report", *words]))
        say(f"{out}: {len(several)} runs side by side, open it in a browser")
        return
    shards, embeddings, probe = (
        Path(given) if given else None for given in (config.shards, config.embeddings, config.probe)
    )
    build_page(folder, out, shards=shards, embeddings=embeddings, probe=probe, plugins=config.allow_plugins)
    say(f"{out}: {out.stat().st_size / 1e6:.1f} MB, open it in a browser")
    if (road := road_picture(folder)) is not None:
        with appearing(out.with_name("road.png")) as partial:
            road.save(partial, format="PNG")
        say(f"{out.with_name('road.png')}: the same road as one picture")
