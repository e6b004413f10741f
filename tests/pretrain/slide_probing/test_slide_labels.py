"""Tables of labels: every way of writing them is read, and what can't be judged is said by name."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.fault import Fault
from pretrain.slide_probing.folds import rounds_of
from pretrain.slide_probing.labels import read_labels

KNOWN = {f"s{i}": 5 for i in range(8)}


def table(folder: Path, text: str, name: str = "labels.csv") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def rows(*answers: str) -> str:
    return "\n".join(f"s{i},{answer}" for i, answer in enumerate(answers))


def test_classes_numbers_grades_and_survival_are_told_by_what_is_written(tmp_path: Path) -> None:
    classes = read_labels(table(tmp_path, "slide,label\n" + rows(*"abababab")), None, KNOWN)
    assert (classes.kind, classes.classes, classes.ordered) == ("classes", ["a", "b"], False)
    assert classes.values.tolist() == [0, 1] * 4 and classes.bags == [[f"s{i}"] for i in range(8)]
    grades = read_labels(table(tmp_path, "slide,label\n" + rows(*"10010212")), None, KNOWN)
    assert (grades.kind, grades.classes, grades.ordered) == ("classes", ["0", "1", "2"], True)
    number = read_labels(table(tmp_path, "slide,label\n" + rows(*(f"{i / 3}" for i in range(8)))), None, KNOWN)
    assert number.kind == "number" and number.values == pytest.approx(np.arange(8) / 3)
    survival = read_labels(
        table(tmp_path, "slide,time,event\n" + rows(*(f"{i},{i % 2}" for i in range(8)))), None, KNOWN
    )
    assert survival.kind == "survival" and survival.values[3].tolist() == [3, 1]
    words = table(tmp_path, "slide,time,event\n" + rows(*(f"{i},{'True' if i % 2 else 'FALSE'}" for i in range(8))))
    np.testing.assert_array_equal(read_labels(words, None, KNOWN).values, survival.values)


def test_tables_as_other_programs_write_them_are_read(tmp_path: Path) -> None:
    lines = [f"p{i // 2}\ts{i}.svs\t{'mut' if i // 2 % 2 else 'wt'}\t{'test' if i < 4 else 'train'}" for i in range(8)]
    patho_bench = table(tmp_path, "case_id\tslide_id\tBRAF\tfold_0\n" + "\n".join(lines), "k=all.tsv")
    found = read_labels(patho_bench, "BRAF", KNOWN)
    assert found.bags == [["s0", "s1"], ["s2", "s3"], ["s4", "s5"], ["s6", "s7"]] and found.classes == ["mut", "wt"]
    assert found.rounds is not None and [part.tolist() for part in found.rounds[0]] == [[2, 3], [0, 1]]
    clam = table(tmp_path, "case_id,slide_id,label\n" + "\n".join(f"p{i},s{i},{'ab'[i % 2]}" for i in range(8)))
    assert read_labels(clam, None, KNOWN).names == [f"p{i}" for i in range(8)]
    eva = table(
        tmp_path,
        "wsi_id,target,split\n"
        + "\n".join(f"/x/s{i}.tiff,{i % 2},{['train', 'test', 'val'][i % 3]}" for i in range(8)),
    )
    assert [part.tolist() for part in (read_labels(eva, None, KNOWN).rounds or [])[0]] == [[0, 2, 3, 5, 6], [1, 4, 7]]
    pq.write_table(pa.table({"slide": [f"s{i}" for i in range(8)], "label": list("abababab")}), tmp_path / "l.parquet")
    assert read_labels(tmp_path / "l.parquet", None, KNOWN).classes == ["a", "b"]


def patho_bench_task(folder: Path, text: str, about: str) -> Path:
    """A table as Patho-Bench writes it, with what it says beside it."""
    (folder / "config.yaml").write_text(about)
    return table(folder, text.replace(" ", "\t"), "k=all.tsv")


def test_patho_bench_says_beside_a_table_what_is_asked_and_what_its_codes_stand_for(tmp_path: Path) -> None:
    lines = [f"p{i // 2} s{i} {i // 2 % 2 * 11} {'test' if i < 4 else 'train'}" for i in range(8)]
    about = "task_col: grade\ntask_type: classification\nmetrics:\n  - bacc\nsample_col: case_id\nlabel_dict:\n"
    about += '  0: "Glioblastoma, IDH-wildtype"\n  5: Lipoma\n  11: Pituitary adenoma\n'
    path = patho_bench_task(tmp_path, "case_id slide_id grade fold_0\n" + "\n".join(lines), about)
    found = read_labels(path, None, KNOWN)
    assert (found.kind, found.classes) == ("classes", ["Glioblastoma, IDH-wildtype", "Pituitary adenoma"])
    assert found.values.tolist() == [0, 1, 0, 1] and not found.ordered and found.names == ["p0", "p1", "p2", "p3"]
    assert "config.yaml beside" in found.said[-1]
    assert read_labels(path, "fold_0", KNOWN).classes == ["test", "train"]  # another column is the user's own question
    (tmp_path / "config.yaml").write_text(about.replace("11:", "12:"))
    with pytest.raises(Fault, match=r"has 11 in grade, and config\.yaml beside it says of no such class"):
        read_labels(path, None, KNOWN)
    (tmp_path / "config.yaml").write_text("task_col: [")
    with pytest.raises(Fault, match="can't be read as a task of Patho-Bench"):
        read_labels(path, None, KNOWN)
    (tmp_path / "config.yaml").write_text("model: {width: 5}")  # somebody else's
    assert read_labels(path, "grade", KNOWN).classes == ["0", "11"]


def test_survival_is_read_as_patho_bench_writes_it_with_and_without_its_file(tmp_path: Path) -> None:
    lines = [f"p{i} s{i} {i % 2} {100.0 * i} {i % 7} {'train' if i else 'test'}" for i in range(8)]
    text = "case_id slide_id OS_event OS_days OS fold_0\n" + "\n".join(lines)
    about = "task_col: OS\nextra_cols: [OS_event, OS_days]\ntask_type: survival\nlabel_dict:\n  0: Quartile 1\n"
    with_file = read_labels(patho_bench_task(tmp_path, text, about), None, KNOWN)
    (tmp_path / "config.yaml").unlink()
    without = read_labels(tmp_path / "k=all.tsv", "OS", KNOWN)
    for found in (with_file, without):
        assert found.kind == "survival" and found.values[3].tolist() == [300, 1]


def test_slides_are_judged_by_themselves_where_that_is_asked_with_a_patient_in_one_fold(tmp_path: Path) -> None:
    """As in CLAM's own example of subtypes, and in Patho-Bench's BRACS."""
    known = {f"s{i}": 5 for i in range(40)}
    lines = [f"p{i // 4},s{i},subtype {i % 2 + 1}" for i in range(40)]
    clam = table(tmp_path, "case_id,slide_id,label\n" + "\n".join(lines))
    with pytest.raises(Fault, match=r"two things of patient p0.*cases=slide"):
        read_labels(clam, None, known)
    found = read_labels(clam, None, known, "slide")
    assert found.names == list(known) and found.classes == ["subtype 1", "subtype 2"]
    assert found.patients == [f"p{i // 4}" for i in range(40)] and "one by one" in found.said[-1]
    patients = np.array(found.patients)
    for fitted, judged in rounds_of(found, folds=5, repeats=2, seed=0):
        assert len(judged) == 8 and not set(patients[fitted]) & set(patients[judged])
    with pytest.raises(Fault, match=r"more than there are cases of subtype 1 \(10\)"):
        rounds_of(found, folds=11, repeats=1, seed=0)
    lines = [f"p{i // 4} s{i} {i % 2} {'test' if i < 8 else 'train'}" for i in range(40)]
    about = (
        "task_col: type\ntask_type: classification\nlabel_dict: {0: a b, 1: c}\nmetrics: [weighted_kappa]\nsample_col: "
    )
    bracs = patho_bench_task(tmp_path, "case_id slide_id type fold_0\n" + "\n".join(lines), about + "slide_id")
    found = read_labels(bracs, None, known)
    assert len(found.bags) == 40 and found.rounds is not None and found.rounds[0][1].tolist() == list(range(8))
    split = table(
        tmp_path, "case_id,slide_id,label,split\np,s0,a,train\np,s1,b,test\nq,s2,a,test\nr,s3,b,train", "x.csv"
    )
    with pytest.raises(Fault, match="patient p is in split test and train"):
        read_labels(split, None, known, "slide")


def test_a_line_for_every_tile_is_one_for_the_slide_as_in_evas_manifests(tmp_path: Path) -> None:
    lines = [f"tile{k}.png,{k}.pt,{i % 2},{['train', 'val'][i > 3]},s{i}" for i in range(8) for k in range(3)]
    text = "origin,embeddings,target,split,wsi_id\n" + "\n".join(lines)
    found = read_labels(table(tmp_path, text), None, KNOWN)
    assert found.bags == [[f"s{i}"] for i in range(8)] and found.rounds is not None
    assert found.rounds[0][1].tolist() == [4, 5, 6, 7]
    with pytest.raises(Fault, match="has s0 twice, the second time in line 4, and says other things"):
        read_labels(
            table(tmp_path, text.replace("tile2.png,2.pt,0,train,s0", "tile2.png,2.pt,1,train,s0")), None, KNOWN
        )


def test_patients_are_known_by_a_column_or_by_tcgas_names_and_which_is_said(tmp_path: Path) -> None:
    names = {f"TCGA-AA-000{i // 2}-01Z-00-DX{i % 2 + 1}": 5 for i in range(8)}
    lines = [f"{name},{'ab'[i // 2 % 2]}" for i, name in enumerate(names)]
    found = read_labels(table(tmp_path, "slide,label\n" + "\n".join(lines)), None, names)
    assert found.names == [f"TCGA-AA-000{i}" for i in range(4)] and "by TCGA's names" in found.said[-1]
    alone = read_labels(table(tmp_path, "slide,label\n" + rows(*"abababab")), None, KNOWN)
    assert "each slide stands for itself" in alone.said[-1]


def test_empty_cells_of_a_column_of_patients_are_filled_from_names_or_refused(tmp_path: Path) -> None:
    names = {f"TCGA-AA-000{i // 2}-01Z-00-DX{i % 2 + 1}": 5 for i in range(8)}

    def found(*patients: str) -> tuple[list[list[str]], str]:
        lines = [f"{name},{one},{'ab'[i // 2 % 2]}" for i, (name, one) in enumerate(zip(names, patients, strict=True))]
        labelled = read_labels(table(tmp_path, "slide,patient,label\n" + "\n".join(lines)), None, names)
        return labelled.bags, labelled.said[-1]

    pairs = [list(names)[i : i + 2] for i in range(0, 8, 2)]
    bags, said = found(*[""] * 8)
    assert bags == pairs and said.endswith("by TCGA's names, as the column patient is empty")
    bags, said = found("p0", "", "NA", "", "p2", "p2", "p3", "p3")
    assert bags == pairs and "by the column patient, and TCGA's names for 3 slides (TCGA-AA-0000-01Z-00-DX2, …)" in said
    with pytest.raises(Fault, match=r"patient empty for 1 slide \(s2\), whose names tell no patient: fill it in"):
        lines = rows(*(f"{'' if i == 2 else f'p{i // 2}'},{'ab'[i // 2 % 2]}" for i in range(8)))
        read_labels(table(tmp_path, "slide,patient,label\n" + lines), None, KNOWN)
    alone = read_labels(
        table(tmp_path, "slide,patient,label\n" + rows(*(f",{one}" for one in "abababab"))), None, KNOWN
    )
    assert "each slide stands for itself, as the column patient is empty" in alone.said[-1]


@pytest.mark.parametrize("word", ["none", "None", "null", "N/A", "NA"])
def test_a_word_that_may_stand_for_nothing_is_a_class_among_words_and_none_among_numbers(
    tmp_path: Path, word: str
) -> None:
    among_words = read_labels(table(tmp_path, "slide,label\n" + rows(*["micro", word, "macro", ""] * 2)), None, KNOWN)
    assert set(among_words.classes) == {word, "micro", "macro"} and len(among_words.bags) == 6
    assert any(f"'{word}' in" in one and "taken for a class, 2 slides (s1, …)" in one for one in among_words.said)
    among_numbers = read_labels(table(tmp_path, "slide,label\n" + rows(*["1", word, "0", "1"] * 2)), None, KNOWN)
    assert among_numbers.classes == ["0", "1"] and len(among_numbers.bags) == 6
    assert any(f"'{word}' in" in one and "for no label, 2 slides (s1, …)" in one for one in among_numbers.said)


def test_columns_are_known_in_capitals_too(tmp_path: Path) -> None:
    lines = rows(*(f"p{i // 2},{'ab'[i // 2 % 2]},{['train', 'test'][i // 4]}" for i in range(8)))
    found = read_labels(table(tmp_path, "Slide,Patient,Label,Split\n" + lines), None, KNOWN)
    assert found.names == ["p0", "p1", "p2", "p3"] and found.classes == ["a", "b"]
    assert found.rounds is not None and [part.tolist() for part in found.rounds[0]] == [[0, 1], [2, 3]]
    survival = table(tmp_path, "SLIDE,Time,Event,Fold\n" + rows(*(f"{i},{i % 2},{i % 2}" for i in range(8))))
    told = read_labels(survival, None, KNOWN)
    assert told.kind == "survival" and told.rounds is not None and len(told.rounds) == 2


def test_what_stands_for_nothing_is_no_label_and_numbers_are_compared_as_numbers(tmp_path: Path) -> None:
    found = read_labels(
        table(tmp_path, "slide, label\n" + rows("1", "1.0", "NA", "0", "0", "nan", "1", "")), None, KNOWN
    )
    assert found.classes == ["0", "1"] and len(found.bags) == 5 and not found.ordered


def test_labels_that_fill_no_quarter_or_one_side_only_are_divided_all_the_same(tmp_path: Path) -> None:
    zeros = read_labels(
        table(tmp_path, "slide,label\n" + rows("0", "0", "0", "0", "0", "0", "0.5", "0.25")), None, KNOWN
    )
    events = read_labels(table(tmp_path, "slide,time,event\n" + rows(*(f"{i},1" for i in range(8)))), None, KNOWN)
    for found in (zeros, events):
        assert len(rounds_of(found, folds=2, repeats=1, seed=0)) == 2


def test_a_round_of_the_table_that_cannot_be_fitted_is_refused(tmp_path: Path) -> None:
    text = "slide,label,fold\n" + rows("a,0", "a,0", "b,1", "b,1", "a,0", "a,0", "b,1", "b,1")
    with pytest.raises(Fault, match="no case of a to fit on where s0 is judged"):
        rounds_of(read_labels(table(tmp_path, text), None, KNOWN), 5, 1, 0)


def split(*answers: str, judged: int) -> str:
    return rows(*(f"{answer},{'train' if i < 8 - judged else 'test'}" for i, answer in enumerate(answers)))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("slide,label,split\n" + split(*"abababaa", judged=2), "has 2 cases to judge by, and all of them are a: put"),
        ("slide,label,split\n" + split(*"abababab", judged=1), "has s7 alone to judge by, and one case can't"),
        (
            "slide,label,split\n" + split("0.1", "0.2", "0.3", "0.4", "0.5", "1.5", "1.5", "1.5", judged=3),
            "has 3 cases to judge by, and all of their labels are 1.5",
        ),
        (
            "slide,label,split\n" + split(*["0.5"] * 6, "0.1", "0.2", judged=2),
            "has one label only, 0.5, to fit on where s6 is judged",
        ),
        (
            "slide,time,event,split\n" + split(*(f"{i},{int(i < 6)}" for i in range(8)), judged=2),
            "has 2 cases to judge by, and of no two of them it is known who came first",
        ),
    ],
)
def test_sides_of_a_split_of_which_no_figure_can_be_told_are_refused(tmp_path: Path, text: str, sentence: str) -> None:
    found = read_labels(table(tmp_path, text), None, KNOWN)
    with pytest.raises(Fault) as refused:
        rounds_of(found, 5, 1, 0)
    assert sentence in str(refused.value)


def test_folds_of_one_case_each_judge_it_beside_the_others(tmp_path: Path) -> None:
    text = "slide,label,fold\n" + rows(*(f"{'ab'[i % 2]},{i}" for i in range(8)))
    assert len(rounds_of(read_labels(table(tmp_path, text), None, KNOWN), 5, 1, 0)) == 8


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("slide,label,label\ns0,a,b", "has the column 'label' twice"),
        ("slide,label,split\n" + rows(*(f"{'ab'[i % 2]},{['train', 'dev'][i % 2]}" for i in range(8))), "says 'dev'"),
        (
            "slide,label,fold\n" + rows(*(f"{'ab'[i % 2]},{'1' if i else ''}" for i in range(8))),
            "leaves fold empty for s0",
        ),
        (
            "slide,label,fold,split\n" + rows(*(f"{'ab'[i % 2]},1,train" for i in range(8))),
            "split and fold, which say two",
        ),
        ("slide,grade\ns0,a", "has the columns slide, grade: it needs slide and label"),
        ("slide,label\ns0,a\ns0,b", "has s0 twice, the second time in line 3"),
        ("slide,label\n,a", "names no slide in line 2"),
        ("slide,label\n", "has the names of its columns and no line: give a line for each slide"),
        ("slide,label\n" + rows("", "nan"), "has a label of no slide (s0, say): fill the labels in"),
        ("slide,label\nx,a\ny,b", "none of the slides of"),
        ("slide,label\n" + rows(*"aaaaaaaa"), "are a: there is nothing to tell apart"),
        ("slide,label\n" + rows(*["0.5"] * 8), "are 0.5: there is nothing to tell apart"),
        ("slide,time,event\n" + rows(*["3,1"] * 8), "no two cases of whom it is known who came first"),
        ("slide,label\n" + rows(*"aaaaaaab"), "has one case only of b"),
        ("slide,patient,label\ns0,p,a\ns1,p,b\ns2,q,b", "says two things of patient p: a (s0) and b (s1)"),
        ("slide,patient,label,fold\ns0,p,a,1\ns1,p,a,2\ns2,q,b,1\ns3,r,b,1\ns4,t,a,1", "patient p is in fold 1 and 2"),
        ("slide,label,split\n" + rows(*(f"{'ab'[i % 2]},train" for i in range(8))), "says train of all"),
        (
            "slide,label,split\n" + rows(*(f"{'ab'[i % 2]},test" for i in range(8))),
            "says test of all: some must be train",
        ),
        (
            "slide,time,event\n" + rows(*(f"{i},{2 if i == 5 else 1}" for i in range(8))),
            "event=2 for s5: an event is 1",
        ),
        ("slide,time,event\n" + rows("3,1", "-1,1"), "time=-1 for s1: a time is a number from 0 on"),
        ("slide,time,event\n" + rows("3,1", "soon,1"), "time=soon for s1, which is no number: mend it"),
        ("slide;time;event\n" + rows("3;1", "2,5;1").replace("s0,", "s0;").replace("s1,", "s1;"), "time=2,5 for s1"),
        ("slide;label\n" + "\n".join(f"s{i};{i},5" for i in range(8)), "with a comma (0,5 of s0): write a point"),
        ("slide,label\n" + rows("1", "2", "inf"), "isn't finite, inf of s2"),
        ("slide,time,event\n" + rows(*(f"{i},0" for i in range(8))), "has 0 events"),
        ("slide,time,event\n" + rows(*(f"{i},yes" for i in range(8))), "event=yes for s0: an event is 1"),
    ],
)
def test_what_cannot_be_judged_is_a_sentence_with_its_place(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(Fault) as refused:
        read_labels(table(tmp_path, text), None, KNOWN)
    assert sentence in str(refused.value)


def test_slides_without_label_and_labels_without_slide_are_left_out_and_said(tmp_path: Path) -> None:
    text = "slide,label\ns0,a\ns1,b\ns2,\ns3,a\ns4,b\nelsewhere,a"
    found = read_labels(table(tmp_path, text), None, KNOWN)
    assert [bag[0] for bag in found.bags] == ["s0", "s1", "s3", "s4"]
    said = "; ".join(found.said)
    assert "1 slide (s2) of" in said and "1 slide (elsewhere)" in said and "3 slides (s5, …) of the store" in said


def test_folds_keep_patients_together_and_classes_in_proportion(tmp_path: Path) -> None:
    known = {f"s{i}": 5 for i in range(60)}
    lines = [f"s{i},p{i // 2},{'ab'[i // 2 % 3 == 0]}" for i in range(60)]
    found = read_labels(table(tmp_path, "slide,patient,label\n" + "\n".join(lines)), None, known)
    rounds = rounds_of(found, folds=5, repeats=2, seed=0)
    assert len(rounds) == 10
    for repeat in (rounds[:5], rounds[5:]):
        assert sorted(np.concatenate([judged for _, judged in repeat]).tolist()) == list(range(30))
    for fitted, judged in rounds:
        assert not set(fitted) & set(judged) and (found.values[judged] == 1).sum() == 2
    assert [judged.tolist() for _, judged in rounds_of(found, 5, 2, 0)] == [judged.tolist() for _, judged in rounds]
    with pytest.raises(Fault, match="more than there are cases of b"):
        rounds_of(found, folds=11, repeats=1, seed=0)
