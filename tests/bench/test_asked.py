"""What the benchmarks of learning and of peers take from their command lines: every word is heeded or refused."""

import shutil
from pathlib import Path

import pytest

from tests.bench.learning import Asked, contents
from tests.bench.peers import HANDED_OVER, asked_of_both
from tests.pretrain.probing.test_probing import write_class_folders


@pytest.fixture
def tiles(tmp_path: Path) -> Path:
    return write_class_folders(tmp_path / "tiles", {"a": 2, "b": 2})


@pytest.mark.parametrize("word", ["OBJECTIVES=", "TILES=", "OTHER=", "OUT=", "SEEDS=", "SEEDS=0,0", "SEEN=x", "mine=1"])
def test_a_word_that_says_nothing_or_too_much_is_one_sentence(word: str, tiles: Path) -> None:
    with pytest.raises(SystemExit) as refused:
        Asked.parse([f"TILES={tiles}", word])
    assert word.partition("=")[0] in str(refused.value) and "\n" not in str(refused.value)


def test_help_is_printed_and_nothing_begun() -> None:
    with pytest.raises(SystemExit) as left:
        Asked.parse(["-h"])
    assert left.value.code == 0


def test_the_folder_that_one_stands_in_has_a_name(tiles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiles)
    assert Asked.parse(["TILES=.", "OBJECTIVES=dinov2"]).tiles == tiles.resolve()


def test_other_tiles_in_the_same_folder_are_other_shards_and_other_runs(tiles: Path) -> None:
    asked = Asked.parse([f"TILES={tiles}", "OBJECTIVES=dinov2"])
    before = asked.shards, asked.folder("dinov2", 0)
    shutil.copy(tiles / "a" / "0.png", tiles / "a" / "2.png")
    contents.cache_clear()
    assert asked.shards != before[0] and asked.folder("dinov2", 0) != before[1]


@pytest.mark.parametrize(
    "word",
    ["SEEDS=1", "OBJECTIVES=mae", "mae:optim.lr=1", "dino:optim.lr=1", "TURNS=abc", "TURNS=0", "dinov2:optim.lr=1e-4",
     "dinov2:model.width=96"],
)  # fmt: skip
def test_what_one_peer_alone_would_get_or_neither_is_refused(word: str, tiles: Path) -> None:
    with pytest.raises(SystemExit) as refused:
        asked_of_both([f"TILES={tiles}", word])
    assert isinstance(refused.value.code, str) and "\n" not in refused.value.code


def test_both_peers_get_what_is_asked_for(tiles: Path) -> None:
    asked, turns = asked_of_both([f"TILES={tiles}", "TURNS=2", "dinov2:data.batch_size=32", "dinov2:model.depth=4"])
    assert turns == 2 and asked.objectives == ["dinov2"]
    assert asked.settings["dinov2"] == ["data.batch_size=32", "model.depth=4"]
    assert {"data.batch_size", "model.depth"} <= set(HANDED_OVER.values())
