"""Small images for tests: encoded PNG, and recipes and sources of them."""

import io

import numpy as np
from PIL import Image

from rlpjepa_zoo.config.pretrain import Recipe
from rlpjepa_zoo.data.images import Images
from rlpjepa_zoo.data.sources import Source

SIZE = 12


CLASSES = ["ant", "bee", "cat"]


def png(seed: int, size: int = SIZE) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def toy(*more: str) -> Recipe:
    plain = [
        f"data.image_size={SIZE}", "views.crop_scale=[0.3, 1.0]", "views.flip=0.5", "views.jitter=0.8", "train.batch_size=8",
        "train.num_workers=0", "encoder.backbone=test_resnet",
    ]  # fmt: skip
    return Recipe.load("digits", [*plain, *more])


def photos(n: int = 40, broken: tuple[int, ...] = (), labels: bool = True) -> Source:
    encoded = [b"junk" if i in broken else png(i) for i in range(n)]
    found = Images(lambda i: encoded[i], [f"photo-{i}" for i in range(n)], [i % 3 for i in range(n)] if labels else None)
    return Source(found, None, n, 3 if labels else 0)
