"""What an objective gives, held to what the trainer can use: a user's own one that gives something else is told so by
its class's name."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from data.fault import Fault
from pretrain.objectives.interface import BACKBONE, Moment, Objective
from pretrain.settings.plugins import own_trace


def require_trainable(objective: Objective) -> None:
    """Raise Fault for networks that can't be sharded, trained or filled with first values, before anything is done with
    them."""
    who = type(objective).__name__
    trained, frozen = objective.trained(), objective.frozen()
    for method, networks in (("trained", trained), ("frozen", frozen)):
        if not isinstance(networks, Mapping) or not all(
            isinstance(network, nn.Module) for network in networks.values()
        ):
            raise Fault(
                f"{who}.{method}() must give its networks by name, {{'{BACKBONE}': self.encoder, …}}, and gives"
                f" {_kind(networks)}."
            )
    if BACKBONE not in trained:
        raise Fault(
            f"{who}.trained() names {', '.join(trained) or 'no network'}, and none is called '{BACKBONE}', which is"
            f" what the run trains and exports: give {{'{BACKBONE}': self.encoder, …}}."
        )
    own, place = set(map(id, objective.parameters())), dict[int, str]()
    for name, network in (*trained.items(), *frozen.items()):
        for path, parameter in network.named_parameters():
            full = f"{name}.{path}"
            if is_lazy(parameter):
                raise Fault(
                    f"{who} has a parameter whose size isn't known before it has seen data ({full}): give layers their"
                    " sizes, nn.Linear(self.encoder.width, …) in place of nn.LazyLinear(…)."
                )
            if not parameter.dim():
                raise Fault(
                    f"{who} has a parameter without a dimension ({full}), which can't be shared out over processes:"
                    " make it a vector of one number, nn.Parameter(torch.full((1,), …))."
                )
            if id(parameter) not in own:
                raise Fault(f"{who}.{full} is no part of it: keep its network as an attribute, self.{name} = ….")
            if place.setdefault(id(parameter), name) != name:
                raise Fault(
                    f"{who} names {full} in two networks, {place[id(parameter)]} too: each parameter belongs to one."
                )
    if loose := [name for name, parameter in objective.named_parameters() if id(parameter) not in place]:
        raise Fault(
            f"{who} has parameters outside of its networks ({', '.join(loose[:5])}), which nothing would train: put"
            " them into a module that trained() names, or make them buffers."
        )


def loss_of(objective: Objective, part: Any, moment: Moment) -> tuple[Tensor, dict[str, Tensor]]:
    """The objective's loss of a micro-batch and its figures, scalars on the loss's device. Raises Fault where it gives
    something else."""
    who = type(objective).__name__
    try:
        given = objective.loss(part, moment)
    except RuntimeError as error:
        if "DTensor" not in str(error):
            raise
        raise Fault(
            f"{who}.loss uses a network's parameters while they are shared out over processes (above is where): call"
            " the networks that trained() names as a whole, self.projector(x), and not a layer or a parameter inside,"
            " self.projector[0](x); what is called by itself is named there by itself.",
            trace=own_trace(error),
        ) from error
    if not (isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], Mapping)):
        raise Fault(f"{who}.loss must give a loss and figures to log, 'return loss, {{}}', and gives {_kind(given)}.")
    loss, figures = given
    if not isinstance(loss, Tensor) or loss.dim():
        raise Fault(f"{who}.loss must give a loss that is one number, a tensor's mean() say, and gives {_kind(loss)}.")
    if not loss.requires_grad:
        raise Fault(
            f"{who}.loss gives a loss that depends on nothing that is trained: is there a detach() or no_grad() on its"
            " way?"
        )
    return loss, {name: _figure(f"{who}.loss", name, value, loss.device) for name, value in figures.items()}


def look_of(objective: Objective, parts: Sequence[Any], moment: Moment) -> dict[str, float]:
    """The figures of the objective's look. Raises Fault for one that isn't one number."""
    who, cpu = f"{type(objective).__name__}.look", torch.device("cpu")
    return {name: float(_figure(who, name, value, cpu)) for name, value in objective.look(parts, moment).items()}


def _figure(who: str, name: object, value: object, device: torch.device) -> Tensor:
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.detach().reshape(()).to(device)
    if not isinstance(value, int | float):
        raise Fault(f"{who} must give figures that are one number each, and gives {name} as {_kind(value)}.")
    return torch.tensor(float(value), device=device)


def _kind(value: object) -> str:
    """What something is, in a word or two."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, tuple):
        return f"({', '.join(map(_kind, value))})"
    return "None" if value is None else f"a {type(value).__name__}"
