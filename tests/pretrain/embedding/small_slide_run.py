"""A store of a few made-up slides, a slide run on it, and the command that embeds them."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import nn

from data.embeddings.store import EmbeddingWriter
from data.keyed import rng
from models.initialise import initialise
from models.longnet import LongNet
from models.slide_network import SlideNetwork
from pretrain.commands.embed import Config, run
from pretrain.run import checkpoints
from pretrain.settings.composition import load

WIDTH, MODEL = (
    16,
    {
        "width": 32,
        "depth": 2,
        "heads": 4,
        "feed_forward_width": 64,
        "segment_lengths": [16, 64],
        "dilated_ratios": [1, 2],
        "dropout": 0.1,
        "drop_path": 0.0,
        "compatible": False,
    },
)


BY_DISTANCE = {name: MODEL[name] for name in ("width", "depth", "heads", "feed_forward_width", "dropout", "drop_path")}
BY_DISTANCE |= {"registers": 2, "slopes": "fixed", "reach": None}


def write_small_store(tmp_path: Path) -> Path:
    with EmbeddingWriter(tmp_path / "store", WIDTH, "tile encoder", "abc") as out:
        for number, n in enumerate((40, 7, 25, 0, 60)):
            places = np.stack([np.arange(n) % 9, np.arange(n) // 9], axis=1) * 256
            out.add(f"s{number}", rng("slide", number).normal(size=(n, WIDTH)), places, 256.0, 0.5)
    return tmp_path / "store"


def write_small_run(tmp_path: Path, kind: type[SlideNetwork] = LongNet) -> SlideNetwork:
    """The encoder of a slide run in ``tmp_path/slide``."""
    settings = MODEL if kind is LongNet else BY_DISTANCE
    built = kind(WIDTH, **settings).eval()
    initialise(built, 0)
    objective = nn.Module()
    objective.encoder = built
    (tmp_path / "slide").mkdir()
    config = {
        "model": {"_target_": f"{kind.__module__}.{kind.__name__}", **settings},
        "data": {"embeddings": "store", "field_cells": 8},
    }
    (tmp_path / "slide" / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "slide" / "tile_encoder.json").write_text(json.dumps({"encoder_hash": "abc"}))
    checkpoints.save(tmp_path / "slide", 3, objective, torch.optim.SGD(built.parameters(), lr=0.1), {}, keep=0)
    return built


@cache
def composed() -> Config:
    return load("embed", ["stage=slide", "device=cpu", "out=none"]).object()


def embed(tmp_path: Path, *words: str, out: str = "out", checkpoint: str = "slide") -> None:
    given = {"checkpoint": str(tmp_path / checkpoint), "embeddings": str(tmp_path / "store")}
    given |= {name: yaml.safe_load(value) for name, _, value in (word.partition("=") for word in words)}
    run(replace(composed(), out=str(tmp_path / out), **given))
