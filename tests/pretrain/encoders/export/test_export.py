"""Exports load elsewhere, strictly, and say the same."""

import json
import re
import types
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from torch import nn

from data.fault import Fault
from data.files import Refused
from data.keyed import rng
from pretrain.commands import probe
from pretrain.commands.export import Config, run
from pretrain.encoders.export import card as card_of_runs
from pretrain.encoders.export import timm as timm_export
from pretrain.encoders.export.card import parameters_in_words, scales_of, size_and_resolution
from pretrain.encoders.export.gigapath import architecture_of, how_it_is_used, objective_in_words
from pretrain.encoders.export.timm import export_timm
from pretrain.encoders.export.torchscript import export_torchscript
from pretrain.encoders.export.transformers import export_transformers
from pretrain.encoders.export.where_things_lie import without_folders
from pretrain.encoders.loading import load_encoder
from pretrain.encoders.preprocessing import Preprocessing
from pretrain.run import checkpoints
from pretrain.settings.composition import load
from pretrain.settings.config_files import CONFIGS

ARCHITECTURES = [
    {},
    {"feed_forward": "swiglu", "feed_forward_width": 43},
    {"registers": 4},
    {"feed_forward": "swiglu", "feed_forward_width": 40, "registers": 2, "layer_scale": 0.0},
    {"image_size": 48, "registers": 1},  # positions stored at another grid than the crops'
    {"image_size": 48, "position_antialias": False, "position_offset": 0.1},
]


@pytest.mark.parametrize("model", ARCHITECTURES, ids=str)
def test_timm_loads_the_folder_strictly_and_gives_the_teachers_features(make_tile_run, tmp_path, model):
    folder, teacher = make_tile_run(**model)
    exported = export_timm(folder, tmp_path / "encoder", "mit")
    assert exported.new and exported.difference <= 1e-5
    loaded = timm.create_model(f"local-dir:{tmp_path / 'encoder'}", pretrained=True).eval()
    images = torch.from_numpy(rng(1, "check").normal(size=(2, 3, 32, 32))).float()
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), teacher.features(images)[0], atol=1e-5, rtol=1e-5)
    assert set(load_file(tmp_path / "encoder" / "model.safetensors")) == set(loaded.state_dict())


def test_an_exported_encoder_and_its_run_embed_alike(make_tile_run, tmp_path):
    folder, _ = make_tile_run(registers=2)
    export_timm(folder, tmp_path / "encoder", "mit")
    images = torch.from_numpy(rng(2, "check").integers(0, 256, size=(2, 40, 50, 3), dtype=np.uint8))
    ours, theirs = load_encoder(str(folder)), load_encoder(str(tmp_path / "encoder"))
    assert theirs.preprocessing == ours.preprocessing
    torch.testing.assert_close(theirs.embed(images), ours.embed(images), atol=1e-5, rtol=1e-5)


TRANSFORMERS = [  # as ARCHITECTURES, in the widths that transformers can express
    {},
    {"registers": 4, "layer_scale": 0.0},
    {"feed_forward": "swiglu", "feed_forward_width": 64},
    {"feed_forward": "swiglu", "feed_forward_width": 64, "registers": 2},
    {"image_size": 48, "position_antialias": False, "position_offset": 0.1},
]


