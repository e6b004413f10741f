"""What a small ViT learns from a few thousand tiles, judged on tiles of other slides.

    python tests/bench/learning.py                                  every objective × two seeds, about half an hour each on two cores
    python tests/bench/learning.py OBJECTIVES=dinov2 SEEDS=0 SEEN=32000     less of it
    python tests/bench/learning.py dinov2:optim.lr=5e-4             settings of one objective, as 'pretrain tile' takes them
    python tests/bench/learning.py TILES=mine OTHER=mine_test       class folders of your own, and those of other slides

Training: the unlabelled pixels of TILES (``../shared/tiles/crc5``) from random weights, by ``recipe=small``,
``small_dino`` and so on (`RECIPES`) in bfloat16 with compiled blocks: a ViT of width 192, depth 6, patch 16, on 2 × 96 + 4
× 48 pixels. A run is a process of one thread, the seeds side by side. Finished runs are kept in OUT; the same command
goes on where it was stopped. ``distil`` learns from the finished ``dinov2`` run of its seed, which is trained first where
it isn't there; its cost is its own, and comes on top of that run's.

Judging, the same for all features: TILES classify OTHER (``../shared/tiles/crc5_other``), whose slides no run has seen,
whole images scaled to 96 pixels: 20 nearest neighbours by cosine, weighted as DINO weights them, and a linear
classifier; class token of the teacher (MAE: of its encoder). Where there is no OTHER, a fifth of TILES is held out,
tiles that look like one slide's together, which is a guess and said. *Same slides* is what a random split of TILES
would say: a fifth of them classified by the rest. It rewards recognising slides, and is no measure of what was learned
of tissue. The first row of a run is its own first weights. Random weights alone differ by more than many a gain, so
eight draws of them stand beside.

The last line has the mean over the seeds. ``standard_error`` is that of one k-NN figure by the number of tiles judged,
which takes them for independent; ``standard_error_by_likeness`` lets tiles that look like one slide's err together.

Speed is printed and not compared: machines and hours differ more than trainers. ``make bench-peers`` compares, in
turns.
"""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import simplejpeg
from omegaconf import DictConfig, OmegaConf

from data.fault import Fault
from data.keyed import rng
from data.shards.scan import scan
from pretrain.encoders.loading import load_encoder
from pretrain.encoders.tile_encoder import TileEncoder
from pretrain.probing.features import Extractor, colour_histogram, extract
from pretrain.probing.images import LabelledImages, read_class_folders, read_image, require_same_classes
from pretrain.probing.scores import Score, knn_predict, score, standard_error
from pretrain.probing.slide_groups import by_likeness, groups_of
from pretrain.probing.splits import grouped_split
from pretrain.settings.composition import load
from tests.data.shards.tars import tile_members, write_tar

ROOT = Path(__file__).resolve().parents[2]
RECIPES = {
    "dinov2": "small",
    "dino": "small_dino",
    "dinov3": "small_dinov3",
    "jepa": "small_jepa",
    "mae": "small_mae",
    "lejepa": "small_lejepa",
    "distil": "small_distil",
}
TEACHER = "dinov2"  # what distil learns from, in the same seed
LOOKED_AT = (8_000, 32_000, 64_000, 128_000)  # tiles
CORES = 2
TILES_PER_SHARD = 400  # more blocks than lanes, so that the stream mixes
DRAWS = 8  # of random weights
AS_JPEG = 97  # quality of what comes in another format


def recipe_of(objective: str, settings: Sequence[str]) -> DictConfig:
    """The settings of an objective's recipe, some of them changed."""
    return load("tile", [f"recipe={RECIPES[objective]}", *settings]).tree


