"""One training step, however it is spread: any number of processes, sharded or with replicas, micro-batches,
recomputed, compiled. Four processes are started once and do everything that needs more than one (`sharded_steps`)."""

import dataclasses
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from data.fault import Fault
from models.longnet import Layer, LayerSettings
from models.sequence_parallel import TokenShare
from models.vit import MLP, Block
from pretrain.plan.torch_internals import FakeStore
from pretrain.settings.composition import load
from pretrain.training.sharded_strategy import ShardedStrategy
from pretrain.training.sharding import lay_mesh, recomputed, shard
from tests.pretrain.objectives.tile_objectives import encoder
from tests.pretrain.training.sharded_steps import (
    STEPS,
    Forget,
    MaskedOnFirst,
    Outcome,
    Run,
    Train,
    teacher_after_forward,
    types,
)
from tests.pretrain.training.wavy_slides import write_wavy_slides

ROOT = Path(__file__).resolve().parents[3]
BF16 = 0.004  # of a loss over the steps (seen: .0008): other batches per process make other roundings, which feed back

# Quick: every number of processes, and every setting at least once, both stages. Settings that could hide each other
# are apart below.
QUICK = [
    Run(objective, **where)
    for objective in ("dinov2", "slide_mae")
    for where in (
        {"world": 2, "accumulate": 2, "checkpointing": "full"},
        {"world": 4, "shard_size": 2, "checkpointing": "selective"},
    )
] + [Run("slide_ibot", 2), Run("dinov3", 2), Run("lejepa", 2, accumulate=2)]
PLACES: list[dict[str, Any]] = [{"world": 1}, {"world": 2}, {"world": 4}, {"world": 4, "shard_size": 2}]
SETTINGS: list[dict[str, Any]] = [
    {},
    {"accumulate": 2},
    {"checkpointing": "full"},
    {"checkpointing": "selective"},
    {"compiled": True},
    {"compiled": True, "accumulate": 2, "checkpointing": "full"},
    {"compiled": True, "checkpointing": "selective"},
    {"precision": "float32"},
    {"precision": "bf16"},
    {"precision": "bf16", "accumulate": 2, "checkpointing": "selective"},
]
MATRIX = [
    Run("distil", 2),
    Run("slide_ibot", 4, 2, accumulate=2, checkpointing="full"),
    Run("distil_heads", 2, accumulate=2),
    *(
        Run(objective, **place, **settings)
        for objective in ("dinov2", "slide_mae")
        for settings in SETTINGS
        for place in PLACES
    ),
    *(
        Run(objective, **place, checkpointing="full")
        for objective in ("dino", "lejepa", "distil", "distil_heads", "mae", "slide_ibot")
        for place in PLACES
    ),
    *(
        Run(objective, **place, **how)
        for objective in ("rotary", "dinov3", "jepa")
        for how in SETTINGS[:8]
        for place in PLACES
    ),
    *(Run("slide_mae", 2, together=2, checkpointing=how) for how in ("none", "full", "selective")),
    *(Run(objective, 2, accumulate=2, checkpointing="full") for objective in ("slide_pairs", "slide_context")),
    *(Run(objective, 2, together=2) for objective in ("slide_pairs", "slide_context")),
]


def alone(run: Run) -> Run:
    """What a run must agree with: one process, one batch, nothing recomputed or compiled."""
    return Run(run.objective, precision=run.precision)


