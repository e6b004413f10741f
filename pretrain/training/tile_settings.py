"""The tile stage's settings under ``data:`` and ``watch:``, and what of them the loader and the augmentation take."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar

from data.fault import Fault
from data.masks import MASK_KINDS, Masking
from data.tiles.augment_parameters import Colour
from data.tiles.crops import CropSizes, FurtherViews
from data.tiles.source import TileSource
from data.tiles.stream import group_size
from models.allowed import ON_DISK, PIXEL_COUNT, RANGE, SHARE, Agreements, idle_where, numbers, one_of, within
from pretrain.objectives.contract import declared_views
from pretrain.objectives.interface import Objective
from pretrain.settings import plugins
from pretrain.settings.ranges import MISSING
from pretrain.training.watching import Watch


def check_scale(relative_to: str, scale: list[float]) -> None:
    """Raise ValueError for a scale that is a share of the tile, and larger than the tile."""
    if relative_to == "tile" and scale[1] > 1:
        raise ValueError("a scale is a share of the tile's area, at most 1")


@dataclass
class Crops:
    """``data.crops``: numbers, sizes and scales of the views."""

    global_count: Annotated[int, within(least=1)]
    global_size: Annotated[int, PIXEL_COUNT]
    global_scale: Annotated[list[float], RANGE, within(above=0)]
    local_count: Annotated[int, within(least=0)]
    local_size: Annotated[int, PIXEL_COUNT]
    local_scale: Annotated[list[float], RANGE, within(above=0)]
    relative_to: Annotated[str, one_of("tile", "crop")]
    aspect: Annotated[list[float], RANGE, within(above=0)]
    vertical_flip: Annotated[float, SHARE]
    quarter_turns: Annotated[float, SHARE]

    agreements: ClassVar[Agreements] = {
        ("relative_to", "global_scale"): check_scale,
        ("relative_to", "local_scale"): check_scale,
    }


@dataclass
class ColourSettings:
    """``data.colour``: see `data.tiles.augment_parameters.Colour`."""

    jitter_probability: Annotated[float, SHARE]
    brightness: Annotated[float, within(least=0)]
    contrast: Annotated[float, within(least=0)]
    saturation: Annotated[float, within(least=0)]
    hue: Annotated[float, within(least=0, most=0.5)]
    grey_probability: Annotated[float, SHARE]
    blur_probability: Annotated[list[float], numbers(3), SHARE]
    blur_sigma: Annotated[list[float], RANGE, within(least=0)]
    solarise_probability: Annotated[list[float], numbers(3), SHARE]
    stain_probability: Annotated[float, SHARE]
    stain_shift: Annotated[float, within(least=0)]
    stain_sigma: Annotated[float, within(least=0)]


def check_shares(low: float, high: float) -> None:
    """Raise ValueError for shares in the wrong order."""
    if low > high:
        raise ValueError("the smallest share is larger than the largest")


WITH_SQUARES = idle_where("kind", "squares")
WITHOUT_SQUARES = idle_where("kind", *(kind for kind in MASK_KINDS if kind != "squares"))


@dataclass
class MaskSettings:
    """``data.masks``: which share of the global crops is masked, and how much of them."""

    share: Annotated[float, SHARE]
    kind: Annotated[str, one_of(*MASK_KINDS)]
    low: Annotated[float, SHARE, WITH_SQUARES]
    high: Annotated[float, SHARE, WITH_SQUARES]
    squares: Annotated[int, within(least=1), WITHOUT_SQUARES]
    square_area: Annotated[float, within(above=0, most=1), WITHOUT_SQUARES]

    agreements: ClassVar[Agreements] = {("low", "high"): check_shares}


@dataclass
class TileData:
    """The settings under ``data:``, explained in ``configs/data/``; beside them lie those of the source that
    ``_target_`` names."""

    base: ClassVar[type] = TileSource
    agreements: ClassVar[Agreements] = {("batch_size", "lanes", "slides_per_lane"): group_size}

    _target_: str
    batch_size: Annotated[int, within(least=1)]
    lanes: Annotated[int, within(least=1)]
    window: Annotated[int, within(least=1)]
    slides_per_lane: Annotated[int | None, within(least=1)]
    threads: Annotated[int, within(least=1)]
    sample: Annotated[str | None, ON_DISK]
    max_bad_fraction: Annotated[float, SHARE]
    min_saturated: Annotated[float | None, SHARE]
    mean: Annotated[list[float], numbers(3), SHARE]  # of pixels between 0 and 1
    std: Annotated[list[float], numbers(3), within(least=0.001, most=1)]
    crops: Crops
    colour: ColourSettings
    masks: MaskSettings


def check_patience(patience: int | None, probe: str | None) -> None:
    """Raise ValueError for a wait for figures that nobody makes."""
    if patience and not probe:
        raise ValueError("a better k-NN accuracy is waited for: give labelled tiles, probe=FOLDER of class folders")


@dataclass
class TileWatch(Watch):
    """The settings under ``watch:`` of the tile stage, explained in ``configs/tile.yaml``."""

    probe: Annotated[str | None, ON_DISK]
    probe_images: Annotated[int, within(least=1)]

    agreements: ClassVar[Agreements] = {("patience", "probe"): check_patience}


def check_crop_patches(size: int, count: int, patch_size: int) -> None:
    """Raise ValueError for crops that patches don't fill, if there are any."""
    if count and size % patch_size:
        raise ValueError("the side of a crop is a multiple of the patch's")


