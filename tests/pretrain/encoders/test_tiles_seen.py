"""An encoder that is handed on says which tiles it saw, and embedding others says so."""

import json
from pathlib import Path

import pytest

from launch.entry import run_command_line
from pretrain.encoders.export.timm import export_timm
from pretrain.encoders.tiles_seen import TILES_FILE, tiles_seen, unlike_those_seen


def test_tiles_of_another_side_than_all_that_were_seen_are_told() -> None:
    seen = {"tiles": 9, "pixels": [224, 256], "mpp": [0.5, 0.5, 1.0]}
    assert [unlike_those_seen(seen, side) for side in (112, 105, 180, 224, 240)] == [None] * 5
    for side in (90, 256):
        assert f"are {side} µm a side, and the encoder was trained on tiles of 112 to 224 µm" in str(
            unlike_those_seen(seen, side)
        )
    sizes = {"tiles": 9, "sizes": [[224, 224, 1.0], [64, 80, 0.5], [9, 9, None]]}
    assert unlike_those_seen(sizes, 100) is None and "tiles of 32 to 224 µm" in str(unlike_those_seen(sizes, 20))
    assert unlike_those_seen({"tiles": 9}, 128) is None and unlike_those_seen({}, 128) is None


@pytest.mark.parametrize(("mpp", "told"), [(0.5, False), (1.0, True)])
def test_embedding_says_where_tiles_have_another_scale_than_those_of_the_training(
    mpp: float, told: bool, make_tile_run, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = make_tile_run()
    tiles = {"tiles": 24, "pixels": [40, 40], "mpp": [mpp, mpp, mpp]}
    (folder / "provenance.json").write_text(json.dumps({"starts": [{"tiles": tiles}]}))
    export_timm(folder, tmp_path / "encoder", "mit")
    assert tiles_seen([tmp_path / "encoder"]) == tiles == json.loads((tmp_path / "encoder" / TILES_FILE).read_text())
    for number, checkpoint in enumerate((folder, next((folder / "checkpoints").iterdir()), tmp_path / "encoder")):
        out = tmp_path / f"out{number}"
        run_command_line(["embed", f"checkpoint={checkpoint}", f"shards={shards}", f"out={out}", "device=cpu"])
        said = capsys.readouterr().err
        assert ("these tiles are 20 µm a side, and the encoder was trained on tiles of 40 µm" in said) == told
