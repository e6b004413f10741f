"""A run with an attention of a GPU's is planned, reported, loaded and embedded where there is none."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from models.initialise import initialise
from models.longnet import LongNet
from pretrain.encoders.slide_encoders import load_slide_encoder
from pretrain.plan.batches import SupposedSlides
from pretrain.plan.run_shape import run_shape
from pretrain.report.build import describe_network
from pretrain.run import checkpoints
from pretrain.settings.annotation import as_dictionary
from pretrain.settings.composition import load

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="says what is said where there is no GPU")
SLIDE = {
    "_target_": "models.longnet.LongNet", "width": 16, "depth": 1, "heads": 4, "feed_forward_width": 24, "segment_lengths": [8],
    "dilated_ratios": [1], "dropout": 0.0, "drop_path": 0.0, "compatible": False,
}  # fmt: skip


@pytest.mark.parametrize("kernel", ["varlen", "flash_attn", "xformers"])
def test_a_slide_run_is_planned_and_loaded_without_its_kernel(kernel: str, tmp_path: Path) -> None:
    words = ["recipe=small_slide", "run=none", "data.embeddings=none", f"model.attention={kernel}"]
    with torch.device("meta"):
        run_shape(load("slide", words), SupposedSlides(32, 50, 50)).build()()
    objective = nn.Module()
    objective.encoder = LongNet(12, **{name: value for name, value in SLIDE.items() if name != "_target_"})  # type: ignore[arg-type]
    initialise(objective.encoder, 0)
    config = {"model": SLIDE | {"attention": kernel}, "data": {"embeddings": "store", "field_cells": 0}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "tile_encoder.json").write_text(json.dumps({"encoder_hash": "abc"}))
    checkpoints.save(tmp_path, 1, objective, torch.optim.SGD(objective.parameters(), lr=0.1), {}, keep=0)
    assert load_slide_encoder(str(tmp_path), "cpu").network.attention == "sdpa"


def test_a_tile_run_is_planned_and_reported_without_its_kernel() -> None:
    composed = load("tile", ["recipe=small", "run=none", "data.shards=none", "model.attention=xformers"])
    with torch.device("meta"):
        run_shape(composed, SupposedSlides(0, 0, 0)).build()()
    assert "a vision transformer of 2.8 M parameters" in describe_network(as_dictionary(composed.tree.model), ())
