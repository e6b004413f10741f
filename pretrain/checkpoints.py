"""Checkpoints: sharded, whole or not there at all, and free of code.

    <run>/checkpoints/
        step-00001000/          published: complete, by a rename
            __0_0.distcp …      each rank's shards of networks and optimiser (torch.distributed.checkpoint)
            .metadata           names, shapes, who holds what
            state.json          step, samples taken, skipped steps, settings and their hash, digest of the data, versions
        best -> step-00000750   the one with the best score, where a run scores itself (pretrain.best)
        step-00001250.partial/  being written, or being removed; a kill leaves it behind, and the next save sweeps it away

"Resume" means the newest published one. It loads at any number of processes, and one network can be read out of it
without building a model or starting a process group. `pretrain.saving` writes them beside training.
"""

import json
import os
import pickle
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.storage import WriteResult

from data.fault import Fault
from pretrain.teacher import local
from pretrain.weights_only import WeightsOnlyPlanner, WeightsOnlyReader

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


def step_of(checkpoint: Path) -> int:
    """The steps that a run had taken when it wrote a checkpoint, by the name of its folder."""
    return int(checkpoint.name.removeprefix("step-"))


def is_best(checkpoint: Path) -> bool:
    """Whether ``checkpoints/best`` points at this one."""
    link = checkpoint.with_name(BEST)
    return link.is_symlink() and os.readlink(link) == checkpoint.name


def newest(run: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    found = published(run)
    return found[-1] if found else None


# Writing -----------------------------------------------------------------------------------------------------------


class Writer(dcp.FileSystemWriter):
    """Writes one checkpoint into its partial folder; when all ranks have written, the first one publishes it.

    It sweeps, publishes and removes in what torch runs on the first rank between two exchanges of all of them, so an error
    of any rank is an error on every rank, and an end without error means published. The newest ``keep`` published ones remain
    (0: all), those of every ``milestones``-th step, and the best one.
    """

    def __init__(self, run: Path, step: int, state: dict[str, Any], keep: int, milestones: int | None = None) -> None:
        self.run, self.keep, self.milestones = run, keep, milestones
        self.final = folder(run) / f"step-{step:08d}"
        self.state = json.dumps({"step": step, **state}, indent=1)
        super().__init__(self.final.with_name(self.final.name + PARTIAL))

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan  # the folder is the first rank's to make

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        for leftover in folder(self.run).glob(f"*{PARTIAL}"):
            shutil.rmtree(leftover)
        Path(self.path).mkdir(parents=True)
        return super().prepare_global_plan(plans)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        partial = Path(self.path)
        (partial / "state.json").write_text(self.state)
        for path in (*partial.iterdir(), partial):  # so that the rename publishes what is really there
            _flush(path)
        if self.final.exists():
            _remove(self.final)
        partial.rename(self.final)
        _flush(self.final.parent)
        for old in published(self.run)[: -self.keep] if self.keep else []:
            milestone = self.milestones and step_of(old) % self.milestones == 0
            if not (milestone or is_best(old)):
                _remove(old)


def is_finite(model: nn.Module, optimiser: torch.optim.Optimizer) -> bool:
    """Whether every number that this rank's part of a checkpoint would hold is finite: weights, statistics, moments."""
    moments = (value for state in optimiser.state.values() for value in state.values() if isinstance(value, Tensor))
    parts = [local(tensor.detach()) for tensor in (*model.parameters(), *model.buffers(), *moments)]
    finite = [part.isfinite().all() for part in parts if part.is_floating_point() and part.numel()]
    return not finite or bool(torch.stack([flag.cpu() for flag in finite]).all())


def contents(model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Any]:
    """What a checkpoint's tensors are taken from: the networks and optimiser themselves, no copies."""
    networks, optimiser_state = get_state_dict(model, optimiser)
    return {"model": networks, "optimiser": optimiser_state}


def save(
    run: Path,
    step: int,
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    state: dict[str, Any],
    keep: int,
    milestones: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Write and publish a checkpoint, and wait for it; every rank calls it.

    ``state`` is what else a resumed run needs, plain JSON values; see `Writer` for what is kept. Raises Fault where the disk refuses; the checkpoints
    published before stay whole.
    """
    writer = Writer(run, step, state, keep, milestones)
    try:
        dcp.save(contents(model, optimiser), storage_writer=writer, process_group=group)
    except CheckpointException as error:
        raise Fault(f"{refusal(writer, error)}; free some room and run the same command again.") from error
    return writer.final


def refusal(writer: Writer, error: CheckpointException) -> str:
    """What a save said that failed because a rank's disk refused; its partial folder goes. Raises any other ``error``."""
    causes = [cause for cause, _ in error.failures.values()]
    if not all(isinstance(cause, OSError) for cause in causes):
        raise error
    if not dist.is_initialized() or dist.get_rank() == 0:
        shutil.rmtree(writer.path, ignore_errors=True)  # to free its room; what stays, the next save sweeps away
    return f"the checkpoint {writer.final} could not be written ({causes[0]})"


def _remove(checkpoint: Path) -> None:
    """Delete a published checkpoint, unpublishing it first: a kill on the way leaves none that looks whole."""
    partial = checkpoint.with_name(f"{checkpoint.name}.old{PARTIAL}")
    checkpoint.rename(partial)
    shutil.rmtree(partial)


def _flush(path: Path) -> None:
    """Force a file's bytes, or a folder's names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Reading -----------------------------------------------------------------------------------------------------------


def load(checkpoint: Path, model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Any]:
    """Restore networks and optimiser in place, at any number of processes; returns the checkpoint's ``state``.

    Raises Fault where it doesn't fit the networks.
    """
    wanted = contents(model, optimiser)
    try:
        dcp.load(wanted, storage_reader=WeightsOnlyReader(checkpoint), planner=WeightsOnlyPlanner())
    except CheckpointException as error:
        cause = next(cause for cause, _ in error.failures.values())
        raise Fault(
            f"{checkpoint} can't be loaded ({' '.join(str(cause).split())}); is it whole, and are model, objective and optim those that it was saved with?"
        ) from error
    set_state_dict(model, optimiser, model_state_dict=wanted["model"], optim_state_dict=wanted["optimiser"])
    return read_state(checkpoint)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The small facts of a checkpoint: its ``state.json``."""
    return json.loads((checkpoint / "state.json").read_text())


def read(checkpoint: Path, *prefixes: str) -> dict[str, Tensor]:
    """The tensors of one network, named without its prefix (``"teacher.encoder."``), on the CPU: of the first of ``prefixes`` that there is.

    Needs neither a model nor a process group. Raises Fault where the checkpoint holds nothing under any of them.
    """
    reader = WeightsOnlyReader(checkpoint)
    try:
        metadata = reader.read_metadata()
    except (OSError, EOFError, pickle.UnpicklingError) as error:
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
    dcp.load(found, storage_reader=reader, planner=WeightsOnlyPlanner(), no_dist=True)
    return {name.removeprefix(f"model.{prefix}"): tensor for name, tensor in found.items()}
