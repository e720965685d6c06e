"""Rows of images for tests: a Hugging Face table, tar files of WebDataset, and their encoded images."""

import io
import itertools
import tarfile
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

N = 11


NAMES = [f"{'ab'[i % 2]}/{i:02d}.png" for i in range(N)]


FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "label": datasets.ClassLabel(names=["a", "b"]),
        "note": datasets.Value("string"),
        "key": datasets.Value("string"),
    }
)


def picture(i: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(i).integers(0, 256, (9 + i % 3, 8, 3), dtype=np.uint8))


def png(i: int) -> bytes:
    buffer = io.BytesIO()
    picture(i).save(buffer, "PNG")
    return buffer.getvalue()


def table(rows: range = range(N)) -> datasets.Dataset:
    columns = {"image": [{"bytes": png(i), "path": None} for i in rows], "label": [i % 2 for i in rows]}
    return datasets.Dataset.from_dict(columns | {"note": [f"n{i}" for i in rows], "key": [f"k{i}" for i in rows]}, features=FEATURES)


def tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def samples(rows: range) -> list[tuple[str, bytes]]:
    parts = [[(f"x/s{i:02d}.png", png(i)), (f"x/s{i:02d}.cls", b"%d" % (i % 2)), (f"x/s{i:02d}.json", b'{"i": %d}' % i)] for i in rows]
    return list(itertools.chain.from_iterable(parts))
