"""Every source of tiles trains: shards, slides online, mixtures, one slide a lane; and says what is wrong with its
settings."""

import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.fault import Fault
from data.masks import Masking
from data.slides import survey as slide_survey
from data.tiles.augment_parameters import Colour
from data.tiles.loader import TileBatches
from launch.entry import run_command_line
from pretrain.commands import tile as tile_command
from pretrain.run import preemption, signals
from pretrain.run.metrics import read_metrics
from pretrain.settings import plugins
from pretrain.settings.composition import load
from pretrain.training.tile_sources import _member
from pretrain.training.tile_stage import TileTraining
from tests.data.flaky_server import serving
from tests.data.parquet.tables import write_table
from tests.data.shards.tile_folders import write_tiles
from tests.data.tiles.test_chosen_tiles import write_sample
from tests.data.tiles.test_slide_tiles import write_slides
from tests.pretrain.training.test_tile_training import STEPS, TINY, metrics, weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``slides``, and ``a`` and ``b`` of shards."""
    folder = tmp_path_factory.mktemp("sources")
    write_slides(folder / "slides")
    write_tiles(folder / "a", [40, 37])
    write_tiles(folder / "b", [30])
    return folder


def stage(folder: Path, *settings: str) -> TileTraining:
    config = load("tile", [f"run={folder / 'none'}", *TINY, *settings]).object()
    return TileTraining(
        Path(config.run), config, lambda: plugins.build(config.objective, lambda: plugins.build_empty(config.model))
    )


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in metrics(run)]


def test_slides_online_train_and_resume_also_where_they_were_moved_and_their_tissue_is_looked_for_once(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pale tiles are counted by slide, in the resumed run as in the whole one."""
    words = [
        "tile",
        *TINY,
        "data=online",
        f"data.slides={folder / 'slides'}",
        f"data.grids={tmp_path / 'grids'}",
        "data.mpp=[0.5,1.0]",
        "data.tile_size=32",
        "data.workers=1",
        "data.min_saturated=0.9",
    ]
    run_command_line([*words, f"run={tmp_path / 'whole'}"])
    table = (tmp_path / "whole/pale_tiles.csv").read_text()
    slides, taken, passed_over = zip(*(line.split(",") for line in table.splitlines()[1:]), strict=True)
    assert {Path(slide).name for slide in slides} == {"slide0.tiff", "slide1.tiff"}
    passed = sum(line["pale_tiles"] for line in metrics(tmp_path / "whole"))
    assert sum(map(int, taken)) == 16 * STEPS and sum(map(int, passed_over)) == passed > 5
    said = f"{passed} pale tiles were passed over for the {16 * STEPS} that were taken, most of {slides[0]}"
    assert said in capsys.readouterr().err
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "grids").rglob("*.*")}
    assert {path.parent.name for path in made} >= {"0.5um-32px", "1um-32px"}
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-00000006")
    run_command_line([*words, f"run={tmp_path / 'again'}"])  # goes on after step 4
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "again")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert (tmp_path / "again/pale_tiles.csv").read_text() == table
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "grids").rglob("*.*")} == made
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-00000006")
    shutil.copytree(folder / "slides", tmp_path / "moved")
    run_command_line(
        [
            *words,
            f"data.slides={tmp_path / 'moved'}",
            f"data.grids={tmp_path / 'moved_grids'}",
            f"run={tmp_path / 'again'}",
        ]
    )
    assert all(torch.equal(one[name], value) for name, value in weights(tmp_path / "again").items())


