"""Encoders for tests, whose batch statistics are not those of fresh ones."""

from typing import Any

import torch

from rlpjepa_zoo import create_encoder
from rlpjepa_zoo.data.preprocess import Preprocess
from rlpjepa_zoo.models.encoder import SparseEncoder

SMALL = Preprocess((32, 32), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), "bilinear", 0.9)


def settled(name: str = "test_resnet", **options: Any) -> SparseEncoder:
    """24 dimensions, 32-pixel images unless `options` say otherwise; in training mode, always the same."""
    torch.manual_seed(0)
    enc = create_encoder(name, dim=24, hidden_dim=20, **{"preprocess": SMALL, **options})
    with torch.no_grad():
        for _ in range(3):
            enc(1 + 2 * torch.randn(8, 3, *enc.config.preprocess.size))
    return enc
