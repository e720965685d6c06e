"""The random views of images, many at a time, each with draws of its own, on whatever device the pixels lie.

What is drawn is a function of (seed, epoch, row, view) alone. What is done with it follows torchvision's transforms of PIL images, 8-bit
rounding after each operation included: each equals PIL's to a grey level (hue to a few, at a few pixels in a thousand).

    decoded (b, 3, H, W) uint8  -> crop ->  cropped (V, b, 3, S, S) uint8  -> finish ->  (V, b, 3, S, S) float32, normalised

Images of equal size are cropped together; of unequal size one by one, by PIL, where they were decoded.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn as nn
from PIL import Image
from torch import Tensor

from ..config.sections import Data, Views
from ..core import rng

__all__ = ["Augment", "Group"]

_PIL = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_BLUR_TAPS = 13
"""Three sigma of the widest blur."""
_TRIES = 10
"""Boxes drawn until one fits, as torchvision does."""
_CACHED = 1 << 19
"""Numbers that an operation of a CPU works on at once: about what its cache holds."""

Numbers = np.ndarray[Any, Any]


class Group(NamedTuple):
    """Views of one size: so many of them, numbered from `first`."""

    first: int
    views: int
    size: int
    crop_scale: tuple[float, float] | None


class Augment:
    """The views of a recipe.

    Args:
        views, data: sections of the recipe.
        seed: of the run.

    Example:
        >>> augment = Augment(Views(), Data(source="digits", image_size=16), seed=0)
        >>> pixels = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
        >>> (x,) = augment([pixels], epoch=0, rows=torch.arange(4))
        >>> x.shape, x.dtype
        (torch.Size([2, 4, 3, 16, 16]), torch.float32)
    """

    def __init__(self, views: Views, data: Data, seed: int) -> None:
        self.views, self.data, self.seed = views, data, seed
        self.groups = [Group(0, views.count, data.image_size, views.crop_scale)]
        if views.local is not None:
            self.groups.append(Group(views.count, views.local.count, views.local.size, views.local.crop_scale))

    def __call__(self, images: list[Tensor], epoch: int, rows: Tensor) -> list[Tensor]:
        """Go on from any station to normalised views.

        Args:
            images: [(b, 3, H, W) uint8] decoded; or, for each group, (V, b, 3, S, S): uint8 if cropped, float32 if finished.
            epoch, rows: what names the draws; rows (b,) int64 on the CPU.

        Returns:
            For each group (V, b, 3, S, S) float32 on the device of the images.
        """
        if images[0].dtype != torch.uint8:
            return images
        return self.finish(self.crop(images[0], epoch, rows) if images[0].dim() == 4 else images, epoch, rows)

    # --- geometry of the crop ----------------------------------------------------------------------------------------------------

    def crop(self, pixels: Tensor, epoch: int, rows: Tensor) -> list[Tensor]:
        """Random resized crops of images of equal size.

        Args:
            pixels: (b, 3, H, W) uint8.
            epoch, rows: what names the draws; rows (b,).

        Returns:
            For each group (V, b, 3, S, S) uint8.
        """
        found = []
        for group in self.groups:
            boxes = self._boxes(group, epoch, rows, np.tile(np.array(pixels.shape[-2:]), (len(rows), 1)))
            parts = [self._resample(pixels, part.reshape(-1, 4), group.size) for part in boxes]
            found.append(torch.stack(parts))
        return found

    def crop_one(self, picture: Image.Image, epoch: int, row: int) -> list[Tensor]:
        """The same of one image of any size, by PIL: for each group (V, 3, S, S) uint8."""
        found = []
        for group in self.groups:
            boxes = self._boxes(group, epoch, torch.tensor([row]), np.array([[picture.height, picture.width]]))[:, 0]
            size, mode = (group.size, group.size), _PIL[self.data.interpolation]
            views = [picture.crop((x, y, x + w, y + h)).resize(size, mode) for y, x, h, w in boxes.tolist()]
            found.append(torch.from_numpy(np.stack([np.asarray(view) for view in views])).permute(0, 3, 1, 2))
        return found

    def _boxes(self, group: Group, epoch: int, rows: Tensor, sizes: Numbers) -> Numbers:
        """Boxes (V, b, 4): top, left, height, width; the first of ten that fits, else the largest of an allowed shape, centred."""
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

    def _resample(self, pixels: Tensor, boxes: Numbers, size: int) -> Tensor:
        """Crop and resize by two products with matrices of interpolation weights (n, S, H) and (n, S, W): PIL's filter, with its
        widening when shrinking, and its rounding to 8 bits after each pass, rows first (as Pillow before 13 always did)."""
        made = []
        box = torch.from_numpy(boxes).to(pixels.device)
        step = max(1, _CACHED // (3 * max(pixels[0, 0].numel(), size * size))) if pixels.device.type == "cpu" else len(pixels)
        for part, at in zip(pixels.split(step), box.split(step), strict=True):
            rows = self._weights(at[:, 0], at[:, 2], size, pixels.shape[-2])
            columns = self._weights(at[:, 1], at[:, 3], size, pixels.shape[-1])
            x = part.float().flatten(1, 2) @ columns.mT  # (n, 3 H, S)
            x = _round(x).unflatten(1, (3, -1)).mT.flatten(1, 2) @ rows.mT  # (n, 3 S, S), transposed
            made.append(_round(x).to(torch.uint8).unflatten(1, (3, -1)).mT)
        return torch.cat(made)

    def _weights(self, start: Tensor, length: Tensor, size: int, full: int) -> Tensor:
        """(n, S, full): share of each source pixel in each target pixel along one axis."""
        start, length = start.float()[:, None, None], length.float()[:, None, None]
        scale = length / size
        centre = (torch.arange(size, device=start.device) + 0.5)[:, None] * scale
        at = torch.arange(full, device=start.device) - start  # of a source pixel, within the box
        x = ((at + 0.5 - centre) / scale.clamp(min=1)).abs_()
        if self.data.interpolation == "bilinear":
            weight = (1 - x).clamp_(min=0)
        else:
            near = (1.5 * x - 2.5).mul_(x).mul_(x).add_(1)
            far = (x - 5).mul_(x).add_(8).mul_(x).sub_(4).mul_(-0.5)
            weight = torch.where(x < 1, near, far.masked_fill_(x >= 2, 0))
        weight *= (at >= 0) & (at < length)
        return weight / weight.sum(-1, keepdim=True)

    # --- everything after it -----------------------------------------------------------------------------------------------------

    def finish(self, cropped: list[Tensor], epoch: int, rows: Tensor) -> list[Tensor]:
        """Affine, colours, blur, flip, normalisation and noise.

        Args:
            cropped: what `crop` returns.
            epoch, rows: what names the draws.

        Returns:
            For each group (V, b, 3, S, S) float32 on the same device.
        """
        found = []
        for group, x in zip(self.groups, cropped, strict=True):
            draws = self._draws(group, epoch, rows)
            flat, n = x.flatten(0, 1), x.shape[0] * x.shape[1]
            step = max(1, _CACHED // flat[0].numel()) if x.device.type == "cpu" else n
            out = torch.empty(flat.shape, dtype=torch.float32, device=x.device)
            for start in range(0, n, step):
                part = slice(start, start + step)
                out[part] = self._finish(flat[part].float(), {name: values[part] for name, values in draws.items()})
            found.append(out.unflatten(0, x.shape[:2]))
        return found

    def _draws(self, group: Group, epoch: int, rows: Tensor) -> dict[str, Numbers]:
        """What `_finish` needs of each of the V b images."""
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

    def _finish(self, x: Tensor, draws: dict[str, Numbers]) -> Tensor:
        """Images (n, 3, S, S) of 0..255, changed in place; the operations work on those images only that drew them."""
        views = self.views
        if views.rotate or views.translate or views.zoom != (1.0, 1.0):
            x = _affine(x, draws["angle"], draws["shift"], draws["zoom"])
        for place in range(4):
            for kind, operation in enumerate((_brightness, _contrast, _saturation, _hue)):
                if (views.brightness, views.contrast, views.saturation, views.hue)[kind]:
                    _apply(x, draws["jitter"] & (draws["order"][:, place] == kind), operation, draws["factors"][:, kind])
        _apply(x, draws["grayscale"], lambda part: _grey(part).expand_as(part))
        _apply(x, draws["blur"], _blur, draws["sigma"])
        _apply(x, draws["solarize"], lambda part: torch.where(part >= 128, 255 - part, part))
        _apply(x, draws["equalize"], _equalize)
        _apply(x, draws["flip"], lambda part: part.flip(-1))
        mean, std = (torch.tensor(values, device=x.device).view(3, 1, 1) * 255 for values in (self.data.mean, self.data.std))
        x = x.sub_(mean).div_(std)
        return x.add_(_gaussian(draws["noise"], x.shape[1:], x.device), alpha=views.noise) if views.noise else x

    def _bits(self, purpose: str, group: Group, epoch: int, rows: Tensor, count: int) -> Tensor:
        """(V, b, count) hashes."""
        view = torch.arange(group.first, group.first + group.views)[:, None, None]
        return rng.mix(rng.key(self.seed, purpose, epoch), rows[:, None], view, torch.arange(count))

    def _uniform(self, purpose: str, group: Group, epoch: int, rows: Tensor, count: int) -> Numbers:
        """(V, b, count) numbers in [0, 1)."""
        return rng.uniform(self._bits(purpose, group, epoch, rows, count)).double().numpy()


def _round(x: Tensor) -> Tensor:
    """To whole numbers, halves up as in PIL; a little more than a half is added, so that the order of a sum does not decide about them."""
    return x.add_(0.5 + 1e-4).floor_().clamp_(0, 255)


def _apply(x: Tensor, chosen: Numbers, operation: Any, values: Numbers | None = None) -> None:
    """Run an operation on some of the images of a batch, in place. Which ones is known on the host, so a GPU is never waited for."""
    if not chosen.any():
        return
    if chosen.all():
        where, part = None, x
    else:
        where = torch.from_numpy(np.flatnonzero(chosen)).to(x.device, non_blocking=True)
        part = x.index_select(0, where)
    if values is None:
        part = operation(part)
    else:
        each = torch.from_numpy(values[chosen].astype(np.float32)).to(x.device, non_blocking=True).view(-1, 1, 1, 1)
        part = operation(part, each)
    if where is None:
        x.copy_(part)
    else:
        x.index_copy_(0, where, part)


# --- operations on (n, 3, S, S) float32 of whole numbers 0..255, as PIL defines them -------------------------------------------------


def _blend(x: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return (x - other).mul_(factor).add_(other).clamp_(0, 255).floor_()  # PIL cuts the fraction off


def _grey(x: Tensor) -> Tensor:
    """(n, 1, S, S): luma of ITU-R 601-2 in PIL's 16-bit fixed point; exact, as all sums stay below 2^24."""
    return (x[:, :1] * 19595 + x[:, 1:2] * 38470).add_(x[:, 2:] * 7471).add_(32768).mul_(2.0**-16).floor_()


