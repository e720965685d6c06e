"""Images to features, embeddings and raw pixels for an evaluation, in one pass over the images."""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..data.images import Images
from ..data.preprocess import Preprocess, batched
from ..errors import DataError, NonFiniteError
from ..models.encoder import SparseEncoder
from ..models.inference import default_batch_size, pixel_batches
from ..progress import on_terminal, progress_bar
from ..sparse.embeddings import SparseEmbeddings

__all__ = ["PIXEL_SIDE", "Encoded", "EncodedBatch", "Kept", "encode", "encode_sparse", "pixel_size"]

log = logging.getLogger("rlpjepa_zoo")

PIXEL_SIDE = 32
"""Longest side of the images whose raw pixels are measured. Larger inputs are shrunk: at 224 pixels, a row would have 150,528 columns."""


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


def pixel_size(preprocess: Preprocess) -> tuple[int, int]:
    """Height and width at which raw pixels are measured: those of the input, shrunk to a longest side of `PIXEL_SIDE`.

    Example:
        >>> pixel_size(Preprocess((28, 28))), pixel_size(Preprocess((224, 112)))
        ((28, 28), (32, 16))
    """
    height, width = preprocess.size
    scale = min(1.0, PIXEL_SIDE / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


class EncodedBatch(NamedTuple):
    """The readable images of one batch; on the CPU."""

    features: Tensor
    """(n, F) float32."""
    z: Tensor
    """(n, D) float32."""
    labels: list[int]
    pixels: Tensor | None = None
    """(n, H, W, 3) uint8."""
    failures: Sequence[str] = ()
    """Why the other images cannot be read."""


class Kept:
    """Features of a frozen backbone, batch by batch, so that images are encoded once however often a projector on them is measured.

    Batches stay as they were, so z is bit-equal to that of a whole pass. Parts with more than `MOST` numbers (256 MB) are not kept.
    """

    MOST = 1 << 26

    def __init__(self) -> None:
        self._parts: dict[str, list[EncodedBatch]] = {}

    def get(self, part: str) -> list[EncodedBatch] | None:
        """Batches of a part, by its name; None if they were not kept."""
        return self._parts.get(part)

    def add(self, part: str, batches: list[EncodedBatch]) -> None:
        """Keep features and labels of all batches of a part."""
        if sum(batch.features.numel() for batch in batches) <= self.MOST:
            self._parts[part] = [EncodedBatch(batch.features, batch.z[:0], batch.labels) for batch in batches]


@torch.no_grad()
def encode(
    encoder: SparseEncoder, images: Images, batch_size: int = 256, num_workers: int = 0, progress: bool = False, allow_empty: bool = False,
    kept: Kept | None = None, part: str = "",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Encode all readable images in evaluation mode; the mode of the encoder is restored afterwards.

    Args:
        encoder, images: what to encode with and what to encode.
        batch_size, num_workers: images of a forward pass, threads that decode.
        progress: show a progress bar on stderr.
        allow_empty: return empty tensors if no image can be read.
        kept, part: features of a frozen backbone and the name of these images among them; filled by the first call, then used instead of the
            images.

    Returns:
        Features (n, F), embeddings z (n, D), both float32, and labels (n,), -1 where unknown; on the CPU.

    Raises:
        DataError: no image can be read, unless `allow_empty`.
    """
    known = None if kept is None else kept.get(part)
    passes = _encoded_batches(encoder, images, batch_size, num_workers, progress) if known is None else _projected(encoder, known)
    with closing(passes):
        batches = [batch._replace(pixels=None) for batch in passes]
    if kept is not None and known is None:
        kept.add(part, batches)
    labels = [label for batch in batches for label in batch.labels]
    if not labels and not allow_empty:
        raise DataError("none of the images can be read")
    features, z = torch.zeros(0, encoder.config.features), torch.zeros(0, encoder.config.dim)
    return (
        torch.cat([features, *(batch.features for batch in batches)]),
        torch.cat([z, *(batch.z for batch in batches)]),
        torch.tensor(labels, dtype=torch.long),
    )


def _projected(encoder: SparseEncoder, batches: list[EncodedBatch]) -> Generator[EncodedBatch, None, None]:
    """Batches with z of known features."""
    with encoder.evaluating():
        for batch in batches:
            yield batch._replace(z=encoder.outputs(batch.features.to(encoder.device)).float().cpu() if batch.labels else batch.z)


@torch.no_grad()
def encode_sparse(
    encoder: SparseEncoder, images: Images, role: str = "", batch_size: int | None = None, num_workers: int = 0, progress: bool = False,
    with_pixels: bool = False,
) -> Encoded:  # fmt: skip
    """`encode` with sparse z, which is dense for one batch at a time, and with raw pixels of the same pass. Unreadable images are logged.

    Args:
        encoder, images: what to encode with and what to encode.
        role: of the images, for messages.
        batch_size: images of a forward pass; chosen by `default_batch_size` when None.
        num_workers, progress: as of `encode`.
        with_pixels: also return raw pixels.

    Raises:
        DataError: no image can be read.
        NonFiniteError: the encoder gives NaN or infinity.
    """
    preprocess = encoder.config.preprocess
    features, codes, labels, pixels, failures = list[Tensor](), list[SparseEmbeddings](), list[int](), list[Tensor](), list[str]()
    size, start = batch_size or default_batch_size(preprocess.size, encoder.device), time.monotonic()
    with closing(_encoded_batches(encoder, images, size, num_workers, progress, role)) as batches:
        for batch in batches:
            if not torch.isfinite(batch.z).all() or not torch.isfinite(batch.features).all():
                raise NonFiniteError("the encoder gave NaN or infinity; its weights are damaged or diverged")
            failures += batch.failures
            features.append(batch.features)
            codes.append(SparseEmbeddings.from_dense(batch.z))
            labels += batch.labels
            if with_pixels and batch.pixels is not None:
                pixels.append(_shrunk(batch.pixels, pixel_size(preprocess)))
    if not labels:
        raise DataError(f"none of the images can be read{f'; the first: {failures[0]}' if failures else ''}")
    if failures:
        log.warning("%d of %d %s images cannot be read and are left out; the first: %s", len(failures), len(images), role, failures[0])
    if progress and not on_terminal():  # where no bar is shown
        log.info("encoded %d %s images in %.1f s", len(labels), role, time.monotonic() - start)
    raw = torch.cat(pixels).numpy() if pixels else None
    return Encoded(torch.cat(features).numpy(), SparseEmbeddings.concat(codes), np.array(labels, np.int64), raw)


def _encoded_batches(
    encoder: SparseEncoder, images: Images, batch_size: int, num_workers: int, progress: bool, role: str = ""
) -> Generator[EncodedBatch, None, None]:
    """The images batch by batch."""
    preprocess, name = encoder.config.preprocess, " ".join(("encode", role)).rstrip()
    rows = batched(images.rows(), batch_size)
    bar = progress_bar(name, len(images), hidden=not progress, leave=False)
    loop = pixel_batches(rows, preprocess, num_workers=num_workers, on_error="skip", progress=bar.update)
    features, z = torch.zeros(0, encoder.config.features), torch.zeros(0, encoder.config.dim)
    with encoder.evaluating(), bar, closing(loop) as batches:
        for batch in batches:
            if batch.items:
                out = encoder.both(preprocess.normalised(batch.x.to(encoder.device)))
                features, z = out.features.float().cpu(), out.z.float().cpu()
            labels = [row.columns.get("label", -1) for row in batch.items]
            yield EncodedBatch(features[: len(labels)], z[: len(labels)], labels, batch.x, [reason for _, reason in batch.failures])


def _shrunk(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Rows (n, 3 h w) uint8 of images (n, H, W, 3) uint8; every pixel is the mean of the area it replaces."""
    x = x.permute(0, 3, 1, 2)
    if tuple(x.shape[2:]) != size and len(x):
        x = torch.nn.functional.interpolate(x.float(), size, mode="area").round().to(torch.uint8)
    return x.flatten(1)
