"""What a step sends: against networks counted by hand and collectives that are really called, and how long it takes."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pretrain.plan.collectives import GATHERED, REDUCED, SUMMED, Collective, collectives
from pretrain.plan.communication import REACHED, RING, TREE, collective_seconds, communication
from pretrain.plan.estimate import Estimate, Settings, estimate, shards
from pretrain.plan.full_plan import make_plan
from pretrain.plan.shardings import Sharding, verdict
from pretrain.plan.table import plan_table
from pretrain.plan.torch_internals import TorchDispatchMode
from pretrain.settings.hardware import described
from tests.pretrain.plan.test_plan import planned
from tests.pretrain.training.real_steps import Step, shape_of

MAE = ("recipe=small_mae", "model.width=96", "data.batch_size=16")
DINO = ("recipe=small", "model.width=96", "model.depth=2", "data.batch_size=16", "objective.group_size=4")
H100 = described("h100_80gb")


def test_parameters_are_gathered_twice_in_their_precision_and_gradients_reduced_once_in_float32() -> None:
    run, _ = shape_of(*MAE)
    found = estimate(run, Settings(4, 2, "bf16", "none", 1), fused_attention=True)
    with torch.device("meta"):
        parameters = list(run.build()().parameters())
    shard, learning = (shards(some, 2) for some in (parameters, [p for p in parameters if p.requires_grad]))  # of two
    pair, others = (0, 1), (0, 2)
    for way in ("forward", "backward"):
        assert found.sent[Collective(GATHERED, way, pair)] == 2 * shard
    assert found.sent[Collective(REDUCED, "backward", pair)] == 4 * learning
    assert found.sent[Collective(SUMMED, "backward", others)] == 4 * learning  # twice half of it


def test_a_teacher_is_gathered_and_has_no_gradients_to_reduce() -> None:
    run, _ = shape_of(*DINO)
    found = estimate(run, Settings(4, 4, "bf16", "none", 1), fused_attention=True)
    with torch.device("meta"):
        objective = run.build()()
    learning, all_of_them = (
        shards((p for network in networks for p in network.parameters()), 4)
        for networks in (objective.trained().values(), [*objective.trained().values(), *objective.frozen().values()])
    )
    everyone = (0, 1, 2, 3)
    heads = found.sent[Collective(GATHERED, "forward", everyone)] / (3 * 2 * all_of_them)
    assert 1 <= heads < 1.5  # those that are called twice are gathered twice
    assert found.sent[Collective(REDUCED, "backward", everyone)] == 3 * 4 * learning


@pytest.mark.slow
def test_micro_batches_gather_each_and_reduce_together() -> None:
    one, four = (estimate(shape_of(*MAE)[0], Settings(2, 2, "bf16", "none", parts), True) for parts in (1, 4))
    pair = (0, 1)
    for way in ("forward", "backward"):
        assert four.sent[Collective(GATHERED, way, pair)] == 4 * one.sent[Collective(GATHERED, way, pair)]
    assert four.sent[Collective(REDUCED, "backward", pair)] == one.sent[Collective(REDUCED, "backward", pair)]


class Called(TorchDispatchMode):
    """What is really called, and sent."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Collective] = Counter()
        self.sent: Counter[Collective] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            way = "backward" if torch._C._current_graph_task_id() != -1 else "forward"
            for one, sent in collectives(function, args, way):
                self.calls[one] += 1
                self.sent[one] += sent
        return function(*args, **(kwargs or {}))


