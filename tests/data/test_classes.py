"""Class numbers of labels of any kind, and of both parts of a data set."""

import logging
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from batches import refused_with
from images import png

from rlpjepa_zoo.config.sections import Data
from rlpjepa_zoo.data.images import Images
from rlpjepa_zoo.data.sources import Source, open_images, open_source
from rlpjepa_zoo.data.sources.classes import number_classes


@pytest.mark.parametrize(
    ("values", "numbers", "names"),
    [
        ([2, 0, 1, None], [2, 0, 1, -1], None),
        ([-1, 1, 0], [-1, 1, 0], None),
        ([10**9, 5, 5], [1, 0, 0], ["5", "1000000000"]),
        ([1, 2, 3], [0, 1, 2], ["1", "2", "3"]),
        ([2**64 - 1, 0], [1, 0], ["0", "18446744073709551615"]),
        (["dog", "cat", None], [1, 0, -1], ["cat", "dog"]),
        ([True, False], [1, 0], ["False", "True"]),
        ([1.0, float("nan"), 0.0], [1, -1, 0], None),
        ([Decimal("7.0"), Decimal("9")], [0, 1], ["7", "9"]),
        (np.array([4, 4, 8]), [0, 0, 1], ["4", "8"]),
        ([], [], None),
    ],
)
def test_labels_are_numbered_from_zero_without_gaps(values: Any, numbers: list[int], names: list[str] | None) -> None:
    assert number_classes(values) == (numbers, names)


def test_indices_of_class_names_stay_as_they_are() -> None:
    assert number_classes([2, None, 2], ["a", "b", "c"]) == ([2, -1, 2], ["a", "b", "c"])


@pytest.mark.parametrize(
    ("values", "reason"),
    [([0.5, 1.0], "there is 0.5"), ([float("inf")], "there is inf"), ([[1], [2]], r"there is \[1\]"), ([1, "a"], "several kinds, such as 1 and 'a'"),
     ([b"x"], "there is b'x'")],
)  # fmt: skip
def test_labels_that_are_no_classes_are_refused(values: Any, reason: str) -> None:
    with refused_with("y: ", reason.replace("\\", "")):
        number_classes(values, column="y")


def test_images_take_whole_numbers_as_labels_only() -> None:
    assert Images([].__getitem__, [0, 1], [1.0, 0.0]).labels.tolist() == [1, 0]  # type: ignore[union-attr]
    for labels in ([0.5, 1.0], [float("nan"), 0.0], ["a", "b"], [None, 0]):
        with refused_with("labels: expected integers"):
            Images([].__getitem__, [0, 1], labels)  # type: ignore[arg-type]


def test_many_classes_of_few_images_are_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    number_classes([f"caption {i}" for i in range(1500)], column="column 'label'")
    assert "column 'label': 1500 classes of 1500 images" in caplog.text


def written(folder: Path, train: Any, test: Any, source: str, **more: Any) -> Source:
    for part, labels in (("train", train), ("test", test)):
        images = [{"bytes": png(i), "path": None} for i in range(len(labels))]
        pq.write_table(pa.table({"image": images, "label": labels}), folder / f"{part}.parquet")
    return open_source(Data(source=source, path=str(folder), eval_split="test", **more))


@pytest.mark.parametrize("source", ["parquet", "hf"])
@pytest.mark.parametrize(
    ("train", "test", "numbers", "expected"),
    [
        ([10**9, 5, 5], [5, 10**9, 7], [1, 0, 0], [0, 1, -1]),
        ([0, 1, 2], [2, 1], [0, 1, 2], [2, 1]),
        ([1, 2, 3], [3, 2, 1], [0, 1, 2], [2, 1, 0]),
        (["b", "a"], ["a", None], [1, 0], [0, -1]),
        ([True, False], [True], [1, 0], [1]),
        (pa.array(["x", "y"]).dictionary_encode(), ["y"], [0, 1], [1]),
    ],
)
def test_both_parts_of_a_data_set_agree(
    tmp_path: Path, source: str, train: Any, test: Any, numbers: list[int], expected: list[int]
) -> None:
    opened = written(tmp_path, train, test, source)
    assert opened.images.labels is not None and opened.images.labels.tolist() == numbers
    assert opened.eval is not None and opened.eval.labels is not None and opened.eval.labels.tolist() == expected
    assert opened.eval.classes == opened.images.classes and opened.classes == max(numbers) + 1
    originals = [row.columns["label"] for row in open_images(tmp_path / "train.parquet").rows()]
    names = opened.images.classes or list(map(str, range(opened.classes)))
    assert [names[number] for number in numbers] == [str(label) for label in originals]


def test_numbers_are_kept_beside_a_part_with_class_names(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    images = [{"bytes": png(i), "path": None} for i in range(2)]
    datasets.Dataset.from_dict({"image": images, "label": [1, 0]}, features=features).to_parquet(str(tmp_path / "train.parquet"))
    pq.write_table(pa.table({"image": images, "label": [0, 1]}), tmp_path / "test.parquet")
    opened = open_source(Data(source="parquet", path=str(tmp_path), eval_split="test"))
    assert opened.eval is not None and opened.eval.labels is not None and opened.eval.labels.tolist() == [0, 1]


def test_renumbering_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        written(tmp_path, [7, 9], [9], "parquet")
    assert "column 'label': 2 classes with labels from 7 to 9 are numbered from 0" in caplog.text
