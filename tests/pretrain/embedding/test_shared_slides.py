"""``pretrain embed stage=slide processes_per_slide=``: processes that share every slide find the vectors of one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data.embeddings.slide_features import SLIDE_VECTORS, read_slide_features
from data.fault import Fault
from models.slide_vit import SlideViT
from pretrain.embedding.shared_slides import require_sharing, share_every_slide
from pretrain.encoders.slide_encoders import load_slide_encoder
from pretrain.run.peers import met
from tests.pretrain.embedding.small_slide_run import embed, write_small_run, write_small_store

ROOT = Path(__file__).resolve().parents[3]
GROUP = {"MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "NODE_RANK"}


def embed_together(tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    given = [f"checkpoint={tmp_path / 'slide'}", f"embeddings={tmp_path / 'store'}", f"out={tmp_path / 'together'}"]
    environment = {name: value for name, value in os.environ.items() if name not in GROUP}
    return subprocess.run(
        [sys.executable, "-m", "pretrain", "embed", "stage=slide", "device=cpu", *given, *words],
        cwd=ROOT,
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.slow
def test_two_processes_find_what_one_does_write_it_once_and_go_on(tmp_path: Path) -> None:
    write_small_store(tmp_path), write_small_run(tmp_path)
    embed(tmp_path, "tokens=50")
    for new in (4, 0):
        done = embed_together(tmp_path, "processes_per_slide=2", "tokens=50")
        assert done.returncode == 0, done.stderr
        (line,) = done.stdout.splitlines()
        assert json.loads(line)["new_slides"] == new
    (slides, alone), (others, shared) = (read_slide_features(tmp_path / out) for out in ("out", "together"))
    assert slides == others
    for kind in SLIDE_VECTORS:
        np.testing.assert_allclose(shared[kind], alone[kind], rtol=1e-5, atol=1e-5)


def test_what_can_not_be_shared_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_small_store(tmp_path), write_small_run(tmp_path, SlideViT)
    for words in (["per_tile=true"], ["maps=rollout"], ["merge=true"]):
        with pytest.raises(Fault, match="processes_per_slide= is for slides' vectors"):
            embed(tmp_path, "processes_per_slide=2", *words)
    with pytest.raises(Fault, match=r"doesn't fit .*slide: SlideViT can't share a slide"):
        require_sharing(str(tmp_path / "slide"), [])
    with pytest.raises(Fault, match="processes_per_slide=2, and 1 process was started"):
        embed(tmp_path, "processes_per_slide=2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(Fault, match="device=cuda:1 is one device"), met("processes_per_slide", 2, "cuda:1"):
        pass
    encoder = load_slide_encoder(str(tmp_path / "slide"), "cpu")
    with pytest.raises(Fault, match=r"processes_per_slide= doesn't fit slide .*SlideViT can't share a slide"):
        share_every_slide(encoder, object())
