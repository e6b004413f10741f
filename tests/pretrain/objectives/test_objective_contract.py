"""What somebody's own objective gets wrong is one sentence with its class's name: by the doctor, and by the run before
its first step where it can be."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from data.fault import Fault
from data.tiles.crops import FurtherViews
from launch.entry import run_command_line
from models.operations import Operations
from pretrain.objectives.contract import (
    checked_loss,
    declared_views,
    evaluation_of,
    judged_of,
    look_of,
    operations_of,
    prepared,
    require_trainable,
)
from pretrain.objectives.interface import Moment, Objective, SlideObjective
from pretrain.plan.rehearsal import RehearsedBatch, rehearse
from pretrain.settings import plugins
from pretrain.settings.composition import load
from pretrain.training.sharding import units_of
from pretrain.training.tile_settings import checked_views
from tests.pretrain.objectives.test_own_objective import SIZES
from tests.pretrain.objectives.tile_objectives import batch, encoder
from tests.pretrain.training.test_tile_training import TINY

WITHOUT_OBJECTIVE = [word for word in TINY if not word.startswith(("optim.", "objective."))]


class Own(Objective):
    """As a user writes one; those below get something wrong."""

    def __init__(self, make_encoder: Callable[[], Any], *, width: int = 8) -> None:
        super().__init__()
        self.encoder = make_encoder()
        self.projector = nn.Sequential(nn.Linear(self.encoder.width, width), nn.Linear(width, width))

    def trained(self) -> dict[str, nn.Module]:
        return {"encoder": self.encoder, "projector": self.projector}

    def features(self, batch: Any) -> Tensor:
        (tokens,) = self.encoder([batch.crops[0][0]])
        return tokens.patches.mean(1)

    def loss(self, batch: Any, moment: Moment) -> Any:
        return self.projector(self.features(batch)).square().mean(), {}


class Scalar(Own):
    def __init__(self, make_encoder: Callable[[], Any], *, width: int) -> None:
        super().__init__(make_encoder, width=width)
        self.projector.temperature = nn.Parameter(torch.tensor(0.07))


class Lazy(Own):
    def __init__(self, make_encoder: Callable[[], Any], *, width: int) -> None:
        super().__init__(make_encoder, width=width)
        self.projector = nn.Sequential(nn.LazyLinear(width))


class Empty(Own):
    def trained(self) -> dict[str, nn.Module]:
        return {}


class Nameless(Own):
    def trained(self) -> Any:
        return [self.encoder]


class Otherwise(Own):
    def trained(self) -> dict[str, nn.Module]:
        return {"backbone": self.encoder}


class Elsewhere(Own):
    def __init__(self, make_encoder: Callable[[], Any], *, width: int) -> None:
        super().__init__(make_encoder, width=width)
        self.others = [nn.Linear(2, 2)]

    def trained(self) -> dict[str, nn.Module]:
        return {**super().trained(), "other": self.others[0]}


class Twice(Own):
    def trained(self) -> dict[str, nn.Module]:
        return {**super().trained(), "again": self.projector[0]}


class Loose(Own):
    def trained(self) -> dict[str, nn.Module]:
        return {"encoder": self.encoder}


class Container(Own):
    def __init__(self, make_encoder: Callable[[], Any], *, width: int) -> None:
        super().__init__(make_encoder, width=width)
        self.projector = nn.ModuleList([nn.Linear(width, width)])  # type: ignore[assignment]


class Inside(Own):
    def loss(self, batch: Any, moment: Moment) -> Any:
        return self.projector[1](self.features(batch)).square().mean(), {}


class Unprepared(Own):
    def prepare(self, parts: Any, moment: Moment) -> Any:
        return None


class Counts(Own):
    def prototype_counts(self) -> Any:
        return [64]


class FloatLoss(Own):
    def loss(self, batch: Any, moment: Moment) -> Any:
        return 1.0, {}


class Breaks(Own):
    def __init__(self, make_encoder: Callable[[], Any], *, width: int) -> None:
        raise RuntimeError("boom")


class Unlike(nn.Module):
    pass


class Half(Objective):
    def trained(self) -> dict[str, nn.Module]:
        return {}


class Positional(Own):
    def __init__(self, make_encoder: Callable[[], Any], width: int = 8) -> None:
        super().__init__(make_encoder, width=width)


class Untyped(Own):
    def __init__(self, make_encoder, *, width=8) -> None:  # type: ignore[no-untyped-def]
        super().__init__(make_encoder, width=width)


class Typed(Own):
    def __init__(self, make_encoder: Callable[[], Any], *, width: set[int]) -> None:
        raise NotImplementedError


def made(kind: type[Objective]) -> Callable[[], Objective]:
    target = f"{kind.__module__}.{kind.__name__}"
    build_encoder = lambda: plugins.build_empty({"_target_": "models.vit.VisionTransformer", **SIZES})  # noqa: E731
    return lambda: plugins.build({"_target_": target, "width": 16}, build_encoder)


def stepped(kind: type[Objective]) -> Any:
    """A step of it in the real sharding, without numbers."""
    shapes = batch(2)

    def fake() -> Any:
        crops = [(torch.empty(images.shape), views) for images, views in shapes.crops]
        return type(shapes)(crops, torch.empty(4, 4, 4, dtype=torch.bool))

    return rehearse(made(kind), RehearsedBatch(fake, {4 * 16: 7}, 2), processes=1)


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (Scalar, "Scalar has a parameter without a dimension (projector.temperature), which can't be shared out over processes: make it a vector of one number"),
        (Lazy, "Lazy has a parameter whose size isn't known before it has seen data (projector.0.weight): give layers their sizes, nn.Linear("),
        (Empty, "Empty.trained() names no network, and none is called 'encoder', which is what the run trains and exports"),
        (Nameless, "Nameless.trained() must give its networks by name, {'encoder': self.encoder, …}, and gives a list."),
        (Otherwise, "Otherwise.trained() names backbone, and none is called 'encoder'"),
        (Elsewhere, "Elsewhere.other.weight is no part of it: keep its network as an attribute, self.other = …."),
        (Twice, "Twice names again.weight in two networks, projector too: each parameter belongs to one."),
        (Loose, "Loose has parameters outside of its networks (projector.0.weight, "),
        (Container, "Container: a ModuleList can't be shared out over processes: "),
        (Inside, "Inside.loss uses a network's parameters while they are shared out over processes (above is where): call the networks that trained() names as a whole"),
        (Unprepared, "Unprepared.prepare must give a list of what loss gets, one for each micro-batch"),
        (Counts, "Counts.prototype_counts must give numbers by kind of target, and gives a list."),
        (Breaks, "Breaks can't be built: RuntimeError: boom; above is where."),
    ],
)  # fmt: skip
def test_networks_that_cannot_be_trained_are_named_before_a_step(kind: type[Objective], sentence: str) -> None:
    with pytest.raises(Fault) as refused:
        stepped(kind)
    assert sentence in str(refused.value)
    own_frames = [line for line in refused.value.trace.splitlines() if "test_objective_contract.py" in line]
    assert bool(own_frames) == (kind in (Inside, Breaks))  # the user's own code keeps its traceback


def test_what_is_right_is_left_alone() -> None:
    assert stepped(Own).flops
    require_trainable(made(Own)())


class Stack(nn.Module):
    """A network whose layers are called as a method of ours is."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.units = nn.ModuleList([nn.Linear(width, width), nn.Linear(width, width)])

    def forward(self, x: Tensor) -> Tensor:
        return nn.Sequential(*self.units)(x)


