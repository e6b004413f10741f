"""Some slides of a store, by a list of the user's."""

from pathlib import Path

import numpy as np
import pytest

from data.embeddings.chosen_slides import open_chosen
from data.fault import Fault
from tests.pretrain.training.wavy_slides import write_wavy_slides


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wavy_slides(tmp_path_factory.mktemp("slides") / "store", 4, columns=3, rows=3)


def test_a_list_or_a_table_chooses_slides_whose_embeddings_are_the_same(store: Path, tmp_path: Path) -> None:
    (tmp_path / "some.txt").write_text("slide2\n\nslide0\n")
    (tmp_path / "some.csv").write_text("patient,slide\np,slide0\nq,slide2\n")
    whole = open_chosen(store, None)
    one, other = (open_chosen(store, tmp_path / name) for name in ("some.txt", "some.csv"))
    assert one.slides == other.slides == ["slide0", "slide2"] and one.digest == other.digest != whole.digest
    np.testing.assert_array_equal(one.read("slide2").embeddings, whole.read("slide2").embeddings)


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("a.txt", "\n", "names no slide"),
        ("a.csv", "name\nslide0\n", "has no column slide (it has name)"),
        ("a.txt", "slide0\nelsewhere\n", "holds no slide 'elsewhere' (1 of those named aren't there)"),
    ],
)
def test_a_list_that_names_nothing_to_be_had_is_refused(
    store: Path, tmp_path: Path, name: str, text: str, sentence: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(Fault) as refused:
        open_chosen(store, tmp_path / name)
    assert sentence in str(refused.value)
    with pytest.raises(Fault, match="can't be read"):
        open_chosen(store, tmp_path / "none.txt")
