"""The steps of both stages on a GPU that isn't there: no device is mixed with another, and who waits for the GPU."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from data.embeddings.sequences import SlideBatch
from data.embeddings.store import EmbeddingStore
from models.attention import _SplitHeads
from models.attention_statistics import SDPA
from models.dilated_attention import _DilatedAttention, lay_out
from models.recomputed import GELU, NONE, SWIGLU, Activation, _AddedLinear, _TakenRows
from models.rotary import _Turned
from models.sequence_parallel import TokenShare, _Exchange, _Gather, _heads_for_tokens, _tokens_for_heads
from models.vit import VisionTransformer
from pretrain.encoders.preprocessing import Preprocessing
from pretrain.encoders.tile_encoder import TileEncoder
from pretrain.objectives.figures import class_tokens
from pretrain.objectives.losses.cross_entropy import _WeightedCrossEntropy
from pretrain.settings import plugins
from pretrain.settings.composition import load
from pretrain.training.module import Training
from pretrain.training.slide_stage import SlideTraining
from pretrain.training.tile_stage import TileTraining
from tests.data.shards.tile_folders import write_tiles
from tests.gpu.fake_gpu import GPU, Waits, fake_gpu, fake_gradients, on_gpu
from tests.pretrain.objectives.tile_objectives import teacher_file, teacher_run
from tests.pretrain.training.real_steps import filled
from tests.pretrain.training.test_slide_training import SMALL
from tests.pretrain.training.test_tile_training import TINY
from tests.pretrain.training.wavy_slides import write_wavy_slides

COLOURS = [
    "data.colour.blur_probability=[1,1,1]",
    "data.colour.solarise_probability=[1,1,1]",
    "data.colour.stain_probability=1",
]
OF_MAE = ["data.crops.global_count=1", "data.crops.local_count=0", "model.position_embedding=sincos"]
TILE = {
    "dinov2": [],
    "dinov2, centre, everything": [
        "objective.centring=centre",
        "objective.spread=kde",
        "objective.separate_ibot_head=true",
        "model.drop_path=0.3",
        "model.registers=2",
        "trainer.accumulate=2",
        *COLOURS,
    ],
    "dinov2 with DINOv3's encoder": [
        "objective.spread=sigreg",
        "model.drop_path=0.3",
        "model.registers=2",
        "model.position_embedding=rope",
        "model.position_rescale=2",
        "model.qkv_bias=no_key",
        "model.own_cls_norm=true",
        "model.own_local_cls_norm=true",
    ],
    "dinov3": [
        "objective=dinov3",
        "objective.gram_weight=2",
        "objective.gram_size=48",
        "model.position_embedding=rope",
    ],
    "jepa": ["objective=jepa", "objective.predictor_heads=2", "model.drop_path=0.3", "trainer.accumulate=2"],
    "dino": ["objective=dino", "model.drop_path=0.3"],
    "mae": ["objective=mae", *OF_MAE],
    "distil": ["objective=distil", f"objective.teacher={teacher_file()}", "objective.teacher_heads=3"],
    "distil_heads": ["objective=distil_heads", f"objective.teacher={teacher_run()}"],
    "lejepa": ["objective=lejepa", "model.drop_path=0.3"],
    "lejepa in two parts": ["objective=lejepa", "trainer.accumulate=2"],
}

BY_DISTANCE = ["model=slide_vit", "model.heads=4", "model.feed_forward_width=64"]
CROPS = [
    *BY_DISTANCE,
    "objective=slide_ibot",
    "objective.prototypes=64",
    "objective.hidden=32",
    "objective.bottleneck=16",
    "data.crops.global_side=4",
    "data.crops.local_side=3",
    "data.batch_tokens=null",
]
SLIDE = {
    "as it is": [],
    "everything": [
        "model.dropout=0.2",
        "model.drop_path=0.5",
        "model.compatible=true",
        "objective.decoder_start=nearby",
        "objective.weighting=token",
        "trainer.accumulate=2",
    ],
    "by distance, within a reach": [*BY_DISTANCE, "model.slopes=learned", "model.reach=[2,3,4,5]"],
    "pairs": ["objective=slide_pairs"],
    "pairs by distance": [*BY_DISTANCE, "objective=slide_pairs"],
    "context": ["objective=slide_context", "objective.decoder_heads=4", "objective.decoder_feed_forward_width=64"],
    "crops with empty cells": [*CROPS, "data.crops.empty_cells=true"],
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiles(tmp_path_factory.mktemp("shards"), [16, 16, 16])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wavy_slides(tmp_path_factory.mktemp("embeddings"), 6, columns=8, rows=6, fewer=6)


def tile_training(run: Path, shards: Path, *settings: str) -> Training:
    config = load("tile", [f"run={run}", f"data.shards={shards}", *without(TINY, settings), *settings]).object()
    return TileTraining(run, config, lambda: plugins.build(config.objective, lambda: plugins.build_empty(config.model)))


def without(words: list[str], settings: tuple[str, ...]) -> list[str]:
    """Settings that another objective hasn't got are left out."""
    lacking = {
        "objective=dino": ("ibot",),
        "objective=jepa": ("ibot",),
        "objective=mae": ("objective.",),
        "objective=lejepa": ("prototypes", "bottleneck"),
        "objective=distil": ("prototypes", "bottleneck", "hidden"),
        "objective=distil_heads": ("prototypes", "bottleneck", "hidden"),
    }
    left = next((names for setting, names in lacking.items() if setting in settings), ())
    return [word for word in words if not any(name in word for name in left)]