@pytest.mark.parametrize("model", TRANSFORMERS, ids=str)
def test_transformers_loads_the_folder_whole_and_gives_the_teachers_features(make_tile_run, tmp_path, model):
    transformers = pytest.importorskip(
        "transformers", reason="transformers isn't installed: pip install 'slidewright[test]'"
    )
    folder, teacher = make_tile_run(**model)
    run(Config(str(folder), str(tmp_path / "encoder"), "transformers", "mit", []))
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "encoder").eval()
    assert type(loaded).__name__ == ("Dinov2WithRegistersModel" if model.get("registers") else "Dinov2Model")
    images = torch.from_numpy(rng(1, "check").normal(size=(2, 3, 32, 32))).float()
    with torch.no_grad():
        torch.testing.assert_close(loaded(images).pooler_output, teacher.features(images)[0], atol=1e-5, rtol=1e-5)
    # Loaded here, the folder has the run's preprocessing, and transformers' own image processor prepares images the
    # same way.
    ours, theirs = load_encoder(str(folder)), load_encoder(str(tmp_path / "encoder"))
    assert theirs.preprocessing == ours.preprocessing and theirs.width == ours.width
    pixels = torch.from_numpy(rng(2, "check").integers(0, 256, size=(2, 32, 32, 3), dtype=np.uint8))
    torch.testing.assert_close(theirs.embed(pixels), ours.embed(pixels), atol=1e-5, rtol=1e-5)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "encoder")
    prepared = processor(images=list(pixels.numpy()), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(prepared, ours.preprocessing(pixels), atol=1e-5, rtol=1e-5)
    twin = theirs.random_twin(0)
    assert twin.hash != theirs.hash and twin.embed(pixels).shape == (2, 24)


def test_a_width_that_transformers_cannot_express_and_a_folder_without_preprocessing_are_refused(
    make_tile_run, tmp_path
):
    pytest.importorskip("transformers", reason="transformers isn't installed: pip install 'slidewright[test]'")
    folder, _ = make_tile_run(feed_forward_width=50)
    with pytest.raises(Fault, match="no mlp_ratio for feed_forward_width=50"):
        export_transformers(folder, tmp_path / "encoder", "mit")
    assert not (tmp_path / "encoder").exists()
    folder, _ = make_tile_run("other")
    export_transformers(folder, tmp_path / "encoder", "mit")
    (tmp_path / "encoder" / "preprocessor_config.json").unlink()
    with pytest.raises(Fault, match="nothing says how images are prepared"):
        load_encoder(str(tmp_path / "encoder"))


def test_exporting_again_changes_nothing_and_another_export_is_refused(make_tile_run, tmp_path):
    folder, _ = make_tile_run()
    out = tmp_path / "encoder"
    assert export_timm(folder, out, "mit").new
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert not export_timm(folder, out, "mit").new
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    other, _ = make_tile_run("other", seed=1)
    with pytest.raises(Fault, match="holds something else"):
        export_timm(other, out, "mit")
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_an_export_whose_features_differ_is_not_published(make_tile_run, tmp_path, monkeypatch):
    folder, _ = make_tile_run()
    correct = timm_export.timm_format.write_timm

    def wrong(network, image_size):
        weights = correct(network, image_size)
        weights["blocks.0.norm1.weight"] += 0.01
        return weights

    monkeypatch.setattr(timm_export.timm_format, "write_timm", wrong)
    with pytest.raises(Fault, match="nothing was published"):
        export_timm(folder, tmp_path / "encoder", "mit")
    assert not (tmp_path / "encoder").exists()
    assert not list(tmp_path.glob(".encoder*"))


def test_an_export_that_is_being_written_is_left_alone_by_another(make_tile_run, tmp_path, monkeypatch):
    folder, _ = make_tile_run()
    other, _ = make_tile_run("other", seed=1)
    out, save, said = tmp_path / "encoder", save_file, []

    def meanwhile(*arguments, **settings):
        monkeypatch.setattr("pretrain.encoders.export.tiles.save_file", save)
        said.append(export_timm(other, out, "mit").new)
        save(*arguments, **settings)

    monkeypatch.setattr("pretrain.encoders.export.tiles.save_file", meanwhile)
    with pytest.raises(Fault, match="already holds something else"):
        export_timm(folder, out, "mit")
    assert said == [True] and not export_timm(other, out, "mit").new
    assert not list(tmp_path.glob(".encoder*"))


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("[enforce fail at inline_container.cc:603] . unexpected pos 3392 vs 3280")]
)  # fmt: skip
def test_a_full_disk_is_a_sentence_and_leaves_nothing(make_tile_run, tmp_path, monkeypatch, error):
    def full(*_, **__):
        raise error

    run, _ = make_tile_run()
    monkeypatch.setattr("pretrain.encoders.export.tiles.save_file", full)
    with pytest.raises(Refused, match=r"/encoder can't be written \(No space left on device\): make room there"):
        export_timm(run, tmp_path / "encoder", "cc0-1.0")
    assert not [path.name for path in tmp_path.iterdir() if "encoder" in path.name]


