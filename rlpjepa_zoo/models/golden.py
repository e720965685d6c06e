"""Golden codes: two images with their codes are saved with the weights, and loading compares the codes it computes with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..core import rng
from ..errors import ModelError, first_line
from ..ops.modules import plain_copy

__all__ = ["check", "check_header", "make"]


SHARE, MARGIN = 4, 8
"""Golden images are a fourth larger than the input and 8 pixels wider, so that differences in resizing and cropping are detected."""


@torch.no_grad()
def make(encoder: Any) -> dict[str, Tensor]:
    """Two images (one smooth, one noise), larger than the input and not square, with inputs, features and codes in float32.

    Args:
        encoder: a `PublishedModel`; of a classifier, features are the input of its linear layer and codes its logits.

    Returns:
        images (2, H, W, 3) uint8, inputs (2, 3, H, W), features (2, F), codes (2, D).
    """
    encoder = plain_copy(encoder).float().cpu()  # on a GPU, TF32 convolutions differ by more than loading allows
    height, width = (s + s // SHARE for s in encoder.config.preprocess.size)
    rows, columns = np.mgrid[0:height, 0 : width + MARGIN] / max(height, width)
    smooth = np.stack([rows, columns, (np.sin(9 * rows) * np.cos(7 * columns) + 1) / 2], -1) * 200
    noise = torch.rand(height, width + MARGIN, 3, generator=rng.generator(0, "golden"), device="cpu").numpy() * 255
    pixels = torch.from_numpy(np.stack([smooth, noise]).round().clip(0, 255).astype(np.uint8))
    inputs = torch.stack([encoder.transform(Image.fromarray(p.numpy())) for p in pixels])
    features, z = _evaluate(encoder, inputs)
    return {"images": pixels, "inputs": inputs, "features": features, "codes": z}


def _evaluate(encoder: Any, inputs: Tensor) -> tuple[Tensor, Tensor]:
    with encoder.evaluating(), torch.no_grad(), torch.autocast(encoder.device.type, enabled=False):
        features = encoder.features(inputs.to(encoder.device))
        z = encoder.outputs(features)  # without the dial: rounding could turn a value into zero
    return features.float().cpu(), z.float().cpu()


def check_header(header: dict[str, tuple[str, tuple[int, ...]]], config: Any, where: Path) -> None:
    """Compare names, dtypes and shapes in a file header with those that `make` writes, for one to four images.

    Raises:
        ModelError: they differ.
    """
    (height, width), n = config.preprocess.size, header.get("images", ("", (0,)))[1][:1]
    expected = {
        "images": ("U8", (*n, height + height // SHARE, width + width // SHARE + MARGIN, 3)),
        "inputs": ("F32", (*n, 3, height, width)),
        "features": ("F32", (*n, config.features)),
        "codes": ("F32", (*n, config.dim)),
    }
    if set(header) != set(expected):
        raise ModelError(f"{where}: expected the tensors {', '.join(expected)}, got {', '.join(sorted(header)[:6]) or 'none'}")
    for name, wanted in expected.items():
        if header[name] != wanted or not n or not 1 <= n[0] <= 4:
            raise ModelError(
                f"{where}: {name}: expected {wanted[0]} of shape {wanted[1]} with 1 to 4 rows, got {header[name][0]} of {header[name][1]}"
            )


def check(encoder: Any, golden: dict[str, Tensor], where: Path) -> None:
    """Compare the numbers that a loaded model computes with its golden numbers; call `check_header` first.

    Raises:
        ModelError: preprocessing, features or codes differ; the message names the first of them.
    """
    try:
        _check(encoder, golden, where)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{where}: the golden images cannot be encoded: {first_line(error)}") from error


def _check(encoder: Any, golden: dict[str, Tensor], where: Path) -> None:
    pixels = golden["images"]
    inputs = torch.stack([encoder.transform(Image.fromarray(p.numpy())) for p in pixels])
    features, z = _evaluate(encoder, golden["inputs"])
    for step, got, expected, tolerance in (
        ("preprocessing", inputs, golden["inputs"], 0.05),  # two grey levels of 255: decoders and resizers differ by that
        ("backbone features", features, golden["features"], 1e-3),
        ("codes", z, golden["codes"], 1e-3),
    ):
        error = float((got - expected).abs().max()) / max(1.0, float(expected.abs().max()))
        if not error <= tolerance:
            raise ModelError(
                f"{where}: {step} differ from the saved ones by {error:.2g} (allowed {tolerance:g}); other versions of torch, timm or Pillow?"
            )
