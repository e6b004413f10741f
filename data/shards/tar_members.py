"""The members of a tar, strictly: every byte is accounted for, and the first that is wrong is named.

Python's tarfile takes a damaged header in the middle of a tar for its end, and loses everything behind it without a
word. Here a tar ends with its mark, two blocks of zeros, or exactly where a member ends (as some writers leave it);
every other end is a fault of the tar.
"""

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

TAR_BLOCK = tarfile.BLOCKSIZE
LENGTH_NAME = tarfile.LENGTH_NAME
OF_OLD_TARS = (b"\0", b"0", b"1", b"2", b"5")  # kinds of members before POSIX: files, links and folders
CHECKSUM_FIELD = re.compile(
    rb"[0-7 ]{6}(\0 | \0)|[0-7]{7}\0"
)  # the only bytes of a header that its checksum leaves out
LONG_NAMES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE)


class DamagedTar(Exception):
    """A tar that isn't one from some byte on; the message says where and why."""


@dataclass(frozen=True)
class Member:
    """One member: ``size`` bytes of data at ``offset``; ``is_file`` is False for folders and links and what else a tar
    may hold."""

    name: str
    offset: int
    size: int
    is_file: bool
    is_folder: bool = False


def members(file: BinaryIO, length: int) -> Iterator[Member]:
    """The members of an open tar of ``length`` bytes, in order, by their headers; the data is not read.

    The caller may move ``file`` in between. Names are those of the GNU or PAX extension where there is one. Raises
    DamagedTar after the last member in front of the damage.
    """
    position = 0
    extended: dict[str, str] = {}
    while position < length:
        file.seek(position)
        block = file.read(TAR_BLOCK)
        if len(block) < TAR_BLOCK:
            raise DamagedTar(f"it is truncated: it ends after {len(block)} bytes of the header at byte {position}")
        if block.count(0) == TAR_BLOCK:
            _must_be_zero(file, position, length)
            return
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.TarError as error:
            raise DamagedTar(f"the header at byte {position} is damaged ({error})") from error
        if not CHECKSUM_FIELD.fullmatch(block[148:156]):
            raise DamagedTar(
                f"the header at byte {position} is damaged (its checksum isn't written as any tar program does)"
            )
        if block[257:262] != b"ustar" and block[156:157] not in OF_OLD_TARS:
            raise DamagedTar(f"the header at byte {position} is damaged (a member of unknown kind)")
        data = position + TAR_BLOCK
        size = header.size
        if "size" in extended and header.type not in (*LONG_NAMES, *PAX):
            size = int(extended["size"]) if re.fullmatch("[0-9]{1,20}", extended["size"]) else -1
        if size < 0:
            raise DamagedTar(f"the header at byte {position} is damaged (its member has no possible size)")
        position = data + -(-size // TAR_BLOCK) * TAR_BLOCK
        if position > length:
            raise DamagedTar(
                f"it is truncated: {data + size - length} bytes of the member {header.name} at byte {data} are missing"
            )
        if header.type in LONG_NAMES:
            name = file.read(size).rstrip(b"\0").decode("utf-8", "surrogateescape")
            extended |= {"path": name} if header.type == tarfile.GNUTYPE_LONGNAME else {}
        elif header.type in PAX:
            extended |= _pax(file.read(size), data) if header.type != tarfile.XGLTYPE else {}
        else:
            yield Member(extended.get("path", header.name), data, size, header.isreg(), header.isdir())
            extended = {}
    if extended:
        raise DamagedTar("it is truncated: it ends after an extended header, before the member that this is for")


def is_header_of(block: bytes, name: str | None, size: int) -> bool:
    """Whether a header block is that of a member of this size and, where it isn't None, of this name; at the cost of a
    few comparisons.

    Of a name longer than the block has room for, the beginning is compared.
    """
    if block[124:136].rstrip(b" \0").lstrip(b" 0") != b"%o" % size:
        return False
    return name is None or block[:LENGTH_NAME].rstrip(b"\0") == name.encode()[:LENGTH_NAME]


def padding(member: Member) -> int:
    """How many bytes of zeros follow a member's data."""
    return -member.size % TAR_BLOCK


def member_header(name: str, size: int) -> bytes:
    """The GNU header blocks of a plain file of ``size`` bytes, as tarfile writes them, with nothing of this machine in
    them."""
    short = name.encode()
    if len(short) > LENGTH_NAME or size >= 8**11:
        member = tarfile.TarInfo(name)
        member.size = size
        return member.tobuf(tarfile.GNU_FORMAT)
    header = bytearray(_PLAIN)
    header[: len(short)] = short
    header[124:135] = digits = b"%011o" % size
    header[148:154] = b"%06o" % (_PLAIN_SUM + sum(short) + sum(digits))  # counted as if the checksum were spaces
    header[154] = 0
    return bytes(header)


def _plain_header() -> bytes:
    header = bytearray(tarfile.TarInfo("").tobuf(tarfile.GNU_FORMAT))
    header[148:156] = b" " * 8
    return bytes(header)


_PLAIN = _plain_header()
_PLAIN_SUM = sum(_PLAIN) - sum(_PLAIN[124:135])


def _must_be_zero(file: BinaryIO, position: int, length: int) -> None:
    file.seek(position)
    while piece := file.read(1 << 20):
        if piece.count(0) != len(piece):
            raise DamagedTar(f"something lies behind its end mark at byte {position}, out of every reader's sight")
        if len(piece) < 1 << 20:
            break
    if length - position < 2 * TAR_BLOCK:
        raise DamagedTar(f"it is truncated: its end mark at byte {position} is cut short")


def _pax(records: bytes, offset: int) -> dict[str, str]:
    """The key=value records of a PAX header; each begins with its own length."""
    found = {}
    while records:
        digits, _, rest = records.partition(b" ")
        try:
            count = int(digits)
        except ValueError as error:
            raise DamagedTar(f"the extended header at byte {offset} is damaged") from error
        key, equals, value = rest[: max(0, count - len(digits) - 1)].rstrip(b"\n").partition(b"=")
        if not equals or count > len(records):
            raise DamagedTar(f"the extended header at byte {offset} is damaged")
        found[key.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        records = records[count:]
    return found
