"""Optimisers (timm's) by name, parameter groups, and the learning-rate schedule as a pure function of the step.

To add an optimiser: write its build function and register an `OptimizerRow` here, and add a row to `OPTIMIZER_KEYS` in
`rlpjepa_zoo.config.training_sections`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import timm.optim
import torch
import torch.nn as nn

from ..config.training_sections import Optim
from ..core.registry import Registry

__all__ = ["OPTIMIZERS", "OptimizerRow", "ParamGroup", "build_optimizer", "learning_rate", "set_learning_rates", "split_by_dimension"]


class ParamGroup(NamedTuple):
    """Parameters that share a learning rate and a weight decay."""

    params: Sequence[nn.Parameter]
    weight_decay: float
    peak: float
    """Peak learning rate."""
    use_trust_ratio: bool = False
    """Whether LARS scales the steps of these parameters by its trust ratio, even without weight decay."""


class OptimizerRow(NamedTuple):
    """How an optimiser is built, and what its state costs."""

    build: Callable[[list[dict[str, Any]], Sequence[ParamGroup], Optim], torch.optim.Optimizer]
    """Function of torch's parameter groups, the `ParamGroup` of each, and the section `optim`; returns the optimiser."""
    moments: int
    """Tensors of the size of the parameters that the state holds."""


OPTIMIZERS: Registry[OptimizerRow] = Registry("optimizer")


def _adamw(params: list[dict[str, Any]], groups: Sequence[ParamGroup], options: Optim) -> torch.optim.Optimizer:
    return timm.optim.create_optimizer_v2(params, opt="adamw", lr=groups[0].peak, betas=options.betas)


def _sgd(params: list[dict[str, Any]], groups: Sequence[ParamGroup], options: Optim) -> torch.optim.Optimizer:
    """Plain momentum."""
    return timm.optim.create_optimizer_v2(params, opt="momentum", lr=groups[0].peak, momentum=options.momentum)


def _lars(params: list[dict[str, Any]], groups: Sequence[ParamGroup], options: Optim) -> torch.optim.Optimizer:
    """timm's `larc`: step = min(trust_coefficient * |w| / (|g| + wd |w|), lr) for each tensor, so the rate is an upper limit.

    Groups without `use_trust_ratio` and without weight decay take plain momentum steps.
    """
    for entry, group in zip(params, groups, strict=True):
        if group.use_trust_ratio:
            entry["always_adapt"] = True
    return timm.optim.create_optimizer_v2(
        params, opt="larc", lr=groups[0].peak, momentum=options.momentum, trust_coeff=options.trust_coefficient
    )


OPTIMIZERS.register("adamw")(OptimizerRow(_adamw, moments=2))
OPTIMIZERS.register("sgd")(OptimizerRow(_sgd, moments=1))
OPTIMIZERS.register("lars")(OptimizerRow(_lars, moments=1))


def build_optimizer(name: str, groups: Iterable[ParamGroup], options: Optim) -> torch.optim.Optimizer:
    """The optimiser of a name.

    Args:
        name: an entry of `OPTIMIZERS`.
        groups: groups without parameters are left out. The order of the others is the order of the optimiser's state.
        options: the section `optim` of a recipe.

    Raises:
        UsageError: no optimiser has this name.
    """
    filled = [group for group in groups if group.params]
    params = [{"params": list(g.params), "weight_decay": g.weight_decay, "lr": g.peak, "peak": g.peak} for g in filled]
    return OPTIMIZERS[name].build(params, filled, options)


def split_by_dimension(parameters: Iterable[nn.Parameter]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(weights with at least two dimensions, others: biases and normalisation)."""
    weights: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in parameters:
        (weights if parameter.dim() > 1 else others).append(parameter)
    return weights, others


def learning_rate(step: int, peak: float, warmup: int, total: int, start: float = 3e-5, final: float = 0.0) -> float:
    """Linear from `start` at step 0 to `peak` at step warmup - 1, then half a cosine to `final` at step `total`.

    Example:
        >>> [round(learning_rate(s, 1.0, 3, 7, start=0.0), 3) for s in range(8)]
        [0.0, 0.5, 1.0, 1.0, 0.854, 0.5, 0.146, 0.0]
    """
    if step < warmup:
        return peak if warmup == 1 else start + (peak - start) * step / (warmup - 1)
    return final + (peak - final) * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup)))) / 2


def set_learning_rates(optimizer: torch.optim.Optimizer, options: Optim, step: int, total: int, per_epoch: int) -> float:
    """Set the learning rate of each group for a step; returns that of the first group."""
    warmup = round(options.warmup_epochs * per_epoch)
    for group in optimizer.param_groups:
        start = min(options.warmup_start_lr, group["peak"])
        group["lr"] = learning_rate(step, group["peak"], warmup, total, start, min(options.min_lr, group["peak"]))
    return float(optimizer.param_groups[0]["lr"])
