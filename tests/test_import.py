"""What importing the package costs and changes, and what it exports."""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import rlpjepa_zoo as rz
from rlpjepa_zoo.core import package

ROOT = Path(rz.__file__).parents[1]


def test_resources_are_found_in_a_checkout():
    assert package.resource("recipes").is_dir()
    assert package.resource("hub").is_dir()


def test_versions_name_installed_packages():
    found = package.versions()
    assert found["timm"] == importlib.import_module("timm").__version__
    assert set(found) >= {"torch", "torchvision", "timm", "numpy"}


IMPORT = """
import json, os, sys, warnings
modules, environment, filters, streams = set(sys.modules), dict(os.environ), list(warnings.filters), (sys.stdout, sys.stderr)
import rlpjepa_zoo
report = {
    "loaded": sorted(set(sys.modules) - modules),
    "environment": dict(os.environ) == environment,
    "filters": warnings.filters == filters,
    "streams": (sys.stdout, sys.stderr) == streams,
    "listed": rlpjepa_zoo.list_encoders("*"),
    "after": sorted(name for name in sys.modules if "." not in name),
}
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def fresh_import():
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", IMPORT], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_import_loads_nothing_heavy(fresh_import):
    heavy = {"torch", "accelerate", "datasets", "timm", "transformers", "huggingface_hub", "numpy", "scipy", "PIL"}
    assert heavy & set(fresh_import["loaded"]) == set()
    assert "rlpjepa_zoo" in fresh_import["loaded"]
    assert len(fresh_import["loaded"]) < 40


def test_list_encoders_loads_nothing_heavy(fresh_import):
    assert {"torch", "accelerate", "datasets", "timm", "huggingface_hub", "numpy"} & set(fresh_import["after"]) == set()


def test_import_changes_no_environment_warnings_or_streams(fresh_import):
    assert fresh_import["environment"]
    assert fresh_import["filters"]
    assert fresh_import["streams"]


@pytest.mark.parametrize("name", rz.__all__)
def test_every_public_name_resolves(name):
    value = getattr(rz, name)
    assert name in dir(rz)
    assert isinstance(value, str) if name == "__version__" else callable(value)


def test_no_module_hides_a_public_name():
    """Importing a submodule sets it as an attribute of the package, over a lazy function of the same name."""
    assert not {path.stem for path in (ROOT / "rlpjepa_zoo").glob("*.py")} & set(rz.__all__)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = rz.no_such_name
    assert not hasattr(rz, "no_such_name")


def test_version_is_that_of_the_project():
    import tomllib

    assert rz.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
