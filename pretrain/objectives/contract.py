"""What an objective gives, held to what the trainer can use: a user's own one that gives something else is told so by
its class's name."""

import inspect
import re
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from data.fault import Fault
from data.tiles.crops import FurtherViews
from models.allowed import PIXEL_COUNT, RANGE, within
from models.operations import Operations
from pretrain.objectives.interface import BACKBONE, Moment, Objective, SlideObjective
from pretrain.settings.plugins import own_trace
from pretrain.settings.ranges import require_allowed

FURTHER_VIEWS = {
    "count": Annotated[int, within(least=1)],
    "size": Annotated[int, PIXEL_COUNT],
    "scale": Annotated[list[float], RANGE, within(above=0)],
}
OF_THE_RECORD = re.compile(
    "step|loss|operations|lr|weight_decay|skipped|grad_norm(/.*)?|data_wait|peak_memory_gib|flop_utilisation"
    "|tiles|slides|(bad|pale)_tiles|(tiles|slides)_per_second|(look|evaluation)_seconds|failed_saves|alarm|since|says|epoch|callbacks/.*|labels_.*"
)
"""Names in ``metrics.jsonl`` of what the run itself finds out."""
OF_TILE_LOOKS = re.compile(r"rankme|feature_cosine|feature_std|slide_knn|slide_chance|probe_\w+")
"""Further ones, in the tile stage."""
FIGURES = "figures by name, {'accuracy': 0.5, …}"


def declared_views(kind: type[Objective], settings: Mapping[str, Any]) -> tuple[FurtherViews, ...]:
    """The further views that an objective's class asks for by its ``settings``. Raises Fault for what is none, or
    can't be cut."""
    who = f"{kind.__name__}.further_views"
    if not inspect.ismethod(kind.further_views):
        raise Fault(f"{who} is asked before there is an object: write @classmethod above its def.")
    try:
        given = kind.further_views(settings)
    except Exception as error:
        if isinstance(error, Fault):
            raise
        said = f"{type(error).__name__}: {error}"
        raise Fault(f"{who} can't tell its views: {said}; above is where.", trace=own_trace(error)) from error
    form = "a list of FurtherViews(count=…, size=…, scale=(…, …))"
    for views in _given(who, given, Sequence, form):
        scale = _given(who, views, FurtherViews, form).scale
        whole = isinstance(views.count, int) and isinstance(views.size, int)
        if not (whole and isinstance(scale, list | tuple) and all(isinstance(end, Real) for end in scale)):
            raise Fault(f"{who} must give whole numbers and a scale of two numbers, and gives {views}.")
        require_allowed(vars(views) | {"scale": list(scale)}, FURTHER_VIEWS, f"{who}: ")
    return tuple(given)


def require_trainable(objective: Objective) -> None:
    """Raise Fault for networks that can't be sharded, trained or filled with first values, before anything is done with
    them."""
    who = type(objective).__name__
    trained, frozen = objective.trained(), objective.frozen()
    for method, networks in (("trained", trained), ("frozen", frozen)):
        form = f"its networks by name, {{'{BACKBONE}': self.encoder, …}}"
        for network in _given(f"{who}.{method}()", networks, Mapping, form).values():
            _given(f"{who}.{method}()", network, nn.Module, form)
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
    counts = _given(f"{who}.prototype_counts", objective.prototype_counts(), Mapping, "numbers by kind of target")
    for kind, count in counts.items():
        if not isinstance(count, int) or count < 1:
            raise Fault(f"{who}.prototype_counts must give whole numbers from 1 on, and gives {kind} as {count!r}.")


def prepared(objective: Objective, parts: Sequence[Any], moment: Moment) -> Sequence[Any]:
    """What the objective's ``prepare`` makes of a step's micro-batches, as many. Raises Fault where it gives something
    else."""
    who, form = f"{type(objective).__name__}.prepare", "a list of what loss gets, one for each micro-batch"
    given: Sequence[Any] = _given(who, objective.prepare(parts, moment), Sequence, form)
    if len(given) != len(parts):
        raise Fault(f"{who} must give {form}, {len(parts)} here, and gives {len(given)}.")
    return given


def checked_loss(objective: Objective, part: Any, moment: Moment) -> tuple[Tensor, dict[str, Tensor]]:
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
    return loss, {
        name: _beside(loss, value) for name, value in _figures(f"{who}.loss", figures, objective.stage).items()
    }


