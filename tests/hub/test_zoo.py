"""The zoo's list and names, the explanation of Hub errors, and what importing the package costs and changes."""

import importlib
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import errors as hub_errors
from refusals import refused

import rlpjepa_zoo as rz
from rlpjepa_zoo.core import package
from rlpjepa_zoo.errors import DataError, HubError, ModelError, NonFiniteError, OutputError, RecipeError, UsageError, ZooError, did_you_mean
from rlpjepa_zoo.hub import download as hub
from rlpjepa_zoo.hub import push as publish
from rlpjepa_zoo.hub import retry, zoo

ROOT = Path(rz.__file__).parents[1]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    torch.manual_seed(0)
    enc = rz.create_encoder("resnet10_small_narrow", dim=8, hidden_dim=8).eval()
    return enc.save_pretrained(tmp_path_factory.mktemp("zoo") / "digits"), enc.fingerprint()


@pytest.fixture
def small_zoo(tmp_path, monkeypatch, digits):
    """A hub folder with one encoder that ships and two that are only on the Hub."""
    root = tmp_path / "hub"
    shutil.copytree(digits[0], root / "digits-tiny")
    encoders = {
        "digits-tiny": {"backbone": "resnet10_small_narrow"},
        "cifar10-vit": {"repo": "someone/vit", "commit": COMMIT},
        "cifar10-resnet18": {"repo": "someone/resnet18"},
    }
    (root / "manifest.json").write_text(json.dumps({"encoders": encoders}))
    monkeypatch.setattr(zoo, "resource", lambda name: tmp_path / name)
    zoo._manifest.cache_clear()
    yield root
    zoo._manifest.cache_clear()


@pytest.fixture
def downloads(monkeypatch):
    """What would have been downloaded: (repo, revision)."""
    asked = []

    def record(repo, revision, token, cache_dir):
        asked.append((repo, revision))
        raise HubError(f"{repo}: not now")

    monkeypatch.setattr(hub, "_encoder", record)
    return asked


# --- the list ------------------------------------------------------------------------------------------------------------------------


def test_names_are_sorted_filtered_and_read_without_network(small_zoo, no_network):
    assert rz.list_encoders() == ["cifar10-resnet18", "cifar10-vit", "digits-tiny"]
    assert rz.list_encoders("*cifar10*") == ["cifar10-resnet18", "cifar10-vit"]
    assert rz.list_encoders("digits-tiny") == ["digits-tiny"]
    assert rz.list_encoders("no-such-*") == []


def test_the_list_that_ships_is_sorted_and_every_name_has_a_record(no_network):
    zoo._manifest.cache_clear()
    names = rz.list_encoders()
    assert names == sorted(names)
    for name in names:
        assert zoo.local_folder(name) or zoo.entry(name)["repo"], name


def test_without_a_manifest_the_list_is_empty(tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "resource", lambda name: tmp_path / name)
    zoo._manifest.cache_clear()
    assert rz.list_encoders() == []
    zoo._manifest.cache_clear()


def test_an_unknown_name_is_refused_with_the_nearest(small_zoo):
    assert zoo.entry("cifar10-vit")["commit"] == COMMIT
    with refused(UsageError, match=r"'cifar10-vti'.*Did you mean 'cifar10-vit'\?"):
        zoo.entry("cifar10-vti")


def test_resources_are_found_in_a_checkout():
    assert package.resource("recipes").is_dir()
    assert package.resource("hub").is_dir()


def test_versions_name_what_is_installed():
    found = package.versions()
    assert found["timm"] == importlib.import_module("timm").__version__
    assert set(found) >= {"torch", "torchvision", "timm", "numpy"}


# --- from a name to a folder ---------------------------------------------------------------------------------------------------------


def test_an_encoder_that_ships_is_loaded_by_name_without_network(small_zoo, no_network, digits):
    assert rz.load_encoder("digits-tiny").fingerprint() == digits[1]


def test_a_shipped_encoder_that_is_damaged_is_refused(small_zoo):
    with open(small_zoo / "digits-tiny" / "head.safetensors", "ab") as file:
        file.write(b"x")
    with refused(ModelError, match="head.safetensors"):
        rz.load_encoder("digits-tiny")


def test_a_shipped_encoder_has_no_revisions(small_zoo, downloads):
    with refused(HubError, match="no revision 'main'"):
        rz.load_encoder("digits-tiny", revision="main")
    assert downloads == []


@pytest.mark.parametrize(
    ("source", "revision", "expected"),
    [
        ("cifar10-vit", None, ("someone/vit", COMMIT)),
        ("cifar10-vit", "main", ("someone/vit", "main")),
        ("cifar10-resnet18", None, ("someone/resnet18", None)),
        ("owner/repo", None, ("owner/repo", None)),
        ("owner/repo@v1", None, ("owner/repo", "v1")),
        ("hf-hub:owner/repo.name_x-1", None, ("owner/repo.name_x-1", None)),
        ("hf-hub:owner/repo@refs/pr/3", None, ("owner/repo", "refs/pr/3")),
        ("hf-hub:owner/repo@v1", "v1", ("owner/repo", "v1")),
    ],
)
def test_names_and_addresses_lead_to_repository_and_revision(small_zoo, downloads, source, revision, expected):
    with refused(HubError, match=expected[0]):
        rz.load_encoder(source, revision=revision)
    assert downloads == [expected]


def test_two_different_revisions_are_refused(downloads):
    with refused(UsageError, match="given twice"):
        rz.load_encoder("hf-hub:owner/repo@v1", revision="v2")
    assert downloads == []


