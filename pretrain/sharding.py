"""FSDP2 through Lightning: how networks are wrapped, and the strategy that owns the mesh of processes.

Order, stated once:  build on the meta device → (checkpoint → compile) → shard every block → shard the network → allocate → fill.

Each network (an encoder, a head) is a root of its own. A teacher is wrapped exactly as its student is, so the moving
average runs shard by shard. One code path serves one process and many, CPU (gloo) and GPU (NCCL).
"""

from collections.abc import Callable

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from data.fault import Fault
from models.initialise import initialise
from pretrain.objective import Objective

PRECISIONS = {"float32": None, "bf16": torch.bfloat16}
"""What is computed in; masters and reductions are float32 in both."""


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy for FSDP2 with a ``(replicate, shard)`` mesh.

    ``shard_size`` processes share one copy of the networks, and the copies are replicas; None shards over all
    processes. The data-parallel size is always the whole world.
    """

    def __init__(self, shard_size: int | None = None) -> None:
        super().__init__(data_parallel_size=1, tensor_parallel_size=1)
        self.shard_size = shard_size

    def setup_environment(self) -> None:
        # The grandparent's setup starts the processes' group; the parent's would lay a mesh of its own over it.
        self._setup_distributed()
        shard = self.shard_size or self.world_size
        if self.world_size % shard:
            raise Fault(f"trainer.shard_size={shard} does not divide the {self.world_size} processes.")
        shape, names = (
            ((self.world_size,), ("shard",))
            if shard == self.world_size
            else ((self.world_size // shard, shard), ("replicate", "shard"))
        )
        self._device_mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=names)
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self._device_mesh

    @property
    def distributed_sampler_kwargs(self) -> dict[str, int]:
        return {"num_replicas": self.world_size, "rank": self.global_rank}


def shard(objective: Objective, mesh: DeviceMesh, precision: str, compiled: bool = False) -> None:
    """Wrap every network of an objective that was built on the meta device: blocks first, then the network.

    ``compiled`` blocks go through torch.compile, each by itself: all blocks of a network share one compilation, and what
    gathers and frees their parameters stays outside of it.
    """
    if precision not in PRECISIONS:
        raise Fault(f"trainer.precision is one of {', '.join(PRECISIONS)}, not {precision!r}.")
    inside = MixedPrecisionPolicy(param_dtype=PRECISIONS[precision], reduce_dtype=torch.float32)
    outside = MixedPrecisionPolicy(
        param_dtype=PRECISIONS[precision], reduce_dtype=torch.float32, output_dtype=torch.float32
    )
    networks = {**objective.trained(), **objective.frozen()}
    for network in networks.values():
        for module in network.modules():
            if isinstance(module, nn.ModuleList):
                for block in module:
                    if compiled:
                        block.forward = torch.compile(block.forward)
                    fully_shard(block, mesh=mesh, mp_policy=inside)
        # A teacher has no backward, so nothing but this would free its root's gathered parameters; at one process the
        # mistake goes unnoticed.
        fully_shard(network, mesh=mesh, mp_policy=outside, reshard_after_forward=True)


def materialise(
    objective: Objective, device: torch.device, seed: int, begin: Callable[[Objective], None] | None = None
) -> None:
    """Give an objective on the meta device memory and first values. Raises ValueError naming a parameter left without.

    ``begin`` may put other values into the trained networks before a teacher is copied from them.
    """
    objective.to_empty(device=device)
    for name, network in objective.trained().items():
        initialise(network, seed, name)
    if begin is not None:
        begin(objective)
    objective.start()
    for name, parameter in objective.named_parameters():
        values = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        if not torch.isfinite(values).all():
            raise ValueError(f"{name} has no initial value: its network's initialise() doesn't fill it")
