"""A teacher that a run is given: frozen, sharded as trained networks are, and no part of a checkpoint. Its place is in
the settings, a hash of its weights beside the networks, and a run goes on with the same ones.

It sees global crops at as many pixels as make its patches as many as the student's, resized bicubically with antialiasing
(224 px in patches of 14 for a student with 256 px in patches of 16), so grids always match. Colours are normalised as the
student's: ``data.mean`` and ``data.std`` are to be those that it was trained with.
"""

from collections.abc import Mapping
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.initialise import assign
from models.vit import VisionTransformer
from pretrain.encoders.frozen import fingerprint_of
from pretrain.objectives.interface import Objective
from pretrain.objectives.tile_batch import TileBatch

GIVEN = "given"  # the attribute, and so the beginning of its weights' names


class TaughtByGiven(Objective):
    """An objective whose targets are of ``given``, a network that ``source`` names."""

    given: Any

    def learn_from(self, given: nn.Module, source: str) -> None:
        """Learn from that network, whose weights come when the run starts."""
        self.given, self.source, self.digest = given.requires_grad_(False).eval(), source, ""
        self.register_state_dict_post_hook(leave_out_given)
        self.register_load_state_dict_post_hook(not_missed)

    @torch.no_grad()
    def fill_given(self, weights: Mapping[str, Tensor]) -> None:
        """Give it its weights; what is lacking becomes zero, as a mask token, which some formats haven't and nothing
        here uses."""
        self.digest = fingerprint_of(weights)
        for name, target in self.given.state_dict(keep_vars=True).items():
            assign(target, weights[name].float() if name in weights else torch.zeros(target.shape))

    def rests_on(self) -> dict[str, str]:
        return {"objective.teacher": self.digest}

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.given.eval()
        return self


def given_side(given: VisionTransformer, batch: TileBatch) -> int:
    """Pixels a side at which a given encoder has as many patches of a global crop as the student."""
    return int(batch.masks.shape[-1] * given.patch_size)


def shown_to_given(given: VisionTransformer, batch: TileBatch) -> Tensor:
    """The global crops ``(views · tiles, 3, side, side)`` as a given encoder sees them."""
    images, side = batch.crops[0][0], given_side(given, batch)
    if side == images.shape[-1]:
        return images
    return F.interpolate(images, (side, side), mode="bicubic", antialias=True, align_corners=False)


def leave_out_given(_: nn.Module, state: dict[str, Any], prefix: str, *__: Any) -> None:
    """Take the given teacher out of a state that is to be saved."""
    for name in [name for name in state if name.startswith(f"{prefix}{GIVEN}.")]:
        del state[name]


def not_missed(_: nn.Module, incompatible: Any) -> None:
    """Let a state be loaded that lacks the given teacher."""
    incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if not name.startswith(f"{GIVEN}.")]
