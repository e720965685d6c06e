"""Batches of training data for tests: made, compared and joined."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from rlpjepa_zoo.config.pretrain import Recipe
from rlpjepa_zoo.data.batch import Batch
from rlpjepa_zoo.data.loader import Batches, make_loader
from rlpjepa_zoo.data.sources import Source
from rlpjepa_zoo.errors import DataError, ZooError


@contextmanager
def refused_with(*fragments: str, kind: type[ZooError] = DataError) -> Iterator[None]:
    """An error of exactly one kind, in one line that holds the fragments."""
    with pytest.raises(kind) as caught:
        yield
    message = str(caught.value)
    assert type(caught.value) is kind and len(message.splitlines()) == 1, message
    for fragment in fragments:
        assert fragment in message


def batches(source: Source, recipe: Recipe, steps: range, rank: int = 0, world: int = 1) -> list[Batch]:
    with Batches(make_loader(source, recipe, steps, rank, world)) as loader:
        made = [loader.next() for _ in steps]
        with pytest.raises(StopIteration):
            loader.next()
    return made


def same(a: Batch, b: Batch) -> bool:
    equal = torch.equal(a.images[0], b.images[0]) and torch.equal(a.labels, b.labels) and torch.equal(a.rows, b.rows)
    return equal and [row for row, _ in a.bad] == [row for row, _ in b.bad]


def agree(results: list[Batch], expected: list[Batch]) -> bool:
    return len(results) == len(expected) and all(same(a, b) for a, b in zip(results, expected, strict=True))


def joined(parts: list[list[Batch]]) -> list[Batch]:
    return [
        Batch(
            [torch.cat([p.images[0] for p in step], 1)],
            torch.cat([p.labels for p in step]),
            torch.cat([p.rows for p in step]),
            step[0].epoch,
            [r for p in step for r in p.bad],
        )
        for step in zip(*parts, strict=True)
    ]
