"""Scores of a slide's tiles, as files of many programs.

    maps.json                 which encoder, and how: one folder, one of each
    h5/<slide>.h5             coords (n, 2) int64 level-0 x, y; scores (n,) float32
    geojson/<slide>.geojson   a square a tile, in level-0 pixels, coloured by its score: QuPath opens it
    png/<slide>.png           the same over the slide's thumbnail where its file is known, or else on white
    parquet/<slide>.parquet   slide, x, y, score; comes last: the slide is done

Colours run from the slide's 1st to its 99th percentile.
"""

import json
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from data.embeddings.index import FACTS_KEY
from data.embeddings.store import SlideEmbeddings
from data.files import appearing, write_whole
from data.slides.reading import Slide
from pretrain.report.maps import Tiles, blank, colour_map

LONGEST_SIDE = 2048  # pixels of a picture
OPACITY = 0.6  # of colours over the thumbnail
PERCENTILES = (1, 99)


def is_mapped(out: Path, slide: str) -> bool:
    """Whether a slide's files are there, all of them."""
    return (out / "parquet" / f"{slide}.parquet").exists()


def write_map(out: Path, slide: SlideEmbeddings, scores: np.ndarray, file: Path | None, about: dict[str, str]) -> None:
    """Write all files of a slide; ``file`` is the slide's own. Raises Fault where that can't be read."""
    colours = colours_of(scores)
    name = slide.slide
    with appearing(out / "h5" / f"{name}.h5") as partial, h5py.File(partial, "w") as h5:
        coords = h5.create_dataset("coords", data=slide.coordinates)
        coords.attrs["tile_size_level0"] = slide.tile_size_level0
        h5.create_dataset("scores", data=scores)
        h5.attrs.update(about)
    shapes = qupath_squares(slide.coordinates, slide.tile_size_level0, scores, colours)
    write_whole(out / "geojson" / f"{name}.geojson", json.dumps(shapes))
    with appearing(out / "png" / f"{name}.png") as partial:
        heat_map(slide, colours, file).save(partial, format="PNG")
    table = pa.table(
        {
            "slide": pa.array([name] * len(scores), pa.string()),
            "x": slide.coordinates[:, 0],
            "y": slide.coordinates[:, 1],
            "score": scores,
        },
        metadata={FACTS_KEY: json.dumps(about).encode()},
    )
    with appearing(out / "parquet" / f"{name}.parquet") as partial:
        pq.write_table(table, partial)


def colours_of(scores: np.ndarray) -> np.ndarray:
    """(n,) → (n, 3) uint8, from dark to light."""
    from matplotlib import colormaps

    low, high = np.percentile(scores, PERCENTILES)
    shares = (scores - low) / max(high - low, np.finfo(np.float32).tiny)
    return np.asarray(colormaps["inferno"](shares.clip(0, 1), bytes=True))[:, :3]


def qupath_squares(coordinates: np.ndarray, side: float, scores: np.ndarray, colours: np.ndarray) -> dict[str, object]:
    """GeoJSON as QuPath 0.4 and later read it: detections, which it draws by the hundred thousand, each with its colour
    and a measurement."""
    features = []
    for (x, y), score, colour in zip(coordinates.tolist(), scores.tolist(), colours.tolist(), strict=True):
        ring = [[x, y], [x + side, y], [x + side, y + side], [x, y + side], [x, y]]
        properties = {"objectType": "detection", "color": colour, "measurements": {"score": score}}
        geometry = {"type": "Polygon", "coordinates": [ring]}
        features.append({"type": "Feature", "geometry": geometry, "properties": properties})
    return {"type": "FeatureCollection", "features": features}


def heat_map(slide: SlideEmbeddings, colours: np.ndarray, file: Path | None) -> Image.Image:
    """Tiles in their colours, over the slide's thumbnail where there is its ``file``."""
    if file is None:
        paper, downsample = blank(slide.coordinates, slide.tile_size_level0, LONGEST_SIDE)
        return colour_map(Tiles(paper, downsample, slide.coordinates, slide.tile_size_level0), colours)
    with Slide(file) as opened:
        downsample = max(1.0, max(opened.width, opened.height) / LONGEST_SIDE)
        picture = Image.fromarray(opened.thumbnail(downsample))
    coloured = colour_map(Tiles(picture, downsample, slide.coordinates, slide.tile_size_level0), colours)
    return Image.blend(picture, coloured, OPACITY)
