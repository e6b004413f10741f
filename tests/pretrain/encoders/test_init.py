"""Continued pretraining: every format is taken whole or refused by name, once, and the backbone waits for the heads."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.fault import Fault
from launch.entry import run_command_line
from models.formats import dinov2
from models.formats import timm as timm_format
from models.initialise import initialise
from models.vit import VisionTransformer
from pretrain.encoders import init
from pretrain.encoders.export.timm import export_timm
from pretrain.encoders.export.transformers import export_transformers
from pretrain.encoders.loading import load_encoder
from pretrain.objectives.dinov2 import DINOv2
from pretrain.run import checkpoints
from pretrain.settings.composition import load
from pretrain.training.sharding import materialise
from tests.data.shards.tile_folders import write_tiles

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[3]
MODEL = {
    "image_size": 32,
    "patch_size": 8,
    "width": 24,
    "depth": 2,
    "heads": 2,
    "feed_forward": "mlp",
    "feed_forward_width": 48,
}
TINY = [
    *(f"model.{name}={value}" for name, value in MODEL.items()),
    "objective.group_size=4",
    "objective.prototypes=32",
    "objective.ibot_prototypes=32",
    "objective.bottleneck=16",
    "objective.hidden=24",
    "data.batch_size=8",
    "data.lanes=2",
    "data.threads=1",
    "data.crops.global_size=32",
    "data.crops.local_size=16",
    "data.crops.local_count=2",
    "optim.steps=2",
    "optim.warmup_steps=1",
    "optim.frozen_last_layer_steps=0",
    "trainer.checkpoint_every=1",
    "trainer.accelerator=cpu",
]


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiles(tmp_path_factory.mktemp("tiles") / "shards", [24])


def source(seed: int = 5, **changes: object) -> VisionTransformer:
    """An encoder no weight of which is at its initial value."""
    vit = VisionTransformer(**(MODEL | changes))  # type: ignore[arg-type]
    initialise(vit, seed)
    with torch.no_grad():
        for number, parameter in enumerate(vit.parameters()):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    return vit.eval()


def objective(**changes: object) -> DINOv2:
    """DINOv2 on the meta device, as a run builds it."""
    with torch.device("meta"):
        return DINOv2(
            lambda: VisionTransformer(**(MODEL | changes)),  # type: ignore[arg-type]
            group_size=4,
            prototypes=32,
            bottleneck=16,
            hidden=24,
            head_layers=3,
            separate_ibot_head=False,
            frozen_prototype_norms=False,
            ibot_prototypes=32,
            ibot_bottleneck=16,
            dino_weight=1.0,
            ibot_weight=1.0,
            spread="koleo",
            spread_weight=0.1,
            spread_concentration=5.0,
            spread_ramp=[0.0, 0.0],
            centring="centre",
            student_temperature=0.1,
            teacher_temperature=0.07,
            teacher_temperature_start=0.04,
            teacher_temperature_warmup=0,
            teacher_momentum=0.99,
            teacher_momentum_final=1.0,
        )


def begun(where: Path | str, **changes: object) -> tuple[DINOv2, list[str]]:
    """An objective with its first values, its encoder from ``where``, and what was said."""
    said: list[str] = []
    started = objective(**changes)
    materialise(
        started,
        torch.device("cpu"),
        0,
        lambda built: said.extend(init.start_from(str(where), built.trained().values())),
    )  # type: ignore[arg-type]
    return started, said


def assert_holds(network: VisionTransformer, expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        assert torch.equal(network.state_dict()[name], value), name


# Where weights come from -------------------------------------------------------------------------------------------


def test_a_run_gives_its_teacher_to_student_and_teacher(make_tile_run) -> None:
    run, encoder = make_tile_run()
    for where in (run, run / "checkpoints" / "step-00000003"):
        started, said = begun(where)
        assert_holds(started.student.encoder, encoder.state_dict())
        assert_holds(started.teacher.encoder, encoder.state_dict())
        assert said == []


def test_a_run_without_a_teacher_gives_its_only_encoder(make_tile_run) -> None:
    run, encoder = make_tile_run()
    alone = torch.nn.Module()
    alone.encoder = encoder
    checkpoints.save(run, 4, alone, torch.optim.SGD(alone.parameters(), lr=0.1), {}, keep=0)  # type: ignore[arg-type]
    started, _ = begun(run)
    assert_holds(started.teacher.encoder, encoder.state_dict())
    assert load_encoder(str(run)).width == MODEL["width"]


@pytest.mark.parametrize("registers", [0, 4])
def test_exported_folders_of_both_libraries_give_the_runs_features(
    make_tile_run, tmp_path: Path, registers: int
) -> None:
    run, encoder = make_tile_run(registers=registers)
    export_timm(run, tmp_path / "timm", "mit")
    export_transformers(run, tmp_path / "transformers", "mit")
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for name in ("timm", "transformers"):
        started, said = begun(tmp_path / name, registers=registers)
        assert ("timm keeps no mask token: it starts anew" in said) == (name == "timm")
        with torch.no_grad():
            for found, expected in zip(started.student.encoder.features(images), encoder.features(images), strict=True):
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_dinov2_file_gives_exactly_its_weights_and_its_grid_is_resampled_aloud(tmp_path: Path, suffix: str) -> None:
    encoder = source(image_size=64, position_antialias=False, position_offset=0.1)
    path = tmp_path / f"dinov2.{suffix}"
    weights = dinov2.write_dinov2(encoder)
    (
        save_file(weights, path)
        if suffix == "safetensors"
        else torch.save({"teacher": {f"backbone.{k}": v for k, v in weights.items()}}, path)
    )
    started, said = begun(path)
    expected = dict(encoder.state_dict())
    del expected["pos_embed"]
    assert_holds(started.student.encoder, expected)
    torch.testing.assert_close(started.student.encoder.pos_embed[:, 1:], encoder.positions(4, 4)[1])
    assert "positions resampled from 8 × 8 to 4 × 4, as DINOv2 does it" in said


def test_a_timm_name_gives_timms_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = source()
    real = timm.create_model

    def pretrained(name: str, pretrained: bool, num_classes: int) -> torch.nn.Module:
        """What timm does with a hub that can be reached, with a small network in the place of the real one."""
        assert pretrained and num_classes == 0 and name == "vit_small_patch14_dinov2.lvd142m"
        model = real(
            "vit_small_patch14_dinov2",
            img_size=32,
            patch_size=8,
            embed_dim=24,
            depth=2,
            num_heads=2,
            mlp_ratio=2,
            num_classes=0,
        )
        model.load_state_dict(timm_format.write_timm(encoder, 32), strict=True)
        return model

    monkeypatch.setattr(timm, "create_model", pretrained)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url: None)
    started, _ = begun("vit_small_patch14_dinov2.lvd142m")
    assert_holds(started.student.encoder, {k: v for k, v in encoder.state_dict().items() if k != "mask_token"})


def test_what_is_not_in_the_format_starts_at_its_initial_value(tmp_path: Path) -> None:
    save_file(timm_format.write_timm(source(), 32), tmp_path / "timm.safetensors")
    started, said = begun(tmp_path / "timm.safetensors")
    assert not started.student.encoder.mask_token.any()
    assert any("heads" in sentence for sentence in said) and any("mask token" in sentence for sentence in said)


RECIPE_FILES = (ROOT / "configs" / "recipe").glob("*.yaml")
RECIPES = {path.stem.lstrip("_"): yaml.safe_load(path.read_text()) for path in sorted(RECIPE_FILES, reverse=True)}
FROM_TIMM = [name for name, recipe in RECIPES.items() if timm.is_model(str(recipe.get("init")).partition(".")[0])]


@pytest.mark.parametrize("recipe", FROM_TIMM)
def test_a_recipe_that_continues_from_a_timm_model_has_the_network_that_its_weights_fit(recipe: str) -> None:
    config = load("tile", [f"recipe={recipe}", "run=none", "data=tiles", "data.shards=none"]).object()
    assert timm.models.is_model_pretrained(config.init)
    with torch.device("meta"):
        theirs = timm.create_model(config.init, pretrained=False, num_classes=0)
        ours = VisionTransformer(**{name: value for name, value in config.model.items() if name != "_target_"})
    grid, heads = theirs.patch_embed.grid_size[0], theirs.blocks[0].attn.num_heads
    weights, _ = timm_format.read_timm(theirs.state_dict(), heads=heads, grid=grid).fit(ours)
    assert ours.state_dict().keys() - weights.keys() == {"mask_token"}


# What is refused ---------------------------------------------------------------------------------------------------


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    weights = dinov2.write_dinov2(source())
    del weights["blocks.1.norm2.bias"]
    save_file(weights | {"blocks.0.attn.q_norm.weight": torch.zeros(2)}, tmp_path / "broken.safetensors")
    with pytest.raises(Fault, match=r"missing: blocks\.1\.norm2\.bias; unexpected: blocks\.0\.attn\.q_norm\.weight"):
        begun(tmp_path / "broken.safetensors")
    save_file(dinov2.write_dinov2(source()), tmp_path / "whole.safetensors")
    with pytest.raises(Fault, match=r"missing: blocks\.2\."):
        begun(tmp_path / "whole.safetensors", depth=3)
    with pytest.raises(Fault, match=r"missing: reg_token"):
        begun(tmp_path / "whole.safetensors", registers=4)


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    weights = dinov2.write_dinov2(source())
    weights["blocks.1.norm2.bias"][3] = float("nan")
    save_file(weights, tmp_path / "nan.safetensors")
    with pytest.raises(Fault, match=r"not usable: blocks\.1\.norm2\.bias holds values that aren't finite$"):
        begun(tmp_path / "nan.safetensors")


def test_another_number_of_heads_is_refused_although_every_shape_fits(make_tile_run) -> None:
    with pytest.raises(Fault, match=r"it has 2 heads and the model 3: set model\.heads=2"):
        begun(make_tile_run()[0], heads=3)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"not weights", "can't be read as weights"),
        (b"", "can't be read as weights \\(it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "is a Git LFS pointer.*git lfs pull"),
        ({"epoch": 3}, "it holds no tensors"),
        ([1, 2], "holds a list, not a state dict"),
    ],
)
def test_a_file_that_holds_no_encoder_is_refused(tmp_path: Path, content: object, sentence: str) -> None:
    path = tmp_path / "some.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(Fault, match=sentence):
        init.find_encoder(str(path))


def test_a_name_that_means_nothing_is_refused() -> None:
    with pytest.raises(Fault, match="neither a folder here nor a model that timm knows"):
        init.find_encoder("no_such_model")


def test_a_pickle_with_code_is_never_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "trapped",))

    torch.save({"cls_token": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(Fault, match="can't be read as weights"):
        init.find_encoder(str(tmp_path / "trap.pth"))
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"<!DOCTYPE html>", "it isn't a file that torch.save wrote"),
        (b"", "it is empty, or ends too soon"),
        (b"PK\x03\x04aaaa", "it is damaged or cut off"),
        (Path("a"), "beside tensors it holds objects of pathlib.PosixPath, which can't be read without running code from the file"),
    ],
)  # fmt: skip
def test_why_a_file_cannot_be_read_is_said_in_our_words(tmp_path: Path, content: Any, why: str) -> None:
    from data.embeddings.feature_files import import_features
    from pretrain.encoders.slide_encoders import load_slide_encoder

    path = tmp_path / "w.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save({"cls_token": torch.ones(2), "args": content}, path)
    readers = (
        lambda: init.find_encoder(str(path)),
        lambda: import_features(path),
        lambda: load_slide_encoder(str(path), "cpu"),
    )
    for read in readers:
        with pytest.raises(Fault) as refused:
            read()
        assert why in str(refused.value) and "weights_only" not in str(refused.value)


def test_the_encoder_that_is_meant_is_named_behind_its_file(tmp_path: Path) -> None:
    weights = dinov2.write_dinov2(source())
    other = {f"backbone.{name}": tensor + 1 for name, tensor in weights.items()}
    torch.save({"teacher": weights, "teacher_ema": other}, tmp_path / "two.pth")
    with pytest.raises(Fault, match=r"two\.pth holds no encoder that can be read: it holds 2 encoders, teacher, "):
        init.find_encoder(str(tmp_path / "two.pth"))
    found = init.find_encoder(f"{tmp_path / 'two.pth'}::teacher_ema.backbone")
    assert torch.equal(found.weights["cls_token"], weights["cls_token"] + 1)


def test_a_bare_file_cannot_be_a_frozen_encoder_because_it_says_nothing_about_images(tmp_path: Path) -> None:
    save_file(dinov2.write_dinov2(source()), tmp_path / "dinov2.safetensors")
    with pytest.raises(Fault, match="how images are prepared"):
        load_encoder(str(tmp_path / "dinov2.safetensors"))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["timm", "transformers"])
def test_a_pointer_in_an_exported_folder_is_named(make_tile_run, tmp_path: Path, name: str, kind: str) -> None:
    if kind == "transformers":
        pytest.importorskip("transformers")
    run_command_line(["export", f"checkpoint={make_tile_run()[0]}", f"out={tmp_path / 'out'}", f"format={kind}"])
    (tmp_path / "out" / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")
    for read in (init.find_encoder, load_encoder):
        with pytest.raises(Fault, match=f"{name} is a Git LFS pointer"):
            read(str(tmp_path / "out"))


def test_transformers_weights_in_several_bin_files_are_read_and_one_that_lacks_is_named(
    make_tile_run, tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    out = tmp_path / "out"
    run_command_line(["export", f"checkpoint={make_tile_run()[0]}", f"out={out}", "format=transformers"])
    whole = init.find_encoder(str(out)).weights
    held = sorted(load_file(out / "model.safetensors").items())
    places = {}
    for part, items in enumerate((held[::2], held[1::2])):
        torch.save(dict(items), out / f"pytorch_model-{part}.bin")
        places |= {name: f"pytorch_model-{part}.bin" for name, _ in items}
    (out / "model.safetensors").unlink()
    (out / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    found = init.find_encoder(str(out)).weights
    assert found.keys() == whole.keys() and all(torch.equal(found[name], tensor) for name, tensor in whole.items())
    (out / "pytorch_model-1.bin").unlink()
    with pytest.raises(Fault, match=r"lacks pytorch_model-1\.bin, which pytorch_model\.bin\.index\.json names"):
        init.find_encoder(str(out))


def test_a_frozen_encoder_with_weights_that_are_not_finite_is_refused(make_tile_run, tmp_path: Path) -> None:
    run_command_line(["export", f"checkpoint={make_tile_run()[0]}", f"out={tmp_path / 'out'}"])
    weights = load_file(tmp_path / "out" / "model.safetensors")
    weights["norm.weight"][3] = float("inf")
    save_file(weights, tmp_path / "out" / "model.safetensors")
    with pytest.raises(Fault, match=r"norm\.weight holds values that aren't finite"):
        load_encoder(str(tmp_path / "out"))


# In a run ----------------------------------------------------------------------------------------------------------


def network(run: Path, step: int, prefix: str) -> dict[str, Tensor]:
    return checkpoints.read_network(run / "checkpoints" / f"step-{step:08d}", prefix)


def test_a_frozen_backbone_stands_still_while_heads_move_and_then_moves_from_where_it_began(
    tiles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = source()
    save_file(dinov2.write_dinov2(encoder), tmp_path / "start.safetensors")
    run = tmp_path / "run"
    arguments = [
        "tile",
        f"run={run}",
        f"data.shards={tiles}",
        *TINY,
        f"init={tmp_path / 'start.safetensors'}",
        "optim.frozen_backbone_steps=1",
        "optim.warmup_steps=0",
    ]
    run_command_line([*arguments, "trainer.keep_checkpoints=0"])
    assert f"starts from {tmp_path / 'start.safetensors'}" in "".join(capsys.readouterr())
    for side in ("student", "teacher"):
        frozen = network(run, 1, f"{side}.encoder.")
        for name, value in encoder.state_dict().items():
            torch.testing.assert_close(frozen[name], value, atol=1e-7, rtol=1e-6)  # the average of equal weights rounds
    student = network(run, 1, "student.encoder.")
    assert all(torch.equal(student[name], value) for name, value in encoder.state_dict().items())
    untrained = objective()
    materialise(untrained, torch.device("cpu"), 0)
    heads = network(run, 1, "student.dino_head.")
    assert not torch.equal(heads["mlp.0.weight"], untrained.student.dino_head.state_dict()["mlp.0.weight"])
    moved = network(run, 2, "student.encoder.")
    assert not torch.equal(moved["blocks.0.attn.qkv.weight"], encoder.state_dict()["blocks.0.attn.qkv.weight"])
    drift = (moved["blocks.0.attn.qkv.weight"] - encoder.state_dict()["blocks.0.attn.qkv.weight"]).abs().max()
    assert drift < 0.01  # one step away from where it began, not from random values

    # Resumed, the run has its own weights: what it began from may be gone.
    (tmp_path / "start.safetensors").unlink()
    (run / "checkpoints" / "step-00000002" / "state.json").unlink()
    run_command_line([*arguments, "trainer.keep_checkpoints=0"])
    again = network(run, 2, "student.encoder.")
    assert "resuming after step 1" in "".join(capsys.readouterr())
    assert all(torch.equal(again[name], value) for name, value in moved.items())


SHARDED = """
import json, sys, torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from models.vit import VisionTransformer
from pretrain.encoders import init
from pretrain.objectives.interface import Objective

