"""Stage one: tiles from the stream, through an augmentation on the device, into a tile objective."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from data.fault import Fault
from data.files import Refused, appearing, remove
from data.loader_process import LoaderProcess
from data.masks import MASK_KINDS, Masking
from data.tiles.augment import augment
from data.tiles.augment_parameters import Colour
from data.tiles.crops import CropSizes, FurtherViews
from data.tiles.loader import MicroBatch, RankBatch, TileBatches, loader_of
from data.tiles.source import TileSource
from data.tiles.stream import Stream, group_size
from models.allowed import ON_DISK, PIXEL_COUNT, RANGE, SHARE, Agreements, idle_where, numbers, one_of, within
from pretrain.encoders import init
from pretrain.encoders.preprocessing import Preprocessing
from pretrain.encoders.run_checkpoint import evaluation_size
from pretrain.objectives.contract import declared_views, look_of
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
from pretrain.settings.ranges import MISSING
from pretrain.training.fixed_images import BetweenBatches
from pretrain.training.gradients import losses_of
from pretrain.training.module import Training
from pretrain.training.pale_tiles import PaleTiles
from pretrain.training.probe_set import ProbeSet
from pretrain.training.slide_sample import SlideSample
from pretrain.training.tile_sources import chosen_by
from pretrain.training.tiles_of_run import describe_tiles
from pretrain.training.watching import Watch

BAD_TILES_SAID = 20  # said one by one; the rest are counted
JUDGED_FROM = 10_000  # tiles: a bad one or two among the first are no reason to stop
SAMPLE_TILES = 8
HELD_OUT = 1024  # of the tiles that aren't trained on, so many at most, and a batch, tell a loss at checkpoints
ALONE = {"slides_per_lane": None}  # how tiles are dealt out that are judged by: as they come
KEPT_SAMPLES = 20  # pictures of crops: the first, and the newest


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


def view_sheet(batch: TileBatch, mean: list[float], std: list[float]) -> Image.Image:
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
