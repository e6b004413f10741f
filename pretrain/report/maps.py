"""Slides as pictures: the tile grid over a thumbnail, and embeddings as colours at their tiles' places."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance

GRID_COLOUR = (0, 122, 128)  # teal: neither of the two stains
MOST_ROWS = 20_000


@dataclass(frozen=True)
class Tiles:
    """Tiles of one slide over its thumbnail: top-left corners (n, 2) and side in level-0 pixels."""

    thumbnail: Image.Image
    downsample: float  # level-0 pixels per thumbnail pixel
    corners: np.ndarray
    side: float
    is_blank: bool = False  # white paper in its place

    def boxes(self) -> np.ndarray:
        """Left, top, right, bottom of every tile in thumbnail pixels, int (n, 4); neighbours share their edges."""
        both = np.concatenate([self.corners, self.corners + self.side], axis=1) / self.downsample
        return np.rint(both).astype(np.int64)


def blank(corners: np.ndarray, side: float, longest: int = 1024) -> tuple[Image.Image, float]:
    """White paper that holds all tiles, at most ``longest`` pixels a side, and its downsample: for a slide without
    thumbnail."""
    extent = corners.max(axis=0) + side
    downsample = max(1.0, float(extent.max()) / longest)
    width, height = np.ceil(extent / downsample).astype(int)
    return Image.new("RGB", (int(width), int(height)), "white"), downsample


def grid(tiles: Tiles) -> Image.Image:
    """The thumbnail, faded outside the tiles, and every tile outlined where it is large enough for an outline."""
    boxes = tiles.boxes().tolist()
    kept = Image.new("L", tiles.thumbnail.size, 0)
    draw = ImageDraw.Draw(kept)
    for left, top, right, bottom in boxes:
        draw.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), fill=255)
    picture = tiles.thumbnail.convert("RGB")
    faded = Image.blend(picture, Image.new("RGB", picture.size, "white"), 0.55)
    picture = Image.composite(picture, faded, kept)
    side = tiles.side / tiles.downsample
    if side >= 8:
        draw = ImageDraw.Draw(picture)
        for left, top, right, bottom in boxes:
            draw.rectangle((left, top, right, bottom), outline=GRID_COLOUR, width=2 if side >= 40 else 1)
    return picture


@dataclass(frozen=True)
class Colouring:
    """Three principal components as red, green and blue, with the range of each that fills the scale."""

    mean: np.ndarray  # (D,)
    components: np.ndarray  # (D, 3)
    low: np.ndarray  # (3,)
    high: np.ndarray  # (3,)
    explained: float  # share of the variance

    def colours(self, embeddings: np.ndarray) -> np.ndarray:
        """Embeddings (n, D) → uint8 (n, 3)."""
        projected = (embeddings.astype(np.float32) - self.mean) @ self.components
        scaled = (projected - self.low) / np.maximum(self.high - self.low, 1e-12)
        return np.rint(255 * scaled.clip(0, 1)).astype(np.uint8)


def fit_colouring(embeddings: Sequence[np.ndarray]) -> Colouring:
    """Principal components of all slides' embeddings together, so that a colour means the same on every slide.

    Each is (n, D). Of many rows an evenly spaced 20,000 are used. A component's sign, which is arbitrary, is set so
    that its largest weight is positive; its 1st to 99th percentile fill the scale.
    """
    total = sum(len(rows) for rows in embeddings)
    step = max(1, -(-total // MOST_ROWS))
    sample = np.concatenate([np.asarray(rows[::step], dtype=np.float32) for rows in embeddings])
    mean = sample.mean(axis=0)
    centred = sample - mean
    # eigh sorts upwards; an embedding narrower than three has as many components as it is wide.
    variances, vectors = np.linalg.eigh(centred.T @ centred / max(1, len(sample) - 1))
    components = vectors[:, ::-1][:, :3]
    strongest = np.abs(components).argmax(axis=0)
    components = components * np.sign(components[strongest, np.arange(components.shape[1])])
    components = np.pad(components, ((0, 0), (0, 3 - components.shape[1])))
    low, high = np.percentile(centred @ components, [1, 99], axis=0)
    explained = float(variances[::-1][:3].sum() / max(variances.sum(), 1e-12))
    return Colouring(mean, components, low, high, explained)


def colour_map(tiles: Tiles, colours: np.ndarray) -> Image.Image:
    """Every tile filled with its colour (n, 3), over the thumbnail faded to a pale grey."""
    faded = ImageEnhance.Color(tiles.thumbnail.convert("RGB")).enhance(0.0)
    picture = Image.blend(faded, Image.new("RGB", faded.size, "white"), 0.72)
    draw = ImageDraw.Draw(picture)
    for (left, top, right, bottom), colour in zip(tiles.boxes().tolist(), colours.tolist(), strict=True):
        draw.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), fill=tuple(colour))
    return picture
