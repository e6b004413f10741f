"""Several sources as one: data sets, magnifications, stains, each with its weight in the batches."""

from collections.abc import Iterator, Mapping

import numpy as np

from data.tiles.numbering import Numbering
from data.tiles.places import TilePlaces
from data.tiles.source import TileSource, UnreadableTile
from data.tiles.stream import Part


class Mixture(TileSource):
    """The tiles of ``members`` (name → source and weight), numbered on from one to the next.

    Weights are shares of the tiles that are drawn, in any scale; a member's own parts split its share by their weights.
    A small member with a large weight is passed through more often than the others.
    """

    def __init__(self, members: Mapping[str, tuple[TileSource, float]]) -> None:
        self.members = members
        self.sources = [source for source, _ in members.values()]
        self.numbering = Numbering(map(len, self.sources))
        self.parts = [
            Part(part.block_sizes, _share(part, source, weight), f"{name}: {part.name}")
            for name, (source, weight) in members.items()
            for part in source.parts
        ]
        self.digest = "+".join(f"{weight:g}×{source.digest}" for source, weight in members.values())

    def held_out(self) -> "Mixture | None":
        apart = {name: (source.held_out(), weight) for name, (source, weight) in self.members.items()}
        found = {name: (source, weight) for name, (source, weight) in apart.items() if source}
        return Mixture(found) if found else None

    def name(self, number: int) -> str:
        member, own = self.numbering.locate(number)
        return self.sources[member].name(own)

    def slide(self, number: int) -> str | None:
        member, own = self.numbering.locate(number)
        return self.sources[member].slide(own)

    def mpp(self, number: int, seed: int = 0, sample: int = 0) -> float | None:
        member, own = self.numbering.locate(number)
        return self.sources[member].mpp(own, seed, sample)

    def places(self) -> Iterator[TilePlaces]:
        for source in self.sources:
            yield from source.places()

    def read(self, number: int, seed: int = 0, sample: int = 0) -> np.ndarray:
        member, own = self.numbering.locate(number)
        try:
            return self.sources[member].read(own, seed, sample)
        except UnreadableTile as error:
            # The replacement is of the same member, so a bad file costs nothing of the shares.
            following = self.numbering.number(member, error.next % len(self.sources[member]))
            raise UnreadableTile(str(error), following) from error

    def hold(self, blocks: int) -> None:
        for source in self.sources:
            source.hold(blocks)

    def expect(self, numbers: np.ndarray) -> None:
        for member, own in self.numbering.sort_out(numbers):
            self.sources[member].expect(own)


def _share(part: Part, source: TileSource, weight: float) -> float:
    if len(source.parts) == 1:
        return weight
    return weight * part.weight / sum(p.weight for p in source.parts)
