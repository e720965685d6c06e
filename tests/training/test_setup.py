"""What Accelerate and the device cannot do is refused; models stay what they are when they are prepared."""

from pathlib import Path

import pytest
import torch
from runs import tiny

from rlpjepa_zoo.errors import RecipeError
from rlpjepa_zoo.models.factory import create_encoder
from rlpjepa_zoo.training import setup
from rlpjepa_zoo.training.tasks.pretrain import train


def test_unknown_tracker_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="train"):
        train(tiny("train.trackers=[nosuchtracker]"), tmp_path / "run", progress=False)


def test_fp16_on_a_cpu_is_refused(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(RecipeError, match="fp16"):
        train(tiny("train.precision=fp16"), tmp_path / "run", progress=False)


def test_sync_batch_norm_keeps_timm_activations() -> None:
    """Multi-GPU training converts fused norms without changing the outputs of the network."""
    enc, x = create_encoder("test_efficientnet", dim=8).eval(), torch.randn(2, 3, 32, 32)
    before = enc.features(x)
    assert torch.equal(setup.convert_sync_batchnorm(enc).eval().features(x), before)