def slide_training(run: Path, store: Path, *settings: str) -> Training:
    run.mkdir(parents=True)
    bare = {"objective=slide_ibot", "objective=slide_pairs"} & set(settings)  # without a decoder
    small = [word for word in SMALL if not bare or "decoder" not in word]
    config = load("slide", [f"run={run}", f"data.embeddings={store}", *small, *settings]).object()
    return SlideTraining(
        run,
        config,
        lambda: plugins.build(config.objective, lambda: plugins.build_empty(config.model, 16)),
        EmbeddingStore.open(store),
    )


def steps(training: Training, count: int) -> Iterator[tuple[dict[str, Any], Waits]]:
    """The figures and the waits of so many steps, on batches of the real loader."""
    with torch.device("meta"):
        objective = training.objective = training.make_objective()
    loader = training.batches(0, count)
    batches = [batch for _, batch in zip(range(count), loader, strict=False)]
    loader.end()
    with fake_gpu() as waits:
        objective.to_empty(device=GPU)
        optimiser = training.configure_optimizers()
        trained = list(objective.trained().values())
        training.optimizers = lambda: SimpleNamespace(step=optimiser.step, optimizer=optimiser)  # type: ignore[method-assign, assignment]
        training.manual_backward = lambda loss: fake_gradients(loss, trained)  # type: ignore[method-assign]
        training.record = lambda figures: None  # type: ignore[method-assign]
        training.sampled = True  # type: ignore[attr-defined]  # no picture of what isn't there
        for batch in batches:
            waits.clear()
            pinned = [part.pin_memory() for part in batch] if isinstance(batch, list) else batch.pin_memory()
            yield training.training_step(pinned, 0), waits


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Training, "device", GPU)
    monkeypatch.setattr(Training, "global_rank", 0)
    monkeypatch.setattr(Training, "trainer", SimpleNamespace(world_size=1))
    monkeypatch.setattr("models.distance_attention.compiled_flex", lambda: flex_stand_in)
    monkeypatch.setattr("pretrain.training.tile_stage.loader_of", lambda batches, *_, **__: one_process(batches))
    monkeypatch.setattr("pretrain.training.slide_stage.LoaderProcess", lambda batches, *_, **__: one_process(batches))


def flex_stand_in(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, score_mod: Any, block_mask: Any) -> Any:
    """For FlexAttention, which no fake tensors know: the same shapes, and its two functions called for one pair."""
    number = torch.zeros(1, dtype=torch.int64, device=q.device)  # a number without dimensions would be read
    score = score_mod(q[0, 0, 0, :1], *4 * (number,))
    assert on_gpu(score) and on_gpu(block_mask.mask_mod(*4 * (number,))) and on_gpu(block_mask.kv_indices)
    return q + k + v + score


def one_process(batches: Any) -> Any:
    batches.in_slots = False
    return Batches(batches)


class Batches:
    def __init__(self, batches: Any) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def end(self) -> None: ...