def note_what_is_called(rank: int, folder: Path) -> None:
    """As one of two processes: take the gradients of a step, and leave what was called in a file named by the rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
    run, optim = shape_of(*DINO)
    step = Step(run, optim, "bf16", "none", accumulate=2)
    with Called() as called:
        step.gradients()
    seen = [[*one, called.calls[one], called.sent[one]] for one in called.calls]
    (folder / str(rank)).write_text(json.dumps(seen))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_call_and_send_what_is_planned(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(note_what_is_called, (tmp_path,), nprocs=2)
    found = estimate(shape_of(*DINO)[0], Settings(2, 2, "bf16", "none", 2), fused_attention=False)
    wanted = sorted([one.name, one.way, list(one.ranks), found.calls[one], found.sent[one]] for one in found.calls)
    for rank in ("0", "1"):
        assert sorted(json.loads((tmp_path / rank).read_text())) == wanted


def test_seconds_are_bytes_over_the_slowest_link_and_the_steps_of_a_ring() -> None:
    def seconds(name: str, ranks: range | tuple[int, ...]) -> float:
        return collective_seconds(Collective(name, "backward", tuple(ranks)), 3, 10**9, H100, per_node=8)

    assert seconds(GATHERED, range(1)) == pytest.approx(1 / (REACHED * 450))
    assert seconds(GATHERED, range(8)) == pytest.approx(1 / (REACHED * 450) + 3 * 7 * RING[0])
    # Eight GPUs of a node have eight ports together, two nodes' worth of a ring of 16 …
    assert seconds(GATHERED, range(16)) == pytest.approx(1 / (REACHED * 400) + 3 * (14 * RING[0] + RING[1]))
    # … four of 12 lie on the second node …
    assert seconds(REDUCED, range(12)) == pytest.approx(1 / (REACHED * 200) + 3 * (10 * RING[0] + RING[1]))
    # … and each of a replica's shards has its own port.
    assert seconds(SUMMED, (0, 8, 16, 24)) == pytest.approx(1 / (REACHED * 50) + 3 * 2 * 2 * TREE[1])


def bill(**sent: int) -> Estimate:
    """A step that computes a quarter of its operations forward, and whose eight processes send so much."""
    names = {"gather": (GATHERED, "forward"), "reduce": (REDUCED, "backward"), "loss": (SUMMED, "forward")}
    of = {Collective(*names[name], tuple(range(8))): size for name, size in sent.items()}
    flops = Counter({("a", "forward"): 1, ("a", "backward"): 2, ("a", "again"): 1})
    return Estimate(1, flops, {}, {}, Counter(dict.fromkeys(of, 0)), Counter(of))


def test_what_lasts_longer_than_the_arithmetic_beside_it_is_exposed_and_a_loss_is_waited_for() -> None:
    second = round(REACHED * 450e9)
    found = communication(bill(gather=second, reduce=second), H100, 8, computing=8.0)
    assert (found.seconds, found.exposed) == pytest.approx((2.0, 0.0))
    found = communication(bill(gather=3 * second, reduce=5 * second), H100, 8, computing=4.0)
    assert found.exposed == pytest.approx((3 - 1) + (5 - 3))
    found = communication(bill(gather=second, loss=second), H100, 8, computing=8.0)
    assert (found.seconds, found.exposed) == pytest.approx((2.0, 1.0))
    assert found.sent == {"all-gather, forward": second, "all-reduce, forward": second}


def test_gradients_hide_behind_the_last_micro_batch_alone_and_what_each_gathers_behind_its_own() -> None:
    second = round(REACHED * 450e9)
    for parts in (1, 2, 8):
        step = replace(bill(reduce=5 * second), accumulate=parts)
        assert communication(step, H100, 8, computing=4.0 * parts).exposed == pytest.approx(5 - 3)
        step = replace(bill(gather=3 * parts * second), accumulate=parts)
        assert communication(step, H100, 8, computing=4.0 * parts).exposed == pytest.approx(parts * (3 - 1))
    gathered = Collective(GATHERED, "backward", tuple(range(8)))
    step = replace(bill(reduce=second), accumulate=4)
    step.calls[gathered], step.sent[gathered] = 0, 4 * second
    # Each of four backwards, of 1.5 seconds, gathers for one, and the last one reduces for one besides.
    assert communication(step, H100, 8, computing=8.0).exposed == pytest.approx(0.5)


def test_one_process_sends_nothing() -> None:
    found = estimate(shape_of(*MAE)[0], Settings(1, 1, "bf16", "none", 1), fused_attention=True)
    sends = communication(found, H100, 8, computing=1.0)
    assert (sends.calls, sends.seconds, sum(sends.sent.values())) == (0, 0.0, 0)


@pytest.mark.slow
def test_a_slow_network_is_said_with_the_sharding_that_suffers_less() -> None:
    words = (*MAE, "data.lanes=4", "trainer.precision=bf16", "launch.nodes=2", "launch.gpus_per_node=2")
    slow = make_plan(planned(*words, "hardware.inter_node_gb_s=0.001"))
    full, hybrid = slow["shardings"]
    assert (full["words"], hybrid["words"]) == ("trainer.shard_size=null", "trainer.shard_size=2")
    assert hybrid["peak"] > full["peak"] and hybrid["exposed"] < full["exposed"]
    assert slow["pace"]["step_seconds"] == pytest.approx(slow["step"]["computing"] + full["exposed"])
    said = plan_table(slow)
    assert "The network is too slow:" in said and "trainer.shard_size=2 would leave" in said
    again = make_plan(planned(*words, "trainer.shard_size=2", "hardware.inter_node_gb_s=0.001"))
    assert again["peak_bytes"] == hybrid["peak"] and again["step"]["exposed"] == pytest.approx(hybrid["exposed"])


def test_a_sharding_that_does_not_fit_is_not_proposed() -> None:
    own = Sharding(16, "trainer.shard_size=null", 1, True, 2.0, 1.0, 3.0)
    hybrid = replace(own, words="trainer.shard_size=8", exposed=0.5, step_seconds=2.5)
    assert verdict(2.0, [own, hybrid]).endswith("trainer.shard_size=8 would leave 0.5 s of it.")
    assert verdict(2.0, [own, replace(hybrid, fits=False)]).endswith("or a faster network, would do.")
    assert verdict(200.0, [own, hybrid]) == ""
