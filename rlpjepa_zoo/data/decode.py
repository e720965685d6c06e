"""Decode an image file, encoded bytes or any PIL image to RGB.

One rule serves training, embedding and evaluation, so a file gives the same pixels in all of them: EXIF rotation applied, alpha laid over
white, 16-bit and float greyscale scaled (not clipped), first frame of an animation, RGB.
"""

from __future__ import annotations

import functools
import importlib
import io
import re
from pathlib import Path

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
    try:
        if not isinstance(source, bytes):
            with open(source, "rb") as file:
                source = file.read(16)
    except (OSError, ValueError):
        return None
    return next((text for pattern, text in _UNREADABLE if re.match(pattern, source)), None)


def decode(source: str | Path | bytes | Image.Image, name: str = "image") -> Image.Image:
    """An RGB image from a file, encoded bytes or any PIL image.

    Args:
        source: path, bytes of an image file, or a PIL image of any mode.
        name: name of the image in error messages.

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
            return _to_rgb(ImageOps.exif_transpose(source))
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats()) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"{name}: {image.width} x {image.height} pixels, the limit is {MAX_PIXELS // 10**6} megapixels")
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except DataError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, DecompressionBombError, ...
        reason = first_line(error)
        if isinstance(error, UnidentifiedImageError) and not isinstance(source, Image.Image):
            reason = unreadable_format(source) or "of no known format"
        raise DataError(f"{name}: cannot be read as an image ({reason})") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        pixels = np.asarray(image, dtype=np.float64)
        # integers: 16 bit (PIL opens 16-bit PNG as I or I;16); floats: 0..1 unless larger values occur
        top = 65535.0 if image.mode != "F" else 1.0 if pixels.max(initial=0) <= 1 else 255.0
        return Image.fromarray(np.clip(np.nan_to_num(pixels) / top * 255 + 0.5, 0, 255).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")
