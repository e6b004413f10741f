"""Why a word of the command line can't be taken, in one sentence, with the nearest name that is known."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.fault import Fault
from data.tiles.scales import LAWS
from pretrain.settings import plugins, ranges
from pretrain.settings.command_schema import config_class, file_stem, setting_types, with_launch
from pretrain.settings.config_files import CONFIGS, choices_of, comments, with_parents
from pretrain.settings.shell_words import key_of

OF_WHOLE_FIELDS = ("data.crop", "data.mask", "data.mask_ratio", "data.block_cells")
"""What objectives that compare crops of a slide don't read."""
OF_MASKS = ("data.mask", "data.block_cells", "data.crops.mask")
"""How settings begin that objectives don't read that mask nothing, or by settings of their own."""
OF_LIGHTNINGS_TRAINER = {
    "max_steps": "optim.steps= is a run's length, and optim.schedule_steps= that of its schedules where it stops before",
    "max_epochs": "optim.steps= is a run's length, in steps",
    "max_time": "a job's time is launch.time=, and a run goes on where it was stopped",
    "accumulate_grad_batches": "trainer.accumulate= is the micro-batches of a step",
    "gradient_clip_val": "optim.clip= is the largest gradient norm",
    "val_check_interval": "held-out data are judged at checkpoints, trainer.checkpoint_every=",
    "num_nodes": "trainer.nodes= is the number of machines",
    "strategy": "training is FSDP2, and trainer.shard_size= says over how many processes",
    "log_every_n_steps": "trainer.log_every= is the steps between lines of metrics.jsonl",
    "logger": "trainer.loggers= is a list of them",
    "default_root_dir": "run= is the folder",
} | dict.fromkeys(
    ("limit_steps", "limit_train_batches"),
    "optim.steps= with optim.schedule_steps= stops a run before its schedules end, and trainer.fast_dev_run= tries it",
)
"""What there is here in place of the settings of Lightning's trainer that people know by heart."""
CALLED_ELSEWHERE = {
    "optim.lr": "learning_rate base_lr max_lr peak_lr",
    "optim.lr_final": "min_lr final_lr",
    "optim.weight_decay": "wd decay",
    "optim.warmup_steps": "warmup warmup_epochs",
    "optim.steps": "epochs iterations max_iter max_iters num_steps",
    "optim.clip": "clip_grad grad_clip max_grad_norm",
    "data.batch_size": "batch bs batchsize batch_size_per_gpu",
    "data.threads": "workers num_workers",
    "trainer.devices": "gpus num_gpus ngpus",
    "trainer.precision": "amp dtype fp16 bf16",
    "run": "output output_dir out_dir save_dir",
    "out": "output output_dir out_dir save_dir",
}
"""By our name of a setting, what other programs call it, in words."""


def why_refused(
    command: str, overrides: list[str], search: list[str], directories: list[Path], error: Exception
) -> str:
    """One sentence for Hydra's refusal: the first override whose key or choice is unknown, with the nearest known
    one."""
    groups = {folder.name for directory in directories for folder in directory.iterdir() if folder.is_dir()}
    chosen = [word for word in overrides if _is_choice(word, groups, directories)]
    launch = [word for word in chosen if word.startswith("launch=")]
    try:
        tree = _composed(command, chosen, search)
    except (HydraException, OmegaConfBaseException):  # choices that don't go together, or of no group of the command
        tree = _composed(command, launch, search)
    known = dotted_keys(tree)
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException as problem:
            if command == "plan" and text in ("tile", "slide"):
                return f"a plan is of the stage that its recipe= or objective= is for: leave {text!r} out."
            first = str(problem).splitlines()[0]
            return f"{text!r} can't be read as key=value ({first}); quote values that hold spaces, commas or braces."
        key, value = override.key_or_group, override.value()
        if key in groups and value is None and not override.is_delete():
            return f"{key}=null is not a choice; '~{key}' leaves the group {key} out."
        if key in groups and isinstance(value, str):
            options = choices_of(key, directories)
            if value not in options:
                return f"there is no {key} {value!r}{nearest(value, set(options))} There are: {', '.join(options)}."
        elif not launch and key.startswith("launch.") and (having := _choices_with(key, directories)):
            choices = " and of ".join(f"launch={choice}" for choice in having)
            return f"{key} is a setting of {choices}: give that too, as without it the command runs here."
        elif override.is_delete() and key in known and f"'{key}' does not exist" in str(error):
            return f"{text}: there is nothing to delete, as {key} is null without that: leave the word out."
        elif command == "plan" and key == "stage":
            return "a plan is of the stage that its recipe= or objective= is for: leave stage= out."
        elif key not in known and not override.is_add():
            if others := _belongs_to(command, key, tree, directories):
                belongs = " and to ".join(others)
                return f"there is no setting {key!r} as 'pretrain {command}' is set here: it belongs to {belongs}."
            of_slides = f"{command} slide"
            if (CONFIGS / f"{file_stem(of_slides)}.yaml").exists() and key in setting_types(of_slides):
                return f"{key} is a setting of 'pretrain {command} stage=slide': give stage=slide too."
            return f"there is no setting {key!r} in 'pretrain {command}'{in_its_place(key, known)}"
        elif isinstance(value, dict) and key in known and OmegaConf.is_list(OmegaConf.select(tree, key)):
            if drawn := _drawn_between(key, value, known):
                return drawn
            if value and all(isinstance(one, int | float) for one in value.values()):
                return f"{key} is a list: write {key}=[{','.join(map(str, value.values()))}]."
            return f"{key} is a list: write {key}=[{text.partition('=')[2]}]."
        elif key in known and override.is_add() and not override.is_force_add():
            return f"{key} is a setting already, and + adds one: write {text.lstrip('+')}."
    return " ".join(str(error).split())


