"""Small images for tests: encoded PNG, and recipes and sources of them."""

import io
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

from rlpjepa_zoo.config.pretrain import Recipe
from rlpjepa_zoo.data.images import Images
from rlpjepa_zoo.data.sources import Source

SIZE = 12
CLASSES = ["ant", "bee", "cat"]
FEATURES = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES), "note": datasets.Value("string")})


def photo(rng: np.random.Generator, height: int = 32, width: int = 48) -> Image.Image:
    """A colour gradient with noise."""
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.stack([rows * 5, columns * 4, rows + columns], -1) + rng.integers(0, 40, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(seed: int, size: int = SIZE) -> bytes:
    """Encoded PNG of random pixels."""
    return encoded(Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8)), "PNG")


def toy(*more: str) -> Recipe:
    """A recipe of small views and batches."""
    plain = [
        f"data.image_size={SIZE}", "views.crop_scale=[0.3, 1.0]", "views.flip=0.5", "views.jitter=0.8", "train.batch_size=8",
        "train.num_workers=0", "encoder.backbone=test_resnet",
    ]  # fmt: skip
    return Recipe.load("digits", [*plain, *more])


def photos(n: int = 40, broken: tuple[int, ...] = (), labels: bool = True) -> Source:
    """Images of three classes that are read from memory; those in `broken` cannot be decoded."""
    encoded = [b"junk" if i in broken else png(i) for i in range(n)]
    images = Images(lambda i: encoded[i], [f"photo-{i}" for i in range(n)], [i % 3 for i in range(n)] if labels else None)
    return Source(images, None, n, 3 if labels else 0)


def write_images(folder: Path, n: int = 3, first: int = 0) -> None:
    """Write PNG files 00.png, 01.png, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        (folder / f"{first + i:02d}.png").write_bytes(png(first + i))


def write_two_classes(root: Path, n: int, widths: int = 1) -> Path:
    """Write n PNG files of noise, by turns into blue/ and red/, 32 pixels high and 32 to 31 + widths wide."""
    for i in range(n):
        path = root / ("blue", "red")[i % 2] / f"{i:0{len(str(n - 1))}d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (32, 32 + i % widths, 3), dtype=np.uint8)).save(path)
    return root


def table(rows: range, broken: tuple[int, ...] = ()) -> datasets.Dataset:
    """A data set of images of three classes; those in `broken` cannot be decoded."""
    columns = {
        "image": [{"bytes": b"junk" if i in broken else png(i), "path": None} for i in rows],
        "label": [i % 3 for i in rows],
        "note": [f"row {i}" for i in rows],
    }
    return datasets.Dataset.from_dict(columns, features=FEATURES)
