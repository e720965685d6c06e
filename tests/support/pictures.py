"""A small picture instead of the one that a card shows of its run: matplotlib needs half of the time of a short training run."""

import hashlib
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from PIL import Image

from rlpjepa_zoo.hub import card_figures

real_training_picture = card_figures.training


def small_picture(*values: Any) -> bytes:
    """A PNG that depends on the same values as the real one, and on nothing else."""
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).digest()
    buffer = io.BytesIO()
    Image.frombytes("L", (8, 4), digest).save(buffer, "PNG")
    return buffer.getvalue()


@contextmanager
def small_pictures() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(card_figures, "training", small_picture)
        yield