@pytest.mark.parametrize(
    "repo", ["name", "a/b/c", "a/b--c", "a/b..c", "a/b.git", "a/-b", "a/.b", "ä/b", "a/" + "b" * 96, "", "-a/b", "a b/c", "http://host/a"]
)
def test_push_refuses_what_is_no_repository_before_anything_is_sent(no_network, repo):
    with refused(UsageError, match="owner/name"):
        publish.push({}, repo)


def test_push_offline_is_one_line():
    with refused(HubError, match="owner/repo"):
        publish.push({"README.md": b"x"}, "owner/repo", token="hf_x")


# --- Hub errors ----------------------------------------------------------------------------------------------------------------------


def answer(kind, status, text="first line\n\nRequest ID: abc"):
    """A Hub error as the client makes it, whichever HTTP library it is built on."""
    module = sys.modules[hub_errors.HfHubHTTPError.__mro__[1].__module__.split(".")[0]]
    return kind(text, response=module.Response(status, request=module.Request("GET", "https://hub/x")))


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda: answer(hub_errors.GatedRepoError, 403), "accept the terms.*hf auth login"),
        (lambda: answer(hub_errors.RepositoryNotFoundError, 404), "not found, or private.*hf auth login"),
        (lambda: answer(hub_errors.RepositoryNotFoundError, 401), "not found, or private.*hf auth login"),
        (lambda: answer(hub_errors.RevisionNotFoundError, 404), "no such branch, tag or commit"),
        (lambda: answer(hub_errors.RemoteEntryNotFoundError, 404), "first line"),
        (lambda: answer(hub_errors.BadRequestError, 400), "first line"),
        (lambda: answer(hub_errors.HfHubHTTPError, 429), "answered 429, also when asked again"),
        (lambda: answer(hub_errors.HfHubHTTPError, 503), "answered 503, also when asked again"),
        (lambda: answer(hub_errors.HfHubHTTPError, 401), "token is not valid.*hf auth login"),
        (lambda: answer(hub_errors.HfHubHTTPError, 403), "no access.*first line"),
        (lambda: answer(hub_errors.HfHubHTTPError, 412), "somebody else pushed"),
        (lambda: hub_errors.LocalEntryNotFoundError("line\nline"), "cache.*cannot be reached"),
        (lambda: hub_errors.OfflineModeIsEnabled("line\nline"), "HF_HUB_OFFLINE is set"),
        (lambda: hub_errors.HFValidationError("line\nline"), "line"),
        (lambda: ConnectionError("reset"), "reset"),
        (lambda: TimeoutError(), "TimeoutError"),
        (lambda: ValueError("\n  padded\nlines"), "padded"),
    ],
)
def test_every_hub_error_becomes_one_line_that_names_the_repository(make, part):
    for where in ("owner/repo", "owner/repo@v9"):
        error = retry.explain(make(), where)
        assert type(error) is HubError
        assert error.exit_code == 5
        with refused(HubError, match=f"^{where}: .*{part}"):
            raise error


def test_a_full_disk_is_an_output_error():
    with refused(OutputError, match="No space left"):
        raise retry.explain(OSError(28, "No space left on device"), "owner/repo")


@pytest.mark.parametrize("status", [429, 500, 503])
def test_the_cause_is_kept_when_the_hub_client_hides_it_behind_a_missing_file(status):
    hidden = hub_errors.LocalEntryNotFoundError("not in the cache")
    hidden.__cause__ = answer(hub_errors.HfHubHTTPError, status, f"{status} from the Hub\nmore")
    with refused(HubError, match=str(status)):
        raise retry.explain(hidden, "owner/repo")


def test_a_token_never_appears_in_an_error(monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("reset")))
    with refused(HubError) as info:
        hub.resolve("owner/repo", token="hf_secret")
    assert "hf_secret" not in str(info.value)


# --- errors --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "code", "also"),
    [
        (UsageError, 2, ValueError), (RecipeError, 2, UsageError), (DataError, 3, ValueError), (ModelError, 4, ValueError),
        (HubError, 5, OSError), (OutputError, 6, OSError), (NonFiniteError, 7, ArithmeticError),
    ],
)  # fmt: skip
def test_exit_codes_and_families(kind, code, also):
    assert kind.exit_code == code
    assert issubclass(kind, ZooError)
    assert issubclass(kind, also)
    assert str(kind("one line")) == "one line"


@pytest.mark.parametrize("kind", [UsageError, DataError, ModelError, HubError, OutputError])
def test_whatever_a_name_holds_an_error_is_one_line(kind):
    assert len(str(kind("a\nb.jpg: cannot be read\r\n")).splitlines()) == 1


def test_did_you_mean_names_the_nearest_or_nothing():
    assert did_you_mean("resnet81", ["vit", "resnet18"]) == " Did you mean 'resnet18'?"
    assert did_you_mean("zzz", ["vit", "resnet18"]) == ""
    assert did_you_mean("x", []) == ""


# --- import --------------------------------------------------------------------------------------------------------------------------

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


def test_importing_the_package_loads_nothing_heavy(fresh_import):
    heavy = {"torch", "accelerate", "datasets", "timm", "transformers", "huggingface_hub", "numpy", "scipy", "PIL"}
    assert heavy & set(fresh_import["loaded"]) == set()
    assert "rlpjepa_zoo" in fresh_import["loaded"]
    assert len(fresh_import["loaded"]) < 40


def test_listing_encoders_loads_nothing_heavy(fresh_import):
    assert {"torch", "accelerate", "datasets", "timm", "huggingface_hub", "numpy"} & set(fresh_import["after"]) == set()


def test_importing_the_package_changes_neither_environment_nor_warnings_nor_streams(fresh_import):
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


def test_a_name_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = rz.no_such_name
    assert not hasattr(rz, "no_such_name")


def test_the_version_is_that_of_the_project():
    import tomllib

    assert rz.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
