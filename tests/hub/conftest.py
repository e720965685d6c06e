"""Fixtures of the tests of the Hub: one tiny encoder on the loopback Hub, recorded waits, the command line."""

import socket
import time
from types import SimpleNamespace

import pytest
from hub_server import FakeHub
from tiny_hub import INFO, REPO, make, published_files

from rlpjepa_zoo.cli import app as cli
from rlpjepa_zoo.hub import download, retry


@pytest.fixture(scope="session")
def encoder():
    return make()


@pytest.fixture(scope="session")
def contents(encoder):
    return published_files(encoder)


@pytest.fixture
def published(hub_server: FakeHub, contents) -> FakeHub:
    """The loopback Hub with one encoder on it."""
    hub_server.put(REPO, contents, title="Upload sparse encoder")
    return hub_server


@pytest.fixture
def waits(monkeypatch, naps) -> list[float]:
    """All waits between attempts, ours and the client's: recorded, not waited for."""
    for module in (download, retry):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=time.monotonic, sleep=naps.append))
    return naps


@pytest.fixture
def run(capsys):
    """The command line in this process: exit code, stdout, stderr."""

    def call(*arguments):
        code = cli.run([str(a) for a in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def local(tmp_path, encoder):
    """The folder of a run."""
    encoder.save_pretrained(tmp_path / "run" / "encoder", info=INFO, recipe="name: tiny\n", name="local-dir:somewhere")
    return tmp_path / "run"
