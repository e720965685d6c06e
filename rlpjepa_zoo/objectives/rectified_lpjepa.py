"""The objective of Rectified LpJEPA: invariance between views + sliced 2-Wasserstein distance to the rectified target (RDMReg).

Shapes: B batch, D embedding width, N directions, V views. Reductions are means (over N, B, V; for the invariance over B, D and pairs
of views), so weights carry over between batch sizes and widths. Everything runs in float32 (float64 in, float64 inside) with autocast
off: half precision would change the law of the target. Source: arXiv 2602.01456, section 4; the estimator is the mean over directions
of the squared differences of sorted projections.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal, Self

import torch
from pydantic import ValidationError, field_validator, model_validator
from torch import Tensor

from ..core import distributed, rng
from ..core.schema import Count, NonNegative, Positive
from ..distributions import RectifiedGeneralizedGaussian
from ..errors import RecipeError
from ..ops.directions import FAMILIES, INDEPENDENT, direction_blocks, directions, parse_directions, select_directions
from ..ops.gradient_noise import directions_needed, matched
from ..ops.sliced_wasserstein import sliced_wasserstein
from . import OBJECTIVES
from .base import Objective, Options, Terms, invariance
from .contrast import info_nce

__all__ = ["PAPER_ERROR", "RectifiedLpJEPALoss", "RectifiedLpJEPAOptions"]

PAPER_ERROR = 0.45
"""Gradient error of the paper's 8192 random directions at a batch of 256 and a width of 512, where embeddings are a sample of the target."""
_WIDEST_FLOOR = 1 << 14
"""Largest width at which the floor of a run is simulated. Projections of this many coordinates are normal, so wider ones have the same floor."""


