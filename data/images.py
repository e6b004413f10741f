"""Encoded images of tiles as pixels: JPEG the quick way, everything else that Pillow reads; what can't be read rightly is
refused, never read wrongly."""

import io

import numpy as np
import simplejpeg
from PIL import Image, ImageOps

JPEG = b"\xff\xd8\xff"
EXIF = b"Exif\0\0"
APP1, SCAN = 0xE1, 0xDA  # markers of segments: the kind that Exif is of, and the one that pixels begin with
SIXTEEN_BITS = ("I", "I;16", "I;16L", "I;16B", "I;16N", "F")
DARKEST_WHOLE = 64  # of 256: 16-bit colours all below it are those of a camera of up to 14 bits
OF_DAMAGE = (OSError, SyntaxError, EOFError, RuntimeError)  # that Pillow raises; the last for AVIF
NO_LIGHT = ("CMYK", "YCCK", "LAB", "HSV")  # inks or coordinates, which tell no red, green and blue without a profile


def decode_image(data: bytes | memoryview) -> np.ndarray:
    """The pixels of an encoded image, uint8 ``(H, W, 3)``.

    Grey ones get three equal channels, and a camera's note that it lay on its side (EXIF) is heeded. Raises ValueError
    where it is damaged, has inks in place of light (CMYK), more than 8 bits of grey, colours of 16 bits of which the upper
    ones aren't used, or parts that can be seen through.
    """
    if bytes(data[:3]) == JPEG and not _has_exif(data):
        colours = simplejpeg.decode_jpeg_header(data)[2]
        if colours in NO_LIGHT:
            raise _inks(colours)
        return simplejpeg.decode_jpeg(data, colorspace="RGB")
    try:
        with Image.open(io.BytesIO(data)) as image:
            load_whole_range(image)
            return np.array(_as_rgb(ImageOps.exif_transpose(image)))
    except (*OF_DAMAGE, Image.DecompressionBombError) as error:
        raise ValueError(str(error).replace(" <_io.BytesIO object", "").split(" at 0x")[0]) from error


def is_encoded(data: bytes) -> bool:
    """Whether bytes begin as an encoded image does; it may be damaged further on."""
    try:
        Image.open(io.BytesIO(data)).close()
    except Image.DecompressionBombError:
        return True
    except OF_DAMAGE:
        return False
    return True


def load_whole_range(image: Image.Image) -> None:
    """Read the pixels of an opened image. Raises ValueError where its colours have 16 bits, of which Pillow takes the upper
    eight, and what they say is in the lower ones."""
    deep = ";16" in str(getattr(image, "tile", ""))  # what the decoder is told; loading clears it
    image.load()
    deep &= image.mode not in SIXTEEN_BITS
    if (
        deep
        and max(np.asarray(image.getchannel(band)).max() for band in image.getbands() if band != "A") < DARKEST_WHOLE
    ):
        raise ValueError(
            f"its colours have 16 bits and stay below {DARKEST_WHOLE * 256} of 65535, as those of a camera of 12 or 14 bits"
            " do: scale them to 65535, or save it as 8-bit RGB"
        )


def _has_exif(data: bytes | memoryview) -> bool:
    """Whether one of a JPEG's segments before its pixels is Exif; behind how many others makes no difference."""
    at, last = 2, len(data) - 10
    while at <= last and data[at] == 0xFF and (marker := data[at + 1]) != SCAN:
        if marker == APP1 and data[at + 4 : at + 10] == EXIF:
            return True
        # Any number of 0xFF may fill the room in front of a marker.
        at += 1 if marker == 0xFF else 2 + (data[at + 2] << 8 | data[at + 3])
    return False


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode in SIXTEEN_BITS:
        raise ValueError(f"its grey values have more than 8 bits (Pillow's mode {image.mode}): save it as 8-bit RGB")
    if image.mode in NO_LIGHT:
        raise _inks(image.mode)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getextrema()[3][0] < 255:  # type: ignore[misc, index]
            raise ValueError("parts of it are transparent: lay it on a background, and save it as RGB")
    return image.convert("RGB")


def _inks(colours: str) -> ValueError:
    return ValueError(f"its colours are {colours}, which is no RGB without a profile: save it as RGB")
