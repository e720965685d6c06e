"""Random images in the layouts in which people have the data sets of the recipes: real names, sizes, columns and numbers of classes."""

import functools
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from images import encoded, photo

PHOTOS = 12
"""Different photographs; more files repeat them, as encoding takes most of the time."""


@functools.cache
def jpeg(seed: int, height: int, width: int) -> bytes:
    """An encoded photograph."""
    return encoded(photo(np.random.default_rng(seed), height, width), "JPEG")


def imagenet_folders(root: Path, classes: int) -> Path:
    """The folders of ImageNet: a training and a validation image of each class, 500 pixels wide and 375 high."""
    first: list[Path] = []
    for k in range(classes):
        synset = f"n{1440764 + 9973 * k:08d}"
        for split, name in (("train", f"{synset}_10026.JPEG"), ("val", f"ILSVRC2012_val_{k + 1:08d}.JPEG")):
            (root / split / synset).mkdir(parents=True)
            path = root / split / synset / name
            if len(first) < PHOTOS:
                path.write_bytes(jpeg(len(first), 375, 500))
                first.append(path)
            else:
                path.hardlink_to(first[k % PHOTOS])
    return root


def imagenet_parquet(n: int = 40) -> dict[str, bytes]:
    """Files of the repository ILSVRC/imagenet-1k on the Hub, by path: the columns image and label, a thousand classes."""
    columns = {"image": datasets.Image(), "label": datasets.ClassLabel(names=[f"class {k}" for k in range(1000)])}
    rows = {"image": [jpeg(i % PHOTOS, 375, 500) for i in range(n)], "label": [25 * i for i in range(n)]}
    return {f"data/{split}-00000-of-00001.parquet": _parquet(columns, rows) for split in ("train", "validation")}


def cifar_parquet(classes: int, n: int = 100) -> dict[str, bytes]:
    """Files of the repository uoft-cs/cifar10 or uoft-cs/cifar100 on the Hub, by path: PNG images of 32 pixels in the column img."""
    images, labels = [encoded(photo(np.random.default_rng(i), 32, 32), "PNG") for i in range(n)], [i % classes for i in range(n)]
    names = [f"class {k}" for k in range(classes)]
    columns, rows = {"img": datasets.Image(), "label": datasets.ClassLabel(names=names)}, {"img": images, "label": labels}
    if classes == 100:
        columns = {
            "img": datasets.Image(),
            "fine_label": datasets.ClassLabel(names=names),
            "coarse_label": datasets.ClassLabel(num_classes=20),
        }
        rows = {"img": images, "fine_label": labels, "coarse_label": [label // 5 for label in labels]}
    folder = "cifar100" if classes == 100 else "plain_text"
    return {f"{folder}/{split}-00000-of-00001.parquet": _parquet(columns, rows) for split in ("train", "test")}


def celeba_parquet(n: int = 24) -> dict[str, bytes]:
    """Files of the repository flwrlabs/celeba on the Hub, by path: faces of 178 x 218 pixels, an identity and attributes, no classes."""
    columns = {
        "image": datasets.Image(),
        "celeb_id": datasets.Value("int64"),
        "Smiling": datasets.Value("bool"),
        "Young": datasets.Value("bool"),
    }
    rows = {
        "image": [jpeg(i % PHOTOS, 218, 178) for i in range(n)],
        "celeb_id": list(range(n)),
        "Smiling": [i % 2 == 0 for i in range(n)],
        "Young": [True] * n,
    }
    return {f"img_align+identity+attr/{split}-00000-of-00001.parquet": _parquet(columns, rows) for split in ("train", "valid", "test")}


def write(root: Path, files: Mapping[str, bytes]) -> Path:
    """A local copy of the files of a repository."""
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def _parquet(columns: Mapping[str, Any], rows: Mapping[str, list[Any]]) -> bytes:
    """A parquet file; images are given encoded."""
    cells = {
        name: [{"bytes": cell, "path": None} for cell in column] if isinstance(column[0], bytes) else column
        for name, column in rows.items()
    }
    buffer = io.BytesIO()
    datasets.Dataset.from_dict(cells, features=datasets.Features(columns)).to_parquet(buffer)
    return buffer.getvalue()