@pytest.mark.parametrize("which", TILE)
@pytest.mark.usefixtures("on_a_gpu")
def test_a_tile_step_waits_for_the_gpu_once(which: str, shards: Path, tmp_path: Path) -> None:
    training = tile_training(tmp_path / "run", shards, *TILE[which])
    training.peak = 1e12
    *_, (figures, waits) = steps(training, 2)
    assert figures["flop_utilisation"] > 0 and figures["bad_tiles"] == 1  # as every number here is
    assert [place.rpartition(" ")[2] for place in waits.seen] == ["_step"], waits.seen


@pytest.mark.parametrize("which", SLIDE)
@pytest.mark.usefixtures("on_a_gpu")
def test_a_slide_step_waits_for_the_gpu_once(which: str, store: Path, tmp_path: Path) -> None:
    training = slide_training(tmp_path / "run", store, *SLIDE[which])
    training.peak = 1e12
    for figures, waits in steps(training, 2):  # of other lengths in each, so that plans are made anew
        assert figures["flop_utilisation"] > 0
        assert [place.rpartition(" ")[2] for place in waits.seen] == ["_step"], waits.seen


@pytest.mark.parametrize("lengths", [[2_600, 9_100, 5_300], [400 + 100 * i for i in range(28)]], ids=["3", "28"])
@pytest.mark.usefixtures("on_a_gpu")
def test_the_forward_of_few_or_many_slides_in_the_released_size_calls_4500_operators_at_most(
    lengths: list[int],
) -> None:
    """Of SlideMAE in bfloat16, as FSDP gives it. With a call for each run length three slides had 13,392; with a row of
    indices for each, 28 had 11,077."""
    config = load("slide", ["run=none", "data.embeddings=none", "recipe=gigapath_slide"]).object()
    with torch.device("meta"):
        objective = plugins.build(config.objective, lambda: plugins.build_empty(config.model, 1536))
    batch = filled(slide_batch_of(lengths), {})
    with fake_gpu() as waits:
        objective.to(torch.bfloat16).to_empty(device=GPU)
        for network in objective.trained().values():
            network.register_forward_pre_hook(in_bfloat16)
        before = waits.operations
        objective(batch.pin_memory().to(GPU, non_blocking=True), 0)
    assert not waits.seen
    assert waits.operations - before <= 4_500, waits.operations - before


