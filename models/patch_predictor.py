"""The predictor of patch tokens: from what a student says of a masked crop to what its teacher says of the whole one.

    a crop's patch tokens, masked ones too ──embed──▶ blocks ──norm, head──▶ the teacher's tokens at the masked places

I-JEPA's predictor (Assran et al. 2023) as nanopath has it: no mask tokens and no positions of its own, since the
encoder's tokens carry both. It is thrown away after pretraining.
"""

import torch
from torch import Tensor, nn

from models.attention import check_heads
from models.operations import Operations, linear_maps, total_operations
from models.vit import MLP, Block


class PatchPredictor(nn.Module):
    """Blocks of ``width`` between two linear maps; the first is there where ``width`` isn't the encoder's.

    Raises ValueError for a width that the heads don't divide.
    """

    def __init__(self, *, encoder_width: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        check_heads(width, heads)
        self.embed = nn.Identity() if width == encoder_width else nn.Linear(encoder_width, width)
        self.layers = nn.ModuleList(
            Block(width, heads, 4 * width, MLP, scaled=True, attention="sdpa") for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, encoder_width)

    def units(self) -> list[nn.Module]:
        """What is gathered, recomputed and compiled by itself, in the order in which it runs: see
        `pretrain.training.sharding`."""
        return list(self.layers)

    def forward(self, patches: Tensor, wanted: Tensor | None = None) -> Tensor:
        """Predictions ``(B, L, encoder_width)`` from patch tokens of the same shape.

        ``wanted`` ``(M,)`` int64: of which of the B · L patches they are wanted, ``(M, encoder_width)`` then; the last
        block computes no more than these.
        """
        shape = patches.shape[:2]
        x = self.embed(patches.flatten(0, 1))
        *before, last = self.layers
        for layer in before:
            x = layer(x, [tuple(shape)])
        x = last(x, [tuple(shape)], None, wanted)
        predicted = self.head(self.norm(x))
        return predicted.unflatten(0, shape) if wanted is None else predicted

    def operations(self, crops: int, patches: int, wanted: int) -> Operations:
        """Of so many ``crops``, each of ``patches`` patches, with predictions for ``wanted`` of them in all."""
        *before, last = (layer for layer in self.layers if isinstance(layer, Block))
        blocks = total_operations(layer.operations([(crops, patches)]) for layer in before)
        around = linear_maps(crops * patches, self.embed) + linear_maps(wanted, self.head)
        return around + blocks + last.operations([(crops, patches)], wanted)

    def initialise(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Torch's initial values for linear maps, as nanopath has them, and layer scales of 1: see
        `models.initialise`."""
        if name not in self.state_dict():
            raise KeyError(name)
        if "norm" in name or name.endswith("gamma"):
            tensor.fill_(0.0 if name.endswith("bias") else 1.0)
        else:  # U(±1/√fan_in), weights and biases
            bound = self.get_parameter(f"{name.rpartition('.')[0]}.weight").shape[1] ** -0.5
            tensor.uniform_(-bound, bound, generator=generator)
