"""A small road on disk, each part really computed: shards, a tile run with a checkpoint, class folders."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
import torch.distributed as dist
import yaml
from PIL import Image
from torch import nn

from data.keyed import rng
from data.shards.index import ShardIndex
from data.shards.scan import scan
from models.initialise import initialise
from models.vit import VisionTransformer
from pretrain.doctor import machine, tiles
from pretrain.run import checkpoints
from tests.data.shards.tars import tile_members, write_tar
from tests.data.shards.tile_folders import write_tiles

TILE, COLUMNS, ROWS = 40, 4, 3
MODEL = {
    "image_size": 32,
    "patch_size": 8,
    "width": 24,
    "depth": 2,
    "heads": 2,
    "feed_forward": "mlp",
    "feed_forward_width": 48,
    "registers": 0,
    "layer_scale": 1.0,
    "drop_path": 0.0,
    "position_antialias": True,
    "position_offset": 0.0,
}


def tile_pixels(slide: int, x: int, y: int) -> np.ndarray:
    """A tile whose colour depends on its place."""
    noise = rng(slide, "tile", x, y).integers(0, 40, size=(TILE, TILE, 3))
    return (noise + np.array([150 + x // 4, 90 + 40 * slide, 120 + y // 2])).clip(0, 255).astype(np.uint8)


@pytest.fixture(autouse=True)
def no_process_group() -> Iterator[None]:
    """A training that another test ran in this process leaves its group behind."""
    if dist.is_initialized():
        dist.destroy_process_group()
    yield


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For runs of tiny networks in this process: more threads make them slower, and sums come out otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tile_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 40 and 37 tiles, of two slides. Copy them to spoil them."""
    return write_tiles(tmp_path_factory.mktemp("tiles") / "shards", [40, 37])


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two slides of 12 tiles each in two tars that cut the first slide in two, indexed by a scan, with thumbnails."""
    folder = tmp_path / "shards"
    (folder / "thumbnails").mkdir(parents=True)
    tiles = [(slide, x * TILE, y * TILE) for slide in range(2) for y in range(ROWS) for x in range(COLUMNS)]
    whole_slide = {"width": TILE * COLUMNS + 8, "height": TILE * ROWS + 8, "thumbnail_downsample": 2.0}
    for number, part in enumerate((tiles[:7], tiles[7:])):
        members = []
        for slide, x, y in part:
            jpeg = simplejpeg.encode_jpeg(tile_pixels(slide, x, y), quality=95)
            members += tile_members(jpeg, f"slide{slide}", x, y, TILE, **whole_slide)
        write_tar(folder / f"tiles-{number:06d}.tar", members)
    for slide in range(2):
        whole = np.full((TILE * ROWS + 8, TILE * COLUMNS + 8, 3), 255, dtype=np.uint8)
        for which, x, y in tiles:
            if which == slide:
                whole[y : y + TILE, x : x + TILE] = tile_pixels(slide, x, y)
        Image.fromarray(whole[::2, ::2]).save(folder / "thumbnails" / f"slide{slide}.jpg")
    scan(folder)
    return folder


@pytest.fixture
def index(shards: Path) -> ShardIndex:
    return ShardIndex.open(shards)


def write_tile_run(run: Path, shards: Path, seed: int = 0, **model: object) -> VisionTransformer:
    """A tile run's configuration and a published checkpoint whose teacher has random weights; returns the teacher's
    encoder."""
    settings = MODEL | model
    encoder = VisionTransformer(**settings).eval()  # type: ignore[arg-type]
    initialise(encoder, seed)
    with torch.no_grad():  # no bias, norm or layer scale at its initial value: a swapped one shows
        for number, parameter in enumerate(encoder.parameters()):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    objective = nn.Module()
    objective.teacher = nn.Module()
    objective.teacher.encoder = encoder
    run.mkdir(parents=True)
    config = {
        "run": str(run),
        "seed": seed,
        "model": {"_target_": "models.vit.VisionTransformer", **settings},
        "data": {
            "shards": [str(shards)],
            "mean": [0.7, 0.5, 0.6],
            "std": [0.2, 0.25, 0.2],
            "crops": {"global_size": 32},
        },
    }
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    checkpoints.save(run, 3, objective, torch.optim.SGD(objective.parameters(), lr=0.1), {}, keep=0)
    return encoder


@pytest.fixture
def make_tile_run(tmp_path: Path, shards: Path):
    """``make(name, seed=0, **model settings)`` → the run's folder and the teacher's encoder."""

    def make(name: str = "tile", seed: int = 0, **model: object) -> tuple[Path, VisionTransformer]:
        return tmp_path / name, write_tile_run(tmp_path / name, shards, seed, **model)

    return make


@pytest.fixture
def class_folders(tmp_path: Path) -> Path:
    """Two classes of 12 images that differ in colour, of two sizes."""
    for klass, shade in (("healthy", 0), ("tumour", 70)):
        (tmp_path / "classes" / klass).mkdir(parents=True)
        for i in range(12):
            size = (36, 48) if i % 2 else (40, 40)
            pixels = rng(0, klass, i).integers(0, 80, size=(*size, 3)) + np.array([80 + shade, 90, 100])
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "classes" / klass / f"{i:02d}.png")
    return tmp_path / "classes"


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A doctor that starts no processes and times no tiles."""
    monkeypatch.setattr(machine, "all_reduce", lambda *_: [])
    monkeypatch.setattr(tiles, "tiles_per_second", lambda _: 1.0)
