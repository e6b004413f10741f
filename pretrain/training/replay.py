"""A step that was skipped since something wasn't finite, computed again: which terms of the loss, where in the network it
began, and which tiles did it.

A step is a function of the networks before it, its number and the stream, so these are all that is kept: the run writes a
checkpoint of its networks into ``replay/`` as it skips (`TileTraining.keep_for_replay`), and the rest is drawn again.

    loss and gradients of the step's tiles → not finite → half of them, others in place of the rest → … → one tile
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from data.fault import Fault
from data.files import appearing, make_folder, write_whole
from data.loader_process import LoaderProcess, open_more_files
from data.tiles.loader import RankBatch
from models.nested_tensors import tensors_in
from pretrain.objectives.interface import Moment, Objective
from pretrain.objectives.tile_batch import TileBatch
from pretrain.run import checkpoints
from pretrain.run.across_ranks import local_shard
from pretrain.run.folder import REPLAY, read_config
from pretrain.run.metrics import tail, thinned
from pretrain.run.progress import say
from pretrain.settings import plugins
from pretrain.settings.any_machine import on_any_machine
from pretrain.settings.composition import Composed
from pretrain.settings.merging import typed
from pretrain.training.fit import bare_trainer
from pretrain.training.gradients import gradients, losses_of, not_finite
from pretrain.training.optimisation import clip
from pretrain.training.tile_stage import TileTraining
from pretrain.training.trainer_settings import require_devices
from pretrain.training.view_sheet import view_sheet

STAND_INS = 8  # single tiles that are tried
TILES_NAMED = 4  # tiles of a set that only does it together


@dataclass
class ReplayFinding:
    """What a replay found. ``networks``: whose gradients aren't finite where the loss is; none where it isn't. ``terms``:
    of the loss, whose value, or else whose gradient, isn't finite. ``began``: the first layer whose numbers aren't.
    ``tiles``: sets of tiles, places in the global batch, each of which does it by itself; empty where others do too."""

    precision: str
    terms: list[str]
    networks: list[str]
    began: str | None
    tiles: list[list[int]]


def replay_step(run: Path, step: int, accelerator: str, most: int) -> None:
    """Compute a step of a tile run again, by one process, and say and write what is found; at most so many tiles are
    named. Raises Fault for a run of another kind, and where its networks before that step weren't kept."""
    settings = read_config(run)
    if "embeddings" in (settings.get("data") or {}):
        raise Fault(f"{run} is a run of 'pretrain slide', whose steps can't be replayed: give one of 'pretrain tile'.")
    checkpoint = networks_before(run, step)
    config = run_alone(settings, run, accelerator)
    require_devices(config.trainer)
    wanted = config.trainer.precision
    for precision in dict.fromkeys(("float32", wanted)):
        config.trainer.precision = precision
        training = Replay(run, config, checkpoint, most)
        fit_alone(training)
        found = training.finding
        if found is not None:
            tell(training, found)
            return
        say(f"{run}: step {step} is finite in {precision}")
    if not was_skipped(run, step):
        say(f"{run}: step {step} was finite in the run too")
        return
    say(
        f"{run}: what happened in step {step} doesn't come back here. Where its GPUs were others, look there for one that"
        " computes wrongly ('pretrain doctor')."
    )


def networks_before(run: Path, step: int) -> Path:
    """The checkpoint of a run's networks before a step, as ``metrics.jsonl`` counts them. Raises Fault where there is
    none, and for a step that was never taken."""
    kept = {checkpoints.step_of(path) + 1: path for path in checkpoints.complete(run)}
    skipped = {checkpoints.step_of(path) + 1: path for path in checkpoints.complete(run / REPLAY)}
    taken = max([last_recorded(run), *(after - 1 for after in kept), *skipped])
    if step > taken:
        raise Fault(f"{run}: step {step:,} was never taken: the run has {taken:,}.")
    kept.pop(taken + 1, None)
    if step in skipped or step in kept:
        return (kept | skipped)[step]
    known = ", ".join(f"{one} (skipped)" if one in skipped else str(one) for one in sorted(kept | skipped)) or "none"
    raise Fault(
        f"{run} has no networks from just before step {step}: those of these steps are kept, replay=STEP of one of them:"
        f" {known}."
    )


