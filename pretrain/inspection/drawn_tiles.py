"""Tiles drawn at random from wherever they lie: a sheet of them, what the network would see of some, and which can't be
read."""

from dataclasses import dataclass, field

import numpy as np

from data.fault import Fault
from pretrain.inspection.page import Page
from pretrain.inspection.slides import contact_sheet
from pretrain.inspection.views import recipe_settings, seen

SEEN = 8  # tiles whose views are shown
SAID = 10  # unreadable tiles that are named; the rest are counted


@dataclass
class DrawnTiles:
    """Tiles (H, W, 3) uint8 with a caption each, and a sentence about each that can't be read."""

    tiles: list[np.ndarray] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)

    def add(self, tile: np.ndarray, caption: str) -> None:
        self.tiles.append(tile)
        self.captions.append(caption)

    def show(self, page: Page, recipe: str | None, seed: int, further: str = "") -> None:
        """Put them on a page, and the views that ``recipe`` makes of some (None: none). Raises Fault where not one can
        be read, with a ``further`` sentence."""
        if self.bad and not self.tiles:
            raise Fault(f"not one of {len(self.bad)} tiles can be read: {self.bad[0]}{further}")
        if self.bad:
            page.facts.append(("unreadable", f"{len(self.bad)} of the {len(self.bad) + len(self.tiles)} tiles drawn"))
            page.facts += [("", sentence) for sentence in self.bad[:SAID]]
        sheet = contact_sheet(self.tiles, self.captions)
        page.pictures.append(("sheet", f"{len(self.tiles)} tiles drawn at random", sheet))
        if recipe is not None:
            at = np.linspace(0, len(self.tiles) - 1, min(SEEN, len(self.tiles))).astype(int)
            words = (
                f"What the network sees under recipe={recipe}: a tile a row, global views with masked patches grey, then"
                " local views"
            )
            some = [self.tiles[number] for number in at]
            page.pictures.append(("seen", words, seen(some, recipe_settings(recipe), seed)))
