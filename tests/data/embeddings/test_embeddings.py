import dataclasses
import json
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest

from data.embeddings import store as module
from data.embeddings.index import merge_job_indexes, read_index, write_embedding_index
from data.embeddings.standardisation import Statistics
from data.embeddings.store import EmbeddingStore, EmbeddingWriter
from data.fault import Fault
from data.keyed import rng

WIDTH = 6


def tiles(slide: str, n: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings that tell which slide and tile they are of, at n places in no order."""
    places = rng("places", slide).permutation(100)[:n]
    coordinates = np.stack([places % 10 * 512, places // 10 * 512], axis=1)
    return rng("values", slide).normal(size=(n, WIDTH)).astype(np.float32), coordinates


def writer(folder, encoder_hash: str = "abc", width: int = WIDTH, part: int = 0) -> EmbeddingWriter:
    return EmbeddingWriter(folder, width, "vit", encoder_hash, part)


def assert_holds(folder, slide: str, n: int = 20) -> None:
    values, coordinates = tiles(slide, n)
    found = EmbeddingStore.open(folder).read(slide)
    order = sorted(range(n), key=lambda i: (coordinates[i, 1], coordinates[i, 0]))
    assert np.array_equal(found.coordinates, coordinates[order])
    assert np.array_equal(found.embeddings, values[order].astype(np.float16))


def test_a_slide_comes_back_in_row_major_order_in_float16(tmp_path):
    with writer(tmp_path) as out:
        for slide, n in (("b", 20), ("a", 7), ("empty", 0)):
            out.add(slide, *tiles(slide, n), tile_size_level0=512.25, mpp=0.499)
    store = EmbeddingStore.open(tmp_path)
    assert (store.slides, store.width, store.encoder_hash, store.rows("b")) == (["a", "b", "empty"], WIDTH, "abc", 20)
    assert_holds(tmp_path, "a", 7)
    assert_holds(tmp_path, "b")
    found = store.read("a")
    assert (found.tile_size_level0, found.mpp) == (512.25, 0.499)
    for array in (found.embeddings, found.coordinates):  # views of the mapped file
        assert isinstance(array.base.base, np.memmap)
    assert np.array_equal(found.cells, np.floor(found.coordinates / 512.25))
    assert store.read("empty").embeddings.shape == (0, WIDTH)


def test_writing_goes_on_where_it_stopped_and_done_says_what_is_there(tmp_path):
    with writer(tmp_path) as out:
        out.add("a", *tiles("a"), 512.0, 0.5)
    with writer(tmp_path) as out:
        assert out.done("a") and not out.done("b")
        out.add("b", *tiles("b"), 512.0, 0.5)
        with pytest.raises(ValueError, match="already"):
            out.add("a", *tiles("a"), 512.0, 0.5)
    assert EmbeddingStore.open(tmp_path).slides == ["a", "b"]
    assert_holds(tmp_path, "a")
    assert_holds(tmp_path, "b")


def test_a_store_being_written_can_be_read(tmp_path):
    out = writer(tmp_path)
    out.add("a", *tiles("a"), 512.0, 0.5)
    assert_holds(tmp_path, "a")
    out.close()


def _write_for_ever(folder) -> None:
    out = writer(folder)
    number = 0
    while True:
        if not out.done(f"s{number}"):
            out.add(f"s{number}", *tiles(f"s{number}"), 512.0, 0.5)
        number += 1


def test_a_killed_writer_leaves_every_added_slide_readable_and_nothing_half(tmp_path):
    context = multiprocessing.get_context("fork")
    before = 0
    for _ in range(3):
        process = context.Process(target=_write_for_ever, args=(tmp_path,))
        process.start()
        journal = tmp_path / "journal-0.jsonl"
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and (not journal.exists() or journal.read_bytes().count(b"\n") < before + 5):
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        slides = EmbeddingStore.open(tmp_path).slides
        assert len(slides) >= before + 5
        for slide in slides:
            assert_holds(tmp_path, slide)
        before = len(slides)
    with writer(tmp_path) as out:
        assert all(out.done(f"s{i}") for i in range(before))
    assert len(EmbeddingStore.open(tmp_path).slides) == before


def test_half_written_bytes_and_a_torn_journal_line_are_cut_off(tmp_path):
    out = writer(tmp_path)
    out.add("a", *tiles("a"), 512.0, 0.5)
    size = (tmp_path / "embeddings-0-000000.bin").stat().st_size
    out._journal.close()  # as a kill leaves it: no index yet
    out._lease.end()
    with open(tmp_path / "embeddings-0-000000.bin", "ab") as file:
        file.write(b"half a slide")
    with open(tmp_path / "journal-0.jsonl", "a") as file:
        file.write('{"slide": "b", "fi')
    assert EmbeddingStore.open(tmp_path).slides == ["a"]
    with writer(tmp_path) as again:
        assert not again.done("b")
        assert (tmp_path / "embeddings-0-000000.bin").stat().st_size == size
        again.add("b", *tiles("b"), 512.0, 0.5)
    assert_holds(tmp_path, "a")
    assert_holds(tmp_path, "b")


def test_embeddings_of_two_encoders_never_mix(tmp_path):
    writer(tmp_path).close()
    for change in ({"encoder_hash": "other"}, {"width": 7}):
        with pytest.raises(Fault, match="choose another folder"):
            writer(tmp_path, **change)


def test_slides_of_several_folders_are_one_store_unless_encoders_differ_or_a_slide_is_in_two(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # so that folders are named from here
    for folder, slides in {"one": "bd", "two": "ae", "three": "c", "again": "ax"}.items():
        with writer(tmp_path / folder) as made:
            for slide in slides:
                made.add(slide, *tiles(slide), 512.0, 0.5)
    one, two, three, again = (EmbeddingStore.open(folder) for folder in ("one", "two", "three", "again"))
    pooled = one.with_slides_of(two).with_slides_of(three)
    assert pooled.slides == list("abcde") and one.slides == list("bd")
    for slide, store in {"a": two, "b": one, "c": three, "d": one, "e": two}.items():
        assert np.array_equal(pooled.read(slide).embeddings, store.read(slide).embeddings)
        assert np.array_equal(pooled.only([slide]).read(slide).coordinates, store.read(slide).coordinates)
        assert np.array_equal(pooled.scattered_rows(slide, 3), store.read(slide).embeddings[::3])
    with pytest.raises(Fault, match=r"two and again both hold the slide 'a' \(1 are in both\)"):
        pooled.with_slides_of(again)
    for number, change in enumerate(({"encoder_hash": "other"}, {"width": 7})):
        writer(tmp_path / str(number), **change).close()
        with pytest.raises(Fault, match=f"one holds embeddings of vit .abc, width 6., and {number} of vit"):
            one.with_slides_of(EmbeddingStore.open(str(number)))


def test_two_processes_cannot_write_one_part_but_can_write_two(tmp_path):
    first = writer(tmp_path)
    with pytest.raises(Fault, match="another process"):
        writer(tmp_path)
    second = writer(tmp_path, part=1)
    first.add("a", *tiles("a"), 512.0, 0.5)
    second.add("b", *tiles("b"), 512.0, 0.5)
    first.close()
    assert EmbeddingStore.open(tmp_path).slides == ["a", "b"]
    second.close()
    assert_holds(tmp_path, "a")
    assert_holds(tmp_path, "b")


def test_the_digest_is_that_of_the_content_and_not_of_how_it_was_written(tmp_path):
    for folder, order in (("one", "ab"), ("two", "ba"), ("other", "ac")):
        for part, slide in enumerate(order):
            with writer(tmp_path / folder, part=part if folder == "two" else 0) as out:
                out.add(slide, *tiles(slide), 512.0, 0.5)
    one, two, other = (EmbeddingStore.open(tmp_path / folder).digest for folder in ("one", "two", "other"))
    assert one == two != other


def test_a_new_file_is_begun_when_one_is_large_enough(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FILE_BYTES", 1000)
    for slides in ("abc", "abcde"):
        with writer(tmp_path) as out:
            for slide in slides:
                if not out.done(slide):
                    out.add(slide, *tiles(slide), 512.0, 0.5)
    assert len(list(tmp_path.glob("embeddings-0-*.bin"))) == 3
    for slide in "abcde":
        assert_holds(tmp_path, slide)


def test_values_beyond_float16_are_refused_with_the_place_of_the_tile(tmp_path):
    values, coordinates = tiles("a")
    for bad in (np.nan, 1e6):
        values[3, 2] = bad
        with writer(tmp_path) as out, pytest.raises(Fault, match=rf"\({coordinates[3, 0]}, {coordinates[3, 1]}\)"):
            out.add("a", values, coordinates, 512.0, 0.5)
    assert EmbeddingStore.open(tmp_path).slides == []


def test_shapes_that_do_not_fit_are_refused(tmp_path):
    values, coordinates = tiles("a")
    with writer(tmp_path) as out:
        for wrong in (
            (values[:, :5], coordinates),
            (values, coordinates[:7]),
            (values, coordinates.astype(np.float32)),
        ):
            with pytest.raises(ValueError, match="integer"):
                out.add("a", *wrong, 512.0, 0.5)


def test_a_folder_without_embeddings_an_unknown_slide_and_a_short_file_are_faults(tmp_path):
    with pytest.raises(Fault, match="pretrain embed"):
        EmbeddingStore.open(tmp_path)
    with writer(tmp_path) as out:
        out.add("a", *tiles("a"), 512.0, 0.5)
    with pytest.raises(Fault, match="no slide 'b'"):
        EmbeddingStore.open(tmp_path).read("b")
    os.truncate(tmp_path / "embeddings-0-000000.bin", 100)
    with pytest.raises(Fault, match="shorter"):
        EmbeddingStore.open(tmp_path).read("a")


def close_parts(folder, parts: int, finished: list[int]) -> None:
    for part in range(1, parts + 1):
        with EmbeddingWriter(folder, WIDTH, "vit", "abc", part, parts) as out:
            if not out.done(f"s{part}"):
                out.add(f"s{part}", *tiles(f"s{part}"), 512.0, 0.5)
            if part in finished:
                out.finish({})


def test_parts_merge_into_one_index_and_hold_the_same_slides_before_and_after(tmp_path):
    close_parts(tmp_path, 3, [1, 2, 3])
    before = EmbeddingStore.open(tmp_path).digest
    for _ in range(2):  # again: nothing to do
        merge_job_indexes(tmp_path)
        assert sorted(path.name for path in tmp_path.glob("*.parquet")) == ["index.parquet"]
        assert not list(tmp_path.glob("journal-*"))
        assert EmbeddingStore.open(tmp_path).digest == before
        for part in (1, 2, 3):
            assert_holds(tmp_path, f"s{part}")
    with writer(tmp_path, part=2) as out:  # and writing can go on
        assert out.done("s2")
        out.add("later", *tiles("later"), 512.0, 0.5)
        out.finish({})
    for slide in ("s2", "later"):
        assert_holds(tmp_path, slide)


def test_a_part_that_did_not_come_to_its_end_is_named_and_not_merged(tmp_path):
    close_parts(tmp_path, 3, [1, 3])
    with pytest.raises(Fault, match="the first of them part=2/3"):
        merge_job_indexes(tmp_path)
    close_parts(tmp_path, 3, [2])
    with pytest.raises(Fault, match="the first of them part=1/3"):  # its last run didn't come to its end
        merge_job_indexes(tmp_path)
    close_parts(tmp_path, 3, [1, 2, 3])
    out = EmbeddingWriter(tmp_path, WIDTH, "vit", "abc", 4, 4)
    out.add("running", *tiles("running"), 512.0, 0.5)
    with pytest.raises(Fault, match=r"part 4 .* is being written"):
        merge_job_indexes(tmp_path)
    out.close()
    merge_job_indexes(tmp_path)  # the array of three is whole
    assert EmbeddingStore.open(tmp_path).slides == ["running", "s1", "s2", "s3"]
    with pytest.raises(Fault, match="no parts to merge"):
        merge_job_indexes(tmp_path / "other")


def test_statistics_equal_those_of_all_tiles_at_once_also_far_from_zero(tmp_path, monkeypatch):
    monkeypatch.setattr("data.embeddings.standardisation.ROWS", 7)
    everything = []
    with writer(tmp_path) as out:
        for slide, n in (("a", 20), ("b", 50), ("c", 1)):
            values, coordinates = tiles(slide, n)
            values = values * np.array([1, 2, 0.1, 5, 0, 1]) + np.array([0, 100, 300, -5, 3, 0])
            out.add(slide, values, coordinates, 512.0, 0.5)
            everything.append(values.astype(np.float16).astype(np.float64))
    statistics, values = Statistics.of(EmbeddingStore.open(tmp_path)), np.concatenate(everything)
    assert statistics.rows == 71
    np.testing.assert_allclose(statistics.mean, values.mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(statistics.std[[0, 1, 2, 3, 5]], values.std(0)[[0, 1, 2, 3, 5]], rtol=1e-9)
    assert statistics.std[4] == 1  # never varies
    statistics.save(tmp_path / "statistics.json")
    again = Statistics.load(tmp_path / "statistics.json")
    for spoilt in ('{"rows": 3, "me', "[]", '{"rows": 3}'):
        (tmp_path / "cut.json").write_text(spoilt)
        with pytest.raises(Fault, match=r"cut\.json is damaged .*: delete it, and the same command makes it anew"):
            Statistics.load(tmp_path / "cut.json")
    assert np.array_equal(again.mean, statistics.mean) and np.array_equal(again.std, statistics.std)
    assert json.loads((tmp_path / "statistics.json").read_text())["rows"] == 71


def test_statistics_of_a_large_store_are_those_of_every_so_many_th_tile_of_each_slide(tmp_path, monkeypatch):
    monkeypatch.setattr("data.embeddings.standardisation.MOST_TILES_READ", 25)
    with writer(tmp_path) as out:
        for slide, n in (("a", 20), ("b", 50), ("empty", 0)):
            out.add(slide, *tiles(slide, n), 512.0, 0.5)
    store = EmbeddingStore.open(tmp_path)
    values = np.concatenate([store.read(slide).embeddings[::3] for slide in ("a", "b")]).astype(np.float64)
    statistics = Statistics.of(store)
    assert statistics.rows == len(values) == 24
    np.testing.assert_allclose(statistics.mean, values.mean(0), rtol=1e-9)
    np.testing.assert_allclose(statistics.std, values.std(0), rtol=1e-9)


def test_statistics_of_a_store_of_many_slides_are_those_of_every_so_many_th_slide(tmp_path, monkeypatch):
    monkeypatch.setattr("data.embeddings.standardisation.MOST_SLIDES_READ", 2)
    with writer(tmp_path) as out:
        for slide in ("a", "b", "c"):
            out.add(slide, *tiles(slide, 20), 512.0, 0.5)
    store = EmbeddingStore.open(tmp_path)
    values = np.concatenate([store.read(slide).embeddings for slide in ("a", "c")]).astype(np.float64)
    np.testing.assert_allclose(Statistics.of(store).mean, values.mean(0), rtol=1e-9)


def test_rows_read_one_by_one_of_a_file_that_was_cut_are_a_fault(tmp_path):
    with writer(tmp_path) as out:
        out.add("a", *tiles("a", 20), 512.0, 0.5)
    store, path = EmbeddingStore.open(tmp_path), tmp_path / "embeddings-0-000000.bin"
    for spoil in (lambda: os.truncate(path, 30), path.unlink):
        spoil()
        with pytest.raises(Fault, match="missing or shorter than its index says; embed a again"):
            store.scattered_rows("a", 2)


@pytest.mark.parametrize("name", ["store.json", "index-0.parquet"])
def test_a_damaged_store_is_a_fault_that_names_the_file(tmp_path, name):
    with writer(tmp_path) as out:
        out.add("a", *tiles("a"), 512.0, 0.5)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(Fault, match=f"{name} is damaged"):
        EmbeddingStore.open(tmp_path)
    with pytest.raises(Fault, match=f"{name} is damaged"):
        writer(tmp_path)


@pytest.mark.parametrize("where", ["journal", "index"])
def test_a_store_that_points_out_of_its_folder_is_not_continued(tmp_path, where):
    """Going on cuts off what a killed writer left at the end of the last file: of whichever the index names."""
    folder, outside = tmp_path / "store", tmp_path / "precious.bin"
    outside.write_bytes(bytes(10_000))
    with writer(folder) as out:
        out.add("a", *tiles("a"), 512.0, 0.5)
    (entry,) = read_index(folder / "index-0.parquet")
    foreign = dataclasses.replace(entry, file="embeddings-0-000000.bin/../../precious.bin")
    if where == "index":
        write_embedding_index(folder / "index-0.parquet", [foreign], None)
    else:
        (folder / "journal-0.jsonl").write_text(json.dumps(dataclasses.asdict(foreign)) + "\n")
        (folder / "index-0.parquet").unlink()
    with pytest.raises(Fault, match="is no file of a store: it is damaged, or not to be trusted"):
        writer(folder)
    assert outside.stat().st_size == 10_000
