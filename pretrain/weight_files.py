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
from models.formats import transformers
from models.formats.published import Published

CONFIG = "config.json"
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")


def read_file(path: Path) -> dict[str, Any]:
    """What a weight file holds, on the CPU. Raises Fault where it can't be read, or would have to run code."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # DINO keeps its options beside the weights
            held = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped(path))
    except (OSError, RuntimeError, SafetensorError, pickle.UnpicklingError, EOFError, ValueError) as error:
        cause = str(error).strip().splitlines()[0]
        raise Fault(
            f"{path} can't be read as weights ({cause}): download it again, or save its state dict alone as safetensors"
        ) from error
    if not isinstance(held, dict):
        raise Fault(f"{path} holds a {type(held).__name__}, not a state dict")
    return held


def zipped(path: Path) -> bool:
    """Whether a PyTorch file is an archive, which can be mapped into memory instead of read."""
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def read_transformers(folder: Path) -> Published:
    """The encoder in a folder that transformers' ``save_pretrained`` wrote, in one file or several."""
    config = json.loads((folder / CONFIG).read_text())
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = [name for name in ("model.safetensors", "pytorch_model.bin") if (folder / name).is_file()][:1]
    if not names:
        raise Fault(f"{folder} has a {CONFIG} but no model.safetensors or pytorch_model.bin: download its weights too")
    weights: dict[str, Tensor] = {}
    for name in names:
        weights |= read_file(folder / name)
    try:
        return transformers.read(weights, config)
    except ValueError as error:
        raise Fault(f"{folder}: {error}") from error


def is_transformers(folder: Path) -> bool:
    """Whether a folder's ``config.json`` is transformers' (it names a model type) and not timm's (an architecture)."""
    if not (folder / CONFIG).is_file():
        return False
    config = json.loads((folder / CONFIG).read_text())
    return "model_type" in config and "architecture" not in config