class Wrapped(nn.Module):
    """An encoder in a network that also says what its units are."""

    def __init__(self, inner: nn.Module, width: int) -> None:
        super().__init__()
        self.inner, self.width, self.neck = inner, width, nn.Linear(width, width)

    def units(self) -> list[nn.Module]:
        return [self.neck, *self.inner.blocks]  # type: ignore[misc, list-item]

    def forward(self, crops: Any) -> Tensor:
        return self.neck(self.inner(crops)[0].patches.mean(1))  # type: ignore[no-any-return]


class Stacked(Own):
    def __init__(self, make_encoder: Callable[[], Any], *, width: int) -> None:
        super().__init__(make_encoder, width=width)
        self.projector = Stack(self.encoder.width)  # type: ignore[assignment]
        self.encoder = Wrapped(self.encoder, self.encoder.width)

    def features(self, batch: Any) -> Tensor:
        return self.encoder([batch.crops[0][0]])  # type: ignore[no-any-return]


def test_a_network_may_call_a_module_units_and_say_the_units_of_one_inside_once_more() -> None:
    assert stepped(Stacked).flops
    objective: Any = made(Stacked)()
    assert units_of(objective.projector) == []
    assert units_of(objective.encoder) == [objective.encoder.neck, *objective.encoder.inner.blocks]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (lambda x: x.mean(), "must give a loss and figures to log, 'return loss, {}', and gives a tensor of shape ()."),
        (lambda x: None, "and gives None."),
        (lambda x: (x.mean(), {}, 3), "and gives (a tensor of shape (), a dict, a int)."),
        (lambda x: (1.0, {}), "must give a loss that is one number, a tensor's mean() say, and gives a float."),
        (lambda x: (x, {}), "must give a loss that is one number, a tensor's mean() say, and gives a tensor of shape (4, 8)."),
        (lambda x: (x.mean().detach(), {}), "depends on nothing that is trained: is there a detach() or no_grad() on its way?"),
        (lambda x: (x.mean(), {"a": x}), "must give figures that are one number each, and gives a as a tensor of shape (4, 8)."),
        (lambda x: (x.mean(), {"a": "1"}), "must give figures that are one number each, and gives a as a str."),
    ],
)  # fmt: skip
def test_a_loss_that_is_not_one_number_says_what_it_is(given: Callable[[Tensor], Any], sentence: str) -> None:
    objective = Own(encoder(depth=1))
    objective.loss = lambda *_: given(torch.ones(4, 8, requires_grad=True))  # type: ignore[method-assign]
    with pytest.raises(Fault) as refused:
        checked_loss(objective, None, Moment(0, 1, 0))
    assert str(refused.value).startswith("Own.loss ") and sentence in str(refused.value)


