"""FSDP2 through Lightning: the strategy that owns the mesh of processes."""

from lightning.pytorch.strategies import ModelParallelStrategy

from pretrain.training.sharding import lay_mesh


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
        self._device_mesh = lay_mesh(self.root_device.type, self.world_size, self.shard_size)
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self._device_mesh

    @property
    def distributed_sampler_kwargs(self) -> dict[str, int]:
        return {"num_replicas": self.world_size, "rank": self.global_rank}