def test_parquet_files_train_resume_and_are_looked_through_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        write_table(tmp_path / "files" / f"{name}.parquet", range(40), slide=[f"{name}{n // 5}" for n in range(40)])
    (tmp_path / "files" / "c.parquet").write_bytes(b"PAR1")
    words = ["tile", *TINY, "data=parquet", f"data.files={tmp_path / 'files'}", "data.hold_out=0.2"]
    run_command_line([*words, f"run={tmp_path / 'whole'}"])
    (index,) = (tmp_path / "files").glob("*.npz")
    made = index.stat().st_mtime_ns
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-00000006")
    run_command_line([*words, f"run={tmp_path / 'again'}"])  # goes on after step 4
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "again")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert capsys.readouterr().err.count("c.parquet can't be read") == 2 and index.stat().st_mtime_ns == made

    both = "{rows:{files:FILES,weight:1},tars:{shards:SHARDS,weight:3}}".replace("FILES", str(tmp_path / "files"))
    both = both.replace("SHARDS", str(write_tiles(tmp_path / "shards", [40])))
    mixed = stage(tmp_path, "data=mixture", f"data.members={both}")
    assert len(mixed.tiles) == 120 and {part.weight for part in mixed.tiles.parts} == {1.0, 3.0}


def test_tiles_held_out_tell_a_loss_at_checkpoints_and_change_nothing(tmp_path: Path) -> None:
    slides = [f"s{number // 5}" for number in range(80)]
    write_table(tmp_path / "a.parquet", range(80), slide=slides)
    words = ["tile", *TINY, "data=parquet", f"data.files={tmp_path / 'a.parquet'}", "data.hold_out=0.3"]
    run_command_line([*words, f"run={tmp_path / 'whole'}"])
    every = [line for line in read_metrics(tmp_path / "whole") if "validation_loss" in line]
    assert [line["step"] for line in every] == [0, 2, 4, 6] and len({line["validation_loss"] for line in every}) == 4

    class NoneHeldOut(TileTraining):
        def loss_held_out(self) -> dict[str, float]:
            return {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pretrain.training.tile_stage.TileTraining", NoneHeldOut)
        run_command_line([*words, f"run={tmp_path / 'unjudged'}"])
    ours, theirs = (
        [line["loss"] for line in metrics(tmp_path / name) if "loss" in line] for name in ("whole", "unjudged")
    )
    assert ours == theirs and len(ours) == 6
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "unjudged")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_chosen_subset_trains_resumes_also_from_another_place_and_says_what_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = write_tiles(tmp_path / "shards", [40, 37])
    often = [number % 3 for number in range(70)]
    write_sample(tmp_path / "table.parquet", range(70), often)
    words = ["tile", *TINY, f"data.shards={shards}", f"data.sample={tmp_path / 'table.parquet'}"]
    run_command_line([*words, f"run={tmp_path / 'whole'}"])
    said = capsys.readouterr().err
    assert (
        "trains on 46 of 77 tiles, 69 a pass, by their weights; leaves out 24, and 7 that it hasn't got; of its" in said
    )
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-00000006")
    (tmp_path / "moved").mkdir()
    shutil.copy(tmp_path / "table.parquet", tmp_path / "moved")
    moved = [*words[:-1], f"data.sample={tmp_path / 'moved' / 'table.parquet'}"]
    run_command_line([*moved, f"run={tmp_path / 'again'}"])  # goes on after step 4
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "again")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    write_sample(tmp_path / "moved" / "table.parquet", range(70), often[::-1])
    with pytest.raises(SystemExit):
        run_command_line([*moved, f"run={tmp_path / 'again'}", "optim.steps=8", "allow_changes=false"])
    assert "other settings" in capsys.readouterr().err
    both = f"{{a:{{shards:{shards},weight:1,sample:{tmp_path / 'table.parquet'}}},b:{{shards:{shards},weight:1}}}}"
    mixed = stage(tmp_path, "data=mixture", f"data.members={both}")
    assert [int(part.block_sizes.sum()) for part in mixed.tiles.parts] == [69, 77]
    few = write_sample(tmp_path / "few.parquet", range(0, 77, 7))
    stage(tmp_path, f"data.shards={shards}", f"data.sample={few}")
    assert "blocks hold 5.5 tiles, of 38.5: a data.window 7 times as large" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "there is no table of tiles at FOLDER/none.parquet"),
        (["data.sample=s3://bucket/a.parquet"], "data.sample=s3://bucket/a.parquet is not allowed"),
        (["data=mixture", "data.members={a:{shards:s,weight:1,sample:s3://b/a.parquet}}"], "data.members.a.sample=s3"),
    ],
)
def test_a_table_that_isn_t_there_is_one_sentence(
    folder: Path, tmp_path: Path, words: list[str], sentence: str
) -> None:
    source = [] if "data=mixture" in words else [f"data.shards={folder / 'a'}"]
    with pytest.raises(Fault, match=re.escape(sentence.replace("FOLDER", str(tmp_path)))):
        stage(folder, *source, f"data.sample={tmp_path / 'none.parquet'}", *words)


