"""``format=timm``: a folder that timm loads.

<out>/
    config.json               architecture, its arguments, preprocessing: what timm.create_model needs
    model.safetensors         the teacher's weights under timm's names
    README.md                 model card: what it was trained on and how
    in_trident.py, in_eva.py, in_clam.py    by which these take it
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import Tensor

from data.fault import Fault
from models.formats import timm as timm_format
from models.formats.timm_dinov3 import timm_dinov3_architecture, write_timm_dinov3
from models.vit import VisionTransformer
from pretrain.encoders.export.hosts import HOSTS
from pretrain.encoders.export.publishing import Exported
from pretrain.encoders.export.tiles import export_tiles, tile_card, vision_transformer
from pretrain.encoders.preprocessing import Preprocessing
from pretrain.encoders.run_checkpoint import find_checkpoint


def export_timm(checkpoint: Path, out: Path, license: str, plugins: Collection[str] = ()) -> Exported:
    """Write a tile run's teacher as a timm folder, unless it is there already.

    ``plugins`` are the packages whose classes the run may name beside ours. Raises `Fault` when what was loaded back
    has other features.
    """
    found = find_checkpoint(checkpoint, plugins)
    network, preprocessing = vision_transformer(found)
    architecture, arguments, weights = as_timms(network, found.config["model"], preprocessing.image_size)
    config = timm_config(architecture, arguments, preprocessing, license)
    files: dict[str, dict[str, Any] | str] = {"config.json": config, **HOSTS}
    name = out.resolve().name
    use = f"""\
import timm, torch

encoder = timm.create_model("local-dir:{name}", pretrained=True).eval()
features = encoder(images)"""
    card = tile_card(found, network, preprocessing, license, "timm", use, name)
    new, difference = export_tiles(out, found, network, preprocessing, files, weights, card, timm_features)
    checked = f"{out}: loads strictly in timm, features within {difference:.1g} of the teacher's"
    return Exported(new, checked, f'timm.create_model("local-dir:{out}", pretrained=True)', difference)


def as_timms(
    network: VisionTransformer, model: dict[str, Any], image_size: int
) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """timm's architecture for a network of the settings ``model``, its arguments, and the weights under its names.
    Raises `Fault` for a network that timm can't express."""
    try:
        if network.position_embedding == "rope":
            return *timm_dinov3_architecture(model, image_size), write_timm_dinov3(network)
        return *timm_format.architecture(model, image_size), timm_format.write_timm(network, image_size)
    except ValueError as error:
        raise Fault(f"{error}.") from error


def timm_config(
    architecture: str, arguments: dict[str, Any], preprocessing: Preprocessing, license: str
) -> dict[str, Any]:
    """The ``config.json`` that ``timm.create_model("local-dir:…")`` and timm's hub loading read."""
    size = preprocessing.image_size
    return {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": arguments["embed_dim"],
        "global_pool": "token",
        "model_args": arguments,
        "pretrained_cfg": {
            "tag": "slidewright",
            "custom_load": False,
            "input_size": [3, size, size],
            "fixed_input_size": True,
            "interpolation": preprocessing.interpolation,
            "crop_pct": size / preprocessing.resize_to,
            "crop_mode": "center",
            "mean": list(preprocessing.mean),
            "std": list(preprocessing.std),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": license,
        },
    }


def timm_features(folder: Path, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Class token, pooled output and patches, loaded as a stranger would: timm raises for a tensor missing, unexpected
    or misshapen."""
    import timm

    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    features = loaded.forward_features(images)  # type: ignore[operator]
    return features[:, 0], loaded(images), features[:, loaded.num_prefix_tokens :]  # type: ignore[misc]
