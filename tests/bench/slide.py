"""Is a slide encoder of use? Its vectors against six labels of slides, beside rows that have learned nothing.

    python tests/bench/slide.py                                    everything, about fifty minutes on two cores
    python tests/bench/slide.py SECONDS=60 LABELS=nests,far ROWS=mean,smoothed,random,slide GROUNDS=made_up SEEDS=0
    python tests/bench/slide.py slide:data.mask_ratio=0.4          settings of a trained row, as 'pretrain slide' takes them
    python tests/bench/slide.py ENCODER=runs/tile TILES=mine       real tiles, of class folders of your own, by an encoder of your own

Slides are laid out by the maps of `slide_maps.py`, which says what the labels are. Two grounds: *made_up*, where a
tile's embedding is its class's vector with a stain and noise, and *tiles*, where it is that of a real tile of that class
(``../shared/tiles/crc5``, of which half are for slides to learn from and half for those to judge by), by ENCODER, or
else by a ViT that `learning.py` trains on 16,000 of them. SLIDES without labels, of all kinds, to learn from, and as
many others for each label.

Rows that learn nothing: *mean* of tiles; *mean_std*; *smoothed*, with the spread of spatially smoothed tiles too;
*filter*, tiles beside their smoothed selves, read as *slide* is: by moments within clusters of tiles; *random*, the network of *slide* with random weights, its residual branches at full strength, read as *slide* is.
Learned from the labels: *mil*, gated attention over tiles. Pretrained, each for SECONDS of one processor core: *mae*, as
Prov-GigaPath's is published, small, and the mean of its outputs; *mended*, the same network with standardised inputs and
block masks, read as *slide* is; *ibot*, MOOZY's first stage, small; *context* and *pairs*, those objectives in the recipe
*slide*; and *slide* itself. How many steps those seconds are is measured first, by short runs. *filter_means*,
*random_means* and *slide_means*: read by the means within clusters alone.

A figure is the AUROC of logistic regression on standardised vectors, five folds twice (*mil*: once, and with one seed),
the same for all rows. The last line has the mean over the seeds as ``ground/label/row``, and the lowest seed's as
``…/lowest``. Finished runs are kept in OUT; the same command goes on where it was stopped.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # a row is one core's work
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch

from data.embeddings.store import EmbeddingStore, EmbeddingWriter
from data.fault import Fault
from data.files import write_whole
from data.keyed import rng
from models.slide_network import SlideNetwork
from pretrain.embedding.poolings import by_members, pooled_vectors
from pretrain.embedding.random_weights import with_random_weights
from pretrain.embedding.slides import packed, seen_by
from pretrain.embedding.tile_clusters import TileClusters, clusters_of
from pretrain.encoders.loading import load_encoder
from pretrain.encoders.slide_encoders import SlideEncoder, load_slide_encoder
from pretrain.probing.features import extract
from pretrain.probing.images import LabelledImages, read_class_folders
from pretrain.slide_probing.attention_mil import predicted_by_attention
from pretrain.slide_probing.folds import rounds_of
from pretrain.slide_probing.labels import LabelledSlides, Round, read_labels
from pretrain.slide_probing.linear import predicted
from pretrain.slide_probing.measures import auroc
from pretrain.slide_probing.vectors import SMOOTHED, of_tiles_alone, smoothed
from tests.bench.learning import Run, write_shards
from tests.bench.slide_maps import LABELS, SlideMap, class_vectors, made_up_tiles, slide_map

ROOT = Path(__file__).resolve().parents[2]
CORES = 2
MADE_UP_CLASSES, MADE_UP_WIDTH = 6, 64
CELL = 256  # level-0 pixels
SEEN = 16_000  # tiles that the tile encoder of the second ground is trained on
FOLDS, REPEATS = 5, 2
SHORT, LONG = 4, 16  # steps of the runs that tell how long one takes
TOKENS = 8192  # of a forward pass

SMALL = ["model.width=96", "model.depth=3", "model.feed_forward_width=384", "model.dropout=0", "model.drop_path=0"]
SMALL_LONGNET = [*SMALL, "model.heads=4", "model.segment_lengths=[512]", "model.dilated_ratios=[1]"]
SMALL_DECODER = [f"objective.decoder_{key}" for key in ("width=96", "depth=2", "heads=4", "feed_forward_width=384")]
SHORT_RUN = [
    *("data.batch_size=8", "data.batch_tokens=null", "data.lanes=4", "optim.lr=1e-3", "optim.lr_scaling=none"),
    *("trainer.precision=float32", "trainer.accumulate=1"),
]
SMALL_HEAD = [
    *("objective.prototypes=512", "objective.hidden=256", "objective.bottleneck=64"),
    *("objective.teacher_temperature_warmup=50", "optim.frozen_last_layer_steps=10"),
]
SMALL_CROPS = ["data.crops.global_side=14", "data.crops.local_side=8"]
PUBLISHED = ["recipe=gigapath_slide", *SMALL_LONGNET, *SMALL_DECODER, *SHORT_RUN]
PAIRS = [f"objective.{setting}" for setting in ("farthest=12", "pooled=mean_std", "predictor_width=192")]


@dataclass(frozen=True)
class Trained:
    """What a row's run is told, and the pooling that its vectors are read with."""

    settings: list[str]
    pooling: str = "cluster_moments"


