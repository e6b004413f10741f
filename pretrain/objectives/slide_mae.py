"""Slide masked autoencoding: predict the frozen embeddings of masked tiles from the visible ones.

    visible tiles ──encoder──▶ tiles, CLS ──decoder──▶ predictions at the masked places
                                                           │ mean squared error
    all tiles ──standardised over the data set──▶ targets of the masked tiles

With ``mask_tokens=encoder`` the encoder sees all places, masked ones as mask tokens, and a linear map of its outputs
predicts (Bao et al. 2022, BEiT; Xie et al. 2022, SimMIM).

He et al. 2022 (MAE) with Xu et al. 2024's slide encoder (Prov-GigaPath). The published system names neither its decoder
nor its loss, beyond having adapted MAE; what is chosen here is in ``configs/recipe/gigapath_slide.yaml``. The target is
data: the frozen encoder's embedding, standardised by fixed statistics. Nothing trainable is ever in it, so it can't
collapse.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar
from zlib import crc32

import numpy as np
import torch
from torch import Tensor, nn

from data.embeddings.sequences import SlideBatch
from data.keyed import rng
from models.allowed import Agreements, one_of, within
from models.attention import check_heads
from models.operations import Operations, total_operations
from models.positions import check_sines
from models.sequence_parallel import Group
from models.slide_mae import LinearPrediction, SlideDecoder
from models.slide_network import SlideNetwork
from pretrain.objectives.figures import spread_of_slides
from pretrain.objectives.interface import Moment, SlideObjective
from pretrain.objectives.losses.precision import at_least_float32
from pretrain.objectives.slide_targets import SLIDE_LOSSES, SLIDE_TARGETS, check_target_and_loss
from pretrain.run.across_ranks import total, world_size

BASELINE_NEIGHBOURS = (1, 4, 8, 16, 32)  # the best of these is the baseline: the bar is as high as they can make it
BLOCK = 2**22  # numbers of a baseline that are in memory at a time


def check_mask_tokens(mask_tokens: str, decoder_start: str) -> None:
    """Raise ValueError for a decoder's start where there is none."""
    if mask_tokens == "encoder" and decoder_start != "token":
        raise ValueError(
            "with mask tokens in the encoder there is no decoder that could start so, and token is the one that says nothing"
        )


