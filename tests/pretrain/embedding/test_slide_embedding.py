"""``pretrain embed stage=slide``: each slide's own embedding, however slides are packed, beside the mean of its
tiles."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from data.embeddings.slide_features import SLIDE_VECTORS, gather_pieces, read_slide_features
from data.embeddings.store import EmbeddingStore, EmbeddingWriter
from data.fault import Fault
from models.longnet import LongNet
from pretrain.commands.embed import run
from pretrain.settings.composition import load
from tests.pretrain.embedding.small_slide_run import WIDTH, composed, embed, write_small_run, write_small_store


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return write_small_store(tmp_path)


@pytest.fixture
def encoder(tmp_path: Path) -> LongNet:
    """The encoder of a slide run in ``tmp_path/slide``."""
    return write_small_run(tmp_path)


def of_clusters(tiles: np.ndarray, outputs: np.ndarray, out: Path) -> tuple[np.ndarray, np.ndarray]:
    """Means of outputs whose tiles are nearest to each of the kept centres; and mean and spread of all, then each
    cluster's part in the mean and in the variance."""
    centres = np.array(json.loads((out / "clusters.json").read_text())["centres"])
    nearest = np.linalg.norm(tiles.astype(np.float64)[:, None] - centres, axis=-1).argmin(1)
    parts = [outputs[nearest == one] for one in range(len(centres))]
    means = [part.mean(0) if len(part) else outputs.mean(0) for part in parts]
    inside = [np.square(part - mean).sum(0) / len(outputs) for part, mean in zip(parts, means, strict=True)]
    moments = [outputs.mean(0), outputs.std(0), *(part.sum(0) / len(outputs) for part in parts), *np.sqrt(inside)]
    return np.concatenate(means), np.concatenate(moments)


@pytest.mark.parametrize("tokens", [1, 50, 1000])
def test_each_slide_has_its_own_embedding_whatever_it_is_packed_with(store, encoder, tmp_path, capsys, tokens):
    embed(tmp_path, f"tokens={tokens}")
    slides, found = read_slide_features(tmp_path / "out")
    assert slides == ["s0", "s1", "s2", "s4"]  # s3 has no tissue
    for row, slide in enumerate(slides):
        tiles = EmbeddingStore.open(store).read(slide)
        x = torch.from_numpy(tiles.embeddings.astype(np.float32))
        with torch.inference_mode():
            alone = encoder(x, torch.from_numpy(tiles.cells), [len(x)], all_layers=True)
        means, moments = of_clusters(tiles.embeddings, alone.tiles.numpy(), tmp_path / "out")
        expected = {
            "mean_tiles": x.mean(0),
            "pooled": alone.pooled,
            "mean_std": np.concatenate([alone.tiles.numpy().mean(0), alone.tiles.numpy().std(0)]),
            "cluster_means": means,
            "cluster_moments": moments,
            "cls": alone.cls,
            "pooled_layers": alone.pooled_layers.flatten(),
            "cls_layers": alone.cls_layers.flatten(),
        }
        for kind in SLIDE_VECTORS:
            of = "cluster_moments" if kind == "vector" else kind
            np.testing.assert_allclose(found[kind][row], np.asarray(expected[of]).ravel(), atol=2e-6)
    assert found["pooled_layers"].shape == (4, 3 * 32) and found["cluster_means"].shape == (4, 8 * 32)
    said = capsys.readouterr()
    assert "fields of 8 × 8" in said.err and json.loads(said.out.splitlines()[-1])["new_slides"] == 4


def test_it_goes_on_where_it_stopped_and_parts_hold_what_one_process_writes(store, encoder, tmp_path, capsys):
    embed(tmp_path)
    embed(tmp_path, "part=2/2", out="parts")
    with pytest.raises(Fault, match=r"1 of the 2 parts of .* the first of them part=1/2: run that task again"):
        run(replace(composed(), out=str(tmp_path / "parts"), merge=True))
    for part in (1, 1):
        embed(tmp_path, f"part={part}/2", out="parts")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["new_slides"] == 0
    same(tmp_path / "out", tmp_path / "parts")
    for _ in range(2):
        run(replace(composed(), out=str(tmp_path / "parts"), merge=True))
        same(tmp_path / "out", tmp_path / "parts")
    assert not list((tmp_path / "parts" / "pieces").iterdir())
    written = (tmp_path / "out" / "slides.parquet").stat()
    embed(tmp_path)
    assert (tmp_path / "out" / "slides.parquet").stat().st_mtime_ns == written.st_mtime_ns


