"""Stage one: tiles from the stream, through an augmentation on the device, into a tile objective."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from data.augment import augment
from data.augment_parameters import Colour
from data.crops import CropSizes
from data.fault import Fault
from data.loader import Batch, Masking, MicroBatch, TileBatches, load
from data.loader_process import LoaderProcess
from data.stream import Stream, group_size
from data.tile_source import TileSource
from pretrain import init, plugins
from pretrain.across_ranks import total
from pretrain.encoders import Preprocessing, evaluation_size
from pretrain.objective import Moment, Objective
from pretrain.plan import operations
from pretrain.probe_set import ProbeSet
from pretrain.progress import say
from pretrain.slide_sample import SlideSample
from pretrain.tile_batch import TileBatch
from pretrain.training import Training
from pretrain.watching import Watch, features_of, spread, watched_encoder

NAMED_BAD_TILES = 20  # said one by one; the rest are counted
JUDGED_FROM = 10_000  # tiles: a bad one or two among the first are no reason to stop
SAMPLE_TILES = 8
KEPT_SAMPLES = 20  # pictures of crops: the first, and the newest


@dataclass
class Crops:
    """``data.crops``: numbers, sizes and scales of the views."""

    global_count: int
    global_size: int
    global_scale: list[float]
    local_count: int
    local_size: int
    local_scale: list[float]
    relative_to: str
    aspect: list[float]
    vertical_flip: float
    quarter_turns: float


@dataclass
class ColourSettings:
    """``data.colour``: see `data.augment.Colour`."""

    jitter_probability: float
    brightness: float
    contrast: float
    saturation: float
    hue: float
    grey_probability: float
    blur_probability: list[float]
    blur_sigma: list[float]
    solarise_probability: list[float]
    stain_probability: float
    stain_shift: float


@dataclass
class MaskSettings:
    """``data.masks``: which share of the global crops is masked, and how much of them."""

    share: float
    low: float
    high: float


@dataclass
class TileData:
    """The settings under ``data:``, explained in ``configs/data/``; beside them lie those of the source that ``_target_`` names."""

    base: ClassVar[type] = TileSource

    _target_: str
    batch_size: int
    lanes: int
    window: int
    slides_per_lane: int | None
    threads: int
    max_bad_fraction: float
    mean: list[float]
    std: list[float]
    crops: Crops
    colour: ColourSettings
    masks: MaskSettings


@dataclass
class TileWatch(Watch):
    """The settings under ``watch:`` of the tile stage, explained in ``configs/tile.yaml``."""

    probe: str | None
    probe_images: int


def crop_sizes(crops: Crops) -> CropSizes:
    """The settings of crops as the loader takes them. Raises Fault for an unknown ``relative_to``."""
    if crops.relative_to not in ("tile", "crop"):
        raise Fault(f"data.crops.relative_to is tile or crop, not {crops.relative_to!r}.")
    return CropSizes(
        crops.global_count, crops.global_size, (crops.global_scale[0], crops.global_scale[1]),
        crops.local_count, crops.local_size, (crops.local_scale[0], crops.local_scale[1]),
        (crops.aspect[0], crops.aspect[1]), crops.relative_to, crops.vertical_flip, crops.quarter_turns,
    )  # fmt: skip


def colour(settings: ColourSettings) -> Colour:
    """The settings of colour as the loader takes them."""
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in vars(settings).items()
    }
    return Colour(**values)


class TileTraining(Training):
    """The tile stage of a run; see `Training`."""

    unit = "tiles"
    score = "probe_knn"

    def __init__(self, run: Path, config: Any, make_objective: Any) -> None:
        super().__init__(run, config, make_objective, config.data.batch_size)
        self.data: TileData = config.data
        shape: dict[str, Any] = {name: getattr(self.data, name) for name in ("batch_size", "lanes", "slides_per_lane")}
        self.tiles: TileSource = plugins.build_beside(self.data, group_size(**shape))
        self.stream = Stream(self.tiles.parts, **shape, window=self.data.window, seed=config.seed)
        crops = self.data.crops
        self.sizes = crop_sizes(crops)
        patch = config.model["patch_size"]
        for name, size, count in (
            ("global_size", crops.global_size, crops.global_count),
            ("local_size", crops.local_size, crops.local_count),
        ):
            if count and size % patch:
                raise Fault(f"data.crops.{name}={size} is not a multiple of model.patch_size={patch}.")
        group = config.objective.get("group_size", 1)
        share = self.data.batch_size // (config.trainer.devices * config.trainer.nodes * config.trainer.accumulate)
        if share % group:
            raise Fault(
                f"a micro-batch has {share} tiles, not a multiple of objective.group_size={group}; change data.batch_size, trainer.accumulate or the processes."
            )
        watch: TileWatch = config.watch
        self.probe = ProbeSet(Path(watch.probe), watch.probe_images) if watch.probe else None
        if watch.patience and not self.probe:
            raise Fault(
                f"watch.patience={watch.patience} waits for a better k-NN accuracy: give labelled tiles, watch.probe=FOLDER of class folders."
            )
        self.slides = SlideSample(self.tiles, config.seed) if watch.every else None
        self.bad = self.seen = 0
        self.sampled = False

    def data_digest(self) -> str:
        return self.tiles.digest

    def on_fit_start(self) -> None:
        super().on_fit_start()
        size = evaluation_size(asdict(self.config))
        preprocessing = Preprocessing(size, size, tuple(self.data.mean), tuple(self.data.std))
        if self.probe:
            how = self.probe.load(preprocessing, self.global_rank, self.trainer.world_size, self.device)
            if self.global_rank == 0:
                say(f"{self.run}: watch.probe, {how}")
        if self.slides and self.slides.chosen:
            self.slides.load(preprocessing, self.global_rank, self.trainer.world_size)

    def begin(self, objective: Objective) -> None:
        if self.config.init is not None:
            said = init.start_from(self.config.init, objective, self.config.allow_plugins)
            if self.global_rank == 0:
                say(f"{self.run}: starts from {self.config.init}")
                for sentence in said:
                    say(f"  {sentence}")

    def batches(self, start: int, stop: int) -> LoaderProcess:
        patch = self.config.model["patch_size"]
        batches = TileBatches(
            self.tiles,
            self.stream,
            self.sizes,
            colour(self.data.colour),
            Masking(self.data.masks.share, self.data.masks.low, self.data.masks.high, self.sizes.global_size // patch),
            seed=self.config.seed,
            start=start,
            stop=stop,
            rank=self.global_rank,
            world_size=self.trainer.world_size,
            accumulate=self.hardware.accumulate,
            threads=self.data.threads,
        )
        return load(batches, self.device.type == "cuda", here=self.hardware.devices)

    def before_step(self, batch: Batch) -> dict[str, float]:
        for message in batch.bad[: max(0, NAMED_BAD_TILES - self.bad)]:
            say(f"skipped: {message}")
        # The count is the same on every rank, so all of them stop or none does, and nobody waits for one that has gone.
        bad = int(total(torch.tensor(len(batch.bad), device=self.device)))
        if self.bad <= NAMED_BAD_TILES < self.bad + bad and self.global_rank == 0:
            say("more tiles can't be read; they are counted and no longer named")
        self.bad += bad
        self.seen += self.stream.batch_size
        if self.bad > self.data.max_bad_fraction * max(self.seen, JUDGED_FROM):
            raise Fault(
                f"{self.bad} of {self.seen} tiles can't be read, more than data.max_bad_fraction={self.data.max_bad_fraction} "
                f"allows; they are named above: restore those shards, or raise the limit."
            )
        return {"bad_tiles": bad}

    def count_operations(self, fused_attention: bool) -> float:
        return operations.of_a_tile(self.config, fused_attention)

    def micro_batches(self, batch: Batch) -> Iterator[tuple[TileBatch, int]]:
        for part in batch.parts:
            prepared = self.prepare(part)
            if not self.sampled and self.global_rank == 0:
                self.sampled = True
                self.save_samples(prepared)
            yield prepared, part.first

    def prepare(self, part: MicroBatch) -> TileBatch:
        """Move a micro-batch to the device and augment it there."""
        mean, std = (torch.tensor(values, device=self.device) for values in (self.data.mean, self.data.std))
        crops = []
        for views, parameters in zip(part.views, part.parameters, strict=True):
            images = views.to(self.device, non_blocking=True)
            crops.append((augment(images, parameters, mean, std), len(images) // len(part.numbers)))
        return TileBatch(crops, part.masks.to(self.device, non_blocking=True))

    def save_samples(self, batch: TileBatch) -> None:
        """A picture of the first tiles' crops as the network sees them, masked patches greyed: a row a tile."""
        path = self.run / "samples" / f"step-{self.step:08d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(batch, self.data.mean, self.data.std).save(path)
        for old in sorted(path.parent.glob("step-*.png"))[1:-KEPT_SAMPLES]:
            old.unlink()

    def look(self, batch: Batch) -> dict[str, float]:
        parts = [self.prepare(part) for part in batch.parts]
        if self.global_rank == 0:
            self.save_samples(parts[0])
        moment = Moment(self.step, self.optim.schedule_steps or self.optim.steps, self.config.seed)
        encoder = watched_encoder(self.objective)
        figures = self.objective.look(parts, moment) | spread(features_of(encoder, parts))
        if self.slides and self.slides.chosen:
            figures |= self.slides.score(encoder, self.device)
        return figures

    def evaluate(self) -> dict[str, float]:
        if not self.probe:
            return {}
        return self.probe.score(watched_encoder(self.objective), self.device, self.heeding)


