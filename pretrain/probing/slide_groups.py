"""Which labelled images are of one patient or slide, so that a split keeps them together.

Tiles of one slide are alike in stain, scanner and focus. With some of them on each side of a split, recognising the
slide passes for recognising the tissue, and of two encoders the one that learned slides looks better.

What says it, in this order: a table of the user's; the files' names; and where both are silent, likeness in what a
slide lends to all its tiles, whatever they show:

    glass      the colour of the brightest pixels
    stains     the directions of the two stains in optical density (Macenko 2009)
    texture    sharpness, and noise of the two colour differences

Groups by likeness are a guess. They cut a slide now and then, and join slides that were stained and scanned together.
"""

import csv
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.fault import Fault
from pretrain.run.progress import track

TCGA = re.compile(r"TCGA-[A-Z0-9]{2}-[A-Z0-9]{4}(?![A-Z0-9])")
PLACED_NAME = re.compile(r"^(?P<slide>.+?)[_-]+[xX]?-?\d+[_-]+[yY]?-?\d+$")
TRAITS = 13
TILES_PER_GROUP = 48
FEWEST_GROUPS = 10
SPARSELY = 7  # every so many pixels tell the stains
TISSUE = 0.45  # summed optical density from which a pixel counts as stained


@dataclass(frozen=True)
class Groups:
    """A group for each of n images, and what they are: ``patients of slides.csv``."""

    of: np.ndarray  # int64 (n,), from 0
    how: str
    known: bool  # False where likeness had to do


def groups_of(files: list[Path], folder: Path, table: Path | None, images: Iterable[np.ndarray | Fault]) -> Groups:
    """Groups of the image files below ``folder``. ``images``: their pixels, uint8 (height, width, 3), or why they can't
    be had; gone through only where nothing else tells.

    Raises Fault where ``table`` lacks a file, or a column.
    """
    if table is not None:
        return by_table(files, folder, table)
    return by_name(files, folder) or by_likeness(images, len(files))


def by_table(files: list[Path], folder: Path, table: Path) -> Groups:
    """By a CSV with a column ``file`` (a path below ``folder``, or a name) and one or both of ``patient`` and
    ``slide``."""
    try:
        with table.open(newline="", encoding="utf-8-sig") as lines:
            reader = csv.DictReader(lines)
            rows, columns = list(reader), reader.fieldnames or []
    except (OSError, ValueError, csv.Error) as error:
        raise Fault(
            f"{table} can't be read as a table ({error}): give a CSV with the columns file and slide"
        ) from error
    column = next((name for name in ("patient", "slide") if name in columns), None)
    if column is None or "file" not in columns:
        raise Fault(
            f"{table} has the columns {', '.join(columns) or 'of no table'}: it needs file, and patient or slide"
        )
    told = {row["file"]: row[column] for row in rows if row["file"] and row[column]}
    names = [told.get(str(file.relative_to(folder)), told.get(file.name)) for file in files]
    lacking = [file for file, name in zip(files, names, strict=True) if name is None]
    if lacking:
        raise Fault(
            f"{table} says no {column} of {len(lacking)} of {len(files)} images, the first is {lacking[0]}: add them,"
            " or leave the table out"
        )
    return Groups(_numbered(names), f"{column}s of {table.name}", known=True)


def by_name(files: list[Path], folder: Path) -> Groups | None:
    """By what every one of the names says: a TCGA patient, ``<slide>_<x>_<y>``, or a folder for each slide inside of
    the classes."""
    found = [TCGA.search(str(file.relative_to(folder))) for file in files]
    if all(found):
        return Groups(_numbered(match[0] for match in found if match), "TCGA's patients, by the names", known=True)
    classes = [file.relative_to(folder).parts[0] for file in files]
    placed = [match["slide"] if (match := PLACED_NAME.match(file.stem)) else "" for file in files]
    if _tell(placed, classes):
        return Groups(_numbered(placed), "slides, by the names", known=True)
    inside = ["/".join(file.relative_to(folder).parts[1:-1]) for file in files]
    if _tell(inside, classes):
        return Groups(_numbered(inside), "slides, by their folders", known=True)
    return None


def _tell(names: list[str], classes: list[str]) -> bool:
    """Whether names say a slide of every image: not one for all (``tile_0_0``, ``images/``), nor the class again."""
    return all(names) and len(set(names)) > 1 and names != classes


def by_likeness(images: Iterable[np.ndarray | Fault], count: int) -> Groups:
    """By what a slide lends to its tiles: k-means over n images' `traits`, one group for each 48 images and at least
    ten."""
    looked_at = track(images, count, "looking for slides", "images")
    return by_traits(np.stack([np.zeros(TRAITS) if isinstance(one, Fault) else traits_of(one) for one in looked_at]))


def by_traits(traits: np.ndarray) -> Groups:
    """As `by_likeness`, of n images' traits, float64 (n, 13)."""
    from sklearn.cluster import KMeans

    count = len(traits)
    traits = (traits - traits.mean(0)) / np.maximum(traits.std(0), 1e-6)
    groups = min(max(FEWEST_GROUPS, count // TILES_PER_GROUP), max(1, len(np.unique(traits, axis=0)) // 2))
    of = KMeans(groups, n_init=4, random_state=0).fit_predict(traits)
    return Groups(
        of.astype(np.int64), f"{groups} groups of likely one slide, by glass, stains and texture", known=False
    )


def traits_of(image: np.ndarray) -> np.ndarray:
    """What a slide lends to a tile, whatever it shows: uint8 (height, width, 3) → float64 (13,); zeros for less than 3
    pixels a side."""
    if min(image.shape[:2]) < 3:
        return np.zeros(TRAITS)
    pixels = image.astype(np.float64)
    flat = pixels.reshape(-1, 3)
    grey = pixels.mean(2)
    edges = np.abs(4 * grey[1:-1, 1:-1] - grey[:-2, 1:-1] - grey[2:, 1:-1] - grey[1:-1, :-2] - grey[1:-1, 2:])
    noise = [np.abs(np.diff(pixels[..., channel] - grey, axis=1)).mean() for channel in (0, 2)]
    return np.concatenate(
        [
            np.percentile(flat, 99, axis=0) / 255,
            stains_of(flat[::SPARSELY]).ravel(),
            np.log(np.percentile(edges, [50, 90]) + 0.5),
            np.log(np.array(noise) + 0.1),
        ]
    )


def stains_of(pixels: np.ndarray) -> np.ndarray:
    """The two stains' directions in optical density, float64 (2, 3), the one that absorbs more red first (Macenko
    2009).

    The plane of the two largest principal components of the stained pixels (n, 3), and in it the 2nd and the 98th
    percentile of the angles. Zeros where hardly anything is stained.
    """
    density = -np.log((pixels + 1) / 256)
    stained = density[density.sum(1) > TISSUE]
    if len(stained) < 100:
        return np.zeros((2, 3))
    _, vectors = np.linalg.eigh(np.cov(stained.T))
    plane = vectors[:, :0:-1]
    plane = plane * np.where(plane[0] < 0, -1.0, 1.0)
    low, high = np.percentile(np.arctan2(*(stained @ plane).T[::-1]), [2, 98])
    stains = np.array([plane @ [np.cos(angle), np.sin(angle)] for angle in (low, high)])
    return stains[np.argsort(-stains[:, 0])]


def _numbered(names: Iterable[str | None]) -> np.ndarray:
    return np.unique([str(name) for name in names], return_inverse=True)[1].astype(np.int64)
