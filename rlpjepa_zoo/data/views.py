"""Random views of images, made for many images at a time on the device of the pixels.

The draws of a view are a function of (seed, epoch, row, view) alone. The operations follow torchvision's transforms of PIL images, 8-bit
rounding after each operation included: each equals PIL's to a grey level (hue to a few, at a few pixels in a thousand).

    decoded (b, 3, H, W) uint8  -> crop ->  cropped (V, b, 3, S, S) uint8  -> finish ->  (V, b, 3, S, S) float32, normalised

Images of equal size are cropped together. Images of different sizes are cropped one by one with PIL, in the process that decodes them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..config.sections import Data, Views
from ..core import rng
from .pil_ops import (
    CPU_CHUNK,
    Array,
    affine,
    apply_to_some,
    blur,
    brightness,
    contrast,
    crop_and_resize,
    equalize,
    gaussian_noise,
    greyscale,
    hue,
    saturation,
    solarize,
)

__all__ = ["Augment", "Group"]

_PIL = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_TRIES = 10
"""Boxes drawn until one fits, as torchvision does."""


class Group(NamedTuple):
    """Views of one size."""

    first: int
    """Number of the first view."""
    views: int
    """Number of views."""
    size: int
    """Height and width in pixels."""
    crop_scale: tuple[float, float] | None
    """Smallest and largest share of the area that a crop takes; None takes the whole image."""


class Augment:
    """Makes the views of a recipe.

    Args:
        views, data: sections of the recipe.
        seed: seed of the run.
        epochs: length of the run, over which the views may grow (`views.start_size`).

    Example:
        >>> augment = Augment(Views(), Data(source="digits", image_size=16), seed=0)
        >>> pixels = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
        >>> (x,) = augment([pixels], epoch=0, rows=torch.arange(4))
        >>> x.shape, x.dtype
        (torch.Size([2, 4, 3, 16, 16]), torch.float32)
    """

    def __init__(self, views: Views, data: Data, seed: int, epochs: float = 1) -> None:
        self.views, self.data, self.seed, self.epochs = views, data, seed, epochs

    def groups(self, epoch: int) -> list[Group]:
        """The views of an epoch by their size: the global ones, then the local ones if there are any."""
        views, size = self.views, self.views.size_at(epoch, self.epochs, self.data.image_size)
        groups = [Group(0, views.count, size, views.crop_scale)]
        if views.local is not None:
            groups.append(Group(views.count, views.local.count, views.local.size, views.local.crop_scale))
        return groups

    def __call__(self, images: list[Tensor], epoch: int, rows: Tensor) -> list[Tensor]:
        """Normalised views of images at any stage: decoded, cropped or finished.

        Args:
            images: [(b, 3, H, W) uint8] if decoded; or for each group (V, b, 3, S, S): uint8 if cropped, float32 if finished.
            epoch, rows: counters of the draws; rows (b,) int64 on the CPU.

        Returns:
            For each group (V, b, 3, S, S) float32 on the device of the images.
        """
        if images[0].dtype != torch.uint8:
            return images
        return self.finish(self.crop(images[0], epoch, rows) if images[0].dim() == 4 else images, epoch, rows)

    # --- crops ----------------------------------------------------------------------------------------------------

    def crop(self, pixels: Tensor, epoch: int, rows: Tensor) -> list[Tensor]:
        """Random resized crops of images of equal size.

        Args:
            pixels: (b, 3, H, W) uint8.
            epoch, rows: counters of the draws; rows (b,).

        Returns:
            For each group (V, b, 3, S, S) uint8.
        """
        crops = []
        for group in self.groups(epoch):
            boxes = self._boxes(group, epoch, rows, np.tile(np.array(pixels.shape[-2:]), (len(rows), 1)))
            views = [crop_and_resize(pixels, one.reshape(-1, 4), group.size, self.data.interpolation) for one in boxes]
            crops.append(torch.stack(views))
        return crops

    def crop_one(self, picture: Image.Image, epoch: int, row: int) -> list[Tensor]:
        """The same for one image of any size, with PIL: for each group (V, 3, S, S) uint8."""
        crops = []
        for group in self.groups(epoch):
            boxes = self._boxes(group, epoch, torch.tensor([row]), np.array([[picture.height, picture.width]]))[:, 0]
            size, mode = (group.size, group.size), _PIL[self.data.interpolation]
            views = [picture.crop((x, y, x + w, y + h)).resize(size, mode) for y, x, h, w in boxes.tolist()]
            crops.append(torch.from_numpy(np.stack([np.asarray(view) for view in views])).permute(0, 3, 1, 2))
        return crops

    def _boxes(self, group: Group, epoch: int, rows: Tensor, sizes: Array) -> Array:
        """Boxes (V, b, 4): top, left, height, width. The first of ten draws that fits; else the largest box of an allowed shape, centred."""
        height, width = sizes[:, 0], sizes[:, 1]
        if group.crop_scale is None:
            whole = np.stack([np.zeros_like(height), np.zeros_like(height), height, width], -1)
            return np.tile(whole, (group.views, 1, 1))
        draw = self._uniform("crop", group, epoch, rows, 4 * _TRIES).reshape(group.views, len(rows), _TRIES, 4)
        low, high = np.log(self.views.crop_ratio)
        area = (height * width)[:, None] * (group.crop_scale[0] + draw[..., 0] * (group.crop_scale[1] - group.crop_scale[0]))
        ratio = np.exp(low + draw[..., 1] * (high - low))
        w, h = np.rint(np.sqrt(area * ratio)).astype(np.int64), np.rint(np.sqrt(area / ratio)).astype(np.int64)
        fits = (w > 0) & (h > 0) & (w <= width[:, None]) & (h <= height[:, None])
        chosen = fits.argmax(-1)[..., None]
        w, h, v, u = (np.take_along_axis(x, chosen, -1)[..., 0] for x in (w, h, draw[..., 2], draw[..., 3]))
        narrow, wide = width / height < np.exp(low), width / height > np.exp(high)
        fallback_w = np.where(wide, np.rint(height * np.exp(high)), width).astype(np.int64)
        fallback_h = np.where(narrow, np.rint(width / np.exp(low)), height).astype(np.int64)
        good = fits.any(-1)
        w, h = np.where(good, w, fallback_w), np.where(good, h, fallback_h)
        top = np.where(good, np.floor(v * (height - h + 1)), (height - h) // 2).astype(np.int64)
        left = np.where(good, np.floor(u * (width - w + 1)), (width - w) // 2).astype(np.int64)
        return np.stack([top, left, h, w], -1)

    # --- operations on crops -----------------------------------------------------------------------------------------------------

    def finish(self, cropped: list[Tensor], epoch: int, rows: Tensor) -> list[Tensor]:
        """Affine, colours, blur, flip, normalisation and noise.

        Args:
            cropped: what `crop` returns.
            epoch, rows: counters of the draws.

        Returns:
            For each group (V, b, 3, S, S) float32 on the same device.
        """
        finished = []
        for group, x in zip(self.groups(epoch), cropped, strict=True):
            draws = self._draws(group, epoch, rows)
            flat, n = x.flatten(0, 1), x.shape[0] * x.shape[1]
            step = max(1, CPU_CHUNK // flat[0].numel()) if x.device.type == "cpu" else n
            out = torch.empty(flat.shape, dtype=torch.float32, device=x.device)
            for start in range(0, n, step):
                some = slice(start, start + step)
                out[some] = self._finish(flat[some].float(), {name: values[some] for name, values in draws.items()})
            finished.append(out.unflatten(0, x.shape[:2]))
        return finished

    def _draws(self, group: Group, epoch: int, rows: Tensor) -> dict[str, Array]:
        """Random numbers of the operations, for each of the V b images."""
        views, n = self.views, group.views * len(rows)
        u = self._uniform("finish", group, epoch, rows, 19).reshape(n, 19).T
        scale = [(max(0.0, 1 - s), 1 + s) for s in (views.brightness, views.contrast, views.saturation)]
        ranges = [*scale, (-views.hue, views.hue)]
        reach = views.translate * group.size
        return {
            "angle": (2 * u[0] - 1) * views.rotate,
            "shift": np.stack([np.rint((2 * u[1] - 1) * reach), np.rint((2 * u[2] - 1) * reach)], -1),
            "zoom": views.zoom[0] + u[3] * (views.zoom[1] - views.zoom[0]),
            "jitter": u[4] < views.jitter,
            "factors": np.stack([low + u[5 + k] * (high - low) for k, (low, high) in enumerate(ranges)], -1),
            "order": np.argsort(u[9:13].T, axis=1),
            "grayscale": u[13] < views.grayscale,
            "blur": u[14] < views.blur,
            "sigma": 0.1 + u[15] * 1.9,
            "solarize": u[16] < views.solarize,
            "equalize": u[17] < views.equalize,
            "flip": u[18] < views.flip,
            "noise": self._bits("noise", group, epoch, rows, 1).reshape(n).numpy(),
        }

    def _finish(self, x: Tensor, draws: dict[str, Array]) -> Tensor:
        """Images (n, 3, S, S) of 0..255, changed in place; an operation works on the images that drew it only."""
        views = self.views
        if views.rotate or views.translate or views.zoom != (1.0, 1.0):
            x = affine(x, draws["angle"], draws["shift"], draws["zoom"])
        for place in range(4):
            for kind, operation in enumerate((brightness, contrast, saturation, hue)):
                if (views.brightness, views.contrast, views.saturation, views.hue)[kind]:
                    apply_to_some(x, draws["jitter"] & (draws["order"][:, place] == kind), operation, draws["factors"][:, kind])
        apply_to_some(x, draws["grayscale"], lambda some: greyscale(some).expand_as(some))
        apply_to_some(x, draws["blur"], blur, draws["sigma"])
        apply_to_some(x, draws["solarize"], solarize)
        apply_to_some(x, draws["equalize"], equalize)
        apply_to_some(x, draws["flip"], lambda some: some.flip(-1))
        mean, std = (torch.tensor(values, device=x.device).view(3, 1, 1) * 255 for values in (self.data.mean, self.data.std))
        x = x.sub_(mean).div_(std)
        return x.add_(gaussian_noise(draws["noise"], x.shape[1:], x.device), alpha=views.noise) if views.noise else x

    def _bits(self, purpose: str, group: Group, epoch: int, rows: Tensor, count: int) -> Tensor:
        """(V, b, count) hashes."""
        view = torch.arange(group.first, group.first + group.views)[:, None, None]
        return rng.mix(rng.key(self.seed, purpose, epoch), rows[:, None], view, torch.arange(count))

    def _uniform(self, purpose: str, group: Group, epoch: int, rows: Tensor, count: int) -> Array:
        """(V, b, count) numbers in [0, 1)."""
        return rng.uniform(self._bits(purpose, group, epoch, rows, count)).double().numpy()