def do(folder: Path, tasks: Sequence[tuple[int, Callable[[Path], Any]]], limit: int) -> list[list[Any]]:
    """Have processes do the tasks, each on so many of them; per task what each process found."""
    write_wavy_slides(folder / "embeddings", 20, columns=6, rows=6, fewer=1)
    (folder / "tasks.pkl").write_bytes(pickle.dumps(list(tasks)))
    done = subprocess.run(
        [sys.executable, "-m", "tests.pretrain.training.sharded_steps", str(folder)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=limit,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return [
        [torch.load(folder / f"{number}-{rank}.pt", weights_only=False) for rank in range(world)]
        for number, (world, _) in enumerate(tasks)
    ]


def train(folder: Path, runs: Sequence[Run], more: Sequence[tuple[int, Any]], limit: int) -> tuple[dict[Run, Any], Any]:
    """The runs' outcomes, those that they must agree with among them, and what else the processes found."""
    command = load("tile", ["run=a", "data.shards=b"]).object().optim
    optim = dataclasses.replace(command, lr=2e-3, clip=0.5, clip_each=0.2, layer_decay=0.7, weight_decay=0.1)
    every = sorted({*runs, *map(alone, runs)}, key=lambda run: -run.world)  # who is done goes home
    found = do(folder, [*more, *((run.world, Train(run, optim)) for run in every)], limit)
    return dict(zip(every, (ranks[0] for ranks in found[len(more) :]), strict=True)), found[: len(more)]


MORE: dict[str, tuple[int, Any]] = {
    "a bias forgotten, one process": (1, Forget(1, "network")),
    "a bias forgotten, two": (2, Forget(2, "network")),
    "a buffer forgotten, two": (2, Forget(2, "buffer")),
    "types": (2, types),
    "teacher": (2, teacher_after_forward),
    "masks on the first of two": (2, MaskedOnFirst(2, 1)),
    "masks on the first of four": (4, MaskedOnFirst(4, 2)),
    "masks in one process": (1, MaskedOnFirst(1, 1)),
}


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[Run, Outcome], dict[str, list[Any]]]:
    outcomes, more = train(tmp_path_factory.mktemp("quick"), QUICK, list(MORE.values()), 300)
    return outcomes, dict(zip(MORE, more, strict=True))


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> dict[Run, Outcome]:
    return train(tmp_path_factory.mktemp("matrix"), MATRIX, [], 3000)[0]


def name(run: Run) -> str:
    """``dinov2 world=2 accumulate=2``: what differs from a plain run."""
    plain = Run(run.objective)
    different = {key: value for key, value in vars(run).items() if value != getattr(plain, key)}
    return " ".join([run.objective, *(f"{key}={value}" for key, value in different.items())])


def assert_agree(found: Outcome, expected: Outcome, precision: str) -> None:
    assert len(found.losses) == STEPS
    tolerance = {"float64": 1e-10, "float32": 1e-5, "bf16": BF16}[precision]
    assert found.losses == pytest.approx(expected.losses, rel=tolerance, abs=tolerance)
    if precision == "bf16":
        return
    for ours, theirs in zip(found.norms, expected.norms, strict=True):
        assert ours == pytest.approx(theirs, rel=tolerance, abs=tolerance)
    if precision == "float64":  # in float32, Adam makes whole steps of gradients that are nothing but rounding
        assert found.weights.keys() == expected.weights.keys()
        for key, value in expected.weights.items():
            torch.testing.assert_close(
                found.weights[key], value, atol=1e-10, rtol=1e-10, msg=lambda m, k=key: f"{k}: {m}"
            )


# The same training everywhere --------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", QUICK, ids=name)
def test_processes_replicas_micro_batches_and_recomputation_change_nothing(run: Run, quick: Any) -> None:
    assert_agree(quick[0][run], quick[0][alone(run)], run.precision)


@pytest.mark.slow
@pytest.mark.parametrize("run", [run for run in MATRIX if run != alone(run)], ids=name)
def test_each_setting_by_itself_changes_nothing(run: Run, matrix: dict[Run, Outcome]) -> None:
    assert_agree(matrix[run], matrix[alone(run)], run.precision)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["dinov2", "slide_mae"])
def test_the_precisions_compute_the_same_to_their_own_digits(objective: str, matrix: dict[Run, Outcome]) -> None:
    exact = matrix[Run(objective)].losses
    assert matrix[Run(objective, precision="float32")].losses == pytest.approx(exact, rel=1e-5)
    rounded = matrix[Run(objective, precision="bf16")].losses
    assert rounded == pytest.approx(exact, rel=0.02) and rounded != pytest.approx(exact, rel=1e-4)


def test_masked_patches_all_on_one_process_are_a_step_like_any_other(quick: Any) -> None:
    expected = quick[1]["masks in one process"][0]
    assert expected[0] > 0 and min(expected[1:]) > 0
    for case in ("masks on the first of two", "masks on the first of four"):
        for found in quick[1][case]:
            assert found == pytest.approx(expected, rel=1e-10)


# The wrapping ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["a bias forgotten, one process", "a bias forgotten, two"])
def test_a_weight_that_is_left_out_is_named_on_every_process(case: str, quick: Any) -> None:
    for said in quick[1][case]:  # of two processes, only the second holds the row that was left out
        assert "network.bias has no initial value" in said and "(1 such" in said


def test_a_buffer_that_is_left_out_is_named(quick: Any) -> None:
    assert all("centre has no initial value" in said for said in quick[1]["a buffer forgotten, two"])


def test_bf16_computes_in_bf16_and_keeps_and_adds_in_float32(quick: Any) -> None:
    for found in quick[1]["types"]:
        for which in ("input", "weight", "output", "teacher"):
            assert found[which] == {torch.bfloat16}, which
        for which in ("masters", "gradients", "moments", "buffers", "features", "angles"):
            assert found[which] == {torch.float32}, which
        assert (
            found["with more digits"] > 0.2
        )  # the mean of two numbers of 8 digits has 9 and more, unless bf16 added them


def test_a_teacher_is_in_shards_again_once_it_has_seen_a_batch(quick: Any) -> None:
    assert quick[1]["teacher"] == [[], []]


# Recomputation -----------------------------------------------------------------------------------------------------


