"""Modules of torch: the projector, evaluation mode that several threads share, precision, and modules that torch.compile or data parallelism wraps."""

from __future__ import annotations

import copy
import threading
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

__all__ = [
    "as_weights",
    "contents_key",
    "evaluating",
    "lengthen_names",
    "make_projector",
    "plain_copy",
    "set_mode",
    "shorten_names",
    "unwrapped",
    "wrapped_names",
]


def make_projector(features: int, hidden_dim: int, dim: int, depth: int) -> nn.Sequential:
    """(depth - 1) x [Linear, BatchNorm, ReLU], then Linear and ReLU: no normalisation before the last ReLU."""
    widths = [features] + [hidden_dim] * (depth - 1)
    layers: list[nn.Module] = []
    for inside, outside in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(inside, outside), nn.BatchNorm1d(outside), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(widths[-1], dim), nn.ReLU())


# --- the mode ----------------------------------------------------------------------------------------------------------------------------

_SWITCH = threading.RLock()
_HELD: dict[nn.Module, tuple[int, bool]] = {}
"""Modules in evaluation mode for a while: number of blocks that hold them, and the mode that they return to."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards every module is in its own mode again.

    Threads may use it at the same time, also with models that share modules: the last that leaves restores the mode. A mode that `set_mode`
    sets inside is the one after it.
    """
    modules = list(model.modules())
    with _SWITCH:
        for module in modules:
            blocks, mode = _HELD.get(module, (0, module.training))
            _HELD[module] = blocks + 1, mode
        _assign(model, dict.fromkeys(modules, False))
    try:
        yield
    finally:
        with _SWITCH:
            for module in modules:
                blocks, mode = _HELD[module]
                _HELD[module] = blocks - 1, mode
            free = {module: _HELD.pop(module)[1] for module in modules if _HELD[module][0] == 0}
            _assign(model, free)


def _assign(model: nn.Module, modes: dict[nn.Module, bool]) -> None:
    """Give each module its own mode."""
    for module, mode in modes.items():
        if module is not model and module.training != mode and type(module).train is not nn.Module.train:
            module.train(mode)  # timm's LeViT drops here what it cached for evaluation
    for module, mode in modes.items():
        module.training = mode


def set_mode(model: nn.Module, mode: bool, steady: Collection[nn.Module]) -> None:
    """Training or evaluation mode for a model; modules that a block of `evaluating` holds get it when the block ends.

    Args:
        model: whose modules are switched.
        mode: True for training.
        steady: parts that stay in evaluation mode.
    """
    with _SWITCH:
        if not any(module in _HELD for module in model.modules()):
            nn.Module.train(model, mode)
            for part in steady:
                part.eval()
            return
        still = {module for part in steady for module in part.modules()}
        modes = {module: mode and module not in still for module in model.modules()}
        for module in _HELD.keys() & modes.keys():
            _HELD[module] = _HELD[module][0], modes.pop(module)
        _assign(model, modes)


# --- precision ---------------------------------------------------------------------------------------------------------------------------


def as_weights(x: Tensor, module: nn.Module) -> Tensor:
    """A float tensor in the precision of a module's weights; under autocast, which chooses the precision, only float64 is changed."""
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), x.dtype)
    device = x.device.type
    chosen = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return x if x.dtype == dtype or chosen else x.to(dtype)


# --- contents ----------------------------------------------------------------------------------------------------------------------------

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def contents_key(tensors: Iterable[Tensor]) -> tuple[object, ...]:
    """A key that changes when a value changes, also through `.data`, which torch's version counter does not tell; six times as fast as a hash.

    Through `.data` alone, an exchange of values within a tensor is not noticed.
    """
    tensors = [tensor.detach() for tensor in tensors]
    versions = tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)
    sums = [t.view(_INTEGERS[t.element_size()]).sum(dtype=torch.int64) for t in tensors]
    return versions, tuple(map(int, sums))


# --- wrappers ----------------------------------------------------------------------------------------------------------------------------


def _inside(module: nn.Module) -> str | None:
    """Attribute of the wrapped module; None for a module that is no wrapper."""
    if isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
        return "module"
    return "_orig_mod" if "_orig_mod" in module._modules else None  # of torch.compile, whose class is costly to import


def unwrapped(module: Any) -> Any:
    """The module itself, without torch.compile and data parallelism around it."""
    while isinstance(module, nn.Module) and (name := _inside(module)) is not None:
        module = module._modules[name]
    return module


def plain_copy(module: nn.Module) -> Any:
    """A deep copy without torch.compile and data parallelism around the module or any module in it."""
    copied: dict[int, Any] = {}
    for part in reversed(list(module.modules())):  # inner modules first
        if _inside(part) is not None:
            copied[id(part)] = copy.deepcopy(unwrapped(part), copied)
    return copy.deepcopy(module, copied)


def wrapped_names(model: nn.Module) -> list[tuple[str, str]]:
    """Prefixes of tensor names inside wrapped modules, as torch names them and without the wrappers; outer ones first.

    Example:
        >>> wrapped_names(nn.Sequential(nn.DataParallel(nn.Linear(1, 1))))
        [('0.module.', '0.')]
    """
    prefixes = []
    for name, module in model.named_modules():
        if (inner := _inside(module)) is not None:
            start = f"{name}." if name else ""
            prefixes.append((f"{start}{inner}.", start))
    return prefixes


def shorten_names(model: nn.Module, state: dict[str, Tensor], prefix: str = "") -> None:
    """Rename the tensors of wrapped modules in a `state_dict` of the model: their names become those without the wrappers."""
    for long, short in reversed(wrapped_names(model)):
        _rename(state, prefix + long, prefix + short)


def lengthen_names(model: nn.Module, state: dict[str, Tensor], prefix: str = "") -> None:
    """The inverse of `shorten_names`; names that have the wrappers already stay."""
    for long, short in wrapped_names(model):
        _rename(state, prefix + short, prefix + long)


def _rename(state: dict[str, Tensor], old: str, new: str) -> None:
    for name in [name for name in state if name.startswith(old) and not (new.startswith(old) and name.startswith(new))]:
        state[new + name.removeprefix(old)] = state.pop(name)
