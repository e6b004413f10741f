"""Loading a frozen encoder from a run, a checkpoint, an export or timm."""

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image

from data.fault import Fault
from data.keyed import rng
from pretrain.encoders.frozen import device_of
from pretrain.encoders.init import find_encoder
from pretrain.encoders.loading import load_encoder
from pretrain.encoders.preprocessing import Preprocessing
from pretrain.objectives.distil import given_weights

IMAGES = torch.from_numpy(rng(0, "images").integers(0, 256, size=(3, 32, 32, 3), dtype=np.uint8))


def test_a_run_stands_for_its_newest_teacher_with_the_runs_own_normalisation(make_tile_run):
    run, network = make_tile_run()
    encoder = load_encoder(str(run), device="cpu")
    normalised = (IMAGES.permute(0, 3, 1, 2) / 255 - torch.tensor([0.7, 0.5, 0.6]).view(3, 1, 1)) / torch.tensor(
        [0.2, 0.25, 0.2]
    ).view(3, 1, 1)
    with torch.no_grad():
        expected, _ = network.features(normalised)
    torch.testing.assert_close(encoder.embed(IMAGES), expected, atol=1e-5, rtol=1e-5)
    assert (encoder.width, encoder.image_size) == (24, 32)
    assert not encoder.module.training and not any(p.requires_grad for p in encoder.module.parameters())


def test_a_run_and_its_checkpoint_folder_are_the_same_encoder(make_tile_run):
    run, _ = make_tile_run()
    assert load_encoder(str(run)).hash == load_encoder(str(run / "checkpoints" / "step-00000003")).hash


def test_the_hash_changes_with_weights_precision_and_preprocessing(make_tile_run):
    run, _ = make_tile_run()
    other, _ = make_tile_run("other", seed=1)
    hashes = {
        load_encoder(str(run)).hash,
        load_encoder(str(other)).hash,
        load_encoder(str(run), precision="bfloat16").hash,
    }
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("- 0.7", "- 0.71"))
    hashes.add(load_encoder(str(run)).hash)
    assert len(hashes) == 4


def test_images_of_several_sizes_keep_their_order(make_tile_run):
    encoder = load_encoder(str(make_tile_run()[0]))
    images = [rng(0, i).integers(0, 256, size=(32 + 8 * (i % 2), 40, 3), dtype=np.uint8) for i in range(5)]
    together = encoder.embed_each(images)
    alone = np.concatenate([encoder.embed_each([image]) for image in images])
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_the_random_twin_is_the_same_network_with_weights_that_only_its_seed_decides(make_tile_run):
    encoder = load_encoder(str(make_tile_run()[0]))
    twin, again, other = encoder.random_twin(0), encoder.random_twin(0), encoder.random_twin(1)
    assert twin.hash == again.hash and len({encoder.hash, twin.hash, other.hash}) == 3
    assert twin.module.state_dict().keys() == encoder.module.state_dict().keys()
    torch.testing.assert_close(twin.embed(IMAGES), again.embed(IMAGES), atol=0, rtol=0)


def test_resizing_agrees_with_pillow_within_its_rounding():
    image = Image.fromarray(rng(0, "smooth").integers(0, 256, size=(12, 16, 3), dtype=np.uint8)).resize(
        (64, 48), Image.Resampling.BICUBIC
    )
    ours = Preprocessing(32, 32, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))(torch.from_numpy(np.array(image))[None])[0]
    # 64 × 48 → shorter side 32: 43 × 32, then the central 32 columns.
    theirs = np.asarray(image.resize((43, 32), Image.Resampling.BICUBIC))[:, 5:37]
    np.testing.assert_allclose(ours.permute(1, 2, 0).numpy() * 255, theirs, atol=1.5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere/run", "there is no folder nowhere/run"),
        ("not_a_model", "neither a folder here nor a model that timm knows"),
        ("vit_tiny_patch16_224.no_such_tag", "no pretrained weights for"),
    ],
)
def test_a_name_that_means_nothing_is_refused(name, message):
    with pytest.raises(Fault, match=message):
        load_encoder(name)


def test_weights_that_cannot_be_had_are_an_error_and_never_random(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(Fault, match="the weights of hf-hub:slidewright/none can't be had"):
        load_encoder("hf-hub:slidewright/none")


@pytest.mark.parametrize("name", ["hf-hub:nobody/nothing", "vit_small_patch14_dinov2"])
def test_a_hub_that_does_not_answer_is_asked_once_and_the_setting_is_named(name, monkeypatch, tmp_path):
    asked = []

    def refuse(url):
        asked.append(url)
        raise OSError("connection refused")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", refuse)
    said = rf"{name}: the weights of {name} can't be had \(asking the hub failed: connection refused\): is the name"
    with pytest.raises(Fault, match=f"^init={said}"):
        find_encoder(name)
    with pytest.raises(Fault, match=rf"^objective\.teacher={said}"):
        given_weights(name, None, None)
    assert len(asked) == 2 and all(url.endswith("/resolve/main/config.json") for url in asked)


def test_a_run_without_checkpoint_and_a_folder_that_is_no_run_say_what_to_do(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("model: {}\n")
    with pytest.raises(Fault, match="no checkpoint yet"):
        load_encoder(str(tmp_path / "run"))
    with pytest.raises(Fault, match=r"did you mean .*/run"):
        load_encoder(str(tmp_path))


def test_a_checkpoint_that_does_not_fit_its_configuration_is_refused(make_tile_run):
    run, _ = make_tile_run()
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("depth: 2", "depth: 3"))
    with pytest.raises(Fault, match="doesn't fit"):
        load_encoder(str(run))


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "meta", "foo"])
def test_a_device_that_is_not_here_is_a_sentence(name: str) -> None:
    with pytest.raises(Fault, match=rf"^device={name} is not on this machine"):
        device_of(name)
