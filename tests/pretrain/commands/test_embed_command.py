"""Slides become sequences of embeddings, once each, from shards or from the slides, whatever interrupts."""

import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import simplejpeg
import torch

from data.embeddings.sources import ShardSource, slides_of_part
from data.embeddings.store import EmbeddingStore, EmbeddingWriter
from data.fault import Fault
from data.keyed import rng
from data.shards.index import ShardIndex, read_jpeg
from data.shards.scan import scan
from launch.entry import run_command_line
from pretrain.commands import shard
from pretrain.commands.embed import Config, run
from pretrain.embedding import tiles as tile_embedding
from pretrain.encoders.loading import load_encoder
from pretrain.settings.composition import load
from tests.data.shards.tars import tile_members, write_tar
from tests.data.slides.synthetic_slides import stained, write_slide
from tests.pretrain.conftest import tile_pixels


def settings(checkpoint, shards, out, *overrides: str) -> Config:
    given = [f"shards={shards}"] if shards else []
    words = [f"checkpoint={checkpoint}", *given, f"out={out}", "batch=5", "threads=2", "device=cpu", *overrides]
    return load("embed", words).object()


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
    run(settings(folder, shards, tmp_path / "a", "batch=24", "threads=1"))
    run(settings(folder, shards, tmp_path / "b", "batch=7", "threads=4"))
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
    calls = []

    def dies_in_the_second_slide(tiles):
        calls.append(len(tiles))
        if sum(calls) > 16:
            raise Killed
        return encoder.start(tiles)

    with pytest.raises(Killed), EmbeddingWriter(tmp_path / "out", encoder.width, encoder.name, encoder.hash) as writer:
        tile_embedding.embed_slides(
            dies_in_the_second_slide,
            ShardSource([str(shards)]),
            ["slide0", "slide1"],
            writer,
            batch=4,
            threads=2,
            max_bad_fraction=0,
            pin=False,
            done=0,
        )
    assert EmbeddingStore.open(tmp_path / "out").slides == ["slide0"]
    run(settings(folder, shards, tmp_path / "out", "batch=4"))
    for (one, where), (other, there) in zip(
        contents(tmp_path / "whole").values(), contents(tmp_path / "out").values(), strict=True
    ):
        np.testing.assert_array_equal(where, there)
        np.testing.assert_allclose(one.astype(np.float32), other.astype(np.float32), atol=2e-3)


def test_a_second_run_computes_nothing_and_says_so(make_tile_run, shards, tmp_path, capsys, monkeypatch):
    folder, _ = make_tile_run()
    run(settings(folder, shards, tmp_path / "out"))
    monkeypatch.setattr(tile_embedding, "embed_slides", lambda *_, **__: pytest.fail("embedded again"))
    capsys.readouterr()
    run(settings(folder, shards, tmp_path / "out"))
    said = capsys.readouterr()
    assert "nothing to do" in said.err
    facts = json.loads(said.out.splitlines()[-1])
    assert (facts["slides"], facts["tiles"], facts["new_slides"], facts["failed"]) == (2, 24, 0, {})


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
    run(settings(folder, shards, tmp_path / "out", "max_bad_fraction=0.1"))
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


def test_exports_are_written_also_when_asked_for_later(make_tile_run, shards, tmp_path):
    folder, _ = make_tile_run()
    run(settings(folder, shards, tmp_path / "out"))
    run(settings(folder, shards, tmp_path / "out", "export=[trident,clam,stamp]"))
    embeddings, coordinates = contents(tmp_path / "out")["slide1"]
    with h5py.File(tmp_path / "out" / "trident" / "slide1.h5") as file:
        np.testing.assert_array_equal(file["features"][()], embeddings.astype(np.float32))
        np.testing.assert_array_equal(file["coords"][()], coordinates)
        assert file["coords"].attrs["patch_size_level0"] == 40
    for kind in ("trident", "clam", "stamp"):
        out = tmp_path / f"from {kind}"
        run(load("embed", [f"features='{tmp_path / 'out' / kind}'", f"out='{out}'"]).object())
        assert EmbeddingStore.open(out).encoder_hash == EmbeddingStore.open(tmp_path / "out").encoder_hash
        for (one, where), (other, there) in zip(
            contents(tmp_path / "out").values(), contents(out).values(), strict=True
        ):
            np.testing.assert_array_equal(one, other)
            np.testing.assert_array_equal(where, there)