def _beside(loss: Tensor, value: Tensor | float) -> Tensor:
    """A figure on the loss's device. A number is filled in there, since a copy would wait for what the device does."""
    if isinstance(value, Tensor) and value.device == loss.device:
        return value
    return torch.full((), float(value), dtype=loss.dtype, device=loss.device)


def look_of(objective: Objective, parts: Sequence[Any], moment: Moment) -> dict[str, float]:
    """The figures of the objective's look. Raises Fault for one that isn't one number, or whose name the record has for
    its own."""
    found = _figures(f"{type(objective).__name__}.look", objective.look(parts, moment), objective.stage)
    return {name: float(value) for name, value in found.items()}


def judged_of(objective: SlideObjective, batch: Any) -> dict[str, Tensor]:
    """Rows ``(B, …)`` of a batch's held-out sequences. Raises Fault where the objective gives something else."""
    who, form = f"{type(objective).__name__}.judged", "rows by name, {'error': a tensor of a row a sequence, …}"
    given = _given(who, objective.judged(batch), Mapping, form)
    for name, rows in given.items():
        if not isinstance(rows, Tensor) or not rows.dim() or len(rows) != len(batch.positions) or rows.is_complex():
            raise Fault(f"{who} must give {form}, {len(batch.positions)} here, and gives {name} as {_kind(rows)}.")
    return dict(given)


def evaluation_of(objective: SlideObjective, rows: Mapping[str, Tensor]) -> dict[str, float]:
    """The figures of held-out slides, ``loss`` among them as ``validation_loss``. Raises Fault as `look_of` does, and
    where the objective's ``score`` isn't there."""
    kind = type(objective).__name__
    if not rows and type(objective).evaluate is not SlideObjective.evaluate:
        raise Fault(
            f"{kind}.evaluate makes figures of the rows that {kind}.judged gives of each batch of held-out slides, and"
            " that gives none: write it, 'def judged(self, batch)' → {'error': a tensor of a row a sequence, …}."
        )
    given = _given(f"{kind}.evaluate", objective.evaluate(rows), Mapping, FIGURES)
    if {"loss", "validation_loss"} <= set(given):
        raise Fault(
            f"{kind}.evaluate gives loss, which is recorded as validation_loss, and that too: give one of them."
        )
    own = {"validation_loss" if name == "loss" else name: value for name, value in given.items()}
    found = {name: float(value) for name, value in _figures(f"{kind}.evaluate", own, objective.stage).items()}
    if objective.score and objective.score not in found:
        raise Fault(
            f"{kind}.score is {objective.score!r}, which {kind}.evaluate doesn't give: name one of its figures"
            f" ({', '.join(found) or 'there is none'}), or none: score = ''."
        )
    return found


def operations_of(objective: Objective, parts: Sequence[Any]) -> Operations:
    """What the objective says of its operations. Raises Fault where it gives something else."""
    form = "Operations(forward, backward, …), sums of what its networks' operations() give"
    given: Operations = _given(f"{type(objective).__name__}.operations", objective.operations(parts), Operations, form)
    return given


def _given(who: str, given: Any, kind: type, form: str) -> Any:
    """What a user's method gave, which is a ``kind``."""
    if not isinstance(given, kind):
        raise Fault(f"{who} must give {form}, and gives {_kind(given)}.")
    return given


def _figures(who: str, given: Any, stage: str) -> dict[str, Tensor | float]:
    """Figures to record by name, each a number or a tensor without dimensions. Raises Fault for names that the record
    has for its own."""
    figures = _given(who, given, Mapping, FIGURES)
    owned = [OF_THE_RECORD, OF_TILE_LOOKS] if stage == "tile" else [OF_THE_RECORD]
    if taken := [str(name) for name in figures if any(names.fullmatch(str(name)) for names in owned)]:
        raise Fault(
            f"{who} gives {', '.join(taken)}, which the record names figures of its own: call them something else,"
            f" own_{taken[0].rpartition('/')[2]} say."
        )
    return {str(name): _figure(who, name, value) for name, value in figures.items()}


def _figure(who: str, name: object, value: object) -> Tensor | float:
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.detach().reshape(())
    if not isinstance(value, Real):
        raise Fault(f"{who} must give figures that are one number each, and gives {name} as {_kind(value)}.")
    return float(value)


def _kind(value: object) -> str:
    """What something is, in a word or two."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, tuple):
        return f"({', '.join(map(_kind, value))})"
    return "None" if value is None else f"a {type(value).__name__}"