class Count(TorchDispatchMode):
    """How often each operator runs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, operator: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[operator.name()] = self.calls.get(operator.name(), 0) + 1
        return operator(*args, **(kwargs or {}))

    def of(self, *names: str) -> int:
        return sum(self.calls.get(f"aten::{name}", 0) for name in names)


def vit_block() -> tuple[Callable[..., Tensor], Tensor]:
    block = Block(16, 2, 32, MLP, scaled=True, attention="sdpa")
    nn.init.ones_(block.ls1.gamma), nn.init.ones_(block.ls2.gamma)
    return lambda x: block(x, [(1, 600)]), torch.randn(600, 16)  # more tokens than are attended to in plain products


def longnet_layer() -> tuple[Callable[..., Tensor], Tensor]:
    layer = Layer(LayerSettings(16, 2, 32, (16, 32), (1, 2), dropout=0.5), 0)
    return lambda x: layer(x, TokenShare((50,)), [3]), torch.randn(50, 16)


def counted(forward: Callable[..., Tensor], x: Tensor) -> tuple[Count, Tensor]:
    """The operators of a forward and backward, and the input's gradient."""
    x = x.clone().requires_grad_()
    with Count() as count:
        forward(x).square().sum().backward()
    assert x.grad is not None
    return count, x.grad


@pytest.mark.parametrize("make", [vit_block, longnet_layer])
def test_full_computes_a_block_twice_and_selective_neither_its_linear_maps_nor_its_attention(
    make: Callable[[], tuple[Callable[..., Tensor], Tensor]],
) -> None:
    forward, x = make()
    with Count() as once:
        forward(x)
    linear, attention = ("addmm",), ("_scaled_dot_product_flash_attention_for_cpu",)
    none, gradient = counted(forward, x)
    assert none.of(*linear) == once.of(*linear) > 0 and none.of(*attention) == once.of(*attention) > 0
    full, same = counted(recomputed(forward, selective=False), x)
    assert torch.equal(gradient, same)
    assert full.of(*linear) >= 2 * once.of(*linear) - 1  # what comes after the last thing that is needed is left out
    assert full.of(*attention) == 2 * once.of(*attention)
    selective, same = counted(recomputed(forward, selective=True), x)
    assert torch.equal(gradient, same)
    assert selective.of(*linear) == once.of(*linear) and selective.of(*attention) == once.of(*attention)
    assert selective.of("native_layer_norm") == full.of("native_layer_norm") > none.of("native_layer_norm")


@pytest.mark.parametrize("selective", [False, True])
def test_recomputation_draws_what_was_drawn_from_torchs_own_generator(selective: bool) -> None:
    linear, x = nn.Linear(8, 8), torch.randn(64, 8)

    def forward(x: Tensor) -> Tensor:
        return F.dropout(linear(x), 0.5).square()

    torch.manual_seed(1)
    _, expected = counted(forward, x)
    torch.manual_seed(1)
    _, found = counted(recomputed(forward, selective), x)
    assert torch.equal(found, expected)


# Settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_size", [3, 0, -2, 8])
def test_a_shard_size_that_does_not_divide_the_processes_is_refused(shard_size: int) -> None:
    with pytest.raises(Fault, match=rf"trainer\.shard_size={shard_size} does not divide the 4 processes"):
        lay_mesh("cpu", 4, shard_size)


def test_every_process_has_data_of_its_own_however_they_are_sharded() -> None:
    for shard_size in (None, 1, 2):
        strategy = ShardedStrategy(shard_size)
        strategy.cluster_environment = SimpleNamespace(world_size=lambda: 4, global_rank=lambda: 3)  # type: ignore[assignment]
        assert strategy.distributed_sampler_kwargs == {"num_replicas": 4, "rank": 3}


class Gathered(TorchDispatchMode):
    """How many units' parameters were asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.units = 0

    def __torch_dispatch__(self, operator: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.units += "allgather" in operator.name()
        return operator(*args, **(kwargs or {}))


def test_the_next_unit_is_gathered_while_one_computes_forwards_and_backwards() -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        with torch.device("meta"):
            network = encoder(depth=4)()
        objective: Any = SimpleNamespace(to=network.to, trained=lambda: {"encoder": network}, frozen=lambda: {})
        shard(objective, lay_mesh("cpu", 2, 2), "float32")
        network.to_empty(device="cpu")
        forward, backward = [], []
        with Gathered() as gathered:
            for block in network.blocks:
                block.attn.qkv.register_forward_pre_hook(lambda *_: forward.append(gathered.units))
                block.attn.qkv.register_full_backward_hook(lambda *_: backward.append(gathered.units))
            network([torch.zeros(2, 3, 16, 16)])[0].cls.sum().backward()
        assert forward == [3, 4, 5, 5]  # the network's own, this block's and the next one's
        # The network keeps nothing gathered: its own and the last two blocks' are gathered anew, then one ahead.
        assert [count - forward[-1] for count in backward] == [3, 4, 5, 5]
    finally:
        dist.destroy_process_group()
