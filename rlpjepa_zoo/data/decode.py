"""Decode an image file, encoded bytes or any PIL image to RGB.

One rule serves training, embedding and evaluation, so a file gives the same pixels in all of them: EXIF rotation applied, alpha laid over
white, 16-bit and float greyscale scaled (not clipped), first frame of an animation, RGB.
"""

from __future__ import annotations

import io
from pathlib import Path

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
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"{name}: {image.width} x {image.height} pixels, the limit is {MAX_PIXELS // 10**6} megapixels")
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except DataError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, DecompressionBombError, ...
        reason = "of no known format" if isinstance(error, UnidentifiedImageError) else first_line(error)
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
