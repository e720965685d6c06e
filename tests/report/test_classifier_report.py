"""`rlpjepa report` of a fine-tuning run: figures of its classifier, mistakes, and runs that are not complete."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from markupsafe import Markup
from models import settled
from test_report import Reader

from rlpjepa_zoo.cli.app import run as command
from rlpjepa_zoo.config.finetune import TuningRecipe
from rlpjepa_zoo.data.sources.folder import labelled_folder
from rlpjepa_zoo.models.classifier import make_classifier
from rlpjepa_zoo.models.pretrained import load_classifier
from rlpjepa_zoo.report import charts
from rlpjepa_zoo.report.report import write_report


@pytest.fixture
def run(tmp_path: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files of a fine-tuning run of six steps. Charts keep their text and lose their drawing."""
    monkeypatch.setattr(charts, "_svg", lambda figure, alt: charts.Chart(alt, "0 0 1 1", Markup("")))
    for name in ("red", "blue"):
        shutil.copytree(image_folder / name, tmp_path / "data" / "train" / name)
        shutil.copytree(image_folder / name, tmp_path / "data" / "val" / name)
    for k in range(5):  # mistakes, as the two classes are easily told apart
        (tmp_path / "data" / "val" / "red" / f"{k:02d}.png").rename(tmp_path / "data" / "val" / "blue" / f"red-{k}.png")
    (tmp_path / "data" / "val" / "red" / "07.png").write_bytes(b"junk")
    folder = tmp_path / "run"
    encoder = settled()
    torch.manual_seed(1)
    classifier = make_classifier(encoder, ["blue", "red"]).eval()
    classifier.save_pretrained(folder / "classifier", info={"training": {"images": 40, "steps": 6}})
    recipe = TuningRecipe.load(
        "finetune-folder", [f"data.path={tmp_path / 'data'}", "train.batch_size=20", "train.epochs=3", "start.source=x"]
    )
    (folder / "recipe.yaml").write_text(recipe.dump())
    rows = [
        {"step": k, "epoch": k / 2, "kind": "train", "loss": 1 / k, "top1_train": k / 8, "lr": 0.1, "grad_norm": 1.0} for k in range(1, 7)
    ]
    rows.append({"step": 6, "epoch": 3.0, "kind": "eval", "top1": 0.75, "loss": 0.5, "n_test": 39})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "summary.json").write_text(json.dumps({"steps": 6, "alarms": ["hardly better than chance"], "info": {}}))
    return folder


def test_figures_are_those_of_the_classifier(run: Path) -> None:
    figures = write_report(run)
    page = Reader((run / "report.html").read_text())
    prediction = load_classifier(run).predict(run.parent / "data" / "val", on_error="skip")
    right = [label == str(id).split("/")[0] for label, id in zip(prediction.labels, prediction.ids, strict=True)]
    assert (figures["images"], figures["split"], figures["missing"]) == (39, "evaluation", None) and figures["finished"]
    assert figures["accuracy"] == pytest.approx(np.mean(right)) and figures["accuracy_low"] < figures["accuracy"] < figures["accuracy_high"]
    assert (figures["top1"], figures["loss"], figures["n_test"]) == (0.75, 0.5, 39)
    assert (
        "Hardly better than chance." in page.text
        and "1 of the evaluation images chosen" in page.text
        and "finished after 6 steps" in page.text
    )
    assert [name for name, _ in page.tags if name == "h2"] == ["h2"] * 5 and f"{right.count(False):,} mistakes" in page.text
    mistakes = [attributes["alt"] for name, attributes in page.tags if name == "img"]
    assert len(mistakes) == min(21, right.count(False)) > 0 and all("taken for" in (alt or "") for alt in mistakes)
    spoken = [attributes["aria-label"] or "" for name, attributes in page.tags if name == "svg"]
    assert spoken[0].startswith("Loss over steps. training batches: 1 at step 1") and "top-1, evaluation: 0.75 at step 6" in spoken[1]


def test_without_a_classifier_or_images_the_page_has_curves(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["report", str(run), "data.path=/no/such/place", "--json"]) == 0
    assert "/no/such/place" in json.loads(capsys.readouterr().out)["missing"]
    shutil.rmtree(run / "classifier")
    (run / "summary.json").unlink()
    figures = write_report(run)
    assert "has not published a classifier yet" in figures["missing"] and "accuracy" not in figures and figures["top1"] == 0.75


def test_a_classifier_without_mistakes_is_drawn(run: Path) -> None:
    images = labelled_folder(run.parent / "data" / "val")
    classifier = load_classifier(run)
    with torch.no_grad():
        classifier.head.weight.zero_()
        classifier.head.bias.copy_(torch.tensor([0.0, 1.0]))
    classifier.save_pretrained(run / "classifier")
    shutil.rmtree(run.parent / "data" / "val" / "blue")
    assert len(images) == 40 and write_report(run, overrides=[])["accuracy"] == 1.0
    assert "Every image was classified correctly" in Reader((run / "report.html").read_text()).text
