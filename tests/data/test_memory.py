"""Images decoded to memory give the same pictures and batches."""

from typing import Any

import numpy as np
import pytest
import torch
from batches import batches, refused_with
from images import SIZE, photos, png, toy

from rlpjepa_zoo.data.images import Images
from rlpjepa_zoo.data.loader import Batches, make_loader
from rlpjepa_zoo.data.memory import Decoded, decode_to_memory
from rlpjepa_zoo.data.sources import Source
from rlpjepa_zoo.data.views import Augment


def mixed_sizes(n: int = 24, broken: tuple[int, ...] = ()) -> Source:
    encoded = [b"junk" if i in broken else png(i, size=10 + i % 4) for i in range(n)]
    return Source(Images(lambda i: encoded[i], [f"photo-{i}" for i in range(n)], [i % 3 for i in range(n)]), None, n, 3)


@pytest.mark.parametrize("make", [photos, mixed_sizes])
def test_decoded_images_give_the_same_pictures_and_batches(make: Any) -> None:
    source = make(24, broken=(5, 9))
    kept = source._replace(train=decode_to_memory(source.train, 1e9))
    assert isinstance(kept.train, Decoded) and sorted(kept.train.reasons) == [5, 9]
    for i in (0, 7, 23):
        assert np.array_equal(np.asarray(kept.train.read(i)), np.asarray(source.train.read(i)))
        assert np.array_equal(np.asarray(kept.train.take([i]).read(0)), np.asarray(source.train.read(i)))
    for images in (source.train, kept.train, kept.train.take([5])):
        with refused_with("photo-5: cannot be read"):
            images.read(0 if len(images) == 1 else 5)
    for a, b in zip(batches(kept, toy(), range(6)), batches(source, toy(), range(6)), strict=True):
        assert torch.equal(a.rows, b.rows) and torch.equal(a.labels, b.labels) and a.bad == b.bad
        assert (kept.train.stack is not None) == (make is photos) and (make is photos or torch.equal(a.images[0], b.images[0]))


def test_joint_crops_differ_by_at_most_a_grey_level() -> None:
    source = photos(24, broken=(3, 8))
    kept = source._replace(train=decode_to_memory(source.train, 1e9))
    assert kept.train.stack.shape == (22, SIZE, SIZE, 3)
    recipe = toy("views.jitter=0", "views.grayscale=0", "views.noise=0", "data.mean=[0,0,0]", "data.std=[1,1,1]")
    for a, b in zip(batches(kept, recipe, range(3)), batches(source, recipe, range(3)), strict=True):
        assert torch.equal(a.rows, b.rows) and torch.equal(a.labels, b.labels)
        assert float((a.images[0] - b.images[0]).abs().max()) <= 1.01 / 255


def test_images_that_need_too_much_memory_are_not_decoded() -> None:
    source = photos(24)
    assert decode_to_memory(source.train, 24 * 3 * SIZE * SIZE - 1) is source.train
    assert isinstance(decode_to_memory(source.train, 24 * 3 * SIZE * SIZE), Decoded)
    unreadable = photos(3, broken=(0, 1, 2)).train
    assert decode_to_memory(unreadable, 1e9) is unreadable


@pytest.mark.parametrize("make", [photos, mixed_sizes])
@pytest.mark.parametrize("keep", [False, True])
def test_views_finished_later_equal_those_of_the_workers(make: Any, keep: bool) -> None:
    source, recipe = make(24), toy("views.count=3", "views.blur=0.5")
    if keep:
        source = source._replace(train=decode_to_memory(source.train, 1e9))
    augment = Augment(recipe.views, recipe.data, recipe.seed)
    with Batches(make_loader(source, recipe, range(3), finish=False)) as loader:
        for expected in batches(source, recipe, range(3)):
            batch = loader.next()
            assert batch.images[0].dtype == torch.uint8
            assert torch.equal(augment(batch.images, batch.epoch, batch.rows)[0], expected.images[0])