def last_recorded(run: Path) -> int:
    """The last step of ``metrics.jsonl``; 0 where it has none."""
    return max((record["step"] for record in tail(run)), default=0)


def was_skipped(run: Path, step: int) -> bool:
    """Whether the record says so, where a skipped step is always a line, or ends before a step whose networks were
    kept."""
    figures = (record for record in thinned(run) if record["step"] == step and "loss" in record)
    return step > last_recorded(run) or any(None in (one["loss"], one["grad_norm"]) for one in figures)


def run_alone(settings: dict[str, Any], run: Path, accelerator: str) -> Any:
    """A run's typed configuration, from its ``settings``, for one process that computes the micro-batches of all."""
    tree = typed("tile", OmegaConf.create(settings | {"run": str(run)}))
    config = Composed("tile", tree, {}, [], [], []).object()
    config.model = on_any_machine(config.model)
    trainer = config.trainer
    trainer.accumulate *= trainer.devices * trainer.nodes
    trainer.devices = trainer.nodes = 1
    trainer.accelerator, trainer.shard_size, trainer.compile = accelerator, None, False
    config.watch.probe, config.watch.every = None, 0
    return config


def fit_alone(training: "Replay") -> None:
    """Have Lightning build what a run is built of, and stop behind the step."""
    open_more_files()
    try:
        bare_trainer(training, logger=False).fit(training)
    finally:
        if training.loader is not None:
            training.loader.end()


