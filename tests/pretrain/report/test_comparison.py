"""Runs side by side: what differs between them, in what order, and what is on record of each."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from data.fault import Fault
from data.keyed import rng
from pretrain.commands.report import run
from pretrain.report.comparison import differing_settings, runs_in, runs_named
from pretrain.settings.composition import load


def written(folder: Path, lr: float, knn: list[float], steps: int = 200, data: str = "shards") -> Path:
    """A run's folder with a record."""
    folder.mkdir(parents=True)
    config = {
        "run": str(folder),
        "seed": 0,
        "optim": {"lr": lr, "steps": 200},
        "data": {data: ["a"], "crops": {"n": 2}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    noise = rng(0, "noise", folder.name).normal(size=steps)
    lines = [{"step": step + 1, "loss": 5 - step * lr + float(noise[step]), "lr": lr} for step in range(steps)]
    lines += [{"step": steps * (i + 1) // len(knn), "probe_knn": value} for i, value in enumerate(knn)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def started(folder: Path, *words: str, **facts: str) -> None:
    """Say by which words a run was started, and how that ended."""
    start = {"command": ["pretrain", "tile", f"run={folder}", *words], **facts}
    (folder / "provenance.json").write_text(json.dumps({"starts": [start]}))


def of_objective(folder: Path, name: str, **settings: object) -> None:
    """Give a run another objective."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["objective"] = {"_target_": f"of.{name}", **settings}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def page_of(*words: str) -> str:
    config = load("report", list(words)).object()
    run(config)
    return Path(config.out or Path(config.run) / ("compared.html" if config.beside else "report.html")).read_text()


def rows_of(text: str) -> list[list[str]]:
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr.*?</tr>", text)]


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    for i, lr in enumerate((0.001, 0.002, 0.004, 0.008, 0.016, 0.032)):
        written(tmp_path / "sweep" / f"optim.lr={lr}", lr, [0.4, 0.5 + 0.02 * i, 0.45], steps=200 if i else 100)
    return tmp_path / "sweep"


def test_a_folder_of_runs_is_one_page_with_what_differs_and_the_best_run_first(sweep: Path) -> None:
    text = page_of(f"run={sweep}")
    head, *rows = rows_of(text)
    assert head == ["Run", "state", "steps", "best k-NN accuracy on labelled tiles", "loss", "optim.lr"]
    assert [row[0] for row in rows] == [
        f"{i}. optim.lr={lr}" for i, lr in enumerate((0.032, 0.016, 0.008, 0.004, 0.002, 0.001), 1)
    ]
    assert [row[3] for row in rows] == ["0.6", "0.58", "0.56", "0.54", "0.52", "0.5"]
    assert (
        rows[0][1] == "done"
        and rows[-1][1] == "at 50%"
        and "http" not in re.sub(r"www\.w3\.org\S*|http://www", "", text)
    )
    charts = re.findall(r"<svg.*?</svg>", text, flags=re.S)
    titles = ("Loss", "k-NN accuracy on labelled tiles", "Learning rate")
    assert len(charts) == len(titles) and all(title in chart for title, chart in zip(titles, charts, strict=True))
    last_tenth = float(rows[0][4])
    values = [
        json.loads(line)["loss"] for line in (sweep / "optim.lr=0.032" / "metrics.jsonl").read_text().splitlines()[:200]
    ]
    assert last_tenth == pytest.approx(np.mean(values[-20:]), rel=1e-3)


def test_runs_are_named_by_as_little_as_tells_them_apart(tmp_path: Path) -> None:
    one, other = (
        written(tmp_path / name / "tile", lr, [0.5, knn]) for name, lr, knn in (("a", 1e-3, 0.6), ("b", 2e-3, 0.7))
    )
    text = page_of(f"run={one}", f"beside=[{other}]")
    assert [row[0] for row in rows_of(text)[1:]] == ["1. b/tile", "2. a/tile"] and (one / "compared.html").exists()


def test_losses_of_different_objectives_rank_nothing(tmp_path: Path) -> None:
    for name, knn in (("dino", []), ("mae", [])):
        of_objective(written(tmp_path / name, 1e-3, knn), name)
    text = page_of(f"run={tmp_path}")
    assert "as they were given: losses of different objectives or data can" in text and 'class="ours"' not in text
    assert [row[0] for row in rows_of(text)[1:]] == ["1. dino", "2. mae"]
    assert "Learning rate" in text and ">Loss<" not in text and "gradients are left out: losses of different" in text
    for name, score in (("dino", 0.5), ("mae", 0.75)):
        encoder = {"knn": score, "knn_se": 0.1, "linear": score, "linear_se": 0.1}
        (tmp_path / name / "probe.json").write_text(json.dumps({"question": {}, "scores": {"encoder": encoder}}))
    text = page_of(f"run={tmp_path}")
    assert "ordered by their k-NN, probed, the best first" in text and text.count('class="ours"') == 1
    assert [row[0] for row in rows_of(text)[1:3]] == ["1. mae", "2. dino"] and ">Loss<" not in text


def test_neither_losses_on_other_data_nor_probes_of_other_images_rank_runs_and_unequal_steps_are_said(
    tmp_path: Path,
) -> None:
    for name in ("one", "other"):
        written(tmp_path / name, 1e-3, [], steps=100 if name == "one" else 200)
    assert "by their loss, the best first, though not all are equally far." in page_of(f"run={tmp_path}")
    config = yaml.safe_load((tmp_path / "one" / "config.yaml").read_text())
    config["data"]["shards"] = ["elsewhere"]
    (tmp_path / "one" / "config.yaml").write_text(yaml.safe_dump(config))
    assert "as they were given: losses of different objectives or data" in page_of(f"run={tmp_path}")
    for name, images in (("one", 24), ("other", 36)):
        encoder = {"knn": 0.5, "knn_se": 0.1, "linear": 0.5, "linear_se": 0.1}
        probe = {"question": "x", "test": {"images": images}, "scores": {"encoder": encoder}}
        (tmp_path / name / "probe.json").write_text(json.dumps(probe))
    text = page_of(f"run={tmp_path}")
    assert "as they were given" in text and "their probes asked different questions" in text


def test_a_swept_recipe_is_one_column_and_what_it_sets_is_folded(tmp_path: Path) -> None:
    for name in ("dino", "mae"):
        of_objective(written(tmp_path / name, 1e-3, []), name, **{f"{name}{i}": i for i in range(20)})
        started(tmp_path / name, f"recipe={name}", "seed=0")
    text = page_of(f"run={tmp_path}")
    table, folded = text.split("<details>")
    assert rows_of(table)[0] == ["Run", "state", "steps", "loss", "recipe"]
    assert [row[-1] for row in rows_of(table)[1:]] == ["dino", "mae"]
    assert folded.startswith("<summary>41 more settings differ</summary>")
    assert ["objective.mae3", "–", "3"] in rows_of(folded)


def test_a_sweeps_own_keys_are_columns_in_the_order_of_its_words(tmp_path: Path) -> None:
    for i, lr in enumerate((1e-3, 2e-3)):
        folder = written(tmp_path / str(i), lr, [])
        of_objective(folder, "dino", spread=i)
        started(folder, f"objective.spread={i}", f"optim.lr={lr}", "data.shards=[a]")
    assert rows_of(page_of(f"run={tmp_path}"))[0][-2:] == ["objective.spread", "optim.lr"]


def test_without_a_command_on_record_six_settings_are_columns(tmp_path: Path) -> None:
    for name in ("a", "b"):
        of_objective(written(tmp_path / name, 1e-3, []), "dino", **{f"s{i}": name for i in range(9)})
    text = page_of(f"run={tmp_path}")
    assert len(rows_of(text)[0]) == 4 + 6 and "3 more settings differ" in text


def test_a_sweep_is_set_beside_others_and_names_with_commas_are_put_together(sweep: Path, tmp_path: Path) -> None:
    one, other = (written(tmp_path / f"other/lr={lr},seed=0", lr, [0.5, knn]) for lr, knn in ((1, 0.6), (2, 0.7)))
    text = page_of(f"run={sweep}", f"beside=[{one}, {other}]")
    assert len(rows_of(text)) == 1 + 6 + 2 and rows_of(text)[1][0] == "1. lr=2,seed=0"
    assert f"&#x27;beside=[{one},{other}]&#x27;</code>" in text
    assert len(runs_named([str(sweep), *str(one).split(",")])) == 7
    with pytest.raises(Fault, match="nowhere is not a run's folder"):
        runs_named([str(one), "nowhere", "seed=0"])


def test_a_run_that_failed_says_so_and_comes_last(tmp_path: Path) -> None:
    for name, knn in (("a", 0.9), ("b", 0.5)):
        written(tmp_path / name, 1e-3 if name == "a" else 2e-3, [0.5, knn])
    started(tmp_path / "a", ended_by="Loss isn't finite (loss, ibot), more than optim.max_skipped=0.5; go on. Or not.")
    text = page_of(f"run={tmp_path}")
    assert [(row[0], row[1]) for row in rows_of(text)[1:3]] == [("1. b", "done"), ("2. a", "failed at 100%")]
    assert "a failed: Loss isn&#x27;t finite (loss, ibot), more than optim.max_skipped=0.5. <code>" in text
    assert f"pretrain report run={tmp_path / 'a'}</code>" in text and "those that failed stand last" in text


def test_a_failed_run_takes_no_figure_from_the_judgement_of_the_others(tmp_path: Path) -> None:
    for name, knn in (("a", [0.9]), ("b", [0.5]), ("c", [])):
        written(tmp_path / name, 2e-3 if name == "b" else 1e-3, knn, steps=200 if knn else 50)
    started(tmp_path / "c", ended_by="The disk is full.")
    text = page_of(f"run={tmp_path}")
    assert [row[0] for row in rows_of(text)[1:4]] == ["1. a", "2. b", "3. c"] and "by their k-NN accuracy" in text


def test_settings_that_one_run_lacks_differ(tmp_path: Path) -> None:
    assert differing_settings([{"a": {"b": 1, "c": [1]}, "run": "x"}, {"a": {"c": [1]}, "run": "y"}]) == {
        "a.b": ["1", "–"]
    }


def test_a_road_and_a_single_run_are_no_sweep(tmp_path: Path) -> None:
    for name in ("tile", "slide"):
        written(tmp_path / "road" / name, 1e-3, [0.5])
    assert runs_in(tmp_path / "road") == runs_in(tmp_path / "road" / "tile") == runs_in(tmp_path / "nowhere") == []


def test_runs_of_two_stages_and_the_same_run_twice_are_refused(tmp_path: Path) -> None:
    one, other = written(tmp_path / "a", 1e-3, [0.5]), written(tmp_path / "b", 1e-3, [0.5], data="embeddings")
    with pytest.raises(Fault, match="have no figures in common: compare them apart"):
        page_of(f"run={one}", f"beside=[{other}]")
    with pytest.raises(Fault, match="the same run is given twice"):
        page_of(f"run={one}", f"beside=[{one}]")
