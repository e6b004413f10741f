"""Recipes: each builds at full size, says where every value is from, and trains at scale=smoke on real slides."""

import json
import math
import re
import subprocess
import sys
import time
import timeit
from functools import cache
from pathlib import Path

import pytest
import timm
import torch
from omegaconf import DictConfig, OmegaConf

from data.fault import Fault
from pretrain.commands import recipes
from pretrain.encoders import init
from pretrain.encoders.loading import load_encoder
from pretrain.objectives.interface import Objective
from pretrain.run.folder import flat
from pretrain.settings import plugins
from pretrain.settings.composition import load
from pretrain.settings.config_files import CONFIGS, comments
from pretrain.training.optimisation import Optim, rates_at, scaled_lr
from tests.pretrain.objectives.tile_objectives import teacher_file

ROOT = Path(__file__).resolve().parents[3]
# Encoder parameters as published (mask token left out), and what their count has more or less than ours and why.
PUBLISHED = {
    "gigapath_tile": (1_134_953_984, 0),
    "virchow": (631_229_184, 0),
    "virchow2": (631_239_424, 4 * 1280),  # their registers have positions too
    "uni": (303_350_784, 0),
    "openmidnight": (1_134_774_272, -1536),  # their class token's position is folded into it
    "dinov2_vitl16_short": (303_350_784, 0),  # UNI's network
    "midnight": None,
    "midnight_highres": None,
    "kaiko_dino_vits16": None,
    "kaiko_dinov2_vitl14": None,
    "campanella_dino": (21_665_664, 0),  # 21.7 M, as published
    "campanella_mae": (303_301_632, 0),  # 303.3 M, as published
    "dinov2_vitg14": None,
    "dinov3_vitl16": None,
    "dinov3_gram": None,
    "dinov3_highres": None,
    "openmidnight_highres": None,
    "uni_highres": None,
    "dino_vits16": (21_665_664, 0),  # as DINO's ViT-S/16 has
    "hipt_vits16": (21_665_664, 0),  # the same network
    "phikon_v2": (303_350_784, 0),  # UNI's network
    "patho_ssl_vitl14": None,
    "roth_vits14": None,
    "rudolfv": None,
    "hibou_b": None,
    "hibou_l": None,
    "nanopath": None,
    "nanopath_jepa": None,
    "distil_vits": None,
}
# Networks of timm that recipes are of, at 224 px, where no number was published for theirs.
OF_TIMM = {
    "patho_ssl_vitl14": "vit_large_patch14_dinov2",
    "roth_vits14": "vit_small_patch14_dinov2",
    "rudolfv": "vit_large_patch14_reg4_dinov2",
    "hibou_b": "vit_base_patch14_reg4_dinov2",
    "hibou_l": "vit_large_patch14_reg4_dinov2",
    "midnight": "vit_giant_patch14_dinov2",
}
# What a recipe has to be given.
GIVEN_WORDS = {"distil_vits": [f"objective.teacher={teacher_file()}", "objective.teacher_heads=3"]}
# The width of a network is four numbers, its heads' another three, and the batch brings its lanes and groups along.
SHRUNK = {
    *(f"model.{name}" for name in ("width", "depth", "heads", "feed_forward_width")),
    *(
        f"objective.{name}"
        for name in ("prototypes", "bottleneck", "hidden", "ibot_prototypes", "ibot_bottleneck", "group_size")
    ),
    *(f"objective.{net}_{size}" for net in ("decoder", "predictor") for size in ("width", "depth", "heads")),
    *(f"data.{name}" for name in ("batch_size", "lanes")),
    *(
        f"optim.{name}"
        for name in (
            "steps",
            "schedule_steps",
            "warmup_steps",
            "cosine_steps",
            "frozen_last_layer_steps",
            "frozen_backbone_steps",
        )
    ),
    *("objective.teacher_temperature_warmup", "objective.gram_every", "init"),
}
# Published recipes of slide encoders, and a part of what is said to be public of each.
OF_SLIDES = {
    "gigapath_slide": "the encoder's code and weights",
    "moozy_slide": "its training code",
    "titan_slide": "of this stage the paper's text, and no code",
    "ticon": "no training code",
}
TILE_SIZES = {
    "virchow2": 392,
    "openmidnight_highres": 448,
    **dict.fromkeys(("midnight_highres", "dinov3_highres", "uni_highres"), 512),
}  # pixels; 256 for the others
SWEEP = """
import sys
from pretrain.commands import shard, tile
from pretrain.settings.composition import load

out, slides, *recipes = sys.argv[1:]
for size in sorted({recipe.partition(":")[2] for recipe in recipes}):
    shard.run(load("shard", [f"slides={slides}", f"out={out}/tiles-{size}", f"tile_size={size}", "workers=1"]).object())
for recipe in recipes:
    name, _, size = recipe.partition(":")
    more = {"midnight_highres": [f"init={out}/midnight"], "distil_vits": [f"objective.teacher={out}/midnight"]}.get(name, [])
    tile.run(load("tile", [f"recipe={name}", "scale=smoke", f"run={out}/{name}", "data=tiles", f"data.shards={out}/tiles-{size}", "trainer.accelerator=cpu", *more]).object())
"""


