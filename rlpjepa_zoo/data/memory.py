"""Images that are decoded once and kept in memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import DataError
from ..progress import progress_bar
from .images import Images

__all__ = ["Decoded", "decode_to_memory"]

_SAMPLE = 64
"""Images that are decoded to estimate how much memory all need."""


class Decoded(Images):
    """Decoded images in one block of memory.

    If all readable images have one size, `stack` is (m, H, W, 3) uint8 of the m readable ones and `positions` their indices in it by row.

    Args:
        pixels: (N,) uint8, image after image.
        sizes: (n, 2) height and width, zero for images that cannot be read.
        reasons: row -> why the image cannot be read.
        original: the images that were decoded.
    """

    def __init__(self, pixels: Tensor, sizes: np.ndarray[Any, Any], reasons: dict[int, str], original: Images) -> None:
        super().__init__(self._picture, original.ids, original.labels, original.classes, original.identity)
        self.pixels, self.sizes, self.reasons = pixels, sizes, reasons
        self.ends = np.cumsum(3 * sizes.prod(1))
        different = np.unique(sizes[sizes[:, 0] > 0], axis=0)
        self.stack = pixels.view(-1, *different[0].tolist(), 3) if len(different) == 1 else None
        self.positions = np.cumsum(sizes[:, 0] > 0) - 1

    def _picture(self, i: int) -> Image.Image:
        if i in self.reasons:
            raise DataError(self.reasons[i].removeprefix(f"{self.ids[i]}: "))
        height, width = self.sizes[i].tolist()
        start = int(self.ends[i]) - 3 * height * width
        return Image.fromarray(self.pixels[start : int(self.ends[i])].view(height, width, 3).numpy())

    def read(self, i: int) -> Image.Image:
        """Image i in RGB.

        Raises:
            DataError: the image could not be decoded; the message is the first one.
        """
        if i in self.reasons:
            raise DataError(self.reasons[i])
        return self._picture(i)


def decode_to_memory(source: Images, max_bytes: float, progress: bool = False) -> Images:
    """The images decoded and in memory, or unchanged if they need more than `max_bytes`.

    The size of all is estimated from 64 of them; up to a quarter more than `max_bytes` is used if the estimate is low.

    Args:
        source: the images.
        max_bytes: memory that the pixels may take.
        progress: show a progress bar on stderr.
    """
    n, sample = len(source), []
    for i in np.linspace(0, n - 1, min(n, _SAMPLE)).astype(int):
        try:
            picture = source.read(int(i))
            sample.append(3 * picture.width * picture.height)
        except DataError:
            pass
    if not sample or sum(sample) / len(sample) * n > max_bytes:
        return source
    block, sizes, reasons = bytearray(), np.zeros((n, 2), np.int64), dict[int, str]()
    with progress_bar("decode", n, hidden=not progress, leave=False) as bar:
        for i in range(n):
            bar.update()
            try:
                picture = source.read(i)
            except DataError as error:
                reasons[i] = str(error)
                continue
            sizes[i] = picture.height, picture.width
            block += picture.tobytes()
            if len(block) > 1.25 * max_bytes:  # the images of the sample were small ones
                return source
    return Decoded(torch.frombuffer(block, dtype=torch.uint8), sizes, reasons, source)
