"""Golden codes: two images and what an encoder makes of them travel with its weights, so that loading proves its own numbers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from . import streams
from .errors import ModelError

__all__ = ["check", "make"]


@torch.no_grad()
def make(encoder: Any) -> dict[str, Tensor]:
    """Two images (one smooth, one noise) larger than the input and not square, and what the encoder makes of them in float32."""
    encoder = copy.deepcopy(encoder).float().cpu()  # on a GPU, TF32 convolutions differ by more than loading allows
    height, width = (s + s // 4 for s in encoder.config.preprocess.size)
    rows, columns = np.mgrid[0:height, 0 : width + 8] / max(height, width)
    smooth = np.stack([rows, columns, (np.sin(9 * rows) * np.cos(7 * columns) + 1) / 2], -1) * 200
    noise = torch.rand(height, width + 8, 3, generator=streams.generator(0, "golden")).numpy() * 255
    pixels = torch.from_numpy(np.stack([smooth, noise]).round().clip(0, 255).astype(np.uint8))
    inputs = torch.stack([encoder.transform(Image.fromarray(p.numpy())) for p in pixels])
    features, z = _evaluate(encoder, inputs)
    return {"images": pixels, "inputs": inputs, "features": features, "codes": z}


def _evaluate(encoder: Any, inputs: Tensor) -> tuple[Tensor, Tensor]:
    with encoder.evaluating(), torch.no_grad(), torch.autocast(encoder.device.type, enabled=False):
        out = encoder.both(inputs.to(encoder.device))
    return out.features.float().cpu(), out.z.float().cpu()


def check(encoder: Any, golden: dict[str, Tensor], where: Path) -> None:
    """Refuse an encoder that does not reproduce its codes, and say which station differs."""
    missing = {"images", "inputs", "features", "codes"} - set(golden)
    if missing:
        raise ModelError(f"{where}: no tensor '{min(missing)}'")
    pixels, size = golden["images"], encoder.config.preprocess.size
    if pixels.dtype != torch.uint8 or pixels.dim() != 4 or pixels.shape[-1] != 3 or not len(pixels):
        raise ModelError(f"{where}: images: expected uint8 (n, H, W, 3) with n >= 1, got {pixels.dtype} of shape {tuple(pixels.shape)}")
    inputs = torch.stack([encoder.transform(Image.fromarray(p.numpy())) for p in pixels])
    if golden["inputs"].shape != (len(pixels), 3, *size) or not golden["inputs"].is_floating_point():
        raise ModelError(f"{where}: inputs: expected floats of shape {(len(pixels), 3, *size)}, got {tuple(golden['inputs'].shape)}")
    features, z = _evaluate(encoder, golden["inputs"])
    for station, got, expected, tolerance in (
        ("preprocessing", inputs, golden["inputs"], 0.05),  # two grey levels of 255: decoders and resizers differ by that
        ("backbone features", features, golden["features"], 1e-3),
        ("codes", z, golden["codes"], 1e-3),
    ):
        if got.shape != expected.shape:
            raise ModelError(f"{where}: {station} have shape {tuple(got.shape)}, the saved ones {tuple(expected.shape)}")
        error = float((got - expected).abs().max()) / max(1.0, float(expected.abs().max()))
        if not error <= tolerance:
            raise ModelError(
                f"{where}: {station} differ from the saved ones by {error:.2g} (allowed {tolerance:g}); other versions of torch, timm or Pillow?"
            )