@dataclass
class Asked:
    """What the command line says."""

    tiles: Path = ROOT.parent / "shared" / "tiles" / "crc5"
    other: Path | None = None
    out: Path = Path("runs/bench-learning")
    seen: int = LOOKED_AT[-1]
    seeds: list[int] = field(default_factory=lambda: [0, 1])
    objectives: list[str] = field(default_factory=lambda: list(RECIPES))
    settings: dict[str, list[str]] = field(default_factory=lambda: {name: [] for name in RECIPES})

    def folder(self, objective: str, seed: int) -> Path:
        """A run's, under a name of its own for other tiles, settings or lengths: what is there is gone on with."""
        taught_by = [TEACHER] if objective == "distil" else []
        recipe = "".join(
            OmegaConf.to_yaml(recipe_of(name, self.settings[name]), sort_keys=True) for name in [objective, *taught_by]
        )
        asked = f"{self.tiles.resolve()} {contents(self.tiles)} {self.other} {self.seen} {recipe}"
        return self.out / f"{objective}-{seed}-{hashlib.sha256(asked.encode()).hexdigest()[:8]}"

    def settings_of_run(self, objective: str, seed: int) -> list[str]:
        """Those that were asked for, and who teaches."""
        teacher = [f"objective.teacher={self.folder(TEACHER, seed).resolve()}"] if objective == "distil" else []
        return [*self.settings[objective], *teacher]

    @property
    def shards(self) -> Path:
        """The folder of the training tiles' shards."""
        asked = f"{self.tiles.resolve()} {contents(self.tiles)} {self.other}"
        return self.out / f"shards-{hashlib.sha256(asked.encode()).hexdigest()[:8]}"

    @classmethod
    def parse(cls, arguments: list[str]) -> "Asked":
        asked = cls()
        if {"-h", "--help", "help"} & set(arguments):
            print((sys.modules["__main__"].__doc__ or "").strip())
            raise SystemExit(0)
        for argument in arguments:
            name, _, value = argument.partition("=")
            if not value and name.isupper():
                raise SystemExit(f"{name}= has nothing behind it: give a value, or leave it out")
            if name in ("TILES", "OTHER", "OUT"):
                setattr(asked, name.lower(), Path(value))
            elif name == "SEEN":
                asked.seen = whole_number(argument, value)
            elif name == "SEEDS":
                asked.seeds = [whole_number(argument, seed) for seed in value.split(",")]
            elif name == "OBJECTIVES":
                asked.objectives = value.split(",")
                if "distil" in asked.objectives:
                    others = [name for name in asked.objectives if name not in (TEACHER, "distil")]
                    asked.objectives = [TEACHER, *others, "distil"]
            elif argument.partition(":")[0] in RECIPES:
                asked.settings[argument.partition(":")[0]].append(argument.partition(":")[2])
            else:
                raise SystemExit(f"{argument} is not understood; see the top of {__file__}")
        if unknown := set(asked.objectives) - set(RECIPES):
            raise SystemExit(f"OBJECTIVES are some of {', '.join(RECIPES)}, not {', '.join(unknown)}")
        if len(set(asked.seeds)) < len(asked.seeds):
            raise SystemExit(f"SEEDS={','.join(map(str, asked.seeds))} has one twice, which would train in one folder")
        asked.tiles = asked.tiles.resolve()  # '.' has no name
        for folder in (asked.tiles, asked.other):
            if folder is not None and not folder.is_dir():
                raise SystemExit(f"{folder} is not there: give a folder that holds one folder of images per class")
        if asked.other is not None and asked.other.resolve() == asked.tiles.resolve():
            raise SystemExit(f"OTHER={asked.other} is TILES itself: give tiles of other slides, or leave it out")
        beside = asked.tiles.with_name(f"{asked.tiles.name}_other")
        if asked.other is None and beside.is_dir():
            asked.other = beside
        asked.check_lengths()
        return asked

    def check_lengths(self) -> None:
        """Raise SystemExit unless whole steps end at every length that is looked at."""
        for objective in self.objectives:
            batch = int(recipe_of(objective, self.settings[objective]).data.batch_size)
            if wrong := [tiles for tiles in {LOOKED_AT[0], self.seen} if tiles < batch or tiles % batch]:
                raise SystemExit(
                    f"{objective}: {wrong[0]:,} tiles aren't whole steps of data.batch_size={batch}: features are looked at"
                    f" after every {LOOKED_AT[0]:,} tiles and after SEEN={self.seen}"
                )


def whole_number(argument: str, value: str) -> int:
    """A positive number, or 0 for a seed. Raises SystemExit for anything else."""
    if not value.isdecimal():
        raise SystemExit(f"{argument}: {value!r} is no whole number")
    return int(value)


@cache
def contents(folder: Path) -> str:
    """A hash of the names and sizes of all images below a folder: other ones make other shards and other runs."""
    digest = hashlib.sha256()
    for path in read_class_folders(folder).files:
        digest.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode())
    return digest.hexdigest()


