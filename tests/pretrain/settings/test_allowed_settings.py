"""Every setting of every command is declared with what it may be, and what it may not be is one sentence, before any
work."""

import dataclasses
import json
import re
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, ClassVar, get_args, get_origin

import pytest
import torch
from omegaconf import OmegaConf

from data.fault import Fault
from launch.entry import run_command_line
from models.allowed import Allowed
from pretrain import cli
from pretrain.settings import plugins, ranges
from pretrain.settings.annotation import ranges_of
from pretrain.settings.command_schema import config_class, file_stem
from pretrain.settings.composition import Composed, load
from pretrain.settings.config_files import CONFIGS
from pretrain.training.trainer_settings import require_devices

MORE = [  # compositions of the plug-ins that no command has by default
    ("tile", ["recipe=small_dino"]),
    ("tile", ["recipe=small_mae"]),
    ("tile", ["data=online", "data.slides=a", "data.grids=b"]),
    ("tile", ["launch=slurm"]),
    ("tile", ["launch=torchrun"]),
]
COMPOSITIONS = [(name, []) for name in cli.COMMANDS if (CONFIGS / f"{file_stem(name)}.yaml").exists()] + MORE
NAMES = [" ".join([command, *words]) for command, words in COMPOSITIONS]
WORDS = r"(at least|more than|at most|less than) ([-\d.e+]+)"


@cache
def composed(command: str, *words: str) -> Composed:
    return load(command, list(words))


def values_of(one: Composed) -> dict[str, Any]:
    return deepcopy(whole(one.command, *one.overrides))


@cache
def whole(*words: str) -> dict[str, Any]:
    one = composed(*words)
    return {"launch": dict(one.launch), **OmegaConf.to_container(one.tree)}  # type: ignore[dict-item]


def kinds_of(one: Composed) -> dict[str, Any]:
    return {"launch": plugins.Plugin, **ranges.hints(config_class(one.command))}


def around(allowed: Allowed, value: Any) -> Iterator[Any]:
    """Values on both sides of everything that is declared, in the form of the setting's own value."""
    many = isinstance(value, list)
    if allowed.whole:
        yield from ([], [1], [1, 2], [2, 1], [1, 1, 1], [1, 1, 1, 1])
        return
    bounds = re.findall(WORDS, allowed.says)
    if bounds or "finite" in allowed.says:
        whole = not isinstance(value[0] if many and value else value, float)
        near = [float(bound) + step for _, bound in bounds for step in (-1, -0.01, 0, 0.01, 1)]
        near += [-1e9, 1e9, *([] if whole else [float("nan"), float("inf"), float("-inf")])]
        numbers = sorted({int(x) for x in near if x == int(x)} if whole else near)
        yield from ([x] * max(len(value), 1) if many else x for x in numbers)
    else:
        for word in [*re.split(r", | or ", allowed.says), "another", "s3://some/where", ""]:
            yield [word] if many else word


def inner(values: Any, name: str) -> Any:
    for part in name.split("."):
        values = values[part]
    return values


def refusal(one: Composed, name: str, value: Any) -> str | None:
    """What composing says to a value."""
    values = values_of(one)
    before, _, key = name.rpartition(".")
    (inner(values, before) if before else values)[key] = value
    try:
        ranges.require_allowed(values, kinds_of(one))
        ranges.check_whole(values, config_class(one.command))
    except Fault as fault:
        return str(fault)
    return None


@pytest.mark.parametrize(("command", "words"), COMPOSITIONS, ids=NAMES)
def test_values_around_every_declared_bound_are_accepted_or_refused_in_one_sentence_with_name_value_and_range(
    command: str, words: list[str]
) -> None:
    one, seen = composed(command, *words), 0
    for name, allowed in ranges.declared(values_of(one), kinds_of(one)):
        if any(word.startswith("launch=") for word in words) and not name.startswith("launch."):
            continue  # the command's own were looked at without a launch
        for value in around(allowed, inner(values_of(one), name)):
            said = refusal(one, name, value)
            holds = (
                allowed.holds(value) if allowed.whole or not isinstance(value, list) else all(map(allowed.holds, value))
            )
            if holds:  # but perhaps not together with the others
                assert said is None or " allowed" not in said or allowed.says not in said, (name, value, said)
            else:
                assert said is not None and said.startswith(name) and "\n" not in said, (name, value, said)
                assert " is not allowed: " in said or ", which is not allowed: " in said
            seen += 1
    assert seen or command in ("recipes", "report", "shards index", "doctor machine")


