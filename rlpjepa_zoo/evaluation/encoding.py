"""Images to features, embeddings and raw pixels for an evaluation."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..data.images import Images
from ..data.preprocess import batched, ready
from ..errors import DataError, NonFiniteError
from ..models.encoder import SparseEncoder
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
    features, codes, rows = [], [], []
    prepare = encoder.config.preprocess
    groups = ready(batched(range(len(images)), batch_size), images.read, prepare, num_workers)
    bar = tqdm(total=len(images), desc="encode", unit="image", disable=not progress, leave=False)
    with encoder.evaluating(), bar, closing(groups):
        for group in groups:
            bar.update(len(group.items))
            if group.good:
                out = encoder.both(prepare.normalised(group.pixels.to(encoder.device)))
                features.append(out.features.float().cpu())
                codes.append(out.z.float().cpu())
                rows += [group.items[i] for i in group.good]
    if not rows and not allow_empty:
        raise DataError("none of the images can be read")
    if not rows:
        return torch.zeros(0, encoder.config.features), torch.zeros(0, encoder.config.dim), torch.zeros(0, dtype=torch.long)
    return torch.cat(features), torch.cat(codes), _labels(images, rows)


def pixels(encoder: SparseEncoder, images: Images) -> Tensor:
    """Raw pixels in 0..1, resized and cropped like the input of the encoder, as flat rows (n, 3 H W): a baseline for every embedding."""
    groups = list(ready(batched(range(len(images)), 256), images.read, encoder.config.preprocess))
    return torch.cat([group.pixels for group in groups]).permute(0, 3, 1, 2).flatten(1).float() / 255


def _labels(images: Images, rows: list[int]) -> Tensor:
    """(n,) labels of some rows, -1 where unknown."""
    return torch.from_numpy(np.asarray(np.full(len(rows), -1) if images.labels is None else images.labels[rows]))


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