def test_a_missing_tensor_stops_a_stranger_from_loading(make_tile_run, tmp_path):
    folder, _ = make_tile_run()
    export_timm(folder, tmp_path / "encoder", "mit")
    weights = load_file(tmp_path / "encoder" / "model.safetensors")
    del weights["blocks.1.mlp.fc2.bias"]
    save_file(weights, tmp_path / "encoder" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Fault, match="can't be loaded"):
        load_encoder(str(tmp_path / "encoder"))


def test_the_card_and_the_configuration_carry_what_a_user_needs(make_tile_run, tmp_path):
    folder, _ = make_tile_run()
    export_timm(folder, tmp_path / "encoder", "cc-by-4.0")
    card = (tmp_path / "encoder" / "README.md").read_text()
    assert card.startswith("---\nlicense: cc-by-4.0\n") and "feed_forward_width: 48" in card and "step-00000003" in card
    config = json.loads((tmp_path / "encoder" / "config.json").read_text())
    assert config["pretrained_cfg"]["mean"] == [0.7, 0.5, 0.6]
    assert config["pretrained_cfg"]["input_size"] == [3, 32, 32]
    assert config["pretrained_cfg"]["license"] == "cc-by-4.0"


def test_the_card_says_what_a_tile_is_which_recipe_it_was_and_how_it_was_judged(make_tile_run, tmp_path, class_folders):
    folder, _ = make_tile_run()
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["data"] |= {"batch_size": 8, "crops": {"global_size": 32, "global_scale": [0.32, 1.0]}}
    config |= {"optim": {"steps": 4}, "objective": {"_target_": "pretrain.objectives.dinov2.DINOv2"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    words = ["tile", "recipe=small", "run=runs/a", "data.shards=s3://me:secret@host/shards", "optim.lr=1e-3"]
    starts = [
        {"command": ["pretrain", *words]},
        {
            "command": ["pretrain", *words, "trainer.devices=2"],
            "tiles": {"tiles": 24, "pixels": [40, 40], "mpp": [0.5, 0.5, 0.5]},
        },
    ]
    (folder / "provenance.json").write_text(json.dumps({"starts": starts}))
    probe.run(
        load(
            "probe", [f"checkpoint={folder}", f"train={class_folders}", f"out={folder / 'probe.json'}", "device=cpu"]
        ).object()
    )
    export_timm(folder, tmp_path / "encoder", "cc-by-4.0")
    card = ModelCard.load(tmp_path / "encoder" / "README.md")
    assert (card.data.license, card.data.library_name, card.data.pipeline_tag) == (
        "cc-by-4.0",
        "timm",
        "image-feature-extraction",
    )
    for line in (
        "| Objective | DINOv2 |",
        "| Recipe | small, with optim.lr=1e-3 |",
        "| Steps | 3 of 4, batches of 8 |",
        "| Tiles | 24 |",
        "| Resolution of a tile | 0.5 µm/px |",
        "| Meant for | tiles of 20 µm a side, as 40 px at 0.5 µm/px; scaled to the input they are 0.625 µm/px |",
        "| Views | global crops of 32% to 100% of a tile, scaled to 32 px |",
    ):
        assert line in card.content, line
    scores = json.loads((folder / "probe.json").read_text())["scores"]["encoder"]
    assert (
        f"| encoder | {scores['knn']:.3f} ± {scores['knn_se']:.3f} |" in card.content and "secret" not in card.content
    )


def test_scores_of_other_weights_stay_out_of_the_card_and_files_may_be_read_by_whoever_may_read_the_folder(
    make_tile_run, tmp_path, class_folders, capsys
):
    (folder, _), (other, _) = make_tile_run(), make_tile_run("other", seed=1)
    words = [f"train={class_folders}", f"out={folder / 'probe.json'}", "device=cpu"]
    probe.run(load("probe", [f"checkpoint={other}", *words]).object())
    export_timm(folder, tmp_path / "encoder", "mit")
    assert "## Judged" not in (tmp_path / "encoder" / "README.md").read_text()
    assert f"{folder / 'probe.json'} judges other (step-00000003), other weights than are" in capsys.readouterr().err
    assert len({path.stat().st_mode for path in (tmp_path / "encoder").iterdir()}) == 1


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("virchow, with objective.teacher=hospital/run", "virchow, with objective.teacher=run"),
        ("small, with init='/disk/Ann Smith/p1'", "small, with init='p1'"),
        ("data.members={fine:{shards:hospital/Patient/shards,weight:1}}", "data.members={fine:{shards:shards,weight:1}}"),
        ("data.shards=[s3://bucket/a,b/c/]", "data.shards=[a,c]"),
        ("init=hf-hub:lab/model", "init=hf-hub:lab/model"),
        ("optim.lr=1e-3", "optim.lr=1e-3"),
    ],
)  # fmt: skip
def test_of_paths_in_a_text_the_last_parts_stay(text: str, left: str) -> None:
    assert without_folders(text) == left