class Alone(Objective):
    def __init__(self):
        super().__init__()
        self.encoder = VisionTransformer(**json.loads(sys.argv[3]))
    def trained(self):
        return {"encoder": self.encoder}
    def loss(self, batch, moment):
        raise NotImplementedError

with torch.device("meta"):
    built = Alone()
mesh = init_device_mesh("cpu", (2,))
for block in built.encoder.blocks:
    fully_shard(block, mesh=mesh)
fully_shard(built.encoder, mesh=mesh)
built.to_empty(device="cpu")
init.start_from(sys.argv[1], built.trained().values())
whole = {name: value.full_tensor() for name, value in built.encoder.state_dict().items()}
if dist.get_rank() == 0:
    torch.save(whole, sys.argv[2])
dist.barrier()
"""


@pytest.mark.slow
def test_shards_of_two_processes_hold_the_published_weights(tmp_path: Path) -> None:
    encoder = source()
    save_file(dinov2.write_dinov2(encoder), tmp_path / "start.safetensors")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = os.environ | {
        "PYTHONPATH": str(ROOT),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }
    command = [
        sys.executable,
        "-c",
        SHARDED,
        str(tmp_path / "start.safetensors"),
        str(tmp_path / "whole.pt"),
        json.dumps(MODEL),
    ]
    processes = [
        subprocess.Popen(command, env=common | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert (tmp_path / "whole.pt").exists(), errors
    whole = torch.load(tmp_path / "whole.pt", weights_only=True)
    assert whole.keys() == encoder.state_dict().keys()
    assert all(torch.equal(whole[name], value) for name, value in encoder.state_dict().items())
