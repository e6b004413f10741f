"""``pretrain embed stage=slide maps=``: scores are right, and lie in files at their tiles' places."""

import json
from pathlib import Path

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from data.embeddings.slide_features import POOLINGS
from data.embeddings.store import EmbeddingStore, SlideEmbeddings
from data.fault import Fault
from models.attention_rollout import rollout
from models.longnet import LongNet
from models.slide_vit import SlideViT
from pretrain.embedding.poolings import pooled_vectors
from pretrain.embedding.slides import on_the_device
from pretrain.embedding.tile_clusters import clusters_of
from pretrain.encoders.slide_encoders import load_slide_encoder
from pretrain.slide_maps import scores as tile_scores
from tests.data.slides.synthetic_slides import stained, write_slide
from tests.pretrain.embedding.small_slide_run import embed, write_small_run, write_small_store


@pytest.mark.parametrize("kind", [LongNet, SlideViT])
def test_gradient_times_input_is_the_slope_of_the_score_as_a_tile_grows(tmp_path: Path, monkeypatch, kind) -> None:
    def precise(batch: list[SlideEmbeddings], device: torch.device):
        x, cells, lengths = on_the_device(batch, device)
        return x.double(), cells, lengths

    monkeypatch.setattr(tile_scores, "on_the_device", precise)
    store = EmbeddingStore.open(write_small_store(tmp_path))
    write_small_run(tmp_path, kind)
    encoder, slide = load_slide_encoder(str(tmp_path / "slide"), "cpu"), store.read("s2")
    encoder.network.double()
    clusters = clusters_of(store, ["s0", "s2"], 0)
    x, cells, lengths = precise([slide], encoder.device)

    def vector(tiles: torch.Tensor, pooling: str) -> torch.Tensor:
        with torch.no_grad():
            seen = encoder.network(tiles, cells, lengths, all_layers=True)
            return pooled_vectors(x, lengths, seen, clusters)[pooling][0]  # tiles stay in their clusters

    for pooling in POOLINGS:
        own = vector(x, pooling)
        for direction in (None, np.cos(np.arange(len(own)))):
            (found,) = tile_scores.by_gradient(encoder, [slide], pooling, clusters, direction)
            along = own / own.norm() if direction is None else torch.from_numpy(direction)
            for tile in (0, 7, 24):
                step = torch.ones(len(x), 1, dtype=torch.float64)
                step[tile] += 1e-5
                more, less = vector(x * step, pooling) @ along, vector(x * (2 - step), pooling) @ along
                assert found[tile] == pytest.approx(float(more - less) / 2e-5, rel=1e-4, abs=1e-6)


def test_files_hold_the_scores_at_their_tiles_and_only_what_is_absent_is_made(tmp_path: Path, capsys) -> None:
    store, network = EmbeddingStore.open(write_small_store(tmp_path)), write_small_run(tmp_path)
    write_slide(tmp_path / "s0.tiff", stained(1400, 2400, [(400, 400, 300)]), mpp=0.5)
    given = ["maps=rollout", f"slides=[{tmp_path / 's0.tiff'}]", "pooling=cls"]
    embed(tmp_path, *given, out="maps")
    table = pq.read_table(tmp_path / "maps" / "parquet")
    assert set(table["slide"].to_pylist()) == {"s0", "s1", "s2", "s4"}
    for slide in ("s0", "s1"):
        tiles = store.read(slide)
        x, cells, lengths = on_the_device([tiles], torch.device("cpu"))
        expected = rollout(network, x, cells, lengths, of_class=True).numpy() * len(x)
        found = table.filter(np.array(table["slide"]) == slide)
        places = np.stack([found["x"].to_numpy(), found["y"].to_numpy()], 1)
        np.testing.assert_array_equal(places, tiles.coordinates)
        np.testing.assert_allclose(found["score"].to_numpy(), expected, rtol=1e-5)
        with h5py.File(tmp_path / "maps" / "h5" / f"{slide}.h5") as file:
            np.testing.assert_array_equal(file["coords"][:], tiles.coordinates)
            np.testing.assert_allclose(file["scores"][:], expected, rtol=1e-5)
            assert file.attrs["maps"] == "rollout"
        shapes = json.loads((tmp_path / "maps" / "geojson" / f"{slide}.geojson").read_text())
        assert shapes["type"] == "FeatureCollection" and len(shapes["features"]) == len(x)
        best = shapes["features"][int(expected.argmax())]
        left, top = tiles.coordinates[int(expected.argmax())].tolist()
        ring = best["geometry"]["coordinates"][0]
        assert ring[0] == ring[-1] == [left, top] and ring[2] == [left + 256.0, top + 256.0]
        assert best["properties"]["measurements"]["score"] == pytest.approx(expected.max(), rel=1e-5)
        assert best["properties"]["color"] == [252, 254, 164]  # inferno's lightest
    over, white = (Image.open(tmp_path / "maps" / "png" / f"{slide}.png") for slide in ("s0", "s1"))
    assert over.size == (2048, 1195) and white.size == (1792, 256)
    assert over.getpixel((40, 40)) != over.getpixel((2040, 1190))
    (tmp_path / "maps" / "parquet" / "s1.parquet").unlink()
    embed(tmp_path, *given, out="maps")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["new_slides"] == 1
    embed(tmp_path, "merge=true", out="maps")
    said = capsys.readouterr()
    assert json.loads(said.out.splitlines()[-1])["slides"] == 4 and "which need no merging" in said.err


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    write_small_store(tmp_path), write_small_run(tmp_path)
    np.save(tmp_path / "short.npy", np.ones(5))
    embed(tmp_path, out="vectors")
    for words, said in (
        (
            ["maps=gradient", f"direction={tmp_path / 'short.npy'}", f"clusters={tmp_path / 'vectors'}"],
            "has 5 numbers, and vectors of pooling=cluster_moments are 576",
        ),
        (["maps=gradient", f"direction={tmp_path / 'none.npy'}", "pooling=cls"], "can't be read"),
        (
            ["maps=rollout", f"direction={tmp_path / 'short.npy'}"],
            "direction= is for maps=gradient and maps=sensitivity: a rollout has none",
        ),
        (["maps=rollout", "per_tile=true"], "leave one of them out"),
        (["export=[trident]"], "goes with per_tile=true"),
        ([f"direction={tmp_path / 'short.npy'}"], "is for maps=gradient and maps=sensitivity: give one of them, or"),
        (["slides=[a.svs]"], "slides= has no effect there"),
    ):
        with pytest.raises(Fault, match=said):
            embed(tmp_path, *words)
    embed(tmp_path, "maps=gradient", out="maps")
    with pytest.raises(Fault, match="maps=gradient, not maps=rollout: choose another folder"):
        embed(tmp_path, "maps=rollout", out="maps")