def test_a_card_names_each_resolution_that_was_asked_for_and_a_range_where_tiles_have_their_own():
    preprocessing = Preprocessing(192, 192, (0.5,) * 3, (0.5,) * 3)
    tiles = {"tiles": 55, "pixels": [256, 256], "mpp": [0.499, 0.499, 1.0]}
    told = size_and_resolution(tiles, preprocessing, {"mpp": [0.5, 1.0], "mpp_law": "values"})
    assert told["Resolution of a tile"] == "0.5 and 1 µm/px: tiles of each were seen"
    assert told["Meant for"] == (
        "tiles of 128 and 256 µm a side, as 256 px at 0.5 and 1 µm/px; scaled to the input they are 0.667 and 1.33 µm/px"
    )
    members = {name: {"mpp": [0.25, mpp], "mpp_law": "values"} for name, mpp in (("a", 0.5), ("b", 2.0))}
    assert scales_of({"members": members}) == [0.25, 0.5, 2.0] and scales_of({"members": members | {"c": {}}}) == []
    several = {"tiles": 9, "sizes": [[224, 224, 1.0], [64, 80, 0.5]], "mpp": [0.5, 0.5, 1.0]}
    told = size_and_resolution(several, preprocessing, {})
    assert told["Size of a tile"] == "224 × 224 px at 1 µm/px, 80 × 64 px at 0.5 µm/px"
    assert told["Meant for"] == "tiles of 224 and 32 µm a side"
    told = size_and_resolution(tiles, preprocessing, {"mpp": [0.5, 1.0], "mpp_law": "uniform"})
    assert told["Meant for"].startswith("tiles of 127.7 to 256 µm a side, as 256 px at 0.499 to 1 µm/px; scaled")


def test_a_card_says_where_its_recipe_differs_from_the_published_one_and_names_no_folder_or_host(
    make_tile_run, tmp_path
):
    folder, _ = make_tile_run()
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config |= {"run": "/disk3/ann/runs/secret7", "init": "hf-hub:lab/model"}
    config["data"] |= {"shards": ["/srv/hospital/shards", "s3://bucket/more"], "slide_pattern": "/(?P<slide>[^/]+)/"}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    words = ["tile", "recipe=virchow", "run=/disk3/ann/runs/secret7", "objective.teacher=/disk3/ann/vit.pth"]
    start = {"command": ["pretrain", *words], "host": "node17", "git": "abcdef", "ended_by": "/disk3/ann failed"}
    start["changes"] = {"data.grids": ["/srv/hospital/grids", "grids2"]}
    (folder / "provenance.json").write_text(json.dumps({"starts": [start]}))
    run(Config(str(folder), str(tmp_path / "encoder"), "timm", "mit", []))
    card = (tmp_path / "encoder" / "README.md").read_text()
    assert not re.search("disk3|hospital|bucket|node17", card), card
    assert "| Recipe | virchow, with objective.teacher=vit.pth |" in card and "| Data | shards, more |" in card
    assert "run: secret7" in card and "init: hf-hub:lab/model" in card and "slide_pattern: /(?P<slide>[^/]+)/" in card
    assert "the whole record, with commands and machines, is in the run's folder" in card and "abcdef" in card
    differences = card.partition("## How this recipe differs from the published one")[2].partition("\n## ")[0]
    assert "- Left out: each GPU sees 256 tiles of one slide in a step (S)" in differences
    assert "values aren't known, and our choice:" in differences and "`init`" in differences
    assert 'timm.create_model("local-dir:encoder", pretrained=True)' in card and "Beside the folder encoder:" in card
    assert card.count("mean [0.7, 0.5, 0.6]") == 1 and "mean 0.7" not in card and "0.0 M" not in card


