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

import functools
import importlib
import io
import os
import re
import stat
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import DataError, first_line

__all__ = ["FORMATS", "MAX_PIXELS", "decode", "formats", "image_format", "suffixes", "unreadable_format"]

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "HEIF", "JXL")
"""Formats of photographs that may be decoded, where Pillow or a plugin of it can. Others of Pillow have no magic number or run other programs."""
_PLUGINS = {"pillow_heif": "register_heif_opener", "pillow_jxl": None}
"""Plugins of Pillow that are used where they are installed, and the function that registers them if importing does not."""
_UNREADABLE = (
    (rb"(?s).{4}ftyp(hei|hev|mif1|msf1)", "HEIC, which needs `pip install pillow-heif`"),
    (rb"(?s).{4}ftypavi", "AVIF, which this version of Pillow cannot decode"),
    (rb"\xff\x0a|\0{3}\x0cJXL ", "JPEG XL, which needs `pip install pillow-jxl-plugin`"),
    (rb"(?s).{4}ftypcrx|FUJIFILM|II[RU]|MMOR", "camera raw; export it as JPEG"),
    (rb"8BPS", "a Photoshop file; export it as PNG"),
)
"""Formats that are recognised though they cannot be decoded: how the file begins, and what is said of it."""
_OTHER_FILES = (
    (rb"PK\x03\x04|Rar!|7z\xbc\xaf|\x1f\x8b|BZh|\xfd7zXZ", "an archive; unpack it, or make it a .tar file"),
    (rb"\x93NUMPY", "an array; pass the array itself to embed"),
    (rb"PAR1", "a table; its name must end in .parquet"),
    (rb"%PDF", "a PDF document; export its pages as PNG"),
    (rb"[\t\n\r -~]{16}", "a text file; a list of image paths ends in .txt, a table of images in .parquet"),
)
"""Files that are no images, but may be given by mistake: how they begin, and what is said of them."""
MAX_PIXELS = 64_000_000
"""Largest number of pixels of one image."""


@functools.cache
def formats() -> tuple[str, ...]:
    """The formats that can be decoded here, as Pillow names them."""
    for module, register in _PLUGINS.items():
        try:
            plugin = importlib.import_module(module)
        except (ImportError, OSError):  # not installed, or without its shared library
            continue
        if register is not None:
            getattr(plugin, register)()
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@functools.cache
def suffixes() -> tuple[str, ...]:
    """File name suffixes of the formats that can be decoded here, in lower case."""
    formats()
    return tuple(suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS)


def image_format(source: str | Path | bytes) -> str | None:
    """Format of an image file by its first bytes, as Pillow names it; None if it cannot be decoded. Pixels are not read."""
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats()) as image:
            return image.format
    except Exception:  # see `decode`
        return None


def unreadable_format(source: str | Path | bytes) -> str | None:
    """What is said of a file whose first bytes are those of an image that cannot be decoded here; None if they are not.

    Example:
        >>> unreadable_format(b"8BPS" + bytes(20))
        'a Photoshop file; export it as PNG'
    """
    return _described(source, _UNREADABLE)


def _described(source: str | Path | bytes, table: tuple[tuple[bytes, str], ...]) -> str | None:
    """What a table says of a file by its first bytes."""
    try:
        if not isinstance(source, bytes):
            with open(source, "rb") as file:
                source = file.read(16)
    except (OSError, ValueError):
        return None
    return next((text for pattern, text in table if re.match(pattern, source)), None)


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
            source = bytes(source)
        else:
            return _to_rgb(_of_array(np.asarray(source), name), mode)
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats()) as image:
            _check_size(image.width, image.height, name)
            image.load()
            return _to_rgb(image, mode)
    except DataError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, DecompressionBombError, ...
        reason = first_line(error)
        if isinstance(error, UnidentifiedImageError) and isinstance(source, str | Path | bytes):
            reason = _described(source, _UNREADABLE + _OTHER_FILES) or "of no known format"
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
