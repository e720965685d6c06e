"""scikit-learn's digits (`data.source: digits`): embedded in the library, so nothing is downloaded."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from ...config.sections import Data
from ..images import Images
from .base import SOURCES, ImageSource


@SOURCES.register("digits")
class Digits(ImageSource):
    """1437 training and 360 evaluation digits of 8 x 8 pixels, a fixed stratified split."""

    def open(self, data: Data) -> tuple[Images, Images]:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        bunch = load_digits()
        pixels = np.round(bunch.images * (255 / 16)).astype(np.uint8)
        train, test = train_test_split(np.arange(len(pixels)), test_size=360, stratify=bunch.target, random_state=0)
        ids = [f"digit-{i:04d}" for i in range(len(pixels))]
        digits = Images(partial(_digit, pixels), ids, bunch.target, [str(i) for i in range(10)])
        return digits.take(train), digits.take(test)


def _digit(pixels: np.ndarray[Any, Any], i: int) -> Image.Image:
    return Image.fromarray(pixels[i])
