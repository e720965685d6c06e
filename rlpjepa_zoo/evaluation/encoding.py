"""Images to features, embeddings and raw pixels for an evaluation."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..data.images import Images
from ..data.preprocess import batched
from ..errors import DataError, NonFiniteError
from ..models.encoder import SparseEncoder
from ..models.inference import image_batches, pixel_batches
from ..sparse.embeddings import SparseEmbeddings

__all__ = ["encode", "encode_sparse", "pixels"]

MOST_DENSE = 1 << 26
"""Numbers of z that are dense at a time (256 MB)."""


@torch.no_grad()
def encode(
    encoder: SparseEncoder, images: Images, batch_size: int = 256, num_workers: int = 0, progress: bool = False, allow_empty: bool = False
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
    features, codes, labels = [], [], list[int]()
    rows, bar = batched(images.rows(), batch_size), tqdm(total=len(images), desc="encode", unit="image", disable=not progress, leave=False)
    options: dict[str, Any] = {"num_workers": num_workers, "on_error": "skip", "progress": bar.update}
    with encoder.evaluating(), bar, closing(image_batches(rows, encoder.config.preprocess, encoder.device, **options)) as batches:
        for batch in batches:
            if batch.items:
                out = encoder.both(batch.x)
                features.append(out.features.float().cpu())
                codes.append(out.z.float().cpu())
                labels += [row.columns.get("label", -1) for row in batch.items]
    if not labels and not allow_empty:
        raise DataError("none of the images can be read")
    if not labels:
        return torch.zeros(0, encoder.config.features), torch.zeros(0, encoder.config.dim), torch.zeros(0, dtype=torch.long)
    return torch.cat(features), torch.cat(codes), torch.tensor(labels)


def pixels(encoder: SparseEncoder, images: Images) -> Tensor:
    """Raw pixels in 0..1, resized and cropped like the input of the encoder, as flat rows (n, 3 H W): a baseline for every embedding."""
    batches = pixel_batches(batched(images.rows(), 256), encoder.config.preprocess, on_error="skip")
    return torch.cat([batch.x for batch in batches]).permute(0, 3, 1, 2).flatten(1).float() / 255


def encode_sparse(
    encoder: SparseEncoder, images: Images, **options: Any
) -> tuple[np.ndarray[Any, Any], SparseEmbeddings, np.ndarray[Any, Any]]:
    """`encode` in chunks, so that z is never dense as a whole.

    Args:
        encoder, images: what to encode with and what to encode.
        options: batch_size, num_workers, progress.

    Returns:
        Features (n, F), embeddings z (n, D), labels (n,).

    Raises:
        DataError: no image can be read.
        NonFiniteError: the encoder gives NaN or infinity.
    """
    size = max(1, MOST_DENSE // encoder.config.dim)
    chunks = []
    for start in range(0, max(len(images), 1), size):
        chunk = images.take(range(start, min(start + size, len(images))))
        features, z, labels = encode(encoder, chunk, **options, allow_empty=True)
        if not torch.isfinite(z).all() or not torch.isfinite(features).all():
            raise NonFiniteError("the encoder gave NaN or infinity; its weights are damaged or diverged")
        chunks.append((features.numpy(), SparseEmbeddings.from_dense(z), labels.numpy()))
    all_features, all_z, all_labels = zip(*chunks, strict=True)
    if not any(map(len, all_labels)):
        raise DataError("none of the images can be read")
    return np.concatenate(all_features), SparseEmbeddings.concat(all_z), np.concatenate(all_labels)
