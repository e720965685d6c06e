"""The wheel works outside the checkout and contains recipes, zoo and types."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(out)]
    command = [sys.executable, "-m", "pip", "wheel", *options, str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl"))


def test_wheel_contains_recipes_zoo_and_types(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for wanted in (
        "rlpjepa_zoo/py.typed",
        "rlpjepa_zoo/report/report.html.j2",
        "rlpjepa_zoo/_shipped/recipes/cifar10-resnet18.yaml",
        "rlpjepa_zoo/_shipped/recipes/accelerate/gpu8.yaml",
        "rlpjepa_zoo/_shipped/hub/manifest.json",
        "rlpjepa_zoo/_shipped/hub/zoo.csv",
    ):
        assert wanted in names
    assert not [n for n in names if n.startswith(("tests", "tools", "recipes", "hub")) or n.endswith((".pkl", ".bin", ".pt"))]


def test_wheel_runs_in_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (tmp_path / "empty").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "rlpjepa_zoo", *arguments],
            cwd=tmp_path / "empty",
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "cifar10" in run("list")
    assert "# expected density: 0.5" in run("check", "cifar10-resnet18")
    where = subprocess.run(
        [sys.executable, "-c", "import rlpjepa_zoo; print(rlpjepa_zoo.__file__)"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert str(tmp_path / "site") in where.stdout
