"""The page: alone, complete, and honest about what is missing."""

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from data.fault import Fault
from data.keyed import rng
from data.lease import LEASE, alone
from pretrain.commands import embed, probe
from pretrain.commands.report import Config, run
from pretrain.pages import drawing, page
from pretrain.report import figures, maps, parts, training
from pretrain.settings.composition import load


def descend(steps: int) -> list[dict[str, float]]:
    """The record of a real, small training: least squares by gradient descent on noisy batches."""
    generator = rng(0, "descent")
    truth, weights = generator.normal(size=8), np.zeros(8)
    records = []
    for step in range(1, steps + 1):
        inputs = generator.normal(size=(32, 8))
        errors = inputs @ (weights - truth) + 0.1 * generator.normal(size=32)
        gradient = inputs.T @ errors / 32
        weights -= 0.03 * gradient
        held_out = 1 - np.sum((weights - truth) ** 2) / np.sum(truth**2)
        records.append(
            {
                "step": step,
                "loss": float(np.mean(errors**2)),
                "grad_norm": float(np.linalg.norm(gradient)),
                "lr": 0.03,
                "r2": held_out,
            }
        )
    return records


@pytest.fixture
def road(tmp_path, shards, make_tile_run, class_folders) -> Path:
    """A folder with the whole road: every number on its page was computed."""
    folder, _ = make_tile_run()
    records = descend(200)
    rows = [
        {
            "step": r["step"],
            "loss": r["loss"],
            "grad_norm": r["grad_norm"],
            "lr": r["lr"],
            "dino_global": r["loss"],
            "dino_local": 2 * r["loss"],
        }
        for r in records
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    start = {
        "time": "2026-01-01T00:00:00+0000",
        "command": ["pretrain", "tile"],
        "packages": {"torch": "2.14"},
        "git": "0123abc",
    }
    (folder / "provenance.json").write_text(json.dumps({"starts": [start]}))
    (folder / "samples").mkdir()
    Image.fromarray(rng(0, "sheet").integers(0, 256, size=(40, 90, 3), dtype=np.uint8)).save(
        folder / "samples" / "step-00000000.png"
    )
    words = [f"checkpoint={folder}", f"shards={shards}", f"out={tmp_path / 'embeddings'}", "device=cpu"]
    embed.run(load("embed", words).object())
    probe.run(
        probe.Config(
            str(folder),
            str(class_folders),
            None,
            str(tmp_path / "probe.json"),
            None,
            0.25,
            0,
            8,
            1,
            "cpu",
            "float32",
            [],
        )
    )
    slide = tmp_path / "slide"
    slide.mkdir()
    (slide / "config.yaml").write_text(
        yaml.safe_dump(
            {
                "data": {"embeddings": str(tmp_path / "embeddings")},
                "model": {"_target_": "models.longnet.LongNet"},
                "objective": {"_target_": "pretrain.objectives.slide_mae.SlideMAE", "weighting": "slide"},
            }
        )
    )
    rows = [
        {"step": r["step"], "loss": r["loss"]}
        | (
            {"r2": r["r2"], "r2_neighbours": 0.5, "shuffled_rise": 0.1, "effective_rank": 3.0}
            if r["step"] % 50 == 0
            else {}
        )
        for r in records
    ]
    (slide / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


class Reader(HTMLParser):
    """Collects what a page refers to, its headings, and whether its elements close."""

    VOID = ("meta", "img", "br", "hr", "link")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.ids: list[str] = []
        self.headings: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "srcset", "action"):
                self.references.append(value)
            if name == "id":
                self.ids.append(value)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def written(road: Path, folder: Path | None = None, **given: str) -> str:
    out = road / "page.html"
    run(dataclasses.replace(Config(str(folder or road), str(out), None, None, None, []), **given))
    return out.read_text()


def test_the_page_of_a_whole_road_has_every_section_and_nothing_missing(road):
    reader = Reader(written(road))
    assert reader.headings == [
        "Slides and tiles",
        "What the network saw",
        "Training the tile encoder",
        "What the encoder sees in a slide",
        "Probe scores",
        "Training the slide encoder",
        "How it was made",
    ]
    assert not reader.open


def test_the_page_refers_to_nothing_outside_itself(road):
    text = written(road)
    reader = Reader(text)
    outside = [ref for ref in reader.references if not ref.startswith(("#", "data:image/"))]
    assert outside == [] and "@import" not in text
    assert all(address.startswith(("#", "data:")) for address in re.findall(r"url\(([^)]*)\)", text))
    assert {ref[1:] for ref in reader.references if ref.startswith("#")} <= set(reader.ids)
    assert len(set(reader.ids)) == len(reader.ids)


def test_the_page_shows_the_numbers_on_record(road):
    text = written(road)
    scores = json.loads((road / "probe.json").read_text())["scores"]
    for got in scores.values():
        assert f"{got['knn']:.3f} ± {got['knn_se']:.3f}" in text
    r2 = json.loads((road / "slide" / "metrics.jsonl").read_text().splitlines()[-1])["r2"]
    assert f"{r2:.3f}" in text and "beats the mean of the nearest visible tiles" in text
    assert "24 tiles of 2 slides" in text and "0123abc" in text and "feed_forward_width: 48" in text


def test_alarms_and_what_the_looks_saw_are_on_the_page(road):
    with (road / "tile" / "metrics.jsonl").open("a") as record:
        for step in (100, 200):
            record.write(
                json.dumps({"step": step, "rankme": 9.0, "teacher_entropy/dino": 4.0, "look_seconds": 0.1}) + "\n"
            )
        line = {"step": 200, "alarm": "low rank", "since": 150, "says": "few directions <since> step 150."}
        record.write(json.dumps(line) + "\n")
    text = written(road)
    assert "alarm at step 200" in text and "low rank: few directions &lt;since&gt; step 150." in text
    assert "RankMe" in text and "Teacher entropy" in text and "Look seconds" not in text and "Since" not in text
    assert "alarm at step" not in written(road, road / "slide")


def test_a_narrow_page_has_half_the_columns_of_charts_and_captions_outside_of_what_scrolls():
    line = (np.arange(3), np.arange(3.0))
    charts = figures.curves([figures.Panel(title, {"a": line}) for title in ("A", "B", "C")], columns=2)
    assert charts.count("<svg") == 3 and "--columns:2;--narrow:1" in charts
    narrow = page.STYLE.partition("@media screen and (max-width: 44rem)")[2].partition("@media")[0]
    assert "repeat(var(--narrow)" in narrow and ".charts svg { min-width: 0; }" in narrow
    assert page.html_table(["a"], [["b"]], "words").endswith("</table></div><figcaption>words</figcaption></figure>")


@pytest.mark.parametrize(
    ("change", "heading", "said"),
    [
        (None, "How it ended", "nobody holds its folder: it was told to stop, or"),
        ({}, "How far it is", "This run goes on now: its folder is held by process"),
        ({"began": "0"}, "How it ended", "it was killed."),
        ({"host": "elsewhere"}, "How far it is", "it still runs there, or was killed."),
    ],
)
def test_a_run_without_an_end_says_whether_it_goes_on_or_was_killed(road, change, heading, said):
    tile = road / "tile"
    config = yaml.safe_load((tile / "config.yaml").read_text())
    config["optim"] = {"steps": 300}
    (tile / "config.yaml").write_text(yaml.safe_dump(config))
    words = ["pretrain", "tile", "run=a b"]
    (tile / "provenance.json").write_text(json.dumps({"starts": [{"command": words}]}))
    if change is not None:
        with alone(tile):
            holder = json.loads((tile / LEASE).read_text())
        (tile / LEASE).write_text(json.dumps(holder | change))
    text = written(road, tile)
    assert heading in Reader(text).headings and said in text and "200 of 300" in text and "newest checkpoint" in text
    assert ("pretrain tile &#x27;run=a b&#x27;" in text.partition("</section>")[0]) == (change != {})


FILLS_IN = "A LongNet slide encoder learned to fill in hidden tile embeddings from the visible ones."


@pytest.mark.parametrize(
    ("stage", "objective", "said", "unsaid"),
    [
        ("slide", "pretrain.objectives.slide_mae.SlideMAE", [FILLS_IN, "Most of a slide’s tile embeddings"], []),
        ("slide", None, ["A LongNet slide encoder learned from tile embeddings"], [FILLS_IN, "are hidden"]),
        ("slide", "mine.Own", ["A LongNet slide encoder learned from tile embeddings"], [FILLS_IN]),
        (
            "tile",
            "pretrain.objectives.dinov2.DINOv2",
            ["logarithm of the number of prototypes", "for KoLeo rising"],
            [],
        ),
        ("tile", "pretrain.objectives.dino.DINO", ["logarithm of the number of prototypes"], ["KoLeo"]),
        ("tile", "pretrain.objectives.mae.MAE", ["as a guess of its pixels"], ["prototypes", "KoLeo"]),
        ("tile", "mine.Own", ["learned from tiles without labels."], ["prototypes", "as a guess"]),
    ],
)
def test_what_is_said_of_an_objective_is_what_its_class_says(road, stage, objective, said, unsaid):
    file = road / stage / "config.yaml"
    config = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump(config | {"objective": {"_target_": objective} if objective else {}}))
    text = written(road, road / stage)
    assert all(words in text for words in said) and not any(words in text for words in unsaid)


