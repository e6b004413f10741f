"""Shards of others: everything in the folder is read, or named and counted with a reason."""

import gzip
import json
import os
import re
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import webdataset

from data.fault import Fault
from data.shards import tar_members
from data.shards.index import ShardIndex, read_jpeg
from data.shards.scan import describe_left_out, disputed, scan
from data.shards.tile_members import is_tile
from data.shards.verify import verify_shard
from data.slides.coordinates import UNKNOWN_PLACE
from launch.entry import run_command_line
from tests.data.shards.tars import write_tar


def test_a_scan_indexes_shards_of_others(tmp_path: Path) -> None:
    facts = json.dumps({"slide": "s", "x": 7, "y": 9, "mpp": 0.25}).encode()
    write_tar(
        tmp_path / "one.tar",
        [("k1.jpg", b"first"), ("k1.json", facts), ("k2.json", facts), ("k2.jpeg", b"second"), ("k3.tif", b"no")],
    )
    write_tar(tmp_path / "two.tar", [("d/slide_1_256_512.jpg", b"third!"), ("nothing.jpg", b"4th")])
    index = scan(tmp_path)
    assert len(index) == 4
    assert [index.slides[slide] for slide in index.slide] == ["s", "s", "d-slide_1", "two"]
    assert index.x.tolist() == [7, 7, 256, UNKNOWN_PLACE] and index.y.tolist() == [9, 9, 512, UNKNOWN_PLACE]
    assert index.facts(0)["mpp"] == 0.25 and index.facts(1)["mpp"] is None
    contents = []
    for row in range(4):
        descriptor = os.open(index.path(int(index.file[row])), os.O_RDONLY)
        contents.append(read_jpeg(descriptor, int(index.offset[row]), int(index.length[row])))
        os.close(descriptor)
    assert contents == [b"first", b"second", b"third!", b"4th"]
    assert ShardIndex.open(tmp_path).digest == index.digest


def test_what_others_call_a_slide_is_made_safe_and_kept_as_a_fact(tmp_path: Path) -> None:
    names = ["../../x", "/etc/x", "a/b", "a b", "a-b", "Zürich", "\ud800", "", "x" * 300]
    samples = [
        (f"{n}.{kind}", data)
        for n, name in enumerate(names)
        for kind, data in (("jpg", b"jpeg"), ("json", json.dumps({"slide": name, "x": n, "y": 0}).encode()))
    ]
    write_tar(tmp_path / "a.tar", [*samples, ("../up/key_5_6.jpg", b"jpeg")])
    index = scan(tmp_path)
    assert all(re.fullmatch("[A-Za-z0-9_-]{1,240}", slide) for slide in index.slides)
    assert len(set(index.slides)) == len(names) + 1 and index.slides[4] == "a-b" and index.slides[-1] == "---up-key"
    assert [index.facts(number)["slide"] for number in range(len(names))] == names
    assert ShardIndex.open(tmp_path).slides == index.slides


def test_a_folder_without_a_tile_is_refused_with_what_is_in_it(tmp_path: Path) -> None:
    with pytest.raises(Fault, match=r"no \.tar shards"):
        scan(tmp_path)
    (tmp_path / "b.tar.gz").touch()
    with pytest.raises(Fault, match=r"no \.tar shards in .* \(b\.tar\.gz: it is compressed"):
        scan(tmp_path)
    write_tar(tmp_path / "a.tar", [("k.txt", b"text"), ("k.tif", b"tif")])
    with pytest.raises(
        Fault,
        match=r"no \.jpg, \.jpeg, \.png or \.webp .*1 \.txt member .*1 \.tif member \(as k\.tif in a\.tar\): tiles are read from",
    ):
        scan(tmp_path)
    assert not (tmp_path / "index.npz").exists()