class SlideMAE(SlideObjective):
    """The slide stage's objective. Keyword arguments are its settings.

    ``make_encoder`` builds the slide encoder; the decoder takes over its input width as output, its kind of layers
    (`SlideNetwork.decoder_layers`) and its initial residual. weighting: "slide" (each slide counts the same) or "token"
    (each masked tile does). decoder_start: see `SlideDecoder`. target, loss: see `pretrain.objectives.slide_targets`;
    ``clusters`` are so many. mask_tokens: "decoder", or "encoder", which needs no decoder.
    """

    masks = True
    learns = "to fill in hidden tile embeddings from the visible ones"
    reading = (
        "Most of a slide's tile embeddings are hidden, and the encoder must tell them from the rest. Explained variance"
        " (R²) of the hidden embeddings, on slides or fields held out from training, is worth something only beside"
        " what needs no learning: the strongest baseline simply averages the nearest visible tiles."
    )
    score = "r2"
    evaluation_passes = 2  # as they are, and with their tiles' places shuffled
    agreements: ClassVar[Agreements] = {
        ("decoder_width", "decoder_heads"): check_heads,
        ("decoder_width",): check_sines,
        ("target", "loss"): check_target_and_loss,
        ("mask_tokens", "decoder_start"): check_mask_tokens,
    }

    def __init__(
        self,
        make_encoder: Callable[[], SlideNetwork],
        *,
        decoder_width: Annotated[int, within(least=1)],
        decoder_depth: Annotated[int, within(least=1)],
        decoder_heads: Annotated[int, within(least=1)],
        decoder_feed_forward_width: Annotated[int, within(least=1)],
        weighting: Annotated[str, one_of("slide", "token")],
        decoder_start: Annotated[str, one_of("token", "nearby")] = "token",
        target: Annotated[str, one_of(*SLIDE_TARGETS)] = "standardised",
        loss: Annotated[str, one_of(*SLIDE_LOSSES)] = "mean_squared",
        clusters: Annotated[int, within(least=2)] = 256,
        mask_tokens: Annotated[str, one_of("decoder", "encoder")] = "decoder",
    ) -> None:
        super().__init__()
        self.weighting, self.target, self.tile_loss = weighting, SLIDE_TARGETS[target], SLIDE_LOSSES[loss]
        self.encoder = make_encoder()
        self._neighbours: dict[tuple[int | str, ...], Tensor] = {}
        output_width = clusters if target == "clusters" else sum(self.encoder.input_widths)
        self.decoder: SlideDecoder | LinearPrediction
        if mask_tokens == "encoder":
            self.encoder.add_mask_token()
            self.decoder = LinearPrediction(self.encoder.width, output_width)
            return
        self.decoder = SlideDecoder(
            encoder_width=self.encoder.width,
            output_width=output_width,
            width=decoder_width,
            layers=self.encoder.decoder_layers(decoder_width, decoder_depth, decoder_heads, decoder_feed_forward_width),
            start=decoder_start,
            initial_residual=self.encoder.initial_residual,
        )

    @classmethod
    def clusters(cls, settings: Mapping[str, Any]) -> int:
        return settings["clusters"] if settings["target"] == "clusters" else 0

    def trained(self) -> dict[str, nn.Module]:
        return {"encoder": self.encoder, "decoder": self.decoder}

    def share_slides(self, group: Group) -> None:
        """Let the processes of ``group`` share every slide's tokens; they get the same batches. ValueError unless the
        heads divide."""
        self.encoder.encoder.share_slides(group)
        if isinstance(self.decoder, SlideDecoder):
            self.decoder.share_slides(group)

    def forward(self, batch: SlideBatch, step_seed: int | None) -> dict[str, Tensor]:
        """Loss and predictions of a batch.

        ``sum`` and ``count``: over any number of ranks or micro-batches the loss is Σ sum / Σ count, the error of each
        masked tile, averaged over slides or over masked tiles. ``prediction``: (M, D or clusters).
        ``pooled``: (B, width), the encoder's view of the tiles that it was shown. Dropout is drawn from (step_seed, the
        sequence's position); None switches it off.
        """
        prediction, pooled = self._predicted(batch, dropout_seeds(batch, step_seed))
        error = self._loss_of_each(prediction, batch)
        if self.weighting == "slide":
            slides = torch.stack([slide.mean() for slide in error.split(batch.masked_lengths)])
            loss, count = slides.sum(), len(slides)
        else:
            loss, count = error.sum(), len(error)
        return {
            "sum": loss,
            "count": torch.full((), float(count), device=loss.device),
            "prediction": prediction,
            "pooled": pooled,
        }

    def _predicted(self, batch: SlideBatch, seeds: Sequence[int] | None) -> tuple[Tensor, Tensor]:
        """Predictions (M, D or clusters) of the masked tiles, and the pooled slides (B, width)."""
        if isinstance(self.decoder, LinearPrediction):
            hidden = torch.zeros(len(batch.cells), dtype=torch.bool, device=batch.cells.device)
            hidden = hidden.index_fill(0, batch.masked, True)
            shown = batch.inputs(store=self.encoder.chosen_input).index_fill(
                0, batch.masked, 0.0
            )  # what is hidden doesn't get as far as a gradient
            seen = self.encoder(shown, batch.cells, batch.lengths, seeds, extent=batch.extent, masked=hidden)
            return self.decoder(seen.tiles[batch.masked]), seen.pooled
        cells, shown = batch.cells[batch.visible], batch.inputs(batch.visible, self.encoder.chosen_input)
        seen = self.encoder(shown, cells, batch.visible_lengths, seeds, extent=batch.extent)
        prediction = self.decoder(
            seen.tiles,
            seen.cls,
            batch.visible,
            batch.masked,
            batch.cells,
            batch.lengths,
            batch.visible_lengths,
            batch.extent,
        )
        return prediction, seen.pooled

    def prepare(self, parts: Sequence[SlideBatch], moment: Moment) -> list[tuple[SlideBatch, Tensor]]:
        """Each micro-batch with what its sum is multiplied by, so that the mean over micro-batches and ranks is the
        global Σ sum / Σ count."""
        counts = [len(part.lengths) if self.weighting == "slide" else len(part.masked) for part in parts]
        everywhere = total(torch.full((), float(sum(counts)), device=parts[0].embeddings.device))
        return [(part, world_size() * len(parts) / everywhere) for part in parts]

    def loss(self, batch: tuple[SlideBatch, Tensor], moment: Moment) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a micro-batch as `prepare` gives it."""
        part, factor = batch
        return self(part, moment.seed)["sum"] * factor, {}

    def operations(self, parts: Sequence[SlideBatch]) -> Operations:
        decoder = self.decoder
        if isinstance(decoder, LinearPrediction):
            return total_operations(
                self.encoder.operations(part.lengths) + decoder.operations(sum(part.masked_lengths)) for part in parts
            )
        return total_operations(
            self.encoder.operations(part.visible_lengths) + decoder.operations(part.lengths, part.visible_lengths)
            for part in parts
        )

    def judged(self, batch: SlideBatch) -> dict[str, Tensor]:
        """Of each sequence: summed squared errors over its masked tiles and their dimensions (``model``, ``shuffled``,
        ``mean``, ``slide_mean``, ``neighbours`` (B, K) for each of `BASELINE_NEIGHBOURS`), its loss summed over masked
        ``tiles``, and its embedding ``pooled`` (B, width)."""
        targets, result = self.target.judged(batch), self(batch, None)
        shuffled, wanted = self(_shuffled(batch), None)["prediction"], targets[batch.masked]
        losses = self._loss_of_each(result["prediction"], batch).double().split(batch.masked_lengths)
        return {
            "model": _error_of_each(batch, self._read(result["prediction"], batch), wanted),
            "shuffled": _error_of_each(batch, self._read(shuffled, batch), wanted),
            "mean": _error_of_each(batch, torch.zeros((), device=wanted.device), wanted),
            **baseline_errors(batch, targets, self._neighbours),
            "loss": torch.stack([some.sum() for some in losses]),
            "tiles": torch.tensor(batch.masked_lengths, device=wanted.device),
            "pooled": result["pooled"],
        }

    def _loss_of_each(self, prediction: Tensor, batch: SlideBatch) -> Tensor:
        """(M,) of each masked tile's prediction."""
        return self.tile_loss.of(at_least_float32(prediction), self.target.of(batch)[batch.masked])

    def _read(self, prediction: Tensor, batch: SlideBatch) -> Tensor:
        """A prediction as what R² is of."""
        return self.target.read(self.tile_loss.complete(prediction, self.target.of(batch), batch), batch)

    def evaluate(self, rows: Mapping[str, Tensor]) -> dict[str, float]:
        """How well masked tiles are predicted, against what needs no learning.

        ``r2`` = 1 - Σ (prediction - target)² / Σ (data-set mean - target)², over masked tiles and dimensions: the
        data-set mean has 0 by definition. ``r2_slide_mean``: of the mean of the slide's visible tiles.
        ``r2_neighbours``: of the mean of the k nearest visible tiles, for the best k of `BASELINE_NEIGHBOURS`; beating
        it is learning. ``shuffled_rise``: relative rise of the error when the visible tiles' places are shuffled within
        each slide; 0 means that places aren't used. ``effective_rank``: RankMe of the pooled slide embeddings (at most
        the number of sequences); their ``feature_cosine`` and ``feature_std``: see `spread`. ``loss``: that of a masked
        tile, unweighted. R² of layer-normed targets is against zero in place of the data set's mean.
        """
        sums = {name: values.sum(0) for name, values in rows.items() if name != "pooled"}
        energy = torch.where(sums["mean"] > 0, sums["mean"], torch.nan)  # what never varies has nothing to explain
        return {
            "loss": float(sums["loss"] / sums["tiles"]),
            "r2": float(1 - sums["model"] / energy),
            "r2_slide_mean": float(1 - sums["slide_mean"] / energy),
            "r2_neighbours": float(1 - sums["neighbours"].min() / energy),
            "shuffled_rise": float(sums["shuffled"] / sums["model"] - 1),
            **spread_of_slides(rows["pooled"]),
        }


