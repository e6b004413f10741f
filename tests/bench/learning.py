"""What 12 minutes on two cores teach a small ViT: DINOv2, DINO and MAE beside a colour histogram and random weights.

    python tests/bench/learning.py                                  three objectives × two seeds, about 75 minutes
    python tests/bench/learning.py OBJECTIVES=dinov2 SEEDS=0 MINUTES=3   less of it
    python tests/bench/learning.py dinov2:optim.lr=5e-4             settings of one objective, as 'pretrain tile' takes them

Network: ViT width 192, depth 6, 3 heads, patch 16, linear patch embedding; 2 × 96 + 4 × 48 pixels, batches of 64 (``recipe=small``;
MAE's of 32), in bfloat16 with compiled blocks.

Training: the unlabelled pixels of four fifths of TILES (class folders of images, ``../shared/tiles/crc5``), from random
weights. A run may use 2 cores × MINUTES of processor time, everything included (start-up, reading, decoding,
augmenting, checkpoints): as one process of one thread on each core, the seeds side by side. How many steps that is, is
measured first. Finished runs are kept in OUT; the same command goes on where it was stopped.

Evaluation, the same for all: the other fifth, which no run has seen, whole images scaled to 96 pixels; 20 nearest
neighbours by cosine, weighted as DINO weights them; class token of the teacher (MAE: of its encoder). *unseen*: one half of these images is the
bank that classifies the other half and the other way round, over ten stratified halvings; this is what the JSON line holds.
*all*: the bank is the four fifths. The same network's random weights are evaluated alike, before training.

Speed: tiles for each processor second of a run, everything included; beside it, taken last, those of a trainer written
without care (``plain_dinov2.py``), which reads and augments nothing: machines differ more than trainers.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass, field
from functools import cached_property
from io import BytesIO
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from data.keyed import rng
from data.shard_scan import scan
from pretrain.encoders import TileEncoder, load_encoder
from pretrain.probing import (
    LabelledImages,
    colour_histogram,
    extract,
    knn_predict,
    rankme,
    read_class_folders,
    stratified_split,
)
from pretrain.settings import load

ROOT = Path(__file__).resolve().parents[2]
RECIPES = {"dinov2": "small", "dino": "small_dino", "mae": "small_mae"}
HALVINGS = 10
EARLY_TILES = 8000
CORES = 2
MARGIN = 0.95  # of the steps that the two short runs promise: a budget is not to be overdrawn
TILES_PER_SHARD = 400  # more blocks than lanes, so that the stream mixes


@dataclass
class Asked:
    """What the command line says."""

    tiles: Path = ROOT.parent / "shared" / "tiles" / "crc5"
    out: Path = Path("runs/bench-learning")
    minutes: float = 12.0
    seeds: list[int] = field(default_factory=lambda: [0, 1])
    objectives: list[str] = field(default_factory=lambda: list(RECIPES))
    settings: dict[str, list[str]] = field(default_factory=lambda: {name: [] for name in RECIPES})

    @classmethod
    def parse(cls, arguments: list[str]) -> "Asked":
        asked = cls()
        for argument in arguments:
            name, _, value = argument.partition("=")
            if name in ("TILES", "OUT"):
                setattr(asked, name.lower(), Path(value))
            elif name == "MINUTES":
                asked.minutes = float(value)
            elif name == "SEEDS":
                asked.seeds = [int(seed) for seed in value.split(",")]
            elif name == "OBJECTIVES":
                asked.objectives = value.split(",")
            elif argument.partition(":")[0] in RECIPES:
                asked.settings[argument.partition(":")[0]].append(argument.partition(":")[2])
            else:
                raise SystemExit(f"{argument} is not understood; see the top of {__file__}")
        if unknown := set(asked.objectives) - set(RECIPES):
            raise SystemExit(f"OBJECTIVES are some of {', '.join(RECIPES)}, not {', '.join(unknown)}")
        if not asked.tiles.is_dir():
            raise SystemExit(
                f"{asked.tiles} is not there: give a folder that holds one folder of images per class, TILES=…"
            )
        return asked


def write_shards(images: LabelledImages, folder: Path) -> None:
    """The images' files as they are into WebDataset tars, without their labels, in an order of their own."""
    if (folder / "index.npz").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    order = rng(0, "shards").permutation(len(images.files))
    for start in range(0, len(order), TILES_PER_SHARD):
        with tarfile.open(folder / f"tiles-{start // TILES_PER_SHARD:06d}.tar", "w") as tar:
            for i in order[start : start + TILES_PER_SHARD]:
                facts = {
                    "slide": "unknown",
                    "x": int(i),
                    "y": 0,
                    "mpp": 1.0,
                    "tile_size": 224,
                    "tile_size_level0": 224.0,
                }
                for suffix, content in (("jpg", images.files[i].read_bytes()), ("json", json.dumps(facts).encode())):
                    member = tarfile.TarInfo(f"{i:06d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, BytesIO(content))
    scan(folder)


@dataclass
class Run:
    """One objective and seed: its folder, and the processor seconds that its process and its loader used."""

    objective: str
    seed: int
    folder: Path
    steps: int
    settings: list[str]
    process: subprocess.Popen | None = None

    @property
    def record(self) -> Path:
        return self.folder.with_suffix(".json")

    @cached_property
    def batch_size(self) -> int:
        return int(load("tile", [f"recipe={RECIPES[self.objective]}", *self.settings]).tree.data.batch_size)

    def start(self, shards: Path) -> None:
        """Begin, or go on, on one core with one thread."""
        command = [
            sys.executable, "-m", "pretrain", "tile", f"recipe={RECIPES[self.objective]}", f"run={self.folder}", f"data.shards={shards.resolve()}",
            f"seed={self.seed}", f"optim.steps={self.steps}", "data.threads=1", "trainer.accelerator=cpu", "trainer.precision=bf16", "trainer.compile=true",
            f"trainer.checkpoint_every={EARLY_TILES // self.batch_size}", "trainer.keep_checkpoints=0", *self.settings,
        ]  # fmt: skip
        log = self.folder.with_suffix(".log").open("a")
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log
        )

    def wait(self) -> float:
        """Processor seconds since the start, of the process and its children. Raises SystemExit where it failed."""
        assert self.process is not None
        _, status, used = os.wait4(self.process.pid, 0)
        if status:
            raise SystemExit(f"{self.objective}, seed {self.seed} failed: see {self.folder.with_suffix('.log')}")
        return used.ru_utime + used.ru_stime


