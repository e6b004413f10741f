"""``export format=gigapath`` in Prov-GigaPath's own code, where there is a copy of it: ``GIGAPATH=FOLDER`` (with einops).

Their attention asks for flash-attn and their layers for wrappers of fairscale that they don't use; on a CPU stand-ins
take these places.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from data.keyed import rng
from models.initialise import initialise
from models.longnet import LongNet
from pretrain.commands.export import Config, run
from pretrain.encoders.slide_encoders import load_slide_encoder
from pretrain.run import checkpoints
from pretrain.settings.config_files import CONFIGS

WIDTH = 24
THEIRS = """
import sys, types
import numpy as np, torch
folder, copy, code = sys.argv[1:]
np.set_printoptions(legacy="1.25")  # they write numbers as text
wrappers = types.ModuleType("fairscale.nn")
wrappers.checkpoint_wrapper = wrappers.wrap = lambda layer: layer
sys.modules |= {"fairscale": types.ModuleType("fairscale"), "fairscale.nn": wrappers}
sys.path.insert(0, copy)
from gigapath import slide_encoder
from torchscale.component import multihead_attention

def attend(q, k, v, *_):  # (b, l, h, d)
    scores = torch.einsum("blhd,bmhd->bhlm", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bhlm,bmhd->blhd", scores.softmax(-1), v), scores.logsumexp(-1)

multihead_attention.flash_attn_func = attend
given = np.load(f"{folder}/given.npz")
tiles, places = torch.from_numpy(given["tiles"])[None], torch.from_numpy(given["cells"])[None] * 256
encoder = eval(code[:-1] + ", slide_ngrids=100)").eval()  # the same positions in a table of 10,000
with torch.no_grad():
    cls = [state[0].numpy() for state in encoder(tiles, places, all_layer_embed=True)]
    encoder.global_pool = True
    pooled = [state[0].numpy() for state in encoder(tiles, places, all_layer_embed=True)]
np.savez(f"{folder}/found.npz", cls=cls, pooled=pooled)
"""


@pytest.mark.skipif("GIGAPATH" not in os.environ, reason="GIGAPATH= names no copy of prov-gigapath")
def test_their_class_loads_the_folder_whole_and_says_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = yaml.safe_load((CONFIGS / "model" / "longnet.yaml").read_text())
    target = settings.pop("_target_")
    objective = nn.Module()
    objective.encoder = LongNet(WIDTH, **settings)
    initialise(objective.encoder, 0)
    (tmp_path / "slide").mkdir()
    config = {"model": {"_target_": target, **settings}, "data": {"embeddings": "store"}}
    (tmp_path / "slide" / "config.yaml").write_text(yaml.safe_dump(config))
    optimiser = torch.optim.SGD(objective.parameters(), lr=0.1)
    checkpoints.save(tmp_path / "slide", 1, objective, optimiser, {}, keep=0)
    run(Config(str(tmp_path / "slide"), str(tmp_path / "out"), "gigapath", "mit", []))
    code = capsys.readouterr().out.splitlines()[-1]
    assert code == (
        f'slide_encoder.create_model("{tmp_path / "out" / "slide_encoder.pth"}", "gigapath_slide_enc12l768d", {WIDTH})'
    )

    # More tiles than the first segment has, and a length that no ratio divides.
    cells = np.argwhere(np.ones((37, 30)))[:1101, ::-1].copy()
    tiles = rng("tiles").normal(size=(len(cells), WIDTH)).astype(np.float32)
    np.savez(tmp_path / "given.npz", tiles=tiles, cells=cells)
    words = [sys.executable, "-c", THEIRS, str(tmp_path), os.environ["GIGAPATH"], code]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Successfully Loaded" in done.stdout and "Missing" not in done.stdout and "Unexpected" not in done.stdout

    ours = load_slide_encoder(str(tmp_path / "out"), "cpu").network
    with torch.no_grad():
        found = ours(torch.from_numpy(tiles), torch.from_numpy(cells), [len(tiles)], all_layers=True)
    theirs = np.load(tmp_path / "found.npz")
    for name, states in (("cls", found.cls_layers), ("pooled", found.pooled_layers)):
        np.testing.assert_allclose(states[:, 0].numpy(), theirs[name], atol=2e-5)