def check_view_counts(target: str, global_count: int, local_count: int) -> None:
    """Raise ValueError for numbers of crops that an objective can't learn from."""
    plugins.locate_class(target, Objective).check_views(global_count, local_count)


def check_masked(objective: Mapping[str, Any], share: float) -> None:
    """Raise Fault for an objective that is to learn from masked patches where none is masked."""
    weights = [name for name in ("ibot_weight", "patch_weight") if objective.get(name) not in (None, 0, MISSING)]
    if share == 0 and weights and (found := plugins.locate_class(objective["_target_"], Objective)).masks:
        raise Fault(
            f"data.masks.share=0 leaves no patches that {found.__name__} could learn from: give a share, or set"
            f" objective.{weights[0]}=0."
        )


def check_further_views(objective: Mapping[str, Any], crops: Mapping[str, Any], patch_size: int) -> None:
    """`checked_views` of settings that are all there."""
    if MISSING not in (*objective.values(), *crops.values()):
        checked_views(objective, patch_size, Crops(**crops))


def checked_views(objective: Mapping[str, Any], patch_size: int, crops: Crops) -> tuple[FurtherViews, ...]:
    """The kinds of view that an objective's settings ask for beside global and local ones. Raises Fault for a size that
    patches don't fill, for a scale that isn't one relative to what ``data.crops`` says, and for views of what global
    ones show that are no larger, or not as many."""
    kind: type[Objective] = plugins.locate_class(objective["_target_"], Objective)
    found = declared_views(kind, {name: value for name, value in objective.items() if name != "_target_"})
    for views in found:
        if views.size % patch_size:
            raise Fault(
                f"{kind.__name__} asks for views of {views.size} px, which isn't a multiple of"
                f" model.patch_size={patch_size}: change one of them."
            )
        if views.of_global and (views.size <= crops.global_size or views.count != crops.global_count):
            raise Fault(
                f"{kind.__name__} asks for larger views of {views.count} global ones, of {views.size} px, and there are"
                f" data.crops.global_count={crops.global_count} of global_size={crops.global_size}: make these"
                f" {views.count} and smaller, or its views larger."
            )
        try:
            check_scale(crops.relative_to, list(views.scale))
        except ValueError as error:
            raise Fault(
                f"{kind.__name__} asks for views of scale={views.scale} with data.crops.relative_to={crops.relative_to}:"
                f" {error}."
            ) from error
    return found


def crop_sizes(crops: Crops, further: tuple[FurtherViews, ...] = ()) -> CropSizes:
    """The settings of crops as the loader takes them."""
    return CropSizes(
        crops.global_count,
        crops.global_size,
        (crops.global_scale[0], crops.global_scale[1]),
        crops.local_count,
        crops.local_size,
        (crops.local_scale[0], crops.local_scale[1]),
        (crops.aspect[0], crops.aspect[1]),
        crops.relative_to,
        crops.vertical_flip,
        crops.quarter_turns,
        further,
    )


def masking(objective: Mapping[str, Any], settings: MaskSettings, grid: int) -> Masking:
    """The settings of masks as the loader takes them, for crops of ``grid`` patches a side; of an objective that masks
    nothing, none."""
    wanted = plugins.locate_class(objective["_target_"], Objective).masks
    values: dict[str, Any] = {field.name: getattr(settings, field.name) for field in fields(MaskSettings)}
    return Masking(grid=grid, **values | ({} if wanted else {"share": 0.0}))


def colour(settings: ColourSettings) -> Colour:
    """The settings of colour as the loader takes them."""
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in vars(settings).items()
    }
    return Colour(**values)
