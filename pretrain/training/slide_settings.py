"""The slide stage's settings under ``data:`` and ``watch:``, the stores and the network that they name, and what must go
together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np

from data.embeddings.aligned_stores import require_same_slides
from data.embeddings.chosen_slides import open_chosen
from data.embeddings.packing import Packing
from data.embeddings.sequences import INPUTS
from data.embeddings.store import EmbeddingStore
from data.fault import Fault
from models.allowed import ON_DISK, RANGE, SHARE, Agreements, one_of, within
from models.slide_network import SlideNetwork
from pretrain.objectives.interface import SlideObjective
from pretrain.settings.plugins import build_empty, locate_class
from pretrain.training.watching import Watch

MOST_CELLS = 1024  # of a crop's side: a whole slide, and a million tokens


def check_packing(batch_size: int, batch_tokens: int | None, lanes: int) -> None:
    """Raise Fault where lanes can't share a batch evenly."""
    Packing(np.ones(1), batch_size=batch_size, batch_tokens=batch_tokens, lanes=lanes, seed=0)


@dataclass
class SlideCrops:
    """``data.crops``: views of objectives that compare crops of a slide's grid; see `CropSequences`."""

    global_count: Annotated[int, within(least=2)]
    global_side: Annotated[int, within(least=2, most=MOST_CELLS)]
    local_count: Annotated[int, within(least=0)]
    local_side: Annotated[int, within(least=2, most=MOST_CELLS)]
    tissue: Annotated[float, SHARE]
    vertical_flip: Annotated[float, SHARE]
    quarter_turn: Annotated[float, SHARE]
    masked_share: Annotated[float, SHARE]
    mask_ratios: Annotated[list[float], RANGE, SHARE]
    empty_cells: bool


@dataclass
class SlideData:
    """The settings under ``data:``, explained in ``configs/data/embeddings.yaml``."""

    embeddings: Annotated[str, ON_DISK]
    further: Annotated[list[str], ON_DISK]
    slides: Annotated[str | None, ON_DISK]
    slides_share: Annotated[float, within(above=0, most=1)]
    batch_size: Annotated[int, within(least=1)]
    batch_tokens: Annotated[int | None, within(least=1)]
    lanes: Annotated[int, within(least=1)]
    field_cells: Annotated[int, within(least=0)]
    validation_fraction: Annotated[float, within(least=0, below=1)]
    crop: Annotated[float, within(above=0, most=1)]
    shift_grid: Annotated[int, within(least=0)]
    flip: Annotated[float, SHARE]
    mask: Annotated[str, one_of("random", "block")]
    mask_ratio: Annotated[float, within(above=0, below=1)]
    block_cells: Annotated[int, within(least=1)]
    inputs: Annotated[str, one_of(*INPUTS)]
    crops: SlideCrops
    processes_per_slide: Annotated[int, within(least=1)]

    agreements: ClassVar[Agreements] = {("batch_size", "batch_tokens", "lanes"): check_packing}


def check_label(column: str | None, table: str | None) -> None:
    """Raise ValueError for a column of no table."""
    if column is not None and table is None:
        raise ValueError("it is a column of slide_labels=TABLE: give that too, or leave it out")


@dataclass
class SlideWatch(Watch):
    """The settings under ``watch:``, explained in ``configs/slide.yaml``."""

    held_out_slides: Annotated[int, within(least=1)]
    slide_labels: Annotated[str | None, ON_DISK]
    slide_label: str | None

    agreements: ClassVar[Agreements] = {("slide_label", "slide_labels"): check_label}


def open_store(data: SlideData) -> EmbeddingStore:
    """The slides that a run is to learn from and to be judged by. Raises Fault where there are none."""
    return open_chosen(Path(data.embeddings), None if data.slides is None else Path(data.slides), data.slides_share)


def open_further(data: SlideData, store: EmbeddingStore) -> list[EmbeddingStore]:
    """Stores of the same slides by other tile encoders. Raises Fault for one whose index holds others."""
    table = None if data.slides is None else Path(data.slides)
    further = [open_chosen(Path(folder), table, data.slides_share) for folder in data.further]
    for number, other in enumerate(further):
        for before in [store, *further[:number]]:
            require_same_slides(before, other)
    return further


def build_slide_network(model: Mapping[str, Any], widths: Sequence[int]) -> SlideNetwork:
    """A slide encoder without memory for its values, for embeddings of tile encoders so wide."""
    network: SlideNetwork = build_empty(model, widths[0])
    for width in widths[1:]:
        network.add_input(width)
    return network


def require_read(further: Sequence[str], target: str) -> None:
    """Raise ValueError for further stores that an objective doesn't read."""
    if further and not locate_class(target, SlideObjective).several_stores:
        raise ValueError("it reads one store; objective=slide_context reads several")


def require_within_fields(field_cells: int, side: int, target: str, crops: int = 1) -> None:
    """Raise ValueError for an objective's crops of slides that are larger than the fields that slides are cut into."""
    if 0 < field_cells < side and crops and locate_class(target, SlideObjective).crops:
        raise ValueError(
            "crops larger than a field are mostly empty: data.field_cells=0 cuts them from whole slides, or give smaller"
            " data.crops.global_side and data.crops.local_side"
        )


def require_uncompiled(compiled: bool) -> None:
    """Raise Fault for compiled blocks, of which every step would need others."""
    if compiled:
        raise Fault(
            "trainer.compile=true is for 'pretrain tile': slides have other lengths at every step, and each would be"
            " compiled anew; leave it out."
        )


def require_judged(patience: int | None, validation_fraction: float, table: str | None) -> None:
    """Raise ValueError for a wait for figures that nobody makes."""
    if patience and not validation_fraction and table is None:
        raise ValueError(
            "no slide is held out to judge checkpoints by: set data.validation_fraction higher, give labels of slides,"
            " watch.slide_labels=, or watch.patience=null"
        )


def require_network_shared(together: int, target: str) -> None:
    """Raise ValueError where processes are to share slides, and the network can't."""
    if together > 1 and not (kind := locate_class(target, SlideNetwork)).shares_slides:
        raise ValueError(f"{kind.__name__} can't share a slide over processes; 1 gives each process slides of its own")


def require_objective_shared(together: int, target: str) -> None:
    """Raise ValueError where processes are to share slides, and the objective can't."""
    if together > 1 and (kind := locate_class(target, SlideObjective)).share_slides is SlideObjective.share_slides:
        raise ValueError(f"{kind.__name__} can't share a slide over processes; 1 gives each process slides of its own")


def require_cells_seen(run: Any) -> None:
    """Raise Fault where a command's ``Config`` wants cells without a tile in crops, and its network sees tiles alone."""
    crops = locate_class(run.objective["_target_"], SlideObjective).crops
    model = run.model["_target_"]
    if crops and run.data.crops.empty_cells and not locate_class(model, SlideNetwork).sees_empty_cells:
        raise Fault(
            f"data.crops.empty_cells=true keeps cells without a tile in crops, and {model} sees tiles alone: set it to"
            " false, or take model=slide_vit."
        )
