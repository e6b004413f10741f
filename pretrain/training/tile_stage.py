"""Stage one: tiles from the stream, through an augmentation on the device, into a tile objective."""

from collections.abc import Iterator
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.fault import Fault
from data.files import Refused, appearing, remove
from data.loader_process import LoaderProcess
from data.tiles.augment import augment
from data.tiles.loader import MicroBatch, RankBatch, TileBatches, loader_of
from data.tiles.source import TileSource
from data.tiles.stream import Stream, group_size
from pretrain.encoders import init
from pretrain.encoders.preprocessing import Preprocessing
from pretrain.encoders.run_checkpoint import evaluation_size
from pretrain.objectives.contract import look_of
from pretrain.objectives.figures import features_of, spread, watched_encoder
from pretrain.objectives.interface import Moment, Objective
from pretrain.objectives.losses.precision import at_least_float32
from pretrain.objectives.tile_batch import TileBatch
from pretrain.run import checkpoints
from pretrain.run.across_ranks import total
from pretrain.run.folder import REPLAY, note_of_start
from pretrain.run.progress import say
from pretrain.run.saving import Saver
from pretrain.settings import plugins
from pretrain.training.fixed_images import BetweenBatches
from pretrain.training.gradients import losses_of
from pretrain.training.module import Training
from pretrain.training.pale_tiles import PaleTiles
from pretrain.training.probe_set import ProbeSet
from pretrain.training.slide_sample import SlideSample
from pretrain.training.tile_settings import (
    TileData,
    TileWatch,
    checked_views,
    colour,
    crop_sizes,
    masking,
)
from pretrain.training.tile_sources import chosen_by
from pretrain.training.tiles_of_run import describe_tiles
from pretrain.training.view_sheet import view_sheet

BAD_TILES_SAID = 20  # said one by one; the rest are counted
JUDGED_FROM = 10_000  # tiles: a bad one or two among the first are no reason to stop
HELD_OUT = 1024  # of the tiles that aren't trained on, so many at most, and a batch, tell a loss at checkpoints
ALONE = {"slides_per_lane": None}  # how tiles are dealt out that are judged by: as they come
KEPT_SAMPLES = 20  # pictures of crops: the first, and the newest


