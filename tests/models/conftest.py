"""Fixtures of the tests of models: one tiny encoder and its published files."""

import pytest
from tiny_hub import make, published_files


@pytest.fixture(scope="module")
def encoder():
    return make()


@pytest.fixture(scope="module")
def contents(encoder):
    return published_files(encoder)
