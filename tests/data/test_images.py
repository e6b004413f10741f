"""Encoded images come out as the pixels that were meant, or not at all."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, features

from data.images import _has_exif, decode_image
from tests.data.shards.tile_folders import picture

PIXELS = picture(1)


def written(image: Image.Image, kind: str, **settings: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **settings)
    return out.getvalue()


def near(one: np.ndarray, other: np.ndarray) -> bool:
    return one.shape == other.shape and float(np.abs(one.astype(int) - other.astype(int)).mean()) < 6


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_each_kind_of_file_gives_its_pixels(kind: str) -> None:
    settings = {"quality": 95} if kind in ("JPEG", "WEBP") else {}
    found = decode_image(memoryview(written(Image.fromarray(PIXELS), kind, **settings)))
    assert found.dtype == np.uint8 and found.flags.writeable and near(found, PIXELS)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_grey_becomes_three_equal_channels(kind: str) -> None:
    found = decode_image(written(Image.fromarray(PIXELS[..., 0]), kind))
    assert near(found, np.repeat(PIXELS[..., :1], 3, 2)) and (np.ptp(found.astype(int), axis=2) == 0).all()


def test_palettes_one_bit_and_what_cannot_be_seen_through_are_read() -> None:
    grey = Image.fromarray(PIXELS[..., 0])
    assert set(np.unique(decode_image(written(grey.convert("1"), "PNG")))) == {0, 255}
    palette = Image.fromarray(PIXELS).quantize(64)
    assert near(decode_image(written(palette, "PNG")), np.asarray(palette.convert("RGB")))
    opaque = Image.fromarray(np.dstack([PIXELS, np.full(PIXELS.shape[:2], 255, np.uint8)]))
    assert np.array_equal(decode_image(written(opaque, "PNG")), PIXELS)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(("orientation", "turns"), [(3, 2), (6, 3), (8, 1)])
def test_a_picture_that_lay_on_its_side_is_turned(kind: str, orientation: int, turns: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(PIXELS[:32])  # oblong
    settings = {"quality": 95} if kind != "PNG" else {}
    assert near(decode_image(written(image, kind, exif=exif, **settings)), np.rot90(PIXELS[:32], turns))


@pytest.mark.parametrize("others", [0, 2, 40])
def test_a_note_that_it_lay_on_its_side_is_heeded_behind_any_number_of_segments(others: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = written(Image.fromarray(PIXELS[:32]), "JPEG", exif=exif, quality=95)
    xmp = b"http://ns.adobe.com/xap/1.0/\0" + b" " * 3000
    before = (b"\xff\xff\xe1" + (len(xmp) + 2).to_bytes(2, "big") + xmp) * others  # filled by a byte, as is allowed
    assert near(decode_image(memoryview(whole[:2] + before + whole[2:])), np.rot90(PIXELS[:32], 3))


def test_what_only_looks_like_such_a_note_turns_nothing() -> None:
    comment = b"Exif\0\0 MM"
    whole = written(Image.fromarray(PIXELS), "JPEG", comment=comment, quality=95)
    assert not _has_exif(whole) and not _has_exif(whole[:25]) and near(decode_image(whole), PIXELS)


def deep_png(values: np.ndarray) -> bytes:
    """A PNG of 16 bits a channel, (H, W, channels), which Pillow doesn't write."""
    height, width, channels = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    out = b"\x89PNG\r\n\x1a\n"
    for kind, data in (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)),
        (b"sBIT", bytes([12] * channels)),  # of how many bits they were made; they are to fill the sixteen all the same
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ):
        out += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return out


def test_colours_of_sixteen_bits_are_read_where_they_fill_them_and_never_as_black() -> None:
    deep = PIXELS.astype(np.uint16) * 257
    opaque = np.full((*PIXELS.shape[:2], 1), 65535)
    assert np.array_equal(decode_image(deep_png(deep)), PIXELS)
    assert np.array_equal(decode_image(deep_png(np.dstack([deep, opaque]))), PIXELS)
    for bits in (8, 12, 14):
        low = deep >> (16 - bits)
        for values in (low, np.dstack([low, opaque]), np.dstack([low[..., :1], opaque])):
            with pytest.raises(
                ValueError, match="16 bits and stay below 16384 of 65535, as those of a camera of 12 or 14"
            ):
                decode_image(deep_png(values))


def test_what_cannot_be_read_rightly_is_refused_with_the_reason() -> None:
    see_through = Image.fromarray(np.dstack([PIXELS, PIXELS[..., 0]]))
    deep = Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257)
    for data, why in (
        (written(Image.fromarray(PIXELS).convert("CMYK"), "JPEG"), "CMYK"),
        (written(Image.fromarray(PIXELS).convert("CMYK"), "TIFF"), "CMYK"),
        (written(deep, "PNG"), "more than 8 bits"),
        (written(see_through, "PNG"), "transparent"),
        (written(Image.fromarray(PIXELS), "PNG")[:900], "truncated"),
        (written(Image.fromarray(PIXELS), "JPEG")[:300], "JPEG"),
        (b"\xff\xd8\xff", "JPEG"),
        (b"", "cannot identify"),
        (b"plain text", "cannot identify"),
    ):
        with pytest.raises(ValueError, match=why):
            decode_image(data)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_a_damaged_avif_is_told_as_any_other_picture_is() -> None:
    whole, draw, outcomes = written(Image.fromarray(PIXELS), "AVIF"), np.random.default_rng(0), set()
    for at in draw.integers(0, len(whole), 150).tolist():
        try:
            outcomes.add(
                decode_image(whole[:at] + bytes([whole[at] ^ 1 << int(draw.integers(8))]) + whole[at + 1 :]).ndim
            )
        except ValueError:
            outcomes.add("refused")
    assert outcomes == {3, "refused"}
