"""Tiny objectives and batches for tests."""

import atexit
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
import yaml
from safetensors.torch import save_file

from models.initialise import initialise
from models.vit import VisionTransformer
from pretrain.objectives.dino import DINO
from pretrain.objectives.dinov2 import DINOv2
from pretrain.objectives.dinov3 import DINOv3
from pretrain.objectives.distil import Distil
from pretrain.objectives.distil_heads import DistilHeads
from pretrain.objectives.interface import Objective
from pretrain.objectives.jepa import JEPA
from pretrain.objectives.lejepa import LeJEPA
from pretrain.objectives.mae import MAE
from pretrain.objectives.tile_batch import TileBatch
from pretrain.run import checkpoints

GLOBAL, LOCAL, PATCH = 16, 8, 4
GRAM = 24  # pixels of the crops that DINOv3's Gram teacher sees
TEACHING = {
    "student_temperature": 0.1,
    "teacher_temperature": 0.07,
    "teacher_temperature_start": 0.04,
    "teacher_temperature_warmup": 0,
    "teacher_momentum": 0.9,
    "teacher_momentum_final": 1.0,
}
ENCODER = {
    "image_size": GLOBAL,
    "patch_size": PATCH,
    "width": 16,
    "depth": 2,
    "heads": 2,
    "feed_forward_width": 32,
    "layer_scale": 1.0,
}
HEAD = {"prototypes": 24, "bottleneck": 8, "hidden": 16, "head_layers": 2}
SPREADING = {"spread": "koleo", "spread_weight": 0.1, "spread_concentration": 5.0, "spread_ramp": [0.0, 0.0]}


def encoder(**settings: object) -> Callable[[], VisionTransformer]:
    return lambda: VisionTransformer(**(ENCODER | settings))  # type: ignore[arg-type]


def filled(objective: Objective, seed: int = 0) -> Objective:
    """The objective with the first values that a run would give it."""
    for name, network in objective.trained().items():
        initialise(network, seed, name)
    objective.start()
    return objective


def dinov2(
    centring: str = "sinkhorn",
    drop_path: float = 0.0,
    drop_path_rising: bool = False,
    depth: int = 2,
    **settings: object,
) -> DINOv2:
    of_encoder = {"drop_path": drop_path, "drop_path_rising": drop_path_rising, "depth": depth}
    return filled(unfilled_dinov2(encoder(**of_encoder), centring=centring, **settings))  # type: ignore[return-value]


def unfilled_dinov2(make_encoder: Callable[[], VisionTransformer], **settings: object) -> DINOv2:
    values = {
        **TEACHING,
        **HEAD,
        "group_size": 2,
        "separate_ibot_head": True,
        "ibot_prototypes": 20,
        "ibot_bottleneck": 8,
        "dino_weight": 1.0,
        "ibot_weight": 1.0,
        "frozen_prototype_norms": False,
        **SPREADING,
        "centring": "sinkhorn",
    }
    return DINOv2(make_encoder, **(values | settings))  # type: ignore[arg-type]


def unfilled_dinov3(make_encoder: Callable[[], VisionTransformer], **settings: object) -> DINOv3:
    values = {
        **TEACHING,
        **HEAD,
        "group_size": 2,
        "ibot_prototypes": 20,
        "ibot_bottleneck": 8,
        "dino_weight": 1.0,
        "local_weight": 0.5,
        "ibot_weight": 1.0,
        **SPREADING,
        "gram_weight": 2.0,
        "gram_size": GRAM,
        "gram_every": 3,
        "gram_refreshes": 2,
        "gram_negatives": "kept",
    }
    return DINOv3(make_encoder, **(values | settings))  # type: ignore[arg-type]


def jepa(drop_path: float = 0.0, **settings: object) -> JEPA:
    return filled(unfilled_jepa(encoder(drop_path=drop_path, drop_path_rising=True), **settings))  # type: ignore[return-value]


def unfilled_jepa(make_encoder: Callable[[], VisionTransformer], **settings: object) -> JEPA:
    values = {
        **TEACHING,
        **HEAD,
        **SPREADING,
        "spread": "kde",
        "group_size": 2,
        "frozen_prototype_norms": True,
        "dino_weight": 1.0,
        "patch_weight": 1.0,
        "predictor_width": 12,
        "predictor_depth": 2,
        "predictor_heads": 2,
        "centring": "sinkhorn",
    }
    return JEPA(make_encoder, **(values | settings))  # type: ignore[arg-type]


def dino(centring: str = "centre", drop_path: float = 0.0, **settings: object) -> DINO:
    return filled(unfilled_dino(encoder(drop_path=drop_path), centring=centring, **settings))  # type: ignore[return-value]


def unfilled_dino(make_encoder: Callable[[], VisionTransformer], **settings: object) -> DINO:
    values = {**TEACHING, **HEAD, "group_size": 2, "frozen_prototype_norms": True, "centring": "centre"}
    return DINO(make_encoder, **(values | settings))  # type: ignore[arg-type]


def mae(**settings: object) -> MAE:
    return filled(unfilled_mae(encoder(position_embedding="sincos"), **settings))  # type: ignore[return-value]