def make_folder(folder: Path) -> None:
    """Make OUT. Raises SystemExit where it can't be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"OUT={folder} can't be made ({error.strerror}): give another folder") from error


def images(asked: Asked) -> tuple[LabelledImages, LabelledImages, str]:
    """The images to train on, those to judge by, and what the latter are."""
    tiles = read_class_folders(asked.tiles)
    if asked.other is not None:
        other = read_class_folders(asked.other)
        require_same_classes(tiles, other)
        return tiles, other, f"tiles of other slides, {asked.other}"
    groups = groups_of(tiles.files, tiles.folder, None, lambda: map(read_image, tiles.files))
    split = grouped_split(tiles, groups.of, 0.2, seed=0)
    if split is None:
        raise SystemExit(
            f"{asked.tiles} can't be split by {groups.how}: give tiles of other slides, OTHER=folder of class folders"
        )
    kind = "other slides" if groups.known else "likely other slides (a guess)"
    return tiles.subset(split[0]), tiles.subset(split[1]), f"tiles of {kind}: a fifth, split by {groups.how}"


def write_shards(images: LabelledImages, folder: Path) -> None:
    """The images' files as they are into WebDataset tars, without their labels, in an order of their own."""
    if (folder / "index.npz").exists():
        return
    order = rng(0, "shards").permutation(len(images.files))
    for start in range(0, len(order), TILES_PER_SHARD):
        members = []
        for i in order[start : start + TILES_PER_SHARD].tolist():
            members += tile_members(jpeg_of(images.files[i]), "unknown", i, 0, 224, mpp=1.0, key=f"{i:06d}")
        write_tar(folder / f"tiles-{start // TILES_PER_SHARD:06d}.tar", members)
    scan(folder)


def jpeg_of(file: Path) -> bytes:
    """A JPEG's bytes as they are, those of another format encoded."""
    if file.suffix.lower() in (".jpg", ".jpeg"):
        return file.read_bytes()
    return simplejpeg.encode_jpeg(read_image(file), quality=AS_JPEG, colorsubsampling="444")


@dataclass
class Run:
    """One objective and seed: its folder, and the processor seconds that its process and its loader used."""

    objective: str
    seed: int
    folder: Path
    tiles: int
    settings: list[str]
    process: subprocess.Popen | None = None

    @property
    def record(self) -> Path:
        return self.folder.with_suffix(".json")

    @cached_property
    def recipe(self) -> DictConfig:
        return recipe_of(self.objective, self.settings)

    @property
    def batch_size(self) -> int:
        return int(self.recipe.data.batch_size)

    def start(self, shards: Path) -> None:
        """Begin, or go on, on one core with one thread. What sees fewer tiles than the recipe stops on its way."""
        steps = self.tiles // self.batch_size
        command = [
            sys.executable,
            "-m",
            "pretrain",
            "tile",
            f"recipe={RECIPES[self.objective]}",
            f"run={self.folder}",
            f"data.shards={shards.resolve()}",
            f"seed={self.seed}",
            f"optim.steps={steps}",
            f"optim.schedule_steps={max(steps, self.recipe.optim.steps)}",
            "data.threads=1",
            "trainer.accelerator=cpu",
            "trainer.precision=bf16",
            "trainer.compile=true",
            f"trainer.checkpoint_every={LOOKED_AT[0] // self.batch_size}",
            "trainer.keep_checkpoints=0",
            *self.settings,
        ]
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

    def encoder(self, tiles: int) -> TileEncoder:
        """The encoder when the run had seen so many tiles."""
        return load_encoder(str(self.folder / "checkpoints" / f"step-{tiles // self.batch_size:08d}"), "cpu")

    def untrained(self, seed: int) -> TileEncoder:
        """The encoder with the weights that a run of ``seed`` begins with."""
        encoder = self.encoder(self.tiles)
        return replace(encoder, module=encoder.make_random(seed))


def train(asked: Asked, shards: Path) -> list[Run]:
    """Every run that isn't finished yet, the seeds of an objective side by side."""
    finished = []
    for objective in asked.objectives:
        runs = [
            Run(objective, seed, asked.folder(objective, seed), asked.seen, asked.settings_of_run(objective, seed))
            for seed in asked.seeds
        ]
        waiting = [run for run in runs if not run.record.exists()]
        for start in range(0, len(waiting), CORES):
            together, began = waiting[start : start + CORES], time.monotonic()
            seeds = ", ".join(str(run.seed) for run in together)
            print(f"{objective}: {asked.seen:,} tiles in batches of {runs[0].batch_size}, seeds {seeds}", flush=True)
            for run in together:
                run.start(shards)
            for run in together:
                seconds = run.wait()
                run.record.write_text(
                    json.dumps({"tiles": run.tiles, "cpu_seconds": seconds, "minutes": (time.monotonic() - began) / 60})
                )
        finished += runs
    return finished


