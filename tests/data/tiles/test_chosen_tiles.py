"""What a table chooses of a source comes, as often as it says, in the one order; and what can't be is one sentence."""

import pickle
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import simplejpeg

from data.fault import Fault
from data.shards.scan import scan
from data.slides.tiling import KEPT, TilingSettings
from data.slides.tissue import tissue_needed
from data.tiles import of_parquet, sample_table
from data.tiles.chosen import ChosenTiles, chosen_path, find_chosen, read_chosen
from data.tiles.mixture import Mixture
from data.tiles.of_parquet import ParquetTiles
from data.tiles.of_shards import ShardTiles
from data.tiles.of_slides import SlideTiles
from data.tiles.sample_table import SampleTable
from data.tiles.source import TileSource, UnreadableTile
from data.tiles.stream import Stream
from tests.data.parquet.tables import write_table
from tests.data.shards.tars import write_tar
from tests.data.shards.tile_folders import SIDE, picture, spoil, write_tiles
from tests.data.tiles.test_parquet_tiles import index_of, near
from tests.data.tiles.test_slide_tiles import look, write_slides

TILES = [40, 37]


def write_sample(path: Path, numbers: Iterable[int], weights: Iterable[int] | None = None, **columns: Any) -> Path:
    """A table of these tiles of `write_tiles`, in this order."""
    numbers = list(numbers)
    table: dict[str, Any] = {
        "slide": [f"slide{int(number >= TILES[0])}" for number in numbers],
        "x": [number % 8 * SIDE for number in numbers],
        "y": [number // 8 * SIDE for number in numbers],
    }
    table |= {} if weights is None else {"weight": list(weights)}
    pq.write_table(pa.table(table | columns), path, row_group_size=7)
    return path


def silently(places: Iterable[Any]) -> Iterable[Any]:
    return places


def choose(source: TileSource, table: Path, group: int = 1) -> ChosenTiles:
    path = chosen_path(table, source)
    find_chosen(path, SampleTable(table), source, silently)
    return ChosenTiles(source, read_chosen(path), group)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiles(tmp_path_factory.mktemp("chosen") / "shards", TILES)


def comes(tiles: TileSource, passes: int = 1, lanes: int = 2) -> list[int]:
    """Numbers in the source of the tiles of some passes, in their order."""
    stream = Stream(tiles.parts, batch_size=lanes, lanes=lanes, window=2, seed=0)
    numbers = [
        stream.lane(lane, 0, passes * (len(tiles) * (lane + 1) // lanes - len(tiles) * lane // lanes))
        for lane in range(lanes)
    ]
    return tiles.numbers[np.concatenate(numbers)].tolist()  # type: ignore[attr-defined]


def test_a_pass_has_exactly_the_chosen_tiles_once(shards: Path, tmp_path: Path) -> None:
    wanted = [76, 3, 5, 41, 12, 39, 40, 60]
    others = [number for number in range(77) if number not in wanted]
    table = write_sample(tmp_path / "a.parquet", wanted + others[:30], [1] * 8 + [0] * 30)
    tiles = choose(ShardTiles(shards=[str(shards)]), table)
    assert sorted(comes(tiles)) == sorted(wanted) and sorted(comes(tiles, 3)) == sorted(wanted * 3)
    for own, number in enumerate(sorted(wanted)):
        assert near(tiles.read(own), picture(number))
        assert f"({number % 8 * SIDE}, {number // 8 * SIDE})" in tiles.name(own)
        assert tiles.slide(own) == f"{shards}/slide{int(number >= 40)}" and tiles.mpp(own) == 0.5
    found = tiles.chosen
    assert (found.tiles, found.left, found.unknown, found.lost) == (8, 30, 39, 0)
    assert np.array_equal(pickle.loads(pickle.dumps(tiles)).read(2), tiles.read(2))


def test_a_tile_of_weight_three_comes_three_times_a_pass_and_not_in_a_row(shards: Path, tmp_path: Path) -> None:
    weights = [3, 1, 2, 1, 0, 3] * 12
    tiles = choose(ShardTiles(shards=[str(shards)]), write_sample(tmp_path / "a.parquet", range(72), weights))
    order = comes(tiles)
    assert np.bincount(order, minlength=72).tolist() == weights and len(tiles) == sum(weights)
    assert all(len(set(tiles.numbers[begin:end].tolist())) == end - begin for begin, end in blocks(tiles))


def blocks(tiles: TileSource) -> list[tuple[int, int]]:
    ends = np.cumsum(np.concatenate([part.block_sizes for part in tiles.parts])).tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


def test_without_weights_every_tile_of_the_table_comes_and_blocks_are_the_source_s(
    shards: Path, tmp_path: Path
) -> None:
    tiles = choose(ShardTiles(shards=[str(shards)]), write_sample(tmp_path / "a.parquet", range(30, 50)))
    assert tiles.parts[0].block_sizes.tolist() == [10, 10] and comes(tiles) != sorted(comes(tiles))


def test_tiles_of_one_slide_are_dealt_out_together_or_are_too_few(shards: Path, tmp_path: Path) -> None:
    source = ShardTiles(4, shards=[str(shards)])
    tiles = choose(source, write_sample(tmp_path / "a.parquet", range(0, 77, 2)), group=4)
    assert [int(size) for size in tiles.parts[0].block_sizes] == [20, 19]
    twice = write_sample(tmp_path / "c.parquet", range(0, 77, 2), [1 + (number == 6) for number in range(39)])
    assert [int(size) for size in choose(source, twice, group=4).parts[0].block_sizes] == [20, 19, 1]
    with pytest.raises(Fault, match=r"deals out 4 tiles of one slide together, and data\.sample takes 1\.5 of a slide"):
        choose(source, write_sample(tmp_path / "b.parquet", [1, 2, 50]), group=4)


def test_a_bad_tile_is_replaced_by_a_chosen_one_of_its_part(tmp_path: Path) -> None:
    shards = write_tiles(tmp_path / "shards", TILES)
    spoil(shards, [20, 76])
    table = write_sample(tmp_path / "a.parquet", [2, 20, 30, 76], [1, 2, 1, 2])
    tiles = choose(ShardTiles(shards=[str(shards)]), table)
    assert tiles.numbers.tolist() == [2, 20, 30, 76, 20, 76]
    for number, following in ((1, 2), (3, 0), (4, 5), (5, 0)):
        with pytest.raises(UnreadableTile, match="can't be read") as raised:
            tiles.read(number)
        assert raised.value.next == following


def test_a_bad_tile_that_is_alone_in_its_round_is_replaced_by_another_of_its_own_part(tmp_path: Path) -> None:
    one, other = (write_tiles(tmp_path / name, [16]) for name in ("one", "other"))
    spoil(other, [5, 15])
    both = {"a": (ShardTiles(shards=[str(one)]), 1.0), "b": (ShardTiles(shards=[str(other)]), 1.0)}
    source = Mixture(both)
    table = write_sample(tmp_path / "a.parquet", [2, 5, 7, 15], [1, 4, 1, 5])
    tiles = choose(source, table)
    assert tiles.numbers.tolist()[10:] == [15, 2 + 16, 5 + 16, 7 + 16, 15 + 16, *[21, 31] * 3, 31]
    for number, sound in ((21, 11), (20, 11), (19, 11)):
        for _ in range(3):
            try:
                tiles.read(number)
                break
            except UnreadableTile as error:
                assert error.next != number
                number = error.next
        assert number == sound


def test_grid_cells_of_slides_online_are_chosen_by_their_places(tmp_path: Path) -> None:
    write_slides(tmp_path / "slides")
    surveyed = look(tmp_path / "slides", tmp_path / "grids")
    source, rows = SlideTiles(surveyed), []
    for number, slide in enumerate(surveyed.slides):
        x, y, _ = surveyed.tiling(number).tiles(KEPT)
        rows += [(slide, *place) for place in zip(x.tolist(), y.tolist(), strict=True)]
    wanted = list(range(5, len(source), 9))
    table = {name: [rows[number][at] for number in wanted] for at, name in enumerate(("slide", "x", "y"))}
    pq.write_table(pa.table(table | {"tile_size_level0": [32.0] * len(wanted)}), tmp_path / "a.parquet")
    tiles = choose(source, tmp_path / "a.parquet")
    assert tiles.numbers.tolist() == wanted
    assert np.array_equal(tiles.read(3, 0, 17), source.read(wanted[3], 0, 17))
    coarse = SlideTiles(
        look(tmp_path / "slides", tmp_path / "coarse", TilingSettings(1.0, 32, tissue_needed(["otsu"], [0.4])))
    )
    with pytest.raises(
        Fault, match=r"are 64 level-0 pixels a side in this source and 32 in .*: take tiles of the size"
    ):
        choose(coarse, tmp_path / "a.parquet")
    with pytest.raises(Fault, match=r"data\.tiles_per_slide draws a slide's tiles anew"):
        choose(SlideTiles(surveyed, most=10), tmp_path / "a.parquet")


def test_rows_of_parquet_files_are_chosen_by_columns_x_and_y(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_parquet, "TILES_PER_CHUNK", 8)
    numbers = range(77)
    places = {"x": [n % 8 * SIDE for n in numbers], "y": [n // 8 * SIDE for n in numbers]}
    slides = [f"slide{int(number >= TILES[0])}" for number in numbers]
    write_table(tmp_path / "files" / "a.parquet", numbers, slide=slides, tile_size_level0=[float(SIDE)] * 77, **places)
    table = write_sample(tmp_path / "a.parquet", [70, 3, 9, 40], tile_size_level0=[48.0] * 4)
    tiles = choose(ParquetTiles(index_of(tmp_path / "files")), table)
    assert tiles.numbers.tolist() == [3, 9, 40, 70] and all(
        near(tiles.read(i), picture(n)) for i, n in enumerate((3, 9, 40, 70))
    )
    apart = next(
        ParquetTiles(tiles.source.index, hold_out=share) for share in (0.2, 0.4, 0.6, 0.8) if _keeps_one(tiles, share)
    )  # type: ignore[attr-defined]
    some = choose(apart, table)
    held_out = some.held_out()
    assert len(some) == 2 and held_out is not None and len(held_out) in TILES
    write_table(tmp_path / "without" / "a.parquet", numbers, slide=slides)
    with pytest.raises(Fault, match=r"a\.parquet has no column x and no y: add them"):
        choose(ParquetTiles(index_of(tmp_path / "without")), table)
    write_table(tmp_path / "nobodys" / "a.parquet", numbers)
    with pytest.raises(Fault, match="these files don't say whose tiles they hold"):
        choose(ParquetTiles(index_of(tmp_path / "nobodys")), table)


def _keeps_one(tiles: ChosenTiles, share: float) -> bool:
    try:
        return len(ParquetTiles(tiles.source.index, hold_out=share)) in TILES  # type: ignore[attr-defined]
    except Fault:
        return False


def test_members_of_a_mixture_keep_their_weights_and_one_without_chosen_tiles_is_refused(
    shards: Path, tmp_path: Path
) -> None:
    other = write_tiles(tmp_path / "other", [16])
    both = {"a": (ShardTiles(shards=[str(shards)]), 3.0), "b": (ShardTiles(shards=[str(other)]), 1.0)}
    tiles = choose(Mixture(both), write_sample(tmp_path / "a.parquet", [1, 2, 41], [2, 1, 1]))
    assert [(part.weight, int(part.block_sizes.sum())) for part in tiles.parts] == [(3.0, 4), (1.0, 3)]
    assert tiles.numbers.tolist() == [1, 2, 41, 1, 78, 79, 78]
    with pytest.raises(Fault, match=r"data\.sample chooses no tile of b: .*: leave that out"):
        choose(Mixture(both), write_sample(tmp_path / "b.parquet", [41]))
    with pytest.raises(Fault, match=r"data\.sample is given twice"):
        choose(tiles, tmp_path / "a.parquet")


def test_the_digest_tells_other_tiles_and_weights_and_not_the_table_s_place(shards: Path, tmp_path: Path) -> None:
    source = ShardTiles(shards=[str(shards)])
    one = choose(source, write_sample(tmp_path / "a.parquet", [1, 2], [1, 1]))
    same = choose(source, write_sample(tmp_path / "b.parquet", [2, 1, 7], [1, 1, 0]))
    twice = choose(source, write_sample(tmp_path / "c.parquet", [1, 2], [1, 2]))
    assert one.digest == same.digest != twice.digest and source.digest in one.digest
    before = chosen_path(tmp_path / "c.parquet", source)
    write_sample(tmp_path / "c.parquet", [1, 2, 3], [1, 2, 1])
    assert chosen_path(tmp_path / "c.parquet", source) != before


def test_a_table_is_read_slide_by_slide_however_its_rows_lie(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample_table, "ROWS_AT_ONCE", 5)
    wanted = [7, 60, 8, 61, 9, 62, 39, 40, 0, 76]
    tiles = choose(ShardTiles(shards=[str(shards)]), write_sample(tmp_path / "a.parquet", wanted, range(1, 11)))
    weights = np.bincount(tiles.numbers, minlength=77)
    assert [int(weights[number]) for number in wanted] == list(range(1, 11)) and tiles.chosen.tiles == 10


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"x": None}, "has no column x (it has slide, y, weight)"),
        ({"slide": [None, "slide0", "slide0"]}, "doesn't say the slide of every tile"),
        ({"x": [0, None, 48]}, "has tiles without x"),
        ({"x": ["a", "b", "c"]}, "the column x of"),
        ({"x": [0.5, 48.0, 96.0]}, "holds what is no whole number"),
        ({"x": [-1, 48, 96]}, "places of slide0 lie outside of any slide"),
        ({"x": [0, 0, 48]}, "has the tile of slide0 at (0, 0) more than once (1 such of this slide)"),
        ({"x": [0, 0, 0]}, "has the tile of slide0 at (0, 0) more than once (1 such of this slide)"),
        ({"weight": [1, -1, 1]}, "has weights of -1 to 1: a weight is how often"),
        ({"weight": [1, 1.5, 1]}, "the column weight of"),
        ({"weight": [0, 0, 0]}, "chooses none of its 3 tiles"),
        ({"tile_size_level0": [48.0, 96.0, 48.0]}, "has tiles of slide0 of several sizes"),
        ({"tile_size_level0": [96.0, 96.0, 96.0]}, "are 48 level-0 pixels a side in this source and 96 in"),
        ({"slide": ["x", "y", "z"]}, "this source has none of the 3 tiles that"),
    ],
)
def test_tables_that_can_t_be_used_say_why(
    shards: Path, tmp_path: Path, columns: dict[str, Any], sentence: str
) -> None:
    table: dict[str, Any] = {"slide": ["slide0"] * 3, "x": [0, 48, 96], "y": [0, 0, 0], "weight": [1, 1, 1]} | columns
    table = {name: values for name, values in table.items() if values is not None}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    with pytest.raises(Fault, match=re.escape(sentence)):
        choose(ShardTiles(shards=[str(shards)]), tmp_path / "a.parquet")


def test_tiles_whose_places_nobody_recorded_can_t_be_chosen(tmp_path: Path) -> None:
    members = [(f"slide0_{number}.jpg", simplejpeg.encode_jpeg(picture(number))) for number in range(5)]
    write_tar(tmp_path / "shards" / "slide0.tar", members)
    scan(tmp_path / "shards")
    with pytest.raises(Fault, match="nobody recorded where this source's lie: make shards of them by 'pretrain shard'"):
        choose(ShardTiles(shards=[str(tmp_path / "shards")]), write_sample(tmp_path / "a.parquet", range(5)))


def test_files_that_are_no_tables_or_are_damaged_say_so(shards: Path, tmp_path: Path) -> None:
    source, place = ShardTiles(shards=[str(shards)]), tmp_path / "a.parquet"
    with pytest.raises(Fault, match=r"there is no table of tiles at .*'pretrain curate' makes one"):
        choose(source, place)
    with pytest.raises(Fault, match="can't be read as a table of tiles"):
        choose(source, tmp_path)
    place.write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(Fault, match="can't be read as a table of tiles"):
        choose(source, place)
    whole = write_sample(place, range(60)).read_bytes()
    place.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Fault, match="can't be read as a table of tiles"):
        choose(source, place)
    pq.write_table(pq.read_table(write_sample(place, [1])).slice(0, 0), place)
    with pytest.raises(Fault, match="chooses none of its 0 tiles"):
        choose(source, place)
    choose(source, write_sample(place, [1]))
    (kept,) = tmp_path.glob("a-*.npz")
    kept.write_bytes(b"PK nothing")
    with pytest.raises(Fault, match=r"is damaged .*makes it anew"):
        read_chosen(kept)


def test_flipped_bits_of_a_table_end_in_a_sentence_or_in_a_stream(shards: Path, tmp_path: Path) -> None:
    source, place = ShardTiles(shards=[str(shards)]), tmp_path / "a.parquet"
    whole, draw = write_sample(place, range(60), [1] * 60).read_bytes(), np.random.default_rng(0)
    ends = set()
    for at in draw.integers(4, len(whole), 60).tolist():
        place.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << int(draw.integers(8))]) + whole[at + 1 :])
        try:
            ends.add(len(choose(source, place)) > 0)
        except Fault as fault:
            ends.add("\n" in str(fault))
    assert ends == {True, False}