def test_everything_in_a_folder_is_read_or_counted_with_a_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def of(slide: str, x: int) -> bytes:
        return json.dumps({"slide": slide, "x": x, "y": 0}).encode()

    write_tar(
        tmp_path / "mixed.tar",
        [pair for n in range(8) for pair in ((f"p{n}.tif", b"p"), (f"j{n}.jpg", b"j"), (f"j{n}.cls", b"1"))],
    )
    write_tar(
        tmp_path / "dotted.tar",
        [
            (f"S12.34_{n}_0.{kind}", b"j" if kind == "JPG" else of("dot", n))
            for n in range(4)
            for kind in ("JPG", "json")
        ],
    )
    write_tar(
        tmp_path / "apart.tar",
        [
            *(pair for n in range(8) for pair in ((f"a{n}.image.jpg", b"j"), (f"a{n}.json", of(f"s{n % 4}", n)))),
            ("._a0.jpg", b"junk"),
            ("other.json", of("x", 1)),
        ],
    )
    (tmp_path / "zero.tar").touch()
    (tmp_path / "noise.tar").write_bytes(b"x" * 2000)
    (tmp_path / "b.tar.gz").touch()
    (tmp_path / "README.md").touch()
    write_tar(tmp_path / "val/v.tar", [("k.jpg", b"j")])
    for _ in range(2):  # what was left out is said again where nothing is read again
        assert run_command_line(["shards", "index", f"shards={tmp_path}"]) in (0, None)
        said = capsys.readouterr().err
        assert said.splitlines()[-1].endswith(
            "20 tiles of 6 slides in 3 shards, indexed; left out: 18 members, 2 tars (noise.tar, zero.tar) and 3 other"
            " files, as said above"
        )
        for line in (
            "8 .tif members (as p0.tif in mixed.tar): tiles are read from .jpg, .jpeg, .png and .webp",
            "8 .cls members",
            "1 hidden member",
            "1 lone .json (as other.json in apart.tar)",
            "zero.tar: it is empty",
            "noise.tar: it is damaged",
            "b.tar.gz: it is compressed",
            "1 other file (as README.md)",
            f"val: it holds shards of its own: name it too, as shards='{tmp_path} {tmp_path}/val'",
        ):
            assert f"left out: {line}" in said
    index = ShardIndex.open(tmp_path)
    places = {(index.meta["slides"]["slide"][index.slide[row]], int(index.x[row])) for row in range(20)}
    assert places == {*((f"s{n % 4}", n) for n in range(8)), *(("dot", n) for n in range(4)), ("mixed", UNKNOWN_PLACE)}
    assert {finding.kind for finding in verify_shard(tmp_path, "apart.tar").findings} == {"undecodable tile"}


def test_members_of_a_key_that_lie_apart_and_names_that_come_twice_are_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = b'{"x": 0, "y": 0}'
    good = [
        ("g.jpg", b"j"),
        ("g.json", facts),
        ("S1.2_0_0.jpg", b"j"),
        ("S1.3_0_0.jpg", b"j"),
        ("S1.2_0_0.json", facts),
    ]
    write_tar(
        tmp_path / "a.tar",
        [
            *good,
            *((f"a{n}.jpg", b"j") for n in range(5)),
            *((f"a{n}.json", facts) for n in range(5)),
            *(("b.image.jpg", b"j"), ("k.cls", b"1"), ("b.json", facts)),  # by the sample's key, another sample between
            *(("d.jpg", b"j"), ("d.json", facts), ("d.jpg", b"j"), ("d.json", facts)),
            *(("l.JPG", b"j"), ("m.jpg", b"j"), ("l.jpg", b"j")),
            *(("n.jpg", b"j"), ("n.json", facts), ("n.json", facts)),
        ],
    )
    for _ in range(2):  # said again where nothing is read again
        run_command_line(["shards", "index", f"shards={tmp_path}"])
        said = capsys.readouterr().err
        assert re.search(
            r"left out: 6 tiles with other samples between its members \(as a0, a1, a2 in a\.tar\): .*tar --sort=name",
            said,
        )
        assert re.search(r"left out: 5 tiles with a name that comes twice \(as d, l in a\.tar\): .*pack it anew", said)
        assert "lone .json" not in said
    index = ShardIndex.open(tmp_path)
    assert [index.slides[slide] for slide in index.slide] == ["a", "S1-2", "S1-3", "a"]
    assert {finding.kind for finding in verify_shard(tmp_path, "a.tar").findings} == {
        "undecodable tile",
        "double member",
    }
    (tmp_path / "files").mkdir()
    subprocess.run(["tar", "-xf", "../a.tar"], cwd=tmp_path / "files", check=True)  # the way out
    os.remove(tmp_path / "files" / "l.JPG")
    subprocess.run(["tar", "--sort=name", "-C", "files", "-cf", "a.tar", "."], cwd=tmp_path, check=True)
    assert len(scan(tmp_path)) == 13 and not [
        left for left in describe_left_out(scan(tmp_path))[0] if "tile" in left.kind
    ]


