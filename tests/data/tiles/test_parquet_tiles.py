"""Tiles of Parquet files by number: every row once, whole row groups, whatever is wrong with a file named."""

import os
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.fault import Fault
from data.keyed import place_of_name
from data.parquet.files import list_parquet
from data.parquet.index import ParquetIndex, ParquetQuestion, scan_parquet
from data.tiles import of_parquet
from data.tiles.of_parquet import ParquetTiles
from data.tiles.source import UnreadableTile
from data.tiles.stream import Stream
from tests.data.parquet.tables import encoded, write_table
from tests.data.shards.tile_folders import picture


def silently(files: Iterable[Any], count: int) -> Iterable[Any]:
    return files


def index_of(folder: Path, files: list[str] | None = None, **columns: str) -> ParquetIndex:
    names = {name: columns.get(name) for name in ("image", "slide", "patient", "slide_pattern")}
    question = ParquetQuestion.of(list_parquet(files or [str(folder)]), **names)
    scan_parquet(folder / "index", question, silently)
    return ParquetIndex.open(folder / "index", question)


def near(one: np.ndarray, other: np.ndarray) -> bool:
    """Equal but for JPEG's loss; pictures of two numbers differ by ten times as much."""
    return float(np.abs(one.astype(int) - other.astype(int)).mean()) < 6


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three files of 19, 7 and 12 tiles, ten slides of two patients."""
    for name, first, last in (("a", 0, 19), ("b/c", 19, 26), ("d", 26, 38)):
        numbers = range(first, last)
        slides = [f"s{number // 4}" for number in numbers]
        patients = [f"p{number // 20}" for number in numbers]
        write_table(tmp_path / f"{name}.parquet", numbers, slide=slides, patient_id=patients)
    return tmp_path


def test_every_number_gives_its_row_with_its_slide(folder: Path) -> None:
    tiles = ParquetTiles(index_of(folder))
    assert len(tiles) == 38
    for number in range(38):
        assert near(tiles.read(number), picture(number)) and not near(tiles.read(number), picture(number + 1))
        assert tiles.slide(number) == f"s{number // 4}"
    assert tiles.name(20) == f"row 1 of {folder / 'b' / 'c.parquet'}"
    assert tiles.index.patients[:6] == ["p0"] * 5 + ["p1"]


def test_blocks_are_neighbouring_row_groups_of_one_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_parquet, "TILES_PER_CHUNK", 8)
    tiles = ParquetTiles(index_of(folder))
    assert tiles.parts[0].block_sizes.tolist() == [8, 8, 3, 7, 8, 4]
    read = []
    monkeypatch.setattr(of_parquet, "read_images", lambda *given: read.append(given[2]) or original(*given))
    assert [near(tiles.read(number), picture(number)) for number in range(38)] == [True] * 38
    assert [list(groups) for groups in read] == [[0, 1], [2, 3], [4], [0, 1], [0, 1], [2]]  # each once


original = of_parquet.read_images


def test_a_pass_of_the_stream_holds_every_row_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_parquet, "TILES_PER_CHUNK", 8)
    tiles = ParquetTiles(index_of(folder))
    stream = Stream(tiles.parts, batch_size=2, lanes=2, window=2, seed=0)
    assert sorted(np.concatenate([stream.batch(step) for step in range(19)]).tolist()) == list(range(38))


def test_held_out_patients_are_the_same_in_any_company_and_the_others_remain(folder: Path) -> None:
    index = index_of(folder)
    share = next(share for share in (0.2, 0.4, 0.6, 0.8) if len({place_of_name(p) < share for p in ("p0", "p1")}) == 2)
    kept = ParquetTiles(index, hold_out=share)
    out = kept.held_out()
    assert out is not None and len(kept) + len(out) == 38
    (patient,) = (name for name in ("p0", "p1") if place_of_name(name) < share)
    numbers = [number for number in range(38) if f"p{number // 20}" == patient]
    assert len(out) == len(numbers) and out.digest != kept.digest
    for own, number in enumerate(numbers):
        assert near(out.read(own), picture(number))
    others = [number for number in range(38) if number not in numbers]
    assert all(near(kept.read(own), picture(number)) for own, number in enumerate(others))
    alone = ParquetTiles(index_of(folder, [str(folder / "d.parquet")]))
    assert len(alone) == 12


def test_a_share_that_holds_out_nobody_or_everybody_is_refused(folder: Path) -> None:
    index = index_of(folder)
    with pytest.raises(Fault, match="holds none of these 10 slides out"):
        ParquetTiles(index, hold_out=1e-9).held_out()
    write_table(folder / "without" / "a.parquet", range(3))
    with pytest.raises(Fault, match="don't say whose tiles"):
        ParquetTiles(index_of(folder / "without"), hold_out=0.5)


def test_the_hub_s_struct_of_bytes_and_path_is_read(tmp_path: Path) -> None:
    rows = [{"bytes": encoded(number, "PNG"), "path": f"TCGA-AA-000{number}-01/x.png"} for number in range(5)]
    pq.write_table(pa.table({"image": rows, "label": [0] * 5}), tmp_path / "a.parquet", row_group_size=2)
    pattern = r"^(?P<slide>(?P<patient>TCGA-..-....)[^/]*)"
    tiles = ParquetTiles(index_of(tmp_path, slide="image.path", slide_pattern=pattern))
    assert [tiles.slide(number) for number in range(5)] == [f"TCGA-AA-000{number}-01" for number in range(5)]
    assert tiles.index.patients[3] == "TCGA-AA-0003"
    assert all(np.array_equal(tiles.read(number), picture(number)) for number in range(5))


def test_tiles_of_one_slide_are_dealt_out_together_where_they_lie_together(folder: Path) -> None:
    tiles = ParquetTiles(index_of(folder), group=2)
    assert tiles.parts[0].block_sizes.sum() == 38 and tiles.parts[0].block_sizes.max() <= 4
    write_table(folder / "mixed" / "a.parquet", range(12), slide=[f"s{number % 5}" for number in range(12)])
    with pytest.raises(Fault, match="don't lie side by side"):
        ParquetTiles(index_of(folder / "mixed"), group=2)


def test_bad_rows_are_named_and_cost_no_others(tmp_path: Path) -> None:
    table = pa.table({"jpeg": [encoded(0), None, b"", encoded(3)[:200], encoded(4)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=5)
    tiles = ParquetTiles(index_of(tmp_path))
    for bad, why in ((1, "holds no image"), (2, "can't be read"), (3, "can't be read")):
        with pytest.raises(UnreadableTile, match=rf"row {bad} of .*a\.parquet {why}") as raised:
            tiles.read(bad)
        assert raised.value.next == bad + 1
    assert near(tiles.read(0), picture(0)) and near(tiles.read(4), picture(4))


def test_a_file_that_is_cut_off_or_changed_later_costs_its_own_tiles(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(of_parquet, "TILES_PER_CHUNK", 8)
    index = index_of(folder)
    place = folder / "a.parquet"
    footer = pq.read_metadata(place)
    tiles = ParquetTiles(index)
    tiles._footers.get(str(place))
    with place.open("r+b") as file:
        file.truncate(footer.row_group(3).column(0).data_page_offset)
    with pytest.raises(UnreadableTile, match="truncated") as raised:
        tiles.read(9)
    assert raised.value.next == 17 and near(tiles.read(3), picture(3))  # as far into the next chunk
    place.unlink()
    with pytest.raises(UnreadableTile, match=r"row 0 of .*a\.parquet can't be read"):
        ParquetTiles(index).read(0)


def test_flipped_bits_end_in_an_unreadable_tile_or_pixels_never_in_a_crash(tmp_path: Path) -> None:
    place = write_table(tmp_path / "a.parquet", range(8))
    index, whole = index_of(tmp_path), place.read_bytes()
    end = pq.read_metadata(place).row_group(1).column(0)
    draw = np.random.default_rng(0)
    outcomes = set()
    for at in draw.integers(4, end.data_page_offset + end.total_compressed_size, 60).tolist():
        place.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << int(draw.integers(8))]) + whole[at + 1 :])
        for number in range(8):
            try:
                outcomes.add(ParquetTiles(index).read(number).shape)
            except UnreadableTile as error:
                outcomes.add(str(error).partition(" can't")[2][:8])
    assert (48, 48, 3) in outcomes and len(outcomes) > 1


def test_files_that_can_t_be_used_are_left_out_by_name_and_none_left_is_a_sentence(folder: Path) -> None:
    (folder / "e.parquet").write_bytes(b"PAR1 nothing PAR1")
    (folder / "f.parquet").write_bytes((folder / "a.parquet").read_bytes()[:-20])
    write_table(folder / "g.parquet", [])
    pq.write_table(pa.table({"label": [1]}), folder / "h.parquet")
    pq.write_table(pa.table({"png": [encoded(0)]}), folder / "i.parquet")
    (folder / "j.parquet").symlink_to(folder / "gone.parquet")
    (folder / "k.parquet").symlink_to(folder / "a.parquet")  # is there already
    index = index_of(folder)
    assert len(index) == 38 and len(index.left_out) == 6
    cant = "can't be read"
    for name, why in zip("efghij", (cant, cant, "no rows", "no column of bytes", "other columns", cant), strict=True):
        assert any(f"{name}.parquet" in said and why in said for said in index.left_out), (name, index.left_out)
    write_table(folder / "j.parquet", [1])
    assert any("a.parquet: no slides, where that has them in slide" in said for said in index_of(folder).left_out)
    with pytest.raises(Fault, match="none of the Parquet files can be used"):
        index_of(folder, [str(folder / "e.parquet")])


def test_a_footer_that_lost_a_column_leaves_its_file_out_and_none_other(folder: Path) -> None:
    content = (folder / "a.parquet").read_bytes()
    at = content.rindex(b"jpeg")  # of a row group, or the schema's own
    before = len(index_of(folder))
    for place in {content.index(b"jpeg", len(content) // 2), at}:
        (folder / "a.parquet").write_bytes(content[:place] + b"jpeh" + content[place + 4 :])
        index = index_of(folder)
        assert len(index) < before and len(index.left_out) == 1 and "a.parquet" in index.left_out[0]


def test_images_in_another_form_and_pointers_to_files_are_said_with_the_way_out(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": pa.array([b"x"]).dictionary_encode()}), tmp_path / "a.parquet")
    with pytest.raises(Fault, match=r"has no column of bytes: it has image \(dictionary.*write it anew like that"):
        index_of(tmp_path)
    (tmp_path / "a.parquet").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    with pytest.raises(Fault, match="run 'git lfs pull'"):
        index_of(tmp_path)


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"image": "label"}, r"data\.image=label is int64 in .*whose columns of bytes are jpeg, thumbnail"),
        ({"image": "jpg"}, r"data\.image=jpg is not there"),
        ({"slide": "nobody"}, r"data\.slide=nobody is no column of .*which has jpeg, thumbnail, label, names"),
        ({"slide": "thumbnail"}, r"data\.slide=thumbnail is binary"),
        ({"slide_pattern": "(?P<slide>.*)"}, r"say which, by data\.slide=COLUMN"),
        ({"slide": "names", "slide_pattern": "s.*"}, r"has no group \(\?P<slide>…\)"),
        ({"slide": "names", "slide_pattern": "(?P<slide>x.)"}, r"finds no slide in 's0/1\.jpg'"),
        ({"slide": "names", "slide_pattern": "(?P<slide>s(?=0))"}, r"none that RE2 knows"),
    ],
)
def test_what_is_asked_for_and_isn_t_there_is_said(tmp_path: Path, columns: dict[str, str], says: str) -> None:
    write_table(tmp_path / "a.parquet", [1], thumbnail=[b"x"], label=[1], names=["s0/1.jpg"])
    with pytest.raises(Fault, match=says):
        index_of(tmp_path, **columns)
    two = pa.table({"one": [b"x"], "other": [b"y"]})
    pq.write_table(two, tmp_path / "a.parquet")
    with pytest.raises(Fault, match=r"several columns of bytes \(one, other\): .* data\.image=one\|other"):
        index_of(tmp_path)


def test_of_several_columns_of_bytes_the_one_of_images_is_read_and_two_of_images_are_asked_about(
    tmp_path: Path,
) -> None:
    write_table(tmp_path / "a.parquet", [1, 2], hash=[b"0123456789abcdef"] * 2, tile=[None, b"x"])
    assert index_of(tmp_path).image == "jpeg"
    write_table(tmp_path / "a.parquet", [1, 2], thumb=[None, encoded(0)], hash=[b"0123456789abcdef"] * 2)
    with pytest.raises(Fault, match=r"several columns of encoded images \(jpeg, thumb\): .* data\.image=jpeg\|thumb\."):
        index_of(tmp_path)
    assert index_of(tmp_path, image="thumb").image == "thumb"


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        (
            {"slide": [1.0]},
            ["no tile has a slide: the column slide is double, and names are text or whole numbers; data."],
        ),
        (
            {"wsi": [["s"]], "case": [b"p"]},
            ["no tile has a slide: the column wsi is list", "a patient: the column case is b"],
        ),
        ({"slide": [{"id": "s"}]}, ["the column slide is struct<id: string>"]),
        (
            {"label": [1]},
            ["no tile has a slide: no column is called slide, slide_id, slide_name, wsi or wsi_id; data.slide="],
        ),
        ({"slide": ["s"], "patient": ["p"]}, []),
    ],
)
def test_a_column_that_can_t_name_slides_is_said_with_its_type(
    tmp_path: Path, columns: dict[str, Any], says: list[str]
) -> None:
    write_table(tmp_path / "a.parquet", [1], **columns)
    for said, why in zip(index_of(tmp_path).unnamed, says, strict=True):
        assert why in said


def test_a_copy_for_another_process_reads_the_same(folder: Path) -> None:
    tiles = ParquetTiles(index_of(folder))
    first = tiles.read(30)
    copy = pickle.loads(pickle.dumps(tiles))
    assert np.array_equal(copy.read(30), first)


def test_row_groups_too_large_to_hold_are_refused_with_the_way_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(of_parquet, "TILES_PER_CHUNK", 8)
    monkeypatch.setattr(of_parquet, "MOST_HELD", 10_000)
    with pytest.raises(Fault, match=r"set data\.window or data\.lanes lower"):
        ParquetTiles(index_of(folder)).hold(4)


def test_the_index_is_found_again_and_another_question_makes_another(folder: Path) -> None:
    first = index_of(folder)
    question = ParquetQuestion.of(list_parquet([str(folder)]), None, None, None, None)
    assert ParquetIndex.open(folder / "index", question).digest == first.digest
    assert index_of(folder, patient="slide").digest != first.digest
    question.path(folder / "index").write_bytes(b"PK nothing")
    with pytest.raises(Fault, match=r"is damaged .*makes it anew"):
        ParquetIndex.open(folder / "index", question)


def test_slide_names_of_several_patients_are_refused_where_patients_are_held_out(tmp_path: Path) -> None:
    write_table(tmp_path / "a.parquet", range(8), slide=["3"] * 4 + ["4"] * 4, patient=["P2"] * 3 + ["P3"] + ["P2"] * 4)
    index = index_of(tmp_path)
    assert len(ParquetTiles(index)) == 8
    says = r"slide 3 is of patient P2, and in .*a\.parquet of patient P3 too; .* or hold out by patients alone, by data\.slide=patient\."
    with pytest.raises(Fault, match=says):
        ParquetTiles(index, hold_out=0.5)
    assert index_of(tmp_path, slide="patient").unclear == ""
    with pytest.raises(Fault, match="slide 3 is of patient 2"):  # a second file's
        write_table(tmp_path / "two" / "a.parquet", range(4), slide=["3"] * 4, patient=[2] * 4)
        write_table(tmp_path / "two" / "b.parquet", range(4), slide=["3"] * 4, patient=[0] * 4)
        ParquetTiles(index_of(tmp_path / "two"), hold_out=0.5)


def test_patient_0_is_a_patient_and_a_missing_one_is_what_other_rows_of_the_slide_say(tmp_path: Path) -> None:
    write_table(tmp_path / "a.parquet", range(8), slide=list("aaaabbbc"), patient=[0, 0, 0, 0, None, 1, 1, None])
    assert index_of(tmp_path).patients == ["0", "1", ""] and index_of(tmp_path).unclear == ""
    codes = pa.array([0, 0, 0, 0, None, 1, 1, None], pa.int8())
    patients = pa.DictionaryArray.from_arrays(codes, pa.array([70, 0]))
    write_table(tmp_path / "coded" / "a.parquet", range(8), slide=list("aaaabbbc"), patient=patients)
    assert index_of(tmp_path / "coded").patients == ["70", "0", ""]


def test_rows_without_a_slide_are_counted_where_slides_are_held_out(tmp_path: Path) -> None:
    write_table(tmp_path / "a.parquet", range(8), slide=["a", None, "b", "", "c", None, "d", "e"])
    assert len(ParquetTiles(index_of(tmp_path))) == 8
    with pytest.raises(Fault, match=r"3 rows say no slide, the first of them in .*a\.parquet; fill them in"):
        ParquetTiles(index_of(tmp_path), hold_out=0.5)


@pytest.mark.parametrize("rows", [[0, 4, 0, 0, 4], [0, 12, 0, 4], [4, 0, 12, 0], [0, 0, 4]])
def test_row_groups_without_rows_are_harmless_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[int]
) -> None:
    monkeypatch.setattr(of_parquet, "TILES_PER_CHUNK", 8)
    numbers = iter(range(2 * sum(rows)))
    for name in "ab":
        tables = [
            pa.table({"jpeg": pa.array(map(encoded, own), pa.binary()), "slide": pa.array(map(str, own), pa.string())})
            for own in ([next(numbers) for _ in range(count)] for count in rows)
        ]
        with pq.ParquetWriter(tmp_path / f"{name}.parquet", tables[0].schema) as writer:
            for table in tables:
                writer.write_table(table)
    index = index_of(tmp_path)
    tiles = ParquetTiles(index)
    assert len(index.group_rows) == 2 * len(rows) and min(tiles.parts[0].block_sizes) > 0
    for number in range(2 * sum(rows)):
        assert near(tiles.read(number), picture(number)) and tiles.slide(number) == str(number)
    assert tiles.name(sum(rows)) == f"row 0 of {tmp_path / 'b.parquet'}"
    kept = ParquetTiles(index, hold_out=0.5)
    out = kept.held_out()
    assert out is not None and {*map(kept.slide, range(len(kept)))} & {*map(out.slide, range(len(out)))} == set()
    assert len(kept) + len(out) == len(tiles)


def test_a_file_that_is_written_anew_at_its_size_is_looked_through_again_and_a_copy_is_the_same_data(
    tmp_path: Path,
) -> None:
    place = write_table(tmp_path / "a.parquet", range(8), slide=list("aaaabbbb"), patient=list("ppppqqqq"))
    first = index_of(tmp_path)
    written = place.stat()
    question = ParquetQuestion.of([str(place)], None, None, None, None)
    os.utime(place, ns=(written.st_atime_ns, written.st_mtime_ns + 1))
    later = ParquetQuestion.of([str(place)], None, None, None, None)
    assert later.path(tmp_path) != question.path(tmp_path)
    assert index_of(tmp_path).digest == first.digest
    write_table(place, range(8), slide=list("aaaabbbb"), patient=list("qqqqpppp"))
    os.utime(place, ns=(written.st_atime_ns, written.st_mtime_ns + 2))
    assert place.stat().st_size == written.st_size
    other = index_of(tmp_path)
    assert (first.patients, other.patients) == (["p", "q"], ["q", "p"]) and other.digest != first.digest


def test_flipped_bits_are_seen_and_named_where_pages_have_checksums(tmp_path: Path) -> None:
    place = tmp_path / "a.parquet"
    table = pa.table({"jpeg": [encoded(number) for number in range(8)], "slide": list("abcdefgh")})
    pq.write_table(table, place, row_group_size=4, compression="none", write_page_checksum=True, use_dictionary=False)
    index, whole = index_of(tmp_path), bytearray(place.read_bytes())
    picture_at = whole.index(encoded(2)) + 700
    whole[picture_at] ^= 1
    place.write_bytes(whole)
    with pytest.raises(UnreadableTile, match=r"row 2 of .*a\.parquet can't be read .*(CRC|checksum)"):
        ParquetTiles(index).read(2)
    whole = bytearray(place.read_bytes())
    whole[picture_at] ^= 1
    names = pq.read_metadata(place).row_group(1).column(1)
    whole[names.data_page_offset + names.total_compressed_size - 1] ^= 2
    place.write_bytes(whole)
    with pytest.raises(Fault, match=r"the slides of .*a\.parquet can't be read .*leave it out of data\.files"):
        index_of(tmp_path)
