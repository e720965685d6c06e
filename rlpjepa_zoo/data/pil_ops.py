"""Image operations on batches that equal PIL's on single images, 8-bit rounding after each operation included.

Unless said otherwise an operation takes and returns (n, 3, S, S) float32 of whole numbers 0..255; a factor is (n, 1, 1, 1), one for each
image.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from ..core import rng

_BLUR_TAPS = 13
"""Three sigma of the widest blur."""
CPU_CHUNK = 1 << 19
"""Numbers that an operation on a CPU works on at once: about what its cache holds."""

Array = np.ndarray[Any, Any]


def apply_to_some(x: Tensor, chosen: Array, operation: Any, values: Array | None = None) -> None:
    """Apply an operation to the chosen images of a batch, in place. The choice is known on the host, so no GPU synchronisation is needed.

    Args:
        x: (n, 3, S, S) float32.
        chosen: (n,) bool.
        operation: function of images, and of their factors if `values` are given.
        values: (n,) factors.
    """
    if not chosen.any():
        return
    if chosen.all():
        where, some = None, x
    else:
        where = torch.from_numpy(np.flatnonzero(chosen)).to(x.device, non_blocking=True)
        some = x.index_select(0, where)
    if values is None:
        some = operation(some)
    else:
        factors = torch.from_numpy(values[chosen].astype(np.float32)).to(x.device, non_blocking=True).view(-1, 1, 1, 1)
        some = operation(some, factors)
    if where is None:
        x.copy_(some)
    else:
        x.index_copy_(0, where, some)


def _round(x: Tensor) -> Tensor:
    """Round to whole numbers 0..255, halves up as in PIL. Slightly more than a half is added, so that the order of a sum does not decide."""
    return x.add_(0.5 + 1e-4).floor_().clamp_(0, 255)


# --- geometry -------------------------------------------------------------------------------------------------------------------------


def crop_and_resize(pixels: Tensor, boxes: Array, size: int, interpolation: str) -> Tensor:
    """Crop and resize by two products with matrices of interpolation weights (n, S, H) and (n, S, W).

    The filter, its widening when shrinking and the rounding to 8 bits after each pass are PIL's; rows first, as in Pillow before 13.

    Args:
        pixels: (n, 3, H, W) uint8.
        boxes: (n, 4) top, left, height, width in pixels.
        size: S, height and width of the result.
        interpolation: ``bilinear`` or ``bicubic``.

    Returns:
        (n, 3, S, S) uint8.
    """
    resized = []
    box = torch.from_numpy(boxes).to(pixels.device)
    step = max(1, CPU_CHUNK // (3 * max(pixels[0, 0].numel(), size * size))) if pixels.device.type == "cpu" else len(pixels)
    for some, at in zip(pixels.split(step), box.split(step), strict=True):
        rows = _weights(at[:, 0], at[:, 2], size, pixels.shape[-2], interpolation)
        columns = _weights(at[:, 1], at[:, 3], size, pixels.shape[-1], interpolation)
        x = some.float().flatten(1, 2) @ columns.mT  # (n, 3 H, S)
        x = _round(x).unflatten(1, (3, -1)).mT.flatten(1, 2) @ rows.mT  # (n, 3 S, S), transposed
        resized.append(_round(x).to(torch.uint8).unflatten(1, (3, -1)).mT)
    return torch.cat(resized)


def _weights(start: Tensor, length: Tensor, size: int, full: int, interpolation: str) -> Tensor:
    """(n, S, full): share of each source pixel in each target pixel along one axis."""
    start, length = start.float()[:, None, None], length.float()[:, None, None]
    scale = length / size
    centre = (torch.arange(size, device=start.device) + 0.5)[:, None] * scale
    position = torch.arange(full, device=start.device) - start  # of a source pixel, within the box
    x = ((position + 0.5 - centre) / scale.clamp(min=1)).abs_()
    if interpolation == "bilinear":
        weight = (1 - x).clamp_(min=0)
    else:
        near = (1.5 * x - 2.5).mul_(x).mul_(x).add_(1)
        far = (x - 5).mul_(x).add_(8).mul_(x).sub_(4).mul_(-0.5)
        weight = torch.where(x < 1, near, far.masked_fill_(x >= 2, 0))
    weight *= (position >= 0) & (position < length)
    return weight / weight.sum(-1, keepdim=True)


def affine(x: Tensor, angle: Array, shift: Array, zoom: Array) -> Tensor:
    """Rotate, shift and zoom about the centre; bilinear, black outside.

    Args:
        x: (n, 3, S, S) float32.
        angle: (n,) degrees.
        shift: (n, 2) pixels, x and y.
        zoom: (n,) factors.
    """
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
    return sampled.mul_(inside[:, None]).add_(1e-3).floor_()  # PIL truncates; 1e-3 keeps rounding errors of the sampler from counting


# --- colours --------------------------------------------------------------------------------------------------------------------------


def greyscale(x: Tensor) -> Tensor:
    """(n, 1, S, S): luma of ITU-R 601-2 in PIL's 16-bit fixed point; exact, as all sums stay below 2^24."""
    return (x[:, :1] * 19595 + x[:, 1:2] * 38470).add_(x[:, 2:] * 7471).add_(32768).mul_(2.0**-16).floor_()