@pytest.mark.parametrize(("command", "words"), [c for c in COMPOSITIONS if c[0] in ("tile", "slide")][:4])
def test_what_is_accepted_of_networks_and_objectives_can_be_built(command: str, words: list[str]) -> None:
    one = composed(command, *words)
    for name, allowed in ranges.declared(values_of(one), kinds_of(one)):
        part, _, key = name.partition(".")
        if part not in ("model", "objective"):
            continue
        for value in around(allowed, inner(values_of(one), name)):
            if value == 1e9 or value == [1e9] or refusal(one, name, value):
                continue
            of = {node: OmegaConf.to_container(one.tree[node]) for node in ("model", "objective")}
            of[part][key] = value  # type: ignore[index, call-overload]
            width = [8] if command == "slide" else []
            with torch.device("meta"):
                try:
                    plugins.build(of["objective"], lambda of=of, width=width: plugins.build(of["model"], *width))  # type: ignore[arg-type]
                except Fault as fault:  # of this machine, or of the network with the objective
                    known = ("CUDA", "drop_path", "position_embedding", "gram_size")
                    assert any(word in str(fault) for word in known), (name, value, fault)


def undeclared(kind: Any, values: Any, name: str) -> Iterator[str]:
    """Numbers without a range, of a type of settings and those inside."""
    if get_origin(kind) is ClassVar:
        return
    extras: list[Any] = []
    if get_origin(kind) is Annotated:
        kind, *extras = get_args(kind)
    kinds = get_args(kind) if get_origin(kind) in (UnionType, list) else (kind,)
    if {int, float} & set(kinds) and not any(isinstance(extra, Allowed) for extra in extras):
        yield name
    for inner in ranges._inside(next(filter(dataclasses.is_dataclass, [kind, *extras]), kind), values):
        hints = ranges.hints(inner if dataclasses.is_dataclass(inner) else inner.__init__)
        for key, one in hints.items():
            if key != "return" and key in values:
                yield from undeclared(one, values[key], f"{name}.{key}")


