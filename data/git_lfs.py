"""Files that Git LFS left where the real ones should be: a few lines of text that point to them."""

from pathlib import Path

from data.fault import Fault

HEAD = b"version https://git-lfs.github.com/spec/"


def refuse_pointer(path: Path) -> None:
    """Raise Fault where ``path`` is a pointer, with the command that brings the file itself."""
    with path.open("rb") as file:
        if file.read(len(HEAD)) == HEAD:
            raise Fault(
                f"{path} is a Git LFS pointer and not the file itself: run 'git lfs pull' in its repository, or"
                " download the file."
            )