def test_dotted_names_of_slides_are_tiles_of_any_kind_and_what_lies_beside_them_is_none(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "a.tar",
        [
            *((f"S1.2_{n}_0.png", b"tile") for n in range(3)),
            *(("S1.thumbnail.png", b"?"), ("S1.2_0_0.mask.png", b"?"), ("S1.thumbnail.jpg", b"?")),
            *(("T_0_0.jpg", b"tile"), ("T_0_0.png", b"?"), ("T_0_0.overlay.jpg", b"?")),
        ],
    )
    index = scan(tmp_path)
    assert [(index.slide_of(row), int(index.x[row])) for row in range(4)] == [
        ("S1-2", 0),
        ("S1-2", 1),
        ("S1-2", 2),
        ("T", 0),
    ]
    told = {(kind.kind, kind.why): kind.count for kind in describe_left_out(index)[0]}
    other = "its sample's tile is the one named <slide>_<x>_<y>"
    assert told == {
        (".png beside a tile", other): 2,
        (".jpg beside a tile", other): 2,
        (".png beside a tile", "its sample has a .jpg, which is the tile"): 1,  # each for a reason of its own
    }


@pytest.mark.parametrize("spoilt", [
    '[1, 2]', '{"x": NaN}', '{"x": 1e999}', '{"y": 48.7}', '{"x": "left"}', '{"x": 99999999999999999999}', '{"x": [1]}',
    '{"x": -5}', '{"x": true}', '{"x": 3}', '{"y": "7"}', '{"x": %s, "y": 1}' % ("9" * 400), '{"x": %s, "y": 1}' % ("9" * 5000), '{"x": "%s", "y": 1}' % ("9" * 5000),
    '{"patient": {"a": 1}}', '{"patient": 1.5}', '{"slide": true}', '{"mpp": true}', '{"mpp_level0": "0.25"}', '{"tile_size": [48]}', '{"mpp": %s}' % ("9" * 400),
    '{"mpp": NaN}', '{"mpp": 0}', '{"tile_size_level0": -3}', '{"mpp": "0.5"}', '{"slide": {"a": 1}}', "", "\xff", "[" * 100_000,
])  # fmt: skip
def test_a_json_that_cannot_be_true_costs_its_tile_and_no_other(tmp_path: Path, spoilt: str) -> None:
    write_tar(tmp_path / "a.tar", [("k.jpg", b"jpeg"), ("k.json", spoilt.encode("latin-1")), ("l.jpg", b"good")])
    (kind,) = describe_left_out(index := scan(tmp_path))[0]
    assert len(index) == 1 and index.length[0] == 4
    assert str(kind).startswith("1 tile with an impossible .json (as k.json") and len(str(kind)) < 400
    assert {finding.kind for finding in verify_shard(tmp_path, "a.tar").findings} == {"undecodable tile"}


def test_a_place_that_the_index_cannot_hold_costs_its_tile_and_is_not_wrapped(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [(f"s_{2**31}_0.jpg", b"jpeg"), ("s_5_0.jpg", b"jpeg")])
    index = scan(tmp_path)
    assert index.x.tolist() == [5]
    assert [str(kind) for kind in describe_left_out(index)[0]] == [
        f"1 tile at an impossible place (as s_{2**31}_0 in a.tar): no slide has pixels there"
    ]