@pytest.mark.parametrize(("command", "words"), COMPOSITIONS, ids=NAMES)
def test_every_number_among_the_settings_has_a_range(command: str, words: list[str]) -> None:
    one = composed(command, *words)
    values, found = values_of(one), []
    for name, kind in kinds_of(one).items():
        found += list(undeclared(kind, values.get(name), name))
    assert not found


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["doctor", "optim.lr=inf"], "optim.lr=inf is not allowed"),
        (["doctor", "data.std=[0.5]"], "data.std=[0.5] is not allowed"),
        (["plan", "optim.steps=-5"], "optim.steps=-5 is not allowed"),
        (["plan", "model.depth=-1"], "model.depth=-1 is not allowed"),
        (["probe", "test_fraction=1"], "test_fraction=1.0 is not allowed: it must be more than 0 and less than 1."),
        (["optim.lr=nan"], "optim.lr=nan is not allowed: it must be a finite number, at least 0."),
        (["optim.lr=inf"], "optim.lr=inf is not allowed: it must be a finite number, at least 0."),
        (["optim.lr=-1"], "optim.lr=-1.0 is not allowed: it must be at least 0."),
        (["data.std=[0.2,0,0.2]"], "data.std holds 0.0, which is not allowed: each must be at least 0.001 and at most 1."),
        (["data.std=0.5"], "data.std=[0.5] is not allowed: it must be 3 numbers."),
        (["data.mean=[0.5]"], "data.mean=[0.5] is not allowed: it must be 3 numbers."),
        (["data.batch_size=0"], "data.batch_size=0 is not allowed: it must be at least 1."),
        (["trainer.devices=-1"], "trainer.devices=-1 is not allowed: it must be at least 1."),
        (["trainer.accelerator=tpu"], "trainer.accelerator=tpu is not allowed: it must be auto, cpu or gpu."),
        (["data.crops.global_scale=0.5"], "data.crops.global_scale=[0.5] is not allowed: it must be two numbers, the lower one first."),
        (["data.crops.global_scale=[0.5]"], "data.crops.global_scale=[0.5] is not allowed: it must be two numbers, the lower one first."),
        (["data.crops.global_scale=[1,0.5]"], "data.crops.global_scale=[1.0,0.5] is not allowed: it must be two numbers, the lower one first."),
        (["data.crops.local_scale=[-1,0.5]"], "data.crops.local_scale holds -1.0, which is not allowed: each must be more than 0."),
        (["data.crops.local_scale=[0.1,2]"], "data.crops.relative_to=tile and data.crops.local_scale=[0.1,2.0] don't go together: a scale is a share of the tile's area, at most 1."),
        (["data.crops.local_count=-1"], "data.crops.local_count=-1 is not allowed: it must be at least 0."),
        (["data.crops.global_count=0"], "data.crops.global_count=0 is not allowed: it must be at least 1."),
        (["data.crops.global_size=50"], "data.crops.global_size=50, data.crops.global_count=2 and model.patch_size=16 don't go together: the side of a crop is a multiple of the patch's."),
        (["model.depth=-1"], "model.depth=-1 is not allowed: it must be at least 1."),
        (["model.patch_size=0"], "model.patch_size=0 is not allowed: it must be at least 1."),
        (["model.registers=-1"], "model.registers=-1 is not allowed: it must be at least 0."),
        (["model.drop_path=1"], "model.drop_path=1.0 is not allowed: it must be at least 0 and less than 1."),
        (["model.width=100"], "model.width=100 and model.heads=3 don't go together: width 100 is not divisible by heads 3."),
        (["optim.steps=99999999999999999"], "optim.steps=99999999999999999 is not allowed: it must be at least 1 and at most 1,000,000,000."),
        (["data.mean=[123.7,0,0]"], "data.mean holds 123.7, which is not allowed: each must be at least 0 and at most 1."),
        (["optim.steps=-5"], "optim.steps=-5 is not allowed: it must be at least 1 and at most 1,000,000,000."),
        (["optim.steps=20"], "optim.warmup_steps=50, optim.steps=20 and optim.schedule_steps=null don't go together: the warm-up is longer than the run; make it shorter, or"),
        (["data.masks.low=0.6"], "data.masks.low=0.6 and data.masks.high=0.5 don't go together: the smallest share is larger than the largest."),
        (["data.lanes=3"], "data.batch_size=64 is not a multiple of data.lanes=3"),
        (["data.crops.global_size=1000000"], "data.crops.global_size=1000000 is not allowed: it must be at least 1 and at most 16384."),
        (["+seed=3"], "seed is a setting already, and + adds one: write seed=3."),
        (["model._target_=5"], "_target_: 5 names no class: give the dotted path of one"),
        (["shard", "slides=a", "out=b", "name=../c"], "name=../c is not allowed: it must be a file's name without its ending"),
        (["shard", "slides=a", "out=b", "patient_pattern='('"], "patient_pattern=( is not allowed: it must be a regular expression"),
        (["embed", "out=a", "shards=b"], "say by what to embed"),
        (["data.crops.global_count=1", "data.crops.local_count=0"], "objective._target_=pretrain.objectives.dinov2.DINOv2, data.crops.global_count=1 and data.crops.local_count=0 don't go together: views of a tile are compared, and there is one: set data.crops.global_count=2, or local_count higher."),
        (["recipe=small_lejepa", "data.crops.global_count=1", "data.crops.local_count=0"], "objective._target_=pretrain.objectives.lejepa.LeJEPA, data.crops.global_count=1 and data.crops.local_count=0 don't go together: views"),
        (["recipe=small_mae", "data.crops.global_count=2"], "objective._target_=pretrain.objectives.mae.MAE, data.crops.global_count=2 and data.crops.local_count=0 don't go together: MAE sees one crop of each tile: set data.crops.global_count=1 and"),
        (["recipe=small_dinov3", "objective.gram_weight=2"], "objective.gram_weight=2 compares with an earlier teacher that sees larger crops: set"),
        (["recipe=small_dinov3", "objective.gram_weight=2", "objective.gram_size=144", "data.crops.global_count=3"], "DINOv3 asks for larger views of 2 global ones, of 144 px, and there are data.crops.global_count=3"),
        (["recipe=small_jepa", "data.masks.share=0"], "data.masks.share=0 leaves no patches that JEPA could learn from: give a share, or set objective.patch_weight=0."),
        (["recipe=small", "data.masks.share=0"], "data.masks.share=0 leaves no patches that DINOv2 could learn from: give a share, or set objective.ibot_weight=0."),
        (["objective=distil", "objective.class_weight=0", "objective.patch_weight=0"], "objective.class_weight=0.0 and objective.patch_weight=0.0 don't go together: nothing is learned: give one of them."),
        (["watch.patience=2"], "watch.patience=2 and watch.probe=null don't go together: a better k-NN accuracy is waited for"),
    ],
)  # fmt: skip
def test_settings_out_of_range_end_a_command_with_one_sentence_and_code_2(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_command_line(words if "=" not in words[0] else ["tile", *words])
    captured = capsys.readouterr()
    assert ended.value.code == 2 and captured.out == ""
    assert captured.err.startswith(f"pretrain: {sentence}") and captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["data.lanes=3"], "data.batch_size=8 is not a multiple of data.lanes=3"),
        (["data.batch_tokens=2"], "data.batch_tokens=2 leaves less than a tile for each of data.lanes=4."),
        (["model.dilated_ratios=[1]"], "model.segment_lengths=[64,256] and model.dilated_ratios=[1] don't go together: "),
        (["model.dilated_ratios=[1,3]"], "the nearest valid lengths are [64, 255]"),
        (["objective.decoder_width=90"], "objective.decoder_width=90 and objective.decoder_heads=4 don't go together: width 90 is not divisible by heads 4."),
        (["objective.decoder_width=6", "objective.decoder_heads=2"], "objective.decoder_width=6: width 6 must be a multiple of 4"),
    ],
)  # fmt: skip
def test_what_must_go_together_is_declared_once_for_the_slide_stage_too(words: list[str], sentence: str) -> None:
    for command in ("slide", "doctor slide"):
        with pytest.raises(Fault) as refused:
            load(command, words)
        assert sentence in str(refused.value) and refused.value.code == 2


