"""``pretrain embed stage=slide``: each slide's own embedding, however slides are packed, beside the mean of its
tiles."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from data.embeddings.slide_features import SLIDE_VECTORS, read_slide_features
from data.embeddings.store import EmbeddingStore, EmbeddingWriter
from data.fault import Fault
from data.keyed import rng
from models.initialise import initialise
from models.longnet import LongNet
from pretrain.commands.embed import run
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


@pytest.fixture
def store(tmp_path: Path) -> Path:
    with EmbeddingWriter(tmp_path / "store", WIDTH, "tile encoder", "abc") as out:
        for number, n in enumerate((40, 7, 25, 0, 60)):
            places = np.stack([np.arange(n) % 9, np.arange(n) // 9], axis=1) * 256
            out.add(f"s{number}", rng("slide", number).normal(size=(n, WIDTH)), places, 256.0, 0.5)
    return tmp_path / "store"


@pytest.fixture
def encoder(tmp_path: Path) -> LongNet:
    """The encoder of a slide run in ``tmp_path/slide``."""
    built = LongNet(WIDTH, **MODEL).eval()  # type: ignore[arg-type]
    initialise(built, 0)
    objective = nn.Module()
    objective.encoder = built
    (tmp_path / "slide").mkdir()
    config = {
        "model": {"_target_": "models.longnet.LongNet", **MODEL},
        "data": {"embeddings": "store", "field_cells": 8},
    }
    (tmp_path / "slide" / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "slide" / "tile_encoder.json").write_text(json.dumps({"encoder_hash": "abc"}))
    checkpoints.save(tmp_path / "slide", 3, objective, torch.optim.SGD(built.parameters(), lr=0.1), {}, keep=0)
    return built


def embed(tmp_path: Path, *words: str, out: str = "out", checkpoint: str = "slide") -> None:
    paths = [f"checkpoint={tmp_path / checkpoint}", f"embeddings={tmp_path / 'store'}", f"out={tmp_path / out}"]
    run(load("embed", ["stage=slide", "device=cpu", *paths, *words]).object())


@pytest.mark.parametrize("tokens", [1, 50, 1000])
def test_each_slide_has_its_own_embedding_whatever_it_is_packed_with(store, encoder, tmp_path, capsys, tokens):
    embed(tmp_path, f"tokens={tokens}")
    slides, found = read_slide_features(tmp_path / "out")
    assert slides == ["s0", "s1", "s2", "s4"]  # s3 has no tissue
    for row, slide in enumerate(slides):
        tiles = EmbeddingStore.open(store).read(slide)
        x = torch.from_numpy(tiles.embeddings.astype(np.float32))
        with torch.inference_mode():
            alone = encoder(x, torch.from_numpy(tiles.cells), [len(x)], all_layers=True)
        expected = {
            "mean_tiles": x.mean(0),
            "pooled": alone.pooled,
            "cls": alone.cls,
            "pooled_layers": alone.pooled_layers.flatten(),
            "cls_layers": alone.cls_layers.flatten(),
        }
        for kind in SLIDE_VECTORS:
            np.testing.assert_allclose(found[kind][row], expected[kind].numpy().ravel(), atol=2e-6)
    assert found["pooled_layers"].shape == (4, 3 * 32)
    said = capsys.readouterr()
    assert "fields of 8 × 8" in said.err and json.loads(said.out.splitlines()[-1])["new_slides"] == 4


def test_it_goes_on_where_it_stopped_and_parts_hold_what_one_process_writes(store, encoder, tmp_path, capsys):
    embed(tmp_path)
    for part in (2, 1, 1):
        embed(tmp_path, f"part={part}/2", out="parts")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["new_slides"] == 0
    (slides, one), (others, several) = read_slide_features(tmp_path / "out"), read_slide_features(tmp_path / "parts")
    assert slides == others
    for kind in SLIDE_VECTORS:
        np.testing.assert_allclose(one[kind], several[kind], atol=2e-6)


def test_embeddings_of_another_tile_encoder_or_slide_encoder_are_refused(store, encoder, tmp_path):
    embed(tmp_path)
    (tmp_path / "slide" / "tile_encoder.json").write_text(json.dumps({"encoder_hash": "other"}))
    with pytest.raises(Fault, match="another tile encoder"):
        embed(tmp_path, out="new")
    (tmp_path / "slide" / "tile_encoder.json").unlink()
    with pytest.raises(Fault, match="choose another folder"):
        embed(tmp_path, "precision=bfloat16")
    with pytest.raises(Fault, match="no slide encoder"):
        embed(tmp_path, checkpoint="nowhere")


def test_a_released_file_is_read_in_the_compatible_mode_and_another_size_is_refused(store, encoder, tmp_path, capsys):
    settings = yaml.safe_load((Path(__file__).parents[3] / "configs" / "model" / "longnet.yaml").read_text())
    settings.pop("_target_")
    released = LongNet(WIDTH, **settings | {"feed_forward_width": 64}).eval()
    torch.save({"model": released.state_dict()}, tmp_path / "slide_encoder.pth")
    embed(tmp_path, checkpoint="slide_encoder.pth")
    assert "compatible" in capsys.readouterr().err
    released.encoder.set_compatible(True)
    tiles = EmbeddingStore.open(store).read("s0")
    with torch.inference_mode():
        expected = released(torch.from_numpy(tiles.embeddings.astype(np.float32)), torch.from_numpy(tiles.cells), [40])
    found = read_slide_features(tmp_path / "out")[1]
    np.testing.assert_allclose(found["pooled"][0], expected.pooled[0].numpy(), atol=2e-5)
    torch.save({"model": encoder.state_dict()}, tmp_path / "small.pth")
    with pytest.raises(Fault, match="give the run"):
        embed(tmp_path, checkpoint="small.pth")
    (tmp_path / "other.pth").write_bytes(b"no weights")
    with pytest.raises(Fault, match="can't be read as weights"):
        embed(tmp_path, checkpoint="other.pth")
