"""``format=transformers``: a folder that transformers loads.

<out>/
    config.json, model.safetensors, preprocessor_config.json: what Dinov2Model.from_pretrained (with rotary positions,
    DINOv3ViTModel's) and AutoImageProcessor need
    README.md
"""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import Tensor

from data.fault import Fault
from models.formats import transformers as transformers_format
from models.formats.transformers_dinov3 import dinov3_config, write_transformers_dinov3
from pretrain.encoders.export.publishing import Exported
from pretrain.encoders.export.tiles import export_tiles, tile_card, vision_transformer
from pretrain.encoders.preprocessing import Preprocessing
from pretrain.encoders.run_checkpoint import find_checkpoint


def export_transformers(checkpoint: Path, out: Path, license: str, plugins: Collection[str] = ()) -> Exported:
    """Write a tile run's teacher as a folder of transformers' Dinov2 and DINOv3 models; otherwise as `export_timm`."""
    import_transformers()
    found = find_checkpoint(checkpoint, plugins)
    network, preprocessing = vision_transformer(found)
    settings, size = found.config["model"], preprocessing.image_size
    try:
        if network.position_embedding == "rope":
            config, weights = dinov3_config(settings, size), write_transformers_dinov3(network)
        else:
            config = transformers_format.config(settings, size)
            weights = transformers_format.write_transformers(network, size)
    except ValueError as error:
        raise Fault(str(error)) from error
    files: dict[str, dict[str, Any] | str] = {
        "config.json": config,
        "preprocessor_config.json": processor_config(preprocessing),
    }
    model = config["architectures"][0]
    name = out.resolve().name
    use = f"""\
from transformers import {model}

encoder = {model}.from_pretrained("{name}").eval()
features = encoder(images).pooler_output"""
    card = tile_card(found, network, preprocessing, license, "transformers", use, name)
    new, difference = export_tiles(out, found, network, preprocessing, files, weights, card, transformers_features)
    checked = f"{out}: loads whole in transformers, features within {difference:.1g} of the teacher's"
    return Exported(new, checked, f'transformers.AutoModel.from_pretrained("{out}")', difference)


def processor_config(preprocessing: Preprocessing) -> dict[str, Any]:
    """The ``preprocessor_config.json`` of transformers' BitImageProcessor, the one that Dinov2 models use."""
    size = preprocessing.image_size
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": preprocessing.resize_to},
        "resample": 3 if preprocessing.interpolation == "bicubic" else 2,  # PIL's numbers
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
    }


def transformers_features(folder: Path, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Class token, pooled output and patches, loaded as a stranger would. Raises `Fault` where weights are missing or
    left over."""
    transformers = import_transformers()
    config = json.loads((folder / "config.json").read_text())
    model = getattr(transformers, config["architectures"][0])
    loaded, report = model.from_pretrained(folder, output_loading_info=True, local_files_only=True)
    if any(report.values()):
        raise Fault(
            "transformers loads the exported folder only in part, so nothing was published: please report this"
            f" ({report})"
        )
    found = loaded.eval()(pixel_values=images)
    prefix = 1 + config.get("num_register_tokens", 0)
    return found.last_hidden_state[:, 0], found.pooler_output, found.last_hidden_state[:, prefix:]


def import_transformers() -> Any:
    """The package, which only this export needs. Raises `Fault` where it isn't installed."""
    try:
        import transformers
    except ImportError as error:
        raise Fault(
            "format=transformers loads the folder back with the package transformers: pip install"
            " 'slidewright[transformers]'"
        ) from error
    transformers.utils.logging.disable_progress_bar()
    return transformers
