"""What a model card says of the run behind an encoder: what it was trained on and how, by which recipe and where it
deviates from it, where that differs from what was published, and how it was judged. A card is made to be handed on: it
names no host, no folders and no command."""

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from data.json_files import read_object
from data.redaction import redacted
from pretrain.encoders.export.where_things_lie import without_folders, without_places
from pretrain.encoders.frozen import EMBEDDING_PRECISIONS, fingerprint_prepared
from pretrain.encoders.preprocessing import Preprocessing
from pretrain.encoders.run_checkpoint import RunCheckpoint
from pretrain.encoders.slide_encoders import load_slide_encoder
from pretrain.encoders.tiles_seen import sides_seen
from pretrain.run.folder import read_starts
from pretrain.run.progress import say
from pretrain.settings.recipe_headings import deviations, our_choices
from pretrain.settings.shell_words import key_of

OF_NO_RECIPE = ("run", "launch", "trainer", "watch", "wandb", "allow_plugins", "allow_changes")
"""Words of a command line that aren't about what is learned."""
PUBLIC_OF_A_START = ("time", "changes", "data", "python", "packages", "git")
"""What a card repeats of each start that ``provenance.json`` lists."""


def parameters_in_words(count: int) -> str:
    """``1.14 B``, ``86.6 M``, ``25.9 k``."""
    if count >= 1e9:
        return f"{count / 1e9:.2f} B"
    return f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count / 1e3:.1f} k"


def facts(found: RunCheckpoint, preprocessing: Preprocessing | None = None) -> dict[str, str]:
    """Of an encoder's run, by name; ``preprocessing`` of a tile encoder."""
    config, starts = found.config, read_starts(found.run)
    data, optim = config.get("data") or {}, config.get("optim") or {}
    objective = str((config.get("objective") or {}).get("_target_", "not recorded")).rpartition(".")[2]
    step = int(found.folder.name.rpartition("-")[2]) if found.folder.name.startswith("step-") else None
    batch = data.get("batch_size")
    told = {
        "Objective": objective,
        "Recipe": without_folders(recipe_and_deviations(commands_of(starts)) or ""),
        "Steps": f"{step:,} of {optim.get('steps', step):,}, batches of {batch}" if step and batch else None,
        "Data": ", ".join(sources) if (sources := sources_of(data)) else None,
        "Starts from": without_places(config.get("init")),
    }
    if preprocessing is not None:
        told |= size_and_resolution((starts[-1] if starts else {}).get("tiles") or {}, preprocessing, data)
    return {name: redacted(str(value)) for name, value in told.items() if value}


def commands_of(starts: list[dict[str, Any]]) -> list[list[str]]:
    """The command lines of a run's starts, in words."""
    return [start.get("command") or [] for start in starts]


def recipe_of(commands: list[list[str]]) -> str | None:
    """The recipe that the first start names."""
    named = (word for command in commands for word in command if word.startswith("recipe="))
    return next((word.partition("=")[2] for word in named), None)


def recipe_and_deviations(commands: list[list[str]]) -> str | None:
    """The recipe, and what all starts' words set besides; None where none is named."""
    words = [word for command in commands for word in command if "=" in word]
    recipe = recipe_of(commands)
    if recipe is None:
        return None
    own = {key_of(word): word for word in words}
    others = [
        word
        for key, word in own.items()
        if key != "recipe" and key.partition(".")[0] not in OF_NO_RECIPE and key not in PATHS
    ]
    return f"{recipe}{', with ' + ', '.join(others) if others else ''}"


def published_differences(run: Path) -> str:
    """Where the run's recipe differs from what was published, and what nobody knows of that, as a section; empty where
    the recipe says neither."""
    recipe = recipe_of(commands_of(read_starts(run)))
    sentences, unknown = (deviations(recipe), our_choices(recipe)) if recipe else ([], [])
    if unknown:
        values = "One value isn't" if len(unknown) == 1 else f"{len(unknown)} values aren't"
        sentences.append(f"{values} known, and our choice: {', '.join(f'`{key}`' for key in unknown)}.")
    if not sentences:
        return ""
    listed = "\n".join(f"- {sentence}" for sentence in sentences)
    return f"""
## How this recipe differs from the published one

Of `{recipe}`, as this version of Slidewright has it:

{listed}
"""


