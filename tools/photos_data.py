"""Write the images that `lite0.photos` is trained on and measured with, from local copies of three data sets.

    python tools/photos_data.py CIFAR10 CIFAR100 CLOTHING OUT

CIFAR10 and CIFAR100 are folders with the training images of those sets as parquet, CLOTHING one with those of
alexeygrigorev/clothing-dataset-small. Written are OUT/train/train.parquet, without labels: 5,000 training images of each CIFAR set and four fifths of
the photographs, in random order; and OUT/clothing/train.parquet and test.parquet, with labels: the same four fifths of the photographs, and the
fifth that is held out, which is the one that `rlpjepa bench codes` holds out with seed 0.
"""

import argparse
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from rlpjepa_zoo.bench.features import TEST_SHARE
from rlpjepa_zoo.core import rng

CIFAR_IMAGES = 5_000
"""Images of each CIFAR set."""
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
    for name in ("cifar10", "cifar100", "clothing", "out"):
        parser.add_argument(name, type=Path)
    options = parser.parse_args()
    clothing = read(options.clothing)
    order = torch.randperm(clothing.num_rows, generator=rng.generator(0, "bench-test")).numpy()
    held_out = round(TEST_SHARE * clothing.num_rows)
    photographs = clothing.take(sorted(order[held_out:]))
    write(clothing.take(sorted(order[:held_out])), options.out / "clothing" / "test.parquet")
    write(photographs, options.out / "clothing" / "train.parquet")
    tables = []
    for name, folder in (("cifar10", options.cifar10), ("cifar100", options.cifar100)):
        table = read(folder)
        chosen = torch.randperm(table.num_rows, generator=rng.generator(0, f"photos-{name}"))[:CIFAR_IMAGES]
        tables.append(table.take(chosen.numpy()))
    images = pa.chunked_array([chunk for table in (*tables, photographs) for chunk in table.column("image").chunks])
    mixed = images.take(torch.randperm(len(images), generator=rng.generator(0, "photos-order")).numpy())
    write(pa.table({"image": mixed}), options.out / "train" / "train.parquet")


if __name__ == "__main__":
    main()