def test_a_figure_may_be_a_plain_number_or_a_tensor_of_one() -> None:
    objective = Own(encoder(depth=1))
    one = torch.ones((), requires_grad=True)
    objective.loss = lambda *_: (one, {"a": 0.5, "b": 3, "c": torch.tensor([2.0])})  # type: ignore[method-assign]
    _, figures = checked_loss(objective, None, Moment(0, 1, 0))
    assert {name: (value.item(), value.dim()) for name, value in figures.items()} == {
        "a": (0.5, 0),
        "b": (3, 0),
        "c": (2, 0),
    }
    objective.look = lambda *_: {"a": torch.tensor(0.5), "b": 3}  # type: ignore[method-assign, assignment]
    assert look_of(objective, [], Moment(0, 1, 0)) == {"a": 0.5, "b": 3.0}
    objective.look = lambda *_: {"a": torch.ones(2)}  # type: ignore[method-assign, assignment]
    with pytest.raises(Fault, match=r"^Own\.look must give figures that are one number each, and gives a as a tensor"):
        look_of(objective, [], Moment(0, 1, 0))


class Judged(SlideObjective):
    """A slide objective, but for its networks."""

    def __init__(self, given: Any = None) -> None:
        super().__init__()
        self.given = given

    def trained(self) -> dict[str, nn.Module]:
        return {}

    def loss(self, batch: Any, moment: Moment) -> Any:
        raise NotImplementedError

    def evaluate(self, rows: Any) -> Any:
        return self.given


class Scored(Judged):
    score = "nothere"


MOMENT = Moment(0, 1, 0)
ROWS = {"e": torch.ones(1)}


ASKED: dict[str, Callable[[Any], object]] = {
    "prepare": lambda own: prepared(own, [1, 2], MOMENT),
    "look": lambda own: look_of(own, [], MOMENT),
    "judged": lambda own: judged_of(own, SimpleNamespace(positions=[3, 4])),
    "evaluate": lambda own: evaluation_of(own, {"e": torch.ones(1)}),
    "operations": lambda own: operations_of(own, []),
    "prototype_counts": require_trainable,
}


