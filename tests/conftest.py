"""What all tests share: one thread (tiny nets run 10 to 100 times slower with two), a private Hugging Face cache, no network."""

import os
import tempfile

os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="rlpjepa-hf-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "agg")

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

torch.set_num_threads(1)


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
