"""The loop from images to batches on the device: decoding ahead in threads, one rule for unreadable images, normalisation.

Encoders, classifiers, `embed` and evaluation run it and differ only in what they do with a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Generic, Literal, TypeVar, cast

import torch
from PIL import Image
from torch import Tensor

from ..data.images import ImageRows, Images, Row, reason_with_id
from ..data.preprocess import Preprocess, batched, ready
from ..data.sources import open_images
from ..errors import DataError, UsageError
from ..progress import progress_bar
from .base import check_float_batch

__all__ = ["Batch", "OnError", "OutputOptions", "check_count", "default_batch_size", "image_batches", "pixel_batches", "source_batches"]

T = TypeVar("T")
PIXELS = 32 * 224 * 224
"""Pixels of a batch on a CPU."""
OnError = Literal["raise", "skip"]
Failure = tuple[Any, str]
"""Id of an unreadable image, and the reason."""


@dataclass(frozen=True)
class OutputOptions:
    """Which values of each embedding are kept, and the precision that computes them.

    Attributes:
        max_active: largest number of values; the largest are kept. None keeps all.
        min_value: smaller values become zero.
        precision: ``float32`` or ``bf16``.
        normalize: divide each embedding, as kept, by its length (L2); embeddings of zeros stay zero.

    Raises:
        UsageError: values out of range.
    """

    max_active: int | None = None
    min_value: float = 0.0
    precision: str = "float32"
    normalize: bool = False

    def __post_init__(self) -> None:
        if self.max_active is not None:
            check_count("max_active", self.max_active, 1)
        if not 0 <= self.min_value < float("inf"):
            raise UsageError(f"min_value: expected a number >= 0, got {self.min_value}")
        if self.precision not in ("float32", "bf16"):
            raise UsageError(f"precision: expected 'float32' or 'bf16', got {self.precision!r}")


def default_batch_size(size: tuple[int, int], device: torch.device) -> int:
    """Images per batch of an evaluation pass, by the memory that they need.

    Args:
        size: height and width of an input image.
        device: where the backbone runs.

    Returns:
        1 .. 256: as many images as have `PIXELS` pixels together; 32 of 224 x 224 on a CPU, 256 of 64 x 64. An accelerator takes eight times as many.

    Example:
        >>> default_batch_size((224, 224), torch.device("cpu")), default_batch_size((32, 32), torch.device("cpu"))
        (32, 256)
    """
    pixels = PIXELS * (1 if device.type == "cpu" else 8)
    return max(1, min(256, pixels // (size[0] * size[1])))


def check_count(name: str, value: Any, least: int) -> None:
    """Raise UsageError unless a number of images, threads or values is an integer (numpy's are) and large enough.

    Example:
        >>> check_count("batch_size", 2.0, 1)
        Traceback (most recent call last):
        rlpjepa_zoo.errors.UsageError: batch_size: expected an integer >= 1, got 2.0
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise UsageError(f"{name}: expected an integer >= {least}, got {value!r}")


@dataclass(frozen=True)
class Batch(Generic[T]):
    """Images of one group of items.

    Attributes:
        group: all items of the group, in order, also those whose image is unreadable.
        items: the n items whose image is readable, in order; possibly none.
        ids: of `items`.
        x: (n, 3, H, W) float32 in channels_last on the device; from `pixel_batches`, (n, H, W, 3) uint8 on the CPU.
        failures: ids of the unreadable images, and the reasons.
    """

    group: Sequence[T]
    items: list[T]
    ids: list[Any]
    x: Tensor
    failures: list[Failure]


def pixel_batches(
    groups: Iterable[list[T]],
    preprocess: Preprocess,
    *,
    row: Callable[[T], Row] = lambda item: cast(Row, item),
    num_workers: int = 0,
    on_error: OnError = "raise",
    fix: str = "",
    progress: Callable[[int], object] | None = None,
) -> Generator[Batch[T], None, None]:
    """Resized and cropped images of groups of items, in order; the images of a few groups are decoded ahead.

    Close the generator when you stop early (`contextlib.closing`): its threads end then.

    Args:
        groups: lists of items, read lazily; a batch for each, also when all its images are unreadable.
        preprocess: the evaluation preprocessing.
        row: from an item to its `Row`, whose `read` gives the RGB image in any thread; an item is a `Row` itself by default.
        num_workers: threads that decode; 0 decodes in the calling thread.
        on_error: ``raise`` ends at the first unreadable image; ``skip`` leaves it out and lists it in `Batch.failures`.
        fix: appended to the error message.
        progress: called with the number of items of a group after the group was used.

    Raises:
        DataError: an unreadable image, with its id and the reason, unless skipped.
    """
    with closing(ready(groups, lambda item: row(item).read(), preprocess, num_workers)) as decoded:
        for group in decoded:
            ids = {place: row(group.items[place]).id for place, _ in group.bad}
            failures = [(ids[place], reason_with_id(ids[place], reason)) for place, reason in group.bad]
            if failures and on_error == "raise":
                raise DataError(f"{failures[0][1]}{fix}")
            items = [group.items[place] for place in group.good]
            yield Batch(group.items, items, [row(item).id for item in items], group.pixels, failures)
            if progress is not None:
                progress(len(group.items))


def image_batches(
    groups: Iterable[list[T]], preprocess: Preprocess, device: torch.device, **options: Any
) -> Generator[Batch[T], None, None]:
    """`pixel_batches`, normalised on a device: `Batch.x` is what a backbone takes. Arguments and errors as of `pixel_batches`.

    Example:
        >>> from PIL import Image
        >>> rows = [Row(i, lambda: Image.new("RGB", (40, 30)), {}) for i in range(5)]
        >>> batches = image_batches(batched(rows, 2), Preprocess((32, 32)), torch.device("cpu"))
        >>> [(batch.ids, tuple(batch.x.shape)) for batch in batches][-1]
        ([4], (1, 3, 32, 32))
    """
    with closing(pixel_batches(groups, preprocess, **options)) as batches:
        for batch in batches:
            yield Batch(batch.group, batch.items, batch.ids, preprocess.normalised(batch.x.to(device)), batch.failures)


def source_batches(
    source: Any,
    preprocess: Preprocess,
    device: torch.device,
    *,
    batch_size: int | None = None,
    num_workers: int = 0,
    on_error: OnError = "raise",
    fix: str = "",
    progress: str | None = None,
) -> Generator[Batch[Any], None, None]:
    """Batches of any image source.

    Args:
        source: a float tensor (B, 3, H, W) that is already preprocessed, a uint8 tensor (B, 3, H, W) of RGB pixels in 0..255, which are
            preprocessed as images are, or a source of `rlpjepa_zoo.data.sources.open_images`.
        batch_size: images in a batch; chosen by `default_batch_size` when None.
        progress: label of a progress bar on stderr; None shows none.
        preprocess, device, num_workers, on_error, fix: those of `image_batches`.

    Raises:
        DataError: no such images, an unreadable one, or a tensor of another shape or type.
        UsageError: numbers that are not integers or out of range.
    """
    if batch_size is not None:
        check_count("batch_size", batch_size, 1)
    check_count("num_workers", num_workers, 0)
    if on_error not in ("raise", "skip"):
        raise UsageError(f"on_error: expected 'raise' or 'skip', got {on_error!r}")
    if isinstance(source, Tensor) and source.dtype == torch.uint8 and source.dim() == 4 and source.shape[1] == 3:
        pixels = source.permute(0, 2, 3, 1)
        source = Images(lambda i: Image.fromarray(pixels[i].cpu().numpy()), range(len(pixels)))
    if isinstance(source, Tensor):
        check_float_batch(source, DataError, "preprocess images with .transform, or pass RGB pixels as uint8")
        batch_size = batch_size or default_batch_size((source.shape[2], source.shape[3]), device)
        with progress_bar(progress or "", len(source), hidden=progress is None) as bar:
            for start in range(0, len(source), batch_size):
                x = source[start : start + batch_size]
                ids = list(range(start, start + len(x)))
                yield Batch(ids, ids, ids, x.to(device), [])
                bar.update(len(ids))
        return
    images = source if isinstance(source, ImageRows) else open_images(source, on_error=on_error)
    batch_size = batch_size or default_batch_size(preprocess.size, device)
    with progress_bar(progress or "", images.length, hidden=progress is None) as bar:
        rows = batched(images.rows(0), batch_size)
        yield from image_batches(rows, preprocess, device, num_workers=num_workers, on_error=on_error, fix=fix, progress=bar.update)