PATHS = (
    "data.shards",
    "data.slides",
    "data.files",
    "data.grids",
    "data.index",
    "data.embeddings",
    "data.sample",
    "init",
)
"""Settings that say where things are, which a recipe leaves to the user."""


def sources_of(data: dict[str, Any]) -> list[str]:
    """Where the tiles or embeddings came from."""
    of_kinds = [(key, data.get(key)) for key in ("shards", "slides", "files", "embeddings")]
    given = [(key, str(one)) for key, some in of_kinds if some for one in (some if isinstance(some, list) else [some])]
    found = [without_places(one, key) for key, one in given]
    return found + [source for member in (data.get("members") or {}).values() for source in sources_of(member)]


def size_and_resolution(
    tiles: dict[str, Any], preprocessing: Preprocessing, data: dict[str, Any]
) -> dict[str, str | None]:
    """The size and the resolution that a tile encoder is meant for."""
    crops, pixels, mpp = data.get("crops") or {}, tiles.get("pixels"), tiles.get("mpp")
    scale = crops.get("global_scale")
    told: dict[str, str | None] = {
        "Tiles": f"{tiles['tiles']:,}" if "tiles" in tiles else None,
        "Size of a tile": f"{pixels[1]} × {pixels[0]} px" if pixels else sizes_in_words(tiles),
        "Resolution of a tile": None,
        "Views": f"global crops of {scale[0]:.0%} to {scale[1]:.0%} of a tile, scaled to {crops['global_size']} px"
        if scale
        else None,
    }
    if mpp:
        low, middle, high = mpp
        scales = scales_of(data) or ([middle] if low == high else [])
        seen = ": tiles of each were seen" if len(scales) > 1 else ""
        told["Resolution of a tile"] = (
            f"{in_a_row(scales)}{seen}" if scales else f"{low:g} to {high:g} µm/px, median {middle:g}"
        )
        if pixels:
            px = min(pixels)
            ends = scales or [low, high]
            sides, inputs = ([px * one for one in ends], [px * one / preprocessing.resize_to for one in ends])
            joint = " and " if scales else " to "
            told["Meant for"] = (
                f"tiles of {in_a_row(sides, 'µm', '.4g', joint)} a side, as {px} px at {in_a_row(ends, joint=joint)};"
                f" scaled to the input they are {in_a_row(inputs, digits='.3g', joint=joint)}"
            )
        elif sides := sides_seen(tiles):
            told["Meant for"] = f"tiles of {in_a_row(sides, 'µm', '.4g')} a side"
    else:
        told["Resolution of a tile"] = "not recorded: find out before you use it"
    return told


def sizes_in_words(tiles: dict[str, Any]) -> str | None:
    """``224 × 224 px at 1 µm/px, 64 × 64 px at 0.5 µm/px``; None where one size is all, or none is known."""
    told = (
        f"{width} × {height} px" + (f" at {mpp:g} µm/px" if mpp else "")
        for height, width, mpp in tiles.get("sizes", [])
    )
    return ", ".join(told) or None


def scales_of(data: dict[str, Any]) -> list[float]:
    """The several µm/px at which the settings have tiles read from slides; none where tiles have what they have, or one
    is drawn between two."""
    members = (data.get("members") or {}).values()
    if members:
        each = [scales_of(member) for member in members]
        return sorted({one for scales in each for one in scales}) if all(each) else []
    return sorted(data.get("mpp") or []) if data.get("mpp_law") == "values" and len(data.get("mpp") or []) > 1 else []


def in_a_row(numbers: list[float], unit: str = "µm/px", digits: str = "g", joint: str = " and ") -> str:
    """``0.25, 0.5 and 1 µm/px``."""
    *others, last = (f"{number:{digits}}" for number in numbers)
    return f"{', '.join(others)}{joint if others else ''}{last} {unit}"


