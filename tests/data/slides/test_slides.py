"""Opening, questioning and reading slides; which files are slides, and what they are called."""

import re
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import openslide
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data.fault import Fault, Notice
from data.keyed import rng
from data.slides import reading
from data.slides.coordinates import plan_grid
from data.slides.dicom_series import series_of
from data.slides.lists import list_slides
from data.slides.mpp import SlidesMpp
from data.slides.names import name_slides, safe_ids
from data.slides.reading import Slide
from tests.data.slides.synthetic_slides import stained, write_slide


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    coarse = rng(1, "slide").integers(0, 256, (75, 100, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((800, 600), Image.Resampling.BICUBIC))


def test_tiles_at_the_slides_own_scale_are_its_pixels(tmp_path: Path, noise: np.ndarray) -> None:
    path = write_slide(tmp_path / "a.tiff", noise, mpp=0.499)
    with Slide(path) as slide:
        grid = plan_grid(slide.dimensions, slide.mpp(), 0.5, 100, "a")
        for x, y in ((0, 0), (300, 200), (700, 500)):
            np.testing.assert_array_equal(slide.read_tile(grid, x, y), noise[y : y + 100, x : x + 100])


def test_tiles_of_a_coarser_level_are_that_levels_pixels(tmp_path: Path, noise: np.ndarray) -> None:
    path = write_slide(tmp_path / "a.tiff", noise, mpp=0.25, levels=3)
    with Slide(path) as slide:
        grid = plan_grid(slide.dimensions, slide.mpp(), 0.5, 64, "a")
        assert grid.level == 1
        np.testing.assert_array_equal(slide.read_tile(grid, 128, 256), noise[::2, ::2][128 : 128 + 64, 64 : 64 + 64])


@pytest.mark.parametrize("mpp0", [0.25, 0.2273, 0.3])
def test_a_shrunk_tile_is_the_resized_fractional_box(tmp_path: Path, noise: np.ndarray, mpp0: float) -> None:
    """Against one resize of the whole image on the same box, away from the edge pixels where the surroundings are
    seen."""
    path = write_slide(tmp_path / "a.tiff", noise, mpp=mpp0)
    with Slide(path) as slide:
        grid = plan_grid(slide.dimensions, slide.mpp(), 0.5, 64, "a")
        x, y = int(grid.origin(2)), int(grid.origin(1))
        tile = slide.read_tile(grid, x, y)
    side = grid.tile_size_level0
    whole = Image.fromarray(noise).resize((64, 64), Image.Resampling.BICUBIC, box=(x, y, x + side, y + side))
    assert tile.shape == (64, 64, 3)
    np.testing.assert_allclose(tile[4:-4, 4:-4], np.asarray(whole)[4:-4, 4:-4], atol=1)


@pytest.mark.parametrize("downsample", [1.0, 4.0, 50**0.5, 20.0])
def test_a_thumbnail_read_in_strips_is_the_area_average(
    tmp_path: Path, noise: np.ndarray, downsample: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.slides.reading.LARGEST_READ", 100)
    with Slide(write_slide(tmp_path / "a.tiff", noise, mpp=0.25)) as slide:
        thumbnail = slide.thumbnail(downsample)
    width, height = int(800 // downsample), int(600 // downsample)
    box = (0, 0, width * downsample, height * downsample)
    expected = Image.fromarray(noise).resize((width, height), Image.Resampling.BOX, box=box)
    np.testing.assert_allclose(thumbnail[:height, :width], np.asarray(expected), atol=1)


@pytest.mark.parametrize("own_memory", [True, False])
def test_what_a_slide_does_not_hold_is_white_and_the_rest_as_openslide_gives_it(
    tmp_path: Path, noise: np.ndarray, own_memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With openslide-python's inner call and without it, by Pillow's compositing of what openslide's own `read_region` returns, transparent where there is nothing."""
    monkeypatch.setattr(reading, "READS_INTO_OUR_MEMORY", own_memory)
    path = write_slide(tmp_path / "a.tiff", noise, mpp=0.25)
    with Slide(path) as slide, openslide.OpenSlide(path) as plain:
        for left, top in ((750, 550), (-20, 40), (900, 900)):
            picture = plain.read_region((left, top), 0, (90, 70))
            expected = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
            found = slide._read(0, left, top, 90, 70)
            np.testing.assert_array_equal(found[..., 2::-1], np.asarray(expected)[..., :3])
            assert (found[..., :3] == 255).all(2).any()


def test_resolution_is_read_and_its_faults_are_named(tmp_path: Path) -> None:
    image = stained(300, 300, [])
    with Slide(write_slide(tmp_path / "good.tiff", image, mpp=0.25)) as slide:
        assert slide.mpp() == pytest.approx(0.25)
        assert slide.mpp(0.5) == 0.5 and slide.overruled(0.25) == slide.overruled(None) == ""
        assert slide.overruled(0.5).endswith("good.tiff says 0.25 µm per pixel, and slides_mpp=0.5 overrules that")
    with Slide(write_slide(tmp_path / "mute.tiff", image, mpp=None)) as slide:
        with pytest.raises(Fault, match=r"mute\.tiff .*slides_mpp=0\.25.*leave this slide out"):
            slide.mpp()
        assert slide.mpp(0.5) == 0.5 and slide.overruled(0.5) == ""
    with (
        Slide(write_slide(tmp_path / "skew.tiff", image, mpp=0.25, mpp_y=0.26)) as slide,
        pytest.raises(Fault, match="not square"),
    ):
        slide.mpp()
    with Slide(write_slide(tmp_path / "near.tiff", image, mpp=0.25, mpp_y=0.251)) as slide:
        assert slide.mpp() == pytest.approx(0.2505, abs=1e-5)


@pytest.mark.parametrize("stated", [352.78, 1000.0, 0.025])  # 72 dots an inch, vips's default, a misplaced point
def test_a_resolution_that_no_scanner_has_is_refused_with_the_ways_out(tmp_path: Path, stated: float) -> None:
    with Slide(write_slide(tmp_path / "a.tiff", stained(300, 300, []), mpp=stated)) as slide:
        with pytest.raises(
            Fault, match=r"a\.tiff says that a pixel is .* µm wide, which no slide's is: give slides_mpp=0\.25"
        ):
            slide.mpp()
        assert slide.mpp(0.25) == 0.25


@pytest.mark.parametrize(("mpp", "power", "fine"), [
    ("0.25", "40", True), ("0.23", "20", True), ("0.5", "40", True), ("0.635", "40", False), ("0.0984", "40", False), ("2.5", "40", False),
])  # fmt: skip
def test_a_resolution_far_from_what_the_objective_gives_is_refused(
    tmp_path: Path, mpp: str, power: str, fine: bool
) -> None:
    with Slide(write_slide(tmp_path / "a.tiff", stained(300, 300, []), mpp=0.25)) as slide:
        properties = {"openslide.mpp-x": mpp, "openslide.mpp-y": mpp, "openslide.objective-power": power}
        slide._reader = SimpleNamespace(properties=properties, close=lambda: None)  # type: ignore[assignment]
        if fine:
            assert slide.mpp() == pytest.approx(float(mpp))
        else:
            with pytest.raises(Fault, match=r"its objective is 40×, which goes with about 0\.25 µm: give slides_mpp="):
                slide.mpp()


def test_what_the_user_says_of_resolution_is_one_value_or_a_table_by_slide(tmp_path: Path) -> None:
    assert SlidesMpp.parse(None).of(tmp_path / "a.svs") is None
    assert SlidesMpp.parse("0.5").of(tmp_path / "a.svs") == SlidesMpp.parse(0.5).of(tmp_path / "b.svs") == 0.5
    table = tmp_path / "mpp.csv"
    table.write_text(f"\ufeffslide;MPP\na.svs;0.25\nb;0.5\n{tmp_path}/x/c.svs;0.3\n{tmp_path}/y/c.svs;0.4\nd;\n")
    said = SlidesMpp.parse(str(table))
    named = ("z/a.svs", "b.tiff", "x/c.svs", "y/c.svs", "d.svs")
    assert [said.of(tmp_path / name) for name in named] == [0.25, 0.5, 0.3, 0.4, None]
    with pytest.raises(Fault, match="several µm per pixel"):
        said.of(tmp_path / "z/c.svs")
    assert (
        said.tells_of([tmp_path / "a.svs", tmp_path / "d.svs"])
        == f"{table} tells of 1 of 2 slides; the rest is taken as it says itself"
    )
    with pytest.raises(Fault, match="tells of none of the slides"):
        said.tells_of([tmp_path / "d.svs"])
    for wrong, sentence in (
        ("much", "neither a number"),
        ("0", "0.05 to 10"),
        ("nan", "neither a number"),
        ("400", "0.05 to 10"),
        ("none.csv", "no such table"),
    ):
        with pytest.raises(Fault, match=sentence):
            SlidesMpp.parse(wrong)
    for content, sentence in (
        ("a,b\n1,2\n", "needs a column called slide"),
        ("slide,mpp\na,wide\n", "'wide' of a, where a number"),
    ):
        table.write_text(content)
        with pytest.raises(Fault, match=sentence):
            SlidesMpp.parse(str(table))


def test_a_file_that_is_no_slide_is_named(tmp_path: Path) -> None:
    (tmp_path / "junk.svs").write_bytes(b"not a slide")
    with pytest.raises(Fault, match=r"junk\.svs cannot be read"):
        Slide(tmp_path / "junk.svs")
    with pytest.raises(Fault, match="no such file"):
        Slide(tmp_path / "none.svs")


def dicom_header(series: str, implicit: bool = False) -> bytes:
    """The first elements of a DICOM file, among them a sequence whose length isn't said, with a series of its own
    inside."""

    def element(tag: int, kind: str, value: bytes, plain: bool = implicit) -> bytes:
        start, value = struct.pack("<HH", tag >> 16, tag & 0xFFFF), value + b"\0" * (len(value) % 2)
        if plain:
            return start + struct.pack("<I", len(value)) + value
        return (
            start
            + kind.encode()
            + (struct.pack("<HI", 0, len(value)) if kind == "OB" else struct.pack("<H", len(value)))
            + value
        )

    syntax = b"1.2.840.10008.1.2" if implicit else b"1.2.840.10008.1.2.4.50"
    endless = struct.pack("<HH", 0x0008, 0x1140) + (b"" if implicit else b"SQ\0\0") + b"\xff" * 4
    item = bytes.fromhex("feff00e0ffffffff") + element(0x0020000E, "UI", b"9.9.9") + bytes.fromhex("feff0de000000000")
    return b"".join(
        (
            b"\0" * 128 + b"DICM",
            element(0x00020001, "OB", b"\0\1", False),
            element(0x00020010, "UI", syntax, False),
            element(0x00080060, "CS", b"SM"),
            endless + item + bytes.fromhex("feffdde000000000"),
            element(0x0020000D, "UI", b"1.2"),
            element(0x0020000E, "UI", series.encode()),
            element(0x00280010, "US", b"\0\1"),
        )
    )


@pytest.mark.parametrize("implicit", [False, True])
def test_dicom_files_of_one_series_are_one_slide_and_no_other_is_lost(tmp_path: Path, implicit: bool) -> None:
    for name, series in {"A_0": "1.2", "A_1": "1.2", "B_0": "1.3", "sub/A_2": "1.2"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.dcm").write_bytes(dicom_header(series, implicit))
        assert series_of(tmp_path / f"{name}.dcm") == series
    for name, content in {"C_0": b"", "C_1": b"\0" * 128 + b"DICM", "C_2": dicom_header("1.2")[:200]}.items():
        (tmp_path / f"{name}.dcm").write_bytes(content)
        assert series_of(tmp_path / f"{name}.dcm") is None
    wanted = ["A_0.dcm", "B_0.dcm", "C_0.dcm", "C_1.dcm", "C_2.dcm"]
    for named in (str(tmp_path), str(tmp_path / "*.dcm")):
        found = [str(path.relative_to(tmp_path)) for path in list_slides([named])]
        assert found == wanted + (["sub/A_2.dcm"] if named == str(tmp_path) else [])
    assert list_slides([str(tmp_path / "A_1.dcm")]) == [tmp_path / "A_1.dcm"]


def test_the_series_of_a_real_dicom_file_is_openslides(shared: Path) -> None:
    path = shared / "slides/odd/highdicom_sm_image.dcm"
    assert series_of(path) == openslide.OpenSlide(path).properties["dicom.SeriesInstanceUID"]


def test_what_else_lies_in_a_folder_of_slides_is_counted_on_one_line(tmp_path: Path) -> None:
    for name in (
        "a.svs",
        "b.qptiff",
        "n/c.qptiff",
        "t.txt",
        "n/LICENSE",
        ".hidden.txt",
        "m.mrxs",
        "m/Slidedat.ini",
        "m/Data0000.dat",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.warns(Notice) as said:
        assert list_slides([str(tmp_path)]) == [tmp_path / "a.svs", tmp_path / "m.mrxs"]
    (line,) = (str(one.message) for one in said)
    assert (
        line == f"left alone in {tmp_path}: 2 .qptiff (as 'b.qptiff'), 1 .txt (as 't.txt'), 1 without an ending (as"
        " 'LICENSE')"
    )


def test_lists_that_name_nothing_or_themselves_or_are_no_text_are_a_sentence(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n"
    (tmp_path / "a.svs").write_text(pointer)
    (tmp_path / "to_itself.txt").symlink_to("r.txt")
    for name, content, sentence in (
        ("e.txt", b"", "e.txt names no slide: give one a line"),
        ("c.txt", b"# none\n\n", "c.txt names no slide"),
        ("r.txt", b"a.svs\nr.txt\n", "r.txt names itself"),
        ("r.txt", b"to_itself.txt\n", "to_itself.txt names itself"),
        ("u.txt", "a.svs\n".encode("utf-16-le"), "u.txt holds bytes of 0, as UTF-16"),
        ("n.csv", b"path\na\0.svs\n", "n.csv holds bytes of 0"),
        ("h.csv", b'path\n"' + b"a" * 200_000 + b'"\n', r"table .*h.csv can't be read at line 2 \(field larger"),
        ("p.txt", pointer.encode(), "p.txt is a Git LFS pointer"),
        ("p.csv", pointer.encode(), "p.csv is a Git LFS pointer"),
        ("w.txt", b"https://x.org/a.svs\n", r"w.txt names https://x.org/a.svs: slides are read from a disk"),
        ("d.csv", b"slide,slide\na.svs,b.svs\n", "d.csv has several columns called slide"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(Fault, match=sentence):
            list_slides([str(tmp_path / name)])
    with pytest.raises(Fault, match=r"a\.svs is a Git LFS pointer .*git lfs pull"):
        Slide(tmp_path / "a.svs")
    (tmp_path / "twice.txt").write_text("one.txt\none.txt\n")
    (tmp_path / "one.txt").write_text("a.svs\n")
    assert list_slides([str(tmp_path / "twice.txt")]) == [tmp_path / "a.svs"], "named twice is no circle"


def test_a_table_whose_columns_of_mpp_contradict_one_another_is_refused(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    for header, row, sentence in (
        ("mpp_x,mpp_y", "0.25,0.5", "says mpp_x = 0.25, mpp_y = 0.5 of a.svs"),
        ("mpp,mpp_y", "0.25,0.3", "mpp_y = 0.3"),
        ("mpp,microns_per_pixel", "0.25,0.5", "microns_per_pixel = 0.5"),
        ("mpp_x,mpp_y", "0.25,x", "says mpp_y = 'x' of a.svs"),
        ("mpp", "0_5", "says mpp = '0_5' of a.svs"),
    ):
        table.write_text(f"slide,{header}\na.svs,{row}\n")
        with pytest.raises(Fault, match=sentence):
            SlidesMpp.parse(str(table))
    table.write_text("slide,mpp_x,mpp_y\na.svs,0.25,0.2501\nb.svs,0.5,\n")
    assert [SlidesMpp.parse(str(table)).of(tmp_path / name) for name in ("a.svs", "b.svs")] == [0.25, 0.5]


def test_slides_are_found_in_files_folders_globs_and_lists(tmp_path: Path) -> None:
    names = ["a.svs", "sub/b.tiff", "sub/.hidden.svs", "dicom/1.dcm", "dicom/2.dcm", "notes.md"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for name in names[3:5]:
        (tmp_path / name).write_bytes(dicom_header("1.2.3"))
    (tmp_path / "list.txt").write_text(f"# mine\n{tmp_path}/a.svs\n\n{tmp_path}/sub\n")

    def found(*named: str) -> list[str]:
        return [
            str(path.relative_to(tmp_path.resolve())) for path in list_slides([str(tmp_path / name) for name in named])
        ]

    assert found("") == ["a.svs", "dicom/1.dcm", "sub/b.tiff"]
    assert found("a.svs", "sub", "a.svs") == ["a.svs", "sub/b.tiff"]
    assert found("**/*.tiff") == ["sub/b.tiff"]
    assert found("list.txt") == ["a.svs", "sub/b.tiff"]
    for missing in ("none.svs", "*.ndpi", "none.txt"):
        with pytest.raises(Fault, match="there is no"):
            list_slides([str(tmp_path / missing)])


def test_slide_names_are_safe_unique_and_lasting(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("x/s.1.svs", "y/s.1.svs", "z/other.svs")]
    for path in paths:
        path.parent.mkdir()
        path.touch()
    names = name_slides(paths, {})
    assert names == {paths[0]: "x-s-1", paths[1]: "y-s-1", paths[2]: "other"}
    assert name_slides(paths[::-1], {}) == names
    first = name_slides([paths[0]], {})
    assert first == {paths[0]: "s-1"}
    assert name_slides(paths, first) == {paths[0]: "s-1", paths[1]: "y-s-1", paths[2]: "other"}


def test_lists_and_tables_are_read_whatever_wrote_them(tmp_path: Path) -> None:
    for name in ("a b.svs", "sub/ü.tiff"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    wanted = [tmp_path / "a b.svs", tmp_path / "sub/ü.tiff"]
    plain = "# mine\na b.svs\nsub/ü.tiff\n"
    table = "case;slide_path;mpp\n1;a b.svs;0.5\n2;sub/ü.tiff;\n"
    for name, content in {
        "plain.txt": plain.encode(),
        "bom.txt": plain.encode("utf-8-sig"),
        "wide.txt": plain.encode("utf-16"),
        "dos.txt": plain.replace("\n", "\r\n").encode(),
        "t.csv": table.encode(),
        "bom.csv": table.encode("utf-8-sig"),
        "t.tsv": table.replace(";", "\t").encode("utf-16"),
        "own.csv": "n,where\n1,a b.svs\n2,sub/ü.tiff\n".encode(),
        "bare.csv": "1,a b.svs\n2,sub/ü.tiff\n".encode(),
    }.items():
        (tmp_path / name).write_bytes(content)
        assert list_slides([str(tmp_path / name)]) == wanted, name
    for name, content, sentence in (
        ("latin.txt", plain.encode("latin-1"), r"latin\.txt is no UTF-8 text \(byte 19\): save it as UTF-8"),
        ("no.csv", b"x,y\n1,2\n", r"no\.csv has no column of slides' files \(it has x, y\)"),
        ("gone.csv", b"path\nnone.svs\n", r"there is no slide at none\.svs, which .*gone\.csv names"),
        ("e.csv", b"", r"the table .*e\.csv is empty"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(Fault, match=sentence):
            list_slides([str(tmp_path / name)])


def test_links_are_followed_under_their_own_names(tmp_path: Path) -> None:
    hub, far = tmp_path / "hub", tmp_path / "far"
    (hub / "blobs").mkdir(parents=True)
    far.mkdir()
    write_slide(far / "x.tiff", stained(300, 300, []), 0.5)
    (hub / "blobs/0a1b2c").write_bytes((far / "x.tiff").read_bytes())
    (hub / "TCGA-AA-1234.svs").symlink_to("blobs/0a1b2c")
    (hub / "case").symlink_to(far)
    (far / "circle").symlink_to(hub)
    (hub / "gone.svs").symlink_to("nowhere")
    assert list_slides([str(hub)]) == [hub / "TCGA-AA-1234.svs", hub / "case/x.tiff", hub / "gone.svs"]
    with pytest.warns(Notice, match="is read once"):  # the circle
        assert list_slides([str(hub / "**/*.tiff")]) == [hub / "case/x.tiff"]
    with Slide(hub / "TCGA-AA-1234.svs") as slide:
        assert slide.width == 300
    with pytest.warns(
        UserWarning,
        match=r"1 of the slides' names lead to a file that has another.*case/x\.tiff, which is .*far/x\.tiff",
    ):
        assert list_slides([str(hub / "case/x.tiff"), str(far / "x.tiff")]) == [far / "x.tiff"]


def test_ids_of_files_are_safe_and_distinct_whatever_the_files_are_called(tmp_path: Path) -> None:
    files = [
        "张三.svs",
        "李四.svs",
        "S12.3456.svs",
        "S12-3456.svs",
        "S12 3456.svs",
        "case1.tif",
        "case1.tiff",
        f"{'x' * 245}.svs",
        "a b/k.svs",
        "a-b/k.svs",
        "Zürich/k.svs",
        "王/k.svs",
        "Zürich.svs",
    ]
    paths = [tmp_path / name for name in files]
    names = name_slides(paths, {})
    assert list(map(names.get, paths)) == list(map(name_slides(paths[::-1], {}).get, paths))
    assert len(set(names.values())) == len(files) and all(
        re.fullmatch("[A-Za-z0-9_-]{1,240}", one) for one in names.values()
    )
    assert names[paths[3]] == "S12-3456" and re.fullmatch("S12-3456-[0-9a-f]{8}", names[paths[2]])
    assert re.fullmatch("slide-[0-9a-f]{8}", names[paths[0]]) and re.fullmatch("case1-[0-9a-f]{8}", names[paths[5]])
    moved = {tmp_path / "elsewhere" / path.relative_to(tmp_path): path for path in paths[:8]}
    there = name_slides(list(moved), {})
    assert all(there[new] == names[old] for new, old in moved.items()), "an id is of the name, not of where it lies"


def test_a_slide_named_through_a_link_keeps_the_id_that_its_file_has(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far/s.svs").touch()
    (tmp_path / "near").symlink_to("far")
    assert name_slides([tmp_path / "near/s.svs"], {tmp_path / "far/s.svs": "s"}) == {tmp_path / "near/s.svs": "s"}


def test_a_slide_that_moved_keeps_its_name(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new/s.svs").touch()
    assert name_slides([tmp_path / "new/s.svs"], {tmp_path / "old/s.svs": "s"}) == {tmp_path / "new/s.svs": "s"}


def test_real_slides_give_openslides_own_pixels(shared: Path) -> None:
    path = shared / "slides/whole/CMU-1-Small-Region.svs"
    with Slide(path) as slide, openslide.OpenSlide(path) as plain:
        grid = plan_grid(slide.dimensions, slide.mpp(), 0.5, 256, "CMU")
        expected = np.asarray(plain.read_region((512, 1024), 0, (256, 256)).convert("RGB"))
        np.testing.assert_array_equal(slide.read_tile(grid, 512, 1024), expected)


@given(
    st.lists(
        st.one_of(st.text(max_size=6), st.text("ab/. -_é", max_size=4), st.from_regex("[a-b_-]{1,3}", fullmatch=True))
    )
)
def test_ids_of_foreign_names_are_safe_distinct_and_lasting(names: list[str]) -> None:
    ids = safe_ids(names)
    assert all(re.fullmatch("[A-Za-z0-9_-]{1,240}", one) for one in ids)
    assert len(set(ids)) == len(set(names)) == len(set(zip(names, ids, strict=True)))
    assert safe_ids(ids) == ids
    for name, one in zip(names, ids, strict=True):
        if re.fullmatch("[A-Za-z0-9_-]+", name):
            assert one == name


def test_who_imitates_a_hashed_id_is_still_told_apart() -> None:
    (hashed,) = safe_ids(["Zürich"])
    assert len(set(safe_ids(["Zürich", hashed]))) == 2 and safe_ids(["Zürich", hashed])[1] == hashed
    assert hashed.startswith("Z-rich-") and safe_ids(["TCGA-05.F6E9"]) == ["TCGA-05-F6E9"]


def test_a_table_of_slides_says_that_its_column_of_mpp_alone_counts_for_nothing_and_an_empty_one_is_refused(
    tmp_path: Path,
) -> None:
    (tmp_path / "a.svs").touch()
    (tmp_path / "slides.csv").write_text("path,mpp\na.svs,0.25\n")
    with pytest.warns(Notice, match=r"slides\.csv: its column mpp counts where slides_mpp=.*slides\.csv is given too"):
        assert list_slides([str(tmp_path / "slides.csv")]) == [tmp_path / "a.svs"]
    (tmp_path / "slides.csv").write_text("path,mpp\n")
    with pytest.raises(Fault, match=r"slides\.csv names no slide: it has a header and no row"):
        list_slides([str(tmp_path / "slides.csv")])