def dropout_seeds(batch: SlideBatch, step_seed: int | None) -> list[int] | None:
    """Of each sequence, drawn by (step_seed, its position); None for None."""
    if step_seed is None:
        return None
    return [int(rng(step_seed, "slide dropout", position).integers(2**62)) for position in batch.positions]


def baseline_errors(
    batch: SlideBatch, targets: Tensor, remembered: dict[tuple[int | str, ...], Tensor] | None = None
) -> dict[str, Tensor]:
    """Squared errors, summed over each sequence's masked tiles, of predictions that need no learning: ``slide_mean``
    (B,), the mean of its visible tiles, and ``neighbours`` (B, K), means of nearest visible tiles.

    Masked tiles are looked at as many at a time as fill `BLOCK`, so a slide of a million tiles needs no more. Time grows
    with visible × masked tiles, hours for such a slide, so sums are ``remembered`` for when the same sequence is judged
    again, hidden alike.
    """
    means, near = [], []
    keys, known = _sequence_keys(batch), {} if remembered is None else remembered
    visible, masked = batch.visible.split(batch.visible_lengths), batch.masked.split(batch.masked_lengths)
    for seen, hidden, key in zip(visible, masked, keys, strict=True):
        values, places = targets[seen], batch.cells[seen]
        mean = values.mean(dim=0)
        of_mean, of_near = [], []
        for some in hidden.split(max(1, BLOCK // max(len(seen), BASELINE_NEIGHBOURS[-1] * values.shape[1]))):
            of_mean.append(_errors(mean, targets[some]).sum())
            if key in known:
                continue
            predictions = neighbour_means(values, places, batch.cells[some])
            of_near.append(torch.stack([_errors(one, targets[some]).sum() for one in predictions]))
        means.append(torch.stack(of_mean).sum())
        if key not in known:
            known[key] = torch.stack(of_near).sum(dim=0)
        near.append(known[key])
    return {"slide_mean": torch.stack(means), "neighbours": torch.stack(near)}


def _sequence_keys(batch: SlideBatch) -> list[tuple[int | str, ...]]:
    """Of each sequence: its slide, its position in the stream, and the tiles that it has and hides."""
    first, keys = 0, list[tuple[int | str, ...]]()
    masked = batch.masked.cpu().split(batch.masked_lengths)
    for slide, position, n, hidden in zip(batch.slides, batch.positions, batch.lengths, masked, strict=True):
        cells = batch.cells[first : first + n].cpu().numpy()
        keys.append((slide, position, crc32(cells.tobytes()), crc32((hidden - first).numpy().tobytes())))
        first += n
    return keys


def neighbour_means(values: Tensor, places: Tensor, wanted: Tensor) -> list[Tensor]:
    """For each k of `BASELINE_NEIGHBOURS` the mean ``(m, D)`` of the k ``values`` (V, D) whose ``places`` (V, 2) are
    nearest to each of the places ``wanted`` (m, 2), all integers; of equally near ones the first."""
    n = len(places)
    across, down = ((wanted[:, [axis]] - places[:, axis]).square() for axis in (0, 1))  # (m, V)
    order = (across + down) * n + torch.arange(n, device=places.device)
    nearest = order.topk(min(BASELINE_NEIGHBOURS[-1], n), largest=False, sorted=True).indices
    found = values[nearest]  # (m, most, D)
    return [found[:, :k].mean(dim=1) for k in BASELINE_NEIGHBOURS]


def _shuffled(batch: SlideBatch) -> SlideBatch:
    """The batch with the visible tiles of each slide changing places among themselves, the same way every time."""
    order = np.arange(len(batch.embeddings))
    for slide, position in zip(batch.visible.cpu().split(batch.visible_lengths), batch.positions, strict=True):
        order[slide.numpy()] = rng(0, "shuffled places", position).permutation(slide.numpy())
    places = torch.from_numpy(order).to(batch.embeddings.device)
    further = [store._replace(embeddings=store.embeddings[places]) for store in batch.further]
    return replace(batch, embeddings=batch.embeddings[places], further=further)


def _errors(prediction: Tensor, wanted: Tensor) -> Tensor:
    """Squared error of each row ``(m,)``, in float64."""
    return (at_least_float32(prediction) - wanted).square().sum(dim=1, dtype=torch.float64)


def _error_of_each(batch: SlideBatch, prediction: Tensor, wanted: Tensor) -> Tensor:
    """Squared error ``(B,)`` of each sequence's masked tiles, of ``prediction`` (M, D), or one number for all."""
    rows = max(1, BLOCK // wanted.shape[1])
    predicted = prediction.expand(wanted.shape).split(rows)
    errors = torch.cat([_errors(*some) for some in zip(predicted, wanted.split(rows), strict=True)])
    return torch.stack([each.sum() for each in errors.split(batch.masked_lengths)])
