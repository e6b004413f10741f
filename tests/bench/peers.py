"""Our small DINOv2 beside LightlyTrain's: the same network, crops, batch, precision and heads, on one core, in turns.

    make bench-peers                            three turns of 20 and 80 steps each, then 128,000 tiles (an hour and a quarter)
    make bench-peers ARGS="SEEN=16000 TURNS=1"  less of it
    make bench-peers ARGS="dinov2:model.depth=4"    another network, crops, batch or heads, for both

Speed: tiles for each processor second, workers included, of 80 less 20 steps: what starts a run isn't counted. Both in
bfloat16, ours with compiled blocks (LightlyTrain doesn't compile this method). Learned: 20 nearest neighbours, and a
linear classifier, on tiles of other slides, as in `learning.py`, at 64,000 and at 128,000 tiles; each beside its own
random weights. LightlyTrain lays its schedules out for either; ours are the recipe's, half way and at their end.
``ours_at_equal_seconds``: ours after as many processor seconds as LightlyTrain took for 64,000 tiles, at the checkpoint
before.

What isn't the same: LightlyTrain's settings are its own beyond those that `theirs` hands over (colour, learning rate,
layer decay, weight decay, no turns and vertical flips, a softmax in place of Sinkhorn-Knopp), as it comes; ours were
tuned on these very tiles.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from omegaconf import OmegaConf

from data.fault import Fault
from pretrain.probing.images import LabelledImages
from pretrain.probing.scores import score
from tests.bench.learning import (
    LOOKED_AT,
    RECIPES,
    Asked,
    Judge,
    Run,
    images,
    make_folder,
    recipe_of,
    whole_number,
    write_shards,
)

ROOT = Path(__file__).resolve().parents[2]
PEERS = ROOT / ".venv-peers" / "bin" / "python"
SHORT, LONG = 20, 80  # steps
HALF = 64_000  # tiles


HANDED_OVER = {
    "batch": "data.batch_size",
    "size": "data.crops.global_size",
    "patch": "model.patch_size",
    "width": "model.width",
    "depth": "model.depth",
    "heads": "model.heads",
    "prototypes": "objective.prototypes",
    "hidden": "objective.hidden",
    "bottleneck": "objective.bottleneck",
    "locals": "data.crops.local_count",
    "local_size": "data.crops.local_size",
    "frozen": "optim.frozen_last_layer_steps",
    "temperature_warmup": "objective.teacher_temperature_warmup",
}
"""What LightlyTrain is told, and which setting of ours says it."""
ALONG = {"model.image_size", "model.feed_forward_width"}
"""Settings that follow from these: the size of an image is the crop's, a block's inner width four times the width."""


def asked_of_both(arguments: list[str]) -> tuple[Asked, int]:
    """What the command line says, and the number of turns. Raises SystemExit for what would be given to one side
    alone, or to neither."""
    words, turns = [], 3
    for word in arguments:
        name, _, value = word.partition("=")
        if name == "TURNS":
            turns = whole_number(word, value)
            if turns < 1:
                raise SystemExit(f"{word}: speed is compared in one turn at least")
            continue
        if name in ("SEEDS", "OBJECTIVES") or name.partition(":")[0] in RECIPES.keys() - {"dinov2"}:
            raise SystemExit(f"{word}: peers are compared with one seed of dinov2; leave it out")
        key = name.removeprefix("dinov2:")
        if key != name and key not in {*HANDED_OVER.values(), *ALONG}:
            raise SystemExit(
                f"{word} would be ours alone: what both get is {', '.join(HANDED_OVER.values())}; 'make bench-learning'"
                " takes any setting"
            )
        words.append(word)
    asked = Asked.parse(["OBJECTIVES=dinov2", *words])
    recipe = recipe_of("dinov2", asked.settings["dinov2"])
    if recipe.model.feed_forward_width != 4 * recipe.model.width:
        raise SystemExit(
            f"LightlyTrain's blocks are four times as wide inside: give dinov2:model.feed_forward_width={4 * recipe.model.width}"
        )
    if recipe.model.image_size != recipe.data.crops.global_size:
        raise SystemExit(
            f"LightlyTrain's images are its crops: give dinov2:model.image_size={recipe.data.crops.global_size}"
        )
    return asked, turns


def ours(asked: Asked, folder: str, steps: int, settings: list[str]) -> Run:
    """A run of ours, begun anew, on the first core."""
    shutil.rmtree(asked.out / folder, ignore_errors=True)
    run = Run("dinov2", 0, asked.out / folder, 0, settings)
    run.tiles = steps * run.batch_size
    run.start(asked.shards)
    return run


WARM_UP = 20  # steps of LightlyTrain: its own warm-up is longer than these runs


def theirs(asked: Asked, folder: str, steps: int, judge: list[str]) -> float:
    """A run of LightlyTrain's to its end: processor seconds."""
    recipe = recipe_of("dinov2", asked.settings["dinov2"])
    words = {
        "tiles": str(asked.tiles),
        "out": str((asked.out / folder).resolve()),
        "steps": steps,
        "seed": 0,
        "judge": judge,
        "warmup": WARM_UP,
        **{name: OmegaConf.select(recipe, setting) for name, setting in HANDED_OVER.items()},
    }
    log = (asked.out / f"{folder}.log").open("w")
    done = subprocess.run(
        [PEERS, str(Path(__file__).with_name("lightly_peer.py")), json.dumps(words)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"LightlyTrain failed: see {log.name}")
    return float(json.loads(done.stdout.splitlines()[-1])["cpu_seconds"])


def main() -> None:
    try:
        compare(*asked_of_both(sys.argv[1:]))
    except Fault as fault:
        raise SystemExit(str(fault)) from fault


def compare(asked: Asked, turns: int) -> None:
    """Both in turns, then both to the end."""
    if asked.out == Asked.out:
        asked.out = asked.out.with_name("bench-peers")
    if asked.other is None:
        raise SystemExit(f"{asked.tiles} has no tiles of other slides beside it: give OTHER=folder of class folders")
    make_folder(asked.out)
    if not PEERS.exists():
        raise SystemExit("LightlyTrain is not here: make bench-peers installs it into .venv-peers")
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    tiles, other, what = images(asked)
    judge = Judge(tiles, other)
    write_shards(tiles, asked.shards)
    settings = asked.settings["dinov2"]
    speeds: dict[str, list[float]] = {"ours": [], "lightly": []}
    batch = Run("dinov2", 0, asked.out, 0, settings).batch_size
    ours(asked, "warm", 8, settings).wait()  # compiles what the others find compiled
    for turn in range(turns):
        seconds: dict[str, list[float]] = {"ours": [], "lightly": []}
        for steps in (SHORT, LONG):
            seconds["ours"].append(ours(asked, f"speed-{turn}-{steps}", steps, settings).wait())
            seconds["lightly"].append(theirs(asked, f"lightly-{turn}-{steps}", steps, []))
        for name, (short, long) in seconds.items():
            speeds[name].append((LONG - SHORT) * batch / (long - short))
        print(
            f"turn {turn + 1}: ours {speeds['ours'][-1]:.1f}, LightlyTrain {speeds['lightly'][-1]:.1f} tiles a"
            " processor second",
            flush=True,
        )
    ratio = median(a / b for a, b in zip(speeds["ours"], speeds["lightly"], strict=True))
    run = ours(asked, "learned", asked.seen // batch, settings)
    a_tile = run.wait() / asked.seen  # processor seconds
    figures = {"ours_random": judge(run.untrained(0).embed_each)[0].knn}
    folders = [str(one.folder.resolve()) for one in (tiles, other)]
    for seen in sorted({min(HALF, asked.seen), asked.seen}):
        ending = "" if seen <= HALF else f"_at_{seen}"
        found, _ = judge(run.encoder(seen).embed_each)
        figures |= {f"ours{ending}": found.knn, f"ours_linear{ending}": found.linear}
        seconds = theirs(asked, f"lightly-{seen}", seen // batch, folders)
        figures |= {f"ours_seconds{ending}": a_tile * seen, f"lightly_seconds{ending}": seconds}
        for name, key in (("lightly", "trained"), ("lightly_random", "random")):
            bank, asking = (np.load(asked.out / f"lightly-{seen}-{key}-{number}.npy") for number in range(2))
            found = score(bank, by_class(tiles), asking, by_class(other), len(tiles.classes))
            figures |= {f"{name}{ending}": found.knn, f"{name}_linear{ending}": found.linear}
        then = min(asked.seen, int(seconds / a_tile) // LOOKED_AT[0] * LOOKED_AT[0])
        if seen <= HALF and then:
            figures["ours_tiles_at_equal_seconds"] = then
            figures["ours_at_equal_seconds"] = judge(run.encoder(then).embed_each)[0].knn
    error = (0.25 / len(other.files)) ** 0.5  # the binomial's at its widest
    print(f"\nk-NN on {what}, after {HALF:,} tiles or as many as are said; standard error at most {error:.3f}")
    for name, value in figures.items():
        print(f"{name:<30}{value:.3f}")
    line = {name: round(value, 4) for name, value in figures.items()} | {
        "standard_error": round(error, 3),
        "speed_ratio": round(ratio, 3),
        **{f"{name}_tiles_per_cpu_second": round(median(values), 1) for name, values in speeds.items()},
    }
    print(json.dumps(line))


def by_class(images: LabelledImages) -> np.ndarray:
    """Labels in the order in which the peer embeds: by class, then by name."""
    return np.array([label for label, _ in sorted(zip(images.labels.tolist(), images.files, strict=True))])


if __name__ == "__main__":
    main()