def _brightness(x: Tensor, factor: Tensor) -> Tensor:
    return (x * factor).clamp_(0, 255).floor_()


def _contrast(x: Tensor, factor: Tensor) -> Tensor:
    return _blend(x, _grey(x).mean((1, 2, 3), keepdim=True).add_(0.5).floor_(), factor)


def _saturation(x: Tensor, factor: Tensor) -> Tensor:
    return _blend(x, _grey(x), factor)


def _hue(x: Tensor, shift: Tensor) -> Tensor:
    """Through HSV of 8 bits each: hue and saturation are cut to whole numbers, as in PIL."""
    r, g, b = x.unbind(1)
    value = x.amax(1)
    spread = value - x.amin(1)
    safe = spread.clamp(min=1)
    red, green = value == r, value == g
    hue = torch.where(red, (g - b) / safe, torch.where(green, 2 + (b - r) / safe, 4 + (r - g) / safe))
    hue = _modulo(hue.mul_(255 / 6), 255).floor_()
    saturation = (spread / value.clamp(min=1)).mul_(255).floor_()
    hue = _modulo(hue.add_((shift.view(-1, 1, 1) * 255).trunc_()), 256)
    sector = hue.mul_(6 / 255)
    reach = saturation.mul_(value).div_(255)
    made = []
    for n in (5, 3, 1):  # red, green, blue
        k = _modulo(sector + n, 6)
        made.append(value - reach * torch.minimum(k, 4 - k).clamp_(0, 1))
    return _round(torch.stack(made, 1))


