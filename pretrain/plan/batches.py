"""Batches without numbers, of the sizes that a run's settings ask for."""

from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch

from data.embeddings.grid_crops import CropBatch
from data.embeddings.sequences import SlideBatch, TilesOfStore
from pretrain.objectives.interface import SlideObjective
from pretrain.objectives.tile_batch import TileBatch
from pretrain.plan.rehearsal import LARGEST_CELL, RehearsedBatch
from pretrain.settings import plugins
from pretrain.settings.ranges import within
from pretrain.training.tile_settings import checked_views, masking


@dataclass
class SupposedSlides:
    """``slides:`` in ``configs/plan.yaml``: what a plan must suppose of slides, which only their embeddings would
    tell."""

    width: Annotated[int, within(least=1)]
    tiles: Annotated[int, within(least=1)]
    largest: Annotated[int, within(least=1)]
    count: Annotated[int, within(least=1)] = 1


def tile_batch(model: dict[str, Any], objective: dict[str, Any], data: Any, tiles: int, parts: int) -> RehearsedBatch:
    """Micro-batches of ``tiles`` tiles for the tile stage; ``data`` as in `TileData`."""
    crops, grid = data.crops, data.crops.global_size // model["patch_size"]
    sides = views_and_sides(model, objective, data)
    global_crops = crops.global_count * tiles

    def make() -> TileBatch:
        images = [(torch.empty(views * tiles, 3, side, side), views) for views, side in sides]
        masks, numbers = torch.empty(global_crops, grid, grid, dtype=torch.bool), torch.empty(masked, dtype=torch.int64)
        return TileBatch(images, masks, masked_numbers=numbers)

    masked = masking(objective, data.masks, grid).expected(global_crops)
    return RehearsedBatch(make, {global_crops * grid * grid: masked}, tiles, parts)


def views_and_sides(model: dict[str, Any], objective: dict[str, Any], data: Any) -> list[tuple[int, int]]:
    """Of each kind of view, global ones first: how many a tile has, and the pixels of a side."""
    crops = data.crops
    sides = [(crops.global_count, crops.global_size), (crops.local_count, crops.local_size)]
    sides += [(views.count, views.size) for views in checked_views(objective, model["patch_size"], crops)]
    return [(views, side) for views, side in sides if views]


def lane(slides: SupposedSlides, most: int, room: int | None, field_cells: int, largest: bool) -> list[int]:
    """Tiles of the sequences of a lane, before the crop: of mean slides, or with the largest slide among them."""
    usual = min(slides.tiles, field_cells**2) if field_cells else slides.tiles
    sizes = [min(slides.largest, field_cells**2) if field_cells else slides.largest] if largest else [usual]
    while len(sizes) < most and (room is None or sum(sizes) + usual <= room):
        sizes.append(usual)
    return sizes


def slide_batch(
    objective: dict[str, Any], data: Any, slides: SupposedSlides, lanes: int, parts: int, largest: bool
) -> RehearsedBatch:
    """Micro-batches of ``lanes`` lanes for the slide stage; ``data`` as in `SlideData`. ``largest``: one holds the
    largest slide."""
    kind = plugins.locate_class(objective["_target_"], SlideObjective)
    if kind.crops:
        return crop_batch(kind, data, slides, lanes, parts)
    most = data.batch_size // data.lanes
    room = None if data.batch_tokens is None else data.batch_tokens // data.lanes
    sizes = [n for i in range(lanes) for n in lane(slides, most, room, data.field_cells, largest and i == 0)]
    lengths = [max(2, round(n * data.crop**2)) for n in sizes]  # the crop's sides are shares of the tile grid's
    hidden = [min(n - 1, max(1, round(n * data.mask_ratio))) if kind.masks else 0 for n in lengths]
    tiles, clusters = sum(lengths), kind.clusters(objective)

    def make() -> SlideBatch:
        return replace(
            sequences_of_tiles(lengths, hidden, data, slides.width),
            centres=torch.empty(clusters, slides.width) if clusters else None,
            further=[
                TilesOfStore(
                    torch.empty(tiles, slides.width, dtype=torch.float16),
                    torch.empty(slides.width),
                    torch.empty(slides.width),
                )
                for _ in data.further
            ],
        )

    return RehearsedBatch(make, {}, len(lengths), parts)


def sequences_of_tiles(lengths: list[int], hidden: list[int], data: Any, width: int) -> SlideBatch:
    """Sequences of so many tiles, of which so many are ``hidden``."""
    tiles, masked = sum(lengths), sum(hidden)
    return SlideBatch(
        embeddings=torch.empty(tiles, width, dtype=torch.float16),
        cells=torch.empty(tiles, 2, dtype=torch.int64),
        lengths=lengths,
        visible=torch.empty(tiles - masked, dtype=torch.int64),
        visible_lengths=[n - m for n, m in zip(lengths, hidden, strict=True)],
        masked=torch.empty(masked, dtype=torch.int64),
        masked_lengths=hidden,
        mean=torch.empty(width),
        std=torch.empty(width),
        positions=list(range(len(lengths))),
        slides=[""] * len(lengths),
        extent=LARGEST_CELL + 1,
        standardised=data.inputs == "standardised",
    )


def tiles_of_crops(data: Any, slides: SupposedSlides) -> list[int]:
    """Tiles of each crop of a slide, as many as there can be; ``data`` as in `SlideData`."""
    crops = data.crops
    sides = [crops.global_side] * crops.global_count + [crops.local_side] * crops.local_count
    return [side**2 if crops.empty_cells else min(side**2, slides.tiles) for side in sides]


def crop_batch(kind: type[SlideObjective], data: Any, slides: SupposedSlides, lanes: int, parts: int) -> RehearsedBatch:
    """Micro-batches of ``lanes`` lanes of crops, all of them full of tissue."""
    crops, each = data.crops, tiles_of_crops(data, slides)
    room = None if data.batch_tokens is None else data.batch_tokens // data.lanes
    most = data.batch_size // data.lanes
    count = lanes * (most if room is None else max(1, min(most, room // sum(each))))
    lengths = [n for n in each for _ in range(count)]
    share = int(crops.global_count * count * crops.masked_share) if kind.masks else 0
    low, high = crops.mask_ratios
    hidden = [round(n * (low + high) / 2) if i < share else 0 for i, n in enumerate(lengths)]

    def make() -> CropBatch:
        packed = sequences_of_tiles(lengths, hidden, data, slides.width)
        return CropBatch(
            **vars(packed) | {"positions": packed.positions[:count], "slides": packed.slides[:count]},
            global_count=crops.global_count,
            local_count=crops.local_count,
            valid=torch.ones(sum(lengths), dtype=torch.bool) if crops.empty_cells else None,
            valid_lengths=lengths if crops.empty_cells else None,
        )

    return RehearsedBatch(make, {}, count, parts)
