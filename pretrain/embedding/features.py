"""Features that other programs made, taken over into a store of embeddings."""

from collections.abc import Sequence
from pathlib import Path

from data.embeddings.feature_files import import_features, maker, width
from data.embeddings.store import EmbeddingWriter
from data.fault import Fault
from data.files import Refused
from data.slides.mpp import ISOTROPIC, SlidesMpp
from data.slides.reading import Slide
from pretrain.run.progress import say, track

SHORT_ONE_BY_ONE = 20  # slides with rows left out that are said one by one


def made_by(files: dict[str, Path], encoder: str | None) -> tuple[tuple[str | None, str | None], int]:
    """What the first file that can be read and has tiles says of its encoder (`maker`), and the width of its features.
    Raises Fault where there is none."""
    faults = []
    for path in files.values():
        try:
            if dimensions := width(path, encoder):
                return maker(path, encoder), dimensions
        except Fault as fault:
            faults.append(fault)
    raise faults[0] if faults else Fault("none of the feature files has a tile in it: there is nothing to take over.")


def hash_of(encoder: str, said: str | None) -> str:
    """An encoder's hash, as a feature file says it; where it doesn't, its name stands for it."""
    return said or f"imported {encoder}"


def under_kept_names(
    files: dict[str, Path], mine: list[str], writer: EmbeddingWriter
) -> tuple[dict[str, Path], list[str]]:
    """The files by their slides' ids, and this job's ids. A name once given is kept: stores that were made before ids
    were safe have the files' stems. A name that isn't the file's is said."""
    files = files | {path.stem: path for path in files.values() if writer.done(path.stem)}
    mine = [files[slide].stem if files[slide].stem in files else slide for slide in mine]
    for slide in mine:
        if slide != files[slide].stem:
            say(f"called {slide}: {files[slide]}")
    return files, mine


def add_slides(
    files: dict[str, Path],
    pending: Sequence[str],
    writer: EmbeddingWriter,
    *,
    slides: dict[str, Path],
    slides_mpp: SlidesMpp,
    tile_size_level0: float | None,
    mpp: float | None,
    unit: str | None,
    encoder: str | None,
    max_bad_fraction: float,
) -> tuple[dict[str, str], dict[str, str]]:
    """Add the slides ``pending`` from their feature ``files``; returns what became of each that was, and why each of
    the others was left out, by slide; both are said.

    Rows that aren't finite in float16, or whose place has a row already, are left out and counted, up to
    ``max_bad_fraction`` of a slide's and in any case one.

    slides: the slides' own files by their stems, as far as they are at hand, for their µm per pixel; slides_mpp: what
    overrules these, and tells of the others; tile_size_level0, mpp, unit: of files that don't say it; encoder: whose
    features are taken, where a file has several's.
    """
    results: dict[str, str] = {}
    failed: dict[str, str] = {}
    short = 0  # slides with rows left out
    for slide in track(pending, len(pending), "import", "slides"):
        path = files[slide]
        try:
            (said, hash_), dimensions = maker(path, encoder), width(path, encoder) or writer.width
            own = (said or writer.encoder, hash_of(writer.encoder, hash_), dimensions)
            if own != (writer.encoder, writer.encoder_hash, writer.width):
                raise Fault(
                    f"{path} is of another encoder ({said or 'unnamed'}, {own[1]}, {dimensions} wide), not of"
                    f" {writer.encoder} ({writer.encoder_hash}, {writer.width} wide): take it over into another folder."
                )
            own_slide = slides.get(path.stem)
            scale = overrule = slides_mpp.of(own_slide or path)
            if own_slide is not None:
                with Slide(own_slide) as opened:
                    if overruled := opened.overruled(scale):
                        say(overruled)
                    scale = opened.mpp(scale)
            imported = import_features(path, tile_size_level0, mpp, scale, unit=unit, encoder=encoder)
            found, bad = imported.slide, imported.not_finite + imported.double
            rows = len(found.coordinates) + bad
            then = found.mpp * found.tile_size / found.tile_size_level0
            if overrule is not None and then and abs(then / overrule - 1) > ISOTROPIC:
                raise Fault(
                    f"{path} says itself that a level-0 pixel is {then:.4g} µm wide, and slides_mpp= says {overrule:g}:"
                    " leave slides_mpp= out for it, or make the features again."
                )
            left = (
                f"{imported.not_finite} rows that aren't finite in float16 and {imported.double} of places that came"
                " twice"
            )
            if bad > max(1, max_bad_fraction * rows):
                raise Fault(
                    f"{path} has, among {rows}, {left}: make it again, or allow it with"
                    f" max_bad_fraction={bad / rows:.3g}."
                )
            writer.add(
                slide,
                found.embeddings.reshape(-1, writer.width),
                found.coordinates,
                found.tile_size_level0,
                found.mpp,
                tile_size=found.tile_size,
                slide_width=found.slide_width,
                slide_height=found.slide_height,
            )
            results[slide] = f"{rows - bad} tiles" + (f"; left out: {left}" if bad else "")
            if bad:
                short += 1
                if short <= SHORT_ONE_BY_ONE:
                    say(f"{path}: left out {left}")
        except Refused:
            raise
        except Fault as fault:
            failed[slide] = str(fault)
            say(f"left out: {fault}")
    if short > SHORT_ONE_BY_ONE:
        say(f"… and rows of {short - SHORT_ONE_BY_ONE} more slides; the last line of output has them all")
    return results, failed