class TileTraining(Training):
    """The tile stage of a run; see `Training`."""

    unit = "tiles"
    score = "probe_knn"

    def __init__(self, run: Path, config: Any, make_objective: Any) -> None:
        super().__init__(run, config, make_objective, config.data.batch_size)
        self.data: TileData = config.data
        shape: dict[str, Any] = {name: getattr(self.data, name) for name in ("batch_size", "lanes", "slides_per_lane")}
        group = group_size(**shape)
        self.tiles = chosen_by(plugins.build_beside(self.data, group), self.data.sample, group)
        self.stream = Stream(self.tiles.parts, **shape, window=self.data.window, seed=config.seed)
        crops, patch = self.data.crops, config.model["patch_size"]
        self.sizes = crop_sizes(crops, checked_views(config.objective, patch, crops))
        watch: TileWatch = config.watch
        self.probe = ProbeSet(Path(watch.probe), watch.probe_images) if watch.probe else None
        self.slides = SlideSample(self.tiles, config.seed) if watch.every or watch.probe else None
        apart = self.tiles.held_out()
        self.held_out = apart and (apart, Stream(apart.parts, **shape | ALONE, window=1, seed=config.seed))
        self.pale = None if self.data.min_saturated is None else PaleTiles(self.tiles)
        self.bad = self.seen = 0
        self.sampled = False
        self.kept_for_replay: int | None = None  # the step whose networks were kept last

    def data_digest(self) -> str:
        return self.tiles.digest

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.pale and self.began_from:
            self.pale.restore(checkpoints.read_state(self.began_from))
        size = evaluation_size(asdict(self.config))
        preprocessing = Preprocessing(size, size, tuple(self.data.mean), tuple(self.data.std))
        watched: dict[str, str] = {}
        if self.probe:
            how = self.probe.load(preprocessing, self.global_rank, self.trainer.world_size, self.device)
            watched["watch.probe"] = how
        if self.slides and self.slides.chosen:
            self.slides.load(preprocessing, self.global_rank, self.trainer.world_size)
        elif self.slides:
            watched["no slide_knn"] = "the data names no two slides with tiles enough to be told apart"
        else:
            watched["no slide_knn"] = "watch.every=0, and watch.probe isn't given"
        if self.global_rank == 0:
            for what, words in watched.items():
                say(f"{self.run}: {what}, {words}")
            note_of_start(self.run, {"watched": watched, "tiles": describe_tiles(self.tiles, self.config.seed)})

    def begin(self, objective: Objective) -> None:
        if self.config.init is not None:
            said = init.start_from(self.config.init, objective.trained().values(), self.config.allow_plugins)
            if self.global_rank == 0:
                say(f"{self.run}: starts from {self.config.init}")
                for sentence in said:
                    say(f"  {sentence}")

    def batches(self, start: int, stop: int) -> LoaderProcess:
        batches = self.tile_batches(self.tiles, self.stream, start, stop)
        return loader_of(batches, self.device.type == "cuda", here=self.settings.devices)

    def tile_batches(self, tiles: TileSource, stream: Stream, start: int, stop: int) -> TileBatches:
        """This rank's share of the batches ``start … stop − 1`` of ``tiles``, cut as the run's are."""
        grid, trained = self.sizes.global_size // self.config.model["patch_size"], tiles is self.tiles
        return TileBatches(
            tiles,
            stream,
            self.sizes,
            colour(self.data.colour),
            masking(self.config.objective, self.data.masks, grid),
            seed=self.config.seed,
            start=start,
            stop=stop,
            rank=self.global_rank,
            world_size=self.trainer.world_size,
            accumulate=self.settings.accumulate,
            threads=self.data.threads,
            min_saturated=self.data.min_saturated if trained else None,
            depth=self.objective.stochastic_depth() if trained else None,
        )

    def state(self) -> dict[str, Any]:
        """With what is counted of pale tiles, which is told as well; every rank calls it."""
        counted = self.pale.gathered() if self.pale else {}
        if self.pale and self.global_rank == 0:
            self.pale.tell(self.run, self.is_last)
        return super().state() | counted

    def keep_for_replay(self) -> None:
        """Write the networks, which a skipped step left as they were, to ``replay/``: of the first of several in a row,
        once in as many steps as between checkpoints, in place of those before. Where there is no room, training goes
        on."""
        last, step = self.kept_for_replay, self.step
        if self.skipped_in_a_row > 1 or (last is not None and step < last + self.settings.checkpoint_every):
            return
        self.kept_for_replay = step
        samples = {"skipped_samples": [step * self.batch_size, (step + 1) * self.batch_size]}
        try:
            Saver(self.run / REPLAY, 1, None).save(step, self.objective, self.optimiser, super().state() | samples)
        except Fault as fault:
            if self.global_rank == 0:
                say(f"{self.run}: the networks of that step aren't kept ({str(fault).partition(';')[0]})")
            return
        if self.global_rank == 0:
            say(f"{self.run}: which tile and which term did it, 'pretrain tile run={self.run} replay={step + 1}' finds")

    def before_step(self, batch: RankBatch) -> dict[str, float]:
        for message in batch.bad[: max(0, BAD_TILES_SAID - self.bad)]:
            say(f"skipped: {message}")
        if self.pale is None:
            return {"bad_tiles": len(batch.bad)}
        self.pale.count(batch)
        return {"bad_tiles": len(batch.bad), "pale_tiles": len(batch.pale)}

    def after_step(self, counts: dict[str, int]) -> dict[str, float]:
        # The count is the same on every rank, so all of them stop or none does, and nobody waits for one that has gone.
        bad = counts["bad_tiles"]
        if self.bad <= BAD_TILES_SAID < self.bad + bad and self.global_rank == 0:
            say("more tiles can't be read; they are counted and no longer named")
        self.bad += bad
        self.seen += self.stream.batch_size
        if self.bad > self.data.max_bad_fraction * max(self.seen, JUDGED_FROM):
            raise Fault(
                f"{self.bad} of {self.seen} tiles can't be read, more than"
                f" data.max_bad_fraction={self.data.max_bad_fraction} allows; they are named above: put those files"
                " back, or raise the limit."
            )
        return dict(counts)

    def micro_batches(self, batch: RankBatch) -> Iterator[tuple[TileBatch, int]]:
        for part in batch.parts:
            prepared = self.prepare(part)
            if not self.sampled and self.global_rank == 0:
                self.sampled = True
                self.save_samples(prepared)
            yield prepared, part.first

    @cached_property
    def pixel_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the colours, ``(3,)`` each, on the device."""
        return torch.tensor(self.data.mean, device=self.device), torch.tensor(self.data.std, device=self.device)

    def prepare(self, part: MicroBatch) -> TileBatch:
        """Move a micro-batch to the device and augment it there."""
        crops = []
        for views, parameters in zip(part.views, part.parameters, strict=True):
            images = views.to(self.device, non_blocking=True)
            crops.append((augment(images, parameters, *self.pixel_statistics), len(images) // len(part.numbers)))
        masks, masked, mpp, *kept = (
            part_of.to(self.device, non_blocking=True) for part_of in (part.masks, part.masked, part.mpp, *part.kept)
        )
        return TileBatch(crops, masks, masked_numbers=masked, mpp=mpp, kept=kept or None)

    def save_samples(self, batch: TileBatch) -> None:
        """A picture of the first tiles' crops as the network sees them, masked patches greyed: a row a tile. Where
        there is no room, training goes on."""
        path = self.run / "samples" / f"step-{self.step:08d}.png"
        try:
            with appearing(path) as partial:
                view_sheet(batch, self.data.mean, self.data.std).save(partial, format="PNG")
        except Refused as refused:
            say(f"{str(refused).partition('): ')[0]}); training goes on without that picture")
        for old in sorted(path.parent.glob("step-*.png"))[1:-KEPT_SAMPLES]:
            remove(old)

    def look(self, batch: RankBatch) -> dict[str, float]:
        parts = [self.prepare(part) for part in batch.parts]
        if self.global_rank == 0:
            self.save_samples(parts[0])
        moment = Moment(self.step, self.optim.schedule_steps or self.optim.steps, self.config.seed)
        encoder = watched_encoder(self.objective)
        return look_of(self.objective, parts, moment) | spread(features_of(encoder, parts)) | self.slides_told()

    def evaluate(self) -> dict[str, float]:
        """The figures of tiles apart, held out or labelled; and how well slides are told, at the end and where no look
        says so."""
        unsaid = not self.looks_now and (self.is_last or not self.watch.every)
        return self.told_apart() | (self.slides_told() if unsaid else {})  # so short that no signal ends it

    def evaluate_first(self) -> dict[str, float]:
        return self.told_apart() | self.slides_told(self.heeding)

    def told_apart(self) -> dict[str, float]:
        """What tiles that aren't trained on tell: the loss, and the probe's figures."""
        probed = self.probe.score(watched_encoder(self.objective), self.device, self.heeding) if self.probe else {}
        return self.loss_held_out() | probed

    def loss_held_out(self) -> dict[str, float]:
        """``validation_loss``: the objective's loss on tiles that aren't trained on, if there are any; on the same views
        of the same tiles each time, without stochastic depth. Nothing learns from them."""
        if not self.held_out:
            return {}
        tiles, stream = self.held_out
        count = max(1, min(HELD_OUT, len(tiles)) // self.stream.batch_size)
        batches = self.tile_batches(tiles, stream, 0, count)
        batches.in_slots = False
        moment = Moment(self.step, self.optim.schedule_steps or self.optim.steps, self.config.seed)
        modes = {module: module.training for module in self.objective.modules()}
        losses = []
        try:
            self.objective.eval()
            with torch.no_grad():
                for batch in self.heeding(batches, count):
                    parts = [(self.prepare(part), part.first) for part in batch.parts]
                    for loss, _ in losses_of(self.objective, parts, moment):
                        losses.append(at_least_float32(loss))
                    self.objective.after_skip()
        finally:
            for module, mode in modes.items():
                module.training = mode
        return {"validation_loss": float(total(torch.stack(losses).mean())) / self.trainer.world_size}

    def slides_told(self, between: BetweenBatches = lambda batches, _: batches) -> dict[str, float]:
        """``slide_knn`` and ``slide_chance``, where slides are known."""
        if not (self.slides and self.slides.chosen):
            return {}
        return self.slides.score(watched_encoder(self.objective), self.device, between)
