"""Stage two: slides as sequences of frozen tile embeddings, into the slide encoder's masked autoencoder."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from data.embeddings.aligned_stores import require_same_tiles
from data.embeddings.clusters import fit_clusters, load_clusters, save_clusters
from data.embeddings.sequences import SlideBatch
from data.embeddings.standardisation import Statistics
from data.embeddings.store import EmbeddingStore
from data.fault import Fault
from data.files import write_whole
from data.lease import once
from data.loader_process import LoaderProcess, shared_memory_room
from models.sequence_parallel import Group
from models.slide_network import SlideNetwork
from pretrain.encoders.slide_encoders import TILE_ENCODER, statistics_file
from pretrain.objectives.contract import evaluation_of, judged_of, look_of
from pretrain.objectives.figures import watched_encoder
from pretrain.objectives.interface import Moment, Objective, SlideObjective
from pretrain.run import signals
from pretrain.run.progress import say, track
from pretrain.run.signals import heeding
from pretrain.settings.plugins import locate_class
from pretrain.training.judged_together import own_passes, rows_of_all
from pretrain.training.module import Training
from pretrain.training.slide_batches import SlideBatches, sequences_of

SLIDE_STEPS_ON_THE_WAY = 4
RUN_CLUSTERS = "clusters.txt"  # in a run's folder: the centres that its objective asked for


def cut_in_words(slides: int, field_cells: int, training: int, held_out: int) -> str:
    """What a run's sequences are, how many there are, and why they aren't whole slides where they aren't."""
    counts = f"{training} to train on, {held_out} held out"
    if not field_cells:
        return f"{slides} slides, whole: {counts}"
    return (
        f"{slides} slides, cut into overlapping fields of {field_cells} × {field_cells} tiles: {counts}; so that few slides"
        " make enough sequences to learn from (data.field_cells=0 takes them whole)"
    )


def process_group(together: int) -> Group:
    """This process's group of ``together`` neighbouring ranks, None for one."""
    return dist.new_subgroups(together)[0] if together > 1 else None