def test_the_settings_of_a_mixtures_members_are_held_to_their_ranges(tmp_path: Path) -> None:
    from pretrain.training.tile_sources import WeightedMixture

    member = {"weight": 1, "slides": "a.svs", "grids": str(tmp_path), "tile_size": 0}
    with pytest.raises(Fault, match=r"^data\.members\.a\.tile_size=0 is not allowed: it must be at least 16\.$"):
        WeightedMixture(members={"a": member})
    with pytest.raises(Fault, match=r"^data\.members\.a\.weight=-1\.0 is not allowed: it must be more than 0\.$"):
        WeightedMixture(members={"a": member | {"weight": -1}})


def test_a_gpu_that_is_not_there_is_said_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for words in (["tile", "data.shards=nowhere"], ["slide", "data.embeddings=nowhere"]):
        with pytest.raises(SystemExit):
            run_command_line([*words, f"run={tmp_path / 'run'}", "trainer.accelerator=gpu"])
        assert capsys.readouterr().err.startswith("pretrain: trainer.accelerator=gpu, and PyTorch finds no GPU")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(Fault, match=r"trainer\.devices=3 is more than the 2 GPUs"):
        require_devices(load("tile", ["run=a", "data.shards=b", "trainer.devices=3"]).object().trainer)
    assert not (tmp_path / "run").exists()


def test_tasks_that_see_one_gpu_each_are_told_to_see_their_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("SLURM_GPUS_PER_TASK", "1")
    with pytest.raises(Fault, match=r"trainer\.devices=8 is more than the 1 GPUs .*give --gpus-per-node in its place"):
        require_devices(load("tile", ["run=a", "data.shards=b", "trainer.devices=8"]).object().trainer)


def test_several_nodes_without_a_launcher_are_refused_instead_of_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("NODE_RANK", "MASTER_ADDR", "LOCAL_RANK", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SystemExit):
        run_command_line(["tile", "data.shards=nowhere", f"run={tmp_path / 'run'}", "trainer.nodes=2"])
    assert "trainer.nodes=2 needs somebody who starts it on every node" in capsys.readouterr().err


def test_help_shows_the_ranges() -> None:
    text = cli.explain("tile")
    for line in (
        r"    depth: 12 +# blocks \[at least 1\]",
        r"    drop_path: 0\.0 +# .*\[at least 0 and less than 1\]",
        r"    std: \[.*\] +# \[3 numbers, each at least 0.001 and at most 1\]",
        r"    accelerator: auto +# auto, cpu or gpu",
        r"  seed: 0 +# .*\[at least 0\]",
    ):
        assert re.search(f"^{line}$", text, flags=re.M), line
    assert "launch" in json.dumps(ranges_of(load("plan", [])))


class Own(torch.nn.Module):
    """A network of a user's, with ranges of its own and without any."""

    agreements: ClassVar = {("size", "patch_size"): lambda size, patch_size: None}

    def __init__(self, *, size: Annotated[int, ranges.within(least=1)], patch_size: int, odd: float) -> None:
        super().__init__()


def test_a_users_plug_in_is_held_to_its_own_ranges(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "own.yaml").write_text(
        f"_target_: {Own.__module__}.Own\nsize: 0\npatch_size: 14\nodd: -3.0\n"
    )
    with pytest.raises(Fault, match=r"^model\.size=0 is not allowed: it must be at least 1\.$"):
        load("tile", ["model=own", "~recipe"], [tmp_path])
    assert load("tile", ["model=own", "~recipe", "model.size=1"], [tmp_path]).tree.model.odd == -3.0


@pytest.mark.parametrize(
    "words",
    [
        ["tile", "run=", "data.shards=a"], ["tile", "run=a", "data.shards="], ["tile", "run=a", "data.shards=a", "init="], ["report", "run="],
        ["shard", "slides=", "out=a"], ["export", "checkpoint=a", "out="], ["shards", "index", "shards=[]"], ["shards", "verify", "shards=[]"],
        ["shard", "slides=[]", "out=a"],
    ],
)  # fmt: skip
def test_an_empty_value_is_a_sentence_and_not_the_current_folder(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_command_line(words)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and ("is empty: give a value" in said or "at least one" in said), said