def test_magnifications_in_shares_or_between_two_reach_the_objective_s_batch(folder: Path, tmp_path: Path) -> None:
    online = [
        "data=online",
        f"data.slides={folder / 'slides'}",
        f"data.grids={tmp_path}",
        "data.tile_size=32",
        "data.workers=1",
    ]
    shares = stage(folder, *online, "data.mpp=[0.5,1.0]", "data.mpp_shares=[1,3]")
    assert [part.weight for part in shares.tiles.parts] == [1.0, 3.0]
    drawn = stage(folder, *online, "data.mpp=[0.5,1.5]", "data.mpp_law=uniform", "data.tiles_per_slide=20")
    assert len(drawn.tiles) == 40
    (batch,) = list(drawn_batches(drawn))
    mpp = drawn.prepare(batch.parts[0]).mpp
    assert mpp is not None and len(mpp.unique()) == len(mpp) and mpp.min() >= 0.5 and mpp.max() <= 1.5
    for wrong in (
        ["data.mpp=[0.5]", "data.mpp_law=uniform"],
        ["data.mpp=[0.5,1.0]", "data.mpp_shares=[1]"],
        ["data.mpp=[0.5,1.0,0.5]"],
    ):
        with pytest.raises(Fault, match=r"data\.mpp"):
            load("tile", ["run=none", *online, *wrong]).object()


def drawn_batches(made: TileTraining) -> TileBatches:
    """The first step of a stage, loaded in this process."""
    return TileBatches(
        made.tiles,
        made.stream,
        made.sizes,
        Colour(),
        Masking(0.0, 0.1, 0.5, 2),
        seed=0,
        start=0,
        stop=1,
        rank=0,
        world_size=1,
        accumulate=1,
        threads=1,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_tissue_is_looked_for_is_heeded_after_the_slide_and_the_next_start_goes_on(
    number: signal.Signals,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [
        *TINY,
        "data=online",
        f"data.slides={folder / 'slides'}",
        f"data.grids={tmp_path / 'grids'}",
        "data.mpp=0.5",
        "data.tile_size=32",
        "data.workers=1",
    ]
    looked, really = [], slide_survey.survey

    def looking(job: tuple[Path, str], **settings: Any) -> Any:
        looked.append(job)
        os.kill(os.getpid(), number)
        return really(job, **settings)

    monkeypatch.setattr(slide_survey, "survey", looking)
    with signals.listening(), pytest.raises(SystemExit) as ended:
        run_command_line(["tile", *words, f"run={tmp_path / 'run'}"])
    assert ended.value.code == (130 if number == signal.SIGINT else preemption.TRY_AGAIN) and len(looked) == 1
    assert f"stopped by {number.name} before its first step; the same command continues" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == []  # the lease is given up
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "grids").rglob("*.h5")}
    monkeypatch.setattr(slide_survey, "survey", really)
    stage(folder, *words)
    assert len(made) == 1 and all(path.stat().st_mtime_ns == before for path, before in made.items())


