"""Continued pretraining: a run whose encoder starts from published weights instead of random ones (``init=``).

The student's encoder takes the weights before the teacher is copied from it; heads start anew, and
``optim.frozen_backbone_steps`` lets them settle first: released backbones collapse while heads are random. Every weight
is accounted for: missing or unexpected ones are an error that names them.
"""

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data.fault import Fault
from models.formats import checkpoint_file, timm
from models.formats.published import PublishedWeights, require_finite
from models.formats.timm_dinov3 import EPSILON, read_timm_dinov3
from models.initialise import assign
from models.rotary import BASE_PERIOD
from models.vit import VisionTransformer
from pretrain.encoders.run_checkpoint import find_checkpoint, teacher
from pretrain.encoders.timm_models import timm_module
from pretrain.encoders.weight_files import TRANSFORMERS_CONFIG, is_transformers, read_file, read_transformers_folder


def find_encoder(source: str, plugins: Collection[str] = ()) -> PublishedWeights:
    """The encoder that ``source`` names: a run or one of its checkpoints (the teacher), a folder that ``pretrain
    export`` or transformers wrote, a weight file with DINOv2's, DINOv3's or timm's names (of several encoders in it,
    the one at ``FILE::PLACE``), or a model that timm has weights for.

    ``plugins`` are the packages whose classes a run may name beside ours. Raises `Fault` where it names nothing or
    holds no vision transformer.
    """
    path, (file, _, place) = Path(source), source.partition("::")
    if Path(file).is_file():
        try:
            return checkpoint_file.read_checkpoint_file(read_file(Path(file)), place)
        except ValueError as error:
            raise Fault(f"init={source} holds no encoder that can be read: {error}") from error
    if not path.is_dir():
        return from_timm(source, source)
    if is_transformers(path):
        return read_transformers_folder(path)
    if (path / TRANSFORMERS_CONFIG).is_file():
        return from_timm(f"local-dir:{path}", source)
    network, _ = teacher(find_checkpoint(path, plugins))
    if not isinstance(network, VisionTransformer):
        raise Fault(f"init={source} holds a {type(network).__name__}, not a models.vit.VisionTransformer")
    weights = dict(network.state_dict())
    return PublishedWeights(
        "its run",
        weights,
        network.heads,
        network.position_antialias,
        network.position_offset,
        norm_epsilon=network.norm_epsilon,
    )


def from_timm(name: str, source: str) -> PublishedWeights:
    """A model that timm loads with its weights. Raises Fault where there are none, or of another network."""
    from timm.models.vision_transformer import VisionTransformer as TimmTransformer

    try:
        module = timm_module(name)
    except Fault as fault:
        raise Fault(f"init={source}: {fault}") from fault
    if is_dinov3_of_timm(module):
        try:
            return read_timm_dinov3(module.state_dict(), heads=int(module.blocks[0].attn.num_heads))  # type: ignore[union-attr, index, arg-type]
        except ValueError as error:
            raise Fault(f"init={source}: {error}") from error
    if not isinstance(module, TimmTransformer):
        raise Fault(
            f"init={source} is a {type(module).__name__}, and only timm's VisionTransformer, and its Eva with DINOv3's"
            " positions, have this network's weights"
        )
    rows, columns = module.patch_embed.grid_size
    heads = int(module.blocks[0].attn.num_heads)  # type: ignore[union-attr, arg-type]
    if rows != columns:
        raise Fault(f"init={source} has {rows} × {columns} positions: only square grids are read")
    try:
        return timm.read_timm(module.state_dict(), heads=heads, grid=rows)
    except ValueError as error:
        raise Fault(f"init={source}: {error}") from error


def is_dinov3_of_timm(module: nn.Module) -> bool:
    """Whether a timm model is an ``Eva`` that computes what DINOv3 does: its angles, its norms, no other positions."""
    from timm.layers import RotaryEmbeddingDinoV3
    from timm.models.eva import Eva

    if not isinstance(module, Eva) or not isinstance(module.rope, RotaryEmbeddingDinoV3):
        return False
    rope: Any = module.rope
    return (
        module.pos_embed is None
        and rope.temperature == BASE_PERIOD
        and rope.min_period is None
        and rope.rotate_half
        and rope.normalize_coords == "separate"
        and getattr(module.norm, "eps", None) == EPSILON
    )


@torch.no_grad()
def start_from(source: str, trained: Iterable[nn.Module], plugins: Collection[str] = ()) -> list[str]:
    """Put the weights that ``source`` names into the encoder among the ``trained`` networks, whole or sharded; every rank
    calls it.

    Returns sentences about what wasn't taken as it stands. Raises `Fault` where the weights don't fit, naming them.
    """
    encoders = [network for network in trained if isinstance(network, VisionTransformer)]
    if len(encoders) != 1:
        raise Fault(
            f"init={source} needs an objective with one vision transformer to train, and this one has {len(encoders)}"
        )
    (encoder,) = encoders
    published = find_encoder(source, plugins)
    try:
        require_finite(published.weights)
    except ValueError as error:
        raise Fault(f"init={source} is not usable: {error}") from error
    try:
        weights, said = published.fit(encoder)
    except ValueError as error:
        raise Fault(
            f"init={source} doesn't fit the model ({error}): the settings under model: must be those it was made with"
        ) from error
    targets = encoder.state_dict(keep_vars=True)
    for name, value in weights.items():
        assign(targets[name], value.float())
    return said