@pytest.mark.parametrize(
    ("method", "given", "sentence"),
    [
        ("prepare", None, "must give a list of what loss gets, one for each micro-batch, and gives None."),
        ("prepare", [1], "one for each micro-batch, 2 here, and gives 1."),
        ("look", None, "must give figures by name, {'accuracy': 0.5, …}, and gives None."),
        ("look", {"a": torch.ones(2)}, "that are one number each, and gives a as a tensor of shape (2,)."),
        ("look", {"loss": 1.0}, "gives loss, which the record names figures of its own: call them something else"),
        ("judged", None, "must give rows by name, {'error': a tensor of a row a sequence, …}, and gives None."),
        ("judged", {"e": torch.ones(3)}, "a row a sequence, …}, 2 here, and gives e as a tensor of shape (3,)."),
        ("judged", {"e": torch.ones(2) * 1j}, "2 here, and gives e as a tensor of shape (2,)."),
        ("judged", {"e": 0.5}, "2 here, and gives e as a float."),
        ("evaluate", None, "must give figures by name, {'accuracy': 0.5, …}, and gives None."),
        ("evaluate", torch.ones(()), "and gives a tensor of shape ()."),
        ("evaluate", {"acc": torch.ones(2)}, "and gives acc as a tensor of shape (2,)."),
        ("evaluate", {"loss": 1.0, "validation_loss": 1.0}, "is recorded as validation_loss, and that too"),
        ("evaluate", {"step": 3, "acc": 1.0}, "gives step, which the record names figures of its own"),
        ("operations", 1e9, "must give Operations(forward, backward, …), sums of what its networks' operations()"),
        ("prototype_counts", [64], "must give numbers by kind of target, and gives a list."),
        ("prototype_counts", {"dino": 0.5}, "must give whole numbers from 1 on, and gives dino as 0.5."),
    ],
)
def test_a_method_that_gives_something_else_says_what(method: str, given: Any, sentence: str) -> None:
    objective = Judged() if method in ("judged", "evaluate") else Own(encoder(depth=1))
    setattr(objective, method, lambda *_: given)
    with pytest.raises(Fault) as refused:
        ASKED[method](objective)
    assert str(refused.value).startswith(f"{type(objective).__name__}.{method} ") and sentence in str(refused.value)


def test_what_a_method_gives_in_its_form_is_taken() -> None:
    objective = Own(encoder(depth=1))
    assert prepared(objective, [1, 2], MOMENT) == [1, 2]
    objective.operations = lambda _: Operations(1.0)  # type: ignore[method-assign]
    assert operations_of(objective, []) == Operations(1.0)
    accuracy = torch.tensor([0.25, 0.5])
    assert evaluation_of(Judged({"acc": accuracy.mean(), "r2": 0.1, "n": 3, "loss": accuracy[:1]}), ROWS) == {
        "acc": 0.375,
        "r2": 0.1,
        "n": 3.0,
        "validation_loss": 0.25,
    }


def test_a_score_that_is_no_figure_of_the_evaluation_is_refused_with_those_there_are() -> None:
    with pytest.raises(Fault, match=r"^Scored\.score is 'nothere', which .* doesn't give: .*\(acc, f1\)"):
        evaluation_of(Scored({"acc": 0.5, "f1": 0.5}), ROWS)
    assert evaluation_of(Scored({"nothere": 0.5}), ROWS) == {"nothere": 0.5}


def test_figures_without_rows_are_refused_with_what_gives_rows() -> None:
    with pytest.raises(Fault, match=r"^Judged\.evaluate makes figures of the rows that Judged\.judged gives"):
        evaluation_of(Judged({"acc": 0.5}), {})


RECORDED = [
    *("step", "loss", "operations", "lr", "weight_decay", "skipped", "grad_norm", "grad_norm/encoder", "data_wait"),
    *("tiles_per_second", "slides_per_second", "peak_memory_gib", "flop_utilisation", "tiles", "slides", "bad_tiles"),
    "pale_tiles",
    *("look_seconds", "failed_saves", "alarm", "epoch", "callbacks/loss"),
    *("rankme", "feature_cosine", "feature_std", "slide_knn", "slide_chance", "probe_knn", "probe_rankme"),
]


@pytest.mark.parametrize("name", RECORDED)
def test_a_figure_never_takes_the_name_of_one_of_the_records_own(name: str) -> None:
    objective, one = Own(encoder(depth=1)), torch.ones((), requires_grad=True)
    objective.loss = lambda *_: (one, {name: 42.0, "fine": 1.0})  # type: ignore[method-assign]
    with pytest.raises(Fault, match=rf"^Own\.loss gives {name}, which the record names figures of its own"):
        checked_loss(objective, None, MOMENT)