def _modulo(x: Tensor, m: int) -> Tensor:
    return x.sub_((x * (1 / m)).floor_(), alpha=m)  # several times as fast as remainder


def _blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Thirteen taps along either axis, edges mirrored; each image with its own kernel, as a group of the convolution."""
    half = _BLUR_TAPS // 2
    tap = torch.arange(-half, half + 1, device=x.device)
    kernel = torch.exp(-0.5 * (tap / sigma.view(-1, 1)).square())
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(3, 0)[:, None]
    padded = nn.functional.pad(x, (half,) * 4, mode="reflect").flatten(0, 1)[None]
    along = nn.functional.conv2d(padded, kernel[:, :, None], groups=padded.shape[1])
    return nn.functional.conv2d(along, kernel[..., None], groups=padded.shape[1]).view(x.shape).round_().clamp_(0, 255)


def _equalize(x: Tensor) -> Tensor:
    """Each channel's histogram made even; a channel of one value stays."""
    flat = x.flatten(2).long()
    counts = torch.zeros(*flat.shape[:2], 256, dtype=torch.long, device=x.device).scatter_add_(2, flat, torch.ones_like(flat))
    last = 255 - (counts.flip(-1) > 0).long().argmax(-1, keepdim=True)
    step = (flat.shape[-1] - counts.gather(2, last)) // 255
    table = ((counts.cumsum(-1) - counts + step // 2) // step.clamp(min=1)).clamp(0, 255)
    return torch.where(step > 0, table.gather(2, flat), flat).view(x.shape).float()


def _affine(x: Tensor, angle: Numbers, shift: Numbers, zoom: Numbers) -> Tensor:
    """Rotate by degrees, shift by pixels and zoom about the centre; bilinear, black outside."""
    n, size = len(x), x.shape[-1]
    turn = np.deg2rad(angle)
    cos, sin = np.cos(turn) / zoom, np.sin(turn) / zoom  # of the inverse map: where a target pixel comes from
    inverse = np.stack([cos, sin, -sin, cos], -1).reshape(n, 2, 2)
    matrix, moved = (torch.from_numpy(a.astype(np.float32)).to(x.device, non_blocking=True) for a in (inverse, shift))
    centre = torch.arange(size, device=x.device) + 0.5 - size / 2
    target = torch.stack(torch.meshgrid(centre, centre, indexing="xy"), -1).view(1, -1, 2) - moved[:, None]
    source = (target @ matrix.mT).view(n, size, size, 2) / (size / 2)  # -1 .. 1 from edge to edge
    inside = ((source >= -1) & (source < 1)).all(-1)
    sampled = nn.functional.grid_sample(x, source, "bilinear", "border", align_corners=False)
    return sampled.mul_(inside[:, None]).add_(1e-3).floor_()  # PIL cuts the fraction off; the sampler's last digits must not count


def _gaussian(keys: Numbers, shape: torch.Size, device: torch.device) -> Tensor:
    """Standard normal numbers (n, *shape), each image's a function of its key alone."""
    n = int(np.prod(shape))
    key, half = torch.from_numpy(keys).to(device, non_blocking=True)[:, None], -(-n // 2)
    radius, angle = rng.uniform(rng.mix(key, torch.arange(2 * half, device=device))).view(len(keys), 2, half).unbind(1)
    radius, angle = (-2 * torch.log1p(-radius)).sqrt_(), angle * (2 * torch.pi)  # Box and Muller
    return torch.cat([radius * angle.cos(), radius * angle.sin()], 1)[:, :n].view(len(keys), *shape)
