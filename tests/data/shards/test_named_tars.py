"""Shards named as WebDataset's users name them: some tars of a folder are the tiles of those tars, and a gap is named."""

from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from data.embeddings.sources import ShardSource
from data.fault import Fault
from data.shards.index import ShardIndex
from data.shards.named_tars import named_tars, open_shards
from data.shards.scan import scan
from data.tiles.of_shards import ShardTiles
from tests.data.shards.tars import tile_members, write_tar
from tests.data.shards.tile_folders import picture, write_tiles


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Tars of 4, 3, 5 and 2 tiles, ``tiles-000000.tar`` to ``tiles-000003.tar``, a slide each."""
    return write_tiles(tmp_path / "shards", [4, 3, 5, 2])


@pytest.mark.parametrize(
    ("named", "numbers"),
    [
        ("", range(14)),
        ("/tiles-{000001..000002}.tar", range(4, 12)),
        ("/tiles-{000000,000003}.tar", [*range(4), 12, 13]),
        ("/tiles-00000[13].tar", [4, 5, 6, 12, 13]),
        ("/tiles-00000?.tar", range(14)),
        ("/*.tar", range(14)),
        ("/tiles-000002.tar", range(7, 12)),
    ],
)
def test_a_list_in_braces_a_glob_and_a_file_are_the_tiles_of_those_tars(
    folder: Path, named: str, numbers: list[int]
) -> None:
    tiles = ShardTiles(shards=[f"{folder}{named}"])
    whole = ShardTiles(shards=[str(folder)])
    assert len(tiles) == len(numbers)
    for own, number in enumerate(numbers):
        assert np.array_equal(tiles.read(own), whole.read(number)) and tiles.slide(own) == whole.slide(number)
    assert np.abs(tiles.read(0).astype(int) - picture(numbers[0]).astype(int)).mean() < 6
    assert (tiles.digest == whole.digest) == (named == "")


def test_tars_of_several_folders_and_a_slide_over_two_tars_keep_their_slides(folder: Path, tmp_path: Path) -> None:
    other = write_tiles(tmp_path / "other", [2, 2])
    tiles = ShardTiles(shards=[f"{tmp_path}/{{shards,other}}/tiles-000001.tar", str(other)])
    assert len(tiles) == 3 + 2 + 2  # the tar that comes by both names comes once
    index = ShardIndex.open(folder).only(["tiles-000003.tar", "tiles-000001.tar"])
    assert index.files == ["tiles-000001.tar", "tiles-000003.tar"]
    assert [index.slide_of(row) for row in range(5)] == ["slide1"] * 3 + ["slide3"] * 2
    assert np.array_equal(np.concatenate([index.rows_of(slide) for slide in (1, 3)]), np.arange(5))


def test_a_gap_a_lost_tar_and_a_pipe_are_said_with_the_way_out(folder: Path) -> None:
    with pytest.raises(Fault, match=r"names tiles-000004\.tar, tiles-000005\.tar, which .*leave them out"):
        open_shards([f"{folder}/tiles-{{000002..000005}}.tar"])
    (folder / "tiles-000001.tar").unlink()
    assert len(open_shards([f"{folder}/tiles-{{000002..000003}}.tar"])[0]) == 7  # what isn't asked for may be gone
    with pytest.raises(Fault, match=r"names tiles-000001\.tar, which"):
        open_shards([f"{folder}/tiles-*.tar"])
    with pytest.raises(Fault, match=r"is a command, .* give the shards' own address \(s3://"):
        open_shards(["pipe:aws s3 cp s3://bucket/tiles-{000000..000004}.tar -"])


def test_folders_in_braces_are_whole_folders(folder: Path, tmp_path: Path) -> None:
    other = write_tiles(tmp_path / "other", [2, 2])
    assert named_tars(f"{tmp_path}/{{shards,other}}") == {str(folder): None, str(other): None}
    assert len(ShardTiles(shards=[f"{tmp_path}/{{shards,other}}"])) == 14 + 4


def test_slides_are_embedded_of_the_tars_that_are_named_each_as_a_whole(tmp_path: Path) -> None:
    jpeg = simplejpeg.encode_jpeg(picture(0), quality=90)
    for tar, slides in enumerate((["a", "a"], ["a", "b"], ["c"])):
        places = [(name, 64 * (2 * tar + x)) for x, name in enumerate(slides)]
        members = [member for name, x in places for member in tile_members(jpeg, name, x, 0, 48)]
        write_tar(tmp_path / "parts" / f"tiles-{tar}.tar", members)
    scan(tmp_path / "parts")
    source = ShardSource([f"{tmp_path}/parts/tiles-{{0..1}}.tar"])
    assert source.slides == ["a", "b"] and source.sizes == [3, 1]
    assert source.open("a").coordinates[:, 0].tolist() == [0, 64, 128]
    assert all(isinstance(tile, np.ndarray) for tile in source.open("a").read(np.arange(3)))
    with pytest.raises(Fault, match=r"of the slide a .* hold 1 of 3 tiles.*name all of its tars"):
        ShardSource([f"{tmp_path}/parts/tiles-[12].tar"])
    assert ShardSource([f"{tmp_path}/parts/tiles-1.tar", str(tmp_path / "parts")]).sizes == [3, 1, 1]


def test_a_tar_that_several_names_lead_to_is_there_once(folder: Path) -> None:
    two = f"{folder}/tiles-{{000000..000001}}.tar"
    for shards in ([str(folder), str(folder)], [two, str(folder)], [f"{folder}/../{folder.name}", two]):
        assert len(ShardTiles(shards=shards)) == 14
    assert len(ShardTiles(shards=[two, f"{folder}/tiles-000001.tar"])) == 7


def test_a_glob_of_folders_is_these_folders(folder: Path, tmp_path: Path) -> None:
    other = write_tiles(tmp_path / "sharks", [2, 2])
    assert named_tars(f"{tmp_path}/shar?s") == {str(folder): None, str(other): None}
