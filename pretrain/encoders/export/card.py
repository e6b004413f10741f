"""What a model card says of the run behind an encoder: what it was trained on and how, by which recipe and where it
deviates from it, and how it was judged."""

from pathlib import Path
from typing import Any

from data.json_files import read_object
from data.redaction import redacted
from pretrain.encoders.preprocessing import Preprocessing
from pretrain.encoders.run_checkpoint import RUN_CONFIG, RunCheckpoint
from pretrain.run.folder import read_starts
from pretrain.settings.shell_words import key_of

OF_NO_RECIPE = ("run", "launch", "trainer", "watch", "wandb", "allow_plugins", "allow_changes")
"""Words of a command line that aren't about what is learned."""


def facts(found: RunCheckpoint, preprocessing: Preprocessing | None = None) -> dict[str, str]:
    """Of an encoder's run, by name; ``preprocessing`` of a tile encoder."""
    config, starts = found.config, read_starts(found.run)
    data, optim = config.get("data") or {}, config.get("optim") or {}
    objective = str((config.get("objective") or {}).get("_target_", "not recorded")).rpartition(".")[2]
    step = int(found.folder.name.rpartition("-")[2]) if found.folder.name.startswith("step-") else None
    batch = data.get("batch_size")
    told = {
        "Objective": objective,
        "Recipe": recipe_and_deviations([start.get("command") or [] for start in starts]),
        "Steps": f"{step:,} of {optim.get('steps', step):,}, batches of {batch}" if step and batch else None,
        "Data": ", ".join(sources) if (sources := sources_of(data)) else None,
        "Starts from": config.get("init"),
    }
    if preprocessing is not None:
        told |= size_and_resolution((starts[-1] if starts else {}).get("tiles") or {}, preprocessing, data)
    return {name: str(redacted(str(value))) for name, value in told.items() if value}


def recipe_and_deviations(commands: list[list[str]]) -> str | None:
    """The recipe that the first start names, and what all starts' words set besides; None where none is named."""
    words = [word for command in commands for word in command if "=" in word]
    recipe = next((word.partition("=")[2] for word in words if word.startswith("recipe=")), None)
    if recipe is None:
        return None
    own = {key_of(word): word for word in words}
    others = [
        word
        for key, word in own.items()
        if key != "recipe" and key.partition(".")[0] not in OF_NO_RECIPE and key not in PATHS
    ]
    return f"{recipe}{', with ' + ', '.join(others) if others else ''}"


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
    given = [data.get(key) for key in ("shards", "slides", "files", "embeddings")]
    found = [str(one) for value in given if value for one in (value if isinstance(value, list) else [value])]
    return found + [source for member in (data.get("members") or {}).values() for source in sources_of(member)]


def size_and_resolution(
    tiles: dict[str, Any], preprocessing: Preprocessing, data: dict[str, Any]
) -> dict[str, str | None]:
    """The size and the resolution that a tile encoder is meant for."""
    crops, pixels, mpp = data.get("crops") or {}, tiles.get("pixels"), tiles.get("mpp")
    scale = crops.get("global_scale")
    told: dict[str, str | None] = {
        "Tiles": f"{tiles['tiles']:,}" if "tiles" in tiles else None,
        "Size of a tile": f"{pixels[1]} × {pixels[0]} px" if pixels else None,
        "Resolution of a tile": None,
        "Views": f"global crops of {scale[0]:.0%} to {scale[1]:.0%} of a tile, scaled to {crops['global_size']} px"
        if scale
        else None,
    }
    if mpp:
        low, middle, high = mpp
        told["Resolution of a tile"] = (
            f"{middle:g} µm/px" if low == high else f"{low:g} to {high:g} µm/px, median {middle:g}"
        )
        if pixels:
            side = min(pixels) * middle
            told["Meant for"] = (
                f"tiles of {side:.4g} µm a side, as {min(pixels)} px at {middle:g} µm/px; scaled to the input they are"
                f" {side / preprocessing.resize_to:.3g} µm/px"
            )
    else:
        told["Resolution of a tile"] = "not recorded: find out before you use it"
    return told


def as_lines(told: dict[str, str]) -> str:
    """Facts as a table of Markdown."""
    rows = "\n".join(f"| {name} | {value.replace('|', '/')} |" for name, value in told.items())
    return f"| | |\n|---|---|\n{rows}\n"


def judged(run: Path) -> str:
    """The scores that ``pretrain probe`` left in the run's folder, as a section; empty where it has none."""
    path = run / "probe.json"
    if not path.is_file():
        return ""
    probe = read_object(path, {"scores", "test", "classes", "split"}, f"write it again with pretrain probe out={path}")
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


def whole_record(run: Path) -> str:
    """The run's configuration and provenance, as sections."""
    path = run / "provenance.json"
    told = f"\nProvenance:\n\n```json\n{redacted(path.read_text().strip())}\n```\n" if path.is_file() else ""
    return f"The whole configuration:\n\n```yaml\n{redacted((run / RUN_CONFIG).read_text().strip())}\n```\n{told}"
