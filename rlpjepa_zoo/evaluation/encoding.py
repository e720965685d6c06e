"""Images to features, embeddings and raw pixels for an evaluation, in one pass over the images."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Generator
from contextlib import closing
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..data.images import Images
from ..data.preprocess import Preprocess, batched
from ..errors import DataError, NonFiniteError
from ..models.encoder import SparseEncoder
from ..models.inference import Batch, pixel_batches
from ..sparse.embeddings import SparseEmbeddings

__all__ = ["PIXEL_SIDE", "Encoded", "batch_size_for", "encode", "encode_sparse", "pixel_size"]

log = logging.getLogger("rlpjepa_zoo")

PIXEL_SIDE = 32
"""Longest side of the images whose raw pixels are measured. Larger inputs are shrunk: at 224 pixels, a row would have 150,528 columns."""
BATCH, BATCH_PIXELS = 256, 32 * 224 * 224
"""Images of a forward pass on a CPU: `BATCH`, or as many as have `BATCH_PIXELS` pixels, if these are fewer (32 of 224 x 224)."""


class Encoded(NamedTuple):
    """All readable images of one part of a data set."""

    features: np.ndarray[Any, Any]
    """(n, F) float32."""
    z: SparseEmbeddings
    """(n, D)."""
    labels: np.ndarray[Any, Any]
    """(n,) int64."""
    pixels: np.ndarray[Any, Any] | None
    """(n, 3 h w) uint8 with (h, w) of `pixel_size`, if they were asked for."""


def batch_size_for(preprocess: Preprocess, device: torch.device) -> int:
    """Images of a forward pass if none is given.

    Activations grow with the pixels of a batch: 256 images of 224 x 224 took 4.4 GB in a ResNet and were slower on a CPU than 32 (1.4 GB).

    Example:
        >>> cpu = torch.device("cpu")
        >>> batch_size_for(Preprocess((32, 32)), cpu), batch_size_for(Preprocess((224, 224)), cpu)
        (256, 32)
    """
    height, width = preprocess.size
    return max(1, min(BATCH, BATCH_PIXELS // (height * width))) if device.type == "cpu" else BATCH


def pixel_size(preprocess: Preprocess) -> tuple[int, int]:
    """Height and width at which raw pixels are measured: those of the input, shrunk to a longest side of `PIXEL_SIDE`.

    Example:
        >>> pixel_size(Preprocess((28, 28))), pixel_size(Preprocess((224, 112)))
        ((28, 28), (32, 16))
    """
    height, width = preprocess.size
    scale = min(1.0, PIXEL_SIDE / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


@torch.no_grad()
def encode(
    encoder: SparseEncoder, images: Images, batch_size: int = BATCH, num_workers: int = 0, progress: bool = False, allow_empty: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Encode all readable images in evaluation mode; the mode of the encoder is restored afterwards.

    Args:
        encoder, images: what to encode with and what to encode.
        batch_size, num_workers: images of a forward pass, threads that decode.
        progress: show a progress bar on stderr.
        allow_empty: return empty tensors if no image can be read.

    Returns:
        Features (n, F), embeddings z (n, D), both float32, and labels (n,), -1 where unknown; on the CPU.

    Raises:
        DataError: no image can be read, unless `allow_empty`.
    """
    features, codes, labels = [torch.zeros(0, encoder.config.features)], [torch.zeros(0, encoder.config.dim)], list[int]()
    with closing(_encoded_batches(encoder, images, batch_size, num_workers, progress)) as batches:
        for batch, of_batch, z in batches:
            features.append(of_batch)
            codes.append(z)
            labels += _labels(batch)
    if not labels and not allow_empty:
        raise DataError("none of the images can be read")
    return torch.cat(features), torch.cat(codes), torch.tensor(labels, dtype=torch.long)


@torch.no_grad()
def encode_sparse(
    encoder: SparseEncoder, images: Images, role: str = "", batch_size: int | None = None, num_workers: int = 0, progress: bool = False,
    with_pixels: bool = False,
) -> Encoded:  # fmt: skip
    """`encode` with sparse z, which is dense for one batch at a time, and with raw pixels of the same pass. Unreadable images are logged.

    Args:
        encoder, images: what to encode with and what to encode.
        role: of the images, for messages.
        batch_size: images of a forward pass; `batch_size_for` when None.
        num_workers, progress: as of `encode`.
        with_pixels: also return raw pixels.

    Raises:
        DataError: no image can be read.
        NonFiniteError: the encoder gives NaN or infinity.
    """
    preprocess = encoder.config.preprocess
    features, codes, labels, pixels, failures = list[Tensor](), list[SparseEmbeddings](), list[int](), list[Tensor](), list[str]()
    size, start = batch_size or batch_size_for(preprocess, encoder.device), time.monotonic()
    with closing(_encoded_batches(encoder, images, size, num_workers, progress, role)) as batches:
        for batch, of_batch, z in batches:
            if not torch.isfinite(z).all() or not torch.isfinite(of_batch).all():
                raise NonFiniteError("the encoder gave NaN or infinity; its weights are damaged or diverged")
            failures += [reason for _, reason in batch.failures]
            features.append(of_batch)
            codes.append(SparseEmbeddings.from_dense(z))
            labels += _labels(batch)
            if with_pixels:
                pixels.append(_shrunk(batch.x, pixel_size(preprocess)))
    if not labels:
        raise DataError(f"none of the images can be read{f'; the first: {failures[0]}' if failures else ''}")
    if failures:
        log.warning("%d of %d %s images cannot be read and are left out; the first: %s", len(failures), len(images), role, failures[0])
    if progress and not sys.stderr.isatty():  # where no bar is shown
        log.info("encoded %d %s images in %.1f s", len(labels), role, time.monotonic() - start)
    raw = torch.cat(pixels).numpy() if pixels else None
    return Encoded(torch.cat(features).numpy(), SparseEmbeddings.concat(codes), np.array(labels, np.int64), raw)


def _encoded_batches(
    encoder: SparseEncoder, images: Images, batch_size: int, num_workers: int, progress: bool, role: str = ""
) -> Generator[tuple[Batch[Any], Tensor, Tensor], None, None]:
    """For each batch: the readable images as (n, H, W, 3) uint8, their features (n, F) and z (n, D), both float32 on the CPU."""
    preprocess, name = encoder.config.preprocess, " ".join(("encode", role)).rstrip()
    rows = batched(images.rows(), batch_size)
    bar = tqdm(total=len(images), desc=name, unit="image", disable=None if progress else True, leave=False)  # None: only on a terminal
    loop = pixel_batches(rows, preprocess, num_workers=num_workers, on_error="skip", progress=bar.update)
    with encoder.evaluating(), bar, closing(loop) as batches:
        for batch in batches:
            if batch.items:
                out = encoder.both(preprocess.normalised(batch.x.to(encoder.device)))
                yield batch, out.features.float().cpu(), out.z.float().cpu()
            else:
                yield batch, torch.zeros(0, encoder.config.features), torch.zeros(0, encoder.config.dim)


def _labels(batch: Batch[Any]) -> list[int]:
    return [row.columns.get("label", -1) for row in batch.items]


def _shrunk(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Rows (n, 3 h w) uint8 of images (n, H, W, 3) uint8; every pixel is the mean of the area it replaces."""
    x = x.permute(0, 3, 1, 2)
    if tuple(x.shape[2:]) != size and len(x):
        x = torch.nn.functional.interpolate(x.float(), size, mode="area").round().to(torch.uint8)
    return x.flatten(1)
