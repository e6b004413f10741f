"""The whole road as one picture: tiles found on a slide, the crops the network saw, its loss, what it sees in the
slide."""

from io import BytesIO
from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from data.embeddings.store import EmbeddingStore
from data.shards.index import ShardIndex
from pretrain.report import maps
from pretrain.report.figures import running_mean
from pretrain.report.parts import find_parts
from pretrain.report.sections import embedded_tiles


def road_picture(folder: Path) -> Image.Image | None:
    """Four panels about the folder of a road, or None where a part isn't there yet."""
    parts = find_parts(folder, None, None, None)
    if not (parts.shards and parts.tile and parts.tile.samples and parts.embeddings and "loss" in parts.tile.metrics):
        return None
    store = EmbeddingStore.open(parts.embeddings)
    slide = store.read(max(store.slides, key=store.rows))
    tiles = embedded_tiles(slide, ShardIndex.open(parts.shards))
    colours = maps.fit_colouring([np.asarray(slide.embeddings)]).colours(np.asarray(slide.embeddings))
    with Image.open(parts.tile.samples[0]) as sheet:
        crops = sheet.convert("RGB")
    shown = {"tiles": maps.grid(tiles), "crops": crops, "loss": None, "embeddings": maps.colour_map(tiles, colours)}
    steps, losses = parts.tile.metrics["loss"]
    widths = [1.3 if image is None else image.width / image.height for image in shown.values()]
    with matplotlib.style.context("default"):  # the page's own style is transparent, for its two colour schemes
        figure = Figure(figsize=(3.6 * sum(widths), 4.0), layout="constrained")
        for axis, (name, image) in zip(figure.subplots(1, 4, width_ratios=widths), shown.items(), strict=True):
            axis.set_title(name, loc="left", fontsize=10)
            if image is None:
                axis.plot(steps, losses, color="#4b2e99", linewidth=0.4, alpha=0.5)
                axis.plot(steps, running_mean(losses, max(1, len(losses) // 50)), color="#4b2e99")
                axis.spines[["top", "right"]].set_visible(False)
                axis.set_xlabel("step")
            else:
                axis.imshow(image)
                axis.set_axis_off()
        buffer = BytesIO()
        figure.savefig(buffer, format="png", dpi=110)
    return Image.open(buffer).convert("RGB")
