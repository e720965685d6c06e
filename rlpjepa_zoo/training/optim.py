"""Optimisers (timm's), parameter groups and the learning-rate schedule as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import timm.optim
import torch
import torch.nn as nn

from ..config.finetune import TuningRecipe
from ..config.plan import Plan
from ..config.pretrain import Recipe

__all__ = ["learning_rate", "make_optimizer", "make_tuner", "set_learning_rates"]


def learning_rate(step: int, peak: float, warmup: int, total: int, start: float = 3e-5, final: float = 0.0) -> float:
    """Linear from `start` at step 0 to `peak` at step warmup - 1, then half a cosine to `final` at step `total`.

    Example:
        >>> [round(learning_rate(s, 1.0, 3, 7, start=0.0), 3) for s in range(8)]
        [0.0, 0.5, 1.0, 1.0, 0.854, 0.5, 0.146, 0.0]
    """
    if step < warmup:
        return peak if warmup == 1 else start + (peak - start) * step / (warmup - 1)
    return final + (peak - final) * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup)))) / 2


def make_optimizer(encoder: nn.Module, probes: nn.Module | None, recipe: Recipe) -> torch.optim.Optimizer:
    """Groups (those of the backbone apart when it has a rate of its own): weights (decayed), biases and normalisation (one-dimensional;
    decayed only if asked), probes (own rate, no decay).

    LARS is timm's `larc`: step = min(trust * |w| / (|g| + wd |w|), lr) per tensor, the rate being a cap; one-dimensional parameters
    and probes take plain momentum steps, without decay or trust.
    """
    options = recipe.optim
    decay_others = options.weight_decay if options.decay_bias_and_norm else 0.0
    groups: list[dict[str, Any]] = []
    slow = {id(p) for p in encoder.get_submodule("backbone").parameters()} if options.backbone_lr != 1 else set()
    for peak, among in ((recipe.lr, False), (recipe.lr * options.backbone_lr, True)):
        weights, others = _split(p for p in encoder.parameters() if p.requires_grad and (id(p) in slow) == among)
        adapt = {"always_adapt": True} if options.name == "lars" else {}
        groups += [
            {"params": weights, "weight_decay": options.weight_decay, "peak": peak, **adapt},
            {"params": others, "weight_decay": decay_others, "peak": peak},
        ]
    if probes is not None:
        groups.append({"params": list(probes.parameters()), "weight_decay": 0.0, "peak": recipe.probe_lr})
    groups = [group for group in groups if group["params"]]
    if options.name == "lars":
        return timm.optim.create_optimizer_v2(
            groups, opt="larc", lr=recipe.lr, momentum=options.momentum, trust_coeff=options.trust_coefficient
        )
    return timm.optim.create_optimizer_v2(groups, opt="adamw", lr=recipe.lr, betas=options.betas)


def make_tuner(head: nn.Module, backbone: nn.Module, projector: nn.Module | None, recipe: TuningRecipe) -> torch.optim.Optimizer:
    """Groups: the linear layer (its own factor), the projector, and the backbone by its layers, each `optim.layer_decay` below the one above
    it (timm's `param_groups_layer_decay`); one-dimensional parameters are not decayed unless asked. sgd is plain momentum."""
    options = recipe.optim
    weights = {True: options.weight_decay, False: options.weight_decay if options.decay_bias_and_norm else 0.0}
    groups: list[dict[str, Any]] = []
    for module, peak in ((head, recipe.lr * options.head_lr), (projector, recipe.lr)):
        parts = _split(p for p in module.parameters() if p.requires_grad) if module is not None else ([], [])
        groups += [{"params": part, "weight_decay": weights[i == 0], "peak": peak} for i, part in enumerate(parts)]
    if any(p.requires_grad for p in backbone.parameters()):
        skip: set[str] = getattr(backbone, "no_weight_decay", set)()
        for group in timm.optim.param_groups_layer_decay(backbone, 1.0, skip, layer_decay=options.layer_decay):
            decay = weights[group["weight_decay"] > 0]
            groups.append({"params": group["params"], "weight_decay": decay, "peak": recipe.lr * options.backbone_lr * group["lr_scale"]})
    groups = [group for group in groups if group["params"]]
    if options.name == "sgd":
        return timm.optim.create_optimizer_v2(groups, opt="momentum", lr=recipe.lr, momentum=options.momentum)
    return timm.optim.create_optimizer_v2(groups, opt="adamw", lr=recipe.lr, betas=options.betas)


def _split(parameters: Iterable[nn.Parameter]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    weights: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in parameters:
        (weights if parameter.dim() > 1 else others).append(parameter)
    return weights, others


def set_learning_rates(optimizer: torch.optim.Optimizer, recipe: Plan, step: int, total: int, per_epoch: int) -> float:
    """Put the rates of `step` into the groups; returns that of the encoder."""
    options = recipe.optim
    warmup = round(options.warmup_epochs * per_epoch)
    for group in optimizer.param_groups:
        start = min(options.warmup_start_lr, group["peak"])
        group["lr"] = learning_rate(step, group["peak"], warmup, total, start, min(options.min_lr, group["peak"]))
    return float(optimizer.param_groups[0]["lr"])