def require_no_range_in_a_list(words: Sequence[str], values: DictConfig) -> None:
    """Raise Fault for ``data.mpp=[{from: 0.5, to: 2}]``: between two values is drawn by a setting beside the list."""
    known = dotted_keys(values)
    for key in map(key_of, words):
        given = OmegaConf.select(values, key) if f"{key}_law" in known else None
        one = given[0] if isinstance(given, ListConfig) and len(given) == 1 else None
        if isinstance(one, DictConfig) and (drawn := _drawn_between(key, one, known)):
            raise Fault(drawn)


def _drawn_between(key: str, value: Mapping[Any, Any], known: set[str]) -> str | None:
    """The sentence for a table of two numbers, and perhaps a law, where a list and a law beside it are asked for."""
    ends = [one for one in value.values() if isinstance(one, int | float)]
    if len(ends) != 2 or f"{key}_law" not in known:
        return None
    law = next((one for one in value.values() if one in LAWS), "log_uniform")
    return f"{key} is a list: write {key}=[{ends[0]},{ends[1]}] {key}_law={law}, which draws between two."


def require_of_the_stage(
    command: str, words: Sequence[str], choices: Mapping[str, str], directories: list[Path]
) -> None:
    """Raise Fault for an objective of the other stage, by the word that chose it."""
    for group, choice in choices.items():
        chose = next((word for word in (f"{group}={choice}", f"recipe={choices.get('recipe')}") if word in words), None)
        if chose is not None and (its := other_stage(command, group, choice, directories)):
            known = [one for one in choices_of(group, [CONFIGS]) if not other_stage(command, group, one, [CONFIGS])]
            asks = "is" if chose == f"{group}={choice}" else f"asks for {group}={choice}, which is"
            raise Fault(f"{chose} {asks} of 'pretrain {its}': here {group}= is one of {', '.join(known)}.")


def unheeded(command: str, words: Sequence[str], values: Mapping[str, Any]) -> dict[str, str]:
    """Of the settings that the command line gives, those that would change nothing, each with the sentence that says
    so: the chosen objective doesn't read it, or another setting leaves it without effect (`models.allowed.Idle`)."""
    found, idle = {}, dict(ranges.idle(values, ranges.hints(config_class(command))))
    objective: Any = plugins.locate_class(values["objective"]["_target_"], object) if "objective" in values else None
    for key in map(key_of, words):
        if objective and (theirs := _done_by_others(key, objective)):
            found[key] = f"{key} is for objectives that {theirs}, and {objective.__name__} doesn't: leave it out."
        elif key == "model.own_local_cls_norm" and _all_of_one_size(values, objective):
            found[key] = f"{key} is for crops of a second size, and there are none: leave it out, or give local crops."
        elif key in idle:
            found[key] = f"{key} has no effect with {idle[key]}: leave it out, or change that."
    return found


def _all_of_one_size(values: Mapping[str, Any], objective: Any) -> bool:
    """Whether a tile objective sees global crops alone, by settings that are all there."""
    settings = {name: value for name, value in values["objective"].items() if name != "_target_"}
    none_local = values["data"].get("crops", {}).get("local_count") == 0
    return none_local and ranges.MISSING not in settings.values() and not objective.further_views(settings)


