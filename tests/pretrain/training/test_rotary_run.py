"""A run of DINOv3's encoder: it resumes bit for bit, embeds, is exported to both libraries, and starts other runs."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from data.keyed import rng
from launch.entry import run_command_line
from models.formats.dinov3 import write_dinov3
from models.vit import VisionTransformer
from pretrain.encoders import init
from pretrain.encoders.export.timm import export_timm
from pretrain.encoders.export.transformers import export_transformers
from pretrain.encoders.loading import load_encoder
from pretrain.encoders.run_checkpoint import find_checkpoint, teacher
from pretrain.objectives.interface import Moment
from pretrain.objectives.position_scales import drawn_scales, scale_of
from pretrain.run import checkpoints
from tests.models.test_vit import network
from tests.pretrain.training.test_tile_training import TINY, metrics, weights

pytestmark = pytest.mark.usefixtures("one_thread")

ENCODER = [
    "model.registers=2",
    "model.drop_path=0.3",
    "model.position_embedding=rope",
    "model.position_rescale=2",
    "model.qkv_bias=no_key",
    "model.norm_epsilon=1e-5",
    "model.own_local_cls_norm=true",
    "optim.steps=4",
]


def train(run: Path, tile_shards: Path, *settings: str) -> Path:
    run_command_line(["tile", f"run={run}", f"data.shards={tile_shards}", *TINY, *ENCODER, *settings])
    return run


@pytest.fixture(scope="module")
def trained(tile_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return train(tmp_path_factory.mktemp("rotary") / "run", tile_shards)


@pytest.mark.slow  # what a step of it computes is held to DINOv3's, and resuming is held for a run with Gram anchoring
def test_a_run_that_goes_on_from_its_second_step_ends_bit_for_bit_as_one_that_never_stopped(
    trained: Path, tile_shards: Path, tmp_path: Path
) -> None:
    again = tmp_path / "run"
    shutil.copytree(trained, again)
    newest = checkpoints.newest(again)
    assert newest is not None and newest.name.endswith("4")
    shutil.rmtree(newest)
    train(again, tile_shards)
    assert metrics(again) == metrics(trained)
    ours, theirs = weights(again), weights(trained)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    keys = [name for name in theirs if name.endswith("attn.qkv.bias")]
    assert keys and not any(theirs[name].chunk(3)[1].any() for name in keys)


def features(folder: Path) -> Tensor:
    pixels = torch.from_numpy(rng(2, "check").integers(0, 256, size=(2, 32, 32, 3), dtype=np.uint8))
    return load_encoder(str(folder)).embed(pixels)


@pytest.mark.slow
def test_its_exports_embed_as_the_run_and_start_another(
    trained: Path, tile_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers", reason="transformers isn't installed: pip install 'slidewright[test]'")
    export_timm(trained, tmp_path / "timm", "mit")
    export_transformers(trained, tmp_path / "transformers", "mit")
    network, _ = teacher(find_checkpoint(trained))
    assert isinstance(network, VisionTransformer)
    save_file(write_dinov3(network), tmp_path / "dinov3.safetensors")
    for name in ("timm", "transformers"):
        torch.testing.assert_close(features(tmp_path / name), features(trained), atol=1e-5, rtol=1e-5)
    begun = train(tmp_path / "begun", tile_shards, f"init={tmp_path / 'timm'}", "optim.lr=0", "optim.steps=2")
    torch.testing.assert_close(features(begun), features(trained), atol=1e-5, rtol=1e-5)
    for name in ("transformers", "dinov3.safetensors"):
        found, _ = init.find_encoder(str(tmp_path / name)).fit(network)
        for key, tensor in found.items():
            assert torch.equal(tensor, network.state_dict()[key]) or "local_cls_norm" in key, key
    assert "local_cls_norm: it starts as its norm" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train(tmp_path / "other", tile_shards, f"init={tmp_path / 'timm'}", "model.norm_epsilon=1e-6")
    said = capsys.readouterr().err
    assert "its norms have epsilon 1e-05 and the model's 1e-06: set model.norm_epsilon=1e-05" in said


def test_scales_are_drawn_by_seed_step_and_crop_size_while_training_alone() -> None:
    vit = network(position_embedding="rope", position_rescale=2.0)
    sizes = [32, 16]
    drawn = drawn_scales(vit, sizes, Moment(3, 10, 0))["scales"]
    assert drawn == drawn_scales(vit, sizes, Moment(3, 10, 0, first=8))["scales"]  # every micro-batch and rank
    assert drawn[0] != drawn[1] and drawn != drawn_scales(vit, sizes, Moment(4, 10, 0))["scales"]
    assert drawn != drawn_scales(vit, sizes, Moment(3, 10, 1))["scales"]
    assert drawn_scales(vit.eval(), sizes, Moment(3, 10, 0)) == drawn_scales(network(), sizes, Moment(3, 10, 0)) == {}
    logs = np.log2([scale_of(32, 2.0, Moment(step, 1, 0)) for step in range(400)])
    assert -1 <= logs.min() < -0.95 and 0.95 < logs.max() <= 1 and abs(logs.mean()) < 0.1
    assert abs(logs.std() - 3**-0.5) < 0.05  # of a uniform law from -1 to 1
