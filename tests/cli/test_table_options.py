"""Tables of images on the command line: which files their rows may name, and the options that messages name."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from images import png

from rlpjepa_zoo import SparseEmbeddings
from rlpjepa_zoo.cli.app import run
from rlpjepa_zoo.models.classifier import make_classifier
from rlpjepa_zoo.models.factory import create_encoder
from rlpjepa_zoo.models.pretrained import load_encoder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return create_encoder("test_resnet", dim=24).save_pretrained(tmp_path_factory.mktemp("saved") / "encoder")


@pytest.fixture(scope="module")
def classifier(encoder: Path) -> Path:
    return make_classifier(load_encoder(encoder), ["a", "b"]).save_pretrained(encoder.with_name("classifier"))


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder of tables whose rows name files outside of it."""
    (tmp_path / "set").mkdir()
    for split in ("train", "test"):
        cells = []
        for i in range(8):
            (tmp_path / f"{i}.png").write_bytes(png(i))
            cells.append({"bytes": None, "path": str(tmp_path / f"{i}.png")})
        pq.write_table(pa.table({"image": cells, "label": [i % 2 for i in range(8)]}), tmp_path / "set" / f"{split}.parquet")
    return tmp_path / "set"


def test_files_elsewhere_are_opened_with_allow_paths(
    encoder: Path, classifier: Path, elsewhere: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "e.parquet"
    threshold = ["--density", "0.1", "--mode", "threshold", "--images", elsewhere, "--out", tmp_path / "dial"]
    for command in (
        ["embed", encoder, elsewhere / "train.parquet", "--out", out],
        ["dial", encoder, *threshold],
        ["predict", classifier, elsewhere / "train.parquet", "--out", tmp_path / "p.csv"],
        ["eval", encoder, "--data", elsewhere, "--probes", "knn", "--no-pixels"],
    ):
        arguments = [*map(str, command), "--quiet"]
        assert run(arguments) == 3
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and (command[0] == "eval" or "to open such files, use --allow-paths" in message)
        assert run([*arguments, "--allow-paths"]) == 0, capsys.readouterr().err
        capsys.readouterr()
    assert SparseEmbeddings.load(out).shape == (8, 24)


def test_messages_of_a_command_name_its_own_options(encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pq.write_table(pa.table({"blob": [png(0)], "n": [1]}), tmp_path / "x.parquet")
    command = ["embed", str(encoder), str(tmp_path / "x.parquet"), "--out", str(tmp_path / "e.parquet"), "--quiet"]
    assert run(command) == 3
    assert "no image column among blob, n; name it with --image-column" in capsys.readouterr().err
    assert run([*command, "--image-column", "blob"]) == 0
    assert run(["eval", str(encoder), "--data", str(tmp_path), "--quiet"]) == 3
    assert "data." in capsys.readouterr().err
