"""An index of a billion rows stays on the disk: what a rank keeps of it in memory is small."""

from pathlib import Path

import numpy as np
import pytest

from data.npz_files import mapped
from data.parquet.index import ParquetIndex, ParquetQuestion
from data.tiles.of_parquet import ParquetTiles
from data.tiles.stream import Stream

ROWS, GROUP, FILES = 10**9, 200, 1000
SLIDES = 1000


def huge_index(folder: Path) -> ParquetIndex:
    """Its column of slides is a file without content, 4 GB of slide 0, but for the last rows of each file."""
    groups = ROWS // GROUP
    np.full(groups, GROUP, np.int64).tofile(folder / "groups")
    with (folder / "slides").open("wb") as file:
        file.truncate(4 * ROWS)
        for number in range(FILES):
            file.seek(4 * (ROWS // FILES * (number + 1) - GROUP))
            file.write(np.full(GROUP, number % SLIDES, np.int32).tobytes())
    each = mapped(folder / "groups", (np.dtype(np.int64), 0, groups))
    columns = {
        "file_groups": np.arange(FILES + 1, dtype=np.int64) * (groups // FILES),
        "group_rows": each,
        "group_bytes": each,
        "slide": mapped(folder / "slides", (np.dtype(np.int32), 0, ROWS)),
    }
    slides = [f"slide{number}" for number in range(SLIDES)]
    meta = {"files": list(range(FILES)), "image": "jpeg", "slides": slides, "patients": [""] * SLIDES, "left_out": []}
    meta |= {"unclear": "", "digest": "huge"}
    files = [f"/nowhere/{number:04d}.parquet" for number in range(FILES)]
    return ParquetIndex(ParquetQuestion(files, [1] * FILES, ["1"] * FILES, None, None, None, None), columns, meta)


def resident(name: str) -> float:
    """GiB that this process holds (VmRSS), or held at most since it was last asked (VmHWM)."""
    found = {line.partition(":")[0]: line.split() for line in Path("/proc/self/status").read_text().splitlines()}
    return int(found[name][1]) / 2**20


@pytest.mark.parametrize("hold_out", [0.0, pytest.param(0.2, marks=pytest.mark.slow)])
def test_a_rank_holds_less_than_two_gib_of_a_billion_rows(tmp_path: Path, hold_out: float) -> None:
    index = huge_index(tmp_path)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before = resident("VmRSS")
    tiles = ParquetTiles(index, hold_out=hold_out)
    assert len(tiles) == ROWS if not hold_out else ROWS * 0.99 < len(tiles) < ROWS
    stream = Stream(tiles.parts, batch_size=512, lanes=64, window=16, seed=0)
    for step in (0, 10**6):
        numbers = stream.batch(step, 1, 16)
        assert len(np.unique(numbers)) == 32 and all(tiles.slide(number) for number in numbers.tolist())
    assert tiles.name(numbers[0]).startswith("row ")
    assert resident("VmHWM") - before < 2.0