def same(one: Path, other: Path) -> None:
    (slides, vectors), (others, theirs) = read_slide_features(one), read_slide_features(other)
    assert slides == others
    for kind in SLIDE_VECTORS:
        np.testing.assert_allclose(vectors[kind], theirs[kind], atol=2e-6)


def test_a_kill_between_writing_all_rows_and_removing_pieces_leaves_each_slide_once(
    store, encoder, tmp_path, monkeypatch
):
    embed(tmp_path)
    embed(tmp_path, "part=1/2", out="parts")
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        unlink = Path.unlink

        def stop(path: Path, missing_ok: bool = False) -> None:
            if path.suffix == ".parquet":
                raise KeyboardInterrupt
            unlink(path, missing_ok)

        killed.setattr(Path, "unlink", stop)
        gather_pieces(tmp_path / "parts", {})
    embed(tmp_path, "part=2/2", out="parts")
    same(tmp_path / "out", tmp_path / "parts")
    assert gather_pieces(tmp_path / "parts", {}) == 4
    assert pq.read_table(tmp_path / "parts" / "slides.parquet").num_rows == 4


def test_one_file_says_the_patients_and_which_encoder_made_it(store, encoder, tmp_path):
    (tmp_path / "labels.csv").write_text("slide_id,case_id,label\ns0.svs,A,1\ns1,B,0\nother,C,1\n")
    embed(tmp_path, f"patients={tmp_path / 'labels.csv'}", "pooling=cls")
    table = pq.read_table(tmp_path / "out" / "slides.parquet")
    assert dict(zip(table["slide"].to_pylist(), table["patient"].to_pylist(), strict=True)) == {
        "s0": "A", "s1": "B", "s2": None, "s4": None
    }  # fmt: skip
    assert table["vector"].equals(table["cls"])
    about = json.loads(table.schema.metadata[b"slidewright"])
    assert about["encoder_hash"].endswith(" on abc, float32") and about["pooling"] == "cls"
    (tmp_path / "more.csv").write_text("slide,patient\ns2,D\n")
    embed(tmp_path, f"patients={tmp_path / 'more.csv'}", "pooling=cls")
    patients = pq.read_table(tmp_path / "out" / "slides.parquet")["patient"].to_pylist()
    assert patients == ["A", "B", "D", None]  # those known before stay known
    with pytest.raises(Fault, match="pooling=cls, not pooling=cluster_moments: choose another folder"):
        embed(tmp_path)
    (tmp_path / "bad.csv").write_text("slide,label\ns0,1\n")
    with pytest.raises(Fault, match="needs slide and patient"):
        embed(tmp_path, f"patients={tmp_path / 'bad.csv'}", "pooling=cls")
    with pytest.raises(Fault, match="give it with merge=true"):
        embed(tmp_path, "part=1/2", f"patients={tmp_path / 'more.csv'}", out="parts")


def test_clusters_are_taken_over_from_another_folder_or_refused(store, encoder, tmp_path):
    embed(tmp_path)
    with EmbeddingWriter(tmp_path / "others", WIDTH, "tile encoder", "abc") as writer:
        found = EmbeddingStore.open(store).read("s4")
        writer.add("new", np.array(found.embeddings), found.coordinates, 256.0, 0.5)
    again = [f"embeddings={tmp_path / 'others'}", f"clusters={tmp_path / 'out'}"]
    embed(tmp_path, *again, out="new")
    (_, one), (_, other) = read_slide_features(tmp_path / "out"), read_slide_features(tmp_path / "new")
    np.testing.assert_allclose(one["cluster_means"][3], other["cluster_means"][0], atol=2e-6)
    embed(tmp_path, f"embeddings={tmp_path / 'others'}", out="own")
    with pytest.raises(Fault, match="has other clusters than clusters="):
        embed(tmp_path, f"clusters={tmp_path / 'own'}", out="new")  # though nothing is left to embed
    with pytest.raises(Fault, match="has clusters that seed=0 drew, not seed=1: give the former"):
        embed(tmp_path, "seed=1")
    embed(tmp_path, *again[:1], "seed=1", out="new")  # those were taken over
    (tmp_path / "new" / "clusters.json").write_text('{"tile_encoder_hash": "other", "centres": []}')
    with pytest.raises(Fault, match="clusters of another tile encoder's"):
        embed(tmp_path, f"clusters={tmp_path / 'new'}", out="newest")