def test_a_slide_run_lacks_the_r2_of_an_objective_that_is_judged_by_it_alone(road):
    record = road / "slide" / "metrics.jsonl"
    record.write_text("".join(line for line in record.read_text().splitlines(True) if "r2" not in line))
    file = road / "slide" / "config.yaml"
    assert "R² beside its baselines, which training writes" in written(road)
    file.write_text(file.read_text().replace("pretrain.objectives.slide_mae.SlideMAE", "mine.Own"))
    assert "R² beside its baselines, which training writes" not in written(road)


def test_charts_take_their_colours_from_the_page(road):
    text = written(road)
    assert "var(--violet)" in text and not any(placeholder in text for placeholder in drawing.STYLE_VARIABLES)


def test_a_bare_run_says_which_command_makes_what_is_missing(make_tile_run, tmp_path):
    folder, _ = make_tile_run()
    text = written(tmp_path, folder)
    assert "Not here yet" in text and "pretrain probe checkpoint=" in text and "pretrain embed checkpoint=" in text
    assert "Loss curves (metrics.jsonl holds no loss yet)" in text


def test_parts_can_be_given_to_the_page_of_a_single_run(road):
    text = written(road, road / "tile", embeddings=str(road / "embeddings"), probe=str(road / "probe.json"))
    assert "What the encoder sees in a slide" in text and "Probe scores" in text and "Not here yet" not in text


