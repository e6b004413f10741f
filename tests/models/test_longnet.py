import numpy as np
import pytest
import torch

from models.initialise import initialise
from models.longnet import LongNet, drop_path, dropout
from models.positions import position_embedding
from models.sequence_parallel import TokenShare

RELEASED = {
    "input_width": 1536,
    "width": 768,
    "depth": 12,
    "heads": 16,
    "feed_forward_width": 3072,
    "segment_lengths": [1024, 5792, 32768, 185360, 1048576],
    "dilated_ratios": [1, 2, 4, 8, 16],
    "dropout": 0.25,
    "drop_path": 0.1,
    "compatible": False,
}
SMALL = {
    "input_width": 12,
    "width": 16,
    "depth": 2,
    "heads": 4,
    "feed_forward_width": 24,
    "segment_lengths": [8, 16, 32],
    "dilated_ratios": [1, 2, 4],
    "dropout": 0.25,
    "drop_path": 0.5,
    "compatible": False,
}


def small(**changes) -> LongNet:
    network = LongNet(**SMALL | changes)
    initialise(network, seed=3)
    return network


def slides(lengths: list[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    generator = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    return torch.randn(n, 12, generator=generator), torch.randint(0, 50, (n, 2), generator=generator), lengths


@pytest.mark.parametrize(
    ("width", "depth", "heads", "parameters"), [(768, 12, 16, 86_330_880), (1024, 24, 16, None), (1536, 12, 16, None)]
)
def test_full_size_encoder_has_the_released_keys_and_parameters(width, depth, heads, parameters):
    with torch.device("meta"):
        network = LongNet(
            **RELEASED | {"width": width, "depth": depth, "heads": heads, "feed_forward_width": 4 * width}
        )
    layer = [
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.out_proj",
        "self_attn.inner_attn_ln",
    ]
    layer += ["self_attn_layer_norm", "ffn.fc1", "ffn.fc2", "ffn.ffn_layernorm", "final_layer_norm"]
    modules = [f"encoder.layers.{i}.{name}" for i in range(depth) for name in layer]
    modules += ["patch_embed.proj", "encoder.layer_norm", "norm"]
    assert set(network.state_dict()) == {"cls_token"} | {f"{m}.{part}" for m in modules for part in ("weight", "bias")}
    if parameters:
        assert len(network.state_dict()) == 247
        assert sum(p.numel() for p in network.parameters()) == parameters


@pytest.mark.parametrize(("width", "depth"), [(768, 12), (1024, 24), (1536, 12)])
def test_a_full_size_released_file_loads_strictly(width, depth, tmp_path):
    settings = RELEASED | {"width": width, "depth": depth, "feed_forward_width": 4 * width}
    with torch.device("meta"):
        network, expected = LongNet(**settings), LongNet(**settings).state_dict()
    generator = torch.Generator().manual_seed(0)
    # every tensor one random number throughout: the released names and shapes in a small file
    state = {name: torch.randn(1, generator=generator).expand(value.shape) for name, value in expected.items()}
    torch.save({"model": state}, tmp_path / "slide_encoder.pth")
    said = network.load_released(tmp_path / "slide_encoder.pth")
    assert f"loaded {len(expected)} tensors" in said and "compatible" in said
    assert all(layer.self_attn.compatible for layer in network.encoder.layers)
    for name, value in network.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_every_parameter_has_an_initial_value_that_depends_on_its_name_alone():
    with torch.device("meta"):
        network = LongNet(**SMALL)
    network = network.to_empty(device="cpu")
    for parameter in network.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    initialise(network, seed=3)
    for name, value in small().state_dict().items():
        assert torch.equal(network.state_dict()[name], value), name
        assert value.isfinite().all()
    assert network.encoder.layers[0].ffn.fc1.bias.eq(0).all() and network.norm.weight.eq(1).all()
    with pytest.raises(KeyError):
        network.initialise("nothing.weight", torch.empty(2, 2), torch.Generator())


def test_position_embedding_equals_the_table_of_the_masked_autoencoder():
    cells = torch.tensor([[0, 0], [3, 7], [999, 1], [2, 999]])
    quarter = 768 // 4
    omega = 1.0 / 10000 ** (np.arange(quarter) / quarter)

    def axis(value: int) -> list[float]:
        return [*np.sin(value * omega), *np.cos(value * omega)]

    expected = np.array([axis(y) + axis(x) for x, y in cells.tolist()], dtype=np.float32)
    assert np.abs(position_embedding(cells, 768).numpy() - expected).max() < 1e-7


def test_negative_cells_are_refused():
    with pytest.raises(ValueError, match="start at 0"):
        position_embedding(torch.tensor([[0, -1]]), 8)


@pytest.mark.parametrize("compatible", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 3e-6)])
def test_packed_slides_equal_each_slide_alone_with_dropout_on(compatible, dtype, tolerance):
    network = small(compatible=compatible).to(dtype)
    tokens, cells, lengths = slides([5, 33, 1, 40])
    tokens = tokens.to(dtype)
    seeds = [10, 11, 12, 13]
    packed = network(tokens, cells, lengths, seeds, all_layers=True)
    for i, (part, places) in enumerate(zip(tokens.split(lengths), cells.split(lengths), strict=True)):
        alone = network(part, places, [lengths[i]], [seeds[i]], all_layers=True)
        for one, other in (
            (packed.cls[i], alone.cls[0]),
            (packed.pooled[i], alone.pooled[0]),
            (packed.pooled_layers[:, i], alone.pooled_layers[:, 0]),
            (packed.tiles.split(lengths)[i], alone.tiles),
        ):
            # In norm: a single number of float32 may be off by a rounding more, since products of other shapes are
            # summed in another order.
            assert (one - other).norm() <= tolerance * other.norm()


