"""The slide encoder with distance-biased attention against MOOZY's: outputs within 1e-5, gradients within 1e-4."""

import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from models.distance_attention import alibi_slopes
from models.slide_vit import SlideViT

NAMES = {
    "register_tokens": "reg_token",
    "input_proj.0": "patch_embed.proj",
    "blocks": "encoder.blocks",
    "norm": "encoder.norm",
}


@pytest.fixture(scope="module")
def golden(goldens: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    with safe_open(goldens / "moozy_encoder.safetensors", "pt") as file:
        return file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def as_ours(tensors: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Its parameters, or their gradients, by our names: q, k and v in one matrix, tokens in rows."""
    found: dict[str, Tensor] = {}
    for key, value in tensors.items():
        name = key.removeprefix(f"{kind}.")
        if name == key or "slopes" in name:
            continue
        name = re.sub("^(register_tokens|input_proj.0|blocks|norm)(?=[.]|$)", lambda m: NAMES[m[1]], name)
        found[name.replace("out_proj", "proj")] = value[0] if name.endswith("_token") else value
    for name in [name for name in found if ".q_proj." in name]:
        found[name.replace("q_proj", "qkv")] = torch.cat(
            [found.pop(name.replace("q_proj", f"{x}_proj")) for x in "qkv"]
        )
    return found


def slide_vit_as_said(meta: dict[str, str]) -> SlideViT:
    """The network of a golden's sizes."""
    return SlideViT(
        int(meta["feat_dim"]),
        width=int(meta["d_model"]),
        depth=int(meta["n_layers"]),
        heads=int(meta["n_heads"]),
        feed_forward_width=int(meta["dim_feedforward"]),
        registers=int(meta["num_registers"]),
        slopes="fixed",
        reach=None,
        dropout=float(meta["dropout"]),
        drop_path=float(meta["layer_drop"]),
    )


@pytest.fixture(scope="module")
def network(golden) -> SlideViT:
    meta, tensors = golden
    built = slide_vit_as_said(meta)
    built.load_state_dict(as_ours(tensors, "weight"), strict=True)
    return built


def case(tensors: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Embeddings, cells, whether there is a tile, and lengths, packed."""
    features, invalid = tensors[f"{name}.features"], tensors[f"{name}.invalid"].bool()
    sides = tensors.get("crops.patch_size") if name == "crops" else torch.tensor([512.0])
    cells = tensors[f"{name}.coordinates"].float() / sides[:, None, None, None]
    cells = cells - cells.flatten(1, 2).amin(1)[:, None, None]
    return features.flatten(0, 2), cells.flatten(0, 2), ~invalid.flatten(), [invalid[0].numel()] * len(invalid)


def test_slopes_equal_the_reference(golden):
    _, tensors = golden
    torch.testing.assert_close(-alibi_slopes(6), tensors["weight.pos_bias.slopes"][:, 0], atol=1e-9, rtol=0)


def test_crops_with_masked_cells_and_cells_without_a_tile_equal_the_reference_with_every_gradient(golden, network):
    _, tensors = golden
    tokens, cells, valid, lengths = case(tensors, "crops")
    found = network(tokens, cells, lengths, masked=tensors["crops.mask"].flatten().bool(), valid=valid)
    patches = found.tiles.view_as(tensors["crops.patches"])
    counts = tensors["crops.patch_weight"].ne(0)
    torch.testing.assert_close(found.cls, tensors["crops.class"], atol=1e-5, rtol=0)
    torch.testing.assert_close(patches[counts], tensors["crops.patches"][counts], atol=1e-5, rtol=0)
    network.zero_grad()
    ((found.cls * tensors["crops.class_weight"]).sum() + (patches * tensors["crops.patch_weight"]).sum()).backward()
    theirs = as_ours(tensors, "grad")
    ours = dict(network.named_parameters())
    assert theirs.keys() == ours.keys()
    for name, gradient in theirs.items():
        largest = max(gradient.abs().max().item(), 1e-3)  # a bias of all keys cancels in softmax
        torch.testing.assert_close(
            ours[name].grad, gradient, atol=1e-4 * largest, rtol=0, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_a_whole_slide_of_its_tiles_alone_equals_the_reference(golden, network):
    _, tensors = golden
    tokens, cells, valid, _ = case(tensors, "slide")
    found = network(tokens[valid], cells[valid], [int(valid.sum())])
    torch.testing.assert_close(found.cls, tensors["slide.class"], atol=1e-5, rtol=0)
    torch.testing.assert_close(found.tiles, tensors["slide.patches_kept"][0], atol=1e-5, rtol=0)
