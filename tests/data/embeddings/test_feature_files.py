"""Features of TRIDENT, CLAM and STAMP: ours are read as their programs read theirs, and theirs, written by hand, come
in whole."""

import json
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from data.embeddings.feature_files import import_features, list_features, maker
from data.embeddings.h5 import EXPORTS, is_exported
from data.embeddings.store import EmbeddingStore, EmbeddingWriter
from data.fault import Fault, Notice
from data.keyed import rng

WIDTH, SIDE = 6, 409.6  # 256 px of 0.4 µm on a slide of 0.25 µm: not a whole number of pixels


def tiles(n: int = 20) -> tuple[np.ndarray, np.ndarray]:
    places = rng("places").permutation(100)[:n]
    corners = np.stack([np.ceil(places % 10 * SIDE), np.ceil(places // 10 * SIDE)], axis=1).astype(np.int64)
    return rng("values").normal(size=(n, WIDTH)).astype(np.float32), corners


@pytest.fixture
def store(tmp_path: Path) -> EmbeddingStore:
    with EmbeddingWriter(tmp_path / "store", WIDTH, "vit", "abc") as out:
        out.add("a", *tiles(), SIDE, 0.4, tile_size=256, slide_width=5000, slide_height=4500)
    return EmbeddingStore.open(tmp_path / "store")


def row_major(values: np.ndarray, coords: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = sorted(range(len(coords)), key=lambda i: (coords[i, 1], coords[i, 0]))
    return values[order], coords[order]


@pytest.mark.parametrize("kind", EXPORTS)
def test_what_is_exported_comes_back_the_same(store: EmbeddingStore, tmp_path: Path, kind: str) -> None:
    assert not is_exported(kind, "a", tmp_path / kind)
    EXPORTS[kind](store, "a", tmp_path / kind)
    assert is_exported(kind, "a", tmp_path / kind)
    (path,) = list_features(tmp_path / kind).values()
    back, there = import_features(path).slide, store.read("a")
    assert np.array_equal(back.embeddings, there.embeddings) and np.array_equal(back.coordinates, there.coordinates)
    assert (back.slide, back.mpp, back.tile_size) == ("a", 0.4, 256)
    assert back.tile_size_level0 == pytest.approx(SIDE, abs=1e-9) and maker(path) == ("vit", "abc")
    assert np.array_equal(back.cells, there.cells)


def test_the_export_has_tridents_schema(store: EmbeddingStore, tmp_path: Path) -> None:
    EXPORTS["trident"](store, "a", tmp_path)
    with h5py.File(tmp_path / "a.h5") as file:
        assert (file["features"].shape, file["features"].dtype) == ((20, WIDTH), np.float32)
        assert (file["coords"].shape, file["coords"].dtype) == ((20, 2), np.int64)
        of = dict(file["coords"].attrs)
    expected = {
        "patch_size": 256,
        "patch_size_level0": 409,
        "level0_magnification": 40,
        "target_magnification": 25,
        "overlap": 0,
        "name": "a",
        "savetodir": str(tmp_path),
        "level0_width": 5000,
        "level0_height": 4500,
    }
    assert {key: of[key] for key in expected} == expected


def test_the_export_has_clams_two_files(store: EmbeddingStore, tmp_path: Path) -> None:
    EXPORTS["clam"](store, "a", tmp_path)
    features = torch.load(tmp_path / "pt_files" / "a.pt", weights_only=True)
    with h5py.File(tmp_path / "h5_files" / "a.h5") as file:
        assert np.array_equal(file["features"][:], features.numpy()) and features.dtype == torch.float32
        assert np.array_equal(file["coords"][:], row_major(*tiles())[1])
        assert "patch_level" not in file["coords"].attrs  # no whole number of pixels of any level


def test_the_export_has_stamps_schema_in_microns(store: EmbeddingStore, tmp_path: Path) -> None:
    EXPORTS["stamp"](store, "a", tmp_path)
    values, coords = row_major(*tiles())
    with h5py.File(tmp_path / "a.h5") as file:
        assert np.array_equal(file["feats"][:], values.astype(np.float16))
        np.testing.assert_allclose(file["coords"][:], coords * 0.25, rtol=1e-12)
        of = dict(file.attrs)
    assert (of["unit"], of["tile_size_px"], of["extractor"]) == ("um", 256, "vit")
    assert of["tile_size_um"] == pytest.approx(102.4)


def test_tridents_own_file_is_read_with_its_magnification_as_its_scale(tmp_path: Path) -> None:
    values, coords = tiles()
    coords = coords // 409 * 409
    with h5py.File(tmp_path / "s.h5", "w") as file:
        file["features"], file["coords"] = values, coords
        file["coords"].attrs.update(
            {
                "patch_size": 256,
                "patch_size_level0": 409,
                "level0_magnification": 40,
                "target_magnification": 25,
                "overlap": 0,
                "name": "s",
                "savetodir": "x",
                "level0_width": 5000,
                "level0_height": 4500,
            }
        )
    found = import_features(tmp_path / "s.h5").slide
    expected, places = row_major(values, coords)
    assert np.array_equal(found.embeddings, expected.astype(np.float16)) and np.array_equal(found.coordinates, places)
    assert (found.tile_size_level0, found.mpp, found.tile_size, found.slide_width) == (409.0, 0.4, 256, 5000)
    assert import_features(tmp_path / "s.h5", mpp_level0=0.253).slide.mpp == pytest.approx(
        0.253 * 409 / 256
    )  # better than nominal
    with h5py.File(tmp_path / "s.h5", "a") as file:
        file["coords"].attrs["overlap"] = 64
    with pytest.raises(Fault, match="overlap"):
        import_features(tmp_path / "s.h5")


@pytest.mark.parametrize(("step", "side"), [(410, 410), (409, 409), (512, 409)])
def test_the_side_that_trident_truncated_is_that_of_its_steps(tmp_path: Path, step: int, side: int) -> None:
    columns = np.array([0, 3, 7, 900])  # so far out a pixel a column makes two cells
    with h5py.File(tmp_path / "s.h5", "w") as file:
        file["features"] = np.ones((4, WIDTH), np.float32)
        file["coords"] = np.stack([columns * step, np.zeros(4, np.int64)], axis=1)
        file["coords"].attrs.update({"patch_size": 256, "patch_size_level0": 409, "target_magnification": 25})
    found = import_features(tmp_path / "s.h5").slide
    assert found.tile_size_level0 == side
    if step == side:
        assert found.cells[:, 0].tolist() == columns.tolist()


@pytest.mark.parametrize("kind", ["h5_files", "pt_files"])
def test_clams_own_files_are_read_with_its_patches_beside_them(tmp_path: Path, kind: str) -> None:
    values, coords = tiles()
    (tmp_path / "features" / kind).mkdir(parents=True)
    if kind == "h5_files":
        with h5py.File(tmp_path / "features" / kind / "s.h5", "w") as file:
            file["features"], file["coords"] = values, coords
    else:
        torch.save(torch.from_numpy(values), tmp_path / "features" / kind / "s.pt")
    (path,) = list_features(tmp_path / "features").values()
    with pytest.raises(Fault, match="patches"):
        import_features(path, mpp_level0=0.25)
    (tmp_path / "patches").mkdir()
    with h5py.File(tmp_path / "patches" / "s.h5", "w") as file:
        file["coords"] = coords
        size = np.array([5000, 4500])
        file["coords"].attrs.update(
            {
                "patch_size": 256,
                "patch_level": 1,
                "downsample": np.array([2.0, 2.0]),
                "downsampled_level_dim": size // 2,
                "level_dim": size // 2,
                "name": "s",
                "save_path": "x",
            }
        )
    with pytest.raises(Fault, match="slides="):
        import_features(path)
    found = import_features(path, mpp_level0=0.25).slide
    expected, places = row_major(values, coords)
    assert np.array_equal(found.embeddings, expected.astype(np.float16)) and np.array_equal(found.coordinates, places)
    assert (found.tile_size_level0, found.mpp, found.tile_size) == (512.0, 0.5, 256)


def test_stamps_own_file_needs_the_slides_scale_and_keeps_its_cells(tmp_path: Path) -> None:
    y, x = (a.ravel() for a in np.mgrid[:7, :9])
    with h5py.File(tmp_path / "s.h5", "w") as file:
        file["feats"] = rng("stamp").normal(size=(63, WIDTH)).astype(np.float16)
        file["coords"] = np.stack([x, y], axis=1) * 256.0
        file.attrs.update({"unit": "um", "tile_size_um": 256.0, "tile_size_px": 224, "extractor": "uni"})
    with pytest.raises(Fault, match="slides_mpp"):
        import_features(tmp_path / "s.h5")
    for scale in (0.25, 0.2527, 0.5021):
        found = import_features(tmp_path / "s.h5", mpp_level0=scale).slide
        assert np.array_equal(found.cells, np.stack([x, y], axis=1))
        assert (found.mpp, found.tile_size) == (256 / 224, 224) and found.tile_size_level0 == 256 / scale
    assert maker(tmp_path / "s.h5") == ("uni", None)


def test_files_that_are_no_features_or_do_not_say_enough_are_faults(tmp_path: Path) -> None:
    values, coords = tiles()
    with pytest.raises(Fault, match="holds no features"):
        list_features(tmp_path)
    with h5py.File(tmp_path / "clam.h5", "w") as file:
        file["features"], file["coords"] = values, coords
    with pytest.raises(Fault, match="size at level 0"):
        import_features(tmp_path / "clam.h5")
    assert import_features(tmp_path / "clam.h5", tile_size_level0=512, mpp=0.5).slide.tile_size_level0 == 512
    with h5py.File(tmp_path / "short.h5", "w") as file:
        file["features"], file["coords"] = values[:7], coords
    with pytest.raises(Fault, match="7 features for 20"):
        import_features(tmp_path / "short.h5", tile_size_level0=512, mpp=0.5)
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["coords"] = coords
    with pytest.raises(Fault, match="not a feature file"):
        import_features(tmp_path / "other.h5")
    (tmp_path / "broken.h5").write_bytes(b"not h5")
    with pytest.raises(Fault, match=r"broken\.h5"):
        import_features(tmp_path / "broken.h5")


def test_a_file_whose_data_are_damaged_is_a_fault_and_no_crash(tmp_path: Path) -> None:
    values, coords = tiles()
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        features = file.create_dataset("features", data=values, fletcher32=True, chunks=values.shape)
        file.create_dataset("coords", data=coords).attrs.update({"patch_size": 256, "patch_size_level0": 409})
        at = features.id.get_chunk_info(0).byte_offset
    content = bytearray(path.read_bytes())
    content[at + 5] ^= 1
    path.write_bytes(content)
    with pytest.raises(Fault, match=r"a\.h5 can't be read"):
        import_features(path, mpp=0.5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_coordinates_that_are_not_numbers_are_a_fault(tmp_path: Path, bad: float) -> None:
    values, coords = tiles()
    places = coords.astype(float)
    places[3, 1] = bad
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["feats"], file["coords"] = values, places
        file.attrs.update({"unit": "um", "tile_size_um": 256.0, "tile_size_px": 224})
    with pytest.raises(Fault, match="not finite"):
        import_features(tmp_path / "a.h5", mpp_level0=0.25)


TRIDENTS = {"patch_size": 256, "patch_size_level0": 512, "target_magnification": 20}


def write_h5(path: Path, datasets: dict[str, np.ndarray], attributes: dict[str, object], on: str = "coords") -> Path:
    with h5py.File(path, "w") as file:
        for name, values in datasets.items():
            file[name] = values
        (file if on == "/" else file[on]).attrs.update(attributes)
    return path


def grid(n: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """Rows in row-major order, and the cells that they are of."""
    return tiles(n)[0], np.stack([np.arange(n) % 5, np.arange(n) // 5], axis=1)


def test_every_shape_of_a_features_file_gives_the_same_slide(tmp_path: Path) -> None:
    """Of the same twenty tiles, as programs of this field write them."""
    values, cells = grid()
    places = cells * 512
    tensor, corners = torch.from_numpy(values), torch.from_numpy(places)
    write = {
        "trident.h5": lambda path: write_h5(path, {"features": values, "coords": places}, TRIDENTS),
        "batched.h5": lambda path: write_h5(path, {"features": values[None], "coords": places[None]}, TRIDENTS),
        "words.h5": lambda path: write_h5(
            path,
            {"features": values, "coords": places.astype(float)},
            {"patch_size": "256", "patch_size_level0": [512], "target_magnification": "20x"},
        ),
        "atlas.h5": lambda path: write_h5(
            path,
            {"features/uni": values, "coords": np.concatenate([places, np.full((20, 3), 9)], axis=1).astype(np.int32)},
            TRIDENTS,
            on="/",
        ),
        "cells.h5": lambda path: write_h5(
            path, {"features": values, "coords": cells}, {"unit": "cells", "tile_size_level0": 512, "mpp": 0.5}
        ),
        "stamp.h5": lambda path: write_h5(
            path,
            {"feats": values, "coords": cells * 256.0},
            {"unit": "um", "tile_size_um": 256.0, "tile_size_px": 512},
            on="/",
        ),
        "dict.pt": lambda path: torch.save(
            {"features": tensor, "coords": corners, "patch_size_level0": 512, "target_magnification": 20}, path
        ),
        "pair.pt": lambda path: torch.save([tensor, corners], path),
        "a.npz": lambda path: np.savez(path, features=values, coords=places, patch_size_level0=512, mpp=0.5),
    }
    for name, program in write.items():
        program(tmp_path / name)
        imported = import_features(
            tmp_path / name,
            512 if name == "pair.pt" else None,
            0.5 if name == "pair.pt" else None,
            mpp_level0=0.5 if name == "stamp.h5" else None,
        )
        found = imported.slide
        assert np.array_equal(found.embeddings, values.astype(np.float16)), name
        assert np.array_equal(found.coordinates, places) and (found.tile_size_level0, found.mpp) == (512, 0.5), name
        assert imported.not_finite == imported.double == 0
    assert maker(tmp_path / "atlas.h5") == ("uni", None)


@pytest.mark.parametrize("kind", ["pt", "npz"])
def test_slide2vecs_features_are_read_with_its_coordinates_beside_them(tmp_path: Path, kind: str) -> None:
    values, cells = grid()
    (tmp_path / "tile_embeddings").mkdir()
    (tmp_path / "coordinates").mkdir()
    columns = np.zeros(20, [("x", int), ("y", int), ("tile_size_lv0", int), ("target_spacing", float)])
    columns["x"], columns["y"], columns["tile_size_lv0"], columns["target_spacing"] = *(cells * 512).T, 512, 0.5
    if kind == "pt":
        torch.save(list(torch.from_numpy(values)), tmp_path / "tile_embeddings/s.pt")
        np.save(tmp_path / "coordinates/s.npy", columns)
    else:
        np.savez(tmp_path / "tile_embeddings/s.npz", features=values, tile_index=np.arange(20))
        np.savez(
            tmp_path / "coordinates/s.coordinates.npz", **{name: columns[name] for name in columns.dtype.names or ()}
        )
    (path,) = list_features(tmp_path).values()
    found = import_features(path).slide
    assert np.array_equal(found.embeddings, values.astype(np.float16)) and np.array_equal(found.cells, cells)
    assert (found.tile_size_level0, found.mpp) == (512, 0.5)


PLACES_4 = {
    "slide": {"dimensions": [5000, 4500], "base_spacing_um": 0.25},
    "tiling": {"requested_tile_size_px": 256, "requested_spacing_um": 0.51, "tile_size_lv0": 512, "overlap": 0.0},
}
PLACES_3 = {
    "target_spacing_um": 0.5,
    "target_tile_size_px": 256,
    "tile_size_lv0": 512,
    "overlap": 0.0,
    "mask_path": None,
}


@pytest.mark.parametrize(("features", "coordinates", "said", "columns"), [
    ("features", "coordinates/s.npy", None, "rows"), ("tile_embeddings", "coordinates/s.tiles.npz", PLACES_3, "xy"), ("tile_embeddings", "tiles/s.coordinates.npz", PLACES_4, "pairs"),
    ("tile_embeddings", "tiles/s.coordinates.npz", PLACES_4, "xy"), ("tile_embeddings/tumour", "tiles/tumour/s.coordinates.npz", PLACES_4, "xy"),
])  # fmt: skip
def test_coordinates_of_every_version_of_slide2vec_are_read(
    tmp_path: Path, features: str, coordinates: str, said: dict[str, object] | None, columns: str
) -> None:
    values, cells = grid()
    for folder in (tmp_path / features, (tmp_path / coordinates).parent):
        folder.mkdir(parents=True)
    torch.save(torch.from_numpy(values), tmp_path / features / "s.pt")
    x, y = cells.T * 512
    if columns == "rows":
        rows = np.zeros(
            20,
            [
                ("x", int),
                ("y", int),
                ("tile_size_resized", int),
                ("resize_factor", float),
                ("tile_size_lv0", int),
                ("target_spacing", float),
            ],
        )
        rows["x"], rows["y"], rows["tile_size_resized"], rows["tile_size_lv0"], rows["target_spacing"] = (
            x,
            y,
            9,
            512,
            0.5,
        )
        np.save(tmp_path / coordinates, rows)
    else:
        index = {"tile_index": np.arange(20)}
        np.savez(
            tmp_path / coordinates, **index, **({"x": x, "y": y} if columns == "xy" else {"coordinates": cells * 512})
        )
        (tmp_path / coordinates).with_suffix(".meta.json").write_text(json.dumps(said))
    found = import_features(tmp_path / features / "s.pt").slide
    assert np.array_equal(found.embeddings, values.astype(np.float16)) and np.array_equal(found.cells, cells)
    assert (found.tile_size_level0, found.mpp) == (512, 0.5)
    assert (found.tile_size, found.slide_width) == {"rows": (0, 0)}.get(columns, (256, 5000 if said is PLACES_4 else 0))
    if said is not None:
        for spoilt in ("{", "[]", '{"tiling": 3}', "version https://git-lfs.github.com/spec/v1"):
            (tmp_path / coordinates).with_suffix(".meta.json").write_text(spoilt)
            with pytest.raises(Fault):
                import_features(tmp_path / features / "s.pt")


def test_a_level_whose_axes_differ_by_a_pixel_has_one_downsample(tmp_path: Path) -> None:
    values, cells = grid()
    attributes = {"patch_size": [256, 256], "patch_level": 1, "downsample": np.array([2.0, 2.0007])}
    path = write_h5(tmp_path / "s.h5", {"features": values, "coords": cells * 512}, attributes)
    assert import_features(path, mpp_level0=0.25).slide.tile_size_level0 == 512
    assert import_features(path, mpp_level0=0.25).slide.tile_size == 256


@pytest.mark.parametrize("ending", ["h5", "pt", "npz", "npy"])
def test_a_pointer_of_git_lfs_is_named_as_one(tmp_path: Path, ending: str) -> None:
    (tmp_path / f"s.{ending}").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n")
    with pytest.raises(Fault, match="is a Git LFS pointer"):
        import_features(tmp_path / f"s.{ending}")


def test_of_several_encoders_features_those_that_are_asked_for_are_read(tmp_path: Path) -> None:
    values, cells = grid()
    path = write_h5(
        tmp_path / "s.h5", {"features/uni": values, "features/big": 2 * values, "coords": cells * 512}, TRIDENTS, on="/"
    )
    with pytest.raises(Fault, match=r"several encoders \(big, uni\): say which, encoder="):
        import_features(path)
    assert np.array_equal(import_features(path, encoder="big").slide.embeddings, (2 * values).astype(np.float16))


def test_rows_that_cannot_be_kept_are_counted_and_cost_no_other(tmp_path: Path) -> None:
    values, cells = grid()
    values[3, 1], values[7, 0] = np.nan, 1e6
    cells[9] = cells[8]
    imported = import_features(write_h5(tmp_path / "s.h5", {"features": values, "coords": cells * 512}, TRIDENTS))
    assert (imported.not_finite, imported.double) == (2, 1)
    kept = np.delete(np.arange(20), [3, 7, 9])
    assert np.array_equal(imported.slide.embeddings, values[kept].astype(np.float16))
    assert np.array_equal(imported.slide.cells, cells[kept])


@pytest.mark.parametrize("shape", [(0,), (0, 6), (1, 0, 6)])
def test_a_slide_without_tiles_is_one_without_tiles(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = write_h5(
        tmp_path / "s.h5",
        {"features": np.zeros(shape), "coords": np.zeros((0, 2) if len(shape) == 3 else shape[:1])},
        TRIDENTS,
    )
    assert len(import_features(path).slide.coordinates) == 0


def test_coordinates_whose_unit_nobody_says_are_asked_for_and_never_guessed(tmp_path: Path) -> None:
    values, cells = grid()
    for name, scale in (("cells", 1.0), ("um", 128.0)):
        path = write_h5(tmp_path / f"{name}.h5", {"features": values, "coords": cells * scale}, {})
        with pytest.raises(
            Fault, match=r"512 level-0 pixels that are .* apart.*give features_unit=level0, cells or um"
        ):
            import_features(path, 512, 0.5, 0.25)
        assert np.array_equal(import_features(path, 512, 0.5, 0.25, unit=name).slide.cells, cells)
    path = write_h5(tmp_path / "feats.h5", {"feats": values, "coords": cells * 256.0}, {"tile_size_um": 256.0})
    with pytest.raises(Fault, match="does not say what its coordinates count: give features_unit="):
        import_features(path, mpp_level0=0.25)
    path = write_h5(tmp_path / "odd.h5", {"features": values, "coords": cells}, {"unit": "furlong"})
    with pytest.raises(Fault, match="counts its coordinates in 'furlong'"):
        import_features(path, 512, 0.5)


@pytest.mark.parametrize(("unit", "scale"), [("cells", 1 / 512), ("um", 0.25), ("level1", 0.5), ("level2", 0.25)])
def test_what_trident_says_of_its_coordinates_is_held_to_them(tmp_path: Path, unit: str, scale: float) -> None:
    """The user may say what they count instead; a unit that is wrong of the other slides doesn't change these."""
    values, cells = grid()
    size = {"level0_width": 5000, "level0_height": 5000}
    path = write_h5(tmp_path / "s.h5", {"features": values, "coords": cells * 512 * scale}, TRIDENTS | size)
    with pytest.raises(Fault, match=r"512 level-0 pixels that are .* apart.*count something else.*give features_unit="):
        import_features(path)
    if unit in ("cells", "um"):
        assert np.array_equal(import_features(path, mpp_level0=0.25, unit=unit).slide.cells, cells)
    good = write_h5(tmp_path / "good.h5", {"features": values, "coords": cells * 512}, TRIDENTS | size)
    assert np.array_equal(import_features(good, unit="cells").slide.cells, cells)
    said = write_h5(
        tmp_path / "said.h5",
        {"features": values, "coords": cells * 512},
        TRIDENTS | size | {"unit": unit if unit == "cells" else "px"},
    )
    if unit == "cells":
        with pytest.raises(Fault, match=r"19 of 20 tiles beside its slide of 5000 × 5000"):
            import_features(said)
    else:
        assert np.array_equal(import_features(said).slide.cells, cells)


@pytest.mark.parametrize(("coords", "said", "sentence"), [
    (lambda places: places + 10_000, {}, r"20 of 20 tiles beside its slide of 5000 × 5000"), (lambda places: places - 512, {}, "has negative coordinates"),
    (lambda places: places.astype("u8") + np.uint64(2**63), {}, "where no slide has pixels"), (lambda places: places + 2**62, {}, "where no slide has pixels"),
    (lambda places: places, {"target_magnification": 1e-300}, r"is 1e\+301 µm wide"), (lambda places: places, {"target_magnification": 1e-4}, "is 1e\\+05 µm wide"),
    (lambda places: places, {"mpp": 1e-4}, "is 0.0001 µm wide"), (lambda places: places, {"level0_width": 1e300}, "which no slide has"),
    (lambda places: places, {"patch_size": 1e300}, "which no slide has"), (lambda places: places, {"patch_size_level0": 1e300}, "which no tile has"),
])  # fmt: skip
def test_places_and_sizes_that_no_slide_has_are_a_sentence(
    tmp_path: Path, coords: Callable[[np.ndarray], np.ndarray], said: dict[str, object], sentence: str
) -> None:
    values, cells = grid()
    size = {"level0_width": 5000, "level0_height": 5000}
    path = write_h5(tmp_path / "s.h5", {"features": values, "coords": coords(cells * 512)}, TRIDENTS | size | said)
    with pytest.raises(Fault, match=sentence):
        import_features(path)


@pytest.mark.parametrize(("said", "sentence"), [
    ({"target_magnification": "2_0"}, r"says target_magnification = '2_0', where a number belongs"), ({"target_magnification": "much"}, r"says target_magnification = 'much', where a number belongs"), ({"target_magnification": [10, 20]}, r"\[10, 20\], where one number belongs"),
    ({"target_magnification": 0}, "does not say its tiles' µm per pixel"), ({"target_magnification": -20}, "which can't be"),
])  # fmt: skip
def test_attributes_that_say_nothing_of_use_are_a_sentence(
    tmp_path: Path, said: dict[str, object], sentence: str
) -> None:
    values, cells = grid()
    path = write_h5(
        tmp_path / "s.h5",
        {"features": values, "coords": cells * 512},
        {"patch_size": 256, "patch_size_level0": 512, **said},
    )
    with pytest.raises(Fault, match=sentence):
        import_features(path)


def test_a_file_that_claims_more_than_it_can_hold_is_a_sentence_and_no_lack_of_memory(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "s.h5", "w") as file:
        file.create_dataset("features", (50_000_000, 1536), np.float32, chunks=(1024, 1536))
        file.create_dataset("coords", (50_000_000, 2), np.int64, chunks=(1024, 2))
    torch.save({"features": torch.zeros(1, 1).expand(50_000_000, 1536)}, tmp_path / "s.pt")
    for name in ("s.h5", "s.pt"):
        with pytest.raises(Fault, match=r"says that \w+ is 50,000,000 × [\d,]+, and has .* bytes"):
            import_features(tmp_path / name, 512, 0.5)


@pytest.mark.parametrize("content", [{"weights": torch.ones(3)}, {"features": [1, 2]}, [], [torch.ones(2), torch.ones(3)], 7, torch.ones(2, 3, 4)])  # fmt: skip
def test_a_tensor_file_of_another_kind_is_a_sentence(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "s.pt")
    with pytest.raises(Fault, match=r"s\.pt h"):
        import_features(tmp_path / "s.pt", 512, 0.5)


def test_features_of_another_kind_in_one_folder_are_named(tmp_path: Path) -> None:
    for name in ("a.h5", "a.coordinates.npz", "b.pt", "c.npz"):
        (tmp_path / name).touch()
    with pytest.warns(Notice, match=r"left out: b\.pt, c\.npz: features of another kind than a\.h5"):
        assert list(list_features(tmp_path)) == ["a"]


def test_what_is_no_file_or_lies_deeper_in_a_folder_of_features_is_named(tmp_path: Path) -> None:
    for name in ("a.h5", "B.H5"):
        (tmp_path / name).touch()
    (tmp_path / "broken.h5").symlink_to(tmp_path / "nowhere.h5")
    (tmp_path / "folder.h5").mkdir()
    for name in ("more/b.h5", "patches/a.h5"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    with pytest.warns(Notice) as said:
        assert list(list_features(tmp_path)) == ["a"]
    assert [str(one.message).partition(": give")[0] for one in said] == [
        "left out: B.H5: its ending is in capitals, rename it to .h5",
        "left out: broken.h5: a link to what isn't there",
        "left out: folder.h5: no file",
        "left out: more/b.h5: in a folder of its own",
    ]


def test_magnifications_that_contradict_the_sizes_are_a_sentence(tmp_path: Path) -> None:
    values, cells = grid()
    told = {"patch_size": 256, "patch_size_level0": 512, "level0_magnification": 40}
    right = write_h5(
        tmp_path / "a.h5", {"features": values, "coords": cells * 512}, {**told, "target_magnification": 20}
    )
    assert import_features(right).slide.mpp == 0.5
    wrong = write_h5(
        tmp_path / "b.h5", {"features": values, "coords": cells * 512}, {**told, "target_magnification": 40}
    )
    with pytest.raises(
        Fault,
        match="tiles of 256 pixels at 40× are 256 level-0 pixels a side of a slide scanned at 40×, and it says 512",
    ):
        import_features(wrong)


def test_features_that_are_whole_numbers_are_a_sentence(tmp_path: Path) -> None:
    values, cells = grid()
    bits = torch.from_numpy(values).bfloat16().view(torch.uint16).numpy()
    path = write_h5(
        tmp_path / "a.h5", {"features": bits, "coords": cells * 512}, {"patch_size": 256, "patch_size_level0": 512}
    )
    with pytest.raises(
        Fault, match=r"a\.h5 has features of type uint16, whole numbers, which no encoder gives: save them as float32"
    ):
        import_features(path, mpp=0.5)
