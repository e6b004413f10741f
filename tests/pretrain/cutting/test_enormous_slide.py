"""A slide of 100,000 × 100,000 pixels, mostly glass: memory stays bounded, and every tile is read once, from the best
level."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from data.shards.index import ShardIndex
from tests.data.slides.enormous_slide import write_enormous
from tests.pretrain.commands.test_shard_command import DEFAULTS, ROOT

MEASURED = """
import json, sys
from collections import Counter
from openslide import lowlevel
from pretrain.commands.shard import Config, run
reads = Counter()
read_region = lowlevel._read_region
def counting(slide, pixels, x, y, level, width, height):
    reads[(x, y), level, (width, height)] += 1
    return read_region(slide, pixels, x, y, level, width, height)
lowlevel._read_region = counting
def peak():  # ru_maxrss would begin with the peak of the process that started this one
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
before = peak()
run(Config(**eval(sys.argv[1])))
tiles = {key: count for key, count in reads.items() if key[1] == 0}
print(json.dumps({"grown_mib": peak() - before, "tiles": len(tiles), "most": max(tiles.values()), "others": len(reads) - len(tiles)}))
"""


@pytest.mark.slow
def test_memory_is_bounded_and_no_tile_is_read_twice(tmp_path: Path) -> None:
    slide = write_enormous(tmp_path / "slides/big.tiff", 100_000, 100_000, (80, 64, 96, 80), mpp=0.25)
    assert slide.stat().st_size < 4e6
    settings = DEFAULTS | {
        "slides": [str(slide)],
        "out": str(tmp_path / "out"),
        "tile_size": 256,
        "tiles_per_shard": 10_000,
    }
    ended = subprocess.run(
        [sys.executable, "-c", MEASURED, repr(settings)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout.splitlines()[-1])
    assert found["grown_mib"] < 700, "a level-0 row of tiles alone has 200 MB as pixels, the whole slide 40 GB"
    assert found["most"] == 1 and found["tiles"] == 256
    assert found["others"] < 40, "the thumbnail comes from a coarse level, in a few large reads"
    index = ShardIndex.open(tmp_path / "out")
    assert len(index) == 256 and index.facts(0)["width"] == 100_000