def slide_batch_of(lengths: list[int]) -> Any:
    """Slides of so many tiles, three quarters of them hidden."""
    hidden = [n * 3 // 4 for n in lengths]
    tiles, masked = sum(lengths), sum(hidden)
    return SlideBatch(
        torch.empty(tiles, 1536, dtype=torch.float16),
        torch.empty(tiles, 2, dtype=torch.int64),
        lengths,
        torch.empty(tiles - masked, dtype=torch.int64),
        [n - m for n, m in zip(lengths, hidden, strict=True)],
        torch.empty(masked, dtype=torch.int64),
        hidden,
        torch.empty(1536),
        torch.empty(1536),
        list(range(len(lengths))),
        [""] * len(lengths),
        extent=1000,
    )


def in_bfloat16(_: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """A network's inputs as `MixedPrecisionPolicy` casts them."""
    return tuple(one.bfloat16() if isinstance(one, torch.Tensor) and one.is_floating_point() else one for one in inputs)


@pytest.mark.parametrize("compatible", [False, True])
def test_dilated_attention_on_a_gpu_waits_for_nothing_forward_and_backward(compatible: bool) -> None:
    lengths = (700, 33, 1)
    with fake_gpu() as waits:
        q, k, v, grad = (torch.empty(sum(lengths), 8, 48, dtype=torch.bfloat16, device=GPU) for _ in range(4))
        branches = [lay_out(lengths, w, r, range(8), 8, 48, GPU, compatible) for w, r in ((64, 1), (128, 2), (512, 4))]
        context = Context()
        out = _DilatedAttention.forward(context, q, k, v, branches, compatible, SDPA)
        dq, dk, dv, *_ = _DilatedAttention.backward(context, grad)
        assert out.shape == q.shape and {one.dtype for one in (out, dq, dk, dv)} == {torch.bfloat16}
        assert {one.device for one in (out, dq, dk, dv)} == {GPU}
    assert not waits.seen


class Context:
    """What autograd gives a function of its own."""

    def __init__(self, inputs: int = 3) -> None:
        self.needs_input_grad = (True,) * inputs

    def save_for_backward(self, *tensors: torch.Tensor) -> None:
        self.saved_tensors = tensors


@pytest.mark.parametrize("activation", [NONE, GELU, SWIGLU], ids=["none", "gelu", "swiglu"])
def test_the_ends_of_a_branch_wait_for_nothing_on_a_gpu_forward_and_backward(activation: Activation) -> None:
    hidden = 128 if activation is SWIGLU else 64
    with fake_gpu() as waits:
        x, part, rows = numbers(40, 32), numbers(30, hidden), torch.arange(30, device=GPU)
        weight, bias, gamma = numbers(32, 64), numbers(32), numbers(32)
        taken, added = Context(1), Context(8)
        past, through = _TakenRows.forward(taken, x, rows)
        out = _AddedLinear.forward(added, past, rows, ((10, 2.0), (20, 1.5)), activation, weight, bias, gamma, part)
        grad, *_, of_weight, of_bias, of_gamma, of_part = _AddedLinear.backward(added, numbers(*out.shape))
        found = [of_weight, of_bias, of_gamma, of_part, _TakenRows.backward(taken, grad, numbers(*through.shape))[0]]
        assert [one.shape for one in found] == [one.shape for one in (weight, bias, gamma, part, x)]
        assert {(one.device, one.dtype) for one in (out, *found)} == {(GPU, torch.bfloat16)}
    assert not waits.seen


def test_heads_and_cross_entropies_wait_for_nothing_on_a_gpu_forward_and_backward() -> None:
    with fake_gpu() as waits:
        split, entropy = Context(1), Context(1)
        parts = _SplitHeads.forward(split, numbers(20, 96), ((2, 4), (4, 3)), 4)
        joined, *_ = _SplitHeads.backward(split, *(numbers(*part.shape) for part in parts))
        teacher, weight = (torch.empty(*shape, device=GPU) for shape in ((6, 10), (6,)))
        loss = _WeightedCrossEntropy.forward(entropy, numbers(6, 10), teacher, weight, 0.1)
        of_student, *_ = _WeightedCrossEntropy.backward(entropy, torch.empty_like(loss))
        assert (joined.shape, of_student.shape, loss.dtype) == ((20, 96), (6, 10), torch.float32)
        assert {(one.device, one.dtype) for one in (joined, of_student)} == {(GPU, torch.bfloat16)}
    assert not waits.seen


def test_turned_queries_wait_for_nothing_on_a_gpu_forward_and_backward() -> None:
    with fake_gpu() as waits:
        tables = [torch.empty(n, 8, device=GPU) for n in (16, 16, 4, 4)]
        context = Context(1)
        turned = _Turned.forward(context, numbers(2 * 17 + 3 * 5, 96), ((2, 17), (3, 5)), 2, *tables)
        back, *_ = _Turned.backward(context, numbers(*turned.shape))
        assert {(one.shape, one.device, one.dtype) for one in (turned, back)} == {((49, 96), GPU, torch.bfloat16)}
    assert not waits.seen


def test_tokens_are_exchanged_by_processes_that_share_a_slide_without_a_wait_forward_and_backward() -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        with fake_gpu() as waits:
            share = TokenShare((7, 4), dist.group.WORLD)
            gathered, there, back = Context(1), Context(1), Context(1)
            whole = _Gather.forward(gathered, numbers(5, 32), share)
            grads = [_Gather.backward(gathered, numbers(*whole.shape))[0]]
            of_heads = _Exchange.forward(there, numbers(5, 3, 4, 8), share, _tokens_for_heads, _heads_for_tokens)
            grads += [_Exchange.backward(there, numbers(*of_heads.shape))[0]]
            of_tokens = _Exchange.forward(back, of_heads, share, _heads_for_tokens, _tokens_for_heads)
            grads += [_Exchange.backward(back, numbers(*of_tokens.shape))[0]]
            shapes = [tuple(one.shape) for one in (whole, of_heads, of_tokens, *grads)]
            assert shapes == [(11, 32), (11, 3, 2, 8), (5, 3, 4, 8), (5, 32), (5, 3, 4, 8), (11, 3, 2, 8)]
            assert {(one.device, one.dtype) for one in (whole, of_heads, *grads)} == {(GPU, torch.bfloat16)}
        assert not waits.seen
    finally:
        dist.destroy_process_group()


def numbers(*size: int) -> torch.Tensor:
    """Such a tensor on the GPU that isn't there."""
    return torch.empty(*size, dtype=torch.bfloat16, device=GPU)


def test_a_gpu_begins_to_embed_tiles_while_the_ones_before_are_on_their_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.encoders.tile_encoder.freeze", lambda *_: None)  # fake weights can't be moved
    preprocessing = Preprocessing(32, 32, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    with torch.device("meta"):
        vit = VisionTransformer(image_size=32, patch_size=8, width=48, depth=2, heads=2, feed_forward_width=96)
    with fake_gpu() as waits:
        vit.to_empty(device=GPU)
        encoder = TileEncoder(vit, class_tokens, preprocessing, "a test's", "here", 48, GPU, "float32", lambda _: vit)
        waits.clear()
        with torch.no_grad():  # fake tensors know no inference mode
            features = TileEncoder.start.__wrapped__(encoder, torch.zeros(5, 40, 36, 3, dtype=torch.uint8).pin_memory())
        assert not waits.seen
        assert features().shape == (5, 48)


def waits_of(code: str) -> int:
    """How many waits the counter sees in a line of code about ``x``, four numbers on the GPU, and ``host``, on the
    CPU."""
    with fake_gpu() as waits:
        names = {"torch": torch, "x": torch.ones(4, device=GPU), "host": torch.ones(4), "GPU": GPU}
        waits.clear()
        exec(code, names)
    return len(waits.seen)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("x.sum().item()", 1),
        ("x.tolist()", 1),
        ("x.view(2, 2).tolist()", 1),
        ("[x.tolist() for _ in range(3)]", 3),
        ("[x[i].item() for i in range(4)]", 4),
        ("[x.sum().item() for _ in range(2)]", 2),
        ("bool(x.any())", 1),
        ("x.nonzero()", 1),
        ("x[x > 0]", 1),
        ("x[x > 0] = 0", 1),
        ("torch.masked_select(x, x > 0)", 1),
        ("x[torch.tensor([1, 2])]", 1),
        ("x.cpu()", 1),
        ("host.to(GPU)", 1),
        ("host.to(GPU, non_blocking=True)", 1),
        ("host.pin_memory().to(GPU)", 1),
        ("torch.tensor([1.0, 2.0], device=GPU)", 1),
        ("x.copy_(host)", 1),
        ("host.copy_(x, non_blocking=True)", 1),
        ("x.histc(4)", 1),
        ("torch.linalg.inv(x.view(2, 2))", 1),
        ("torch.linalg.cholesky(x.view(2, 2))", 1),
        ("torch.linalg.eigh(x.view(2, 2))", 1),
        ("torch.linalg.svdvals(x.view(2, 2))", 1),
        ("x.masked_fill(x > 0, x[0])", 1),
        ("x.index_fill(0, torch.zeros(1, dtype=torch.int64, device=GPU), x[0])", 1),
        ("torch._foreach_copy_([x], [host], True)", 1),
        ("torch._foreach_copy_([x], [host.pin_memory()], True)", 0),
        (
            "host.pin_memory()[::2].to(GPU, non_blocking=True)",
            1,
        ),  # has gaps: laid out anew, in memory that isn't locked
        ("host.pin_memory().view(2, 2).T.to(GPU, non_blocking=True)", 0),
        ("host.pin_memory().to(GPU, torch.float64, non_blocking=True)", 1),  # converted before
        ("host.pin_memory().to(GPU, non_blocking=True)", 0),
        ("x.to('cpu', non_blocking=True)", 0),  # into page-locked memory, which torch takes for it
        ("host.pin_memory().copy_(x, non_blocking=True)", 0),
        ("x.repeat_interleave(torch.full((4,), 2, device=GPU), output_size=8)", 0),
        ("torch.full((), 2.0, device=GPU)", 0),
        ("torch.where(x > 0, x, 0).cumsum(0)", 0),
        ("x[torch.arange(2, device=GPU)] * 2.0", 0),
    ],
)
def test_the_counter_sees_what_waits_and_nothing_else(code: str, expected: int) -> None:
    assert waits_of(code) == expected


def test_a_device_mixed_with_another_fails() -> None:
    with fake_gpu(), pytest.raises(RuntimeError, match="two devices"):
        torch.ones(4, device=GPU) + torch.ones(4)
