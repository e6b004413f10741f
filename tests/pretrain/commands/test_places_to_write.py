"""A place that can't be written to is one sentence before any work, on every command that writes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data.fault import Fault
from data.files import require_writable
from tests.data.slides.synthetic_slides import stained, write_slide
from tests.pretrain.training.test_tile_training import GROUP, ROOT, TINY
from tests.pretrain.training.wavy_slides import write_wavy_slides

# In a mount namespace of its own, so that nobody else sees the disk become read-only, which binds root too.
DRIVER = """
import json, sys
from launch.entry import run_command_line
for words in json.loads(sys.argv[1]):
    print("$", *words, file=sys.stderr)
    try:
        run_command_line(words)
        print("code 0", file=sys.stderr)
    except SystemExit as ended:
        print("code", ended.code, file=sys.stderr)
"""
READ_ONLY = 'mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" && shift && exec "$@"'


def test_asking_whether_a_file_can_be_written_makes_nothing(tmp_path: Path) -> None:
    require_writable(tmp_path / "not" / "yet" / "there.json")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(Fault, match="something in that path is a file"):
        require_writable(tmp_path / "file" / "there.json")


@pytest.mark.slow
def test_a_read_only_disk_is_one_sentence_on_every_command(
    tmp_path: Path, shards: Path, class_folders: Path, make_tile_run
) -> None:
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("only root may make a disk read-only")
    run, _ = make_tile_run()
    store = write_wavy_slides(tmp_path / "store", 6, columns=8, rows=6, fewer=6)
    (tmp_path / "slides").mkdir()
    write_slide(tmp_path / "slides" / "a.tiff", stained(400, 600, [(200, 200, 150)]), mpp=0.5)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for tar in shards.glob("*.tar"):
        (theirs / tar.name).write_bytes(tar.read_bytes())
    out = f"out={tmp_path / 'new' / 'out'}"
    commands = [
        ["tile", f"run={tmp_path / 'runs' / 'a'}", f"data.shards={shards}", *TINY],
        ["slide", f"run={tmp_path / 'runs' / 'b'}", f"data.embeddings={store}"],
        ["shard", f"slides={tmp_path / 'slides'}", out],
        ["embed", f"checkpoint={run}", f"shards={shards}", out],
        ["shards", "index", f"shards={theirs}"],
        ["shards", "verify", f"shards={shards}", f"report={tmp_path / 'verified.json'}"],
        ["export", f"checkpoint={run}", out],
        ["report", f"run={run}"],
        ["inspect", f"slide={tmp_path / 'slides' / 'a.tiff'}", out],
        ["probe", f"checkpoint={run}", f"train={class_folders}", f"{out}.json"],
        ["plan", f"{out}.json"],
        ["curate", f"embeddings={store}", "size=10", "clusters=[4,2]", out],
        ["demo", f"slides={tmp_path / 'slides'}", out],
    ]
    kept = {name: value for name, value in os.environ.items() if name not in GROUP}
    before = sorted(tmp_path.rglob("*"))
    done = subprocess.run(
        [
            "unshare",
            "-m",
            "sh",
            "-c",
            READ_ONLY,
            "sh",
            str(tmp_path),
            sys.executable,
            "-c",
            DRIVER,
            json.dumps(commands),
        ],
        env=kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    said = [part.splitlines() for part in f"\n{done.stderr}".split("\n$ ")[1:]]
    assert len(said) == len(commands), done.stderr
    for command, *lines, code in said:
        if command.startswith("demo"):  # it says which step it was at
            lines = lines[-1:]
        assert code == "code 1" and len(lines) == 1, (command, lines)
        assert str(tmp_path) in lines[0] and "read-only" in lines[0].lower() and ".partial" not in lines[0], lines
        assert ("out=FOLDER" in lines[0]) == command.startswith("shards index")
    assert sorted(tmp_path.rglob("*")) == before
