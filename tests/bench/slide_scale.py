"""The slide stage at the size of the published pretraining: 171,189 slides, 1,384,860,229 tiles.

    make bench-slide-scale
    python tests/bench/slide_scale.py shared 100000      # the last part alone, with a slide of so many tiles

Makes a store of that size whose files are sparse (8 numbers a tile; no disk is filled) and one of 64 slides, removed at
the end. Then, each in a process of its own:

- the pieces of a start, and how long a resumed rank takes to find its first batch at steps from the first to the last
  of the published 20,070 (``resume_seconds``, the slowest);
- ``pretrain slide`` to its first step on both stores: ``start_seconds`` is what it takes on the large one, less what
  importing takes; ``start_seconds_of_64_slides`` the same on the small one; ``gib_beyond_64_slides`` how much more
  memory its largest process needs;
- ``pretrain embed stage=slide`` on one slide of 10⁶ made-up tiles, by one process and by two that share it: seconds,
  GiB of the largest process, and how far any number of any vector differs, beside that vector's largest
  (``shared_difference``, 1e-5 at most). A LongNet of the published segments and 16 heads, one layer, 64 wide.

What grows with slides: the index in memory (``index_mib``), its reading and its digest, one pass over the store for
mean and spread (one process, once a run), and a permutation and a list of lanes a pass. Each rank has its own index and
permutation, so they grow with slides × ranks; nothing else does. Ends with one JSON line.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.embeddings.index import Entry, PartFacts, write_embedding_index
from data.embeddings.packing import Packing
from data.embeddings.slide_features import SLIDE_VECTORS, read_slide_features
from data.embeddings.standardisation import Statistics
from data.embeddings.store import FILE_BYTES, EmbeddingStore, EmbeddingWriter, claim
from data.keyed import rng
from models.initialise import initialise
from models.longnet import LongNet
from pretrain.run import checkpoints
from pretrain.settings.config_files import CONFIGS

TILES, SLIDES = 1_384_860_229, 171_189
WIDTH, LARGEST = 8, 64_000
BATCH, TOKENS, LANES, STEPS = 256, 4_194_304, 64, 20_070  # of the published recipe
ONE_SLIDE, ONE_WIDTH = 1_000_000, 16  # tiles of the slide that processes share, and numbers of each
EQUAL = 1e-5
ROOT = Path(__file__).resolve().parents[2]


def generate(folder: Path, slides: int, tiles: int) -> None:
    """A store whose tiles are holes: all zeros, all at one place."""
    sizes = rng(0, "slide scale").lognormal(0, 0.7, slides)
    sizes = np.minimum(np.maximum(4, sizes / sizes.sum() * tiles), LARGEST).astype(np.int64)
    sizes[np.argsort(sizes)[: tiles - int(sizes.sum())]] += 1
    folder.mkdir()
    claim(folder, {"format": 1, "width": WIDTH, "encoder": "holes", "encoder_hash": "0" * 32})
    entries, number, end = [], 0, 0
    for slide, rows in enumerate(sizes.tolist()):
        file = f"embeddings-0-{number:06d}.bin"
        entries.append(Entry(f"TCGA-XX-{slide:06d}-01Z-00-DX1", file, end, rows, 256.0, 0.5, 256, 98_304, 81_920))
        end = entries[-1].end(WIDTH)
        if end >= FILE_BYTES or slide == slides - 1:
            with open(folder / file, "wb") as data:
                data.truncate(end)
            number, end = number + 1, 0
    write_embedding_index(folder / "index-0.parquet", entries, PartFacts(0, 1, True, {}))


def pieces(folder: Path) -> dict[str, float]:
    """Seconds of each part of a start, in this process."""
    found = {}

    def timed(name: str, began: float) -> float:
        found[f"{name}_seconds"] = time.perf_counter() - began
        return time.perf_counter()

    before, now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    store = EmbeddingStore.open(folder)
    now = timed("index", now)
    found["index_mib"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10
    assert len(store.slides) == SLIDES
    store.digest  # noqa: B018
    now = timed("digest", now)
    Statistics.of(store)
    timed("statistics", now)
    sizes = np.array([store.rows(slide) for slide in store.slides])
    slowest = 0.0
    for step in (0, STEPS // 2, STEPS - 1):
        now = time.perf_counter()
        packing = Packing(sizes, batch_size=BATCH, batch_tokens=TOKENS, lanes=LANES, seed=0)
        for position in packing.batch(step, 31, LANES):
            store.read(store.slides[packing.sequence_at(position)])
        slowest = max(slowest, time.perf_counter() - now)
    return found | {"resume_seconds": slowest}


def first_step(store: Path, run: Path) -> tuple[float, float]:
    """Seconds of `pretrain slide` to the end of its first step, and GiB of its largest process."""
    words = [
        f"run={run}",
        f"data.embeddings={store}",
        "model=longnet",
        "model.width=16",
        "model.depth=1",
        "model.heads=2",
        "model.feed_forward_width=16",
        "model.segment_lengths=[1024]",
        "model.dilated_ratios=[1]",
        "objective.decoder_width=16",
        "objective.decoder_depth=1",
        "objective.decoder_heads=2",
        "objective.decoder_feed_forward_width=16",
        "data.batch_size=4",
        "data.batch_tokens=4096",
        "data.lanes=4",
        "data.field_cells=0",
        "data.validation_fraction=0",
        "optim.steps=1",
        "optim.warmup_steps=0",
        "trainer.checkpoint_every=0",
    ]
    return measured(["slide", *words])


def measured(words: list[str]) -> tuple[float, float]:
    """Seconds of a command, and GiB of its largest process."""
    began = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, "-m", "pretrain", *words],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    _, status, used = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"pretrain {' '.join(words)} failed")
    return time.perf_counter() - began, used.ru_maxrss / 2**20


def shared(folder: Path, tiles: int) -> dict[str, float]:
    """One slide of so many tiles embedded by one process, and by two that share it. Raises SystemExit where they find
    something else."""
    store, run, found = folder / "one-slide", folder / "run-one-slide", {}
    with EmbeddingWriter(store, ONE_WIDTH, "made up", "0" * 16) as writer:
        side = round(tiles**0.5)
        places = np.stack([np.arange(tiles) % side, np.arange(tiles) // side], axis=1) * 256
        writer.add("slide", rng(0, "one slide").normal(size=(tiles, ONE_WIDTH)), places, 256.0, 0.5)
    settings = yaml.safe_load((CONFIGS / "model" / "longnet.yaml").read_text())
    settings |= {"width": 64, "depth": 1, "feed_forward_width": 64}
    kind = settings.pop("_target_")
    objective = nn.Module()
    objective.encoder = LongNet(ONE_WIDTH, **settings)
    initialise(objective.encoder, 0)
    run.mkdir()
    config = {"model": {"_target_": kind, **settings}, "data": {"embeddings": str(store)}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    checkpoints.save(run, 1, objective, torch.optim.SGD(objective.parameters(), lr=0.1), {}, keep=0)
    for processes, name in ((1, "one_slide"), (2, "shared")):
        words = ["embed", "stage=slide", f"checkpoint={run}", f"embeddings={store}", f"out={folder / name}"]
        words += ["device=cpu", f"processes_per_slide={processes}"]
        found[f"{name}_seconds"], found[f"{name}_gib"] = measured(words)
    alone, together = (read_slide_features(folder / name)[1] for name in ("one_slide", "shared"))
    found["shared_difference"] = max(
        float(np.abs(together[kind] - alone[kind]).max() / np.abs(alone[kind]).max()) for kind in SLIDE_VECTORS
    )
    if found["shared_difference"] > EQUAL:
        raise SystemExit(f"two processes find other vectors than one: {json.dumps(found)}")
    return found


def importing() -> float:
    """Seconds that the imports of `pretrain slide` take."""
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", "import pretrain.commands.slide, pretrain.training.slide_stage, pretrain.training.fit"],
        cwd=ROOT,
        check=True,
    )
    return time.perf_counter() - began


def main() -> None:
    if sys.argv[1:2] == ["pieces"]:
        print(json.dumps(pieces(Path(sys.argv[2]))))
        return
    if sys.argv[1:2] == ["shared"]:
        with tempfile.TemporaryDirectory(prefix="slide-scale-") as name:
            print(json.dumps(shared(Path(name), int(sys.argv[2]))))
        return
    with tempfile.TemporaryDirectory(prefix="slide-scale-") as name:
        large, small = Path(name) / "large", Path(name) / "small"
        print(f"a store of {SLIDES:,} slides and {TILES:,} tiles, of holes …", flush=True)
        generate(large, SLIDES, TILES)
        generate(small, 64, 64 * 4000)
        own = subprocess.run(
            [sys.executable, __file__, "pieces", str(large)], stdout=subprocess.PIPE, text=True, check=True
        )
        figures: dict[str, float] = json.loads(own.stdout)
        for key, value in figures.items():
            print(f"  {key:<24}{value:>9.2f}", flush=True)
        imports = importing()
        (few, few_gib), (all_, all_gib) = (
            first_step(store, Path(name) / f"run-{store.name}") for store in (small, large)
        )
        print(f"one slide of {ONE_SLIDE:,} tiles, by one process and by two …", flush=True)
        figures |= shared(Path(name), ONE_SLIDE)
    figures |= {
        "imports_seconds": imports,
        "start_seconds": all_ - imports,
        "start_seconds_of_64_slides": few - imports,
        "gib_beyond_64_slides": all_gib - few_gib,
    }
    print(json.dumps({key: float(f"{value:.3g}") if value < 1 else round(value, 3) for key, value in figures.items()}))


if __name__ == "__main__":
    main()