class RectifiedLpJEPAOptions(Options):
    """Rectified LpJEPA: weights of its two terms, and directions of the sliced distance."""

    name: Literal["rectified_lpjepa"] = "rectified_lpjepa"
    """Name of the objective: Rectified LpJEPA."""
    invariance: NonNegative = 25.0
    """Weight of the invariance term: mean squared difference between views."""
    matching: NonNegative = 125.0
    """Weight of the matching term: sliced distance between z and the target, mean over views."""
    contrast: NonNegative = 0.0
    """Weight of the contrast term: InfoNCE of the cosines between views, with the other images of the batch as negatives (NCL)."""
    contrast_temperature: Positive = 0.2
    """Temperature of the contrast term."""
    directions: str = "hadamard"
    """Family of directions: random, orthogonal, hadamard, axes, eigen, eigen-bottom, or a mix such as eigen+random. paper: the 8192 random
    directions of the paper."""
    num_directions: Count | Literal["auto"] = "auto"
    """Number of directions. auto: the fewest that keep the relative error of the gradient within gradient_error; only for random, orthogonal
    and hadamard."""
    gradient_error: Positive | None = None
    """num_directions: auto only: relative error of the gradient that the directions cause, for embeddings that are a sample of the target.
    Null means 0.45, the error of 8192 random directions at a batch of 256 and a dimension of 512."""
    chunk: Count | None = None
    """Directions processed at once: limits memory and changes no result. Null: 128 per thread on a CPU, 4096 on other devices."""

    @classmethod
    def drop_replaced(cls, values: dict[str, Any], overrides: Mapping[str, str]) -> None:
        if values.get("directions") == "paper" and "num_directions" in overrides and "directions" not in overrides:
            values["directions"] = "random"  # the family of the paper, with another number
        replaced = set()
        if overrides.get("directions") == "paper":
            replaced |= {"num_directions", "gradient_error"}
        if overrides.get("num_directions", "auto") != "auto":
            replaced |= {"gradient_error"}
        for key in replaced - overrides.keys():
            values.pop(key, None)

    @model_validator(mode="before")
    @classmethod
    def _paper(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("directions") != "paper":
            return values
        if str(given := values.get("num_directions", 8192)) != "8192":
            raise ValueError(f"directions: paper is 8192 random ones, but num_directions is {given}; remove it, or say random")
        return values | {"directions": "random", "num_directions": 8192}

    @field_validator("num_directions", mode="wrap")
    @classmethod
    def _count_or_auto(cls, value: Any, parse: Any) -> Any:
        try:
            return parse(value)
        except ValidationError as error:
            raise ValueError(f"num_directions: got {value!r}, expected a whole number above 0, or auto") from error

    @model_validator(mode="after")
    def _counted(self) -> Self:
        families = {text.partition(":")[0].strip() for text in self.directions.split("+")}
        if self.num_directions == "auto" and families <= set(FAMILIES) and self.directions not in INDEPENDENT:
            raise ValueError(f"num_directions: auto needs one of {', '.join(INDEPENDENT)}, not '{self.directions}'; give a number")
        if self.num_directions != "auto" and self.gradient_error is not None:
            raise ValueError(f"gradient_error: is for num_directions: auto, not for {self.num_directions}; remove one of them")
        return self

    def check_dim(self, dim: int) -> None:
        parse_directions(self.directions, 1 if self.num_directions == "auto" else self.num_directions, dim)


@OBJECTIVES.register("rectified_lpjepa")
class RectifiedLpJEPALoss(Objective):
    """weight_invariance * invariance + weight_matching * mean over views of the sliced distance to the target.

    Targets and directions are drawn from (seed, step), the same on every rank, for the batch gathered from all ranks; each rank
    computes its share of the directions. After gradient averaging the parameters get exactly the gradient of one process that sees
    the whole batch, whatever the number of ranks.

    Args:
        target: law of one coordinate (scalar parameters).
        invariance_weight, matching_weight: lambda_inv and lambda_reg, >= 0.
        kind, n: family and number of directions, see `directions`.
        seed: of the run.
        chunk: directions per chunk, see `sliced_wasserstein`.
        contrast_weight, contrast_temperature: of `info_nce`, a further term; none with weight 0.

    Example:
        >>> from rlpjepa_zoo.distributions import sigma_gn
        >>> loss = RectifiedLpJEPALoss(RectifiedGeneralizedGaussian(0.0, sigma_gn(1.0), 1.0), n=64)
        >>> terms = loss(torch.rand(2, 16, 8, requires_grad=True), step=0)
        >>> terms.total.requires_grad, bool(terms.parts["matching"] >= 0)
        (True, True)
    """

    Options = RectifiedLpJEPAOptions
    needs_target = True
    follows_schedule = True
    monitored = ("floor", "excess")

    def __init__(
        self,
        target: RectifiedGeneralizedGaussian,
        invariance_weight: float = 25.0,
        matching_weight: float = 125.0,
        kind: str = "hadamard",
        n: int = 4096,
        seed: int = 0,
        chunk: int | None = None,
        contrast_weight: float = 0.0,
        contrast_temperature: float = 0.2,
    ) -> None:
        self.target, self.kind, self.n, self.seed, self.chunk = target, kind, n, seed, chunk
        self.invariance_weight, self.matching_weight = invariance_weight, matching_weight
        self.contrast_weight, self.contrast_temperature = contrast_weight, contrast_temperature
        self.shape: tuple[int, int] | None = None
        """Global batch and embedding width of the run; None if not built for a run."""

    @classmethod
    def build(
        cls, options: RectifiedLpJEPAOptions, *, target: RectifiedGeneralizedGaussian | None, dim: int, batch_size: int, seed: int
    ) -> Self:
        """The loss for a run; `num_directions: auto` becomes a number, that of rank 0 on every rank. All ranks call this together.

        Raises:
            RecipeError: no target, a gradient error that needs too many directions, or fewer directions than ranks.
        """
        if target is None:
            raise RecipeError("target: missing; objective rectified_lpjepa needs one")
        count = options.num_directions
        if count == "auto":
            sample = matched(target, batch_size, dim)
            with distributed.fail_together():
                try:
                    count = directions_needed(options.directions, options.gradient_error or PAPER_ERROR, *sample)
                except ValueError as error:
                    raise RecipeError(f"objective.gradient_error: {error}") from error
            count = distributed.gather_objects(count)[0]
        cls._check_ranks(count)
        contrast = options.contrast, options.contrast_temperature
        loss = cls(target, options.invariance, options.matching, options.directions, count, seed, options.chunk, *contrast)
        loss.shape = (batch_size, dim)
        return loss

    @staticmethod
    def _check_ranks(count: int) -> None:
        """Refuse fewer directions than ranks."""
        if count < (ranks := distributed.world_size()):
            raise RecipeError(f"objective.num_directions: {count} directions are fewer than {ranks} ranks; give at least {ranks}")

    def _target_at(self, step: int) -> RectifiedGeneralizedGaussian:
        return self.target if self.schedule is None else self.schedule(step)

    def _draw(
        self, purpose: str, step: int, rows: int, dim: int, device: torch.device, law: RectifiedGeneralizedGaussian | None = None
    ) -> Tensor:
        """A sample of a law, by default of the target."""
        law, source = law or self.target, rng.generator(self.seed, purpose, step, device=device)
        loc, scale = (torch.tensor(float(x), device=device) for x in (law.loc, law.scale))
        there = RectifiedGeneralizedGaussian(loc, scale, float(law.p), validate_args=False)
        return there.sample((rows, dim), generator=source)

    def __call__(self, views: Tensor, step: int) -> Terms:
        """Terms for this rank's embeddings (V, b, D) at a step; `matching` covers the batch of all ranks.

        Raises:
            RecipeError: fewer directions than ranks; raised on every rank.
        """
        difference = invariance(views)
        gathered = distributed.gather_with_grad(views, dim=1)
        batch, dim = gathered.shape[1:]
        y = self._draw("target", step, batch, dim, views.device, self._target_at(step))
        source = rng.generator(self.seed, "directions", step, device=views.device)
        rank, ranks = distributed.rank(), distributed.world_size()
        self._check_ranks(self.n)
        low, high = self.n * rank // ranks, self.n * (rank + 1) // ranks
        own = select_directions(direction_blocks(self.kind, self.n, dim, source, features=gathered), low, high)
        share = (high - low) * ranks / self.n  # 1 when the ranks divide n evenly
        matching = sliced_wasserstein(gathered, y, own, self.chunk) * share
        total = self.invariance_weight * difference + self.matching_weight * matching
        parts = {"invariance": difference, "matching": matching}
        if self.contrast_weight:
            parts["contrast"] = info_nce(views, self.contrast_temperature, gathered)
            total = total + self.contrast_weight * parts["contrast"]
        return Terms(total, parts)

    @torch.no_grad()
    def floor(self, batch: int, dim: int, repeats: int = 4, n: int = 512, device: torch.device | str = "cpu") -> float:
        """Value of the matching term for embeddings that *are* a sample of the target, where perfect training ends: about kappa / B.

        Args:
            batch, dim: global B and D.
            repeats, n: independent pairs of samples, and random directions for each.
            device: where the samples are drawn.
        """
        where = torch.device(device)
        values = []
        for i in range(repeats):
            c = directions("random", n, dim, rng.generator(self.seed, "floor-directions", i, device=where))
            a, b = (self._draw(f"floor-{half}", i, batch, dim, where) for half in "ab")
            values.append(float(sliced_wasserstein(a, b, c, self.chunk)))
        return sum(values) / len(values)

    @cached_property
    def run_floor(self) -> float | None:
        """`floor` at the batch size and width of the run, or at 2^14 dimensions if it is wider; None if not built for a run."""
        if self.shape is None:
            return None
        batch, dim = self.shape
        return self.floor(batch, min(dim, _WIDEST_FLOOR))

    def monitor(self, parts: Mapping[str, float], step: int) -> dict[str, float]:
        """`floor`, and the excess of the matching term above it; nothing before the target is the final one."""
        if self.run_floor is None or float(self._target_at(step).loc) != float(self.target.loc):
            return {}
        return {"floor": self.run_floor, "excess": parts["matching"] - self.run_floor}

    def describe(self) -> str:
        floor = "" if self.run_floor is None else f", floor {self.run_floor:.4g}"
        return f"target l0 {float(self.target.l0):.3f}{floor}, {self.n} {self.kind} directions"

    def state(self) -> dict[str, Any]:
        return {"directions": self.n}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore the number of directions: `auto` may give another one on another processor."""
        self.n = state.get("directions", self.n)