TRAINED = {
    "mae": Trained(PUBLISHED, "pooled"),
    "mended": Trained([*PUBLISHED, "data.inputs=standardised", "data.mask=block"]),
    "ibot": Trained(["recipe=moozy_slide", *SMALL, "model.heads=8", *SMALL_HEAD, *SMALL_CROPS, *SHORT_RUN]),
    "context": Trained(["recipe=slide", "objective=slide_context", *SMALL_DECODER]),
    "pairs": Trained(["recipe=slide", "objective=slide_pairs", *PAIRS]),
    "slide": Trained(["recipe=slide"]),
}
WITHOUT_LEARNING = {"mean": "mean of tiles", "mean_std": "mean + std", "smoothed": "mean + std + smoothed std"}
UNSEEDED = (*WITHOUT_LEARNING, "filter", "mil")
ROWS = (*WITHOUT_LEARNING, "filter", "mil", "random", *TRAINED)
READ_BY_MEANS = ("filter", "random", "slide")  # too
GROUNDS = ("made_up", "tiles")


@dataclass
class Asked:
    """What the command line says."""

    out: Path = Path("runs/bench-slide")
    tiles: Path = ROOT.parent / "shared" / "tiles" / "crc5"
    encoder: str | None = None
    seconds: int = 100
    slides: int = 400
    seeds: list[int] = field(default_factory=lambda: [0, 1])
    labels: list[str] = field(default_factory=lambda: list(LABELS))
    rows: list[str] = field(default_factory=lambda: list(ROWS))
    grounds: list[str] = field(default_factory=lambda: list(GROUNDS))
    settings: dict[str, list[str]] = field(default_factory=lambda: {row: [] for row in TRAINED})

    @classmethod
    def parse(cls, arguments: list[str]) -> "Asked":
        asked = cls()
        for argument in arguments:
            name, _, value = argument.partition("=")
            row, _, setting = argument.partition(":")
            if name in ("OUT", "TILES"):
                setattr(asked, name.lower(), Path(value))
            elif name == "ENCODER":
                asked.encoder = value
            elif name in ("SECONDS", "SLIDES"):
                setattr(asked, name.lower(), _number(argument, value))
            elif name == "SEEDS":
                asked.seeds = [_number(argument, seed) for seed in value.split(",")]
                if len(set(asked.seeds)) < len(asked.seeds):
                    raise SystemExit(f"{argument} has one twice, which would train in one folder")
            elif name in ("LABELS", "ROWS", "GROUNDS"):
                known = {"LABELS": LABELS, "ROWS": ROWS, "GROUNDS": GROUNDS}[name]
                if unknown := set(value.split(",")) - set(known):
                    raise SystemExit(f"{name} are some of {', '.join(known)}, not {', '.join(sorted(unknown))}")
                setattr(asked, name.lower(), value.split(","))
            elif row in TRAINED and setting:
                asked.settings[row].append(setting)
            else:
                raise SystemExit(f"{argument} is not understood; see the top of {__file__}")
        if "tiles" in asked.grounds and not asked.tiles.is_dir():
            raise SystemExit(f"{asked.tiles} is not there: give a folder of class folders, TILES=…, or GROUNDS=made_up")
        if asked.slides < 2 * FOLDS:
            raise SystemExit(f"SLIDES={asked.slides}: {FOLDS} folds of two classes need {2 * FOLDS} at least")
        return asked