# README's commands train DINOv2; of recipes the one that differs most from it is in the default suite, the others are slow.
QUICK = ["campanella_mae"]
SLOW = [name for name in PUBLISHED if name not in QUICK]


def sweep(names: list[str], shared: Path, out: Path) -> Path:
    """Train recipes one after the other in one process of its own, on tiles cut once from a real slide."""
    arguments = [f"{name}:{TILE_SIZES.get(name, 256)}" for name in names]
    slides = str(shared / "slides" / "whole" / "CMU-1-Small-Region.svs")
    # On two cores a loader and a trainer with a thread each are fastest at this size.
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(out)}
    command = [sys.executable, "-c", SWEEP, str(out), slides, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100 + 60 * len(names), env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def quick_runs(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sweep(QUICK, shared, tmp_path_factory.mktemp("recipes"))


@pytest.fixture(scope="module")
def slow_runs(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sweep(SLOW, shared, tmp_path_factory.mktemp("recipes"))


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_each_recipe_trains_for_twenty_steps_on_real_slides(name: str, request: pytest.FixtureRequest) -> None:
    runs = request.getfixturevalue("quick_runs" if name in QUICK else "slow_runs")
    metrics = [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in metrics] == list(range(1, 21))
    assert all(
        math.isfinite(record["loss"]) and record["skipped"] == 0 and record["grad_norm"] > 0 for record in metrics
    )
    assert len({record["loss"] for record in metrics}) == 20
    encoder = load_encoder(str(runs / name), device="cpu")
    assert encoder.embed(torch.full((2, 256, 256, 3), 128, dtype=torch.uint8)).isfinite().all()
    assert (runs / name / "samples" / "step-00000000.png").stat().st_size > 1000


@pytest.mark.slow
def test_the_second_stage_starts_from_the_first_ones_encoder(slow_runs: Path) -> None:
    settings = load("tile", ["recipe=midnight_highres"]).tree
    assert settings.data.crops.global_size == 392 and settings.model.image_size == 392
    first, second = (
        load_encoder(str(slow_runs / name), device="cpu").module.state_dict()
        for name in ("midnight", "midnight_highres")
    )
    weight = "blocks.0.attn.qkv.weight"  # twenty small steps apart; two random draws would be unrelated
    assert torch.nn.functional.cosine_similarity(first[weight].flatten(), second[weight].flatten(), dim=0) > 0.9


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_recipe_builds_at_full_size_in_under_a_second(name: str) -> None:
    words = [f"recipe={name}", "run=r", "data=tiles", "data.shards=s", "init=null", *GIVEN_WORDS.get(name, [])]
    config = load("tile", words).object()

    def build() -> Objective:
        with torch.device("meta"):
            return plugins.build(config.objective, lambda: plugins.build(config.model))

    # Of this thread alone, and tried three times: a busy machine may take any one of them.
    assert any(timeit.timeit(build, timer=time.thread_time, number=1) < 1 for _ in range(3))
    if PUBLISHED[name]:
        published, difference = PUBLISHED[name]
        assert recipes.describe_recipe(name).parameters + difference == published
    assert all(parameter.is_meta for parameter in build().parameters())


@pytest.mark.parametrize("name", OF_TIMM)
def test_recipes_without_a_published_number_of_parameters_have_that_of_timms_network(name: str) -> None:
    with torch.device("meta"):
        theirs = timm.create_model(OF_TIMM[name], num_classes=0, img_size=224)
    with_own_place = theirs.embed_dim if "reg4" in OF_TIMM[name] else 0  # timm's class token has none beside registers
    count = sum(parameter.numel() for parameter in theirs.parameters())
    assert recipes.describe_recipe(name).parameters == count + with_own_place


SOURCE = re.compile(r"arXiv|paper|[\w-]/[\w-]|\.yaml|\.py|README|card|issue|repository|from memory|code|config")


def marks(name: str) -> dict[str, str]:
    """What the heading of a recipe says P, S and M are, those of a recipe that it refers to included."""
    text = " ".join(line.removeprefix("# ") for line in recipes.heading(recipes.path(name)))
    found = marks(other.group(1)) if (other := re.search(r"Marks as in (\w+)", text)) else {}
    return found | {
        mark: said for mark, said in re.findall(r"\b([PSM]): (.+?)(?=[.;] |\)|$)", text) if SOURCE.search(said)
    }


@pytest.mark.parametrize("name", [*PUBLISHED, *OF_SLIDES])
def test_every_mark_of_a_recipe_has_a_source_in_its_heading(name: str) -> None:
    used = {mark for said in comments(recipes.path(name)).values() for mark in re.findall(r"(?:^|; )([PSM])\b", said)}
    assert used and used <= marks(name).keys(), used - marks(name).keys()


@pytest.mark.parametrize("name", [*PUBLISHED, *sorted(OF_SLIDES.keys() - {"gigapath_slide"})])
def test_every_value_says_where_it_is_from(name: str) -> None:
    said = comments(CONFIGS / "recipe" / f"{name}.yaml")
    assert len(said) >= 5
    for key, comment in said.items():
        assert comment.startswith(("P", "S", "M", "?: our choice")), f"{key}: {comment!r}"
        assert "?:" not in comment or "?: our choice" in comment, f"{key}: {comment!r}"


@cache
def tree_of(command: str, name: str, scale: str) -> DictConfig:
    """A recipe's values, on tile shards in the tile stage."""
    place = ["data=tiles", "data.shards=s"] if command == "tile" else []
    return load(command, [f"recipe={name}", f"scale={scale}", "run=r", *place]).tree


@pytest.mark.parametrize(
    ("command", "name"), [("tile", name) for name in PUBLISHED] + [("slide", name) for name in OF_SLIDES]
)
def test_at_smoke_scale_the_rate_of_some_step_is_at_least_half_of_the_recipes_peak(command: str, name: str) -> None:
    tree = tree_of(command, name, "smoke")
    optim, batch = OmegaConf.to_object(tree.optim), tree.data.batch_size
    assert isinstance(optim, Optim)
    rates = [rates_at(step, optim, batch)[0] for step in range(optim.steps)]
    assert max(rates) >= max(scaled_lr(optim, batch), optim.lr_final) / 2 > 0


@pytest.mark.parametrize("name", PUBLISHED)
def test_smoke_shrinks_width_depth_batch_and_steps_and_nothing_else(name: str) -> None:
    full, smoke = (flat(OmegaConf.to_container(tree_of("tile", name, scale))) for scale in ("full", "smoke"))  # type: ignore[arg-type]
    assert {key for key in full if full[key] != smoke[key]} <= SHRUNK
    assert smoke["optim.steps"] == 20 and smoke["model.width"] < full["model.width"]


def test_the_command_line_wins_over_scale_and_scale_over_the_recipe() -> None:
    composed = load("tile", ["recipe=virchow", "scale=smoke", "model.depth=3"])
    assert (composed.tree.model.width, composed.tree.model.depth, composed.tree.model.registers) == (32, 3, 0)
    assert composed.tree.model.feed_forward == "swiglu"
    order = [file.parent.name for _, file in composed.files]
    assert (
        order.index("recipe") < order.index("scale") and order[-2:] == ["scale", "objective"] and order[0] == "configs"
    )


def test_a_second_stage_without_its_first_one_ends_in_one_sentence_that_names_it() -> None:
    config = load("tile", ["recipe=midnight_highres", "run=r", "data=tiles", "data.shards=s"]).object()
    with pytest.raises(Fault, match="runs/midnight"):
        init.find_encoder(config.init)


def test_openmidnights_term_is_corrected_unless_its_published_sign_is_asked_for() -> None:
    assert load("tile", ["recipe=openmidnight"]).tree.objective.spread == "kde"
    published = load("tile", ["recipe=openmidnight", "objective.spread=kde_as_published"])
    assert published.tree.objective.spread == "kde_as_published"
    assert published.tree.optim.schedule_steps == 40 * published.tree.optim.steps == 10_000_000


def test_the_table_names_every_recipe_its_size_and_what_is_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    recipes.run(recipes.Config(None))
    text = capsys.readouterr().out
    rows = {line.split()[0]: line for line in text.splitlines() if line and not line.startswith(" ")}
    assert set(recipes.names()) <= rows.keys() and set(PUBLISHED) <= rows.keys()
    assert (
        "1,134,953,984" in rows["gigapath_tile"]
        and "86,330,880" in rows["gigapath_slide"]
        and "slide" in rows["gigapath_slide"]
    )
    assert "SlideIBOT + koleo" not in text and "14,400" in rows["moozy_slide"]
    assert "DINOv2 + kde" in rows["midnight"] and "1,000,000" in rows["midnight"]
    assert "43,709,952" in rows["titan_slide"] and "172,354,560" in rows["ticon"]  # of embeddings 1536 wide
    notes = {name: text[text.index(f"\n{name} ") :].split("\n")[2:7] for name in OF_SLIDES}
    for name, part in OF_SLIDES.items():
        (public,) = (note for note in notes[name] if note.startswith("    public"))
        assert part in public
    assert "optim.lr," in notes["titan_slide"][-1] and "data.mask_ratio" not in notes["gigapath_slide"][-1]
    assert recipes.describe_recipe("titan_slide").deviates[0].startswith("Left out: posterisation of features (S)")
    assert [said.partition(":")[0] for said in recipes.describe_recipe("titan_slide").deviates] == [
        "Left out",
        "Differs",
    ]
    assert (
        text.count("    deviates Left out: RandStainNA, a stain augmentation of theirs (S).") == 2
    )  # hibou_l stands on hibou_b
    assert "667 H100-hours" in text and "optim.lr" in recipes.describe_recipe("virchow").unknown
    assert recipes.describe_recipe("small").unknown == []  # nothing about it was ever published


def test_one_recipe_is_shown_in_full_with_the_source_of_every_value(capsys: pytest.CaptureFixture[str]) -> None:
    recipes.run(recipes.Config("midnight"))
    text = capsys.readouterr().out
    assert text.startswith("# Midnight (Karasikov et al. 2025")
    lines = {line.split(":")[0].strip(): line for line in text.splitlines()}
    assert "S" in lines["steps"] and "[recipe/midnight]" in lines["steps"]
    assert "[recipe/dinov2_vitg14]" in lines["bottleneck"]  # inherited, and said to be
    with pytest.raises(Fault, match="did you mean 'midnight'"):
        recipes.run(recipes.Config("midnigth"))
