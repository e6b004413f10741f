"""List the recipes: what each trains, on what, at what published cost, which part of it is public, where it deviates from
what was published, and what is unknown about it.

A recipe is one file in configs/recipe/; every value in it says where it is from. Numbers of parameters are counted on
the network itself, the mask token left out, as publishers do.

    pretrain recipes
    pretrain recipes name=midnight
    pretrain tile recipe=midnight run=runs/midnight data.shards=shards
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from data.fault import Fault
from pretrain.settings import plugins
from pretrain.settings.annotation import annotated, as_dictionary
from pretrain.settings.any_machine import on_any_machine
from pretrain.settings.composition import Composed, load
from pretrain.settings.config_files import CONFIGS, choices_of
from pretrain.settings.recipe_headings import deviations, heading, our_choices
from pretrain.settings.refusals import nearest

RECIPE_STAGES = ("tile", "slide")
TILE_WIDTH = 1536  # a slide encoder's input in the table: Prov-GigaPath's
FACTS_OF_RECIPES = ("Data", "Cost", "Public")  # lines of a recipe's heading that the table has


@dataclass
class Config:
    """Types of the settings; values and explanations are in ``configs/recipes.yaml``."""

    name: str | None


@dataclass
class Recipe:
    """What the table says about a recipe."""

    name: str
    stage: str
    parameters: int  # of the encoder
    objective: str
    batch: int
    steps: int
    data: str
    cost: str
    public: str
    deviates: list[str]  # from what was published, in sentences, with the reason where there is one
    unknown: list[str]  # settings whose value is our choice


def run(config: Config) -> None:
    """Print the table, or one recipe in full."""
    if config.name is None:
        print(recipe_table([describe_recipe(name) for name in names()]))
        return
    composed = compose_recipe(config.name)
    print("\n".join(heading(path(config.name))))
    print(f"\n{annotated(composed)}")


def names() -> list[str]:
    """All recipes, by name; what begins with _ is a part of others."""
    return choices_of("recipe", [CONFIGS])


def path(name: str) -> Path:
    """A recipe's file. Raises Fault where there is none."""
    file = CONFIGS / "recipe" / f"{name}.yaml"
    if not file.exists():
        raise Fault(f"there is no recipe {name!r}{nearest(name, set(names()))} 'pretrain recipes' lists them.")
    return file


def compose_recipe(name: str) -> Composed:
    """The configuration of the stage that a recipe is for: the one whose settings it sets. Raises Fault where there is
    none."""
    path(name)
    problems = []
    for stage in RECIPE_STAGES:
        try:
            return load(stage, [f"recipe={name}"])
        except Fault as fault:
            problems.append(f"as 'pretrain {stage}': {fault}")
    raise Fault(f"configs/recipe/{name}.yaml fits no stage: {' '.join(problems)}")


def describe_recipe(name: str) -> Recipe:
    """Compose a recipe, build its encoder on the meta device, and collect what its file says."""
    composed = compose_recipe(name)
    tree = composed.tree
    model, objective = (as_dictionary(tree[part]) for part in ("model", "objective"))
    with torch.device("meta"):
        encoder = plugins.build(on_any_machine(model), *([TILE_WIDTH] if composed.command == "slide" else []))
    parameters = sum(p.numel() for name, p in encoder.named_parameters() if name != "mask_token")
    facts = dict(
        line.removeprefix("# ").split(": ", 1)
        for line in heading(path(name))
        if line.startswith(tuple(f"# {fact}: " for fact in FACTS_OF_RECIPES))
    )
    kind = objective["_target_"].rpartition(".")[2]
    return Recipe(
        name=name,
        stage=composed.command,
        parameters=parameters,
        objective=f"{kind} + {objective['spread']}" if objective.get("spread_weight") else kind,
        batch=tree.data.batch_size,
        steps=tree.optim.steps,
        **{fact.lower(): facts.get(fact, "") for fact in FACTS_OF_RECIPES},
        deviates=deviations(name),
        unknown=our_choices(name),
    )


def recipe_table(recipes: list[Recipe]) -> str:
    """A row a recipe, and under it data, cost, and what is unknown."""
    rows = [("recipe", "stage", "parameters", "objective", "batch", "steps")]
    rows += [(r.name, r.stage, f"{r.parameters:,}", r.objective, f"{r.batch:,}", f"{r.steps:,}") for r in recipes]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row, recipe in zip(rows, [None, *recipes], strict=True):
        cells = [
            cell.rjust(width) if i in (2, 4, 5) else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
        if recipe is not None:
            notes = {fact.lower(): getattr(recipe, fact.lower()) for fact in FACTS_OF_RECIPES}
            notes["deviates"] = " ".join(recipe.deviates)
            notes["unknown"] = ", ".join(recipe.unknown)
            lines += [f"    {name:<8} {text}" for name, text in notes.items() if text]
    return "\n".join(
        [
            *lines,
            "",
            (
                "unknown: our choice, never presented as theirs. 'pretrain recipes name=…' shows a recipe in full, with"
                " the source of every value."
            ),
        ]
    )
