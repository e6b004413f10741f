"""How often a run looks at what it learns, and when it has waited long enough for more."""

from dataclasses import dataclass
from typing import Annotated

from models.allowed import within


@dataclass
class Watch:
    """The settings under ``watch:`` that both stages have, explained in ``configs/tile.yaml``."""

    every: Annotated[int, within(least=0)]
    patience: Annotated[int | None, within(least=1)]
