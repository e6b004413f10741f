"""Folders of transformers' Dinov2 and DINOv3 models as tile encoders."""

from pathlib import Path

import torch

from data.fault import Fault
from models.vit import VisionTransformer
from pretrain.encoders.preprocessing import Preprocessing
from pretrain.encoders.tile_encoder import TileEncoder, class_token, initialised
from pretrain.encoders.weight_files import read_json, read_transformers_folder


def transformers_encoder(folder: Path, device: torch.device, precision: str) -> TileEncoder:
    """A transformers Dinov2 or DINOv3 model in a folder as a `TileEncoder`: its pooled output, the class token after the last
    norm."""
    published = read_transformers_folder(folder)
    preprocessing = transformers_preprocessing(folder)

    def make() -> VisionTransformer:
        return VisionTransformer(**published.settings())

    network = make()
    try:
        weights, _ = published.fit(network)
    except ValueError as error:
        raise Fault(f"{folder}: its weights don't fit its config.json ({error})") from error
    mask_token = {"mask_token": torch.zeros_like(network.mask_token)}  # seen in pretraining only, and not always kept
    network.load_state_dict(mask_token | weights, strict=True)
    name, width = folder.resolve().name, network.width
    random = initialised(make)
    return TileEncoder(network, class_token, preprocessing, name, str(folder), width, device, precision, random)


def transformers_preprocessing(folder: Path) -> Preprocessing:
    """The preprocessing in a transformers folder's ``preprocessor_config.json``. Raises `Fault` for one that we don't
    do."""
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        raise Fault(
            f"{folder} has no {path.name}, so nothing says how images are prepared for it: copy that file from where"
            " the model is from"
        )
    config = read_json(path)
    resize, crop = config.get("size"), config.get("crop_size")
    resize = resize.get("shortest_edge") if isinstance(resize, dict) else resize
    crop = crop.get("height") if isinstance(crop, dict) else crop
    interpolation = {2: "bilinear", 3: "bicubic"}.get(config.get("resample", 0))
    if not (
        config.get("do_resize")
        and config.get("do_center_crop")
        and config.get("do_normalize")
        and resize
        and crop
        and interpolation
    ):
        raise Fault(
            f"{path} asks for something other than: shorter side resized (bicubic or bilinear), centre cut, normalised"
        )
    return Preprocessing(int(crop), int(resize), tuple(config["image_mean"]), tuple(config["image_std"]), interpolation)
