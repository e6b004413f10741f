"""From the command line to typed settings; what is not known is refused with the nearest name."""

import re
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from data.fault import Fault
from pretrain import cli
from pretrain.settings.annotation import annotated
from pretrain.settings.command_schema import file_stem
from pretrain.settings.composition import load
from pretrain.settings.config_files import CONFIGS, choices_of, comments
from pretrain.settings.refusals import OF_LIGHTNINGS_TRAINER, dotted_keys, nearest, unheeded
from pretrain.settings.sweeps import sweep_of

CROPS_OF_SLIDES = ["objective=slide_ibot", "data.field_cells=0"]
GROUPS = sorted(folder.name for folder in CONFIGS.iterdir() if folder.is_dir())


def commands() -> list[str]:
    return [name for name in cli.COMMANDS if (CONFIGS / f"{file_stem(name)}.yaml").exists()]


@pytest.mark.parametrize("command", commands())
def test_every_command_composes_and_only_its_required_keys_are_missing(command: str) -> None:
    composed = load(command, [])
    required = set(re.findall(r"^(\w+): +\?\?\?", (CONFIGS / f"{file_stem(command)}.yaml").read_text(), flags=re.M))
    inner = set()
    for prefix, file in composed.files:
        inner |= {prefix + key for key in re.findall(r"^(\w+): +\?\?\?", file.read_text(), flags=re.M)}
    given = inner if command == "doctor" else set()  # which looks at no tiles where none are named
    assert OmegaConf.missing_keys(composed.tree) == required | (inner - given)


def uses(command: str, group: str) -> bool:
    return group == "launch" or bool(
        re.search(rf"^  - (?:override )?/?{group}: ", (CONFIGS / f"{file_stem(command)}.yaml").read_text(), flags=re.M)
    )


GO_WITH = {"objective=mae": ["data.crops.global_count=1", "data.crops.local_count=0"]}  # one view of each tile
CHOICES = [(group, choice) for group in GROUPS for choice in choices_of(group, [CONFIGS])]


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_file_of_every_group_fits_the_schema_of_a_command(group: str, choice: str) -> None:
    """Whoever offers the group must take the file, with what goes with it: with its recipe left out where a recipe for
    another network would clash."""
    word, refusals = f"{group}={choice}", []
    for command in commands():
        if uses(command, group):
            for others in ([], ["~recipe"] if group != "recipe" and uses(command, "recipe") else []):
                try:
                    load(command, [word, *GO_WITH.get(word, []), *others])
                    return
                except Fault as fault:
                    refusals.append(f"{command}: {fault}")
    raise AssertionError("\n".join(refusals) or f"no command uses the group {group}")