class Viewed(Own):
    given: Any = ()

    @classmethod
    def further_views(cls, settings: Any) -> Any:
        return cls.given


wrong: Any = FurtherViews  # as one who checks no types makes it


class Keyed(Viewed):
    @classmethod
    def further_views(cls, settings: Any) -> Any:
        return settings["hight"]


class Unclassed(Own):
    def further_views(self, settings: Any) -> Any:  # type: ignore[override]
        return ()


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (None, "must give a list of FurtherViews(count=…, size=…, scale=(…, …)), and gives None."),
        (FurtherViews(1, 8, (0.1, 0.5)), "and gives a FurtherViews."),
        ([(1, 8, (0.1, 0.5))], "and gives (a int, a int, (a float, a float))."),
        ([wrong(1, 8, 0.5)], "must give whole numbers and a scale of two numbers, and gives FurtherViews(count=1, "),
        ([wrong(1.5, 8, (0.1, 0.5))], "must give whole numbers"),
        ([wrong(1, 8, ("a", "b"))], "must give whole numbers"),
        ([FurtherViews(0, 8, (0.1, 0.5))], "count=0 is not allowed: it must be at least 1."),
        ([FurtherViews(1, 0, (0.1, 0.5))], "size=0 is not allowed: it must be at least 1"),
        ([FurtherViews(1, 8, (0.5, 0.1))], "scale=[0.5,0.1] is not allowed: it must be two numbers, the lower one"),
        ([FurtherViews(1, 8, (0, 0.1))], "scale holds 0, which is not allowed: each must be more than 0."),
    ],
)
def test_further_views_that_cannot_be_cut_are_refused(
    given: Any, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Viewed, "given", given)
    with pytest.raises(Fault) as refused:
        declared_views(Viewed, {})
    assert str(refused.value).startswith("Viewed.further_views") and sentence in str(refused.value)


def test_further_views_that_cannot_be_asked_for_say_why() -> None:
    with pytest.raises(Fault, match=r"^Unclassed\.further_views is asked before there is .*: write @classmethod"):
        declared_views(Unclassed, {})
    with pytest.raises(Fault, match=r"^Keyed\.further_views can't tell its views: KeyError: 'hight'; above") as refused:
        declared_views(Keyed, {})
    assert 'settings["hight"]' in refused.value.trace


def crops(relative_to: str) -> Any:
    return SimpleNamespace(relative_to=relative_to, global_count=2, global_size=16)


def test_further_views_are_held_to_the_run_s_patches_and_to_what_a_scale_is_of(monkeypatch: pytest.MonkeyPatch) -> None:
    target = {"_target_": f"{Viewed.__module__}.Viewed"}
    monkeypatch.setattr(plugins.locate_class(target["_target_"], Viewed), "given", [FurtherViews(1, 8, (0.5, 2))])
    assert checked_views(target, 4, crops("crop")) == (FurtherViews(1, 8, (0.5, 2)),)
    with pytest.raises(Fault, match=r"^Viewed asks for views of scale=\(0.5, 2\) with data.crops.relative_to=tile: "):
        checked_views(target, 4, crops("tile"))
    with pytest.raises(Fault, match=r"^Viewed asks for views of 8 px, which isn't a multiple of model\.patch_size=3"):
        checked_views(target, 3, crops("crop"))


@pytest.fixture
def own(tmp_path: Path) -> Callable[[str], list[str]]:
    """``own(class, YAML)`` → the words that choose it."""

    def choose(kind: type, settings: str = "width: 8\n") -> list[str]:
        (tmp_path / "yaml" / "objective").mkdir(parents=True, exist_ok=True)
        file = tmp_path / "yaml" / "objective" / "own.yaml"
        file.write_text(f"_target_: {kind.__module__}.{kind.__name__}\n{settings}")
        return ["objective=own", "--config-dir", str(tmp_path / "yaml")]

    return choose


