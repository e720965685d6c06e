"""Write the images that `lite0.photos` is trained on and measured with, from local copies of CIFAR-100 and of the clothing photographs.

    python tools/photos_data.py CIFAR100 CLOTHING OUT

CIFAR100 is a folder with the training images of CIFAR-100 as parquet, CLOTHING one with those of alexeygrigorev/clothing-dataset-small.
Written are OUT/train/train.parquet, without labels: 20,000 images of CIFAR-100 and four fifths of the photographs, in random order; and
OUT/clothing/train.parquet and test.parquet, with labels: the same four fifths of the photographs, and the fifth that is held out, which is the
one that `rlpjepa bench codes` holds out with seed 0.
"""

import argparse
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from rlpjepa_zoo.bench.features import TEST_SHARE
from rlpjepa_zoo.core import rng

CIFAR_IMAGES = 20_000
ROWS = 256
"""Rows of a row group."""


def read(folder: Path) -> pa.Table:
    """The training images of a folder."""
    return pa.concat_tables([pq.read_table(path) for path in sorted(folder.glob("train*.parquet"))])


def write(table: pa.Table, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=ROWS)
    print(f"{path}: {table.num_rows} images")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("cifar100", "clothing", "out"):
        parser.add_argument(name, type=Path)
    options = parser.parse_args()
    cifar, clothing = read(options.cifar100), read(options.clothing)
    order = torch.randperm(clothing.num_rows, generator=rng.generator(0, "bench-test")).numpy()
    held_out = round(TEST_SHARE * clothing.num_rows)
    photographs = clothing.take(sorted(order[held_out:]))
    write(clothing.take(sorted(order[:held_out])), options.out / "clothing" / "test.parquet")
    write(photographs, options.out / "clothing" / "train.parquet")
    chosen = torch.randperm(cifar.num_rows, generator=rng.generator(0, "photos-cifar100"))[:CIFAR_IMAGES]
    images = pa.chunked_array([chunk for table in (cifar.take(chosen.numpy()), photographs) for chunk in table.column("image").chunks])
    mixed = images.take(torch.randperm(len(images), generator=rng.generator(0, "photos-order")).numpy())
    write(pa.table({"image": mixed}), options.out / "train" / "train.parquet")


if __name__ == "__main__":
    main()
