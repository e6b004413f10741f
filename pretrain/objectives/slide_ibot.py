"""Slide iBOT: a student and its moving average compare square crops of a slide's grid (MOOZY's first stage, 2026; TITAN's is
its kin).

teacher  ←EMA─  student
   │               │
global crops    global crops, half of them with masked blocks of cells, and local crops
   │               │
class, cells    class, masked cells  ──heads──▶ prototype scores
   └─ centring ────┴─ cross-entropies

DINO's loss on class tokens trains the slide vector itself; iBOT's on masked cells the tiles' (Zhou et al. 2022).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, NamedTuple, Unpack

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.embeddings.grid_crops import CropBatch
from data.keyed import rng
from data.on_device import on_device
from models.allowed import within
from models.operations import Operations, total_operations
from models.slide_network import SlideFeatures, SlideNetwork
from pretrain.objectives.figures import spread_of_slides
from pretrain.objectives.interface import Moment, SlideObjective
from pretrain.objectives.losses.cross_entropy import cross_view_entropy, masked_cross_entropy
from pretrain.objectives.losses.precision import at_least_float32
from pretrain.objectives.self_distillation import (
    Network,
    SelfDistillation,
    Taught,
    TeachingOfLevels,
    prototypes_of_levels,
    teaching_of,
    two_level_network,
)
from pretrain.objectives.spreading import Spread
from pretrain.objectives.tile_batch import Target
from pretrain.run.across_ranks import total, world_size


class TaughtCrops(NamedTuple):
    """A micro-batch as its loss gets it."""

    batch: CropBatch
    targets: dict[str, Target]
    factors: Tensor  # (2,) what sums over its slides, and over its masked crops, are multiplied by


class SlideIBOT(SelfDistillation, SlideObjective):
    """The objective. Keyword arguments are its settings (``configs/objective/slide_ibot.yaml`` explains each).

    ``make_encoder`` builds the slide encoder; it is called twice, for student and teacher. ``group_size``: slides whose
    class tokens the spread compares.
    """

    masks = True
    crops = True
    reading = (
        f"{SelfDistillation.reading} 'matched' is the share of held-out slides whose two large crops the teacher finds to"
        " belong together, and worth something only beside 'matched_means', what the mean of a crop's tiles gives."
    )
    score = "matched"
    evaluation_passes = 1

    def __init__(
        self,
        make_encoder: Callable[[], SlideNetwork],
        *,
        group_size: Annotated[int, within(least=2)],
        **settings: Unpack[TeachingOfLevels],
    ) -> None:
        def network() -> Network:
            encoder = make_encoder()
            encoder.add_mask_token()
            return two_level_network(encoder, settings)

        super().__init__(network, prototypes_of_levels(settings), **teaching_of(settings))
        self.group_size = group_size
        self.dino_weight, self.ibot_weight = settings["dino_weight"], settings["ibot_weight"]
        self.spread = Spread(settings, group_size)

    def teacher_tokens(self, batch: CropBatch) -> dict[str, Taught]:
        """Of global crops, nothing masked. All their cells move the patches' centre, the masked ones become targets."""
        n = batch.global_tiles
        seen = self.teacher.encoder(
            batch.inputs(slice(0, n)),
            batch.cells[:n],
            batch.lengths[: batch.global_crops],
            extent=batch.extent,
            valid=None if batch.valid is None else batch.valid[:n],
            valid_lengths=None if batch.valid_lengths is None else batch.valid_lengths[: batch.global_crops],
        )
        return {"dino": Taught(seen.cls), "ibot": Taught(seen.tiles, batch.masked)}

    def teacher_scores(self, kind: str, tokens: Tensor) -> Tensor:
        return self.teacher.dino_head(tokens) if kind == "dino" else self.teacher.score_patches(tokens)

    def student_features(self, batch: CropBatch, seed: int | None) -> SlideFeatures:
        """What the student says of all crops, with blocks masked. Dropout is drawn from (seed, position, view); None
        switches it off."""
        seeds = None
        if seed is not None:
            views = range(batch.global_count + batch.local_count)
            keys = [(position, view) for view in views for position in batch.positions]
            seeds = [int(rng(seed, "slide dropout", *key).integers(2**62)) for key in keys]
        masked = torch.zeros(len(batch.cells), dtype=torch.bool, device=batch.cells.device)
        found: SlideFeatures = self.student.encoder(
            batch.inputs(),
            batch.cells,
            batch.lengths,
            seeds,
            extent=batch.extent,
            masked=masked.index_fill(0, batch.masked, True),
            valid=batch.valid,
            valid_lengths=batch.valid_lengths,
        )
        return found

    def prepare(self, parts: Sequence[CropBatch], moment: Moment) -> list[TaughtCrops]:
        """Each micro-batch with its targets, and with what its sums are multiplied by, so that the mean over
        micro-batches and ranks is that over the global batch's slides, and over its masked crops."""
        slides = sum(len(part.positions) for part in parts)
        crops = sum(n > 0 for part in parts for n in part.masked_lengths)
        everywhere = total(on_device(np.array([slides, crops], np.float32), parts[0].embeddings.device))
        factors = world_size() * len(parts) / everywhere.clamp(min=1)
        found = self.targets_of(parts, moment)
        return [TaughtCrops(part, targets, factors) for part, targets in zip(parts, found, strict=True)]

    def loss(self, batch: TaughtCrops, moment: Moment) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a micro-batch as `prepare` gives it."""
        part, targets, factors = batch
        seen = self.student_features(part, moment.seed)
        scores = by_crop_view(self.student.dino_head(seen.cls), part)
        hidden = self.student.score_patches(seen.tiles.index_select(0, part.masked))

        teacher = targets["dino"]().unflatten(0, (part.global_count, -1))
        of_slides = len(part.positions) * factors[0]
        dino_global, dino_local = (
            of_slides * term for term in cross_view_entropy(scores, teacher, self.student_temperature)
        )
        counts = np.repeat(part.masked_lengths, part.masked_lengths)  # of each masked tile, those of its crop
        weight = 1 / on_device(counts.astype(np.float32), hidden.device)
        ibot = factors[1] * masked_cross_entropy(hidden, targets["ibot"](), weight, 1, self.student_temperature)

        loss = self.dino_weight * (dino_global + dino_local) + self.ibot_weight * ibot
        figures = {"dino_global": dino_global, "dino_local": dino_local, "ibot": ibot}
        if self.spread.peak:
            figures["spread"] = self.spread(seen.cls[: part.global_crops], moment)
            loss = loss + self.spread.weight(moment) * part.global_count * figures["spread"]
        return loss, figures | self.schedules(moment)

    def operations(self, parts: Sequence[CropBatch]) -> Operations:
        return total_operations(self._operations(part, len(parts)) for part in parts)

    def _operations(self, batch: CropBatch, parts: int) -> Operations:
        crops, masked = batch.global_crops, len(batch.masked)
        head = "ibot_head" if self.student.ibot_head else "dino_head"
        return (
            self.student.encoder.operations(batch.lengths)
            + self.teacher.encoder.operations(batch.lengths[:crops]).without_gradients
            + self.head_operations("dino_head", len(batch.lengths), crops, parts)
            + self.head_operations(head, masked, masked, parts, moving=batch.global_tiles)
        )

    def judged(self, batch: CropBatch) -> dict[str, Tensor]:
        """Of each slide: the teacher's class tokens of its global crops ``cls`` (N, views, width), and ``means`` (N,
        views, D) of these crops' standardised tiles; the share ``class_agreed`` of pairs of crops in which student and
        teacher choose one prototype, and of ``masked`` cells (N, 2) those ``masked_agreed`` on."""
        n, device = len(batch.positions), batch.cells.device
        taught, seen = self.teacher_tokens(batch), self.student_features(batch, None)
        own = torch.cat([part.argmax(-1) for part in by_crop_view(self.student.dino_head(seen.cls), batch)])
        choices = {kind: self._choices(kind, part.targets(part.tokens)) for kind, part in taught.items()}
        theirs = choices["dino"].unflatten(0, (batch.global_count, n))
        pairs = [own[s] == theirs[t] for s in range(len(own)) for t in range(len(theirs)) if s != t]
        agreed = self.student.score_patches(seen.tiles.index_select(0, batch.masked)).argmax(-1) == choices["ibot"]
        crop = np.arange(len(batch.lengths))
        of_masked = on_device(np.repeat(crop, batch.masked_lengths) % n, device)
        of_tile = on_device(np.repeat(crop, batch.lengths)[: batch.global_tiles], device)
        tiles = batch.targets()[: batch.global_tiles]
        there = torch.ones_like(tiles[:, 0]) if batch.valid is None else batch.valid[: len(tiles)].to(tiles.dtype)
        sums = tiles.new_zeros(batch.global_crops, tiles.shape[1] + 1)
        sums.index_add_(0, of_tile, torch.cat([tiles, torch.ones_like(tiles[:, :1])], 1) * there[:, None])
        counts = torch.stack([agreed, torch.ones_like(agreed)], 1).float()
        return {
            "cls": taught["dino"].tokens.float().unflatten(0, (batch.global_count, n)).transpose(0, 1),
            "means": (sums[:, :-1] / sums[:, -1:]).unflatten(0, (batch.global_count, n)).transpose(0, 1),
            "class_agreed": torch.stack(pairs).float().mean(0),
            "masked": torch.zeros(n, 2, device=device).index_add_(0, of_masked, counts),
        }

    def _choices(self, kind: str, tokens: Tensor) -> Tensor:
        """The teacher's first choice ``(n,)`` of prototypes, as its targets have it where a centre moves."""
        scores: Tensor = at_least_float32(self.teacher_scores(kind, tokens)) - getattr(self, f"{kind}_centre")
        return scores.argmax(-1)

    def evaluate(self, rows: Mapping[str, Tensor]) -> dict[str, float]:
        """What the class token knows of slides that weren't trained on.

        ``matched``: share of global crops whose nearest one of another view, by the teacher's class tokens' cosine, is
        of the same slide; by chance one over the number of slides, in collapse too; NaN of one slide. ``matched_means``: the same by the
        means of the crops' standardised tiles, which needs no learning. ``class_agreement`` and ``masked_agreement``:
        how often student and teacher choose one prototype, of pairs of crops and of masked cells; 1 in collapse.
        ``effective_rank``, ``feature_cosine``, ``feature_std``: of the teacher's class tokens, see `pretrain.objectives.
        figures.spread`.
        """
        agreed, masked = rows["masked"].sum(0).tolist()
        return {
            "matched": matched(rows["cls"]),
            "matched_means": matched(rows["means"]),
            "class_agreement": float(rows["class_agreed"].mean()),
            "masked_agreement": agreed / max(masked, 1),
            **spread_of_slides(rows["cls"]),
        }


def by_crop_view(scores: Tensor, batch: CropBatch) -> list[Tensor]:
    """Rows ``(all crops, K)`` → of global, and of local crops where there are some, ``(views, N, K)``."""
    counts = [count for count in (batch.global_count, batch.local_count) if count]
    parts = scores.split([count * len(batch.positions) for count in counts])
    return [part.unflatten(0, (count, -1)) for part, count in zip(parts, counts, strict=True)]


def matched(features: Tensor) -> float:
    """Of features ``(N, views, D)``, the share of pairs of views in which the nearest of the other view is of the same
    row; NaN of one row, which is always its own nearest."""
    if len(features) < 2:
        return math.nan
    unit = F.normalize(features, dim=-1)
    own = torch.arange(len(unit), device=unit.device)
    views = range(unit.shape[1])
    found = [(unit[:, a] @ unit[:, b].T).argmax(1) == own for a in views for b in views if a != b]
    return float(torch.stack(found).double().mean())