@pytest.mark.parametrize(
    ("kind", "settings", "sentence"),
    [
        (Unlike, "", "test_objective_contract.Unlike is no Objective: derive it from pretrain.objectives.interface.Objective."),
        (Half, "", "test_objective_contract.Half can't be built, since it lacks loss()."),
        (Positional, "width: 8\n", "there is no setting 'objective.width': the settings of tests.pretrain.objectives.test_objective_contract.Positional are the arguments behind a * in its constructor, and width isn't one"),
        (Untyped, "width: 8\n", "Untyped doesn't say what type its width is of: width: int, say."),
        (Typed, "width: 8\n", "width can't be a setting, since its type is set[int]: write bool, int, float, str"),
        (Own, "", "objective.width must be given: pretrain tile objective.width=… ('pretrain tile --help' explains). The defaults of Own's constructor don't count"),
        (Own, "width: 8\nhight: 3\n", "there is no setting 'objective.hight' in 'pretrain tile'; did you mean 'objective.width'?"),
    ],
)  # fmt: skip
def test_a_class_that_is_no_objective_and_settings_that_it_has_not_are_found_when_composing(
    kind: type, settings: str, sentence: str, own: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_command_line(["tile", "run=a", "data.shards=b", *own(kind, settings)])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and sentence in said


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["tile", "objective=slide_mae"],
            "objective=slide_mae is of 'pretrain slide': here objective= is one of dino, dinov2, dinov3, distil, distil_heads, jepa, lejepa, mae.",
        ),
        (
            ["doctor", "objective=slide_mae"],
            "objective=slide_mae is of 'pretrain slide': here objective= is one of dino",
        ),
        (
            ["slide", "objective=dino"],
            "objective=dino is of 'pretrain tile': here objective= is one of slide_context, s",
        ),
        (
            ["plan", "recipe=small_slide", "objective=mae"],
            "objective=mae is of 'pretrain tile': here objective= is one",
        ),
        (
            ["slide", "recipe=small_dino"],
            "recipe=small_dino asks for objective=dino, which is of 'pretrain tile': here",
        ),
        (
            ["slide", "objective._target_=pretrain.objectives.mae.MAE"],
            "mae.MAE is an objective of 'pretrain tile': choose one that 'pretrain slide --help'",
        ),
    ],
)
def test_an_objective_of_the_other_stage_is_refused_when_composing(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_command_line(words)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and sentence in said and "Traceback" not in said


def test_a_plan_wants_the_settings_of_an_objective_that_its_run_wants(
    own: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run_command_line(["plan", "recipe=small", "hardware=cpu", *own(Own, "")])
    assert "objective.width must be given: pretrain tile objective.width=…" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [(Inside, "Inside.loss uses a network's parameters"), (FloatLoss, "FloatLoss.loss must give a loss that is one number")],
)  # fmt: skip
def test_the_doctor_and_the_run_say_it_in_the_same_words(
    kind: type,
    sentence: str,
    own: Callable[..., list[str]],
    tile_shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    unmeasured: None,
) -> None:
    words = [f"run={tmp_path / 'run'}", f"data.shards={tile_shards}", *WITHOUT_OBJECTIVE, *own(kind)]
    for command in ("doctor", "tile"):
        with pytest.raises(SystemExit):
            run_command_line([command, *words, "optim.steps=1", "optim.warmup_steps=0"])
        said = capsys.readouterr()
        assert sentence in (said.out if command == "doctor" else said.err)
        assert said.err.count("Traceback") == (1 if kind is Inside else 0)


@pytest.mark.parametrize(
    ("words", "setting", "found"),
    [
        (["data.shards=2024_01"], "shards", ["2024_01"]),
        (["data.shards=[2024_01,007,'1e3',a b]"], "shards", ["2024_01", "007", "1e3", "a b"]),
        (["data=online", "data.slides=a", "data.grids=1_0"], "grids", "1_0"),
        (["data=online", "data.slides=a", "data.grids=g", "data.slides_mpp=0.250"], "slides_mpp", "0.250"),
        (["data=online", "data.slides=a", "data.grids=g", "data.mpp=[1_0,2]"], "mpp", [10.0, 2.0]),
    ],
)
def test_a_plugins_names_that_look_like_numbers_stay_as_they_were_typed(
    words: list[str], setting: str, found: object
) -> None:
    assert getattr(load("tile", ["run=a", *words]).object().data, setting) == found
    launch = load(
        "tile", ["run=a", "launch=slurm", "launch.partition=1_0", "launch.after=[4_7]", "launch.nodes=1_0"]
    ).launch
    assert (launch["partition"], launch["after"], launch["nodes"]) == ("1_0", ["4_7"], 10)
