"""Images of a Hugging Face data set with random access."""

import io
import zipfile

import datasets
import numpy as np
import pytest
from images import encoded, photo, png, table
from PIL import Image
from refusals import refused

from rlpjepa_zoo.config.sections import Data
from rlpjepa_zoo.data.decode import decode
from rlpjepa_zoo.data.sources import Source, folder_contents, open_images, open_source
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
    for images in (open_images(tmp_path / "one", allow_paths=True), open_images(tmp_path / "both", split="test", allow_paths=True)):
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


def crop_all(batch):
    return {**batch, "image": [image.crop((0, 0, 4, 4)) for image in batch["image"]]}


def crop_one(row):
    return {**row, "image": row["image"].crop((0, 0, 4, 4))}


def test_images_of_a_data_set_are_those_that_it_gives():
    rows = table(range(6))
    stream = rows.to_iterable_dataset(num_shards=2)
    changed = {
        "transform": rows.with_transform(crop_all),
        "transform of one column": rows.with_transform(crop_all, columns=["image"]),
        "map": rows.map(crop_one),
        "rows": datasets.concatenate_datasets([rows.filter(lambda row: row["label"] == 1), rows.select([3, 1]).shuffle(seed=1)]),
        "interleaved": datasets.interleave_datasets([rows, rows.map(crop_one)]),
        "other mode": rows.cast_column("image", datasets.Image(mode="L")),
        "stream": stream.shuffle(seed=1, buffer_size=3).filter(lambda row: row["label"] < 2).take(4),
        "stream after map": stream.map(crop_one),
        "stream after batched map": stream.map(crop_all, batched=True),
        "interleaved streams": datasets.interleave_datasets([stream, stream.map(crop_one, features=rows.features)]),
        "generator": datasets.IterableDataset.from_generator(lambda: ({"image": Image.open(io.BytesIO(png(i))), "label": i} for i in range(3))),
    }  # fmt: skip
    for name, data in changed.items():
        expected = [decode(row["image"]).tobytes() for row in data]
        opened = list(open_images(data).rows())
        assert [row.read().tobytes() for row in opened] == expected, name
        assert ["label" in row.columns for row in opened] == [name != "transform of one column"] * len(expected), name


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_format_of_a_data_set_changes_no_image(kind):
    rows = table(range(3))
    expected = [decode(row["image"]).tobytes() for row in rows]
    for data in (rows.with_format(kind), rows.to_iterable_dataset().with_format(kind)):
        assert [row.read().tobytes() for row in open_images(data).rows()] == expected
    mapped = rows.to_iterable_dataset().with_format(kind).map(lambda row: row)
    assert [(row.read().tobytes(), type(row.columns["label"])) for row in open_images(mapped).rows()] == [
        (pixels, int) for pixels in expected
    ]


def test_row_whose_transform_fails_is_refused_alone():
    def picky(batch):
        return crop_all(batch) if batch["note"] != ["row 1"] else {}["missing"]

    rows = list(open_images(table(range(3)).with_transform(picky)).rows())
    assert rows[0].read().size == rows[2].read().size == (4, 4)
    with refused(DataError, match="row 1: the transform of the data set failed"):
        rows[1].read()
    normalised = table(range(1)).with_transform(lambda batch: {"image": [np.full((3, 4, 4), -0.5)]})
    with refused(DataError, match="values down to -0.5; expected pixels from 0 on, before they are normalised"):
        next(open_images(normalised).rows()).read()


@pytest.mark.parametrize("stream", [False, True])
def test_images_in_a_zip_are_read_as_datasets_reads_them(tmp_path, stream):
    (tmp_path / "set").mkdir()
    with zipfile.ZipFile(tmp_path / "set" / "train.zip", "w") as archive:
        for i in range(3):
            archive.writestr(f"images/{i}.png", png(i))
    expected = [decode(png(i)).tobytes() for i in range(3)]
    data = datasets.load_dataset(str(tmp_path / "set"), split="train", streaming=stream, cache_dir=str(tmp_path / "cache"))
    assert [row.read().tobytes() for row in open_images(data).rows()] == expected
    source = open_source(Data(source="hf", path=str(tmp_path / "set"), streaming=stream, length=3 if stream else None))
    assert [row.read().tobytes() for row in source.train.rows()] == expected
    missing = datasets.Dataset.from_dict({"image": [f"zip://no.png::{tmp_path}/set/train.zip", "zip://a.png::/nowhere.zip"]})
    rows = list(open_images(missing.cast_column("image", datasets.Image())).rows())
    with refused(DataError, match="cannot be read"):
        rows[0].read()
    with refused(DataError, match=r"/nowhere\.zip: no such file"):
        rows[1].read()


def test_paths_of_a_data_set_object_are_those_of_its_owner(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(png(0))
    monkeypatch.chdir(tmp_path)
    data = datasets.Dataset.from_dict({"image": ["a.png", str(tmp_path / "a.png")]}).cast_column("image", datasets.Image())
    assert [row.read().tobytes() for row in open_images(data).rows()] == [decode(png(0)).tobytes()] * 2