def test_parameters_are_counted_in_the_unit_that_fits():
    assert [parameters_in_words(count) for count in (25_900, 86_600_000, 1_136_000_000)] == [
        "25.9 k",
        "86.6 M",
        "1.14 B",
    ]


def test_an_encoder_without_a_record_says_that_its_resolution_is_unknown(make_tile_run, tmp_path):
    folder, _ = make_tile_run()
    export_timm(folder, tmp_path / "encoder", "mit")
    assert (
        "| Resolution of a tile | not recorded: find out before you use it |"
        in (tmp_path / "encoder" / "README.md").read_text()
    )


ROPE = {"position_embedding": "rope", "norm_epsilon": 1e-5}
TRACED = [
    {},
    {"feed_forward": "swiglu", "feed_forward_width": 40, "registers": 2},
    ROPE | {"qkv_bias": "none", "registers": 4},
    ROPE | {"qkv_bias": "none", "feed_forward": "swiglu", "feed_forward_width": 40},
]


@pytest.mark.parametrize("model", TRACED, ids=str)
def test_a_traced_encoder_gives_the_teachers_features_for_any_number_of_images(make_tile_run, tmp_path, model):
    folder, teacher = make_tile_run(**model)
    exported = export_torchscript(folder, tmp_path / "encoder", "mit")
    assert exported.new and exported.difference <= 1e-4
    loaded = torch.jit.load(str(tmp_path / "encoder" / "encoder.pt"))
    images = torch.from_numpy(rng(1, "check").normal(size=(3, 3, 32, 32))).float()
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), teacher.features(images)[0], atol=1e-5, rtol=1e-4)
    assert json.loads((tmp_path / "encoder" / "config.json").read_text())["mean"] == [0.7, 0.5, 0.6]


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (ROPE | {"qkv_bias": "all"}, "timm's DINOv3 has no biases of keys"),
        (ROPE | {"layer_scale": 0.0}, r"timm's DINOv3 has layer scales, and this run model\.layer_scale=0"),
        (ROPE | {"norm_epsilon": 1e-6}, "timm's DINOv3 has norms of epsilon 1e-05"),
        ({"norm_epsilon": 1e-5}, r"no place for model\.norm_epsilon=1e-05"),
    ],
    ids=str,
)
def test_a_network_that_timm_has_no_place_for_is_not_traced(make_tile_run, tmp_path, model, sentence):
    folder, _ = make_tile_run(**model)
    with pytest.raises(Fault, match=sentence):
        export_torchscript(folder, tmp_path / "encoder", "mit")
    assert not (tmp_path / "encoder").exists()