def test_random_weights_are_the_seeds_and_no_identity(store, encoder, tmp_path):
    for out, words in {"one": [], "same": [], "other": ["seed=1"]}.items():
        embed(tmp_path, "random=true", *words, out=out)
    found = {name: read_slide_features(tmp_path / name)[1] for name in ("one", "same", "other")}
    assert np.array_equal(found["one"]["vector"], found["same"]["vector"])
    assert not np.allclose(found["one"]["vector"], found["other"]["vector"], atol=1e-3)
    layers = found["one"]["pooled_layers"].reshape(4, 3, 32)
    assert np.linalg.norm(layers[:, -1] - layers[:, 0]) > 0.5 * np.linalg.norm(layers[:, 0])
    about = json.loads((tmp_path / "one" / "slide_store.json").read_text())
    assert "random weights, seed 0" in about["encoder"]
    with pytest.raises(Fault, match="random= has no effect"):
        run(load("embed", ["slides=s", "checkpoint=c", "out=o", "random=true"]).object())


def test_embeddings_of_another_tile_encoder_or_slide_encoder_are_refused(store, encoder, tmp_path):
    embed(tmp_path)
    (tmp_path / "slide" / "tile_encoder.json").write_text(json.dumps({"encoder_hash": "other"}))
    with pytest.raises(Fault, match="another tile encoder"):
        embed(tmp_path, out="new")
    (tmp_path / "slide" / "tile_encoder.json").unlink()
    with pytest.raises(Fault, match="choose another folder"):
        embed(tmp_path, "precision=bfloat16")
    with pytest.raises(Fault, match="no slide encoder"):
        embed(tmp_path, checkpoint="nowhere")


def test_a_released_file_is_read_in_the_compatible_mode_and_another_size_is_refused(store, encoder, tmp_path, capsys):
    settings = yaml.safe_load((Path(__file__).parents[3] / "configs" / "model" / "longnet.yaml").read_text())
    settings.pop("_target_")
    released = LongNet(WIDTH, **settings | {"feed_forward_width": 64}).eval()
    torch.save({"model": released.state_dict()}, tmp_path / "slide_encoder.pth")
    embed(tmp_path, checkpoint="slide_encoder.pth")
    assert "compatible" in capsys.readouterr().err
    released.encoder.set_compatible(True)
    tiles = EmbeddingStore.open(store).read("s0")
    with torch.inference_mode():
        expected = released(torch.from_numpy(tiles.embeddings.astype(np.float32)), torch.from_numpy(tiles.cells), [40])
    found = read_slide_features(tmp_path / "out")[1]
    np.testing.assert_allclose(found["pooled"][0], expected.pooled[0].numpy(), atol=2e-5)
    torch.save({"model": encoder.state_dict()}, tmp_path / "small.pth")
    with pytest.raises(Fault, match="give the run"):
        embed(tmp_path, checkpoint="small.pth")
    (tmp_path / "other.pth").write_bytes(b"no weights")
    with pytest.raises(Fault, match="can't be read as weights"):
        embed(tmp_path, checkpoint="other.pth")


def test_tiles_in_context_are_a_store_like_the_one_they_are_of(store, encoder, tmp_path, capsys):
    embed(tmp_path, "per_tile=true", "tokens=50")
    plain, found = EmbeddingStore.open(store), EmbeddingStore.open(tmp_path / "out")
    assert found.slides == plain.slides and found.width == 32
    assert found.encoder == "slide (step-00000003) over tile encoder" and found.encoder_hash.endswith("on abc, float32")
    for slide in plain.slides:
        tiles, ours = plain.read(slide), found.read(slide)
        np.testing.assert_array_equal(ours.coordinates, tiles.coordinates)
        assert (ours.tile_size_level0, ours.mpp) == (256.0, 0.5)
        if len(tiles.embeddings):
            x = torch.from_numpy(tiles.embeddings.astype(np.float32))
            with torch.inference_mode():
                expected = encoder(x, torch.from_numpy(tiles.cells), [len(x)]).tiles
            np.testing.assert_allclose(ours.embeddings, expected.numpy(), rtol=2e-3, atol=1e-3)
    embed(tmp_path, "per_tile=true")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["new_slides"] == 0
    for part in (1, 2):
        embed(tmp_path, "per_tile=true", f"part={part}/2", out="parts")
    run(replace(composed(), out=str(tmp_path / "parts"), merge=True))
    assert EmbeddingStore.open(tmp_path / "parts").digest == found.digest
    with pytest.raises(Fault, match="choose another folder"):
        embed(tmp_path, "per_tile=true", out="store")  # over its own input