def test_a_mixture_of_shards_slides_and_a_server_trains_in_its_shares(folder: Path, tmp_path: Path) -> None:
    with serving(folder) as server:
        members = f"{{near:{{shards:{folder / 'a'},weight:2}},far:{{shards:'{server.url}/b',weight:1}},online:{{slides:{folder / 'slides'},grids:{tmp_path / 'grids'},tile_size:32,workers:1,mpp:0.5,weight:1}}}}"
        words = [*TINY, "data=mixture", f"data.members={members}"]
        run_command_line(["tile", *words, f"run={tmp_path / 'run'}"])
        assert len(losses(tmp_path / "run")) == 6
        training = stage(folder, *words)
        numbers = np.concatenate([training.stream.batch(step) for step in range(40)])
        counts = np.histogram(numbers, training.tiles.numbering.starts)[0] / len(numbers)  # type: ignore[attr-defined]
        assert counts == pytest.approx([0.5, 0.25, 0.25], abs=0.01)


def test_one_slide_a_lane_and_step(tmp_path: Path) -> None:
    shards = write_tiles(tmp_path / "many", [12] * 12)

    def slides_a_share(*settings: str) -> list[int]:
        stream = stage(tmp_path, f"data.shards={shards}", "data.window=3", *settings).stream
        shares = [share for step in range(27) for share in (stream.batch(step).reshape(4, 4) // 12).tolist()]
        return [len(set(share)) for share in shares]

    assert set(slides_a_share("data.slides_per_lane=1")) == {1}
    assert set(slides_a_share("data.slides_per_lane=2")) == {1, 2}
    assert sum(n > 2 for n in slides_a_share()) > 30


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["data=mixture", "data.members={}"], "data.members is empty"),
        (["data=mixture", "data.members={a:{shards:FOLDER/a}}"], "data.members.a.weight is missing"),
        (["data=mixture", "data.members={a:{weight:1}}"], "data.members.a says no source"),
        (["data=mixture", "data.members={a:{weight:1,shards:FOLDER/a,mmp:1}}"], "there is no setting 'data.members.a.mmp'"),
        (["data=mixture", "data.members={a:{weight:1,slides:FOLDER/slides}}"], "data.members.a.grids must be given"),
        (["data=mixture", "data.members={a:{weight:0,shards:FOLDER/a}}"], "data.members.a.weight=0.0 is not allowed: it must be more than 0."),
        (["data=online", "data.slides=FOLDER/slides", "data.grids=FOLDER/g", "data.tissue=otzu"], "data.tissue holds 'otzu', which is not allowed: each must be otsu, gigapath, clam, hsv or {_target_: CLASS} of yours."),
        (["data=online", "data.slides=FOLDER/slides", "data.grids=FOLDER/g", "data.mpp=0.25", "data.workers=1"], "none of the 2 slides"),
        (["data.shards=FOLDER/a", "data.slides_per_lane=3"], "data.slides_per_lane=3 doesn't divide the 4 tiles"),
        (["data.shards=FOLDER/a", "data._target_=data.tiles.stream.Stream"], "data.tiles.stream.Stream is no TileSource"),
    ],
)  # fmt: skip
def test_wrong_settings_end_in_one_sentence(folder: Path, settings: list[str], sentence: str) -> None:
    with pytest.raises(Fault, match=re.escape(sentence)):
        stage(folder, *(word.replace("FOLDER", str(folder)) for word in settings))