class Judge:
    """The fixed question that all features are asked. Made before anything is trained: raises Fault for an image that
    can't be read."""

    def __init__(self, bank: LabelledImages, other: LabelledImages) -> None:
        self.bank, self.other, self.classes = bank, other, len(bank.classes)
        for path in bank.files:
            read_image(path)
        self.alike = by_likeness(map(read_image, other.files), len(other.files)).of

    def __call__(self, features: Extractor) -> tuple[Score, float]:
        """What features tell of tiles of other slides, and the k-NN accuracy with the same slides on both sides."""
        bank, asked = (
            extract(images, {"features": features}, batch=64, threads=1, label=label)
            for images, label in ((self.bank, "bank"), (self.other, "other slides"))
        )
        found = score(bank.features["features"], bank.labels, asked.features["features"], asked.labels, self.classes)
        order, labels = rng(0, "same slides").permutation(len(bank.labels)), bank.labels
        fifth, rest = order[: len(order) // 5], order[len(order) // 5 :]
        values = bank.features["features"]
        same = knn_predict(values[rest], labels[rest], values[fifth], self.classes) == labels[fifth]
        return found, float(same.mean())

    def error_by_likeness(self, found: Score) -> float:
        """Of the k-NN accuracy, where tiles that look like one slide's err together: see `standard_error`."""
        return standard_error(found.knn_correct, self.alike)


def main() -> None:
    try:
        bench(Asked.parse(sys.argv[1:]))
    except Fault as fault:
        raise SystemExit(str(fault)) from fault


def bench(asked: Asked) -> None:
    make_folder(asked.out)
    tiles, other, what = images(asked)
    print(f"{len(tiles.files)} tiles to train on, {len(other.files)} to judge by: {what}", flush=True)
    judge = Judge(tiles, other)
    write_shards(tiles, asked.shards)
    runs = train(asked, asked.shards)
    rows = [("colour histogram", None, *judge(colour_histogram))]
    figures: dict[str, list[float]] = {
        "histogram": [rows[0][2].knn],
        "histogram_linear": [rows[0][2].linear],
        "standard_error": [rows[0][2].knn_se],
        "standard_error_by_likeness": [judge.error_by_likeness(rows[0][2])],
        "same_slides_histogram": [rows[0][3]],
    }
    for run in runs:
        name = f"{run.objective}, seed {run.seed}"
        looked_at = sorted({seen for seen in LOOKED_AT if seen < run.tiles} | {run.tiles})
        found, same = judge(run.untrained(run.seed).embed_each)
        rows.append((f"{name}: first weights", 0, found, same))
        figures.setdefault(f"{run.objective}_random", []).append(found.knn)
        for seen in looked_at:
            found, same = judge(run.encoder(seen).embed_each)
            rows.append((name, seen, found, same))
            figures["standard_error"].append(found.knn_se)
            figures["standard_error_by_likeness"].append(judge.error_by_likeness(found))
            figures.setdefault(f"{run.objective}_at_{seen}", []).append(found.knn)
            figures.setdefault(f"{run.objective}_linear_at_{seen}", []).append(found.linear)
        figures.setdefault(run.objective, []).append(found.knn)
        figures.setdefault(f"same_slides_{run.objective}", []).append(same)
    print(f"\n{what}\n{'':<34}{'tiles':>9}{'k-NN':>15}{'linear':>15}{'RankMe':>8}{'same slides':>13}")
    for name, seen, found, same in rows:
        shown = "–" if seen is None else f"{seen:,}"
        print(
            f"{name:<34}{shown:>9}{found.knn:>8.3f} ± {found.knn_se:.3f}{found.linear:>7.3f} ±"
            f" {found.linear_se:.3f}{found.rankme:>8.1f}{same:>13.3f}"
        )
    for run in runs:
        cost = json.loads(run.record.read_text())
        print(
            f"{run.objective}, seed {run.seed}: {cost['tiles'] / cost['cpu_seconds']:.0f} tiles per processor second"
            " here and now, everything included"
        )
    draws = [judge(runs[0].untrained(seed).embed_each)[0].knn for seed in range(DRAWS)]
    print(f"{DRAWS} draws of random weights: {min(draws):.3f} to {max(draws):.3f}, mean {np.mean(draws):.3f}")
    figures["random"] = draws
    line = {name: float(np.mean(values)) for name, values in figures.items()} | {"random_spread": float(np.std(draws))}
    print(json.dumps({name: round(value, 4) for name, value in line.items()}))


if __name__ == "__main__":
    main()