@pytest.fixture
def slides(tmp_path: Path) -> Path:
    """Three slides with tissue, of which one needs resampling, one without any, and a file that is no slide."""
    folder = tmp_path / "slides"
    write_slide(folder / "one.tiff", stained(400, 500, [(180, 170, 150)]), 0.5, levels=2)
    write_slide(folder / "two.tiff", stained(600, 500, [(200, 300, 160), (420, 120, 60)], seed=1), 0.4)
    write_slide(folder / "three.tiff", stained(300, 300, [(150, 150, 120)], seed=2), 0.5)
    write_slide(folder / "glass.tiff", stained(300, 300, []), 0.5)
    (folder / "broken.svs").write_bytes(b"no slide")
    return folder


def direct(folder, slides, out, *overrides: str) -> Config:
    return settings(folder, None, out, f"slides='{slides}'", "tile_size=40", *overrides)


def test_slides_read_directly_give_the_tiles_that_their_shards_hold(make_tile_run, slides, tmp_path, capsys):
    folder, _ = make_tile_run()
    with pytest.raises(Fault, match=r"a slide was left out.*broken\.svs"):
        run(direct(folder, slides, tmp_path / "direct"))
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert facts["slides"] == 4 and list(facts["failed"]) == ["broken"]
    (slides / "broken.svs").unlink()
    run(direct(folder, slides, tmp_path / "direct"))  # and the others are remembered, the empty one too
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["new_slides"] == 0
    shard.run(load("shard", [f"slides='{slides}'", f"out='{tmp_path / 'cut'}'", "tile_size=40", "workers=1"]).object())
    run(settings(folder, tmp_path / "cut", tmp_path / "through shards"))
    found, expected = contents(tmp_path / "direct"), contents(tmp_path / "through shards")
    assert len(found.pop("glass")[0]) == 0 and found.keys() == expected.keys() == {"one", "two", "three"}
    for slide in found:
        (one, where), (other, there) = found[slide], expected[slide]
        np.testing.assert_array_equal(where, there)
        assert len(where) > 8
        cosine = (
            (one * other).sum(1)
            / np.linalg.norm(one.astype(float), axis=1)
            / np.linalg.norm(other.astype(float), axis=1)
        )
        assert cosine.min() > 0.98  # they differ by JPEG compression


def test_an_embedding_of_a_slide_read_directly_is_that_of_its_pixels(make_tile_run, slides, tmp_path):
    folder, _ = make_tile_run()
    run(direct(folder, slides / "one.tiff", tmp_path / "out", "max_bad_fraction=0"))
    pixels = stained(400, 500, [(180, 170, 150)])
    encoder = load_encoder(str(folder), device="cpu")
    embeddings, coordinates = contents(tmp_path / "out")["one"]
    for vector, (x, y) in zip(embeddings, coordinates, strict=True):
        np.testing.assert_allclose(vector, encoder.embed_each([pixels[y : y + 40, x : x + 40]])[0], atol=4e-3)


def test_the_tasks_of_a_job_array_share_the_slides_and_merge_to_what_one_process_writes(
    make_tile_run, slides, tmp_path, capsys
):
    folder, _ = make_tile_run()
    (slides / "broken.svs").unlink()
    run(direct(folder, slides, tmp_path / "one"))
    for part in (3, 1):
        run(direct(folder, slides, tmp_path / "parts", f"part={part}/3"))
    merging = load("embed", [f"out='{tmp_path / 'parts'}'", "merge=true"]).object()
    with pytest.raises(Fault, match="part=2/3"):
        run(merging)
    run(direct(folder, slides, tmp_path / "parts", "part=2/3"))
    capsys.readouterr()
    run(merging)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["slides"] == 4
    assert EmbeddingStore.open(tmp_path / "one").digest == EmbeddingStore.open(tmp_path / "parts").digest
    for (one, where), (other, there) in zip(
        contents(tmp_path / "one").values(), contents(tmp_path / "parts").values(), strict=True
    ):
        np.testing.assert_array_equal(where, there)
        np.testing.assert_allclose(one.astype(np.float32), other.astype(np.float32), atol=2e-3)
    run(direct(folder, slides, tmp_path / "parts", "part=2/3"))
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["new_slides"] == 0


