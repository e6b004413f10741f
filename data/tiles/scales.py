"""At how many microns a pixel a tile is read, where that is drawn anew for each (continuous magnification,
arXiv 2601.02198)."""

from dataclasses import dataclass

from data.keyed import rng

UNIFORM, LOG_UNIFORM = "uniform", "log_uniform"
LAWS = (UNIFORM, LOG_UNIFORM)


@dataclass(frozen=True)
class Scales:
    """µm/px from ``finest`` to ``coarsest``: each alike likely (``uniform``), or each doubling (``log_uniform``)."""

    finest: float
    coarsest: float
    law: str

    def draw(self, seed: int, sample: int) -> float:
        """µm/px of the tile that comes as the run's ``sample``-th."""
        share = float(rng(seed, "mpp", sample).random())
        if self.law == UNIFORM:
            return self.finest + share * (self.coarsest - self.finest)
        return float(self.finest * (self.coarsest / self.finest) ** share)
