"""Stage two: slides as sequences of frozen tile embeddings, into the slide encoder's masked autoencoder."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import IterableDataset

from data.embeddings.chosen_slides import open_chosen
from data.embeddings.packing import Packing
from data.embeddings.sequences import SlideBatch, SlideSequences
from data.embeddings.standardisation import Statistics
from data.embeddings.store import EmbeddingStore
from data.fault import Fault
from data.files import write_whole
from data.lease import once
from data.loader_process import LoaderProcess, shared_memory_room
from models.allowed import ON_DISK, SHARE, Agreements, one_of, within
from models.sequence_parallel import Group
from models.slide_network import SlideNetwork
from pretrain.encoders.slide_encoders import TILE_ENCODER
from pretrain.objectives.contract import evaluation_of, judged_of
from pretrain.objectives.figures import watched_encoder
from pretrain.objectives.interface import SlideObjective
from pretrain.run import signals
from pretrain.run.progress import say, track
from pretrain.run.signals import heeding
from pretrain.settings.plugins import locate_class
from pretrain.training.judged_together import own_passes, rows_of_all
from pretrain.training.module import Training
from pretrain.training.slide_label_set import SlideLabelSet
from pretrain.training.watching import Watch

SLIDE_STEPS_ON_THE_WAY = 4


def check_packing(batch_size: int, batch_tokens: int | None, lanes: int) -> None:
    """Raise Fault where lanes can't share a batch evenly."""
    Packing(np.ones(1), batch_size=batch_size, batch_tokens=batch_tokens, lanes=lanes, seed=0)


@dataclass
class SlideData:
    """The settings under ``data:``, explained in ``configs/data/embeddings.yaml``."""

    embeddings: Annotated[str, ON_DISK]
    slides: Annotated[str | None, ON_DISK]
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
    processes_per_slide: Annotated[int, within(least=1)]

    agreements: ClassVar[Agreements] = {("batch_size", "batch_tokens", "lanes"): check_packing}


@dataclass
class SlideWatch(Watch):
    """The settings under ``watch:``, explained in ``configs/slide.yaml``."""

    held_out_slides: Annotated[int, within(least=1)]
    slide_labels: Annotated[str | None, ON_DISK]
    slide_label: str | None


def open_store(data: SlideData) -> EmbeddingStore:
    """The slides that a run is to learn from and to be judged by. Raises Fault where there are none."""
    return open_chosen(Path(data.embeddings), None if data.slides is None else Path(data.slides))


class SlideBatches(IterableDataset["list[SlideBatch]"]):
    """A rank's share of global batches ``start … stop − 1``, each a list of micro-batches."""

    def __init__(
        self, sequences: SlideSequences, start: int, stop: int, rank: int, world_size: int, accumulate: int
    ) -> None:
        self.sequences, self.start, self.stop = sequences, start, stop
        self.rank, self.world_size, self.accumulate = rank, world_size, accumulate

    def __iter__(self) -> Iterator[list[SlideBatch]]:
        parts, first = self.world_size * self.accumulate, self.rank * self.accumulate
        for step in range(self.start, self.stop):
            yield [self.sequences.batch(step, first + i, parts) for i in range(self.accumulate)]


def sequences_of(
    store: EmbeddingStore, statistics: Statistics, data: SlideData, seed: int, masks: bool = True
) -> SlideSequences:
    """The sequences that a run's settings make of a store; ``masks``: for an objective that hides tiles. Raises Fault
    as `SlideSequences` does."""
    others = ("embeddings", "slides", "processes_per_slide")
    settings = {name: value for name, value in vars(data).items() if name not in others}
    if not masks:
        settings["mask_ratio"] = 0.0
    return SlideSequences(store, statistics, seed=seed, **settings)


def process_group(together: int) -> Group:
    """This process's group of ``together`` neighbouring ranks, None for one."""
    return dist.new_subgroups(together)[0] if together > 1 else None