def test_shares_are_disjoint_complete_and_of_about_the_same_size(shards):
    source = ShardSource([str(shards)])
    source.slides = [f"s{i:03d}" for i in range(100)]
    source.sizes = [int(size) for size in rng(0).pareto(1.5, 100) * 1000 + 10]
    parts = [slides_of_part(source, part, 7) for part in range(1, 8)]
    assert sorted(slide for part in parts for slide in part) == source.slides
    loads = [sum(source.sizes[source.slides.index(slide)] for slide in part) for part in parts]
    assert max(loads) <= max(max(source.sizes), 1.1 * sum(loads) / 7)


def test_features_of_another_encoder_or_of_none_known_are_not_mixed_in(tmp_path, capsys):
    for name in ("uni", "virchow"):
        (tmp_path / name).mkdir()
        with h5py.File(tmp_path / name / f"{name}.h5", "w") as file:
            file["feats"], file["coords"] = np.ones((3, 8), np.float16), np.arange(6.0).reshape(3, 2) * 256
            file.attrs.update({"unit": "um", "tile_size_um": 256.0, "tile_size_px": 224, "extractor": name})

    def importing(name: str, *words: str) -> Config:
        return load(
            "embed", [f"features={tmp_path / name}", f"out={tmp_path / 'out'}", "slides_mpp=0.5", *words]
        ).object()

    run(importing("uni"))
    for words in ((), ("encoder=uni",)):
        with pytest.raises(Fault, match="another"):
            run(importing("virchow", *words))
    assert EmbeddingStore.open(tmp_path / "out").slides == ["uni"]
    with h5py.File(tmp_path / "virchow" / "virchow.h5", "a") as file:
        del file.attrs["extractor"]
    with pytest.raises(Fault, match="encoder=…"):
        run(importing("virchow"))


def test_features_of_the_same_name_and_another_hash_are_left_out_and_a_damaged_first_file_costs_only_itself(tmp_path):
    folder = tmp_path / "features"
    folder.mkdir()
    (folder / "a.h5").write_bytes(b"no h5")
    for slide, hash_ in (("b", "one"), ("c", "two"), ("d", "one")):
        with h5py.File(folder / f"{slide}.h5", "w") as file:
            file.create_dataset("features", data=np.ones((3, 4), np.float32)).attrs.update(
                {"encoder": "vit", "encoder_hash": hash_}
            )
            coords = file.create_dataset("coords", data=np.arange(3)[:, None] * [[512, 0]])
            coords.attrs.update({"patch_size": 256, "patch_size_level0": 512, "mpp": 0.5})
    with pytest.raises(Fault, match="2 "):
        run(load("embed", [f"features={folder}", f"out={tmp_path / 'out'}"]).object())
    store = EmbeddingStore.open(tmp_path / "out")
    assert (store.slides, store.encoder_hash) == (["b", "d"], "one")


def test_bad_feature_files_and_rows_cost_nothing_else_and_every_slides_result_is_in_the_summary(tmp_path, capsys):
    folder = tmp_path / "features"
    folder.mkdir()
    places = np.arange(20)[:, None] * [[512, 0]]
    for slide in ("fine", "one", "many", "empty", "zero", "words"):
        values = np.ones((20, 4), np.float32)
        values[: {"one": 1, "many": 3}.get(slide, 0)] = np.nan
        with h5py.File(folder / f"{slide}.h5", "w") as file:
            file["features"] = values if slide != "empty" else np.zeros(0)
            file["coords"] = places if slide != "empty" else np.zeros(0)
            said = {
                "patch_size": 256,
                "patch_size_level0": 512,
                "target_magnification": {"zero": 0, "words": "fast"}.get(slide, "20x"),
            }
            file["coords"].attrs.update(said)
    words = [f"features={folder}", f"out={tmp_path / 'out'}", "encoder=vit"]
    with pytest.raises(Fault, match="3 slides were left out"):
        run(load("embed", words).object())
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["results"].keys() == {"fine", "one", "empty"} and said["failed"].keys() == {"many", "zero", "words"}
    assert said["results"]["fine"] == "20 tiles" and said["results"]["empty"] == "0 tiles"
    assert said["results"]["one"].startswith("19 tiles; left out: 1 rows that aren't finite")
    assert "max_bad_fraction=0.15" in said["failed"]["many"]
    store = EmbeddingStore.open(tmp_path / "out")
    assert {slide: store.rows(slide) for slide in store.slides} == {"fine": 20, "one": 19, "empty": 0}


