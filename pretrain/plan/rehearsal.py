"""A step of the real objective, in the real sharding, without numbers: what it computes and what memory it holds when.

Tensors are torch's *fake* ones: they know shape, type and device, and hold nothing, so a step of a ViT-g on 256
processes is rehearsed on a laptop. Nothing about a network is written down here; what runs is
`pretrain.training.sharding.shard`, `pretrain.training.gradients` and the objective itself, a plug-in of the user's too.
All that a shape doesn't say is how many elements of a mask are true; that comes with the batch (`RehearsedBatch.true`),
or is counted where a mask is made of shapes (`constants`).
"""

import math
import warnings
from collections import ChainMap, Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count, shape_wrapper

from data.fault import Fault
from models import dilated_attention
from models.attention import Attention, attend
from models.attention_statistics import SDPA, StatisticsKernel
from models.nested_tensors import tensors_in
from pretrain.objectives.contract import require_trainable
from pretrain.objectives.interface import Moment, Objective, SlideObjective
from pretrain.plan import constants
from pretrain.plan.collectives import Collective, collectives
from pretrain.plan.kernels import bytes_moved, starts_kernels
from pretrain.plan.ledger import Ledger
from pretrain.plan.torch_internals import (
    FLASH_BACKWARD_OF_CPUS,
    FLASH_OF_CPUS,
    READ_A_NUMBER,
    FakeStore,
    FakeTensor,
    FakeTensorMode,
    TorchDispatchMode,
    backward_node,
    in_backward,
    newest_node,
    operator_name,
    operator_of,
    sequence_number,
    tree_leaves,
    without_modes,
)
from pretrain.run.across_ranks import local_shard
from pretrain.training.gradients import gradients
from pretrain.training.sharding import lay_mesh, shard, units_of

aten = torch.ops.aten
ATTENTION = {"bmm", "baddbmm"}  # products between tokens, beside the fused kernels that have attention in their names
LAY_OUT = dilated_attention.lay_out.__wrapped__  # without its memory
OF_THE_BATCH = "the batch"
LARGEST_CELL = 999  # of a slide's grid; what depends on it is a table of positions


@dataclass
class RehearsedBatch:
    """A process's micro-batches without numbers.

    ``make`` builds one; it is called while tensors are fake. ``true``: how many elements of a bool tensor of so many
    elements are true.
    """

    make: Callable[[], Any]
    true: dict[int, int]
    samples: int  # in each
    parts: int = 1


@dataclass
class Rehearsal:
    """What one step of one process does. Bytes are those beyond parameters, buffers, teacher and optimiser."""

    flops: Counter[tuple[str, str]] = field(default_factory=Counter)  # by (part, forward, backward or again)
    phases: list[dict[str, int]] = field(
        default_factory=list
    )  # per phase of the step, the bytes by kind at its highest
    calls: Counter[Collective] = field(default_factory=Counter)
    sent: Counter[Collective] = field(default_factory=Counter)  # bytes, by each of their processes
    workspace: int = 0  # bytes that attention's backward takes for itself on a GPU, at most at a time
    work: Counter[str] = field(default_factory=Counter)  # operators that start kernels, and bytes that these move


def rehearse(
    make_objective: Callable[[], Objective],
    batch: RehearsedBatch,
    *,
    processes: int,
    shard_size: int | None = None,
    precision: str = "float32",
    checkpointing: str = "none",
    fused_attention: bool = True,
    together: int = 1,
) -> Rehearsal:
    """Rehearse the gradients of a step on the first of ``processes``.

    ``fused_attention``: attention by a kernel that keeps no matrix of pairs, as on a GPU; else as on a CPU.
    ``together``: processes that share each slide of the slide stage. Raises Fault where they can't, and RuntimeError
    inside a process group, since it makes one of its own.
    """
    if dist.is_initialized():
        raise RuntimeError("a rehearsal makes a process group of its own, and there is one already")
    with torch.device("meta"):
        objective = make_objective()
    require_trainable(objective)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    try:
        with ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", ".*returned a view tensor.*")  # FSDP's, about what isn't done here
            if fused_attention:
                stack.enter_context(as_on_a_gpu(objective))
            stack.enter_context(real_plans())
            shard(objective, lay_mesh("cpu", processes, shard_size), precision, checkpointing)
            if together > 1:
                assert isinstance(objective, SlideObjective)
                try:
                    objective.share_slides(dist.new_subgroups(together)[0])
                except ValueError as error:
                    raise Fault(f"data.processes_per_slide={together}: {error}.") from error
            watch = stack.enter_context(OperationWatch(objective, batch.true))
            if fused_attention:
                stack.enter_context(watch.one_call_of_slide_attention())
            objective.to_empty(device="cpu")
            parts = [(batch.make(), i * batch.samples) for i in range(batch.parts)]
            watch.begin(parts)
            gradients(objective, parts, Moment(0, 1, 0), lambda loss: loss.backward())
            return watch.end()
    finally:
        dist.destroy_process_group()