def test_an_initial_residual_of_zero_begins_with_layers_that_are_the_identity():
    batch = slides([30])
    begun, released = small(initial_residual=0.0), small()
    states = begun(*batch, all_layers=True).pooled_layers
    assert torch.equal(states[0], states[-1])
    assert (released(*batch, all_layers=True).pooled_layers.diff(dim=0).abs().amax(dim=(1, 2)) > 1e-2).all()
    others = [name for name in begun.state_dict() if not name.endswith(("out_proj.weight", "fc2.weight"))]
    assert all(torch.equal(begun.state_dict()[name], released.state_dict()[name]) for name in others)


def test_dropout_is_drawn_from_the_slides_seeds_and_off_without_them():
    network = small()
    batch = slides([20, 20])
    off, again = network(*batch).pooled, network(*batch).pooled
    on = network(*batch, [1, 2]).pooled
    assert torch.equal(off, again) and torch.equal(on, network(*batch, [1, 2]).pooled)
    changed = network(*batch, [1, 3]).pooled
    torch.testing.assert_close(changed[0], on[0])
    assert (changed[1] - on[1]).abs().max() > 1e-3 and (on - off).abs().max() > 1e-3


def test_dropout_and_drop_path_keep_the_expectation():
    ones, share, seeds = torch.ones(4000, 8), TokenShare((2,) * 2000), list(range(2000))
    for function in (dropout, drop_path):
        found = function(ones, 0.25, share, seeds, "here")
        assert found.unique().tolist() == pytest.approx([0, 1 / 0.75])
        assert found.mean() == pytest.approx(1, abs=0.05)
    assert drop_path(ones, 0.25, share, seeds, "here").view(2000, -1).std(dim=1).max() == 0  # a slide at a time


def test_a_released_file_loads_strictly_and_switches_to_compatible_attention(tmp_path):
    source = small()
    torch.save({"model": source.state_dict()}, tmp_path / "slide_encoder.pth")
    network = LongNet(**SMALL)
    assert not network.encoder.layers[0].self_attn.compatible
    said = network.load_released(tmp_path / "slide_encoder.pth")
    assert "compatible" in said and all(layer.self_attn.compatible for layer in network.encoder.layers)
    source.encoder.set_compatible(True)
    batch = slides([30])
    assert torch.equal(network(*batch).pooled, source(*batch).pooled)


def test_a_missing_or_mismatching_released_file_is_an_error(tmp_path):
    network = small()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(FileNotFoundError, match=r"slide_encoder\.pth"):
        network.load_released(tmp_path / "slide_encoder.pth")
    path = tmp_path / "other.pth"
    state = network.state_dict()
    for content, named in (
        ({"weights": state}, "'model'"),
        ({"model": {name: value for name, value in state.items() if name != "norm.bias"}}, "norm.bias"),
        ({"model": state | {"pos_embed": torch.zeros(1)}}, "pos_embed"),
        ({"model": state | {"cls_token": torch.zeros(1, 1, 20)}}, "cls_token"),
    ):
        torch.save(content, path)
        with pytest.raises(ValueError, match=named):
            network.load_released(path)
    assert not network.encoder.layers[0].self_attn.compatible
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_settings_that_do_not_divide_are_refused():
    for changes, named in (
        ({"width": 18}, "multiple of 4"),
        ({"heads": 3}, "heads"),
        ({"segment_lengths": [8, 16, 30]}, r"\[8, 16, 32\]"),
    ):
        with pytest.raises(ValueError, match=named):
            LongNet(**SMALL | changes)


@pytest.mark.parametrize("compatible", [False, True])
def test_without_gradients_pieces_of_the_tokens_give_the_same(compatible, monkeypatch):
    monkeypatch.setattr("models.longnet.PIECE", 7)  # pieces across slides, the last one short
    network, batch = small(compatible=compatible), slides([5, 33, 1, 40])
    whole = network(*batch, all_layers=True)
    with torch.no_grad():
        pieces = network(*batch, all_layers=True)
    for one, other in zip(pieces, whole, strict=True):
        assert not one.requires_grad
        torch.testing.assert_close(one, other, atol=2e-6, rtol=0)


def test_a_layer_without_gradients_leaves_its_input_alone():
    network = small()
    x = torch.randn(30, 16)
    before = x.clone()
    with torch.inference_mode():
        network.encoder.layers[0](x, TokenShare((30,)), None)
    assert torch.equal(x, before)


def test_cells_and_lengths_that_do_not_fit_the_tokens_are_refused():
    tokens, cells, _ = slides([10])
    with pytest.raises(ValueError, match="do not agree"):
        small()(tokens, cells, [9])