def test_tiles_of_a_slide_that_contradict_one_another_are_named_and_what_they_dispute_is_not_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def sample(slide: str, x: int, **said: object) -> list[tuple[str, bytes]]:
        key = f"{slide}_{x}_0"
        return [
            (f"{key}.jpg", b"jpeg"),
            (f"{key}.json", json.dumps({"slide": slide, "x": x, "y": 0, **said}).encode()),
        ]

    write_tar(
        tmp_path / "a.tar",
        [
            *sample("s", 0, mpp=0.5, tile_size=48, patient="p"),
            *sample("s", 48, mpp=5.0, tile_size=48),
            *sample("t", 0, mpp=0.5),
            *sample("t", 48, mpp=0.50001, tile_size=48),
        ],
    )
    write_tar(tmp_path / "b.tar", [*sample("s", 0, patient="q", mpp=0.5), *sample("t", 0, mpp=0.5), *sample("t", 96)])
    for _ in range(2):
        run_command_line(["shards", "index", f"shards={tmp_path}"])
        lines = capsys.readouterr().err.splitlines()
        assert [line.partition(":  ")[0] for line in lines if line.startswith("to look at: ")] == [
            (
                "to look at: 1 slide with several mpp (as s: 0.5 and 5.0): its tiles' .json contradict one another, so"
                " it counts as not known"
            ),
            (
                "to look at: 1 slide with several patient (as s: 'p' and 'q'): its tiles' .json contradict one another,"
                " so it counts as not known"
            ),
            (
                "to look at: 2 tiles at a place that is taken (as (0, 0) of s in a.tar and b.tar): both are in the"
                " index, and are trained on twice as often: remove one of the tars if one is a copy"
            ),
        ]
    index = ShardIndex.open(tmp_path)
    of_s, of_t = (index.facts(index.slides.index(slide)) for slide in "st")
    assert (of_s["mpp"], of_s["tile_size"], of_s["patient"]) == (None, 48, None)
    assert (of_t["mpp"], of_t["tile_size"], of_t["patient"]) == (0.5, 48, None)
    assert len(index) == 7


def test_pictures_that_share_a_json_lie_at_one_place_which_is_said(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("a.one.jpg", b"j"), ("a.two.jpg", b"j"), ("a.json", b'{"x": 0, "y": 0}')])
    (kind,) = disputed(scan(tmp_path))
    assert str(kind).startswith("1 tile at a place that is taken (as (0, 0) of a in a.tar)")


def test_tiles_of_which_nothing_says_slide_and_place_are_said(tmp_path: Path) -> None:
    others = json.dumps({"slide_id": "s", "coords": [0, 0]}).encode()  # names that aren't read
    write_tar(tmp_path / "a.tar", [("k.jpg", b"jpeg"), ("k.json", others), ("l.jpg", b"jpeg")])
    write_tar(tmp_path / "b.tar", [("s_0_0.jpg", b"jpeg")])
    (kind,) = disputed(scan(tmp_path))
    assert str(kind).startswith("2 tiles without slide and place (as the first in a.tar): neither a .json,")


def test_what_another_program_says_of_its_pictures_is_not_taken_for_the_slides(tmp_path: Path) -> None:
    said = {"width": 256, "height": 256, "source": ["x"], "thumbnail_downsample": "a", "slide": "s", "patient": 7}
    write_tar(tmp_path / "a.tar", [("k.jpg", b"jpeg"), ("k.json", json.dumps(said).encode())])
    facts = scan(tmp_path).facts(0)
    assert (facts["slide"], facts["patient"], facts["width"], facts["source"]) == ("s", "7", None, None)


@pytest.mark.parametrize("key", ["a_{}_1", "a_1_{}"])
def test_a_number_of_any_length_in_a_key_costs_its_tile_only(tmp_path: Path, key: str) -> None:
    write_tar(
        tmp_path / "a.tar",
        [(f"{key.format('9' * 5000)}.jpg", b"jpeg"), (f"{key.format('²')}.jpg", b"jpeg"), ("b_0_0.jpg", b"jpeg")],
    )
    (kind,) = describe_left_out(index := scan(tmp_path))[0]
    assert sorted(index.slides) == ["a", "b"] and str(kind).startswith("1 tile at an impossible place (as a_")
    assert {finding.kind for finding in verify_shard(tmp_path, "a.tar").findings} == {"undecodable tile"}


def test_tars_that_are_none_are_named_with_the_way_out(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("k.jpg", b"jpeg")])
    (tmp_path / "b.TAR").write_bytes((tmp_path / "a.tar").read_bytes())
    (tmp_path / "d.tar").write_bytes(gzip.compress((tmp_path / "a.tar").read_bytes()))
    (tmp_path / "e.tar").write_bytes(bytes(10240))
    (tmp_path / "c.tar").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n")
    said = [str(kind) for kind in describe_left_out(scan(tmp_path))[1]]
    assert "e.tar: it holds no file" in said
    assert any(one.startswith("d.tar: it is compressed, whatever its name") for one in said)
    assert said[0] == "b.TAR: its ending is in capitals: rename it to b.tar"
    assert said[1].startswith("c.tar: is a Git LFS pointer") and "git lfs pull" in said[1]