def test_no_name_of_a_foreign_slide_makes_anything_be_written_out_of_the_folder(make_tile_run, tmp_path):
    """Each of three slides is called by a way out, in its JSON or in its tiles' key."""
    run_folder, _ = make_tile_run()
    shards, out, jpeg = (
        tmp_path / "in" / "shards",
        tmp_path / "in" / "out",
        simplejpeg.encode_jpeg(tile_pixels(0, 0, 0)),
    )
    facts = {"x": 0, "y": 0, "mpp": 0.5, "tile_size": 40, "tile_size_level0": 40.0}
    by_key = "../../../key_0_0"
    members = [(f"{by_key}.jpg", jpeg), (f"{by_key}.json", json.dumps(facts).encode())]
    for number, name in enumerate(("../../../up", f"{tmp_path}/absolute")):
        members += tile_members(jpeg, name, 0, 0, 40, key=str(number))
    write_tar(shards / "a.tar", members)
    scan(shards)
    before = {path for path in tmp_path.rglob("*") if not path.is_relative_to(out)}
    run(settings(run_folder, shards, out, "export=[trident,clam,stamp]"))
    assert {path for path in tmp_path.rglob("*") if not path.is_relative_to(out)} == before
    assert {len(list((out / kind).rglob("*.h5"))) for kind in ("trident", "clam", "stamp")} == {3}


def test_features_are_called_by_safe_ids_and_those_taken_over_before_keep_theirs(tmp_path, capsys):
    folder = tmp_path / "features"
    folder.mkdir()
    for name in ("TCGA-05.F6E9", "old.one"):
        with h5py.File(folder / f"{name}.h5", "w") as file:
            file["feats"], file["coords"] = np.ones((3, 8), np.float16), np.arange(6.0).reshape(3, 2) * 256
            file.attrs.update(
                {"unit": "um", "tile_size_um": 256.0, "tile_size_px": 224, "extractor": "uni", "mpp_level0": 0.5}
            )
    with EmbeddingWriter(tmp_path / "out", 8, "uni", "imported uni") as writer:
        writer.add("old.one", np.ones((3, 8), np.float16), np.arange(6).reshape(3, 2) * 512, 512.0, 0.5)
    run(load("embed", [f"features={folder}", f"out={tmp_path / 'out'}", "export=trident"]).object())
    assert EmbeddingStore.open(tmp_path / "out").slides == ["TCGA-05-F6E9", "old.one"]
    assert f"called TCGA-05-F6E9: {folder}/TCGA-05.F6E9.h5" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "out" / "trident").iterdir()} == {"TCGA-05-F6E9.h5", "old.one.h5"}


def test_a_slide_seen_again_under_a_longer_list_keeps_its_id(make_tile_run, slides, tmp_path, capsys):
    folder, _ = make_tile_run()
    run(direct(folder, slides / "one.tiff", tmp_path / "out"))
    (tmp_path / "more").mkdir()
    shutil.copy(slides / "three.tiff", tmp_path / "more" / "one.tiff")
    both = f"['{slides / 'one.tiff'}','{tmp_path / 'more'}']"
    run(settings(folder, None, tmp_path / "out", f"slides={both}", "tile_size=40"))
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["new_slides"] == 1
    assert EmbeddingStore.open(tmp_path / "out").slides == ["more-one", "one"]


def test_another_resolution_than_slides_were_embedded_at_is_refused(make_tile_run, tmp_path):
    folder, _ = make_tile_run()
    write_slide(tmp_path / "s.tiff", stained(300, 300, [(150, 150, 120)]), 0.5)
    out = tmp_path / "out"
    run(direct(folder, tmp_path / "s.tiff", out))
    run(direct(folder, tmp_path / "s.tiff", out, "slides_mpp=0.5"))
    with pytest.raises(
        Fault, match=r"s\.tiff was embedded as one of 0\.5 µm per pixel, and slides_mpp= says 0\.4 now: choose another"
    ):
        run(direct(folder, tmp_path / "s.tiff", out, "slides_mpp=0.4"))