@contextmanager
def as_on_a_gpu(objective: Objective) -> Iterator[None]:
    """Fused attention at any length, and dilated attention in calls as large as a GPU's."""
    for module in objective.modules():
        if isinstance(module, Attention) and module.attend is attend:
            module.attend = partial(attend, fused=True)
    sizes = dilated_attention.CALL_ELEMENTS
    before, sizes["cpu"] = sizes["cpu"], sizes["cuda"]
    try:
        yield
    finally:
        sizes["cpu"] = before


@contextmanager
def real_plans() -> Iterator[None]:
    """Index plans of dilated attention are made of real numbers, which decide how many calls there are and of what.

    They are remembered apart from a training's: a GPU's calls are larger than this machine's.
    """
    lay_out = dilated_attention.lay_out
    dilated_attention.lay_out = lambda *arguments: _laid_out(dilated_attention.CALL_ELEMENTS["cpu"], *arguments)  # type: ignore[assignment]
    try:
        yield
    finally:
        dilated_attention.lay_out = lay_out


@lru_cache(maxsize=64)
def _laid_out(_: int, *arguments: Any) -> dilated_attention.Branch:
    with without_modes():
        return LAY_OUT(*arguments)


class OperationWatch(TorchDispatchMode):
    """Makes tensors fake, and follows every operation: whose it is, what it computes, which memory it takes and gives
    back."""

    def __init__(self, objective: Objective, true: dict[int, int]) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.objective, self.true = objective, true
        self.seen = Rehearsal()
        self.one_call = False  # whether what runs is one operator on a GPU
        self.names = dict(named_parts(objective))
        self.running: list[str] = []  # the modules that are running their forward, innermost last
        self.made_by: dict[int, str] = {}  # autograd's node → the part whose forward made it
        self.watching = False
        self.memory = Ledger()

    def __enter__(self) -> "OperationWatch":
        self.stack = ExitStack()
        self.stack.enter_context(self.fake)
        entered = register_module_forward_pre_hook(lambda module, _: self.running.append(self.names.get(module, "")))
        left = register_module_forward_hook(self._left, always_call=True)  # a recomputed forward ends in an exception
        for handle in (entered, left):
            self.stack.callback(handle.remove)
        # FSDP gives parameters memory and takes it back by this one call, which no dispatch sees.
        resize = torch.UntypedStorage.resize_
        watch = self

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            if watch.watching:
                watch.memory.see(storage, "gathered parameters")
                watch.memory.rename(storage, "gathered parameters")
            return result

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign, assignment]
        self.stack.callback(setattr, torch.UntypedStorage, "resize_", resize)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.stack.close()

    def _left(self, *_: Any) -> None:
        self.running.pop()

    def begin(self, parts: Sequence[Any]) -> None:
        """Count from here; the memory of ``parts`` counts, and nothing else that there is already."""
        self.watching = True
        for tensor in (*self.objective.parameters(), *self.objective.buffers()):
            self.memory.see(local_shard(tensor).untyped_storage(), "parameters")
        self.memory.forget()  # these are counted elsewhere
        self.memory.phase = "targets"
        for tensor in tensors_in(parts):
            self.memory.see(tensor.untyped_storage(), OF_THE_BATCH)

    def end(self) -> Rehearsal:
        """What was seen."""
        self.watching = False
        for parameter in self.objective.parameters():
            if parameter.grad is not None:
                self.memory.rename(local_shard(parameter.grad).untyped_storage(), "gradients")
        self.seen.phases = list(self.memory.highest())
        return self.seen

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = self._known(function, args)
        if result is NotImplemented:
            result = function(*args, **kwargs)
            constants.follow(function, args, kwargs, result)
        if self.watching:
            self._follow(function, args, kwargs, result)
        return result

    def _known(self, function: Any, args: Any) -> Any:
        """Results whose shape or value hangs on numbers that aren't there."""
        if function is aten.nonzero.default:
            return args[0].new_empty(self._true(args[0]), args[0].ndim, dtype=torch.int64)
        if function is aten.index.Tensor and any(_is_mask(index) for index in args[1]):
            return function(args[0], [number for index in args[1] for number in self._numbers(index)])
        if function is aten.masked_select.default:
            some, mask = args
            whole = torch.broadcast_shapes(some.shape, mask.shape)
            return some.new_empty(self._true(mask) * math.prod(whole) // max(1, mask.numel()))
        if function is READ_A_NUMBER and isinstance(args[0], FakeTensor):
            if (value := constants.sum_of(args[0])) is not None:
                return value
            dtype = args[0].dtype
            return False if dtype == torch.bool else 1.0 if dtype.is_floating_point else LARGEST_CELL
        return NotImplemented

    def _numbers(self, index: Tensor | None) -> list[Tensor | None]:
        """An index as numbers: those of a mask's true elements, one tensor for each of its dimensions."""
        if index is None or not _is_mask(index):
            return [index]
        count = self._true(index)
        return [index.new_empty(count, dtype=torch.int64) for _ in range(index.ndim)]

    def _true(self, mask: Tensor) -> int:
        """How many elements of a mask are true: counted where they are known, said by the batch, or else at most all of
        them."""
        known = constants.sum_of(mask)
        if known is not None:
            return int(known)
        return self.true.get(mask.numel(), mask.numel())

    def _follow(self, function: Any, args: Any, kwargs: Any, result: Any) -> None:
        backward, node = in_backward(), backward_node()
        if backward:
            self._enter("backward")
        elif torch.is_grad_enabled():
            self._enter("forward")
        if self.running:
            part = self.running[-1]
        elif backward:
            part = self.made_by.get(sequence_number(node), "") if node is not None else ""
        else:
            part = ""
        if torch.is_grad_enabled() and (self.running or not backward):
            # The newest node; operations that make none come after it and change nothing.
            self.made_by.setdefault(newest_node(), part)
        count = FLOPS.get(operator_of(function))
        if count is not None:
            direction = "again" if backward and self.running else "backward" if backward else "forward"
            self.seen.flops[named(part, function), direction] += count(*args, **kwargs, out_val=result)
        if operator_of(function) is FLASH_BACKWARD_OF_CPUS:
            self.needs_workspace(args[1])
        if starts_kernels(function) and not self.one_call:
            self.seen.work["operators"] += 1
            self.seen.work["bytes"] += bytes_moved(function, args, kwargs, result)
        if function.namespace == "c10d":
            for one, sent in collectives(function, args, "backward" if backward else "forward"):
                self.seen.calls[one] += 1
                self.seen.sent[one] += sent
        kind = self._kind(function, part, backward, node)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.memory.see(local_shard(tensor).untyped_storage(), kind)

    @contextmanager
    def one_call_of_slide_attention(self) -> Iterator[None]:
        """Count the calls for each run length, which dilated attention makes of 16-bit numbers here, as the one call
        that it makes on a GPU."""
        of_each_length = SDPA.each_length
        SDPA.each_length = _OneCall(of_each_length, self)  # type: ignore[assignment]
        try:
            yield
        finally:
            SDPA.each_length = of_each_length

    def needs_workspace(self, queries: Tensor) -> None:
        """Note that FlashAttention's backward sums up the gradient of ``queries`` in float32 (Dao 2023)."""
        self.seen.workspace = max(self.seen.workspace, 4 * queries.numel())

    @contextmanager
    def as_on_gpus(self, like: Tensor) -> Iterator[None]:
        """Count what runs as one operator, if numbers are ``like`` those that FlashAttention takes."""
        self.one_call = like.itemsize == 2
        self.seen.work["operators"] += self.one_call
        try:
            yield
        finally:
            self.one_call = False

    def _enter(self, phase: str) -> None:
        name = self.memory.phase.partition(" ")[0]
        if name != phase:
            self.memory.phase = f"{phase} {len(self.memory.events)}"

    def _kind(self, function: Any, part: str, backward: bool, node: Any) -> str:
        if function.namespace == "fsdp":
            return "gathered parameters" if not backward else "gradients before they are sharded"
        if backward and not self.running:
            return "gradients before they are sharded"
        if part.startswith("teacher"):
            return "teacher's pass"
        return "activations of blocks" if "blocks" in part or "embedding" in part else "heads, logits and losses"


class _OneCall:
    """A kernel of slide attention that counts as one operator where a GPU would make one call of it."""

    def __init__(self, kernel: StatisticsKernel, watch: OperationWatch) -> None:
        self.kernel, self.watch = kernel, watch

    def forward(self, q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        with self.watch.as_on_gpus(q):
            return self.kernel.forward(q, *rest)

    def backward(self, grad: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        self.watch.needs_workspace(grad)
        with self.watch.as_on_gpus(grad):
            return self.kernel.backward(grad, *rest)


def _is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


def named_parts(objective: Objective) -> Iterator[tuple[nn.Module, str]]:
    """Every module of an objective's networks, with the part that it belongs to: ``teacher.encoder blocks``,
    ``decoder``, …"""
    for name, network in {**objective.trained(), **objective.frozen()}.items():
        blocks = {module for unit in units_of(network) for module in unit.modules()}
        for path, module in network.named_modules():
            steps = path.split(".")
            inside = module in blocks
            kind = (
                "blocks"
                if inside
                else (
                    "patch embedding" if steps[0] == "patch_embed" else "prototypes" if steps[0] == "last_layer" else ""
                )
            )
            yield module, f"{name} {kind}".strip()


def named(part: str, function: Any) -> str:
    """A part's name in a table of operations: blocks apart into linear maps and attention."""
    if not part.endswith("blocks"):
        return part or "losses"
    operator = operator_name(function)
    return f"{part}, {'attention' if operator in ATTENTION or 'attention' in operator else 'linear maps'}"


def _flash_for_cpu(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _flash_for_cpu_backward(
    grad: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any
) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


CPU_ATTENTION = {  # torch counts the other fused kernels, by these formulas, and not the CPU's
    FLASH_OF_CPUS: _flash_for_cpu,
    FLASH_BACKWARD_OF_CPUS: _flash_for_cpu_backward,
}
FLOPS = ChainMap({operator: shape_wrapper(formula) for operator, formula in CPU_ATTENTION.items()}, flop_registry)
"""Floating-point operations by operator: torch's own formulas, and those that networks have registered there."""
