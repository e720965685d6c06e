"""Accuracy of classifiers: counts, intervals, classes matched by name, and mistakes that are refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from images import png
from models import settled
from refusals import refused
from scipy.stats import binomtest

from rlpjepa_zoo.data.images import Images
from rlpjepa_zoo.data.sources.classes import with_class_numbers
from rlpjepa_zoo.data.sources.folder import labelled_folder
from rlpjepa_zoo.errors import DataError, NonFiniteError
from rlpjepa_zoo.models.classifier import Classifier, make_classifier
from rlpjepa_zoo.training.tasks.accuracy import accuracy, evaluate_classifier


@pytest.fixture
def classifier() -> Classifier:
    encoder = settled()
    with torch.no_grad():
        made = make_classifier(encoder, ["ant", "blue", "cow", "dog", "emu", "red", "yak"]).eval()
        made.head.weight.mul_(50)
    return made


def test_report_equals_counts_over_the_probabilities(classifier: Classifier, image_folder: Path) -> None:
    (image_folder / "red" / "04.png").write_bytes(b"junk")
    images = labelled_folder(image_folder)
    report = evaluate_classifier(classifier, images, batch_size=7, note="from a drawer")
    assert json.loads(json.dumps(report, allow_nan=False)) == report and "from a drawer" in report["protocol"]
    prediction = classifier.predict(images, on_error="skip")
    truth = [str(id).split("/")[0] for id in prediction.ids]
    right = [a == b for a, b in zip(prediction.labels, truth, strict=True)]
    assert report["n_test"] == 39 and report["top1"] == pytest.approx(np.mean(right)) and report["most_frequent"] == pytest.approx(20 / 39)
    low, high = binomtest(sum(right), 39).proportion_ci(method="wilson")
    assert (report["top1_low"], report["top1_high"]) == pytest.approx((low, high))
    top5 = [classifier.classes.index(name) in np.argsort(-row)[:5] for name, row in zip(truth, prediction.probabilities, strict=True)]
    loss = [-np.log(row[classifier.classes.index(name)]) for name, row in zip(truth, prediction.probabilities, strict=True)]
    assert report["top5"] == pytest.approx(np.mean(top5)) and report["loss"] == pytest.approx(np.mean(loss), rel=1e-4)
    for name, n in (("blue", 20), ("red", 19)):
        entry = report["classes"][name]
        assert entry["n"] == n and entry["accuracy"] == pytest.approx(np.mean([r for r, t in zip(right, truth, strict=True) if t == name]))
    assert set(report["classes"]) == {"blue", "red"}
    same = accuracy(classifier, with_class_numbers(images, classifier.classes), 7)
    assert {key: report[key] for key in same} == pytest.approx(same)


def of(labels: list[int], classes: list[str] | None) -> Images:
    return Images(lambda i: png(i), [f"i{i}" for i in range(len(labels))], labels, classes)


@pytest.mark.parametrize(
    ("labels", "names", "known", "ids", "numbers"),
    [
        ([0, 1, 2], ["c", "a", "b"], ["a", "b", "c"], ["i0", "i1", "i2"], [2, 0, 1]),
        ([0, -1, 1, 2], ["c", "a", "x"], ["a", "b", "c"], ["i0", "i2"], [2, 0]),
        ([0, 1, 2], None, ["0", "1", "2"], ["i0", "i1", "i2"], [0, 1, 2]),
        ([10**15, 7], None, ["7", "1000000000000000"], ["i0", "i1"], [1, 0]),
        ([0, 2, 1], None, ["a", "b", "c"], ["i0", "i1", "i2"], [0, 2, 1]),
        ([0, 1], ["a", "b"], ["0", "1"], ["i0", "i1"], [0, 1]),
    ],
)
def test_classes_are_matched_by_name_else_by_number(
    labels: list[int], names: list[str] | None, known: list[str], ids: list[str], numbers: list[int]
) -> None:
    matched = with_class_numbers(of(labels, names), known)
    assert matched.ids == ids and matched.labels is not None and matched.labels.tolist() == numbers and matched.classes == known


@pytest.mark.parametrize(
    ("labels", "names", "known", "words"),
    [
        ([0, 1], ["x", "y"], ["a", "b"], "no class in common: the images have 2 classes: x, y, the classifier 2 classes: a, b"),
        ([0, 4], None, ["a", "b"], "no class in common"),
        ([-1, -1], ["a", "b"], ["a", "b"], "needs labels"),
        ([1, 1], ["a", "x"], ["a", "b"], "no class in common"),
    ],
)
def test_classes_that_do_not_match_are_refused(labels: list[int], names: list[str] | None, known: list[str], words: str) -> None:
    with refused(DataError, match=words):
        with_class_numbers(of(labels, names), known)


def test_images_of_unknown_classes_are_counted_and_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "rlpjepa_zoo"):
        with_class_numbers(of([0, 1, 1, -1], ["a", "x"]), ["a", "b"])
    assert "2 of 4 test images are left out: the classifier does not know 1 classes: x" in caplog.text
    assert "1 of 4 test images have no label" in caplog.text


def test_unreadable_images_and_broken_classifiers_are_refused(classifier: Classifier, image_folder: Path) -> None:
    with refused(DataError, match="none of the images can be read"):
        evaluate_classifier(classifier, Images(lambda i: b"junk", range(3), [0, 1, 0], ["red", "blue"]))
    with torch.no_grad():
        classifier.head.weight.fill_(torch.nan)
    with refused(NonFiniteError, match="NaN"):
        evaluate_classifier(classifier, labelled_folder(image_folder))