@pytest.mark.parametrize(
    ("members", "sentence"),
    [
        ("{}", "data.members is empty: name the sources to mix"),
        ("{a:3}", "data.members.a=3 is no source: give its settings, {shards:…,weight:1}."),
        ("{a:{shards:s}}", "data.members.a.weight is missing"),
        ("{a:{shards:s,weight:x}}", "data.members.a.weight: Value 'x' of type 'str' could not be converted to Float"),
        ("{a:{shards:s,weight:nan}}", "data.members.a.weight=nan is not allowed: it must be a finite number, more than 0."),
        ("{a:{shard:s,weight:1}}", "data.members.a says no source: give it shards=…, slides=… or files=…."),
        ("{a:{_target_:data.tiles.of_shards.ShardTiles,shards:s,group:2,weight:1}}", "ShardTiles are the arguments behind a * in its"),
        ("{a:{shards:s,weight:1},b:{slides:s,grids:g,mmp:2,weight:1}}", "there is no setting 'data.members.b.mmp'; did you mean 'mpp'?"),
        ("{a:{shards:s,slides:s,weight:1}}", "data.members.a has shards=… and slides=…: a member is one source; make it two."),
        ("{a:{shards:[],weight:1}}", "data.members.a.shards is empty: give a value"),
        ("{a:{shards:'',weight:1}}", "data.members.a.shards is empty: give a value"),
        ("{a:{slides:s,grids:g,tile_size:big,weight:1}}", "data.members.a.tile_size: Value 'big' of type 'str' could not be converted to Integer"),
        ("{a:{slides:s,grids:g,mpp:-1,weight:1}}", "data.members.a.mpp holds -1.0, which is not allowed"),
        ("{a:{_target_:data.tiles.stream.Stream,weight:1}}", "data.tiles.stream.Stream is no TileSource"),
    ],
)  # fmt: skip
def test_members_of_a_mixture_are_checked_when_composing_for_every_command_that_takes_them(
    members: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("tile", "doctor", "plan"):
        with pytest.raises(SystemExit) as ended:
            run_command_line(
                [
                    command,
                    "data=mixture",
                    f"data.members={members}",
                    *(["hardware=cpu"] if command == "plan" else ["run=r"]),
                ]
            )
        said = capsys.readouterr()
        assert ended.value.code == 2 and sentence in said.err and not said.out


def test_a_members_names_that_look_like_numbers_stay_as_they_were_typed() -> None:
    words = [
        "run=r",
        "data=mixture",
        "data.members={a:{shards:[2024_01,b],weight:1e1},c:{slides:1e3,grids:007,mpp:0.50,weight:2}}",
    ]
    found = {name: _member(name, member) for name, member in load("tile", words).object().data.members.items()}
    assert found["a"][0]["shards"] == ["2024_01", "b"] and found["a"][1] == 10.0
    one, weight, table = found["c"]
    assert (one["slides"], one["grids"], one["mpp"], weight, table) == (["1e3"], "007", [0.5], 2.0, None)


def test_no_slides_are_said_when_composing() -> None:
    with pytest.raises(Fault, match=r"data\.slides=\[\] is not allowed: it must be at least one") as refused:
        load("tile", ["run=r", "data=online", "data.slides=[]", "data.grids=g"])
    assert refused.value.code == 2


def test_help_shows_the_sources_and_what_becomes_of_their_tiles(capsys: pytest.CaptureFixture[str]) -> None:
    run_command_line(["tile", "--help"])
    text = capsys.readouterr().out
    assert "data= one of: embeddings, mixture, online, parquet, tiles (default tiles)" in text
    assert "slides_per_lane: null" in text and "global_size: 224" in text and "_views" not in text


def test_a_source_of_ones_own_is_one_class_and_its_settings(folder: Path) -> None:
    """Named by its dotted path; its keyword-only arguments are settings under data."""
    settings: dict[str, Any] = {"data": tile_command.TileData}
    assert "shards" not in settings["data"].__dataclass_fields__
    tree = load("tile", ["run=r", "data=online", "data.slides=s", "data.grids=g", "data.min_tissue=0.4"]).object()
    assert tree.data.slides == ["s"] and tree.data.min_tissue == [0.4] and not hasattr(tree.data, "shards")
    with pytest.raises(Fault, match=r"there is no setting 'data\.slides'"):
        load("tile", ["run=r", "data.shards=s", "+data.slides=s"])
