"""Our small DINOv2 beside LightlyTrain's: the same network, crops, batch, precision and heads, on one core, in turns.

    make bench-peers                            three turns of 20 and 80 steps each, then 128,000 tiles (an hour and a quarter)
    make bench-peers ARGS="SEEN=16000 TURNS=1"  less of it

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

from pretrain.probing.images import LabelledImages
from pretrain.probing.scores import score
from pretrain.settings.composition import load
from tests.bench.learning import LOOKED_AT, Asked, Judge, Run, images, write_shards

ROOT = Path(__file__).resolve().parents[2]
PEERS = ROOT / ".venv-peers" / "bin" / "python"
SHORT, LONG = 20, 80  # steps
HALF = 64_000  # tiles


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
    config = load("tile", ["recipe=small", "run=none", "data.shards=none"]).tree
    words = {
        "tiles": str(asked.tiles),
        "out": str((asked.out / folder).resolve()),
        "steps": steps,
        "seed": 0,
        "judge": judge,
        "batch": config.data.batch_size,
        "size": config.data.crops.global_size,
        "patch": config.model.patch_size,
        "width": config.model.width,
        "depth": config.model.depth,
        "heads": config.model.heads,
        "prototypes": config.objective.prototypes,
        "hidden": config.objective.hidden,
        "bottleneck": config.objective.bottleneck,
        "locals": config.data.crops.local_count,
        "local_size": config.data.crops.local_size,
        "warmup": WARM_UP,
        "frozen": config.optim.frozen_last_layer_steps,
        "temperature_warmup": config.objective.teacher_temperature_warmup,
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
    words, turns = [], 3
    for word in sys.argv[1:]:
        turns = int(word.removeprefix("TURNS=")) if word.startswith("TURNS=") else turns
        words += [] if word.startswith("TURNS=") else [word]
    asked = Asked.parse(words)
    if asked.out == Asked.out:
        asked.out = asked.out.with_name("bench-peers")
    if asked.other is None:
        raise SystemExit(f"{asked.tiles} has no tiles of other slides beside it: give OTHER=folder of class folders")
    asked.out.mkdir(parents=True, exist_ok=True)
    if not PEERS.exists():
        raise SystemExit("LightlyTrain is not here: make bench-peers installs it into .venv-peers")
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    tiles, other, what = images(asked)
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
    run, judge = ours(asked, "learned", asked.seen // batch, settings), Judge(tiles, other)
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
            bank, asking = (np.load(asked.out / f"lightly-{seen}-{key}-{Path(folder).name}.npy") for folder in folders)
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
