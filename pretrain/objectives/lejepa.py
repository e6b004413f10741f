"""LeJEPA (Balestriero & LeCun 2025, arXiv 2511.08544): views of a tile predict their mean, and projections are held to an
isotropic Gaussian, which no collapsed ones are.

    all crops ──encoder──▶ class tokens ──projector──▶ projections, (views, tiles, width)
                                                          │  (1 − λ) · squared distance to the mean over global views
                                                          │  + λ · SIGReg over the tiles of each view
One network: no teacher, no moving average, no gradient stopped; the encoder itself is what is judged and exported.

SIGReg belongs to the global batch: its characteristic functions are means over the tiles of all ranks and micro-batches,
as Sinkhorn-Knopp's assignments are. Where a step has several micro-batches, all pass forward once without gradients
before the first loss, which costs a third of a step; a batch in one part costs nothing more.

Set against the public code (rbalestr-lab/lejepa): it projects through batch norms, whose numbers depend on how a batch is
shared out; here hidden layers have layer norms, of each sample by itself. Its stochastic depth scales single samples, here
samples are skipped, as in DINOv2.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated

import torch
from torch import Tensor, nn

from data.stochastic_depth import StochasticDepth
from models.allowed import SHARE, within
from models.heads import Projector
from models.operations import Operations, total_operations
from models.vit import VisionTransformer
from pretrain.objectives.interface import Moment, Objective
from pretrain.objectives.losses.precision import at_least_float32
from pretrain.objectives.losses.sigreg import characteristic_means, drawn_directions, epps_pulley
from pretrain.objectives.packed_views import (
    by_view,
    depth_of,
    operations_of_views,
    require_two_views,
    shapes_of_views,
    tokens_of_views,
)
from pretrain.objectives.tile_batch import TileBatch
from pretrain.run.across_ranks import total, world_size


class LeJEPA(Objective):
    """The objective. Keyword arguments are its settings (``configs/objective/lejepa.yaml`` explains each)."""

    reading = (
        "Of projections that are an isotropic Gaussian 'sigreg' is about 1.05, of collapsed ones .4 times the batch's"
        " tiles: it falls first. 'prediction' of such is about 1.2 where views have nothing in common."
    )

    def __init__(
        self,
        make_encoder: Callable[[], VisionTransformer],
        *,
        group_size: Annotated[int, within(least=1)],
        hidden: Annotated[int, within(least=1)],
        head_layers: Annotated[int, within(least=1)],
        projection: Annotated[int, within(least=2)],
        slices: Annotated[int, within(least=1)],
        sigreg_weight: Annotated[float, SHARE],
    ) -> None:
        super().__init__()
        self.encoder = make_encoder()
        self.encoder.mask_token.requires_grad_(False)  # nothing is masked
        self.projector = Projector(self.encoder.width, hidden=hidden, layers=head_layers, outputs=projection)
        self.group_size, self.slices, self.sigreg_weight = group_size, slices, sigreg_weight

    def trained(self) -> dict[str, nn.Module]:
        return {"encoder": self.encoder, "projector": self.projector}

    @classmethod
    def check_views(cls, global_count: int, local_count: int) -> None:
        require_two_views(global_count, local_count)

    def stochastic_depth(self) -> StochasticDepth | None:
        return depth_of(self.encoder, self.group_size)

    def projections(self, batch: TileBatch, moment: Moment) -> Tensor:
        """``(views, tiles, width)`` of a micro-batch, global views first."""
        wanted = [None] * len(batch.crops)
        tokens = tokens_of_views(self.encoder, self.group_size, batch, moment, wanted=wanted)
        projected = at_least_float32(self.projector(torch.cat([part.cls for part in tokens])))
        return torch.cat(by_view(projected, batch))

    def means(self, z: Tensor, moment: Moment) -> Tensor:
        """`characteristic_means` of projections, on the step's directions."""
        return characteristic_means(z, drawn_directions(z.shape[-1], self.slices, moment, z))

    @torch.no_grad()
    def prepare(self, parts: Sequence[TileBatch], moment: Moment) -> Sequence[TileBatch]:
        """Of several micro-batches, each with the means over all of them and the number of their tiles. What skips
        branches must come with them: it is drawn by tiles' numbers in the global batch."""
        if len(parts) == 1:
            return parts
        own = [self.means(self.projections(part, moment), moment) for part in parts]
        means = total(torch.stack(own).mean(0)) / world_size()
        samples = torch.full((), float(sum(part.tiles for part in parts) * world_size()), device=means.device)
        return [replace(part, targets={"means": lambda: means, "samples": lambda: samples}) for part in parts]

    def loss(self, batch: TileBatch, moment: Moment) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a micro-batch of augmented crops; its masks play no part."""
        z = self.projections(batch, moment)
        prediction = (z - z[: batch.crops[0][1]].mean(0)).square().mean()
        own = self.means(z, moment)
        samples: Tensor | float
        if batch.targets is None:
            everywhere, samples = total(own) / world_size(), float(batch.tiles * world_size())
        else:
            everywhere, samples = batch.targets["means"](), batch.targets["samples"]()
        # The means of everywhere, with the gradient of one's own: the mean of the parts' gradients is then the whole's.
        sigreg = epps_pulley(own + (everywhere - own).detach(), samples).mean()
        loss = (1 - self.sigreg_weight) * prediction + self.sigreg_weight * sigreg
        return loss, {"prediction": prediction, "sigreg": sigreg}

    def operations(self, parts: Sequence[TileBatch]) -> Operations:
        one = total_operations(self._operations(part) for part in parts)
        return one if len(parts) == 1 else one + one.without_gradients

    def _operations(self, batch: TileBatch) -> Operations:
        crops = [count for count, _ in shapes_of_views(self.encoder, batch)]
        onto_lines = 2.0 * sum(crops) * self.projector.outputs * self.slices
        return (
            operations_of_views(self.encoder, self.group_size, batch, crops)
            + self.projector.operations(sum(crops))
            + Operations(onto_lines, onto_lines)
        )
