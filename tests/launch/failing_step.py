"""An objective for runs that are to fail: in the third step, on one rank."""

import os

from torch import Tensor

from pretrain.objectives.interface import Moment
from pretrain.objectives.mae import MAE
from pretrain.objectives.tile_batch import TileBatch


class Failing(MAE):
    """A masked autoencoder, until FAILING_RANK comes to its third step."""

    def loss(self, batch: TileBatch, moment: Moment) -> tuple[Tensor, dict[str, Tensor]]:
        if moment.step == 2 and os.environ["FAILING_RANK"] == os.environ.get("RANK", os.environ.get("SLURM_PROCID")):
            raise ZeroDivisionError("the third step of this rank")
        return super().loss(batch, moment)