def unfilled_mae(make_encoder: Callable[[], VisionTransformer], **settings: object) -> MAE:
    values = {"mask_ratio": 0.75, "norm_pix": True, "decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}
    return MAE(make_encoder, **(values | settings))  # type: ignore[arg-type]


@cache
def teacher_file(width: int = 24, patch_size: int = 6, heads: int = 3) -> str:
    """A file of an encoder of another width and patch size with random weights, by timm's names."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with torch.device("cpu"):
        network = encoder(width=width, patch_size=patch_size, image_size=4 * patch_size, heads=heads)()
        initialise(network, 7, "teacher")
        weights = {name: tensor for name, tensor in network.state_dict().items() if name != "mask_token"}
        save_file(weights, folder / "teacher.safetensors")
    return str(folder / "teacher.safetensors")


def distil(
    drop_path: float = 0.0, make_encoder: Callable[[], VisionTransformer] | None = None, **settings: object
) -> Distil:
    return filled(unfilled_distil(make_encoder or encoder(drop_path=drop_path), **settings))  # type: ignore[return-value]


def unfilled_distil(make_encoder: Callable[[], VisionTransformer], **settings: object) -> Distil:
    values = {
        "teacher": teacher_file(),
        "teacher_heads": 3,
        "teacher_epsilon": None,
        "group_size": 2,
        "distance": "cosine",
        "class_weight": 1.0,
        "local_weight": 0.5,
        "patch_weight": 1.0,
        "teacher_momentum": 0.9,
        "teacher_momentum_final": 1.0,
    }
    return Distil(make_encoder, **(values | settings))  # type: ignore[arg-type]


@cache
def teacher_run(kind: str = "dinov3", patch_size: int = 6, seed: int = 7, **settings: object) -> str:
    """A run's folder with a checkpoint of an untrained objective, of another width and patch size."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    model = ENCODER | {"width": 24, "heads": 3, "patch_size": patch_size, "image_size": 4 * patch_size}
    kinds: dict[str, Callable[..., Objective]] = {
        "dino": unfilled_dino,
        "dinov2": unfilled_dinov2,
        "dinov3": unfilled_dinov3,
        "distil_heads": unfilled_distil_heads,
    }
    with torch.device("cpu"):
        objective = filled(kinds[kind](encoder(**model), **settings), seed)
    crops = {"global_size": model["image_size"]}
    config = {
        "model": {"_target_": "models.vit.VisionTransformer", **model},
        "data": {"mean": [0.5] * 3, "std": [0.5] * 3, "crops": crops},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    writer = checkpoints.Writer(folder, 1, {}, keep=1)
    dcp.save({"model": objective.state_dict()}, storage_writer=writer, no_dist=True)
    return str(folder)


def distil_heads(drop_path: float = 0.0, **settings: object) -> DistilHeads:
    return filled(unfilled_distil_heads(encoder(drop_path=drop_path), **settings))  # type: ignore[return-value]


def unfilled_distil_heads(make_encoder: Callable[[], VisionTransformer], **settings: object) -> DistilHeads:
    values = {
        **TEACHING,
        **SPREADING,
        "teacher": teacher_run(),
        "group_size": 2,
        "dino_weight": 1.0,
        "ibot_weight": 1.0,
    }
    return DistilHeads(make_encoder, **(values | settings))  # type: ignore[arg-type]


def lejepa(drop_path: float = 0.0, **settings: object) -> LeJEPA:
    return filled(unfilled_lejepa(encoder(drop_path=drop_path), **settings))  # type: ignore[return-value]


def unfilled_lejepa(make_encoder: Callable[[], VisionTransformer], **settings: object) -> LeJEPA:
    values = {"group_size": 2, "hidden": 16, "head_layers": 3, "projection": 8, "slices": 32, "sigreg_weight": 0.05}
    return LeJEPA(make_encoder, **(values | settings))  # type: ignore[arg-type]


def batch(
    tiles: int,
    views: tuple[int, int] = (2, 3),
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    larger: bool = False,
) -> TileBatch:
    """Noise as crops; every second global crop has one to five of its sixteen patches masked. ``larger``: with the
    global crops at another size, as DINOv3's Gram teacher sees them."""
    draw = torch.Generator().manual_seed(seed)
    crops = [
        (torch.randn(count * tiles, 3, side, side, generator=draw, dtype=dtype), count)
        for count, side in zip(views, (GLOBAL, LOCAL), strict=True)
        if count
    ]
    if larger:
        crops.append((torch.nn.functional.interpolate(crops[0][0], (GRAM, GRAM), mode="bicubic"), views[0]))
    grid = GLOBAL // PATCH
    masks = torch.zeros(views[0] * tiles, grid * grid, dtype=torch.bool)
    for crop in range(0, len(masks), 2):
        masks[crop, torch.randperm(grid * grid, generator=draw)[: 1 + crop % 5]] = True
    return TileBatch(crops, masks.unflatten(1, (grid, grid)))


def part(whole: TileBatch, first: int, last: int) -> TileBatch:
    """The tiles ``[first, last)`` of a batch: crops and masks are stacked view by view."""

    def of(x: torch.Tensor, views: int) -> torch.Tensor:
        return x.unflatten(0, (views, -1))[:, first:last].flatten(0, 1)

    return TileBatch([(of(images, views), views) for images, views in whole.crops], of(whole.masks, whole.crops[0][1]))