def steps_that_fit(objective: str, settings: list[str], seconds: float, shards: Path, scratch: Path) -> int:
    """How many steps ``seconds`` of processor time buy: by two short runs, one on each core as in earnest.

    The first run of all is not counted: it compiles what the others find compiled.
    """
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    used = {}
    for steps in (8, 30, 90):
        runs = [Run(objective, seed, scratch / f"{steps}-{seed}", steps, settings) for seed in range(CORES)]
        for run in runs:
            run.start(shards)
        used[steps] = sum(run.wait() for run in runs) / CORES
    shutil.rmtree(scratch)
    each = (used[90] - used[30]) / 60
    return int((seconds - (used[30] - 30 * each)) / each * MARGIN)


def train(asked: Asked, shards: Path) -> list[Run]:
    """Every run that isn't finished yet, the seeds of an objective side by side."""
    finished = []
    for objective in asked.objectives:
        settings, plan = asked.settings[objective], asked.out / f"{objective}-steps.json"
        if not plan.exists():
            steps = steps_that_fit(objective, settings, CORES * 60 * asked.minutes, shards, asked.out / "calibration")
            plan.write_text(json.dumps({"steps": steps}))
        steps = json.loads(plan.read_text())["steps"]
        runs = [Run(objective, seed, asked.out / f"{objective}-{seed}", steps, settings) for seed in asked.seeds]
        waiting = [run for run in runs if not run.record.exists()]
        for start in range(0, len(waiting), CORES):
            together, began = waiting[start : start + CORES], time.monotonic()
            print(
                f"{objective}: {steps} steps of {runs[0].batch_size} tiles, seeds {', '.join(str(run.seed) for run in together)}",
                flush=True,
            )
            for run in together:
                run.start(shards)
            for run in together:
                seconds = run.wait()
                run.record.write_text(
                    json.dumps({"steps": steps, "cpu_seconds": seconds, "minutes": (time.monotonic() - began) / 60})
                )
        finished += runs
    return finished


def plain_trainer() -> float:
    """Tiles that a processor second trains in `plain_dinov2`, one process on each core as in earnest: this machine's measure."""
    command = [sys.executable, str(Path(__file__).with_name("plain_dinov2.py"))]
    runs = [
        subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True)
        for _ in range(CORES)
    ]
    said = [run.communicate()[0] for run in runs]
    return float(np.mean([json.loads(lines.splitlines()[-1])["tiles_per_cpu_second"] for lines in said]))


