"""Paths on the command line and in Python: `~` is the home folder wherever a path is taken, and an empty path is refused."""

from pathlib import Path

import pytest
import torch
from images import png

import rlpjepa_zoo as rz
from rlpjepa_zoo.cli.app import run


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home folder, with an encoder and labelled images; the working folder is an empty one."""
    torch.manual_seed(0)
    rz.create_encoder("test_resnet", dim=24, hidden_dim=16).save_pretrained(tmp_path / "home/encoder")
    for i in range(8):
        (tmp_path / f"home/images/{i % 2}").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"home/images/{i % 2}/{i}.png").write_bytes(png(i))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_tilde_is_the_home_folder_in_every_option(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (
        ["embed", "~/encoder", "~/images", "--out=~/folder", "--quiet"],
        ["embed", "~/encoder", "~/images", "--out=~/file.npz", "--quiet"],
        ["dial", "~/encoder", "--budget", "4", "--out=~/dialled"],
        ["eval", "~/encoder", "--data=~/images", "--probes", "few_shot", "--shots", "1", "--no-pixels", "--quiet", "--out=~/report.json"],
    ):
        assert run(command) == 0, capsys.readouterr().err
    assert {path.name for path in home.iterdir()} >= {"folder", "file.npz", "dialled", "report.json"}
    assert not list(Path.cwd().iterdir())


def test_tilde_is_the_home_folder_in_python(home: Path) -> None:
    encoder = rz.load_encoder("~/encoder")
    encoder.save_pretrained("~/again")
    embeddings = encoder.embed("~/images")
    embeddings.save("~/e.safetensors")
    assert rz.load_embeddings("~/e.safetensors").shape == rz.SparseEmbeddings.load("~/e.safetensors").shape == (8, 24)
    assert (home / "again/config.json").is_file() and not list(Path.cwd().iterdir())


@pytest.mark.parametrize(
    "command",
    [
        ["embed", "ENCODER", "", "--out", "e"],
        ["embed", "ENCODER", "IMAGES", "--out", ""],
        ["embed", "", "IMAGES", "--out", "e"],
        ["dial", "ENCODER", "--budget", "4", "--out", ""],
        ["report", ""],
        ["eval", "ENCODER", "--data", ""],
    ],
    ids=" ".join,
)
def test_an_empty_path_is_not_the_working_folder(home: Path, command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run([{"ENCODER": "~/encoder", "IMAGES": "~/images"}.get(word, word) for word in command]) == 2
    error = capsys.readouterr().err
    assert ("an empty path" in error or "''" in error) and not list(Path.cwd().iterdir())