def test_another_resolution_than_features_were_taken_over_at_is_refused(tmp_path, capsys):
    folder = tmp_path / "features"
    folder.mkdir()
    for slide in ("silent", "says"):
        with h5py.File(folder / f"{slide}.h5", "w") as file:
            file["features"], file["coords"] = np.ones((9, 4), np.float32), np.arange(9)[:, None] * [[512, 0]]
            file["coords"].attrs.update(
                {"patch_size": 256, "patch_size_level0": 512, **({"mpp": 0.5} if slide == "says" else {})}
            )
    words = [f"features={folder}", f"out={tmp_path / 'out'}", "encoder=vit"]
    with pytest.raises(
        Fault, match=r"says\.h5 says itself that a level-0 pixel is 0\.25 µm wide.*slides_mpp= says 0\.4"
    ):
        run(load("embed", [*words, "slides_mpp=0.4"]).object())
    store = EmbeddingStore.open(tmp_path / "out")
    assert store.slides == ["silent"] and store.read("silent").mpp == 0.8
    with pytest.raises(Fault, match=r"silent\.h5 was embedded as one of 0\.4 µm per pixel, and slides_mpp= says 0\.25"):
        run(load("embed", [*words, "slides_mpp=0.25"]).object())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["checkpoint=c"], "slides=… or shards=…"),
        (["shards=s"], "checkpoint=…"),
        (["shards=s", "slides=t", "checkpoint=c"], "not both"),
        (["shards=s", "checkpoint=c", "part=4/3"], "part=3/40"),
        (["shards=s", "checkpoint=c", "part=²/3"], "part=3/40"),
        (["shards=s", "checkpoint=c", f"part=1/{'9' * 5000}"], "part=3/40"),
        (["shards=s", "checkpoint=c", "export=h5"], "each must be trident, clam or stamp."),
        (["stage=slide", "checkpoint=c"], "embeddings="),
        (["embeddings=e", "checkpoint=c"], "stage=slide"),
        (["stage=tiles"], "tile or slide"),
        (
            ["features=f", "shards=s", "checkpoint=c"],
            "features= takes over what another program embedded, and checkpoint= and shards= have no effect",
        ),
        (
            ["features=f", "slides=s", "slides_mpp=0.5", "min_tissue=0.1"],
            "and min_tissue= has no effect there: leave it out, or features=",
        ),
        (
            ["shards=s", "checkpoint=c", "encoder=e", "slides_mpp=0.5"],
            "encoder= and slides_mpp= have no effect there: leave them out, or shards=",
        ),
        (["slides=s", "checkpoint=c", "features_unit=um"], "features_unit= has no effect"),
        (
            ["stage=slide", "embeddings=e", "checkpoint=c", "shards=s"],
            "shards= has no effect there: leave it out, or stage=slide",
        ),
    ],
)
def test_settings_that_do_not_fit_together_are_faults_that_say_what_to_give(words, said, tmp_path):
    with pytest.raises(Fault, match=said):
        run(load("embed", [*words, f"out={tmp_path / 'out'}"]).object())


def test_features_that_say_nothing_of_their_tiles_are_taken_over_as_they_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "f").mkdir()
    cells = torch.cartesian_prod(torch.arange(3), torch.arange(2))
    torch.save({"features": torch.randn(6, 8), "coords": cells * 512}, tmp_path / "f" / "s.pt")
    words = ["embed", f"features={tmp_path / 'f'}", f"out={tmp_path / 'out'}", "encoder=uni", "features_tile=512"]
    with pytest.raises(SystemExit):
        run_command_line([*words, "slides_mpp=0.25"])  # of the slide's pixels, which leaves the tiles' open
    assert "s.pt does not say its tiles' µm per pixel: give features_mpp=." in capsys.readouterr().err
    run_command_line([*words, "slides_mpp=0.25", "features_mpp=0.5"])
    found = EmbeddingStore.open(tmp_path / "out").read("s")
    assert (found.tile_size_level0, found.mpp, len(found.coordinates)) == (512, 0.5, 6)
