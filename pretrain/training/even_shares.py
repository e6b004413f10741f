"""What must divide so that a run's processes share its work evenly; decided here once, for the command line, for jobs,
plan, doctor and the run."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from data.embeddings.packing import Packing
from data.fault import Fault
from data.tiles.stream import group_size
from pretrain.training.sharding import processes_a_copy

HEADS = (("model", "heads"), ("objective", "decoder_heads"))
"""Settings of the slide stage whose heads are shared out where processes share a slide."""


def require_even(run: Any, processes: int) -> None:
    """Raise Fault where so many processes can't share ``run`` evenly, which has model, objective, data and trainer: a
    command's ``Config``, or its tree."""
    processes_a_copy(processes, run.trainer.shard_size)
    micro_batch_share(run, processes, run.trainer.accumulate, settings_by_name(run.data).get("processes_per_slide", 1))


def micro_batch_share(run: Any, processes: int, accumulate: int, together: int = 1) -> int:
    """Of a process's micro-batch: tiles, or lanes of slides where ``together`` processes share each slide. Raises Fault
    where the settings of ``run``, as of `require_even`, don't divide."""
    data = settings_by_name(run.data)
    if "processes_per_slide" not in data:
        return tiles_of(data, processes, accumulate, run.objective.get("group_size", 1))
    lanes = lanes_of(data, processes, accumulate, together)
    if run.objective.get("spread_weight"):
        require_whole_groups(data, lanes, run.objective.get("group_size", 1))
    for node, name in HEADS if together > 1 else ():
        if (heads := getattr(run, node).get(name, together)) % together:
            raise Fault(
                f"data.processes_per_slide={together} doesn't divide {node}.{name}={heads}: change one of them."
            )
    return lanes


def require_whole_groups(data: Mapping[str, Any], lanes: int, group: int) -> None:
    """Raise Fault where a micro-batch of so many lanes of slides doesn't hold whole groups that a spread compares."""
    if data["batch_tokens"] is not None:
        raise Fault(
            f"objective.spread_weight compares groups of objective.group_size={group} slides, and with"
            f" data.batch_tokens={data['batch_tokens']} a step holds any number: set data.batch_tokens=null."
        )
    slides = data["batch_size"] // data["lanes"] * lanes
    if slides % group:
        raise Fault(
            f"objective.group_size={group} doesn't divide the {slides} slides of a micro-batch, which"
            " objective.spread_weight compares in such groups: change it, or data.batch_size."
        )


def tiles_of(data: Mapping[str, Any], processes: int, accumulate: int, group: int) -> int:
    """Tiles of a micro-batch, in groups that losses compare. Raises Fault where lanes or batch don't divide, with what
    would."""
    batch_size, lanes = data["batch_size"], data["lanes"]
    if lanes % processes:
        raise Fault(f"data.lanes={lanes} can't be shared evenly by {processes} processes; make it a multiple.")
    group_size(batch_size, lanes, data["slides_per_lane"])
    if batch_size % group:
        raise Fault(
            f"data.batch_size={batch_size} is not a multiple of objective.group_size={group}: change one of them."
        )
    tiles, rest = divmod(batch_size, processes * accumulate)
    if rest or tiles % group:
        most = batch_size // group
        fitting = [n for n in range(1, most + 1) if most % n == 0]
        raise Fault(
            f"data.batch_size={batch_size} can't be shared by {processes} processes × trainer.accumulate={accumulate}"
            f" in multiples of objective.group_size={group}: their product must be one of"
            f" {', '.join(map(str, fitting))}."
        )
    return tiles


def lanes_of(data: Mapping[str, Any], processes: int, accumulate: int, together: int) -> int:
    """Lanes of slides of a micro-batch, where ``together`` processes share each slide. Raises Fault where they don't
    divide."""
    lanes = data["lanes"]
    groups, rest = divmod(processes, together)
    if rest or not groups:
        raise Fault(
            f"data.processes_per_slide={together} doesn't divide the run's {processes} processes (trainer.devices ×"
            " trainer.nodes): change one of them."
        )
    each, rest = divmod(lanes, groups * accumulate)
    if rest or not each:
        raise Fault(
            f"data.lanes={lanes} can't be shared evenly by {groups}"
            f" {f'groups of {together} processes' if together > 1 else 'processes'} × trainer.accumulate={accumulate};"
            " make it a multiple."
        )
    Packing(np.ones(1), batch_size=data["batch_size"], batch_tokens=data["batch_tokens"], lanes=lanes, seed=0)
    return each


def settings_by_name(data: Any) -> Mapping[str, Any]:
    """``data:`` by names: the doctor's, which may lack some, is a dictionary already."""
    return data if isinstance(data, Mapping) else vars(data)
