"""Checkpoints: sharded, whole or not there at all, and free of code.

    <run>/checkpoints/
        step-00001000/          published: complete, by a rename
            __0_0.distcp …      each rank's shards of networks and optimiser (torch.distributed.checkpoint)
            .metadata           names, shapes, who holds what
            state.json          step, samples taken, skipped steps, settings and their hash, digest of the data, versions
        best -> step-00000750   the one with the best score, where a run scores itself (pretrain.run.best)
        step-00001250.partial/  being written, or being removed; a kill leaves it behind, and the next save sweeps it away

"Resume" means the newest published one. It loads at any number of processes, and one network can be read out of it
without building a model or starting a process group. `pretrain.run.saving` writes them beside training.
"""

import json
import math
import os
import pickle
import re
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
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from data.fault import Fault
from data.files import PARTIAL, flush, is_the_disks
from pretrain.run.across_ranks import local_shard
from pretrain.run.weights_only import WeightsOnlyPlanner, WeightsOnlyReader

NAME = re.compile(r"step-\d+")
BEST = "best"
AROUND = 2000  # bytes: an archive of one tensor, and its place in the list of all

# One process without a group is the ordinary case for reading an encoder out of a checkpoint.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")


def folder(run: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run / "checkpoints"


def complete(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first. What people call otherwise is theirs: a copy,
    ``step-00000004.bak``."""
    found = [
        path for path in folder(run).glob("step-*") if NAME.fullmatch(path.name) and (path / "state.json").exists()
    ]
    return sorted(found, key=lambda path: path.name)


def step_of(checkpoint: Path) -> int:
    """The steps that a run had taken when it wrote a checkpoint, by the name of its folder."""
    return int(checkpoint.name.removeprefix("step-"))


def is_best(checkpoint: Path) -> bool:
    """Whether ``checkpoints/best`` points at this one."""
    return name_of_best(checkpoint.with_name(BEST)) == checkpoint.name


def name_of_best(link: Path) -> str | None:
    """The name that a link, or a file where there are no symbolic links, says; None where there is neither."""
    if link.is_symlink():
        return os.readlink(link)
    return link.read_text().strip() if link.is_file() else None


def resolved(checkpoint: Path) -> Path:
    """The checkpoint itself where ``checkpoint`` is ``best`` as a file."""
    return checkpoint.with_name(name_of_best(checkpoint) or "") if checkpoint.name == BEST else checkpoint


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a published checkpoint as far as names and sizes tell, in words that name the file; None where
    it is whole."""
    state, metadata = checkpoint / "state.json", checkpoint / ".metadata"
    try:
        found = json.loads(state.read_text())
        if not isinstance(found, dict):
            return f"{state} holds no facts"
        if "step" not in found:
            return f"{state} lacks step"
    except (OSError, ValueError) as error:
        return f"{state} is {_what_ails(state, error)}"
    try:
        stored = WeightsOnlyReader(checkpoint).read_metadata().storage_data
    except Exception as error:  # a pickle that was cut ends in any of them
        return f"{metadata} is {_what_ails(metadata, error)}"
    ends: dict[str, int] = {}
    for place in (stored or {}).values():
        ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    for name, end in ends.items():
        path = checkpoint / name
        size = path.stat().st_size if path.exists() else None
        if size is None or size < end:
            return f"{path} is {'gone' if size is None else f'cut: {size} of {end} bytes'}"
    return None


def _what_ails(path: Path, error: Exception) -> str:
    if not path.exists():
        return "gone"
    return "empty" if path.stat().st_size == 0 else f"damaged ({error})"


def words_for_newest(run: Path) -> str:
    """Words for the newest checkpoint of a run, for what went wrong after it."""
    there = newest(run)
    return f"the newest finite one is {there}" if there else "there is no finite checkpoint before it"


def newest_whole(run: Path) -> Path | None:
    """The newest checkpoint of a run that isn't damaged, or None."""
    return next((path for path in reversed(complete(run)) if damage(path) is None), None)


def whole_before(checkpoint: Path) -> str:
    """Which checkpoint before a damaged one is whole, in words to put behind a sentence."""
    earlier = [path for path in complete(checkpoint.parent.parent) if path.name < checkpoint.name]
    found = next((path for path in reversed(earlier) if damage(path) is None), None)
    return f" (step {step_of(found)} is whole)" if found else " (none before it is whole)"


def set_damaged_aside(run: Path) -> list[Path]:
    """Take damaged checkpoints, newer than the newest whole one, out of the row: as ``damaged-step-…``. What they are
    called now."""
    whole = newest_whole(run)
    moved = []
    for path in complete(run):
        if whole is None or path.name > whole.name:
            aside = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            moved.append(path.rename(aside))
    return moved


def newest(run: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    found = complete(run)
    return found[-1] if found else None


# Writing -----------------------------------------------------------------------------------------------------------


class Writer(dcp.FileSystemWriter):
    """Writes one checkpoint into its partial folder; when all ranks have written, the first one publishes it.

    It sweeps, publishes and removes in what torch runs on the first rank between two exchanges of all of them, so an
    error of any rank is an error on every rank, and an end without error means published. The newest ``keep`` published
    ones remain (0: all), those of every ``milestones``-th step, and the best one.
    """

    def __init__(self, run: Path, step: int, state: dict[str, Any], keep: int, milestones: int | None = None) -> None:
        self.run, self.keep, self.milestones = run, keep, milestones
        self.final = folder(run) / f"step-{step:08d}"
        self.state = json.dumps({"step": step, **state}, indent=1)
        # What is staged lies on the CPU: nothing is copied ahead, or the writing thread would wait for the GPU's stream.
        super().__init__(self.final.with_name(self.final.name + PARTIAL), per_thread_copy_ahead=0)
        # Asked of a run that is on a GPU alone: to ask opens a context, on the first one.
        self.device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        if self.device is not None:
            torch.cuda.set_device(self.device)  # a thread begins with the first GPU, where it would open a context
        return super().write_data(plan, planner)

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
            flush(path)
        if self.final.exists():
            _remove(self.final)
        partial.rename(self.final)
        flush(self.final.parent)
        for old in complete(self.run)[: -self.keep] if self.keep else []:
            milestone = self.milestones and step_of(old) % self.milestones == 0
            if not (milestone or is_best(old)):
                _remove(old)


@torch.no_grad()
def is_finite(model: nn.Module, optimiser: torch.optim.Optimizer) -> bool:
    """Whether every number that this rank's part of a checkpoint would hold is finite: weights, statistics, moments."""
    moments = (value for state in optimiser.state.values() for value in state.values() if isinstance(value, Tensor))
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for part in map(local_shard, (*model.parameters(), *model.buffers(), *moments)):
        if part.is_floating_point() and part.numel():
            alike.setdefault((part.device, part.dtype), []).append(part)
    return all(bool(torch.stack(torch._foreach_norm(parts, math.inf)).isfinite().all()) for parts in alike.values())


def size(model: nn.Module, optimiser: torch.optim.Optimizer) -> int:
    """Bytes of a checkpoint, over all processes: its tensors, and what torch writes around each."""
    moments = (value for state in optimiser.state.values() for value in state.values() if isinstance(value, Tensor))
    tensors = (*model.state_dict().values(), *moments)
    return sum(tensor.numel() * tensor.element_size() + AROUND for tensor in tensors)


def contents(model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Any]:
    """What a checkpoint's tensors are taken from: the networks and optimiser themselves, no copies.

    It is what torch's ``get_state_dict`` gives, which looks every parameter's name up by walking through the modules,
    twice: for a ViT-g a tenth of a second in which training stands still.
    """
    if not optimiser.state:
        get_state_dict(model, optimiser)  # makes its moments, to be loaded
    _fill_absent_moments(optimiser)
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    state = {names[parameter]: dict(values) for parameter, values in optimiser.state.items()}
    groups = [group | {"params": [names[one] for one in group["params"]]} for group in optimiser.param_groups]
    return {"model": dict(model.state_dict()), "optimiser": {"state": state, "param_groups": groups}}


def _fill_absent_moments(optimiser: torch.optim.Optimizer) -> None:
    """Give parameters that no loss has reached yet (a mask token where nothing is masked) moments of zero, which a
    checkpoint is asked for when it is loaded; without a gradient the optimiser passes them over as before."""
    known: dict[str, Tensor] = next(iter(optimiser.state.values()), {})
    for parameter in (one for group in optimiser.param_groups for one in group["params"]):
        if known and parameter.requires_grad and parameter not in optimiser.state:
            optimiser.state[parameter] = {
                name: torch.zeros_like(value if value.ndim == 0 else parameter) for name, value in known.items()
            }


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

    ``state`` is what else a resumed run needs, plain JSON values; see `Writer` for what is kept. Raises Fault where the
    disk refuses; the checkpoints published before stay whole.
    """
    writer = Writer(run, step, state, keep, milestones)
    try:
        dcp.save(contents(model, optimiser), storage_writer=writer, process_group=group)
    except CheckpointException as error:
        raise Fault(f"{refusal(writer, error)}; free some room and run the same command again.") from error
    return writer.final


def refusal(writer: Writer, error: CheckpointException) -> str:
    """What a save said that failed because a rank's disk refused; its partial folder goes. Raises any other
    ``error``."""
    causes = [cause for cause, _ in error.failures.values()]
    if not all(is_the_disks(cause) for cause in causes):
        raise error
    if not dist.is_initialized() or dist.get_rank() == 0:
        shutil.rmtree(writer.path, ignore_errors=True)  # to free its room; what stays, the next save sweeps away
    said = causes[0].strerror if isinstance(causes[0], OSError) else None
    return f"the checkpoint {writer.final} could not be written ({said or causes[0]})"


def _remove(checkpoint: Path) -> None:
    """Delete a published checkpoint, unpublishing it first: a kill on the way leaves none that looks whole."""
    partial = checkpoint.with_name(f"{checkpoint.name}.old{PARTIAL}")
    checkpoint.rename(partial)
    shutil.rmtree(partial)


# Reading -----------------------------------------------------------------------------------------------------------


def restore(checkpoint: Path, model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Any]:
    """Restore networks and optimiser in place, at any number of processes; returns the checkpoint's ``state``.

    Raises Fault where it doesn't fit the networks.
    """
    wanted = contents(model, optimiser)
    try:
        dcp.load(wanted, storage_reader=WeightsOnlyReader(checkpoint), planner=WeightsOnlyPlanner())
    except CheckpointException as error:
        cause = next(cause for cause, _ in error.failures.values())
        raise Fault(
            f"{checkpoint} can't be loaded ({' '.join(str(cause).split()) or type(cause).__name__}); is it whole, and"
            " are model, objective and optim those that it was saved with?"
        ) from error
    set_state_dict(model, optimiser, model_state_dict=wanted["model"], optim_state_dict=wanted["optimiser"])
    return read_state(checkpoint)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The small facts of a checkpoint: its ``state.json``."""
    return json.loads((checkpoint / "state.json").read_text())


def read_network(checkpoint: Path, *prefixes: str) -> dict[str, Tensor]:
    """The tensors of one network, named without its prefix (``"teacher.encoder."``), on the CPU: of the first of
    ``prefixes`` that there is.

    Needs neither a model nor a process group. Raises Fault where the checkpoint holds nothing under any of them.
    """
    names = tensors_of(checkpoint)
    prefix = next((prefix for prefix in prefixes if any(name.startswith(prefix) for name in names)), prefixes[0])
    found = {
        f"model.{name}": torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in names.items()
        if name.startswith(prefix)
    }
    if not found:
        raise Fault(f"{checkpoint} holds no {prefix.rstrip('.')}: it comes from another kind of run.")
    dcp.load(found, storage_reader=WeightsOnlyReader(checkpoint), planner=WeightsOnlyPlanner(), no_dist=True)
    return {name.removeprefix(f"model.{prefix}"): tensor for name, tensor in found.items()}


def tensors_of(checkpoint: Path) -> dict[str, TensorStorageMetadata]:
    """What a checkpoint says of its networks' tensors, sizes among it, by name. Raises Fault where it is none."""
    try:
        metadata = WeightsOnlyReader(checkpoint).read_metadata()
    except (OSError, EOFError, pickle.UnpicklingError) as error:
        raise Fault(
            f"{checkpoint} is no checkpoint of ours ({error}); give a run's folder or one of its checkpoints/step-…"
            " folders."
        ) from error
    return {
        name.removeprefix("model."): entry
        for name, entry in metadata.state_dict_metadata.items()
        if name.startswith("model.") and isinstance(entry, TensorStorageMetadata)
    }
