"""The slides that a user names, as a source of tiles to embed: under the ids and at the µm per pixel of earlier
runs."""

from pathlib import Path

from data.embeddings.sources import SlideSource
from data.embeddings.store import EmbeddingWriter
from data.fault import Fault
from data.slides.lists import list_slides
from data.slides.mpp import SAME_MPP, SlidesMpp
from data.slides.names import name_slides
from data.slides.tiling import TilingSettings
from pretrain.run.progress import say


def named_slides(
    given: list[str], settings: TilingSettings, slides_mpp: SlidesMpp, writer: EmbeddingWriter
) -> SlideSource:
    """The slides that ``given`` names; those embedded before keep their ids. Raises Fault as `hold_to_embedded_mpp`."""
    paths = list_slides(given)
    if some := slides_mpp.tells_of(paths):
        say(some)
    names = name_slides(paths, writer.sources())
    hold_to_embedded_mpp(writer, names, slides_mpp)
    for path, slide in names.items():
        if slide != path.stem:
            say(f"called {slide}: {path}")
    return SlideSource(names, settings, slides_mpp)


def hold_to_embedded_mpp(
    writer: EmbeddingWriter, names: dict[Path, str], slides_mpp: SlidesMpp, same: float = SAME_MPP
) -> None:
    """Raise Fault where a slide was embedded before as one of other µm per pixel than the user says now."""
    for path, slide in names.items():
        mpp, then = slides_mpp.of(path), writer.mpp_level0(slide)
        if mpp is not None and then is not None and abs(then / mpp - 1) > same:
            raise Fault(
                f"{path} was embedded as one of {then:.4g} µm per pixel, and slides_mpp= says {mpp:g} now: "
                f"choose another folder than out={writer.folder}"
            )
