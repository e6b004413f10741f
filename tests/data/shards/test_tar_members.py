"""Our walk over a tar agrees with tarfile's on whole tars of every format, and sees the damage that tarfile
overlooks."""

import io
import tarfile
from contextlib import suppress

import pytest

from data.shards.tar_members import DamagedTar, Member, member_header, members, padding


def tar(format: int, names: list[str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for number, name in enumerate(names):
            member = tarfile.TarInfo(name)
            member.size = 700 * number
            archive.addfile(member, io.BytesIO(b"x" * member.size))
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
    return buffer.getvalue()


def walk(content: bytes) -> list[Member]:
    return list(members(io.BytesIO(content), len(content)))


NAMES = ["a_0_0.jpg", "a_0_0.json", "kürzel_5_7.jpg", "n" * 150 + ".jpg", "last.json"]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_that_tarfile_finds(format: int) -> None:
    names = [name for name in NAMES if format != tarfile.USTAR_FORMAT or len(name) < 100]
    content = tar(format, names)
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        expected = [Member(m.name, m.offset_data, m.size, m.isreg(), m.isdir()) for m in archive]
    assert walk(content) == expected
    assert [padding(member) for member in expected[:2]] == [0, 324]


def test_tars_from_before_posix_are_read_with_their_folders() -> None:
    content = bytearray(tar(tarfile.USTAR_FORMAT, ["a_0_0.jpg", "a_0_0.json"]))
    expected = walk(bytes(content))
    for start in (0, 512, 2048):  # the headers; what follows the magic is of POSIX too
        header = content[start : start + 512]
        header[257:512], header[148:156] = bytes(255), b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        content[start : start + 512] = header
    assert walk(bytes(content)) == expected and expected[-1].is_folder


def test_a_damaged_header_in_the_middle_is_named_where_tarfile_just_ends() -> None:
    content = bytearray(tar(tarfile.GNU_FORMAT, NAMES))
    where = walk(bytes(content))[2].offset - 512
    content[where + 3] ^= 1
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        assert len(archive.getmembers()) == 2, "tarfile no longer overlooks it: tar_members may not be needed"
    with pytest.raises(DamagedTar, match=f"header at byte {where}"):
        walk(bytes(content))


def test_every_cut_is_seen_but_one_between_members() -> None:
    content = tar(tarfile.GNU_FORMAT, NAMES)
    ends = {m.offset + m.size + padding(m) for m in walk(content)} | {0}
    last = max(ends)
    for cut in range(0, last + 1024, 64):
        if cut in ends:
            assert len(walk(content[:cut])) == sum(end <= cut for end in ends - {0})
        else:
            with pytest.raises(DamagedTar, match="truncated"):
                walk(content[:cut])


def test_what_lies_behind_the_end_mark_is_seen() -> None:
    with pytest.raises(DamagedTar, match="behind its end mark"):
        walk(tar(tarfile.GNU_FORMAT, NAMES) + b"x" * 512)


@pytest.mark.parametrize("name", [*NAMES, "n" * 100, "n" * 101, "ü" * 50])
@pytest.mark.parametrize("size", [0, 1, 17_000, 8**11 - 1, 8**11])
def test_a_header_is_tarfiles(name: str, size: int) -> None:
    member = tarfile.TarInfo(name)
    member.size = size
    assert member_header(name, size) == member.tobuf(tarfile.GNU_FORMAT)


def test_no_flipped_bit_of_an_extended_header_makes_the_walk_endless_or_end_in_anything_but_damage() -> None:
    content = bytearray(tar(tarfile.PAX_FORMAT, ["k\u00fc_5_7.jpg"]))
    for bit in range(3 * 512 * 8):  # the extended header, its records, the member's own header
        content[bit // 8] ^= 1 << bit % 8
        steps = members(io.BytesIO(content), len(content))
        with suppress(DamagedTar):
            assert sum(1 for _, _ in zip(steps, range(10), strict=False)) < 10
        content[bit // 8] ^= 1 << bit % 8


@pytest.mark.parametrize("size", [-1, -1024, -(2**40)])
def test_a_header_whose_size_is_negative_is_damage(size: int) -> None:
    """As a field of base 256 may say it, with a checksum that agrees."""
    header = bytearray(tarfile.TarInfo("a.jpg").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = (2**96 + size).to_bytes(12, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    with pytest.raises(DamagedTar, match="no possible size"):
        walk(bytes(header) + bytes(2048))
