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
from pretrain.report.comparison import differing_settings, runs_in
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
        config = yaml.safe_load((written(tmp_path / name, 1e-3, knn) / "config.yaml").read_text())
        config["objective"] = {"_target_": f"of.{name}"}
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump(config))
    text = page_of(f"run={tmp_path}")
    assert "as they were given: losses of different objectives can" in text and 'class="ours"' not in text
    assert [row[0] for row in rows_of(text)[1:]] == ["1. dino", "2. mae"]
    assert "Learning rate" in text and ">Loss<" not in text


def test_a_run_that_failed_says_so_and_comes_last(tmp_path: Path) -> None:
    for name, knn in (("a", 0.9), ("b", 0.5)):
        written(tmp_path / name, 1e-3 if name == "a" else 2e-3, [0.5, knn])
    (tmp_path / "a" / "provenance.json").write_text(json.dumps({"starts": [{"ended_by": "Fault: the disk is full"}]}))
    assert [(row[0], row[1]) for row in rows_of(page_of(f"run={tmp_path}"))[1:]] == [
        ("1. b", "done"),
        ("2. a", "failed done: Fault"),
    ]


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
