"""ResNets for small images, registered with timm: a 3x3 stem of stride 1 and no max-pooling, which no timm option gives.

Importing this module makes `timm.create_model("resnet18_small")` work; without it plain timm does not know the names.
"""

from __future__ import annotations

from typing import Any

import torch.nn as nn
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet

SMALL_RESNETS = ("resnet10_small_narrow", "resnet18_small_narrow", "resnet18_small", "resnet34_small", "resnet50_small")


class SmallImageResNet(ResNet):
    """timm's ResNet with the CIFAR stem.

    Args:
        stem_padding: 1 keeps the resolution (32 -> 32, last map 4x4); 2 is the value in the code of Rectified LpJEPA (32 -> 34, last map 5x5).
        kwargs: those of `timm.models.resnet.ResNet`.
    """

    def __init__(self, *args: Any, stem_padding: int = 1, zero_init_last: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, zero_init_last=zero_init_last, **kwargs)
        old: Any = getattr(self, "conv1")  # noqa: B009 - timm builds it in one of two types
        if not isinstance(old, nn.Conv2d):
            raise ValueError("small-image ResNets have one stem convolution; stem_type must be ''")
        self.conv1 = nn.Conv2d(
            old.in_channels,
            old.out_channels,
            3,
            stride=1,
            padding=stem_padding,
            bias=False,
            device=old.weight.device,
            dtype=old.weight.dtype,
        )
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.maxpool = nn.Identity()
        for info in self.feature_info:
            info["reduction"] = max(1, info["reduction"] // 4)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "url": "", "num_classes": 1000, "input_size": (3, 32, 32), "pool_size": (4, 4), "crop_pct": 1.0, "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "first_conv": "conv1", "classifier": "fc", "license": "apache-2.0",
        **kwargs,
    }  # fmt: skip


default_cfgs = generate_default_cfgs({name: _cfg() for name in SMALL_RESNETS})


def _create(variant: str, pretrained: bool, defaults: dict[str, Any], kwargs: dict[str, Any]) -> SmallImageResNet:
    return build_model_with_cfg(SmallImageResNet, variant, pretrained, **{**defaults, **kwargs})


@register_model
def resnet10_small_narrow(pretrained: bool = False, **kwargs: Any) -> SmallImageResNet:
    """One basic block a stage, widths 32-64-128-256 behind a 64-wide stem: 1.2 M parameters, for CPUs."""
    return _create(
        "resnet10_small_narrow", pretrained, {"block": BasicBlock, "layers": (1, 1, 1, 1), "channels": (32, 64, 128, 256)}, kwargs
    )


@register_model
def resnet18_small_narrow(pretrained: bool = False, **kwargs: Any) -> SmallImageResNet:
    """ResNet-18 of half the width, 32-64-128-256 behind a 64-wide stem: 2.8 M parameters, for CPUs."""
    return _create(
        "resnet18_small_narrow", pretrained, {"block": BasicBlock, "layers": (2, 2, 2, 2), "channels": (32, 64, 128, 256)}, kwargs
    )


@register_model
def resnet18_small(pretrained: bool = False, **kwargs: Any) -> SmallImageResNet:
    """ResNet-18 with the small-image stem."""
    return _create("resnet18_small", pretrained, {"block": BasicBlock, "layers": (2, 2, 2, 2)}, kwargs)


@register_model
def resnet34_small(pretrained: bool = False, **kwargs: Any) -> SmallImageResNet:
    """ResNet-34 with the small-image stem."""
    return _create("resnet34_small", pretrained, {"block": BasicBlock, "layers": (3, 4, 6, 3)}, kwargs)


@register_model
def resnet50_small(pretrained: bool = False, **kwargs: Any) -> SmallImageResNet:
    """ResNet-50 with the small-image stem."""
    return _create("resnet50_small", pretrained, {"block": Bottleneck, "layers": (3, 4, 6, 3)}, kwargs)
