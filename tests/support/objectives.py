"""An objective without a target law, for tests."""

from typing import Any, Literal, Self

from torch import Tensor

from rlpjepa_zoo.core.schema import NonNegative
from rlpjepa_zoo.objectives.base import Objective, Options, Terms, invariance


class SpreadOptions(Options):
    """Weights of the two terms."""

    name: Literal["spread"] = "spread"
    """Name of the objective."""
    spread: NonNegative = 1.0
    """Weight of the hinge on the standard deviation of each dimension."""


class Spread(Objective):
    """invariance + spread * mean over dimensions and views of max(0, 1 - standard deviation)."""

    Options = SpreadOptions

    def __init__(self, options: SpreadOptions) -> None:
        self.options = options

    @classmethod
    def build(cls, options: Any, *, target: Any, dim: int, batch_size: int, seed: int) -> Self:
        assert target is None
        return cls(options)

    def __call__(self, views: Tensor, step: int) -> Terms:
        views = views.float()
        parts = {"invariance": invariance(views), "spread": (1 - (views.var(1) + 1e-4).sqrt()).relu().mean()}
        return Terms(parts["invariance"] + self.options.spread * parts["spread"], parts)

    def describe(self) -> str:
        return f"agreement of views, and a spread of each dimension with weight {self.options.spread:g}"
