"""Features that other programs made, taken over into a store of embeddings."""

from collections.abc import Sequence
from pathlib import Path

from data.embeddings import EmbeddingWriter
from data.fault import Fault
from data.feature_files import import_features, maker, width
from data.files import Refused
from data.slide_mpp import SlidesMpp
from data.slides import Slide
from pretrain.progress import say, track


def made_by(files: dict[str, Path]) -> tuple[tuple[str | None, str | None], int]:
    """What the first file that can be read says of its encoder (`maker`), and the width of its features. Raises Fault where none can."""
    faults = []
    for path in files.values():
        try:
            return maker(path), width(path)
        except Fault as fault:
            faults.append(fault)
    raise faults[0]


def hash_of(encoder: str, said: str | None) -> str:
    """An encoder's hash, as a feature file says it; where it doesn't, its name stands for it."""
    return said or f"imported {encoder}"


def take_over(
    files: dict[str, Path],
    pending: Sequence[str],
    writer: EmbeddingWriter,
    *,
    slides: dict[str, Path],
    slides_mpp: SlidesMpp,
    tile_size_level0: float | None,
) -> dict[str, str]:
    """Add the slides ``pending`` from their feature ``files``; those that can't be are named and returned, each with the reason.

    slides: the slides' own files by their stems, as far as they are at hand, for their µm per pixel; slides_mpp: what overrules these, and tells of the others;
    tile_size_level0: of files that don't say it.
    """
    failed: dict[str, str] = {}
    for slide in track(pending, len(pending), "import", "slides"):
        path = files[slide]
        try:
            (said, hash_), dimensions = maker(path), width(path)
            own = (said or writer.encoder, hash_of(writer.encoder, hash_), dimensions)
            if own != (writer.encoder, writer.encoder_hash, writer.width):
                raise Fault(
                    f"{path} is of another encoder ({said or 'unnamed'}, {own[1]}, {dimensions} wide), not of {writer.encoder} "
                    f"({writer.encoder_hash}, {writer.width} wide): take it over into another folder."
                )
            own_slide = slides.get(path.stem)
            scale = slides_mpp.of(own_slide or path)
            if own_slide is not None:
                with Slide(own_slide) as opened:
                    if overruled := opened.overruled(scale):
                        say(overruled)
                    scale = opened.mpp(scale)
            found = import_features(path, tile_size_level0, mpp_level0=scale)
            writer.add(
                slide, found.embeddings, found.coordinates, found.tile_size_level0, found.mpp,
                tile_size=found.tile_size, slide_width=found.slide_width, slide_height=found.slide_height,
            )  # fmt: skip
        except Refused:
            raise
        except Fault as fault:
            failed[slide] = str(fault)
            say(f"left out: {fault}")
    return failed
