"""Images: subsets, pickling, and cutting any data set into spans."""

from collections.abc import Iterator

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from rlpjepa_zoo.data.images import ImageRows, Images, Row, spans
from rlpjepa_zoo.data.sources import open_images


def test_take_gives_a_subset_and_open_images_passes_through(image_folder):
    images = open_images(image_folder)
    assert open_images(images) is images
    part = Images(images._read, images.ids, np.arange(40), ["a", "b"]).take([30, 2])
    assert part.ids == ["red/10.png", "blue/02.png"]
    assert part.labels.tolist() == [30, 2]
    np.testing.assert_array_equal(np.asarray(part.read(0)), np.asarray(images.read(30)))


def test_images_can_be_pickled_for_spawned_workers(image_folder):
    from multiprocessing.reduction import ForkingPickler

    images = open_images(image_folder)
    for source in (images, images.take([3, 1]), open_images([Image.new("L", (4, 4))])):
        copy = ForkingPickler.loads(ForkingPickler.dumps(source))
        np.testing.assert_array_equal(np.asarray(copy.read(0)), np.asarray(source.read(0)))


def counting(n: int, known: bool, seekable: bool, started: list[int]) -> ImageRows:
    """n rows; `started` receives the first row of each iteration."""

    def rows(start: int) -> Iterator[Row]:
        started.append(start)
        return (Row(i, lambda: Image.new("RGB", (1, 1)), {}) for i in range(start, n))

    return ImageRows(rows, n if known else None, {}, seekable=seekable)


@given(st.integers(0, 30), st.integers(1, 9), st.sets(st.integers(0, 30)), st.booleans(), st.booleans())
def test_wanted_spans_hold_their_rows(n: int, size: int, skip: set[int], known: bool, seekable: bool) -> None:
    started: list[int] = []
    results = {k: [row.id for row in rows] for k, rows in spans(counting(n, known, seekable, started), size, lambda k: k not in skip)}
    expected = {k: list(range(k * size, min(n, (k + 1) * size))) for k in range(-(-n // size)) if k not in skip}
    assert {k: rows for k, rows in results.items() if rows} == expected
    assert len([rows for rows in results.values() if not rows]) <= (0 if known else 1)
    assert seekable or len(started) <= 1