class Replay(TileTraining):
    """The run again, with networks from ``checkpoint``: its next batch is looked into, with tiles of the one after it in
    place of others. ``finding`` is None where all is finite."""

    def __init__(self, run: Path, config: Any, checkpoint: Path, most: int) -> None:
        super().__init__(
            run, config, lambda: plugins.build(config.objective, lambda: plugins.build_empty(config.model))
        )
        self.checkpoint, self.most = checkpoint, most
        self.step = checkpoints.step_of(checkpoint)
        self.sampled = True  # no picture of a step's own
        self.finding: ReplayFinding | None = None
        self.batch: RankBatch | None = None

    def begin(self, objective: Objective) -> None:
        """All values are the checkpoint's."""

    def on_fit_start(self) -> None:
        checkpoints.restore(self.checkpoint, self.objective, self.optimiser)

    def train_dataloader(self) -> LoaderProcess:
        self.loader = self.batches(self.step, self.step + 2)
        return self.loader

    def on_train_batch_end(self, *_: Any) -> None:
        """Nothing comes after a step."""

    def training_step(self, batch: Any, _: int) -> dict[str, Any]:
        if isinstance(batch, Fault):
            raise batch
        if self.batch is None:
            self.batch = batch
            return {}
        self.parts, self.others = ([part for part, _ in self.micro_batches(one)] for one in (self.batch, batch))
        self.firsts = [part.first for part in self.batch.parts]
        values, norms = self.figures_and_norms(self.parts)
        networks = not_finite(norms)
        if math.isfinite(values.pop("loss")):
            if not networks:
                return {}
            terms, began = self.terms_by_gradient(networks), None
        else:
            terms, networks = not_finite(values), []
            began = self.first_layer()
        say(f"{self.run}: step {self.step + 1} again, in {self.settings.precision}: not finite; looking for the tiles")

        def fails(tiles: Sequence[int], instead: list[TileBatch]) -> bool:
            mixture = self.mixed(tiles, instead)
            if networks:
                return bool(not_finite(self.figures_and_norms(mixture)[1]))
            return not all(math.isfinite(figures["loss"]) for figures in self.losses(mixture))

        # Where the next step has such tiles too, one of its tiles stands in for all of them.
        stand_ins = (self.others, *(self.repeated(place) for place in range(min(STAND_INS, self.batch_size))))
        sound = next((one for one in stand_ins if not fails([], one)), None)
        suspects = narrowed(list(range(self.batch_size)), lambda tiles: sound is not None and fails(tiles, sound))
        found = [] if sound is None else list(islice(suspects, self.most))
        self.finding = ReplayFinding(self.settings.precision, terms, networks, began, found)
        return {}

    @property
    def moment(self) -> Moment:
        """Of the step that is replayed."""
        return Moment(self.step, self.optim.schedule_steps or self.optim.steps, self.config.seed)

    def figures_and_norms(self, parts: list[TileBatch]) -> tuple[dict[str, float], dict[str, float]]:
        """Loss and figures of a step of these micro-batches, and the norms of the gradients of each network."""
        self.optimiser.zero_grad()
        sums = gradients(self.objective, list(zip(parts, self.firsts, strict=True)), self.moment, self.manual_backward)
        return {name: float(value) for name, value in sums.items()}, self.norms()

    def norms(self) -> dict[str, float]:
        """Of the gradients there are, by network."""
        return {name: float(clip(network.parameters(), 0.0)) for name, network in self.objective.trained().items()}

    @torch.no_grad()
    def losses(self, parts: list[TileBatch]) -> list[dict[str, float]]:
        """Loss and figures of each micro-batch, by a forward alone."""
        return [
            {"loss": float(loss), **{name: float(value) for name, value in figures.items()}}
            for loss, figures in self.forwards(parts)
        ]

    def forwards(self, parts: list[TileBatch]) -> Iterator[tuple[Tensor, Mapping[str, Any]]]:
        """What the objective says of each micro-batch."""
        return losses_of(self.objective, list(zip(parts, self.firsts, strict=True)), self.moment)

    def first_layer(self) -> str | None:
        """The first layer of a forward whose numbers aren't finite, if one is; else it is the loss itself."""
        with first_not_finite(self.objective) as found:
            self.losses(self.parts)
        return found[0] if found else None

    def terms_by_gradient(self, networks: list[str]) -> list[str]:
        """The terms of a finite loss whose own gradients in these networks aren't finite."""
        _, figures = next(self.forwards(self.parts))
        terms = [name for name, value in figures.items() if isinstance(value, Tensor) and value.requires_grad]
        found = []
        for name in terms:
            self.optimiser.zero_grad()
            for _, figures in self.forwards(self.parts):
                self.manual_backward(figures[name])
            if not all(math.isfinite(norm) for network, norm in self.norms().items() if network in networks):
                found.append(name)
        return found

    def repeated(self, place: int) -> list[TileBatch]:
        """The next step's micro-batches with the tile at this place of its global batch in all places."""
        part, place = divmod(place, self.others[0].tiles)
        chosen = self.others[part]
        tiles = chosen.tiles
        crops = [
            (
                images.unflatten(0, (views, tiles))[:, place : place + 1].expand(-1, tiles, -1, -1, -1).flatten(0, 1),
                views,
            )
            for images, views in chosen.crops
        ]
        return [replace(chosen, crops=crops)] * len(self.others)

    def mixed(self, tiles: Sequence[int], instead: list[TileBatch]) -> list[TileBatch]:
        """The step's micro-batches with tiles of others in place of all but ``tiles``, places in the global batch; masks
        stay where they are."""
        parts, begin = [], 0
        for part, other in zip(self.parts, instead, strict=True):
            count = part.tiles
            kept = torch.tensor([begin + place in tiles for place in range(count)], device=self.device)
            crops = [
                (torch.where(kept.repeat(views).view(-1, 1, 1, 1), images, others), views)
                for (images, views), (others, _) in zip(part.crops, other.crops, strict=True)
            ]
            mpp = None if part.mpp is None or other.mpp is None else torch.where(kept, part.mpp, other.mpp)
            parts.append(replace(part, crops=crops, mpp=mpp))
            begin += count
        return parts

    def only(self, tiles: Sequence[int]) -> TileBatch:
        """Crops and masks of these ``tiles`` of the step."""
        count = self.parts[0].tiles
        places = [divmod(tile, count) for tile in tiles]

        def of(whole: Callable[[TileBatch], Tensor]) -> Tensor:
            return torch.stack(
                [whole(self.parts[part]).unflatten(0, (-1, count))[:, place] for part, place in places], 1
            ).flatten(0, 1)

        sizes = range(len(self.parts[0].crops))
        crops = [(of(lambda part, size=size: part.crops[size][0]), self.parts[0].crops[size][1]) for size in sizes]  # type: ignore[misc]
        return TileBatch(crops, of(lambda part: part.masks))

    def describe(self, place: int) -> dict[str, Any]:
        """Which tile is at a place of the global batch."""
        assert self.batch is not None
        number = torch.cat([part.numbers for part in self.batch.parts])[place].item()
        return {"place": place, "tile": self.tiles.name(int(number)), "slide": self.tiles.slide(int(number))}