def as_lines(told: dict[str, str]) -> str:
    """Facts as a table of Markdown."""
    rows = "\n".join(f"| {name} | {value.replace('|', '/')} |" for name, value in told.items())
    return f"| | |\n|---|---|\n{rows}\n"


def scores_of_these(
    found: RunCheckpoint, encoder: str, known_by: set[str], command: str, hashes: Callable[[], Collection[str]]
) -> dict[str, Any] | None:
    """The ``probe.json`` that a probe's ``command`` left in the run's folder; None where it left none, or judged other
    weights than are exported, which is said. ``encoder``: what it calls the encoder; ``hashes``: of the exported one."""
    path = found.run / "probe.json"
    if not path.is_file():
        return None
    probe = read_object(
        path, {encoder} | known_by, f"write it again with {command.partition(' checkpoint=')[0]} out={path}"
    )
    judged_one = probe[encoder] or {}
    if judged_one.get("hash") in hashes():
        return probe
    say(
        f"{path} judges {judged_one.get('name')}, other weights than are exported or prepared otherwise, so the card is"
        f" without scores: {command} out={path} judges these"
    )
    return None


def judged(found: RunCheckpoint, network: nn.Module, preprocessing: Preprocessing) -> str:
    """The scores of a tile encoder by labels of tiles, as a section; empty where there are none of these weights."""

    def hashes() -> list[str]:
        return [fingerprint_prepared(network, preprocessing, precision) for precision in EMBEDDING_PRECISIONS]

    command = f"pretrain probe checkpoint={found.folder} train=DIR"
    probe = scores_of_these(found, "encoder", {"scores", "test", "classes", "split"}, command, hashes)
    if probe is None:
        return ""
    rows = "\n".join(
        f"| {name} | {got['knn']:.3f} ± {got['knn_se']:.3f} | {got['linear']:.3f} ± {got['linear_se']:.3f} |"
        for name, got in probe["scores"].items()
    )
    return f"""
## Judged

Frozen, on {probe["test"]["images"]:,} images in {len(probe["classes"])} classes ({probe["split"]}), by `pretrain probe`:

| | k-NN | linear |
|---|---|---|
{rows}
"""


def judged_by_labels(found: RunCheckpoint) -> str:
    """The scores of a slide encoder by labels of slides, as a section; empty where there are none of these weights."""

    def hashes() -> list[str]:
        return [load_slide_encoder(str(found.folder), "cpu", found.plugins).hash]

    command = f"pretrain probe stage=slide checkpoint={found.folder} store=… labels=…"
    probe = scores_of_these(found, "slide_encoder", {"rows", "labels", "measure"}, command, hashes)
    if probe is None:
        return ""
    measure, labels = probe["measure"], probe["labels"]
    rows = "\n".join(
        f"| {name} | {got[measure]['value']:.3f} | {got[measure]['interval'][0]:.3f} to {got[measure]['interval'][1]:.3f} |"
        for name, got in probe["rows"].items()
        if None not in (got[measure]["value"], *got[measure]["interval"])
    )
    return f"""
## Judged

Frozen, by labels of {labels["slides"]:,} slides of {labels["cases"]:,} cases, by `pretrain probe stage=slide`:

| | {measure.replace("_", " ")} | 95 % interval |
|---|---|---|
{rows}
"""


def whole_record(found: RunCheckpoint) -> str:
    """The run's configuration and provenance, as sections, without where things lie: a card is handed on."""
    configuration = yaml.safe_dump(without_places(found.config), sort_keys=False, allow_unicode=True).strip()
    starts = [
        {name: without_places(start[name]) for name in PUBLIC_OF_A_START if name in start}
        for start in read_starts(found.run)
    ]
    provenance = redacted(json.dumps({"starts": starts}, indent=1, ensure_ascii=False))
    told = f"\nProvenance:\n\n```json\n{provenance}\n```\n" if starts else ""
    return f"""\
The configuration, of whose paths only the last parts are here; the whole record, with commands and machines, is in the run's folder:

```yaml
{redacted(configuration)}
```
{told}"""
