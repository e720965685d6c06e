"""What keeps numbers that are not finite out of the weights, the statistics of batch norm and the checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ..config.plan import Plan
from ..core import distributed
from ..errors import NonFiniteError

__all__ = ["Guard"]

log = logging.getLogger("rlpjepa_zoo")

_SCALER_SEARCHES = 20
"""Updates in a row that the loss scale of fp16 may cost while it is found."""


class Guard:
    """Steps whose loss or gradient is not finite: they leave no trace in the model, are counted, and end the run when they do not end."""

    def __init__(self, model: nn.Module, recipe: Plan) -> None:
        self.model, self.recipe = model, recipe
        self.most = max(recipe.train.max_skipped, _SCALER_SEARCHES if recipe.train.precision == "fp16" else 0)
        self.skipped = self.in_a_row = 0
        self._buffers = [b for b in model.buffers() if b.numel()]  # what a forward pass changes: statistics of batch norm
        self._before = [torch.empty_like(b) for b in self._buffers]

    @torch.no_grad()
    def remember(self) -> None:
        """The model's buffers as they are before a step."""
        if self._buffers:
            torch._foreach_copy_(self._before, self._buffers)

    @torch.no_grad()
    def skip(self, step: int, parts: str, again: Callable[[], Any]) -> None:
        """Undo a step and count it.

        Args:
            step: its number.
            parts: values of the terms of the loss.
            again: the forward pass of that step, to find out where it broke.

        Raises:
            NonFiniteError: too many in a row; says which layer gave the first number that is not finite.
        """
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._before)
        if self.in_a_row <= self.most:
            log.warning(
                "step %d skipped: loss or gradient is not finite (%s); %d in a row, %d in all", step, parts, self.in_a_row, self.skipped
            )
            return
        raise NonFiniteError(
            f"step {step}: loss or gradient is not finite ({parts}), {self.in_a_row} steps in a row; {self._diagnosis(again)}; "
            f"lower optim.lr = {self.recipe.optim.lr:g}, set optim.clip_grad, or use train.precision=no; the last checkpoint is from before"
        )

    def _diagnosis(self, again: Callable[[], Any]) -> str:
        bad = [name for name, p in self.model.named_parameters() if not distributed.full_tensor(p).isfinite().all()]
        if bad:
            return f"weights are not finite in {bad[0]} and {len(bad) - 1} more"
        first: list[str] = []

        def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
            def look(module: nn.Module, inputs: Any, output: Any) -> None:
                if not first and isinstance(output, Tensor) and not output.isfinite().all():
                    ok = all(x.isfinite().all() for x in inputs if isinstance(x, Tensor))
                    first.append(f"the output of {name} ({type(module).__name__}) is the first, its input was {'finite' if ok else 'not'}")

            return look

        handles = [m.register_forward_hook(hook(name)) for name, m in self.model.named_modules() if not list(m.children())]
        try:
            again()
        finally:
            for handle in handles:
                handle.remove()
        return first[0] if first else "weights and outputs of all layers are finite, so it is the loss or the gradient"
