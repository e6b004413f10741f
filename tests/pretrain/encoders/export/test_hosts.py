"""The files beside an export by which TRIDENT, eva and CLAM take it: against stand-ins of what they document, and in their
own packages where there is an interpreter that has them.

    HOSTS_PYTHON=venv/bin/python pytest tests/pretrain/encoders/export/test_hosts.py

with ``pip install "kaiko-eva[vision]"`` and a copy of TRIDENT in that environment.
"""

import importlib
import os
import runpy
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from data.keyed import rng
from pretrain.encoders.export.timm import export_timm
from pretrain.encoders.loading import load_encoder

THEIRS = """
import sys
import numpy as np, torch
from PIL import Image
folder, image, out = sys.argv[1:]
sys.path.insert(0, folder)
import in_eva, in_trident
from eva.vision.models import ModelFromRegistry
from trident.patch_encoder_models import encoder_factory
encoder = encoder_factory(in_trident.NAME)
images = encoder.eval_transforms(Image.open(image)).unsqueeze(0)
with torch.inference_mode():
    found = {"trident": encoder(images), "eva": ModelFromRegistry(in_eva.NAME).eval()(images)}
    (maps,) = ModelFromRegistry(in_eva.NAME, {"out_indices": 1}).eval()(images)
np.savez(out, maps=maps, **found)
"""


class Registry(dict):
    """eva's, as it documents it."""

    def register(self, key):
        return lambda item: self.setdefault(key, item)


class BasePatchEncoder(nn.Module):
    """TRIDENT's, as it documents it."""

    def __init__(self, weights_path=None, **arguments):
        super().__init__()
        self.weights_path = weights_path
        self.model, self.eval_transforms, self.precision = self._build(**arguments)

    def forward(self, images):
        return self.model(images)


def stand_in(monkeypatch, name: str, **members: object) -> None:
    """A module of another package, where that isn't installed; the packages above it too."""
    try:
        importlib.import_module(name)
    except ImportError:
        for end in range(1, name.count(".") + 1):
            above = ".".join(name.split(".")[:end])
            monkeypatch.setitem(sys.modules, above, types.ModuleType(above))
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)


def test_trident_eva_and_clam_take_the_encoder_by_the_files_beside_it(make_tile_run, tmp_path, monkeypatch):
    folder, _ = make_tile_run(registers=2)
    export_timm(folder, tmp_path / "encoder", "mit")
    stand_in(monkeypatch, "trident.patch_encoder_models.load", BasePatchEncoder=BasePatchEncoder, encoder_registry={})
    stand_in(monkeypatch, "eva.vision.models.networks.backbones.registry", backbone_registry=Registry())
    moved = (tmp_path / "encoder").rename(tmp_path / "mine")  # nothing in it knows where it was written
    found = {name: runpy.run_path(str(moved / name)) for name in ("in_trident.py", "in_eva.py", "in_clam.py")}
    in_trident = found["in_trident.py"]["encoder_registry"]["mine"]().eval()
    in_eva = found["in_eva.py"]["backbone_registry"].get("slidewright/mine")().eval()
    maps = found["in_eva.py"]["backbone_registry"].get("slidewright/mine")(out_indices=1)
    in_clam, prepare = found["in_clam.py"]["get_encoder"]("uni_v1", target_img_size=224)
    image = Image.fromarray(rng(3, "check").integers(0, 256, size=(40, 50, 3), dtype=np.uint8))
    ours = load_encoder(str(folder))
    expected = ours.embed(torch.from_numpy(np.array(image)).unsqueeze(0))
    with torch.no_grad():
        for encoder, ready in ((in_trident, in_trident.eval_transforms), (in_eva, prepare), (in_clam.eval(), prepare)):
            torch.testing.assert_close(
                encoder(ready(image).unsqueeze(0)), expected, atol=2e-2, rtol=2e-2
            )  # PIL scales bytes
        assert maps(prepare(image).unsqueeze(0))[0].shape == (1, 24, 4, 4)


@pytest.mark.skipif("HOSTS_PYTHON" not in os.environ, reason="HOSTS_PYTHON= names no Python with kaiko-eva and TRIDENT")
def test_tridents_factory_and_evas_model_from_registry_give_the_encoders_features(make_tile_run, tmp_path):
    folder, _ = make_tile_run(registers=2)
    export_timm(folder, tmp_path / "mine", "mit")
    pixels = rng(3, "check").integers(0, 256, size=(40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    words = [os.environ["HOSTS_PYTHON"], "-c", THEIRS]
    words += [str(tmp_path / name) for name in ("mine", "image.png", "found.npz")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found, expected = np.load(tmp_path / "found.npz"), load_encoder(str(folder)).embed(torch.from_numpy(pixels[None]))
    for name in ("trident", "eva"):  # PIL scales bytes
        np.testing.assert_allclose(found[name], expected.numpy(), atol=2e-2, rtol=2e-2)
    assert found["maps"].shape == (1, 24, 4, 4)
