"""Some slides of a store, by a list of the user's."""

from pathlib import Path

import numpy as np
import pytest

from data.embeddings.chosen_slides import open_chosen
from data.embeddings.store import EmbeddingStore, EmbeddingWriter
from data.fault import Fault
from tests.pretrain.training.wavy_slides import write_wavy_slides


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wavy_slides(tmp_path_factory.mktemp("slides") / "store", 4, columns=3, rows=3)


def write_tcga_slides(folder: Path, patients: int) -> Path:
    """Two slides of a tile each of every patient."""
    with EmbeddingWriter(folder, 4, "made up", "0" * 16) as writer:
        for number in range(2 * patients):
            name = f"TCGA-AA-{number // 2:04}-01Z-00-DX{number % 2 + 1}"
            writer.add(name, np.zeros((1, 4), np.float32), np.zeros((1, 2), np.int64), 256.0, 0.5)
    return folder


def test_a_list_or_a_table_chooses_slides_whose_embeddings_are_the_same(store: Path, tmp_path: Path) -> None:
    (tmp_path / "some.txt").write_text("slide2\n\nslide0\n")
    (tmp_path / "some.csv").write_text("patient,slide\np,slide0\nq,slide2\n")
    whole = open_chosen(store, None)
    one, other = (open_chosen(store, tmp_path / name) for name in ("some.txt", "some.csv"))
    assert one.slides == other.slides == ["slide0", "slide2"] and one.digest == other.digest != whole.digest
    np.testing.assert_array_equal(one.read("slide2").embeddings, whole.read("slide2").embeddings)


def test_files_names_and_patients_choose_slides_as_a_table_of_labels_does(store: Path, tmp_path: Path) -> None:
    (tmp_path / "files.csv").write_text("slide_id\n/slides/slide1.svs\nslide3.tiff\n")
    (tmp_path / "files.txt").write_text("slide1.svs\nslide3\n")
    for name in ("files.csv", "files.txt"):
        assert open_chosen(store, tmp_path / name).slides == ["slide1", "slide3"]
    tcga = write_tcga_slides(tmp_path / "tcga", patients=3)
    (tmp_path / "patients.csv").write_text("case_id\nTCGA-AA-0002\nTCGA-AA-0000\n")
    wanted = [slide for slide in EmbeddingStore.open(tcga).slides if slide[:12] != "TCGA-AA-0001"]
    assert open_chosen(tcga, tmp_path / "patients.csv").slides == wanted and len(wanted) == 4


def test_a_share_is_of_patients_by_their_names_and_grows_by_others(tmp_path: Path) -> None:
    tcga = write_tcga_slides(tmp_path / "tcga", patients=40)
    half, most = (open_chosen(tcga, None, share) for share in (0.5, 0.8))
    of_half = {slide[:12] for slide in half.slides}
    assert 12 <= len(of_half) <= 28 and len(half.slides) == 2 * len(of_half)
    assert set(half.slides) < set(most.slides) and half.digest != most.digest
    assert open_chosen(tcga, None, 1.0).digest == EmbeddingStore.open(tcga).digest
    (tmp_path / "one.txt").write_text(f"{min(set(most.slides) - set(half.slides))}\n")
    with pytest.raises(Fault, match=r"share of 0\.5 holds none of these 1 slides"):
        open_chosen(tcga, tmp_path / "one.txt", 0.5)


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("a.txt", "\n", "names no slide"),
        ("a.csv", "name\nslide0\n", "has no column slide, and none of patients (it has name)"),
        ("a.csv", "patient\np0\n", "names patient 'p0', of whom no slide's name tells (1 of those named"),
        ("a.csv", "patient,age\nNA,3\n", "names no patient"),
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
