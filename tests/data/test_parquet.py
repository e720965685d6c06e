"""Local parquet files as a source of training and evaluation: random access by row group, splits, labels, and what is refused."""

import logging
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from batches import agree, batches, refused_with
from images import CLASSES, png, table, toy

from rlpjepa_zoo.config.sections import Data
from rlpjepa_zoo.data.decode import decode
from rlpjepa_zoo.data.sources import Source, folder_contents, open_source


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    datasets.disable_progress_bars()
    root = tmp_path_factory.mktemp("parquet")
    table(range(40), broken=(7,)).to_parquet(str(root / "train-0.parquet"), batch_size=6)
    table(range(40, 60)).to_parquet(str(root / "train-1.parquet"))
    table(range(60, 75)).to_parquet(str(root / "test-0.parquet"), batch_size=4)
    return root


def opened(path: Path, kind: str = "parquet", **more: Any) -> Source:
    return open_source(Data.model_validate({"source": kind, "path": str(path), **more}))


def test_images_labels_and_batches_equal_those_of_hf(parquet: Path) -> None:
    source, expected = opened(parquet, eval_split="test"), opened(parquet, "hf", eval_split="test")
    assert source.eval is not None and expected.eval is not None
    assert (source.length, source.classes, source.images.classes) == (60, 3, CLASSES)
    for images, others in ((source.images, expected.images), (source.eval, expected.eval)):
        assert images.labels is not None and others.labels is not None
        assert images.labels.tolist() == others.labels.tolist() and list(images.ids) == list(others.ids)
    for i in (59, 0, 12, 11, 39, 40, 6, 58):
        assert source.images.read(i).tobytes() == expected.images.read(i).tobytes() == decode(png(i)).tobytes()
    assert source.eval.read(14).tobytes() == decode(png(74)).tobytes()
    assert agree(batches(source, toy(), range(9)), batches(expected, toy(), range(9)))
    assert agree(batches(source, toy("train.num_workers=2"), range(9)), batches(expected, toy(), range(9)))


def test_images_can_be_pickled_for_spawned_workers(parquet: Path) -> None:
    images = opened(parquet).images
    images.read(3)
    copy = ForkingPickler.loads(ForkingPickler.dumps(images))
    assert copy._read._kept == {} and copy.read(50).tobytes() == images.read(50).tobytes()


def test_few_row_groups_stay_in_memory(parquet: Path) -> None:
    images: Any = opened(parquet).images
    for i in [*range(0, 40, 6), 1]:
        if i != 7:
            images.read(i)
        assert len(images._read._kept) <= 4


def test_unreadable_image_is_named_by_its_row(parquet: Path) -> None:
    with refused_with("7: cannot be read as an image"):
        opened(parquet).images.read(7)


def test_columns_are_chosen_as_in_hf(parquet: Path) -> None:
    assert opened(parquet, label_column="none").images.labels is None
    with refused_with("no column 'picture'", "image, label, note"):
        opened(parquet, image_column="picture")
    assert opened(parquet, label_column="note").classes == 60


def test_evaluation_labels_follow_training_class_names(tmp_path: Path) -> None:
    for split, names, labels in (("train", ["red", "blue"], [0, 1, None]), ("test", ["blue", "green", "red"], [2, 1, 0])):
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        columns = {"image": [{"bytes": png(i), "path": None} for i in range(3)], "label": labels}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(str(tmp_path / f"{split}.parquet"))
    source = opened(tmp_path, eval_split="test")
    assert source.images.labels is not None and source.images.labels.tolist() == [0, 1, -1]
    assert source.eval is not None and source.eval.labels is not None and source.eval.labels.tolist() == [0, -1, 1]


def test_large_row_groups_are_warned_about(parquet: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        opened(parquet)
        assert caplog.text == ""
        monkeypatch.setattr("rlpjepa_zoo.data.sources.parquet._LARGE_GROUP", 100)
        opened(parquet)
    assert "write smaller row groups, or use data.source=hf" in caplog.text


def test_unusable_parquet_files_are_refused_in_one_line(parquet: Path, tmp_path: Path) -> None:
    with refused_with("no parquet file of the split 'holdout'", "test-0.parquet"):
        opened(parquet, split="holdout")
    with refused_with("nowhere", "no such file or folder"):
        opened(tmp_path / "nowhere")
    with refused_with("no parquet files in it"):
        opened(tmp_path)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not really")
    with refused_with("bad.parquet: cannot be read as parquet"):
        opened(tmp_path)
    pq.write_table(pa.table({"text": ["no image"]}), tmp_path / "bad.parquet")
    with refused_with("no image column"):
        opened(tmp_path)


def test_folder_of_parquet_files_is_recognised(parquet: Path) -> None:
    assert folder_contents(parquet) == ("parquet", [parquet / name for name in ("test-0.parquet", "train-0.parquet", "train-1.parquet")])
