"""Settings and fixtures of all tests: one thread, a private Hugging Face cache, no network, and the package of this checkout.

Child processes inherit the environment that is set here, so the suite gives the same results from any working directory and whatever the user's
environment says. Tests that talk to the Hub ask for the fixture `hub_server`: a server on the loopback (tests/support/hub_server.py) at HF_ENDPOINT.
The client is offline in all other tests.
"""

import os
import tempfile
from pathlib import Path

os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="rlpjepa-hf-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RLPJEPA_CACHE"] = tempfile.mkdtemp(prefix="rlpjepa-cache-")
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["HF_UPDATE_DOWNLOAD_COUNTS"] = "0"  # else datasets sends a HEAD to s3.amazonaws.com for every load_dataset
# One thread, whatever the user's environment says: sums on more threads differ in their last bits, and tests compare this process with its children.
# Tiny networks also run 10 to 100 times slower on two threads.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"
# Children import this checkout from any working directory.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
os.environ.setdefault("MPLBACKEND", "agg")

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hub_server import FakeHub
from hypothesis import settings
from PIL import Image

if {"huggingface_hub", "datasets"} & sys.modules.keys():  # they read HF_ENDPOINT at import
    raise RuntimeError("huggingface_hub was imported before tests/conftest.py could give it the address of the server on the loopback")
HUB = FakeHub()
os.environ["HF_ENDPOINT"] = HUB.url

torch.set_num_threads(1)
# The cores may be busy; no folder is left where pytest is started; the same examples each time (other ones: --hypothesis-profile=zoo-random).
settings.register_profile("zoo", deadline=None, database=None, derandomize=True)
settings.register_profile("zoo-random", deadline=None, database=None)
settings.load_profile("zoo")


@pytest.fixture(scope="session", autouse=True)
def _small_pictures() -> Iterator[None]:
    from pictures import small_pictures  # it imports huggingface_hub

    with small_pictures():
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_pauses() -> None:
    """A reader of `datasets` that garbage collection ends in a later test sleeps five seconds there."""
    from datasets import config

    config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def image_folder(tmp_path: Path, rng: np.random.Generator) -> Path:
    """Two classes of 20 small PNG images each: reddish and bluish noise."""
    root = tmp_path / "images"
    for channel, name in ((0, "red"), (2, "blue")):
        (root / name).mkdir(parents=True)
        for i in range(20):
            pixels = rng.integers(0, 120, (20, 24, 3), dtype=np.uint8)
            pixels[..., channel] += 120
            Image.fromarray(pixels).save(root / name / f"{i:02d}.png")
    return root


@pytest.fixture(scope="session")
def cifar10() -> Path:
    """Folder of CIFAR-10 parquet files, named by the environment variable RLPJEPA_CIFAR10."""
    path = Path(os.environ.get("RLPJEPA_CIFAR10", ""))
    if not os.environ.get("RLPJEPA_CIFAR10") or not path.is_dir():
        pytest.skip("RLPJEPA_CIFAR10 does not name the folder of CIFAR-10 parquet files")
    return path


def _switch(patch: pytest.MonkeyPatch, *, offline: bool) -> None:
    """Take the Hugging Face libraries of this process, and of processes it starts, offline or online."""
    patch.setenv("HF_HUB_OFFLINE", "1" if offline else "0")
    for name in ("huggingface_hub.constants.HF_HUB_OFFLINE", "datasets.config.HF_HUB_OFFLINE", "datasets.config.HF_DATASETS_OFFLINE"):
        patch.setattr(name, offline)


@pytest.fixture
def hub_server(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    """An empty Hub on the loopback (see tests/support/hub_server.py), a client that is online, and an empty cache; no token is set."""
    import datasets
    from huggingface_hub import HfFileSystem
    from huggingface_hub.utils import close_session

    cache = tmp_path_factory.mktemp("hf-cache")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    _switch(monkeypatch, offline=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(cache / "token"))
    monkeypatch.setenv("HF_HUB_CACHE", str(cache / "hub"))
    for name in ("constants.HF_HUB_CACHE", "constants.HUGGINGFACE_HUB_CACHE", "utils._cache_manager.HF_HUB_CACHE"):
        monkeypatch.setattr(f"huggingface_hub.{name}", str(cache / "hub"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(cache / "datasets"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache / "datasets")
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", cache / "datasets" / "downloads")
    monkeypatch.setattr(datasets.config, "EXTRACTED_DATASETS_PATH", cache / "datasets" / "downloads" / "extracted")
    HfFileSystem.clear_instance_cache()  # its listings outlive the repositories
    close_session()
    HUB.reset()
    yield HUB
    close_session()
    HfFileSystem.clear_instance_cache()
    assert HUB.crashes == []


@pytest.fixture
def offline() -> Callable[[], AbstractContextManager[None]]:
    """`with offline():` takes the Hugging Face libraries offline, in a test that has `hub_server`."""

    @contextmanager
    def switched() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            _switch(patch, offline=True)
            yield

    return switched


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the Hub's client would wait between its attempts; recorded instead of waited."""
    waits: list[float] = []
    for module in ("huggingface_hub.utils._http", "huggingface_hub.file_download"):
        monkeypatch.setattr(f"{module}.time", SimpleNamespace(**{**vars(time), "sleep": waits.append}))
    return waits
