"""The insides of torch that the rehearsal stands on, each held to what is asked of it: with a newer torch, what fails
here is what has changed."""

import ast
from pathlib import Path

import torch
import torch.distributed as dist

from pretrain.plan import torch_internals as internals

ROOT = Path(__file__).resolve().parents[3]
SEEN = "2.14"
# Torch's private names elsewhere, each with a file of its own that would be the one to change.
ELSEWHERE = {
    "data/shared_memory.py": {"_new_shared"},  # a tensor's memory between processes, before any is shared
    "models/attention_statistics.py": {
        "_flash_attention_forward",
        "_flash_attention_backward",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_efficient_attention_backward",
    },
    "pretrain/run/checkpoints.py": {"_foreach_norm"},
    "pretrain/run/saving.py": {"_foreach_copy_"},
    "pretrain/objectives/teacher.py": {"_foreach_lerp_"},
    "pretrain/training/optimisation.py": {"_foreach_norm", "_foreach_mul_"},
}


def private_names(source: str) -> set[str]:
    """Names with an underscore that a file takes from torch: imported, or reached by dots."""
    found, aten = set(), {"torch"}  # and what a file calls torch.ops.aten
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "torch":
            path = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            found |= {part for part in path if part[0] == "_"}
        elif isinstance(node, ast.Assign) and "torch.ops.aten" in ast.unparse(node.value):
            for target in ast.walk(node.targets[0]):
                aten |= {target.id} if isinstance(target, ast.Name) else set()
    reached = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute) and node.attr[0] == "_"]
    return found | {node.attr for node in reached if ast.unparse(node).partition(".")[0] in aten}


def test_the_check_itself_sees_private_names() -> None:
    source = "from torch._a import _b\nfrom torch import nn\naten = torch.ops.aten\naten._c(), torch._C._d(), self._e()"
    assert private_names(source) == {"_a", "_b", "_c", "_C", "_d"}


def test_nothing_of_the_plan_reaches_into_torchs_objects() -> None:
    """Those that are given to it, whatever they are called there."""
    for file in (ROOT / "pretrain" / "plan").glob("*.py"):
        nodes = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Attribute)]
        reached = {ast.unparse(node) for node in nodes if node.attr[0] == "_" and node.attr[:2] != "__"}
        assert file.name == "torch_internals.py" or {one for one in reached if not one.startswith("self.")} == set()


def test_nothing_else_stands_on_the_insides_of_torch() -> None:
    sources = [file for folder in ("data", "models", "pretrain", "launch") for file in (ROOT / folder).rglob("*.py")]
    found = {str(file.relative_to(ROOT)): private_names(file.read_text()) for file in sources}
    del found["pretrain/plan/torch_internals.py"]
    assert {file: names for file, names in found.items() if names} == ELSEWHERE


def test_this_is_the_torch_that_they_were_seen_with() -> None:
    assert torch.__version__.startswith(f"{SEEN}."), "read pretrain/plan/torch_internals.py again, and name this torch"
    assert f"torch {SEEN}." in (internals.__doc__ or "")


def test_fake_tensors_have_shapes_and_no_numbers_and_real_ones_are_there_without_modes() -> None:
    with internals.FakeTensorMode(allow_non_fake_inputs=True):
        fake = torch.empty(2**40, 2) @ torch.ones(2, 3)
        with internals.without_modes():
            real = torch.ones(2).sum()
    assert isinstance(fake, internals.FakeTensor) and fake.shape == (2**40, 3)
    assert type(real) is torch.Tensor and real == 2


def test_a_fake_group_has_any_number_of_processes() -> None:
    dist.init_process_group("fake", store=internals.FakeStore(), rank=0, world_size=256)
    try:
        dist.all_reduce(torch.ones(1))
        assert dist.get_world_size() == 256
    finally:
        dist.destroy_process_group()


def test_a_mode_sees_every_operation_and_whether_it_is_of_a_backward_and_of_which_node() -> None:
    seen, made = [], {}

    class Watch(internals.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            node = internals.backward_node()
            seen.append(
                (function.overloadpacket.__name__, internals.in_backward(), node and made.get(node._sequence_nr()))
            )
            return function(*args, **(kwargs or {}))

    x, weight = torch.ones(3, 2, requires_grad=True), torch.ones(2, 2, requires_grad=True)
    with Watch():
        product = x @ weight
        made[internals.newest_node()] = "the product"
        product.sum().backward()
    products = [entry for entry in seen if entry[0] == "mm"]
    assert products == [("mm", False, None), ("mm", True, "the product"), ("mm", True, "the product")]


def test_trees_are_taken_apart_and_mapped() -> None:
    tree = ([1, {"a": 2}], (3,))
    assert internals.tree_leaves(tree) == [1, 2, 3]
    assert internals.tree_map(lambda leaf: leaf + 1, tree) == ([2, {"a": 3}], (4,))


def test_a_collective_says_which_processes_take_part() -> None:
    seen = []

    class Watch(internals.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if function.namespace == "c10d":
                seen.append(internals.ranks_of(args))
            return function(*args, **(kwargs or {}))

    dist.init_process_group("fake", store=internals.FakeStore(), rank=0, world_size=8)
    try:
        some = dist.new_group([0, 4])
        with Watch():
            dist.all_reduce(torch.ones(1), group=some)
            dist.all_gather([torch.empty(1) for _ in range(8)], torch.ones(1))
    finally:
        dist.destroy_process_group()
    assert seen == [(0, 4), tuple(range(8))] and internals.ranks_of((torch.ones(1), 3)) == ()