@pytest.mark.parametrize("file", sorted(CONFIGS.rglob("*.yaml")), ids=lambda file: str(file.relative_to(CONFIGS)))
def test_every_value_says_what_it_means_where_it_is_introduced(file: Path) -> None:
    if file.parent.name == "objective" or file.parent.name == "data" or file.parent == CONFIGS:
        bare = [key for key, comment in comments(file).items() if not comment and "_target_" not in key]
        # A name that says everything may go without, but not most of a file.
        assert len(bare) <= len(comments(file)) / 2, bare


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["data.batchsize=3"],
            "there is no setting 'data.batchsize' in 'pretrain tile'; did you mean 'data.batch_size'?",
        ),
        (["+optim.lrr=0.1"], "there is no setting 'optim.lrr' in 'pretrain tile'; did you mean 'optim.lr'?"),
        (["++optim.lrr=0.1"], "there is no setting 'optim.lrr' in 'pretrain tile'; did you mean 'optim.lr'?"),
        (["+batch_siz=4"], "there is no setting 'batch_siz' in 'pretrain tile'; did you mean 'data.batch_size'?"),
        (
            ["data.mpp={from: 0.25, to: 2.0}", "data=online", "data.slides=x"],
            "data.mpp is a list: write data.mpp=[0.25,2.0] data.mpp_law=log_uniform, which draws between two.",
        ),
        (
            ["data.mpp={from: 0.25, to: 2.0, law: uniform}", "data=online", "data.slides=x"],
            "data.mpp is a list: write data.mpp=[0.25,2.0] data.mpp_law=uniform, which draws between two.",
        ),
        (
            ["data.mpp=[{from: 0.25, to: 2.0, law: uniform}]", "data=online", "data.slides=x"],
            "data.mpp is a list: write data.mpp=[0.25,2.0] data.mpp_law=uniform, which draws between two.",
        ),
        (["data.hold_out=0.1"], "'data.hold_out' as 'pretrain tile' is set here: it belongs to data=parquet."),
        (["data=online", "data.shards=x"], "'data.shards' as 'pretrain tile' is set here: it belongs to data=tiles."),
        (["objective.mask_ratio=0.5"], "as 'pretrain tile' is set here: it belongs to objective=mae."),
        (["recipe=smal"], "there is no recipe 'smal'; did you mean 'small'? There are: "),
        (["optim.lr=fast"], "optim.lr: Value 'fast' of type 'str' could not be converted to Float"),
        (["optim.steps=1.5"], "optim.steps: "),
        (["trainer.devices=null"], "trainer.devices can't be null: give a value, or leave it out."),
        (["optim.lr=[1,2]"], "optim.lr is a single value, and neither a list nor a mapping."),
        (["run=[a]"], "run is a single value, and neither a list nor a mapping."),
        (["optim.betas=[0.9"], "'optim.betas=[0.9' can't be read as key=value"),
        (["seed"], "'seed' can't be read as key=value"),
        (["optim=null"], "optim=null is not a choice"),
        (["model._target_=models.vit.Nothing"], "models.vit.Nothing can't be imported"),
        (["data.shards=null"], "data.shards can't be null: give a value, or leave it out."),
        (
            ["trainer.max_steps=5"],
            "there is no setting 'trainer.max_steps' in 'pretrain tile': optim.steps= is a run's",
        ),
        (
            ["+trainer.max_epochs=5"],
            "'trainer.max_epochs' in 'pretrain tile': optim.steps= is a run's length, in steps.",
        ),
        (["trainer.limit_train_batches=5"], "optim.steps= with optim.schedule_steps= stops a run before its schedules"),
        (["++trainer.limit_steps=5"], "optim.steps= with optim.schedule_steps= stops a run before its schedules"),
        (
            ["accumulate_grad_batches=2"],
            "there is no setting 'accumulate_grad_batches' in 'pretrain tile': trainer.acc",
        ),
        (["trainer.gradient_clip_val=1"], "in 'pretrain tile': optim.clip= is the largest gradient norm."),
        (["trainer.val_check_interval=9"], "held-out data are judged at checkpoints, trainer.checkpoint_every=."),
        (
            ["trainer.loggers=true"],
            "trainer.loggers: True is no class with its settings: write [{_target_: dotted.path.Of}]",
        ),
        (
            ["trainer.loggers=false"],
            "trainer.loggers: False is no class with its settings: write [{_target_: dotted.path",
        ),
        (
            ["trainer.callbacks=3"],
            "trainer.callbacks: 3 is no class with its settings: write [{_target_: dotted.path.Of}]",
        ),
        (
            ["trainer.callbacks={_target_: x.Y, n: 1}"],
            "trainer.callbacks is a list: write trainer.callbacks=[{_target_: x.Y, n: 1}].",
        ),
        (["model._target_=pathlib.Path"], "pathlib.Path is no torch nn.Module class"),
    ],
)
def test_what_is_not_known_is_refused_in_one_line_with_the_nearest_name(overrides: list[str], sentence: str) -> None:
    with pytest.raises(Fault) as refused:
        load("tile", overrides)
    assert sentence in str(refused.value) and "\n" not in str(refused.value)


def test_what_stands_in_for_a_setting_of_lightnings_is_a_setting_of_every_command_that_trains() -> None:
    for command in ("tile", "slide", "doctor", "doctor slide"):
        known = dotted_keys(load(command, []).tree)
        for sentence in OF_LIGHTNINGS_TRAINER.values():
            named = set(re.findall(r"([a-z_.]+)=", sentence))
            assert named and named <= known | {"launch.time"}, sentence


def test_a_suggestion_is_never_the_refused_key_itself() -> None:
    with pytest.raises(Fault) as refused:
        load("tile", ["+model.foo.bar=1"])
    assert "did you mean 'model.foo" not in str(refused.value)


def test_a_slide_run_asked_for_a_probe_of_tiles_says_what_judges_it() -> None:
    with pytest.raises(Fault, match=r"by labels of slides 'pretrain probe stage=slide' judges them"):
        load("slide", ["run=r", "data.embeddings=e", "watch.probe=labelled"])


def test_missing_settings_are_listed_with_the_command_that_gives_them() -> None:
    with pytest.raises(Fault, match=r"data\.shards, run must be given: pretrain tile data\.shards=… run=…"):
        load("tile", []).object()