def test_a_slide_run_finds_its_embeddings(road):
    assert "What the encoder sees in a slide" in written(road, road / "slide")


def test_a_folder_with_nothing_and_a_part_that_is_not_there_are_refused(tmp_path):
    with pytest.raises(Fault, match="nothing to report"):
        written(tmp_path)
    with pytest.raises(Fault, match=r"there is no .*gone\.json"):
        written(tmp_path, probe=str(tmp_path / "gone.json"))
    assert not (tmp_path / "page.html").exists()


def test_what_flatters_a_probe_is_on_the_page_as_the_command_says_it(road):
    scores = json.loads((road / "probe.json").read_text())
    scores["split"], scores["histogram_same_slides"] = "likely other slides: 0.2 held out", 0.95
    scores["scores"]["colour histogram"]["knn"], scores["test"]["images"] = 0.4, 500
    (road / "probe.json").write_text(json.dumps(scores))
    text = written(road)
    assert "Beware: with tiles of the same slides on both sides the colour histogram reaches 0.950" in text
    assert "Likely other slides: a guess; give test=, or groups= with their slides, to be sure." in text
    scores["split"], scores["histogram_same_slides"] = "other slides: 0.2 held out", 0.45
    (road / "probe.json").write_text(json.dumps(scores))
    assert "eware: with tiles" not in (text := written(road)) and "a guess" not in text


def test_the_panels_of_slides_say_whether_their_alarm_was_raised(road):
    with (road / "tile" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 200, "slide_knn": 0.8, "slide_chance": 0.1}\n')
    assert "is a slide learned by heart." in written(road)
    with (road / "tile" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1200, "alarm": "slides recognised", "since": 900, "says": "…"}\n')
    assert "learned by heart: the alarm “slides recognised” at step 1,200 was raised of it." in written(road)


def test_text_from_files_cannot_inject_markup(road):
    config = yaml.safe_load((road / "tile" / "config.yaml").read_text())
    config["note"] = "<script>alert(1)</script>"
    (road / "tile" / "config.yaml").write_text(yaml.safe_dump(config))
    text = written(road)
    assert "<script" not in text and "&lt;script&gt;" in text


def test_of_a_step_recorded_twice_the_later_one_counts():
    series = parts.series(
        [{"step": 2, "loss": 5.0}, {"step": 1, "loss": 4.0}, {"step": 2, "loss": 3.0, "note": "text"}]
    )
    assert list(series) == ["loss"]
    assert series["loss"][0].tolist() == [1, 2] and series["loss"][1].tolist() == [4.0, 3.0]