def _done_by_others(key: str, objective: Any) -> str | None:
    """What those objectives do that read a setting, where this one doesn't."""
    slides, of_crops = objective.stage == "slide", key.startswith("data.crops.")
    if slides and (of_crops or key in OF_WHOLE_FIELDS) and of_crops != objective.crops:
        return "compare crops of a slide" if of_crops else "hide tiles of whole slides or fields"
    if key.startswith(OF_MASKS) and not objective.masks:
        return "hide tiles as the data's settings say" if slides else "mask patches as data.masks says"
    return None


def other_stage(command: str, group: str, choice: str, directories: list[Path]) -> str | None:
    """The stage that a group's choice is for, where that isn't the command's."""
    wanted = getattr(ranges.base_of(ranges.hints(config_class(command)).get(group)), "stage", None)
    if not wanted:
        return None
    for _, file in reversed(with_parents(group, choice, directories)):
        target = (yaml.safe_load(file.read_text()) or {}).get("_target_")
        if target:
            its: str | None = getattr(plugins.locate_class(target, object), "stage", None)
            return its if its and its != wanted else None
    return None


def _is_choice(word: str, groups: set[str], directories: list[Path]) -> bool:
    """Whether a word of the command line takes one of a group's choices that there are."""
    group, _, choice = word.partition("=")
    return group in groups and choice in choices_of(group, directories)


def _composed(command: str, chosen: list[str], search: list[str]) -> DictConfig:
    with initialize_config_dir(str(CONFIGS), version_base="1.3", job_name=file_stem(command)):
        return compose(file_stem(command), with_launch(command, chosen) + search)


def _choices_with(key: str, directories: list[Path]) -> dict[str, set[str]]:
    """The choices of a key's group that have the setting ``key``, each with all that it has."""
    group = key.partition(".")[0]
    found: dict[str, set[str]] = {}
    for choice in choices_of(group, directories):
        keys = {prefix + name for prefix, file in with_parents(group, choice, directories) for name in comments(file)}
        found |= {choice: keys} if key in keys else {}
    return found


def _belongs_to(command: str, key: str, tree: DictConfig, directories: list[Path]) -> list[str]:
    """The choices of a key's group, of those for this ``command``, whose values are ``tree``, that have the setting
    ``key``."""
    group, found = key.partition(".")[0], []
    for choice, keys in _choices_with(key, directories).items() if group in tree else ():
        alike = (f"{group}._target_" in keys) == (f"{group}._target_" in dotted_keys(tree))
        found += [f"{group}={choice}"] if alike and not other_stage(command, group, choice, directories) else []
    return found


def dotted_keys(tree: DictConfig, prefix: str = "") -> set[str]:
    """All dotted keys of a configuration, inner ones included."""
    found = set()
    for key in map(str, tree):
        found.add(f"{prefix}{key}")
        if not OmegaConf.is_missing(tree, key) and isinstance(tree[key], DictConfig):
            found |= dotted_keys(tree[key], f"{prefix}{key}.")
    return found


def in_its_place(key: str, known: set[str]) -> str:
    """The end of a sentence about an unknown setting: what there is in place of one of Lightning's trainer, what other
    programs call otherwise, or the `nearest`."""
    node, _, name = key.rpartition(".")
    if node in ("", "trainer") and "trainer" in known and name in OF_LIGHTNINGS_TRAINER:
        return f": {OF_LIGHTNINGS_TRAINER[name]}."
    if key.startswith("watch.probe") and "watch.held_out_slides" in known:
        return (
            ", whose runs are judged on held-out slides (watch.held_out_slides=); by labels of slides 'pretrain probe"
            " stage=slide' judges them."
        )
    for ours, theirs in CALLED_ELSEWHERE.items():
        if name in theirs.split() and ours in known:
            return f"; did you mean {ours!r}?"
    return nearest(key, known)


def nearest(key: str, known: set[str]) -> str:
    """The end of a sentence: ``; did you mean 'optim.lr'?``, by the whole dotted name or else by its last part, or a
    full stop."""
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not close:
        leaf = key.rpartition(".")[2]
        by_leaf: dict[str, str] = {}
        for name in sorted(known):
            by_leaf.setdefault(name.rpartition(".")[2], name)
        close = [by_leaf[name] for name in difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=0.5)]
    return f"; did you mean {close[0]!r}?" if close else "."
