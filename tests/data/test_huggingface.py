"""Images of a Hugging Face data set with random access."""

import datasets
import numpy as np
import pytest
from images import encoded, photo
from PIL import Image
from refusals import refused

from rlpjepa_zoo.data.decode import decode
from rlpjepa_zoo.data.sources import Source, folder_contents, open_images
from rlpjepa_zoo.data.sources.huggingface import indexed_images
from rlpjepa_zoo.errors import DataError, UsageError


@pytest.fixture
def rows(rng, tmp_path):
    photo(rng).save(tmp_path / "file.png")
    good = encoded(photo(rng), "JPEG")
    return [
        {"bytes": good, "path": None},
        {"bytes": good[: len(good) // 2], "path": None},
        {"bytes": None, "path": str(tmp_path / "file.png")},
    ]


def check_rows(images):
    assert list(images.ids) == [0, 1, 2]
    assert images.read(0).size == images.read(2).size == (48, 32)
    with refused(DataError, match=r"^1: "):
        images.read(1)


def test_image_feature_is_read_row_by_row(rows):
    features = datasets.Features({"id": datasets.Value("int64"), "img": datasets.Image(), "y": datasets.ClassLabel(names=["cat", "dog"])})
    data = datasets.Dataset.from_dict({"id": [7, 8, 9], "img": rows, "y": [1, 0, None]}, features=features)
    images = indexed_images(data)
    check_rows(images)
    assert images.labels.tolist() == [1, 0, -1]
    assert images.classes == ["cat", "dog"]


def test_struct_of_bytes_and_path_is_read_row_by_row(rows):
    check_rows(indexed_images(datasets.Dataset.from_dict({"n": [1, 2, 3], "picture": rows})))


def test_selection_and_format_of_a_dataset_are_respected(rows):
    data = datasets.Dataset.from_list([{"image": rows[0]}, {"image": rows[2]}]).cast_column("image", datasets.Image())
    images = indexed_images(data.select([1, 0]).with_format("torch"))
    np.testing.assert_array_equal(np.asarray(images.read(0)), np.asarray(decode(rows[2]["path"])))
    np.testing.assert_array_equal(np.asarray(images.read(1)), np.asarray(decode(rows[0]["bytes"])))


def test_file_and_its_bytes_in_a_dataset_are_one_picture(rng, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(rng).save(tmp_path / "x.jpg", exif=exif)
    data = datasets.Dataset.from_dict({"image": [str(tmp_path / "x.jpg")]}).cast_column("image", datasets.Image())
    np.testing.assert_array_equal(np.asarray(indexed_images(data).read(0)), np.asarray(open_images(tmp_path / "x.jpg").read(0)))


@pytest.mark.parametrize("cell", [None, {"bytes": None, "path": None}], ids=["null", "empty"])
def test_row_without_an_image_is_refused_by_number(rows, cell):
    data = datasets.Dataset.from_dict({"image": [rows[0], rows[0], cell]}).cast_column("image", datasets.Image())
    with refused(DataError, match=r"^2: "):
        indexed_images(data).read(2)


def test_dataset_without_images_is_refused():
    with refused(DataError, match="no image column among a, b"):
        indexed_images(datasets.Dataset.from_dict({"a": [1], "b": ["x.png"]}))


def test_stream_has_no_random_access(rows):
    stream = open_images(datasets.Dataset.from_dict({"image": rows}).to_iterable_dataset())
    assert stream.length is None and len(list(stream.rows(1))) == 2
    with refused(DataError, match="images of a stream can only be read in order"):
        _ = Source(stream, None, 3, 0).images


def test_saved_data_set_is_opened_for_embedding(tmp_path, rows):
    data = datasets.Dataset.from_dict({"image": rows})
    data.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=data.select([0]), test=data).save_to_disk(str(tmp_path / "both"))
    assert folder_contents(tmp_path / "one") == ("hf", [tmp_path / "one"])
    for images in (open_images(tmp_path / "one"), open_images(tmp_path / "both", split="test")):
        assert [row.id for row in images.rows()] == [0, 1, 2] and images.length == 3
        assert next(images.rows(2)).read().size == (48, 32)
    assert open_images(tmp_path / "both").length == 1
    with refused(DataError, match="no split 'val'; it has train, test"):
        open_images(tmp_path / "both", split="val")
    with refused(UsageError, match="saved without splits"):
        open_images(tmp_path / "one", split="test")


def test_dataset_dict_is_refused_with_its_splits(rows):
    data = datasets.Dataset.from_dict({"image": rows})
    with refused(DataError, match="split|DatasetDict"):
        open_images(datasets.DatasetDict(train=data, test=data))
