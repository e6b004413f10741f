"""The probe command: table, JSON, baselines, and its refusals."""

import dataclasses
import json
import shutil
from unittest.mock import patch

import pytest

from data.fault import Fault
from pretrain.commands import probe
from pretrain.commands.probe import Config, run
from pretrain.encoders.run_checkpoint import RunCheckpoint


def settings(checkpoint, train, **changes) -> Config:
    config = Config(str(checkpoint), str(train), None, None, None, 0.25, 0, 8, 2, "cpu", "float32", [])
    return dataclasses.replace(config, **changes)


def test_scores_and_baselines_are_printed_and_written(make_tile_run, class_folders, tmp_path, capsys):
    folder, _ = make_tile_run()
    run(settings(folder, class_folders, out=str(tmp_path / "probe.json")))
    result = json.loads((tmp_path / "probe.json").read_text())
    assert list(result["scores"]) == ["encoder", "random weights", "colour histogram"]
    assert result["scores"]["colour histogram"]["linear"] == 1.0  # the two classes are two colours
    assert (result["train"]["images"], result["test"]["images"], result["chance"]) == (18, 6, 0.5)
    for got in result["scores"].values():
        assert 0 <= got["knn"] <= 1 and got["rankme"] >= 1
        assert got["knn_se"] == pytest.approx((got["knn"] * (1 - got["knn"]) / 6) ** 0.5)
    gain = result["gains"]["colour histogram"]["knn"]["gain"]
    assert gain == pytest.approx(result["scores"]["encoder"]["knn"] - result["scores"]["colour histogram"]["knn"])
    printed = capsys.readouterr().out
    assert "colour histogram" in printed and "likely other slides" in printed and "shorter side to 32 px" in printed


def test_train_and_test_can_be_given_and_an_exported_folder_scores_like_its_run(make_tile_run, class_folders, tmp_path):
    from pretrain.encoders.export.timm import export_timm

    folder, _ = make_tile_run()
    export_timm(folder, tmp_path / "encoder", "mit")
    shutil.copytree(class_folders, tmp_path / "test")
    results = []
    for checkpoint in (folder, tmp_path / "encoder"):
        out = tmp_path / f"{checkpoint.name}.json"
        run(settings(checkpoint, class_folders, test=str(tmp_path / "test"), out=str(out)))
        results.append(json.loads(out.read_text()))
    ours, theirs = (result["scores"]["encoder"] for result in results)
    assert results[0]["split"] == "train and test given" and results[0]["test"]["images"] == 24
    assert (ours["knn"], ours["linear"]) == (theirs["knn"], theirs["linear"])
    assert ours["rankme"] == pytest.approx(theirs["rankme"], rel=1e-3)


def test_a_slide_run_is_refused_before_an_image_is_looked_at(tmp_path):
    (tmp_path / "slide").mkdir()
    found = RunCheckpoint(tmp_path / "slide", tmp_path / "slide", {"data": {"embeddings": "store"}}, [])
    with (
        patch("pretrain.encoders.loading.find_checkpoint", lambda *_: found),
        pytest.raises(Fault, match="is a run of 'pretrain slide': 'pretrain probe stage=slide' judges it"),
    ):
        run(settings(tmp_path / "slide", tmp_path / "nowhere"))


def test_a_second_run_shows_the_same_table_without_computing(
    make_tile_run, class_folders, tmp_path, capsys, monkeypatch
):
    folder, _ = make_tile_run()
    config = settings(folder, class_folders, out=str(tmp_path / "probe.json"))
    run(config)
    first = capsys.readouterr().out
    monkeypatch.setattr("pretrain.probing.features.extract", lambda *_: pytest.fail("computed again"))
    run(config)
    again = capsys.readouterr()
    assert again.out == first and "nothing to do" in again.err


def test_a_changed_question_is_computed_anew(make_tile_run, class_folders, tmp_path):
    folder, _ = make_tile_run()
    config = settings(folder, class_folders, out=str(tmp_path / "probe.json"))
    run(config)
    before = json.loads((tmp_path / "probe.json").read_text())
    run(dataclasses.replace(config, seed=1))
    assert json.loads((tmp_path / "probe.json").read_text())["question"] != before["question"]


def test_a_file_that_is_something_else_is_not_overwritten(make_tile_run, class_folders, tmp_path):
    folder, _ = make_tile_run()
    (tmp_path / "notes.json").write_text('{"mine": 1}')
    with pytest.raises(Fault, match=r"notes\.json exists and holds no scores"):
        run(settings(folder, class_folders, out=str(tmp_path / "notes.json")))
    assert (tmp_path / "notes.json").read_text() == '{"mine": 1}'


def test_unreadable_images_are_counted_in_the_table_and_named_in_the_json(
    make_tile_run, class_folders, tmp_path, capsys
):
    folder, _ = make_tile_run()
    (class_folders / "tumour" / "99.png").write_bytes(b"broken")
    run(settings(folder, class_folders, out=str(tmp_path / "probe.json")))
    result = json.loads((tmp_path / "probe.json").read_text())
    named = result["train"]["unreadable"] + result["test"]["unreadable"]
    assert len(named) == 1 and "99.png" in named[0]
    assert "1 images could not be read" in capsys.readouterr().out


def test_the_table_marks_a_linear_fit_that_did_not_converge(make_tile_run, class_folders, tmp_path):
    folder, _ = make_tile_run()
    run(settings(folder, class_folders, out=str(tmp_path / "probe.json")))
    result = json.loads((tmp_path / "probe.json").read_text())
    assert "stopped at 1000" not in probe.score_table(result)
    result["scores"]["encoder"]["linear_converged"] = False
    assert "stopped at 1000" in probe.score_table(result)
