"""Weights as they lie on a disk: safetensors, PyTorch checkpoints, and folders in transformers' layout.

Nothing here runs code from a file: pickles are read for their tensors alone.
"""

import argparse
import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from data.fault import Fault
from data.git_lfs import refuse_pointer
from data.torch_files import why_unreadable
from models.formats import transformers
from models.formats.published import PublishedWeights
from models.formats.transformers_dinov3 import MODEL_TYPE, read_transformers_dinov3

TRANSFORMERS_CONFIG = "config.json"
WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")


def read_file(path: Path) -> dict[str, Any]:
    """What a weight file holds, on the CPU. Raises Fault where it can't be read, or would have to run code."""
    refuse_pointer(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # DINO keeps its options beside the weights
            held = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped(path))
    except (OSError, RuntimeError, SafetensorError, pickle.UnpicklingError, EOFError, ValueError) as error:
        raise Fault(
            f"{path} can't be read as weights ({why_unreadable(error)}): download it again, or save its state dict"
            " alone as safetensors"
        ) from error
    if not isinstance(held, dict):
        raise Fault(f"{path} holds a {type(held).__name__}, not a state dict")
    return held


def zipped(path: Path) -> bool:
    """Whether a PyTorch file is an archive, which can be mapped into memory instead of read."""
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def read_transformers_folder(folder: Path) -> PublishedWeights:
    """The encoder in a folder that transformers' ``save_pretrained`` wrote, in one file or several."""
    config = read_json(folder / TRANSFORMERS_CONFIG)
    weights: dict[str, Tensor] = {}
    for path in _weight_files(folder):
        weights |= read_file(path)
    try:
        read = read_transformers_dinov3 if config.get("model_type") == MODEL_TYPE else transformers.read_transformers
        return read(weights, config)
    except KeyError as error:
        raise Fault(f"{folder / TRANSFORMERS_CONFIG} lacks {error}: download it again") from error
    except ValueError as error:
        raise Fault(f"{folder}: {error}") from error


def _weight_files(folder: Path) -> list[Path]:
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            parts = read_json(index).get("weight_map")
            if not isinstance(parts, dict) or not parts:
                raise Fault(f"{index} has no weight_map: download it again")
            paths = [folder / part for part in sorted(set(parts.values()))]
            if lacking := [path.name for path in paths if not path.is_file()]:
                raise Fault(
                    f"{folder} lacks {', '.join(lacking)}, which {index.name} names: download its weights whole"
                )
            return paths
    raise Fault(
        f"{folder} has a {TRANSFORMERS_CONFIG} but no model.safetensors or pytorch_model.bin: download its weights too"
    )


def read_json(path: Path) -> dict[str, Any]:
    """What a file of settings beside weights holds. Raises Fault where that is nothing of the kind."""
    refuse_pointer(path)
    try:
        held = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise Fault(f"{path} can't be read as JSON ({error}): download it again") from error
    if not isinstance(held, dict):
        raise Fault(f"{path} holds a {type(held).__name__}, not settings by name: download it again")
    return held


def is_transformers(folder: Path) -> bool:
    """Whether a folder's ``config.json`` is transformers' (it names a model type) and not timm's (an architecture)."""
    if not (folder / TRANSFORMERS_CONFIG).is_file():
        return False
    config = read_json(folder / TRANSFORMERS_CONFIG)
    return "model_type" in config and "architecture" not in config
