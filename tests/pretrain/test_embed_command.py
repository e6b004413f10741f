"""Slides become sequences of embeddings, once each, whatever interrupts."""

import dataclasses

import h5py
import numpy as np
import pytest
import simplejpeg

from data.embeddings import EmbeddingStore, EmbeddingWriter
from data.fault import Fault
from data.shard_index import ShardIndex, read_jpeg
from pretrain.commands import embed
from pretrain.commands.embed import Config, embed_slides, run
from pretrain.encoders import load_encoder


def settings(checkpoint, shards, out, **changes) -> Config:
    config = Config(str(checkpoint), str(shards), str(out), False, 5, 2, 0.001, "cpu", "float32")
    return dataclasses.replace(config, **changes)


def contents(out) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    store = EmbeddingStore.open(out)
    return {slide: (np.array(store.read(slide).embeddings), store.read(slide).coordinates) for slide in store.slides}


def test_every_tile_is_embedded_once_at_its_own_place(make_tile_run, shards, tmp_path):
    folder, _ = make_tile_run()
    run(settings(folder, shards, tmp_path / "out"))
    encoder, index = load_encoder(str(folder), device="cpu"), ShardIndex.open(shards)
    found = contents(tmp_path / "out")
    assert {slide: len(rows) for slide, (rows, _) in found.items()} == {"slide0": 12, "slide1": 12}
    for row in range(len(index)):  # tile by tile, without batches
        with index.path(int(index.file[row])).open("rb") as tar:
            pixels = simplejpeg.decode_jpeg(read_jpeg(tar.fileno(), int(index.offset[row]), int(index.length[row])))
        embeddings, coordinates = found[index.slides[index.slide[row]]]
        (place,) = np.flatnonzero((coordinates == [index.x[row], index.y[row]]).all(axis=1))
        np.testing.assert_allclose(embeddings[place], encoder.embed_each([pixels])[0], atol=4e-3)
    assert len(np.unique(found["slide0"][0], axis=0)) == 12


def test_the_batch_size_and_the_number_of_threads_change_nothing(make_tile_run, shards, tmp_path):
    folder, _ = make_tile_run()
    run(settings(folder, shards, tmp_path / "a", batch=24, threads=1))
    run(settings(folder, shards, tmp_path / "b", batch=7, threads=4))
    for (one, where), (other, there) in zip(
        contents(tmp_path / "a").values(), contents(tmp_path / "b").values(), strict=True
    ):
        np.testing.assert_array_equal(where, there)
        np.testing.assert_allclose(one.astype(np.float32), other.astype(np.float32), atol=2e-3)


class Killed(Exception):
    pass


def test_an_interrupted_command_goes_on_with_the_first_slide_that_is_not_whole(make_tile_run, shards, tmp_path, index):
    folder, _ = make_tile_run()
    run(settings(folder, shards, tmp_path / "whole"))
    encoder = load_encoder(str(folder), device="cpu")
    config = settings(folder, shards, tmp_path / "out", batch=4)
    calls = []

    def dies_in_the_second_slide(tiles):
        calls.append(len(tiles))
        if sum(calls) > 16:
            raise Killed
        return encoder.embed_each(tiles)

    with pytest.raises(Killed), EmbeddingWriter(tmp_path / "out", encoder.width, encoder.name, encoder.hash) as writer:
        embed_slides(dies_in_the_second_slide, encoder.width, index, [0, 1], writer, config)
    assert EmbeddingStore.open(tmp_path / "out").slides == ["slide0"]
    run(config)
    for (one, where), (other, there) in zip(
        contents(tmp_path / "whole").values(), contents(tmp_path / "out").values(), strict=True
    ):
        np.testing.assert_array_equal(where, there)
        np.testing.assert_allclose(one.astype(np.float32), other.astype(np.float32), atol=2e-3)


def test_a_second_run_computes_nothing_and_says_so(make_tile_run, shards, tmp_path, capsys, monkeypatch):
    folder, _ = make_tile_run()
    run(settings(folder, shards, tmp_path / "out"))
    monkeypatch.setattr(embed, "embed_slides", lambda *_: pytest.fail("embedded again"))
    capsys.readouterr()
    run(settings(folder, shards, tmp_path / "out"))
    assert "nothing to do" in capsys.readouterr().err


def test_another_encoder_cannot_write_into_the_same_store(make_tile_run, shards, tmp_path):
    run(settings(make_tile_run()[0], shards, tmp_path / "out"))
    with pytest.raises(Fault, match="choose another folder"):
        run(settings(make_tile_run("other", seed=1)[0], shards, tmp_path / "out"))


def spoil(index: ShardIndex, row: int) -> None:
    with index.path(int(index.file[row])).open("r+b") as tar:
        tar.seek(int(index.offset[row]))
        tar.write(bytes(int(index.length[row])))


def test_an_undecodable_tile_is_named_and_stops_the_command_beyond_the_allowed_share(
    make_tile_run, shards, tmp_path, index, capsys
):
    folder, _ = make_tile_run()
    spoil(index, 3)
    with pytest.raises(Fault, match=r"1 of 12 tiles of slide0 .* max_bad_fraction=0\.0833"):
        run(settings(folder, shards, tmp_path / "out"))
    run(settings(folder, shards, tmp_path / "out", max_bad_fraction=0.1))
    said = capsys.readouterr().err
    assert f"({index.x[3]}, {index.y[3]}) in {index.path(0)}" in said
    embeddings, coordinates = contents(tmp_path / "out")["slide0"]
    assert len(embeddings) == 11 and [index.x[3], index.y[3]] not in coordinates.tolist()


def test_a_truncated_shard_is_an_error_that_names_it(make_tile_run, shards, tmp_path, index):
    folder, _ = make_tile_run()
    with index.path(1).open("r+b") as tar:
        tar.truncate(int(index.offset[-1]) + 10)
    with pytest.raises(Fault, match="of slide1"):
        run(settings(folder, shards, tmp_path / "out"))


def test_h5_files_hold_what_the_store_holds_in_the_layout_of_trident(make_tile_run, shards, tmp_path):
    folder, _ = make_tile_run()
    run(settings(folder, shards, tmp_path / "out"))
    run(settings(folder, shards, tmp_path / "out", h5=True))  # asked for later: written without embedding again
    embeddings, coordinates = contents(tmp_path / "out")["slide1"]
    with h5py.File(tmp_path / "out" / "h5" / "slide1.h5") as file:
        np.testing.assert_array_equal(file["features"][()], embeddings.astype(np.float32))
        np.testing.assert_array_equal(file["coords"][()], coordinates)
        assert file["coords"].attrs["patch_size_level0"] == 40
