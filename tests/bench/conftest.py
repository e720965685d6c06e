"""Features of the digits by a small backbone with random weights, and the recipe they come from."""

import pytest
from runs import CACHED, tiny

from rlpjepa_zoo.bench.features import load_features
from rlpjepa_zoo.bench.methods.base import Features
from rlpjepa_zoo.config.pretrain import Recipe


@pytest.fixture(scope="session")
def compared() -> tuple[Recipe, Features]:
    return load_features(tiny(*CACHED))
