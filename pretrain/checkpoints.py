"""Checkpoints: sharded, whole or not there at all, and free of code.

    <run>/checkpoints/
        step-00001000/          published: complete, by a rename
            __0_0.distcp …      each rank's shards of networks and optimiser (torch.distributed.checkpoint)
            .metadata           names, shapes, who holds what
            state.json          step, skipped steps, hash of the configuration, digest of the data
        best -> step-00000750   the one with the best score, where a run scores itself (pretrain.best)
        step-00001250.partial/  being written; a kill leaves it behind, and the next save sweeps it away

"Resume" means the newest published one. It loads at any number of processes, and one network can be read out of it
without building a model or starting a process group.
"""

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from data.fault import Fault

PARTIAL = ".partial"
BEST = "best"

# One process without a group is the ordinary case for reading an encoder out of a checkpoint.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")


def folder(run: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run / "checkpoints"


def published(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [path for path in folder(run).glob("step-*") if path.suffix != PARTIAL and (path / "state.json").exists()]
    return sorted(found, key=lambda path: path.name)


def is_best(checkpoint: Path) -> bool:
    """Whether ``checkpoints/best`` points at this one."""
    link = checkpoint.with_name(BEST)
    return link.is_symlink() and os.readlink(link) == checkpoint.name


def newest(run: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    found = published(run)
    return found[-1] if found else None


def save(
    run: Path, step: int, model: nn.Module, optimiser: torch.optim.Optimizer, state: dict[str, Any], keep: int
) -> Path:
    """Write and publish a checkpoint; every rank calls it. The newest ``keep`` published ones remain (0: all), and the best one.

    ``state`` is what else a resumed run needs, plain JSON values. Raises Fault where the disk refuses; the checkpoints
    published before stay whole.
    """
    final = folder(run) / f"step-{step:08d}"
    partial = final.with_name(final.name + PARTIAL)
    first = not dist.is_initialized() or dist.get_rank() == 0
    try:
        if first:
            for leftover in folder(run).glob(f"*{PARTIAL}"):
                shutil.rmtree(leftover)
            partial.mkdir(parents=True)
        _barrier()
        networks, optimiser_state = get_state_dict(model, optimiser)
        dcp.save({"model": networks, "optimiser": optimiser_state}, checkpoint_id=partial)
        if first:
            (partial / "state.json").write_text(json.dumps({"step": step, **state}, indent=1))
            _flush(partial)
            if final.exists():
                shutil.rmtree(final)
            partial.rename(final)
            for old in published(run)[:-keep] if keep else []:
                if not is_best(old):
                    shutil.rmtree(old)
        _barrier()
    except (OSError, CheckpointException) as error:
        # Inside dcp.save, an OSError of any rank becomes a CheckpointException on all of them.
        causes = [cause for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
        if not all(isinstance(cause, OSError) for cause in causes):
            raise
        raise Fault(
            f"the checkpoint {final} could not be written ({causes[0]}); free some room and run the same command again."
        ) from error
    return final


def load(checkpoint: Path, model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Any]:
    """Restore networks and optimiser in place, at any number of processes; returns the checkpoint's ``state``."""
    networks, optimiser_state = get_state_dict(model, optimiser)
    dcp.load({"model": networks, "optimiser": optimiser_state}, checkpoint_id=checkpoint)
    set_state_dict(model, optimiser, model_state_dict=networks, optim_state_dict=optimiser_state)
    return read_state(checkpoint)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The small facts of a checkpoint: its ``state.json``."""
    return json.loads((checkpoint / "state.json").read_text())


def read(checkpoint: Path, *prefixes: str) -> dict[str, Tensor]:
    """The tensors of one network, named without its prefix (``"teacher.encoder."``), on the CPU: of the first of ``prefixes`` that there is.

    Needs neither a model nor a process group. Raises Fault where the checkpoint holds nothing under any of them.
    """
    try:
        metadata = dcp.FileSystemReader(checkpoint).read_metadata()
    except (OSError, EOFError) as error:
        raise Fault(
            f"{checkpoint} is no checkpoint of ours ({error}); give a run's folder or one of its checkpoints/step-… folders."
        ) from error
    names = metadata.state_dict_metadata
    prefix = next(
        (prefix for prefix in prefixes if any(name.startswith(f"model.{prefix}") for name in names)), prefixes[0]
    )
    found = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in names.items()
        if name.startswith(f"model.{prefix}") and isinstance(entry, TensorStorageMetadata)
    }
    if not found:
        raise Fault(f"{checkpoint} holds no {prefix.rstrip('.')}: it comes from another kind of run.")
    dcp.load(found, checkpoint_id=checkpoint, no_dist=True)
    return {name.removeprefix(f"model.{prefix}"): tensor for name, tensor in found.items()}


def _barrier() -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def _flush(folder: Path) -> None:
    """Force a folder's files and names to disk, so that the rename publishes what is really there."""
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
