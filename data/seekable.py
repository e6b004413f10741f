"""Files that aren't ones, to read and seek in: who derives says with ``readinto`` what lies at a position."""

import io


class SeekableFile(io.RawIOBase):
    """``length`` bytes, of which ``position`` is read next."""

    def __init__(self, length: int) -> None:
        self.length, self.position = length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + (0, self.position, self.length)[whence]
        return self.position

    def tell(self) -> int:
        return self.position