def test_a_verdict_needs_two_standard_errors():
    def verdict(gain: float, groups: int | None = None) -> str:
        kinds = {kind: {"gain": gain, "se": 0.02} for kind in ("knn", "linear")}
        return training.probe_verdict({"gains": {"random weights": kinds}, "test": {"groups": groups}})

    assert "above in k-NN (+0.050" in verdict(0.05)
    assert "not clearly different in k-NN" in verdict(0.05, groups=3)
    assert "below in k-NN (−0.050" in verdict(-0.05)
    assert "not clearly different in k-NN" in verdict(0.03)


def test_thinned_curves_keep_their_spikes_and_ends():
    values = np.zeros(10_000)
    values[4321], values[8765] = 9.0, -7.0
    steps, kept = figures.thin(np.arange(10_000), values)
    assert len(steps) <= figures.MOST_POINTS + 2 and kept.max() == 9.0 and kept.min() == -7.0
    assert (steps[0], steps[-1]) == (0, 9999) and (np.diff(steps) > 0).all()


def test_the_running_mean_is_centred_and_skips_what_is_not_finite():
    np.testing.assert_allclose(
        figures.running_mean(np.array([1.0, 2.0, np.nan, 4.0, 9.0]), 1), [1.5, 1.5, 3.0, 6.5, 6.5]
    )


def test_principal_components_colour_like_with_like_on_every_slide():
    generator = rng(0, "pca")
    centres = 5 * generator.normal(size=(4, 16))
    slides = [centres[generator.integers(0, 4, 60)] + 0.01 * generator.normal(size=(60, 16)) for _ in range(2)]
    colouring = maps.fit_colouring(slides)
    assert colouring.explained > 0.99
    for slide in slides:
        groups = np.abs(slide[:, None] - centres).sum(axis=2).argmin(axis=1)
        colours = colouring.colours(slide).astype(int)
        for group in np.unique(groups):
            assert np.ptp(colours[groups == group], axis=0).max() <= 3
    distinct = [tuple(colouring.colours(centre[None])[0] // 8) for centre in centres]
    assert len(set(distinct)) == 4


def test_principal_components_agree_with_a_singular_value_decomposition():
    rows = rng(0, "svd").normal(size=(50, 6)) * [5, 4, 3, 1, 1, 1]
    colouring = maps.fit_colouring([rows])
    _, singular, vectors = np.linalg.svd(rows.astype(np.float32) - rows.astype(np.float32).mean(0), full_matrices=False)
    np.testing.assert_allclose(np.abs(vectors[:3] @ colouring.components), np.eye(3), atol=1e-4)
    assert colouring.explained == pytest.approx((singular[:3] ** 2).sum() / (singular**2).sum(), rel=1e-4)


def test_tiles_are_painted_where_they_lie():
    tiles = maps.Tiles(Image.new("RGB", (30, 20), "white"), 10.0, np.array([[0, 0], [200, 100]]), 100.0)
    painted = np.asarray(maps.colour_map(tiles, np.array([[255, 0, 0], [0, 0, 255]], dtype=np.uint8)))
    assert painted[5, 5].tolist() == [255, 0, 0] and painted[15, 25].tolist() == [0, 0, 255]
    assert painted[5, 25].tolist() == [255, 255, 255] and painted[15, 5].tolist() == [255, 255, 255]
    assert (painted[:10, :10] == [255, 0, 0]).all()


def test_apostrophes_are_set_as_a_printer_sets_them():
    assert page.prose('the slide\'s "tiles" & more') == "the slide’s &quot;tiles&quot; &amp; more"


def test_scores_of_another_run_or_of_an_earlier_checkpoint_are_said_to_be(tmp_path: Path) -> None:
    run = parts.ReportedRun(tmp_path / "mine", {}, {}, {}, [], [])
    (run.folder / "checkpoints" / "step-00000060").mkdir(parents=True)
    (run.folder / "checkpoints" / "step-00000060" / "state.json").touch()
    told = {}
    for name in ("mine/checkpoints/step-00000060", "mine/checkpoints/step-00000010", "other/checkpoints/step-00000060"):
        told[name] = training.of_what_else({"encoder": {"name": name, "source": str(tmp_path / name)}}, run)
    assert list(told.values()) == [
        "",
        "These scores are of step-00000010, and this run has come to step-00000060 since.",
        "These scores are of other/checkpoints/step-00000060, and not of this run.",
    ]
    assert training.of_what_else({"encoder": {"name": "vit", "source": "hf-hub:a/b"}}, run) == ""
