"""Shared by the tests of embedding."""

from collections.abc import Callable
from typing import Any

import pytest

from rlpjepa_zoo.cli.app import run as run_command


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command line in this process: exit code, stdout, stderr."""

    def called(*words: Any) -> tuple[int, str, str]:
        code = run_command([str(word) for word in words])
        return code, *capsys.readouterr()

    return called
