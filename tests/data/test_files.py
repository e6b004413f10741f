"""What must be whole is whole, whoever else writes it at the same time."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from data.fault import Fault
from data.files import Refused, create_folder_whole, write_whole


def filling(content: str, wait: Barrier | None = None):  # type: ignore[no-untyped-def]
    def fill(folder: Path) -> None:
        assert not list(folder.iterdir())
        (folder / "inner").mkdir()
        for name in ("a", "b", "inner/c"):
            (folder / name).write_text(content)
            if wait:
                wait.wait()

    return fill


def contents(folder: Path) -> set[str]:
    return {path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_of_folders_made_at_once_one_gets_the_name_and_the_others_are_told(tmp_path: Path) -> None:
    out, wait = tmp_path / "out", Barrier(3)

    def make(content: str) -> object:
        try:
            return create_folder_whole(out, filling(content, wait))
        except Fault as fault:
            return str(fault)

    with ThreadPoolExecutor(3) as pool:
        said = list(pool.map(make, "xyz"))
    assert said.count(True) == 1 and contents(out) == {"xyz"[said.index(True)]}
    others = [words for words in said if words is not True]
    assert others == [f"{out} already holds something else: give another name, or remove it."] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_same_folder_again_changes_nothing_and_an_empty_one_gives_way(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert create_folder_whole(out, filling("x"))
    before = out.stat().st_mtime_ns
    assert not create_folder_whole(out, filling("x"))
    (out / "inner" / "c").write_text("y")
    with pytest.raises(Fault, match="already holds something else"):
        create_folder_whole(out, filling("x"))
    assert out.stat().st_mtime_ns == before and contents(out) == {"x", "y"} and os.listdir(tmp_path) == ["out"]


def test_a_folder_that_the_disk_refuses_leaves_nothing(tmp_path: Path) -> None:
    def full(folder: Path) -> None:
        (folder / "a").write_text("some")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(Refused, match=r"out can't be written \(No space left on device\): make room there"):
        create_folder_whole(tmp_path / "out", full)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", [".", "/", ".."])
def test_a_path_without_a_name_is_a_sentence(path: str) -> None:
    for make in (lambda: write_whole(Path(path), "x"), lambda: create_folder_whole(Path(path), filling("x"))):
        with pytest.raises(Fault, match="names nothing that could be made: give a path that ends in a name"):
            make()