def test_values_arrive_typed_and_plain() -> None:
    config = load("tile", ["run=a", "data.shards=b", "optim.lr=1", "model.width=48"]).object()
    assert type(config).__name__ == "Config" and type(config).__module__ == "pretrain.commands.tile"
    assert config.optim.lr == 1.0 and isinstance(config.optim.lr, float)
    assert (
        isinstance(config.model, dict) and config.model["width"] == 48 and type(config.data.crops.global_scale) is list
    )


@pytest.mark.parametrize(
    ("given", "expected"),
    [("one", ["one"]), ("'a b'", ["a", "b"]), ("[a,b]", ["a", "b"]), ("\"'my slides' c\"", ["my slides", "c"])],
)
def test_words_become_a_list(given: str, expected: list[str]) -> None:
    assert load("tile", ["run=a", f"data.shards={given}"]).object().data.shards == expected


def test_one_path_with_spaces_that_exists_stays_one(tmp_path: Path) -> None:
    folder = tmp_path / "my tiles"
    folder.mkdir()
    assert load("tile", ["run=a", f"data.shards='{folder}'"]).object().data.shards == [str(folder)]


def test_a_name_with_a_quote_in_it_is_taken_as_a_list_or_refused_in_a_sentence_that_says_so() -> None:
    with pytest.raises(
        Fault, match=r"""data\.shards: there is no file "it's here", .*: data\.shards=\["it's here"\]\."""
    ):
        load("tile", ["run=a", 'data.shards="it\'s here"'])
    assert load("tile", ["run=a", 'data.shards=["it\'s here"]']).object().data.shards == ["it's here"]


def test_the_command_line_beats_the_recipe_and_the_recipe_beats_the_group() -> None:
    recipe = yaml.safe_load((CONFIGS / "recipe" / "_small.yaml").read_text())
    group = yaml.safe_load((CONFIGS / "data" / "tiles.yaml").read_text())
    assert recipe["data"]["lanes"] != group["lanes"]
    assert load("tile", []).tree.data.lanes == recipe["data"]["lanes"]
    assert load("tile", ["data.lanes=2"]).tree.data.lanes == 2
    assert load("tile", ["~recipe"]).tree.data.lanes == group["lanes"]


def test_every_value_is_printed_with_its_meaning_and_where_it_comes_from() -> None:
    overrides = ["optim.clip=1.5", "run=a", "data.shards=b"]
    text = annotated(load("tile", overrides))
    by_key = {line.split(":")[0].strip(): line for line in text.splitlines()}
    assert re.search(r"batch_size: 64 +# .*\[recipe/_small\]$", by_key["batch_size"])
    assert re.search(r"clip: 1\.5 +# largest gradient norm.*\[command line\]$", by_key["clip"])
    assert by_key["window"].endswith("[data/tiles]") and by_key["seed"].endswith("[tile]")
    assert yaml.safe_load(text) == OmegaConf.to_container(load("tile", overrides).tree)


def test_a_users_own_recipe_is_found_used_and_named(tmp_path: Path) -> None:
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text("# @package _global_\noptim:\n  lr: 0.25  # mine\n")
    composed = load("tile", ["recipe=mine"], [tmp_path])
    assert composed.tree.optim.lr == 0.25
    line = next(line for line in annotated(composed).splitlines() if line.strip().startswith("lr:"))
    assert "mine" in line and str(tmp_path / "recipe" / "mine") in line
    with pytest.raises(Fault, match=r"there is no recipe 'mime'; did you mean 'mine'\?"):
        load("tile", ["recipe=mime"], [tmp_path])


def test_a_mistake_inside_a_users_recipe_is_refused_too(tmp_path: Path) -> None:
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text("# @package _global_\noptim:\n  learning_rate: 0.25\n")
    with pytest.raises(Fault, match=r"optim\.learning_rate"):
        load("tile", ["recipe=mine"], [tmp_path])


def test_a_new_model_is_one_file_and_one_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_model.py").write_text(
        "from torch import nn\nclass Mine(nn.Module):\n    def __init__(self, *, size: int, patch_size: int):\n       "
        " super().__init__()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("_target_: own_model.Mine\nsize: 3\npatch_size: 14\n")
    composed = load("tile", ["model=mine", "~recipe", "run=a", "data.shards=b"], [tmp_path])
    assert composed.object().model == {"_target_": "own_model.Mine", "size": 3, "patch_size": 14}
    with pytest.raises(Fault, match=r"model\.sise.*did you mean 'model\.size'"):
        load("tile", ["model=mine", "~recipe", "+model.sise=4"], [tmp_path])