def test_a_picture_of_no_bytes_is_left_out_and_counted(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("k.jpg", b"jpeg"), ("l.jpg", b"")])
    index = scan(tmp_path)
    assert len(index) == 1 and [str(kind) for kind in describe_left_out(index)[0]] == [
        "1 empty .jpg (as l.jpg in a.tar): it has 0 bytes"
    ]


def test_what_a_json_leaves_open_is_taken_from_the_key(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "a.tar",
        [("s_7_9.jpg", b"jpeg"), ("s_7_9.json", b'{"slide": null, "x": null, "y": 12.0, "mpp": null}')],
    )
    index = scan(tmp_path)
    assert (index.slides, index.x.tolist(), index.y.tolist(), index.facts(0)["mpp"]) == (["s"], [7], [12], None)


def test_what_is_called_a_tar_and_is_no_file_is_refused_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(Fault, match=r"a\.tar: it is no file"):
        scan(tmp_path)
    assert [finding.kind for finding in verify_shard(tmp_path, "a.tar").findings] == ["missing record", "unreadable"]
    os.remove(tmp_path / "a.tar")
    (tmp_path / "a.tar").symlink_to("nowhere")
    with pytest.raises(Fault, match=r"a\.tar: it is no file"):
        scan(tmp_path)


def test_of_a_sample_with_several_pictures_the_tile_is_known_or_none_is_taken(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "a.tar",
        [
            *(("j_0_0.jpg", b"tile"), ("j_0_0.mask.png", b"mask"), ("j_0_0.png", b"mask")),
            *(("p_1_0.png", b"tile"), ("p_1_0.mask.png", b"mask")),
            *(("q_2_0.image.png", b"?"), ("q_2_0.mask.png", b"?")),
            *(("w_3_0.webp", b"tile"), ("W_4_0.PNG", b"tile")),
        ],
    )
    index = scan(tmp_path)
    assert [index.slide_of(row) for row in range(len(index))] == ["j", "p", "w", "W"]
    (members, _) = describe_left_out(index)
    assert [(kind.kind, kind.count) for kind in members] == [(".png beside a tile", count) for count in (2, 1, 2)]
    assert not [found for found in verify_shard(tmp_path, "a.tar").findings if found.kind != "undecodable tile"]


@pytest.mark.parametrize("by", ["its own writer", "GNU", "PAX", "tar --format=gnu", "tar --format=pax"])
def test_samples_are_those_that_the_webdataset_package_makes(tmp_path: Path, by: str) -> None:
    names = ["a", "folder/b", "folder.v2/c", "d" * 120, "Müller_3", "e.extra.f"]
    picture = simplejpeg.encode_jpeg(np.zeros((16, 16, 3), np.uint8))
    members = [(f"{name}.{kind}", data) for name in names for kind, data in (("jpg", picture), ("cls", b"1"))]
    if by == "its own writer":
        with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
            for name in names:
                writer.write({"__key__": name, "jpg": picture, "cls": b"1"})
    elif by.startswith("tar "):  # the program, with entries of folders and what macOS leaves beside files
        for name, data in [*members, ("folder/._b.jpg", b"macOS"), ("._a.jpg", b"macOS")]:
            (tmp_path / "files" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "files" / name).write_bytes(data)
        program = [*by.split(), "--sort=name", "-C", "files", "-cf", "a.tar", "."]
        subprocess.run(program, cwd=tmp_path, check=True)
    else:
        write_tar(tmp_path / "a.tar", members, tarfile.GNU_FORMAT if by == "GNU" else tarfile.PAX_FORMAT)
    theirs = [
        (sample["__key__"], kind)
        for sample in webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False)
        for kind in sample
        if kind.split(".")[-1] == "jpg" and not sample["__key__"].endswith("/")  # folder/._b.jpg is its "folder/"
    ]
    with (tmp_path / "a.tar").open("rb") as file:
        tiles = [
            member.name for member in tar_members.members(file, (tmp_path / "a.tar").stat().st_size) if is_tile(member)
        ]
    assert [f"{key}.{kind}" for key, kind in theirs] == tiles and len(scan(tmp_path)) == len(tiles) == len(names)
