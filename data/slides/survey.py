"""Where a set of slides has tissue, looked at once and kept: what reading slides online begins with.

    <folder>/survey.json                 the settings, the slides, tiles of each, and the slides without any
    <folder>/coordinates/*_patches.h5    each slide's grid and verdicts
    <folder>/thumbnails/*.jpg            a small picture of each slide

Any number of processes may survey into one folder at the same time: each takes the next slide that has no grid yet, in
an order of its own, and whoever ends last writes the same ``survey.json``.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from data.fault import Fault, Notice
from data.files import make_folder, write_whole
from data.json_files import read_object
from data.keyed import rng
from data.parallel import in_processes
from data.slides.coordinates_h5 import coordinates_path, read_tiling, write_tiling
from data.slides.given_tiles import LeftOutTiles, find_coordinates, given_tiles
from data.slides.mpp import SlidesMpp
from data.slides.names import name_slides
from data.slides.reading import Slide
from data.slides.tiling import KEPT, Tiling, TilingSettings, tile_slide, write_thumbnail


@dataclass(frozen=True)
class SurveyedSlide:
    """What came of looking at one slide: its tiling, what of the tiles given for it was left out, and which of its
    statements the user overruled."""

    tiling: Tiling
    left: LeftOutTiles
    overruled: str


@dataclass(frozen=True)
class Surveyed:
    """A survey: per slide with tissue its id, file and number of tiles; ``left_out`` says why others gave none."""

    folder: Path
    settings: TilingSettings
    slides: list[str]
    files: list[str]
    tiles: list[int]
    left_out: dict[str, str]  # file → reason
    digest: str

    def tiling(self, slide: int) -> Tiling:
        """The grid and verdicts of slide number ``slide``."""
        return read_tiling(coordinates_path(self.folder, self.slides[slide]))


def survey(
    job: tuple[Path, str],
    out: Path,
    settings: TilingSettings,
    slides_mpp: SlidesMpp,
    patient_pattern: str = "",
    coordinates: Path | None = None,
) -> SurveyedSlide:
    """Find one slide's tissue, or take the tiles given in the folder ``coordinates``, and write coordinates and
    thumbnail; or read what an earlier run wrote, where that counts as many µm per pixel as the user says now."""
    path, name = job
    written, left, mpp = coordinates_path(out, name), LeftOutTiles(0, 0), slides_mpp.of(path)
    if written.exists():
        try:
            tiling = read_tiling(written)
            if tiling.source == str(path) and mpp in (None, tiling.grid.mpp_level0):
                return SurveyedSlide(tiling, left, "")
        except Fault as fault:
            warnings.warn(f"made again: {fault}", Notice, stacklevel=2)
    with Slide(path) as slide:
        overruled = slide.overruled(mpp)
        if coordinates is None:
            tiling, thumbnail = tile_slide(slide, name, settings, mpp, patient_pattern)
        else:
            file = find_coordinates(coordinates, path, name)
            tiling, thumbnail, left = given_tiles(slide, name, file, settings, mpp, patient_pattern)
    write_thumbnail(out / "thumbnails" / f"{name}.jpg", thumbnail)
    write_tiling(out, tiling)
    return SurveyedSlide(tiling, left, overruled)


def known_survey(folder: Path, paths: list[Path], settings: TilingSettings, slides_mpp: SlidesMpp) -> Surveyed | None:
    """The survey in a folder, or None where there is none yet. Raises Fault where it is one of other slides or
    settings."""
    needs = {"settings", "slides", "files", "tiles", "left_out", "digest"}
    try:
        kept = read_object(folder / "survey.json", needs, "delete it, it is made anew")
    except FileNotFoundError:
        return None
    changed = [
        f"{key} {kept['settings'].get(key)} then, {value} now"
        for key, value in settings.facts().items()
        if kept["settings"].get(key) != value
    ]
    then = kept["settings"].get("slides_mpp", slides_mpp.given)
    if then != slides_mpp.given:
        changed.append(f"slides_mpp {then or 'null'} then, {slides_mpp.given or 'null'} now")
    files = [*kept["files"], *kept["left_out"]]
    if sorted(map(str, paths)) != sorted(files) and {*map(os.path.realpath, paths)} != {*map(os.path.realpath, files)}:
        changed.append("other slides")
    if changed:
        raise Fault(
            f"{folder} holds a survey of another kind ({'; '.join(changed)}): choose another folder for the grids, or"
            " delete it"
        )
    return Surveyed(folder, settings, *(kept[name] for name in ("slides", "files", "tiles", "left_out", "digest")))


def survey_slides(
    folder: Path, paths: list[Path], settings: TilingSettings, slides_mpp: SlidesMpp, workers: int
) -> Iterator[tuple[Path, SurveyedSlide | Fault]]:
    """Look at every slide, yielding each as it is done; afterwards ``survey.json`` is there."""
    for inside in ("coordinates", "thumbnails"):
        make_folder(folder / inside)
    names = name_slides(paths, {})
    # Processes that survey together rarely meet; the result is the same in any order.
    jobs = [list(names.items())[i] for i in rng(os.getpid(), "survey").permutation(len(names))]
    found: dict[Path, Tiling | Fault] = {}
    look = partial(survey, out=folder, settings=settings, slides_mpp=slides_mpp)
    for (path, _), result in in_processes(look, jobs, workers):
        found[path] = result if isinstance(result, Fault) else result.tiling
        yield path, result
    _write(folder, names, found, settings, slides_mpp)


def _write(
    folder: Path,
    names: dict[Path, str],
    found: dict[Path, Tiling | Fault],
    settings: TilingSettings,
    slides_mpp: SlidesMpp,
) -> None:
    slides: list[str] = []
    files: list[str] = []
    tiles: list[int] = []
    left_out: dict[str, str] = {}
    digest = hashlib.blake2b(json.dumps(settings.facts()).encode(), digest_size=16)
    for path, slide in sorted(names.items()):
        tiling = found[path]
        count = tiling.counts()["kept"] if isinstance(tiling, Tiling) else 0
        if isinstance(tiling, Fault) or not count:
            left_out[str(path)] = str(tiling) if isinstance(tiling, Fault) else "no tissue found"
            continue
        slides.append(slide)
        files.append(str(path))
        tiles.append(count)
        # The slide and where its tiles are, not where its file lies: the same on every machine.
        digest.update(f"{slide} {tiling.grid.tile_size_level0} {tiling.verdict.shape}".encode())
        digest.update((tiling.verdict == KEPT).tobytes())
    kept: dict[str, Any] = {
        "settings": settings.facts() | {"slides_mpp": slides_mpp.given},
        "slides": slides,
        "files": files,
        "tiles": tiles,
        "left_out": left_out,
        "digest": digest.hexdigest(),
    }
    write_whole(folder / "survey.json", json.dumps(kept, indent=1, ensure_ascii=False))