def test_timms_truncated_ratio_gives_the_exact_hidden_width():
    settings = {"patch_size": 16, "depth": 1, "heads": 1, "feed_forward": "mlp", "registers": 0, "layer_scale": 1.0}
    for width in range(1, 400, 7):
        for hidden in (width - 1 or 1, 3 * width + 1, 8 * width // 3):
            _, arguments = timm_export.timm_format.architecture(
                settings | {"width": width, "feed_forward_width": hidden}, 16
            )
            assert int(width * arguments["mlp_ratio"]) == hidden


def write_slide_run(folder, encoder: nn.Module) -> None:
    folder.mkdir()
    (folder / "config.yaml").write_text("data: {embeddings: embeddings}\n")
    objective = nn.Module()
    objective.encoder = encoder
    checkpoints.save(folder, 1, objective, torch.optim.SGD(objective.parameters(), lr=0.1), {}, keep=0)


def test_an_exported_folder_is_no_run_to_export_from(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(Fault, match="is an exported encoder, and here a run is asked for"):
        run(Config(str(tmp_path), str(tmp_path / "out"), "transformers", "mit", []))


def test_a_slide_encoder_exports_under_the_released_key_names(tmp_path, monkeypatch):
    from models.initialise import initialise
    from models.longnet import LongNet

    settings = {
        "input_width": 8, "width": 32, "depth": 2, "heads": 4, "feed_forward_width": 64, "segment_lengths": [8, 16],
        "dilated_ratios": [1, 2], "dropout": 0.0, "drop_path": 0.0, "compatible": False,
    }  # fmt: skip
    encoder = LongNet(**settings)
    initialise(encoder, 0)
    write_slide_run(tmp_path / "slide", encoder)
    run(Config(str(tmp_path / "slide"), str(tmp_path / "out"), "gigapath", "mit", []))
    released = torch.load(tmp_path / "out" / "slide_encoder.pth", weights_only=True)
    assert list(released) == ["model"]
    assert {"cls_token", "patch_embed.proj.weight", "encoder.layers.0.self_attn.q_proj.weight", "norm.weight"} <= set(
        released["model"]
    )
    fresh = LongNet(**settings)
    fresh.load_state_dict(released["model"], strict=True)
    for name, tensor in encoder.state_dict().items():
        torch.testing.assert_close(fresh.state_dict()[name], tensor, atol=0, rtol=0)
    assert "| Tile encoder | not recorded" in (tmp_path / "out" / "README.md").read_text()

    about = {"encoder": "teacher of runs/tile", "encoder_hash": "abc", "width": 8}
    about |= {"slides": 3, "tiles": 1200, "mpp": [0.5, 0.5], "tile_size": [256]}
    (tmp_path / "slide" / "tile_encoder.json").write_text(json.dumps(about))
    run(Config(str(tmp_path / "slide"), str(tmp_path / "again"), "gigapath", "mit", []))
    card = (tmp_path / "again" / "README.md").read_text()
    assert (
        "| Tile encoder | teacher of tile, of hash abc |" in card
        and "3 slides, 1,200 tiles, in the store embeddings" in card
    )
    assert "| Size of a tile | 256 × 256 px |" in card and "| Resolution of a tile | 0.5 µm/px |" in card
    monkeypatch.setattr(card_of_runs, "load_slide_encoder", lambda *_: types.SimpleNamespace(hash="its own"))
    encoder = {"name": "slide", "hash": "its own"}
    rows = {"mean of tiles": {"auroc": {"value": 0.61, "interval": [0.5, 0.7]}}}
    probe_json = {"rows": rows, "labels": {"slides": 24, "cases": 12}, "measure": "auroc"}
    for number, slide_encoder in enumerate((encoder, encoder | {"hash": "another"})):
        (tmp_path / "slide" / "probe.json").write_text(json.dumps(probe_json | {"slide_encoder": slide_encoder}))
        run(Config(str(tmp_path / "slide"), str(tmp_path / f"judged{number}"), "gigapath", "mit", []))
        card = (tmp_path / f"judged{number}" / "README.md").read_text()
        assert ("| mean of tiles | 0.610 | 0.500 to 0.700 |" in card) == (slide_encoder is encoder)


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("slide_mae.SlideMAE", "predict the frozen embeddings of masked tiles from the visible ones."),
        (
            "slide_pairs.SlidePairs",
            "a hidden tile's embedding from one visible tile, their displacement, and the slide",
        ),
        ("slide_ibot.SlideIBOT", "a student and its moving average compare square crops of a slide's grid"),
        ("slide_context.SlideContext", "from one encoder's visible embeddings to all encoders' hidden ones."),
    ],
)
def test_a_slide_card_says_each_objective_in_its_own_words(target: str, says: str) -> None:
    told = objective_in_words({"_target_": f"pretrain.objectives.{target}"})
    assert f"`{target.partition('.')[2]}`" in told and says in told and "\n" not in told
    assert objective_in_words({"_target_": "theirs.Objective"}) == "Its objective was `Objective`."


