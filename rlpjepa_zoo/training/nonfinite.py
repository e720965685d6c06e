"""Keeps non-finite numbers out of the weights, the batch-norm statistics and the checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ..core import distributed
from ..errors import NonFiniteError

__all__ = ["NonFiniteGuard"]

log = logging.getLogger("rlpjepa_zoo")

_FP16_SEARCH = 20
"""Updates in a row that the search for the loss scale of fp16 may cost."""


class NonFiniteGuard:
    """Skips non-finite steps and counts them; raises after `max_skipped` in a row.

    Args:
        model: the trained module.
        max_skipped: skipped steps in a row that are allowed; with fp16 at least 20, which the search for the loss scale may cost.
        precision: of the run: no, bf16 or fp16.
        lr: `optim.lr`, for the error message.
    """

    def __init__(self, model: nn.Module, max_skipped: int, precision: str, lr: float) -> None:
        self.model, self.lr = model, lr
        self.max_skipped = max(max_skipped, _FP16_SEARCH if precision == "fp16" else 0)
        self.skipped = self.in_a_row = 0
        self._buffers = [b for b in model.buffers() if b.numel()]  # a forward pass changes the batch-norm statistics
        self._before = [torch.empty_like(b) for b in self._buffers]

    @torch.no_grad()
    def remember(self) -> None:
        """Copy the buffers of the model before a step."""
        if self._buffers:
            torch._foreach_copy_(self._before, self._buffers)

    @torch.no_grad()
    def skip(self, step: int, terms: str, forward: Callable[[], Any]) -> None:
        """Undo a step and count it.

        Args:
            step: its number, from 1.
            terms: values of the terms of the loss.
            forward: repeats the forward pass of the step, to find the first layer with non-finite output.

        Raises:
            NonFiniteError: too many in a row; names the first layer with non-finite output.
        """
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._before)
        if self.in_a_row <= self.max_skipped:
            log.warning(
                "step %d skipped: loss or gradient is not finite (%s); %d in a row, %d in all", step, terms, self.in_a_row, self.skipped
            )
            return
        raise NonFiniteError(
            f"step {step}: loss or gradient is not finite ({terms}), {self.in_a_row} steps in a row; {self._diagnosis(forward)}; "
            f"lower optim.lr = {self.lr:g}, set optim.clip_grad, or use train.precision=no; the last checkpoint is from before"
        )

    def _diagnosis(self, forward: Callable[[], Any]) -> str:
        """Non-finite weights, else the first layer whose output is not finite, else the loss or gradient."""
        bad = [name for name, p in self.model.named_parameters() if not distributed.full_tensor(p).isfinite().all()]
        if bad:
            return f"weights are not finite in {bad[0]} and {len(bad) - 1} more"
        first: list[str] = []

        def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
            def check(module: nn.Module, inputs: Any, output: Any) -> None:
                if not first and isinstance(output, Tensor) and not output.isfinite().all():
                    ok = all(x.isfinite().all() for x in inputs if isinstance(x, Tensor))
                    first.append(
                        f"first non-finite output: {name} ({type(module).__name__}); its input was {'finite' if ok else 'already non-finite'}"
                    )

            return check

        handles = [m.register_forward_hook(hook(name)) for name, m in self.model.named_modules() if not list(m.children())]
        try:
            forward()
        finally:
            for handle in handles:
                handle.remove()
        return first[0] if first else "weights and outputs of all layers are finite, so the loss or the gradient is not"