class SlideTraining(Training):
    """The slide stage of a run; see `Training`."""

    unit = "slides"

    def __init__(
        self, run: Path, config: Any, make_objective: Any, store: EmbeddingStore, further: Sequence[EmbeddingStore] = ()
    ) -> None:
        super().__init__(run, config, make_objective, config.data.batch_size)
        self.sharing = config.data.processes_per_slide
        kind: type[SlideObjective] = locate_class(config.objective["_target_"], SlideObjective)
        self.labels = None
        if config.watch.slide_labels:
            from pretrain.training.slide_label_set import SlideLabelSet  # brings scikit-learn with it

            whole = EmbeddingStore.open(store.folder)  # data.slides= says what is trained on, not what is judged
            self.labels = SlideLabelSet(whole, Path(config.watch.slide_labels), config.watch.slide_label)
        self.score = self.labels.main if self.labels else kind.score
        if config.watch.patience and not self.score:
            raise Fault(
                f"watch.patience={config.watch.patience} waits for a better checkpoint, and"
                f" {config.objective['_target_']} says of no figure that it tells one: set its 'score', or"
                " watch.patience=null; or give labels of slides, watch.slide_labels=."
            )
        self.store, self.further = store, list(further)
        if config.data.slides:
            self.data_may_have = f"{self.data_may_have}, or {config.data.slides} names others"
        known, *others = (self._statistics(number) for number in range(1 + len(further)))
        centres = self._clusters(known, kind.clusters(config.objective))
        beside = list(zip(self.further, others, strict=True))
        self.sequences = sequences_of(store, known, config.data, config.seed, kind, centres, beside)

    def _statistics(self, number: int) -> Statistics:
        """Those of the store of that number, found by one process and kept in the run's folder. Raises Fault for a
        further store with other tiles."""
        store = self.further[number - 1] if number else self.store
        path = self.run / statistics_file(number)

        def watched(what: str) -> Callable[[list[str]], Iterable[str]]:
            return lambda slides: track(heeding(slides), len(slides), what, "slides")

        def make() -> None:
            if number:
                require_same_tiles(self.store, store, watched(f"holding {store.folder} against {self.store.folder}"))
            about, *further = (
                {"encoder": one.encoder, "encoder_hash": one.encoder_hash, "width": one.width, **one.in_numbers()}
                for one in (self.store, *self.further)
            )
            write_whole(self.run / TILE_ENCODER, json.dumps(about | ({"further": further} if further else {})))
            label = f"reading {store.folder} once through, for the mean and the spread of its embeddings"
            Statistics.of(store, watched(label)).save(path)

        once(path, make, signals.heed)
        return Statistics.load(path)

    def _clusters(self, statistics: Statistics, count: int) -> np.ndarray | None:
        """Centres of the store's tiles, found by one process and kept in the run's folder; None for no ``count``."""
        if not count:
            return None
        path, label = self.run / RUN_CLUSTERS, f"finding {count} clusters of tiles in {self.store.folder}"

        def make() -> None:
            def watched(slides: list[str]) -> Iterable[str]:
                return track(heeding(slides), len(slides), label, "slides")

            save_clusters(path, fit_clusters(self.store, statistics, count, self.config.seed, watched))

        once(path, make, signals.heed)
        return load_clusters(path)

    def data_digest(self) -> str:
        return " ".join(store.digest for store in (self.store, *self.further))

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
            training, held_out = len(self.sequences.training), len(self.sequences.validation)
            say(cut_in_words(len(self.store.slides), self.config.data.field_cells, training, held_out))
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
        width = sum(store.width for store in (self.store, *self.further))
        tokens = data.batch_tokens or int(sizes.max()) * min(data.batch_size, len(sizes))
        return SLIDE_STEPS_ON_THE_WAY * self.settings.devices * tokens * (2 * width + 32)

    def look(self, batch: list[SlideBatch]) -> dict[str, float]:
        if type(self.objective).look is Objective.look:
            return {}
        parts = [part.to(self.device) for part in batch]
        moment = Moment(self.step, self.optim.schedule_steps or self.optim.steps, self.config.seed)
        return look_of(self.objective, parts, moment)

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
        told = self.told_labels()
        if not batches:
            return told
        with torch.no_grad():
            rows = rows_of_all(
                self.share_of_passes(batches),
                lambda numbers: judged_of(objective, self.sequences.held_out(list(numbers)).to(self.device)),
                [number for numbers in batches for number in numbers],
                self.device,
            )
            return evaluation_of(objective, rows) | told

    def evaluate_first(self) -> dict[str, float]:
        return self.told_labels()

    def told_labels(self) -> dict[str, float]:
        """How well vectors tell ``watch.slide_labels``; nothing where there are none."""
        if not self.labels:
            return {}
        encoder = watched_encoder(self.objective)
        assert isinstance(encoder, SlideNetwork)
        encoder.choose_input(0)
        known = self.sequences.statistics
        mean, std = (torch.from_numpy(one).float().to(self.device) for one in (known.mean, known.std))

        def given(x: Tensor) -> Tensor:
            return (x - mean) / std if self.sequences.standardised else x

        return self.labels.score(encoder, self.device, self.share_of_passes, given)

    def share_of_passes(self, batches: list[list[int]]) -> Iterable[tuple[Sequence[int], bool]]:
        """This process's share of ``batches``, and whether each counts; a signal ends it."""
        rank, groups = self.global_rank // self.sharing, self.trainer.world_size // self.sharing
        # Of processes that share slides, which all have the same rows, the first one's count.
        first = self.global_rank % self.sharing == 0
        passes = [(numbers, counts and first) for numbers, counts in own_passes(batches, rank, groups)]
        return self.heeding(passes, len(passes))
