"""Decode an image file, encoded bytes, a PIL image or an array of pixels to RGB.

One rule serves training, embedding and evaluation, so a file gives the same pixels in all of them: EXIF rotation applied, transparency laid
over white, first frame of an animation, RGB. Pixels of more than 8 bits are scaled, not clipped:

- 16-bit files and uint16 arrays: 0..65535;
- other integers: 0..255 or 0..65535, and floats: 0..1, 0..255 or 0..65535: the first range whose double the largest finite pixel does not
  reach, or 0 to this pixel if it is larger still. So a few pixels above 1 do not turn an image black;
- below 0 and NaN (no data) is black, infinity is white; neither changes the other pixels;
- true and false: white and black.
"""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import DataError, first_line

__all__ = ["FORMATS", "MAX_PIXELS", "SUFFIXES", "decode"]

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Formats that Pillow may decode."""
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
"""File name suffixes of these formats, in lower case."""
MAX_PIXELS = 64_000_000
"""Largest number of pixels of one image."""


def decode(source: str | Path | bytes | Image.Image | Any, name: str = "image", mode: str | None = None) -> Image.Image:
    """An RGB image from a file, encoded bytes, any PIL image or an array of pixels.

    Args:
        source: path of a regular file, bytes of an image file, a PIL image of any mode, or an array or tensor of shape (H, W), (H, W, C) or
            (C, H, W) with C of 1, 3 or 4.
        name: name of the image in error messages.
        mode: PIL mode that the image is converted to before RGB, as Pillow does it; None converts by the rules of this module.

    Returns:
        A PIL image of mode RGB, rotated as its EXIF data says.

    Raises:
        DataError: not an image of a known format, damaged, or over 64 megapixels (checked before decoding).

    Example:
        >>> decode(Image.new("LA", (4, 3))).mode
        'RGB'
    """
    try:
        if isinstance(source, Image.Image):
            source.load()
            return _to_rgb(source, mode)
        if isinstance(source, str | os.PathLike):
            if not stat.S_ISREG(os.stat(source).st_mode):  # opening a pipe would wait for its writer
                raise DataError(f"{name}: cannot be read as an image (not a regular file)")
        elif isinstance(source, bytes | bytearray | memoryview):
            source = io.BytesIO(source)
        else:
            return _to_rgb(_of_array(np.asarray(source), name), mode)
        with Image.open(source, formats=FORMATS) as image:
            _check_size(image.width, image.height, name)
            image.load()
            return _to_rgb(image, mode)
    except DataError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, DecompressionBombError, ...
        reason = "of no known format" if isinstance(error, UnidentifiedImageError) else first_line(error)
        raise DataError(f"{name}: cannot be read as an image ({reason})") from error


def _check_size(width: int, height: int, name: str) -> None:
    if width * height > MAX_PIXELS:
        raise DataError(f"{name}: {width} x {height} pixels, the limit is {MAX_PIXELS // 10**6} megapixels")


def _to_rgb(image: Image.Image, mode: str | None) -> Image.Image:
    sixteen_bit = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))  # PIL opens these as int32
    image = ImageOps.exif_transpose(image)
    if mode is not None and mode != image.mode:
        image = image.convert(mode)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        pixels = np.asarray(image, dtype=np.float64)
        grey = _scaled(pixels, (65535.0,) if sixteen_bit else _INTEGER_RANGES if image.mode == "I" else _FLOAT_RANGES)
        if isinstance(clear := image.info.get("transparency"), int):  # the transparent grey level of a PNG
            grey[pixels == clear] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


_INTEGER_RANGES = (255.0, 65535.0)
_FLOAT_RANGES = (1.0, 255.0, 65535.0)
"""Values that may stand for white in pixels whose type does not tell, in ascending order."""


def _scaled(pixels: np.ndarray[Any, Any], whites: tuple[float, ...]) -> np.ndarray[Any, Any]:
    """Pixels as uint8. White is the first of `whites` whose double the largest finite pixel does not reach, else this pixel."""
    largest = float(pixels.max(initial=0, where=np.isfinite(pixels)))
    white = next((white for white in whites if largest < 2 * white), largest)
    finite = np.nan_to_num(pixels, nan=0, posinf=white, neginf=0)
    return np.clip(finite / white * 255 + 0.5, 0, 255).astype(np.uint8)


def _of_array(pixels: np.ndarray[Any, Any], name: str) -> Image.Image:
    """An image from an array of pixels.

    Raises:
        DataError: another shape or type, or values that an encoder's preprocessing has normalised.
    """
    if pixels.ndim == 3 and pixels.shape[2] not in (1, 3, 4) and pixels.shape[0] in (1, 3, 4):
        pixels = np.moveaxis(pixels, 0, 2)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if pixels.ndim not in (2, 3) or 0 in pixels.shape or pixels.shape[2:] not in ((), (3,), (4,)) or pixels.dtype.kind not in "biuf":
        raise DataError(
            f"{name}: an array of {pixels.dtype} {pixels.shape}; expected pixels (H, W), (H, W, C) or (C, H, W), C of 1, 3 or 4"
        )
    _check_size(pixels.shape[1], pixels.shape[0], name)
    if pixels.dtype == bool:
        pixels = pixels.astype(np.uint8) * 255
    elif pixels.dtype.kind == "f":
        pixels = pixels.astype(np.float64)
        if (lowest := float(pixels.min(initial=0, where=np.isfinite(pixels)))) < 0:
            raise DataError(f"{name}: an array with values down to {lowest:.3g}; expected pixels from 0 on, before they are normalised")
        pixels = _scaled(pixels, _FLOAT_RANGES)
    elif pixels.dtype != np.uint8:
        pixels = _scaled(pixels.astype(np.float64), (65535.0,) if pixels.dtype == np.uint16 else _INTEGER_RANGES)
    return Image.fromarray(np.ascontiguousarray(pixels))