class SlideTraining(Training):
    """The slide stage of a run; see `Training`."""

    unit = "slides"

    def __init__(self, run: Path, config: Any, make_objective: Any, store: EmbeddingStore) -> None:
        super().__init__(run, config, make_objective, config.data.batch_size)
        self.sharing = config.data.processes_per_slide
        kind: type[SlideObjective] = locate_class(config.objective["_target_"], SlideObjective)
        self.labels = None
        if config.watch.slide_labels:
            whole = EmbeddingStore.open(store.folder)  # data.slides= says what is trained on, not what is judged
            self.labels = SlideLabelSet(whole, Path(config.watch.slide_labels), config.watch.slide_label)
        self.score = self.labels.main if self.labels else kind.score
        if config.watch.patience and not self.score:
            raise Fault(
                f"watch.patience={config.watch.patience} waits for a better checkpoint, and"
                f" {config.objective['_target_']} says of no figure that it tells one: set its 'score', or"
                " watch.patience=null; or give labels of slides, watch.slide_labels=."
            )
        self.store = store
        statistics = run / "statistics.json"

        def make() -> None:
            label = f"reading {store.folder} once through, for the mean and the spread of its embeddings"
            about = {"encoder": store.encoder, "encoder_hash": store.encoder_hash, "width": store.width}
            write_whole(run / TILE_ENCODER, json.dumps(about))
            Statistics.of(store, lambda slides: track(heeding(slides), len(slides), label, "slides")).save(statistics)

        once(statistics, make, signals.heed)
        self.sequences = sequences_of(store, Statistics.load(statistics), config.data, config.seed, kind.masks)

    def data_digest(self) -> str:
        return self.store.digest

    def position(self) -> int:
        return self.sequences.packing.start(self.step)

    def configure_model(self) -> None:
        if self.objective is not None:
            return
        super().configure_model()
        assert isinstance(self.objective, SlideObjective)
        try:
            self.objective.share_slides(process_group(self.sharing))
        except ValueError as error:
            raise Fault(f"data.processes_per_slide={self.config.data.processes_per_slide}: {error}.") from error

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.global_rank == 0:
            cells, sequences = (
                self.sequences,
                f"{len(self.sequences.training)} to train on, {len(self.sequences.validation)} held out",
            )
            what = (
                f"cut into fields of {self.config.data.field_cells} × {self.config.data.field_cells} tiles"
                if self.config.data.field_cells
                else "whole"
            )
            say(f"{len(cells.store.slides)} slides, {what}: {sequences}")
            if self.labels:
                say(self.labels.said)

    def batches(self, start: int, stop: int) -> LoaderProcess:
        # Processes that share slides get the same ones. Each counts their loss once, and so does the sum over all of
        # the numbers that it is divided by; gradients, summed over tokens by sharing and averaged over processes, come
        # out the same.
        rank, groups = self.global_rank // self.sharing, self.trainer.world_size // self.sharing
        batches = SlideBatches(self.sequences, start, stop, rank, groups, self.settings.accumulate)
        room = shared_memory_room()
        return LoaderProcess(
            batches, self.device.type == "cuda", through_pipe=room is not None and self.bytes_on_the_way() > room
        )

    def bytes_on_the_way(self) -> int:
        """The most shared memory that this machine's processes need for batches that are filled, prefetched and in
        use."""
        sizes, data = self.sequences.packing.sizes, self.config.data
        tokens = data.batch_tokens or int(sizes.max()) * min(data.batch_size, len(sizes))
        return SLIDE_STEPS_ON_THE_WAY * self.settings.devices * tokens * (2 * self.store.width + 32)

    def before_step(self, batch: list[SlideBatch]) -> dict[str, float]:
        start = self.sequences.packing.start
        self.taken = start(self.step + 1) - start(self.step)
        return {"tiles": sum(len(part.embeddings) for part in batch) / self.sharing}

    def after_step(self, counts: dict[str, int]) -> dict[str, float]:
        return {"slides": self.taken, **counts}

    def micro_batches(self, batch: list[SlideBatch]) -> Iterator[tuple[SlideBatch, int]]:
        for part in batch:
            first = part.positions[0] - self.sequences.packing.start(self.step)
            yield part.to(self.device, non_blocking=True), first

    def evaluate(self) -> dict[str, float]:
        objective = self.objective
        assert isinstance(objective, SlideObjective)
        batches = self.sequences.held_out_batches(self.config.watch.held_out_slides)
        told = self.evaluate_first()
        if not batches:
            return told
        rank, groups = self.global_rank // self.sharing, self.trainer.world_size // self.sharing
        # Of processes that share slides, which all have the same rows, the first one's count.
        passes = [
            (numbers, counts and self.global_rank % self.sharing == 0)
            for numbers, counts in own_passes(batches, rank, groups)
        ]
        with torch.no_grad():
            rows = rows_of_all(
                self.heeding(passes, len(passes)),
                lambda numbers: judged_of(objective, self.sequences.held_out(list(numbers)).to(self.device)),
                [number for numbers in batches for number in numbers],
                self.device,
            )
            return evaluation_of(objective, rows) | told

    def evaluate_first(self) -> dict[str, float]:
        if not self.labels:
            return {}
        encoder = watched_encoder(self.objective)
        assert isinstance(encoder, SlideNetwork)
        rank, groups = self.global_rank // self.sharing, self.trainer.world_size // self.sharing
        own = self.global_rank % self.sharing == 0
        return self.labels.score(encoder, self.device, rank, groups, own, self.heeding)
