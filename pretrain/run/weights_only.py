"""Reading a sharded checkpoint without running code from it.

torch.distributed.checkpoint reads tensors with ``weights_only``, but its ``.metadata`` file and every value that is no
tensor with a plain unpickler, which does whatever the file says. Here the metadata may name nothing but torch's own
descriptions of tensors, and the other values go through torch's restricted loader.
"""

import io
import pickle
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem

DESCRIPTIONS = {
    "pathlib": {"PosixPath", "PurePosixPath"},
    "torch": {"Size", *(name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype))},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in DESCRIPTIONS.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which describes no tensor")
        return super().find_class(module, name)


class WeightsOnlyReader(FileSystemReader):
    """Reads a checkpoint's folder. `read_metadata` raises pickle.UnpicklingError where the file is anything but
    metadata."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        metadata = _MetadataUnpickler(io.BytesIO((self.path / ".metadata").read_bytes())).load()  # type: ignore[operator]
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"it holds a {type(metadata).__name__}")
        if metadata.storage_meta is not None:
            metadata.storage_meta.load_id = self.load_id
        return metadata


class WeightsOnlyPlanner(DefaultLoadPlanner):
    """Loads values that are no tensors (an optimiser's settings) as data."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        plain = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)