def contact_sheet(batch: TileBatch, mean: list[float], std: list[float]) -> Image.Image:
    """Rows of tiles, columns of views: global crops with their masked patches greyed, then local crops."""
    strips = []
    for which, (images, views) in enumerate(batch.crops):
        tiles = len(images) // views
        shown = images.detach().float().cpu() * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
        if which == 0:
            side = shown.shape[-1] // batch.masks.shape[-1]
            covered = batch.masks.cpu().repeat_interleave(side, 1).repeat_interleave(side, 2).unsqueeze(1)
            shown = torch.where(covered, 0.6 * torch.ones(()) + 0.1 * shown, shown)
        strips.append(_rows(shown.unflatten(0, (views, tiles)).transpose(0, 1)[:SAMPLE_TILES]))
    height = max(strip.shape[1] for strip in strips)
    sheet = torch.ones(3, height, sum(strip.shape[2] for strip in strips) + 12 * (len(strips) - 1))
    left = 0
    for strip in strips:
        # Local crops are enlarged to the global crops' height, so that a tile stays on one row.
        width = round(strip.shape[2] * height / strip.shape[1])
        resized = torch.nn.functional.interpolate(strip.unsqueeze(0), (height, width), mode="nearest")[0]
        if left + resized.shape[2] > sheet.shape[2]:
            sheet = torch.cat([sheet, torch.ones(3, height, left + resized.shape[2] - sheet.shape[2])], dim=2)
        sheet[:, :, left : left + width] = resized
        left += resized.shape[2] + 12
    return Image.fromarray((sheet.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy())


def _rows(images: Tensor) -> Tensor:
    """``(tiles, views, 3, s, s)`` → ``(3, tiles * (s + 4), views * (s + 4))``, white between them."""
    padded = torch.nn.functional.pad(images, (0, 4, 0, 4), value=1.0)
    return padded.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