def narrowed(suspects: list[int], fails: Callable[[Sequence[int]], bool]) -> Iterator[list[int]]:
    """The smallest sets of ``suspects``, which together fail, that fail without the others, by halves. What only fails
    together is one set."""
    half = len(suspects) // 2
    alone = [part for part in (suspects[:half], suspects[half:]) if part and fails(part)] if half else []
    for part in alone:
        yield from narrowed(part, fails)
    if not alone:
        yield suspects


@contextmanager
def first_not_finite(network: nn.Module) -> Iterator[list[str]]:
    """Names of the modules that gave numbers that aren't finite, in the order in which they ended, while the block
    runs."""
    found: list[str] = []

    def hook(name: str) -> Callable[..., None]:
        def look(_: nn.Module, __: Any, given: Any) -> None:
            if not all(bool(local_shard(one).isfinite().all()) for one in tensors_in(given)):
                found.append(name)

        return look

    handles = [module.register_forward_hook(hook(name)) for name, module in network.named_modules() if name]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def tell(training: Replay, found: ReplayFinding) -> None:
    """Say what was found, and write it into the run's folder, with a picture of the tiles."""
    run, step = training.run, training.step + 1
    by = f" ({', '.join(found.terms)})" if found.terms else ""
    what = f"the gradient of {' and '.join(found.networks)}" if found.networks else "the loss"
    say(f"{run}: step {step} in {found.precision}: {what} isn't finite{by}")
    if found.began:
        say(f"{run}: the first numbers that aren't finite come out of {found.began}")
    if not found.tiles:
        say(
            f"{run}: whatever tiles stand in for them do it too, so it is hardly these: look at the weights and optim.lr"
        )
    named = [[training.describe(place) for place in places] for places in found.tiles]
    for tiles in named:
        names = ", ".join(one["tile"] for one in tiles[:TILES_NAMED]) + (
            f" and {len(tiles) - TILES_NAMED} more" if tiles[TILES_NAMED:] else ""
        )
        say(f"{run}: {names} does it by itself" if len(tiles) == 1 else f"{run}: only together do it: {names}")
    written = {
        "step": step,
        "samples": [training.step * training.batch_size, (training.step + 1) * training.batch_size],
        "seed": training.config.seed,
        "checkpoint": str(training.checkpoint),
        **asdict(found),
        "tiles": named,
    }
    place = run / REPLAY / f"step-{step:08d}.json"
    make_folder(place.parent)
    write_whole(place, json.dumps(written, indent=1) + "\n")
    if found.tiles:
        data, places = training.data, [tile for together in found.tiles for tile in together]
        with appearing(place.with_suffix(".png")) as partial:
            view_sheet(training.only(places), data.mean, data.std).save(partial, format="PNG")
    say(f"{run}: {place} has all of it{', and the crops are beside it' if found.tiles else ''}")