def test_comments_are_read_from_values_not_from_strings(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text('one: 1  # first\ntwo:\n  three: "x"   # inner\n  four: [1, 2]\n')
    assert comments(file) == {"one": "first", "two.three": "inner", "two.four": ""}


def test_nearest_finds_a_name_by_its_last_part() -> None:
    assert nearest("lerning", {"optim.learning", "data.threads"}) == "; did you mean 'optim.learning'?"
    assert nearest("qqq", {"optim.lr"}) == "."


@pytest.mark.parametrize(
    ("command", "words", "sentence"),
    [
        (
            "slide",
            ["data.crops.local_count=3"],
            "data.crops.local_count is for objectives that compare crops of a slide",
        ),
        ("slide", [*CROPS_OF_SLIDES, "data.mask_ratio=0.5"], "data.mask_ratio is for objectives that hide tiles of"),
        (
            "tile",
            ["objective=dino", "data.masks.kind=blocks"],
            "data.masks.kind is for objectives that mask patches as data.masks says, and DINO doesn't: leave it out.",
        ),
        (
            "doctor",
            ["recipe=small_mae", "data.masks.share=0.5"],
            "data.masks.share is for objectives that mask patches",
        ),
        (
            "tile",
            ["recipe=nanopath_jepa", "data.masks.high=0.5"],
            "data.masks.high has no effect with data.masks.kind=squares: leave it out",
        ),
        (
            "tile",
            ["data.masks.squares=3"],
            "data.masks.squares has no effect with data.masks.kind=blocks: leave it out",
        ),
        ("plan", ["stage=slide"], "a plan is of the stage that its recipe= or objective= is for: leave stage= out."),
        (
            "plan",
            ["slide", "recipe=slide"],
            "a plan is of the stage that its recipe= or objective= is for: leave 'slide'",
        ),
    ],
)
def test_what_the_command_would_not_heed_is_refused(command: str, words: list[str], sentence: str) -> None:
    with pytest.raises(Fault, match=re.escape(sentence)):
        load(command, words)
    load("slide", [*CROPS_OF_SLIDES, "data.crops.local_count=3"])
    load("tile", ["recipe=nanopath_jepa", "data.masks.squares=3"])


def test_a_given_setting_that_another_leaves_without_effect_is_refused() -> None:
    given = ["objective=dinov3", "model=dinov3_small", "data.crops.local_count=0"]
    values = OmegaConf.to_container(load("tile", given).tree)
    without_gram = [f"objective.gram_{name}" for name in ("size", "every", "refreshes", "negatives")]
    words = [
        *(f"{name}=1" for name in without_gram),
        "objective.spread=koleo",
        "objective.spread_concentration=3",
        "model.drop_path_rising=true",
        "model.position_antialias=false",
        "model.own_local_cls_norm=true",
        "model.drop_path=0",
    ]
    assert unheeded("tile", words, values) == {  # type: ignore[arg-type]
        **{
            name: f"{name} has no effect with objective.gram_weight=0.0: leave it out, or change that."
            for name in without_gram
        },
        "objective.spread_concentration": "objective.spread_concentration has no effect with objective.spread=koleo:"
        " leave it out, or change that.",
        "model.drop_path_rising": "model.drop_path_rising has no effect with model.drop_path=0.0: leave it out, or"
        " change that.",
        "model.position_antialias": "model.position_antialias has no effect with model.position_embedding=rope: leave"
        " it out, or change that.",
        "model.own_local_cls_norm": "model.own_local_cls_norm is for crops of a second size, and there are none: leave"
        " it out, or give local crops.",
    }
    with pytest.raises(Fault, match=r"^objective.spread_ramp has no effect with objective.spread_weight=0.0: leave"):
        load("tile", ["objective=jepa", "objective.spread_weight=0", "objective.spread_ramp=[0.1,0.5]"])


@pytest.mark.parametrize(
    ("recipe", "off"), [("dinov3_gram", "objective.gram_weight=0"), ("nanopath_jepa", "objective.spread_weight=0")]
)
def test_a_recipes_settings_may_be_left_without_effect_by_one_override(recipe: str, off: str) -> None:
    assert load("tile", [f"recipe={recipe}", off]).overrides[1:] == [off]


def test_a_sweep_refuses_what_none_of_its_runs_heeds_and_leaves_it_out_where_one_does_not() -> None:
    words = ["run=r", "data.shards=s", "objective=dinov2", "objective.spread_weight=0,0.1"]
    kde = ["objective.spread=kde", "objective.spread_concentration=3"]
    without, with_it = sweep_of("tile", [*words, *kde], []).points.values()
    assert set(kde) & set(without.words) == set() and set(kde) <= set(with_it.words)
    with pytest.raises(Fault, match=r"^objective.spread_concentration has no effect with"):
        sweep_of("tile", [*words, kde[1]], [])
