"""Predictions in a file: the rows of every format, unreadable images, and files that appear complete or not at all."""

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from models import settled
from refusals import refused

from rlpjepa_zoo.data.sources import open_images
from rlpjepa_zoo.embedding.predictions import SUFFIXES, write_predictions
from rlpjepa_zoo.errors import DataError, UsageError
from rlpjepa_zoo.models.classifier import Classifier, make_classifier

CLASSES = ["ant", 'b"e,e', "c\u00f6w"]


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    encoder = settled()
    torch.manual_seed(0)
    made = make_classifier(encoder, CLASSES).eval()
    with torch.no_grad():
        made.head.weight.mul_(30)
    return made


def rows(path: Path) -> list[tuple[str, str, float]]:
    if path.suffix == ".parquet":
        return [(r["id"], r["class"], r["probability"]) for r in pq.read_table(path).to_pylist()]
    if path.suffix == ".jsonl":
        return [(r["id"], r["class"], r["probability"]) for r in map(json.loads, path.read_text("utf-8").splitlines())]
    with open(path, encoding="utf-8", newline="") as file:
        return [(r["id"], r["class"], float(r["probability"])) for r in csv.DictReader(file)]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_rows_are_those_of_predict_in_input_order(classifier: Classifier, image_folder: Path, tmp_path: Path, suffix: str) -> None:
    (image_folder / "red" / "00.png").rename(image_folder / "red" / 'a,"b.png')
    (image_folder / "blue" / "05.png").write_bytes(b"junk")
    count, failures = write_predictions(classifier, open_images(image_folder), tmp_path / f"p{suffix}", 2, 7, 2, skip_bad=True)
    expected = classifier.predict(image_folder, batch_size=7, on_error="skip")
    assert count == 39 and [id for id, _ in failures] == ["blue/05.png"]
    found = rows(tmp_path / f"p{suffix}")
    assert [r[0] for r in found] == [id for id in expected.ids for _ in range(2)] and [r[1] for r in found[::2]] == expected.labels
    order = np.argsort(-expected.probabilities, axis=1, kind="stable")[:, :2]
    assert [r[1] for r in found[1::2]] == [CLASSES[k] for k in order[:, 1]]
    values = np.take_along_axis(expected.probabilities, order, 1).ravel()
    assert np.array_equal(np.array([r[2] for r in found], np.float32), values)


def test_nothing_is_left_of_a_file_that_cannot_be_finished(classifier: Classifier, image_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "p.csv"
    out.parent.mkdir()
    (image_folder / "red" / "zz.png").write_bytes(b"junk")
    with refused(DataError, match="red/zz.png.*--skip-bad"):
        write_predictions(classifier, open_images(image_folder), out, batch_size=4)
    bad = image_folder / "red" / "zz.png"
    with refused(DataError, match="none of the images can be read; the first of 1"):
        write_predictions(classifier, open_images([bad]), out, skip_bad=True)
    with refused(UsageError, match="top: expected 1 to 3"):
        write_predictions(classifier, open_images(image_folder), out, top=4)
    with refused(UsageError, match="ending in .csv, .jsonl, .parquet"):
        write_predictions(classifier, open_images(image_folder), out.with_suffix(".npz"))
    assert list(out.parent.iterdir()) == []


def test_row_numbers_are_ids_of_images_in_memory(classifier: Classifier, tmp_path: Path) -> None:
    from PIL import Image

    images = open_images([Image.new("RGB", (40, 30), color) for color in ("red", "green", "blue")])
    write_predictions(classifier, images, tmp_path / "p.parquet", batch_size=2)
    table = pq.read_table(tmp_path / "p.parquet")
    assert str(table.schema.field("id").type) == "int64" and table["id"].to_pylist() == [0, 1, 2]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_classes_whose_names_are_not_utf8_are_written_escaped(image_folder: Path, tmp_path: Path, suffix: str) -> None:
    classifier = make_classifier(settled(), ["c\udc80", "dog"]).eval()
    write_predictions(classifier, open_images(image_folder / "red"), tmp_path / f"p{suffix}", 2)
    assert {name for _, name, _ in rows(tmp_path / f"p{suffix}")} == {"c\\x80", "dog"}
