"""`rlpjepa eval` and `predict` of a classifier: results, and mistakes in one line with their exit code."""

import json
from pathlib import Path

import pytest
import torch
from models import settled

from rlpjepa_zoo.cli.app import run
from rlpjepa_zoo.models.classifier import make_classifier


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    encoder = settled()
    torch.manual_seed(0)
    return str(make_classifier(encoder, ["blue", "green", "red"]).eval().save_pretrained(tmp_path_factory.mktemp("run") / "classifier"))


def test_eval_prints_accuracy_of_a_classifier(folder: str, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["eval", folder, "--data", str(image_folder), "--quiet"]
    assert run([*command, "--out", str(tmp_path / "r.json")]) == 0
    text = capsys.readouterr().out
    assert (
        all(words in text for words in ("top-1", "95 % interval", "blue", "red", "40 test images", "too high if")) and "top-5" not in text
    )
    written = json.loads((tmp_path / "r.json").read_text())
    assert run([*command, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert written == {"source": folder, "data": str(image_folder), **printed} and printed["n_test"] == 40 and "text" not in printed


def test_predict_writes_a_table_and_lists_unreadable_images(
    folder: str, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (image_folder / "red" / "zz.png").write_bytes(b"junk")
    out = tmp_path / "p.csv"
    command = ["predict", str(Path(folder).parent), str(image_folder), "--out", str(out), "--top", "2", "--skip-bad", "--json"]
    assert run(command) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["images"], printed["skipped"], printed["classes"]) == (40, 1, 3)
    lines = out.read_text().splitlines()
    assert len(lines) == 81 and lines[0] == "id,class,probability" and lines[1].startswith("blue/00.png,")
    listing = tmp_path / "p.csv.failed.jsonl"
    assert json.loads(listing.read_text())["id"] == "red/zz.png"
    (image_folder / "red" / "zz.png").unlink()
    assert run([*command, "--overwrite"]) == 0 and not listing.exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["eval", "FOLDER", "--data", "IMAGES", "--probes", "knn"], 2, "--probes: 'FOLDER' is a classifier"),
        (["eval", "FOLDER", "--data", "IMAGES", "--no-pixels"], 2, "--pixels"), (["eval", "FOLDER", "--data", "IMAGES", "--card"], 2, "--card"),
        (["eval", "FOLDER", "--data", "digits"], 3, "no class in common"),
        (["predict", "FOLDER", "IMAGES", "--out", "OUT.npz"], 2, ".csv, .jsonl, .parquet"),
        (["predict", "FOLDER", "IMAGES", "--out", "/no/such/p.csv"], 6, "/no/such"),
        (["predict", "FOLDER", "IMAGES", "--out", "OUT.csv", "--top", "4"], 2, "1 to 3"),
        (["predict", "FOLDER", "/no/such.png", "--out", "OUT.csv"], 3, "no such file"),
        (["predict", "FOLDER", "IMAGES", "--out", "OUT.csv", "--split", "test"], 2, "has no split"),
        (["predict", "FOLDER", "CORRUPT", "--out", "OUT.csv"], 3, "--skip-bad"),
        (["predict", "FOLDER", "CORRUPT", "--out", "OUT.csv", "--skip-bad"], 3, "none of the images"),
        (["predict", "test_resnet.digits", "IMAGES", "--out", "OUT.csv"], 4, "rlpjepa finetune"),
        (["embed", "FOLDER", "IMAGES", "--out", "OUT.npz"], 4, "rlpjepa predict"),
        (["predict", "FOLDER", "IMAGES", "--out", "EXISTS"], 2, "--overwrite"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_with_their_code(
    folder: str, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, words: str
) -> None:
    (tmp_path / "bad.png").write_bytes(b"junk")
    (tmp_path / "there.csv").touch()
    names = {"FOLDER": folder, "IMAGES": str(image_folder), "CORRUPT": str(tmp_path / "bad.png"), "EXISTS": str(tmp_path / "there.csv")}
    ready = [names.get(a, a.replace("OUT", str(tmp_path / "out"))) for a in arguments]
    assert run([*ready, "--quiet"]) == code
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert out == "" and len(lines) == 1 and words.replace("FOLDER", folder) in lines[0], err
    assert not list(tmp_path.glob("out*"))
