"""Recipes: one YAML file describes one run, completely. Unknown keys, wrong types and contradictions are refused by name.

YAML scalars are read as text and the *type of the field* decides what they mean, so `1e-3` is a number and `no` can be a name.
The classes below are the single source of defaults and documentation; derived values are properties and never written back.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import Field, model_validator

from .sections import Data, Encoder, Hub, Objective, Optim, Plan, Probe, Target, Train, Views

__all__ = ["Recipe"]


class Recipe(Plan):
    """A complete run.

    Example:
        >>> recipe = Recipe.load("digits", ["target.density=0.2", "train.epochs=30"])
        >>> recipe.train.epochs, round(recipe.target.law()[0], 3), Recipe.parse(recipe.dump()) == recipe
        (30.0, -0.648, True)
    """

    kind = "train"

    name: str
    seed: Annotated[int, Field(ge=0)] = 0
    data: Data
    views: Views = Views()
    encoder: Encoder
    if TYPE_CHECKING:
        target: Target
    else:
        target: Target | None = None  # needed by objectives that have a target, which all registered ones have today
    objective: Objective = Field(default_factory=dict, validate_default=True)
    optim: Optim
    probe: Probe = Probe()
    train: Train
    hub: Hub = Hub()

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.optim.warmup_epochs >= self.train.epochs:
            raise ValueError(f"optim.warmup_epochs: {self.optim.warmup_epochs:g} must be fewer than train.epochs = {self.train.epochs:g}")
        if self.optim.min_lr > self.lr:
            raise ValueError(f"optim.min_lr: {self.optim.min_lr:g} is above the rate used, {self.lr:g}")
        sizes = {"data.image_size": self.data.image_size} | ({"views.local.size": self.views.local.size} if self.views.local else {})
        for name, size in sizes.items():
            if self.views.blur and size < 7:
                raise ValueError(f"views.blur: its 13 taps need images of at least 7 pixels, {name} is {size}")
        self._frozen()
        self._objective()
        return self

    def _objective(self) -> None:
        """Check the objective's target and its options for the embedding width."""
        from ..objectives import OBJECTIVES

        name, needs_target = self.objective.name, OBJECTIVES[self.objective.name].needs_target
        if needs_target and not self.target:
            raise ValueError(f"target: missing; objective {name} needs one")
        if self.target and not needs_target:
            raise ValueError(f"target: has no meaning for objective {name}; remove it")
        if needs_target:
            self.target.law()
        try:
            self.objective.check_dim(self.encoder.dim)
        except ValueError as error:
            raise ValueError(f"objective.{error}") from error

    def _frozen(self) -> None:
        """What has a meaning only with, or only without, a frozen backbone."""
        encoder = self.encoder
        if encoder.freeze_backbone and self.optim.backbone_lr != 1:
            raise ValueError("optim.backbone_lr: has no meaning with encoder.freeze_backbone=true; remove one of them")
        if encoder.cached_views is None:
            return
        refused = {
            "needs encoder.freeze_backbone=true, as features of a backbone that learns do not last": not encoder.freeze_backbone,
            "has no meaning with data.streaming=true; set it to null": self.data.streaming,
            "keeps views of one size; set views.local to null": self.views.local is not None,
            f"{encoder.cached_views} is fewer than views.count = {self.views.count}": encoder.cached_views < self.views.count,
        }
        for reason, wrong in refused.items():
            if wrong:
                raise ValueError(f"encoder.cached_views: {reason}")

    def with_views(self, count: int) -> Recipe:
        """The recipe with so many views of an image."""
        return self.model_copy(update={"views": self.views.model_copy(update={"count": count})})

    @property
    def probe_lr(self) -> float:
        """Peak learning rate of the online probes."""
        return self.probe.lr * self.train.batch_size / self.optim.reference_batch

    def shareable(self) -> str:
        """`dump` without what is of one person or machine: of paths the last part is kept, or nothing where the data have a name, and
        running it again does not push to the same repository."""
        data, encoder = self.data, self.encoder
        path = None if data.path is None or data.name is not None else Path(data.path).name
        kind, _, place = encoder.backbone.partition(":")
        backbone = f"{kind}:{Path(place).name}" if kind == "local-dir" else encoder.backbone
        parts: dict[str, Any] = {
            "data": data.model_copy(update={"path": path}),
            "encoder": encoder.model_copy(update={"backbone": backbone}),
            "hub": Hub(license=self.hub.license),
        }
        return self.model_copy(update=parts).dump()
