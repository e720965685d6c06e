"""Golden codes: two images and what an encoder makes of them travel with its weights, so that loading proves its own numbers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..core import rng
from ..errors import ModelError, first_line

__all__ = ["check", "check_header", "make"]


SHARE, MARGIN = 4, 8
"""Golden images are larger than the input by a fourth, and wider than that by 8 pixels, so that resizing and cropping show."""


@torch.no_grad()
def make(encoder: Any) -> dict[str, Tensor]:
    """Two images (one smooth, one noise) larger than the input and not square, and what the encoder makes of them in float32."""
    encoder = copy.deepcopy(encoder).float().cpu()  # on a GPU, TF32 convolutions differ by more than loading allows
    height, width = (s + s // SHARE for s in encoder.config.preprocess.size)
    rows, columns = np.mgrid[0:height, 0 : width + MARGIN] / max(height, width)
    smooth = np.stack([rows, columns, (np.sin(9 * rows) * np.cos(7 * columns) + 1) / 2], -1) * 200
    noise = torch.rand(height, width + MARGIN, 3, generator=rng.generator(0, "golden")).numpy() * 255
    pixels = torch.from_numpy(np.stack([smooth, noise]).round().clip(0, 255).astype(np.uint8))
    inputs = torch.stack([encoder.transform(Image.fromarray(p.numpy())) for p in pixels])
    features, z = _evaluate(encoder, inputs)
    return {"images": pixels, "inputs": inputs, "features": features, "codes": z}


def _evaluate(encoder: Any, inputs: Tensor) -> tuple[Tensor, Tensor]:
    with encoder.evaluating(), torch.no_grad(), torch.autocast(encoder.device.type, enabled=False):
        features = encoder.features(inputs.to(encoder.device))
        last = encoder.head if hasattr(encoder, "head") else encoder.projector  # logits; or codes
        z = last(features)  # before a dial, which would make a difference in rounding one of zero or not
    return features.float().cpu(), z.float().cpu()


def check_header(found: dict[str, tuple[str, tuple[int, ...]]], config: Any, where: Path) -> None:
    """Names, dtypes and shapes, from the file's header alone: what `make` writes, for at most four images."""
    (height, width), n = config.preprocess.size, found.get("images", ("", (0,)))[1][:1]
    expected = {
        "images": ("U8", (*n, height + height // SHARE, width + width // SHARE + MARGIN, 3)),
        "inputs": ("F32", (*n, 3, height, width)),
        "features": ("F32", (*n, config.features)),
        "codes": ("F32", (*n, config.dim)),
    }
    if set(found) != set(expected):
        raise ModelError(f"{where}: expected the tensors {', '.join(expected)}, got {', '.join(sorted(found)[:6]) or 'none'}")
    for name, wanted in expected.items():
        if found[name] != wanted or not n or not 1 <= n[0] <= 4:
            raise ModelError(
                f"{where}: {name}: expected {wanted[0]} of shape {wanted[1]} with 1 to 4 rows, got {found[name][0]} of {found[name][1]}"
            )


def check(encoder: Any, golden: dict[str, Tensor], where: Path) -> None:
    """Refuse an encoder that does not reproduce its codes, and say which station differs; `check_header` comes first."""
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
    for station, got, expected, tolerance in (
        ("preprocessing", inputs, golden["inputs"], 0.05),  # two grey levels of 255: decoders and resizers differ by that
        ("backbone features", features, golden["features"], 1e-3),
        ("codes", z, golden["codes"], 1e-3),
    ):
        error = float((got - expected).abs().max()) / max(1.0, float(expected.abs().max()))
        if not error <= tolerance:
            raise ModelError(
                f"{where}: {station} differ from the saved ones by {error:.2g} (allowed {tolerance:g}); other versions of torch, timm or Pillow?"
            )
