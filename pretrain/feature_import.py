"""Features that other programs made, taken over into a store of embeddings."""

from collections.abc import Sequence
from pathlib import Path

from data.embeddings import EmbeddingWriter
from data.fault import Fault
from data.feature_files import import_features, maker, width
from data.slides import Slide
from pretrain.progress import say, track


def take_over(
    files: dict[str, Path],
    pending: Sequence[str],
    writer: EmbeddingWriter,
    *,
    slides: dict[str, Path],
    slides_mpp: float | None,
    tile_size_level0: float | None,
) -> dict[str, str]:
    """Add the slides ``pending`` from their feature ``files``; those that can't be are named and returned, each with the reason.

    slides: the slides' own files, as far as they are at hand, for their µm per pixel; slides_mpp: that of all others;
    tile_size_level0: of files that don't say it.
    """
    failed: dict[str, str] = {}
    for slide in track(pending, len(pending), "import", "slides"):
        path = files[slide]
        try:
            (said, _), dimensions = maker(path), width(path)
            if (said or writer.encoder) != writer.encoder or dimensions != writer.width:
                raise Fault(
                    f"{path} is of another encoder ({said or 'unnamed'}, {dimensions} wide), not of {writer.encoder} ({writer.width} wide): "
                    "take it over into another folder."
                )
            scale = slides_mpp
            if slide in slides:
                with Slide(slides[slide]) as opened:
                    scale = opened.mpp(slides_mpp)
            found = import_features(path, tile_size_level0, mpp_level0=scale)
            writer.add(
                slide, found.embeddings, found.coordinates, found.tile_size_level0, found.mpp,
                tile_size=found.tile_size, slide_width=found.slide_width, slide_height=found.slide_height,
            )  # fmt: skip
        except Fault as fault:
            failed[slide] = str(fault)
            say(f"left out: {fault}")
    return failed
