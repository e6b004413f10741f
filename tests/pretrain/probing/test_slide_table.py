"""Slides and patients by a table of the user's."""

from pathlib import Path

import pytest

from data.fault import Fault
from pretrain.probing.slide_table import by_table


def told(folder: Path, text: str, *files: str) -> list[int]:
    """The groups of files below ``folder`` by a table of this text."""
    (folder / "slides.csv").write_text(text)
    return by_table([folder / file for file in files], folder, folder / "slides.csv").of.tolist()


def test_a_table_tells_by_path_or_name_and_names_what_it_lacks(tmp_path: Path) -> None:
    assert told(tmp_path, "\ufefffile,slide,patient\na/1.png,s1,p\n2.png,s2,p\n", "a/1.png", "b/2.png") == [0, 0]
    whole = f"file,slide\n{tmp_path / 'a/1.png'},s1\n{tmp_path / 'b/1.png'},s2\n"
    assert told(tmp_path, whole, "a/1.png", "b/1.png") == [0, 1]
    with pytest.raises(Fault, match=r"says no slide of 1 of 2 images, the first is .*2\.png"):
        told(tmp_path, "file,slide\na/1.png,s1\n", "a/1.png", "b/2.png")
    with pytest.raises(Fault, match="has the columns name, slide: it needs file, and patient or slide"):
        told(tmp_path, "name,slide\na/1.png,s1\n", "a/1.png", "b/2.png")


def test_a_table_that_says_two_things_of_one_file_is_refused_by_its_lines(tmp_path: Path) -> None:
    text = "file,slide\na/1.png,s1\na/2.png,s1\na/1.png,{}\n"
    assert told(tmp_path, text.format("s1"), "a/1.png", "a/2.png") == [0, 0]
    with pytest.raises(Fault, match=r"slides\.csv says in line 2 that a/1\.png is of slide s1, and in line 4 of s2"):
        told(tmp_path, text.format("s2"), "a/1.png", "a/2.png")


def test_a_bare_name_that_two_classes_have_is_refused_and_their_paths_are_taken(tmp_path: Path) -> None:
    with pytest.raises(Fault, match=r"line 2 of .*slides\.csv says 1\.png, and both .*a/1\.png and .*b/1\.png have"):
        told(tmp_path, "file,slide\n1.png,s1\n2.png,s2\n", "a/1.png", "a/2.png", "b/1.png")
    assert told(tmp_path, "file,slide\na/1.png,s1\nb/1.png,s2\n", "a/1.png", "b/1.png") == [0, 1]
    assert told(tmp_path, "file,slide\na/1.png,s1\n1.png,s2\n", "a/1.png", "b/1.png") == [0, 1]