def _number(argument: str, value: str) -> int:
    if not value.isdecimal():
        raise SystemExit(f"{argument}: {value!r} is no whole number of digits alone")
    return int(value)


Embed = Callable[..., np.ndarray]
"""A map, and a key of its slide → its tiles' embeddings (n, width)."""


@dataclass(frozen=True)
class Ground:
    """The slides of one kind of embeddings, in stores below ``folder``, and how many of each kind."""

    folder: Path
    slides: int

    @property
    def unlabelled(self) -> Path:
        return self.folder / "unlabelled"

    @property
    def labelled(self) -> Path:
        return self.folder / "labelled"

    def write(self, classes: int, width: int, encoder: str, embed: Embed) -> None:
        """Write what isn't there: slides to learn from, the kinds in turns, and those to judge by, with their labels."""
        per_kind = -(-self.slides // len(LABELS))
        unlabelled = [(kind, number) for number in range(per_kind) for kind in LABELS][: self.slides]
        self._write(self.unlabelled, unlabelled, classes, width, encoder, embed)
        labelled = [(kind, number) for kind in LABELS for number in range(self.slides)]
        self._write(self.labelled, labelled, classes, width, encoder, embed)
        for kind in LABELS:
            lines = [f"{kind}-{number:04d},{number % 2}" for number in range(self.slides)]
            write_whole(self.folder / f"{kind}.csv", "\n".join(["slide,label", *lines]) + "\n")

    def _write(
        self, store: Path, slides: Iterable[tuple[str, int]], classes: int, width: int, encoder: str, embed: Embed
    ) -> None:
        seed = UNLABELLED_SEED if store == self.unlabelled else LABELLED_SEED
        with EmbeddingWriter(store, width, encoder, hashlib.sha256(encoder.encode()).hexdigest()[:16]) as writer:
            for kind, number in slides:
                if not writer.done(name := f"{kind}-{number:04d}"):
                    found = slide_map(kind, classes, seed, number)
                    tiles = embed(found, seed, kind, number)
                    writer.add(name, tiles, found.cells * CELL, CELL, 0.5)

    def judged_by(self, label: str) -> tuple[LabelledSlides, list[Round]]:
        store = EmbeddingStore.open(self.labelled)
        found = read_labels(self.folder / f"{label}.csv", None, {slide: store.rows(slide) for slide in store.slides})
        return found, rounds_of(found, FOLDS, REPEATS, seed=0)


UNLABELLED_SEED, LABELLED_SEED = 1, 2  # of slides: all seeds of a row learn from the same and are judged by the same
CLASSES_SEED = 0


def made_up(asked: Asked) -> Ground:
    """Embeddings that are their class's vector, a stain and noise."""
    ground = Ground(asked.out / f"made_up-{asked.slides}", asked.slides)
    vectors = class_vectors(MADE_UP_CLASSES, MADE_UP_WIDTH, CLASSES_SEED)
    ground.write(MADE_UP_CLASSES, MADE_UP_WIDTH, "made up", lambda found, *key: made_up_tiles(found, vectors, *key))
    return ground


def of_real_tiles(asked: Asked) -> Ground:
    """Embeddings of real tiles, each drawn from its class's: of one half of them to learn from, of the other to judge
    by."""
    images = read_class_folders(asked.tiles)
    checkpoint = asked.encoder or str(_tile_encoder(asked, images))
    about = f"{Path(checkpoint).resolve()} {asked.tiles.resolve()}"
    digest = hashlib.sha256(about.encode()).hexdigest()[:8]
    ground = Ground(asked.out / f"tiles-{digest}-{asked.slides}", asked.slides)
    kept = asked.out / f"tiles-{digest}.npz"
    if not kept.exists():
        encoder = load_encoder(checkpoint, "cpu")
        found = extract(images, {"tiles": encoder.embed_each}, batch=64, threads=1, label="tiles")
        np.savez(kept, tiles=found.features["tiles"], labels=found.labels)
    tiles, labels = (np.load(kept)[name] for name in ("tiles", "labels"))
    halves: dict[int, list[np.ndarray]] = {UNLABELLED_SEED: [], LABELLED_SEED: []}
    for one in range(len(images.classes)):
        members = rng(CLASSES_SEED, "halves", one).permutation(np.flatnonzero(labels == one))
        for seed, half in zip(halves, np.array_split(members, 2), strict=True):
            halves[seed].append(half)

    def embed(found: SlideMap, seed: int, *key: int | str) -> np.ndarray:
        draw = rng(seed, *key, "real tiles")
        return tiles[[draw.choice(halves[seed][one]) for one in found.of_tiles]]

    ground.write(len(images.classes), tiles.shape[1], about, embed)
    return ground


def _tile_encoder(asked: Asked, images: LabelledImages) -> Path:
    """A small ViT trained on the tiles themselves, as `learning.py` trains it, but shorter."""
    shards = asked.out / "shards"
    write_shards(images, shards)
    run = Run("dinov2", 0, asked.out / "tile_encoder", SEEN, [])
    if not run.record.exists():
        print(f"a small tile encoder, {SEEN:,} tiles", flush=True)
        run.start(shards)
        run.record.write_text(json.dumps({"cpu_seconds": run.wait()}))
    return run.folder


def pretrained(folder: Path, row: str, ground: Ground, seed: int, steps: int, settings: Sequence[str]) -> float:
    """Run 'pretrain slide' with a row's settings for so many steps: processor seconds, its loader's too. Raises
    SystemExit where it fails."""
    command = [
        sys.executable,
        *("-m", "pretrain", "slide", f"run={folder}", f"data.embeddings={ground.unlabelled.resolve()}"),
        *TRAINED[row].settings,
        *(f"seed={seed}", f"optim.steps={steps}", f"optim.warmup_steps={max(1, steps // 10)}"),
        *("data.validation_fraction=0.05", "watch.held_out_slides=8", "watch.every=0"),
        *("trainer.accelerator=cpu", f"trainer.checkpoint_every={steps}", "trainer.keep_checkpoints=1"),
        *settings,
    ]
    with folder.with_suffix(".log").open("a") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{folder.name} failed: see {folder.with_suffix('.log')}")
    return used.ru_utime + used.ru_stime


@dataclass(frozen=True)
class Job:
    """A row on a ground, with a seed where it has one; what it found is kept in a file."""

    ground: Ground
    row: str
    seed: int
    labels: tuple[str, ...]
    seconds: int
    settings: tuple[str, ...]

    def folder(self, what: str) -> Path:
        told = [self.seconds, *TRAINED[self.row].settings, *self.settings] if self.row in TRAINED else []
        digest = hashlib.sha256(" ".join(map(str, told)).encode()).hexdigest()[:8]
        return self.ground.folder / f"{self.row}-{what}-{digest}"

    def of_network(self) -> "Job | None":
        """The job whose network this one's is; None where there is none."""
        row = "slide" if self.row == "random" else self.row
        return replace(self, row=row) if row in TRAINED else None

    @property
    def paced(self) -> Path:
        """A run of a few steps, whose network is the row's."""
        return self.folder(f"pace{LONG}")

    def pace(self) -> float:
        """Processor seconds a step, of a long run less a short one."""
        kept = self.folder("pace").with_suffix(".json")
        if not kept.exists():
            short, long = (
                pretrained(self.folder(f"pace{steps}"), self.row, self.ground, 0, steps, self.settings)
                for steps in (SHORT, LONG)
            )
            write_whole(kept, json.dumps((long - short) / (LONG - SHORT)))
        return float(json.loads(kept.read_text()))

    def names(self, label: str) -> list[str]:
        """Of a label's figures: by the row's vector, and by means within clusters where that is asked too."""
        return [label, f"{label} by means"] if self.row in READ_BY_MEANS else [label]

    def figures(self) -> dict[str, float]:
        """AUROC by label, and ``seconds`` and ``steps`` where the row was trained."""
        kept = self.folder(str(self.seed)).with_suffix(".json")
        found: dict[str, float] = json.loads(kept.read_text()) if kept.exists() else {}
        if wanted := [label for label in self.labels if any(name not in found for name in self.names(label))]:
            if self.row in TRAINED and "steps" not in found:
                found["steps"] = max(1, round(self.seconds / self.pace()))
                run = self.folder(str(self.seed))
                found["seconds"] = pretrained(run, self.row, self.ground, self.seed, int(found["steps"]), self.settings)
                write_whole(kept, json.dumps(found))
            found |= self._judge(wanted)
            write_whole(kept, json.dumps(found))
        return found

    def _judge(self, labels: Sequence[str]) -> dict[str, float]:
        torch.set_num_threads(1)
        store = EmbeddingStore.open(self.ground.labelled)
        if self.row == "mil":
            return {label: by_attention(self.ground, store, label, self.seed) for label in labels}
        if self.row in WITHOUT_LEARNING:
            return self._by_vectors(labels, lambda slides: [alone(store, slides, self.row)])
        unlabelled = EmbeddingStore.open(self.ground.unlabelled)
        clusters = clusters_of(unlabelled, unlabelled.slides, self.seed)
        if self.row == "filter":
            return self._by_vectors(labels, lambda slides: filtered(store, slides, clusters))
        poolings = [TRAINED["slide" if self.row == "random" else self.row].pooling]
        poolings += ["cluster_means"] if self.row in READ_BY_MEANS else []
        if self.row == "random":
            encoder = load_slide_encoder(str(replace(self, row="slide").paced), "cpu")
            network = with_random_weights(encoder, self.seed)
        else:
            encoder = load_slide_encoder(str(self.folder(str(self.seed))), "cpu")
            network = encoder.network
        return self._by_vectors(labels, lambda slides: encoded(store, slides, encoder, network, clusters, poolings))

    def _by_vectors(self, labels: Sequence[str], read: Callable[[list[str]], list[np.ndarray]]) -> dict[str, float]:
        """AUROC of linear models on a label's slides, averaged over the times that all are judged; ``read`` gives
        vectors (slides, D) for each of a label's `names`."""
        figures = {}
        for label in labels:
            labelled, rounds = self.ground.judged_by(label)
            vectors = read([slide for bag in labelled.bags for slide in bag])
            for name, rows in zip(self.names(label), vectors, strict=True):
                shares = [predicted("classes", 2, rows[fit], labelled.values[fit], rows[who]) for fit, who in rounds]
                figures[name] = _area_of(labelled, rounds, shares)
        return figures


def by_attention(ground: Ground, store: EmbeddingStore, label: str, seed: int) -> float:
    """The same of attention over tiles, learned from the label."""
    labelled, rounds = ground.judged_by(label)
    rounds, device = rounds[:FOLDS], torch.device("cpu")

    def read(bag: int) -> np.ndarray:
        return store.read(labelled.bags[bag][0]).embeddings

    shares = [
        predicted_by_attention("classes", 2, read, fit, labelled.values[fit], judged, seed, device)
        for fit, judged in rounds
    ]
    return _area_of(labelled, rounds, shares)


def _area_of(labelled: LabelledSlides, rounds: Sequence[Round], shares: Sequence[np.ndarray]) -> float:
    areas = []
    for first in range(0, len(rounds), FOLDS):
        judged = np.concatenate([who for _, who in rounds[first : first + FOLDS]])
        areas.append(auroc(labelled.values[judged], np.concatenate(shares[first : first + FOLDS])))
    return float(np.mean(areas))


def alone(store: EmbeddingStore, slides: list[str], row: str) -> np.ndarray:
    """Vectors (slides, D) that need no slide encoder."""
    return of_tiles_alone(store.read(slide) for slide in slides)[WITHOUT_LEARNING[row]]


def filtered(store: EmbeddingStore, slides: list[str], clusters: TileClusters) -> list[np.ndarray]:
    """Tiles beside their smoothed selves, by moments and by means within clusters of tiles."""
    moments, means = [], []
    for slide in map(store.read, slides):
        tiles = np.asarray(slide.embeddings, dtype=np.float32)
        smooth = (smoothed(tiles, slide.cells, sigma) for sigma in SMOOTHED)
        beside = torch.from_numpy(np.concatenate([tiles, *smooth], axis=1))
        of_each, parts = by_members(beside, clusters.of(torch.from_numpy(tiles)), len(clusters.centres))
        moments.append(torch.cat([beside.mean(0), beside.std(0, correction=0), parts.flatten()]))
        means.append(of_each.flatten())
    return [torch.stack(rows).numpy() for rows in (moments, means)]


def encoded(
    store: EmbeddingStore,
    slides: list[str],
    encoder: SlideEncoder,
    network: SlideNetwork,
    clusters: TileClusters,
    poolings: Sequence[str],
) -> list[np.ndarray]:
    """Vectors (slides, D) of what ``network`` makes of them, by pooling."""
    rows: list[list[np.ndarray]] = [[] for _ in poolings]
    for batch in packed(store, slides, TOKENS):
        x, lengths, seen = seen_by(network, batch, encoder.device, "float32")
        found = pooled_vectors(x, lengths, seen, clusters)
        for one, pooling in zip(rows, poolings, strict=True):
            one.append(found[pooling].numpy())
    return [np.concatenate(one) for one in rows]


def main() -> None:
    try:
        bench(Asked.parse(sys.argv[1:]))
    except Fault as fault:
        raise SystemExit(str(fault)) from fault


def bench(asked: Asked) -> dict[str, float]:
    """Everything that is asked; the last line's figures."""
    asked.out.mkdir(parents=True, exist_ok=True)
    makers = {"made_up": made_up, "tiles": of_real_tiles}
    grounds = {name: makers[name](asked) for name in asked.grounds}

    def job(ground: Ground, row: str, seed: int) -> Job:
        settings = tuple(asked.settings.get("slide" if row == "random" else row, ()))
        return Job(ground, row, seed, tuple(asked.labels), asked.seconds, settings)

    jobs = {
        (name, row, seed): job(ground, row, seed)
        for name, ground in grounds.items()
        for row in asked.rows
        for seed in (asked.seeds[:1] if row in UNSEEDED else asked.seeds)
    }
    with ProcessPoolExecutor(CORES, mp_context=get_context("spawn")) as pool:
        paced = {(each.ground, each.row): each for each in (one.of_network() for one in jobs.values()) if each}
        for each, seconds in zip(paced.values(), pool.map(Job.pace, paced.values()), strict=True):
            print(f"{each.ground.folder.name}, {each.row}: {seconds:.3f} processor seconds a step", flush=True)
        found = dict(zip(jobs, pool.map(Job.figures, jobs.values()), strict=True))
    return shown(asked, found)


def shown(asked: Asked, found: dict[tuple[str, str, int], dict[str, float]]) -> dict[str, float]:
    """Print a table a ground and the line of figures, and give these."""
    line: dict[str, float] = {}
    for ground in asked.grounds:
        print(f"\n{ground:<14}" + "".join(f"{label:>16}" for label in asked.labels) + f"{'steps':>8}{'seconds':>9}")
        for row in asked.rows:
            of_seeds = [figures for (where, which, _), figures in found.items() if (where, which) == (ground, row)]
            for name, ending in [(row, "")] + ([(f"{row}_means", " by means")] if row in READ_BY_MEANS else []):
                cells = ""
                for label in asked.labels:
                    areas = [figures[label + ending] for figures in of_seeds]
                    line[f"{ground}/{label}/{name}"] = round(float(np.mean(areas)), 3)
                    if len(areas) > 1:
                        line[f"{ground}/{label}/{name}/lowest"] = round(min(areas), 3)
                    cells += f"{np.mean(areas):>8.3f}" + (f" ({min(areas):.3f})" if len(areas) > 1 else " " * 8)
                cost = [np.mean([one[key] for one in of_seeds]) for key in ("steps", "seconds") if key in of_seeds[0]]
                print(f"{name:<14}{cells}" + "".join(f"{one:>8.0f}" for one in cost))
    print("in brackets: the lowest of the seeds")
    print(json.dumps(line))
    return line


if __name__ == "__main__":
    main()
