"""What ``pretrain embed`` costs beside the bare forward pass, and what a random quarter of a slide costs beside a
row-chunked h5.

    make bench-embed

embed_ratio: tiles a second of the whole of `embed_slides` (read, decode, prepare, forward, store) over those of the
network alone on a batch that is ready in memory, in alternating rounds of one run. The tiles are 256-pixel JPEGs in
shards; the network is a ViT-S/16 at 224 pixels with random weights. It is given for wall time and for the process's CPU
time, which other work on the machine disturbs less.

quarter_ratio: reading a random quarter of a slide of 8,089 tiles with 1,536 numbers each, from an h5 with one chunk a
row, as TRIDENT's files have it, over reading it from the store as the slide stage does: float32 from the one, float16
from the other, both as stored and both from the page cache. quarter_ratio_float32: with the rows of the store made
float32 as well, which the slide stage leaves to its device.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

# Before torch loads OpenMP: a thread that waits for another then sleeps. It would spin, and on a busy machine the
# reading threads would wait behind it and processor seconds would count it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import h5py
import numpy as np
import simplejpeg
import torch

from data.embeddings.sources import ShardSource
from data.embeddings.store import EmbeddingStore, EmbeddingWriter
from data.keyed import rng
from data.shards.scan import scan
from models.initialise import initialise
from models.vit import VisionTransformer
from pretrain.embedding.tiles import embed_slides
from pretrain.encoders.preprocessing import Preprocessing
from pretrain.encoders.tile_encoder import TileEncoder, class_token
from tests.data.shards.tars import tile_members, write_tar

BATCH, TILES, ROUNDS = 16, 64, 5
ROWS, WIDTH = 8089, 1536


def encoder() -> TileEncoder:
    network = VisionTransformer(
        image_size=224,
        patch_size=16,
        width=384,
        depth=12,
        heads=6,
        feed_forward="mlp",
        feed_forward_width=1536,
        registers=0,
        layer_scale=1.0,
        drop_path=0.0,
        position_antialias=True,
        position_offset=0.0,
    )
    initialise(network, 0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    preprocessing = Preprocessing(224, 224, (0.7, 0.5, 0.6), (0.2, 0.2, 0.2))
    return TileEncoder(
        network, class_token, preprocessing, "ViT-S/16", "random", 384, device, "float32", lambda _: network
    )


def write_shards(folder: Path) -> None:
    """Two slides of smooth noise, cut into JPEGs of about the size that tissue has."""
    members = []
    for i in range(TILES):
        coarse = rng("tile", i).normal(0, 40, (64, 64, 3)).repeat(4, 0).repeat(4, 1)
        pixels = (coarse + np.array([190, 130, 180])).clip(0, 255).astype(np.uint8)
        jpeg = simplejpeg.encode_jpeg(pixels, quality=90)
        members += tile_members(jpeg, f"s{i * 2 // TILES}", i % 12 * 256, i // 12 * 256, 256)
    write_tar(folder / "tiles-000000.tar", members)
    scan(folder)


def spent(work: Callable[[], None]) -> tuple[float, float]:
    """Wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def embed_ratios(folder: Path, threads: int) -> tuple[float, float]:
    """(by wall time, by CPU time), each the median of the rounds."""
    write_shards(folder / "shards")
    source, network = ShardSource([str(folder / "shards")]), encoder()
    ready = torch.randn(BATCH, 3, 224, 224, device=network.device)

    def bare() -> None:
        with torch.inference_mode():
            for _ in range(TILES // BATCH):
                features = network.features(network.module, ready)
            features.cpu()

    def whole(number: int) -> Callable[[], None]:
        def work() -> None:
            with EmbeddingWriter(folder / f"store-{number}", 384, network.name, network.hash) as writer:
                embed_slides(
                    network.start,
                    source,
                    source.slides,
                    writer,
                    batch=BATCH,
                    threads=threads,
                    max_bad_fraction=0.0,
                    pin=network.device.type == "cuda",
                    done=0,
                )

        return work

    spent(bare)
    rounds = []
    for number in range(ROUNDS):
        before, with_all, after = spent(bare), spent(whole(number)), spent(bare)
        rounds.append([(before[i] + after[i]) / 2 / with_all[i] for i in range(2)])
        print(
            f"round {number + 1}: bare {before[0]:.2f} and {after[0]:.2f} s, embed {with_all[0]:.2f} s wall;"
            f" {rounds[-1][1]:.3f} by CPU time"
        )
    wall, cpu = (statistics.median(values) for values in zip(*rounds, strict=True))
    return wall, cpu


def quarter_ratios(folder: Path) -> tuple[float, float, float]:
    """(ratio, ratio with float32, milliseconds from the store): medians of CPU time, which is all there is to reading
    from the page cache."""
    values = rng("values").normal(size=(ROWS, WIDTH)).astype(np.float32)
    places = np.stack([np.arange(ROWS) % 100, np.arange(ROWS) // 100], axis=1) * 256
    with EmbeddingWriter(folder / "store", WIDTH, "any", "any") as writer:
        writer.add("slide", values, places, 256.0, 0.5)
    with h5py.File(folder / "rows.h5", "w") as file:
        file.create_dataset("features", data=values, chunks=(1, WIDTH), maxshape=(None, WIDTH))
    store = EmbeddingStore.open(folder / "store")
    theirs, ours, as_wide = [], [], []
    for number in range(9):
        wanted = np.sort(rng("quarter", number).permutation(ROWS)[: ROWS // 4])
        began = time.thread_time()
        with h5py.File(folder / "rows.h5") as file:
            expected = file["features"][wanted]
        theirs.append(time.thread_time() - began)
        began = time.thread_time()
        found = store.read("slide").embeddings[wanted]
        ours.append(time.thread_time() - began)
        wide = torch.from_numpy(found).float()
        as_wide.append(time.thread_time() - began)
        assert np.array_equal(found, expected.astype(np.float16)) and np.array_equal(wide.numpy(), found)
    h5, half, widened = (statistics.median(times) for times in (theirs, ours, as_wide))
    return h5 / half, h5 / widened, 1e3 * half


def main() -> None:
    threads = int((sys.argv[1:] or ["2"])[0])
    with tempfile.TemporaryDirectory() as name:
        quarter, in_float32, milliseconds = quarter_ratios(Path(name))
        print(
            f"a random quarter of {ROWS} tiles: {milliseconds:.2f} ms from the store, {quarter:.0f} times faster than"
            f" from the h5; made float32, {in_float32:.0f} times"
        )
        wall, cpu = embed_ratios(Path(name), threads)
    print(
        json.dumps(
            {
                "embed_ratio": round(wall, 3),
                "embed_ratio_cpu": round(cpu, 3),
                "quarter_ratio": round(quarter, 1),
                "quarter_ratio_float32": round(in_float32, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