def _blend(x: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return (x - other).mul_(factor).add_(other).clamp_(0, 255).floor_()  # PIL truncates


def brightness(x: Tensor, factor: Tensor) -> Tensor:
    """Multiply by the factor."""
    return (x * factor).clamp_(0, 255).floor_()


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the mean grey level of the image."""
    return _blend(x, greyscale(x).mean((1, 2, 3), keepdim=True).add_(0.5).floor_(), factor)


def saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the greyscale image."""
    return _blend(x, greyscale(x), factor)


def hue(x: Tensor, shift: Tensor) -> Tensor:
    """Shift the hue by a share of the circle, through HSV of 8 bits each: hue and saturation are truncated, as in PIL."""
    r, g, b = x.unbind(1)
    value = x.amax(1)
    spread = value - x.amin(1)
    safe = spread.clamp(min=1)
    red, green = value == r, value == g
    angle = torch.where(red, (g - b) / safe, torch.where(green, 2 + (b - r) / safe, 4 + (r - g) / safe))
    angle = _modulo(angle.mul_(255 / 6), 255).floor_()
    colourfulness = (spread / value.clamp(min=1)).mul_(255).floor_()
    angle = _modulo(angle.add_((shift.view(-1, 1, 1) * 255).trunc_()), 256)
    sector = angle.mul_(6 / 255)
    reach = colourfulness.mul_(value).div_(255)
    channels = []
    for n in (5, 3, 1):  # red, green, blue
        k = _modulo(sector + n, 6)
        channels.append(value - reach * torch.minimum(k, 4 - k).clamp_(0, 1))
    return _round(torch.stack(channels, 1))


def _modulo(x: Tensor, m: int) -> Tensor:
    return x.sub_((x * (1 / m)).floor_(), alpha=m)  # several times as fast as remainder


def solarize(x: Tensor) -> Tensor:
    """Invert the levels from 128 on."""
    return torch.where(x >= 128, 255 - x, x)


def equalize(x: Tensor) -> Tensor:
    """Equalise the histogram of each channel; a channel of one level stays."""
    flat = x.flatten(2).long()
    counts = torch.zeros(*flat.shape[:2], 256, dtype=torch.long, device=x.device).scatter_add_(2, flat, torch.ones_like(flat))
    last = 255 - (counts.flip(-1) > 0).long().argmax(-1, keepdim=True)
    step = (flat.shape[-1] - counts.gather(2, last)) // 255
    table = ((counts.cumsum(-1) - counts + step // 2) // step.clamp(min=1)).clamp(0, 255)
    return torch.where(step > 0, table.gather(2, flat), flat).view(x.shape).float()


def blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur with sigma in pixels: thirteen taps along either axis, edges mirrored; each image is a group of the convolution."""
    half = _BLUR_TAPS // 2
    tap = torch.arange(-half, half + 1, device=x.device)
    kernel = torch.exp(-0.5 * (tap / sigma.view(-1, 1)).square())
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(3, 0)[:, None]
    padded = nn.functional.pad(x, (half,) * 4, mode="reflect").flatten(0, 1)[None]
    along = nn.functional.conv2d(padded, kernel[:, :, None], groups=padded.shape[1])
    return nn.functional.conv2d(along, kernel[..., None], groups=padded.shape[1]).view(x.shape).round_().clamp_(0, 255)


def gaussian_noise(keys: Array, shape: torch.Size, device: torch.device) -> Tensor:
    """Standard normal numbers (n, *shape); those of an image are a function of its key alone.

    Args:
        keys: (n,) int64, see `rlpjepa_zoo.core.rng.mix`.
        shape: shape of one image.
        device: device of the result.
    """
    n = int(np.prod(shape))
    key, half = torch.from_numpy(keys).to(device, non_blocking=True)[:, None], -(-n // 2)
    radius, angle = rng.uniform(rng.mix(key, torch.arange(2 * half, device=device))).view(len(keys), 2, half).unbind(1)
    radius, angle = (-2 * torch.log1p(-radius)).sqrt_(), angle * (2 * torch.pi)  # Box and Muller
    return torch.cat([radius * angle.cos(), radius * angle.sin()], 1)[:, :n].view(len(keys), *shape)