def test_a_slide_card_is_true_of_compatible_attention_and_of_tiles_along_a_curve(tmp_path: Path) -> None:
    from models.initialise import initialise
    from models.longnet import LongNet
    from models.token_order import hilbert_index

    settings = {
        "width": 32, "depth": 2, "heads": 4, "feed_forward_width": 64, "segment_lengths": [8, 16],
        "dilated_ratios": [1, 2], "dropout": 0.0, "drop_path": 0.0, "compatible": True, "order": "hilbert",
    }  # fmt: skip
    curved, rows = LongNet(8, **settings).eval(), LongNet(8, **settings | {"order": "rows"}).eval()
    initialise(curved, 0)
    rows.load_state_dict(curved.state_dict())
    write_slide_run(tmp_path / "slide", curved)
    objective = {"_target_": "pretrain.objectives.slide_pairs.SlidePairs", "pairs": 64}
    config = {"data": {"embeddings": "embeddings"}, "model": settings, "objective": objective}
    (tmp_path / "slide" / "config.yaml").write_text(yaml.safe_dump(config))
    run(Config(str(tmp_path / "slide"), str(tmp_path / "out"), "gigapath", "mit", []))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "masked autoencoder" not in card and "| Settings of the objective | pairs=64 |" in card
    assert "`model.compatible=true`" in card and "without attended padding" not in card
    assert "hilbert_index" in card and "row by row." not in card
    published = yaml.safe_load((CONFIGS / "model" / "longnet.yaml").read_text())
    assert "hilbert" not in how_it_is_used(None, {}, "out", published)

    # What the card says of the order: a network that cuts segments from tiles as they come says the same of sorted ones.
    cells = torch.from_numpy(np.argwhere(np.ones((9, 7)))[:, ::-1].copy())
    tiles, order = (
        torch.from_numpy(rng("tiles").normal(size=(63, 8)).astype(np.float32)),
        hilbert_index(cells).argsort(),
    )
    with torch.no_grad():
        ours, theirs = curved(tiles, cells, [63]), rows(tiles[order], cells[order], [63])
        assert not torch.allclose(ours.cls, rows(tiles, cells, [63]).cls, atol=1e-4)
    torch.testing.assert_close(theirs.cls, ours.cls, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(theirs.tiles, ours.tiles[order], atol=1e-5, rtol=1e-5)


def test_a_card_names_gigapaths_architecture_where_it_has_this_one() -> None:
    published = yaml.safe_load((CONFIGS / "model" / "longnet.yaml").read_text())
    shapes = {
        "cls_token": (1, 1, 768), "patch_embed.proj.weight": (768, 1536), "encoder.layers.11.ffn.fc1.weight": (3072, 768),
    }  # fmt: skip
    weights = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    weights |= {f"encoder.layers.{i}.ffn.fc1.weight": torch.empty(3072, 768, device="meta") for i in range(12)}
    name = architecture_of(published, weights)
    assert name == "gigapath_slide_enc12l768d"
    assert 'create_model("out/slide_encoder.pth", "gigapath_slide_enc12l768d", 1536)' in how_it_is_used(
        name, weights, "out", published
    )
    for other in (
        {"heads": 8},
        {"segment_lengths": [1024, 2048, 4096, 8192, 16384]},
        {"dilated_ratios": [1, 2, 4, 8, 8]},
    ):
        assert architecture_of(published | other, weights) is None
    assert "no name for a network of these" in how_it_is_used(None, weights, "out", published)


def test_a_run_of_the_other_stage_and_an_unknown_format_are_refused(make_tile_run, tmp_path):
    folder, _ = make_tile_run()
    with pytest.raises(Fault, match="another kind of run"):
        run(Config(str(folder), str(tmp_path / "out"), "gigapath", "mit", []))
    write_slide_run(tmp_path / "slide", nn.Linear(2, 2))
    with pytest.raises(Fault, match="is a run of 'pretrain slide'"):
        run(Config(str(tmp_path / "slide"), str(tmp_path / "out"), "timm", "mit", []))
    with pytest.raises(
        Fault, match="format=keras is not allowed: it must be timm, transformers, torchscript or gigapath"
    ):
        load("export", [f"checkpoint={folder}", f"out={tmp_path / 'out'}", "format=keras"])
    with pytest.raises(Fault, match=r"^format=onnx: no ONNX is written, .*; format=torchscript is one file"):
        load("export", [f"checkpoint={folder}", f"out={tmp_path / 'out'}", "format=onnx"])
    assert not (tmp_path / "out").exists()