class Evaluation:
    """The fixed question that all features are asked."""

    def __init__(self, seen: LabelledImages, unseen: LabelledImages) -> None:
        self.seen, self.unseen, self.classes = seen, unseen, len(seen.classes)

    def __call__(self, features) -> dict[str, float]:  # type: ignore[no-untyped-def]
        """k-NN accuracy of an extractor with either bank, and RankMe of the unseen images."""
        bank, tested = (
            extract(images, {"features": features}, batch=64, threads=1, label=label).features["features"]
            for images, label in ((self.seen, "seen"), (self.unseen, "unseen"))
        )
        labels, accuracies = self.unseen.labels, []
        for halving in range(HALVINGS):
            first = np.zeros(len(labels), dtype=bool)
            for label in range(self.classes):
                members = rng(halving, "halving", label).permutation(np.flatnonzero(labels == label))
                first[members[: len(members) // 2]] = True
            for one in (first, ~first):
                predicted = knn_predict(tested[one], labels[one], tested[~one], self.classes)
                accuracies.append((predicted == labels[~one]).mean())
        everything = (knn_predict(bank, self.seen.labels, tested, self.classes) == labels).mean()
        return {"unseen": float(np.mean(accuracies)), "all": float(everything), "rankme": rankme(tested)}


def encoder_at(run: Run, step: int | None = None) -> TileEncoder:
    """The run's encoder at its last step, or at an earlier one that a checkpoint was kept of."""
    return load_encoder(str(run.folder if step is None else run.folder / "checkpoints" / f"step-{step:08d}"), "cpu")


def main() -> None:
    asked = Asked.parse(sys.argv[1:])
    asked.out.mkdir(parents=True, exist_ok=True)
    seen, unseen = stratified_split(read_class_folders(asked.tiles), 0.2, seed=0)
    print(f"{len(seen.files)} tiles to train on, {len(unseen.files)} to judge by, from {asked.tiles}", flush=True)
    shards = asked.out / "shards"
    write_shards(seen, shards)
    runs = train(asked, shards)
    evaluate = Evaluation(seen, unseen)
    rows = [("colour histogram", None, evaluate(colour_histogram))]
    figures: dict[str, list[float]] = {"histogram": [rows[0][2]["unseen"]]}
    speeds: dict[str, list[float]] = {}
    for run in runs:
        last = encoder_at(run)
        cost = json.loads(run.record.read_text())
        tiles = run.batch_size * cost["steps"]
        random = evaluate(last.random_twin(run.seed).embed_each)
        early = evaluate(encoder_at(run, EARLY_TILES // run.batch_size).embed_each) if tiles > EARLY_TILES else None
        end = evaluate(last.embed_each)
        rows.append((f"{run.objective}, seed {run.seed}: random weights", 0, random))
        if early:
            rows.append((f"{run.objective}, seed {run.seed}", EARLY_TILES, early))
            figures.setdefault(f"{run.objective}_at_8000_over_random", []).append(early["unseen"] - random["unseen"])
        rows.append((f"{run.objective}, seed {run.seed}", tiles, end))
        figures.setdefault(run.objective, []).append(end["unseen"])
        figures.setdefault(f"{run.objective}_bank_of_all", []).append(end["all"])
        figures.setdefault("random", []).append(random["unseen"])
        speeds.setdefault(run.objective, []).append(tiles / cost["cpu_seconds"])
    figures["histogram_bank_of_all"] = [rows[0][2]["all"]]
    print(f"\n{'k-NN accuracy':<34}{'tiles':>9}{'unseen':>9}{'all':>8}{'RankMe':>8}")
    for name, tiles, result in rows:
        shown = "–" if tiles is None else f"{tiles:,}"
        print(f"{name:<34}{shown:>9}{result['unseen']:>9.3f}{result['all']:>8.3f}{result['rankme']:>8.1f}")
    for objective, each in speeds.items():
        print(f"{objective}: {np.mean(each):.0f} tiles per processor second, everything included")
    plain = plain_trainer()
    print(f"a plain trainer, without reading and augmentation: {plain:.0f}")
    line = {name: round(float(np.mean(values)), 4) for name, values in figures.items()}
    line["tiles_per_cpu_second"] = round(float(np.mean(speeds[asked.objectives[0]])), 1)
    line["plain_tiles_per_cpu_second"] = round(plain, 1)
    print(json.dumps(line))


if __name__ == "__main__":
    main()
