"""Recipe of a pretraining run: one YAML file describes the run completely. Unknown keys, wrong types and contradictions raise RecipeError.

YAML scalars are read as text, and the type of the field decides what they mean: `1e-3` is a number, and `no` can be a name.
The section classes are the only source of defaults and descriptions. Derived values are properties; they are never written to the recipe.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationError, model_validator

from ..core.schema import Finite, Positive, Section, Seed
from ..core.source import ModelSource
from ..errors import UsageError
from ..objectives import OBJECTIVES
from ..objectives.base import Options
from .errors import explain
from .load import overrides_of
from .plan import Plan
from .sections import ADOPTED, Data, Encoder, ImageSize, Reconstruction, Target, Views
from .training_sections import Hub, Optim, Probe, Train

__all__ = ["DEFAULT_OBJECTIVE", "Recipe"]

DEFAULT_OBJECTIVE = "rectified_lpjepa"
"""Objective of a recipe that names none."""


def _options_class(values: Mapping[str, Any]) -> type[Options]:
    """The `Options` of the objective that a section names."""
    name = values.get("name", DEFAULT_OBJECTIVE)
    return OBJECTIVES[name if isinstance(name, str) else repr(name)].Options


def _objective_options(values: Any) -> Any:
    """Validate the section by the `Options` of the objective that `name` selects."""
    if isinstance(values, Options):
        return values
    if not isinstance(values, dict):
        raise ValueError(f"objective: got {values!r}, expected a valid dictionary")
    try:
        options = _options_class(values)
    except UsageError as error:
        raise ValueError(f"objective.name: {error}") from error
    try:
        return options.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"objective.{explain(error, options)}") from error


Objective = Annotated[SerializeAsAny[Any], BeforeValidator(_objective_options)]
"""Section of the training objective: `name`, and the keys of that objective's `Options`."""


class PretrainData(Data):
    """Images, labels and preprocessing. With a pretrained backbone, preprocessing keys that are null take its values."""

    image_size: ImageSize | None = 32  # type: ignore[assignment]
    """Height and width of the input of the backbone, in pixels; null takes those of the pretrained backbone."""
    mean: tuple[Finite, Finite, Finite] | None = Data.model_fields["mean"].default  # type: ignore[assignment]
    """Mean of each channel for normalisation, on the 0..1 scale; null takes that of the pretrained backbone."""
    std: tuple[Positive, Positive, Positive] | None = Data.model_fields["std"].default  # type: ignore[assignment]
    """Standard deviation of each channel for normalisation, on the 0..1 scale; null takes that of the pretrained backbone."""
    interpolation: Literal["bilinear", "bicubic"] | None = "bicubic"  # type: ignore[assignment]
    """Interpolation of every resize; null takes that of the pretrained backbone."""
    crop_pct: Annotated[float, Field(gt=0, le=1)] | None = 1.0  # type: ignore[assignment]
    """Evaluation: share of the resized short side that the centre crop covers, such as 0.875 for 224 of 256 pixels; null takes that of the
    pretrained backbone."""


class Recipe(Plan):
    """A complete pretraining run.

    Example:
        >>> recipe = Recipe.load("digits", ["target.density=0.2", "train.epochs=30"])
        >>> recipe.train.epochs, round(recipe.target.law()[0], 3), Recipe.parse(recipe.dump()) == recipe
        (30.0, -0.648, True)
    """

    kind = "train"

    name: str
    """Name of the run, used in logs and on cards."""
    seed: Seed = 0
    """Seed of all random draws of the run."""
    data: PretrainData
    views: Views = Views()
    encoder: Encoder
    target: Target | None = None
    """Target distribution of z; needed if and only if the objective has one."""
    objective: Objective = Field(default_factory=dict, validate_default=True)
    """Training objective: `name` selects it, and the other keys are its options."""
    reconstruction: Reconstruction | None = None
    """Reconstruction of the features from z, a section of its own; null for none."""
    optim: Optim
    probe: Probe = Probe()
    train: Train
    hub: Hub = Hub()

    @classmethod
    def _drop_replaced(cls, values: dict[str, Any], overrides: Sequence[str]) -> None:
        if isinstance(target := values.get("target"), dict):
            Target.drop_replaced(target, overrides_of("target", overrides))
        if isinstance(objective := values.get("objective"), dict):
            with contextlib.suppress(UsageError):  # an unknown objective is refused later
                _options_class(objective).drop_replaced(objective, overrides_of("objective", overrides))

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        if not self.encoder.pretrained and (missing := [key for key in ADOPTED if getattr(self.data, key) is None]):
            raise ValueError(f"data.{missing[0]}: null takes the value of a pretrained backbone; give one, or set encoder.pretrained=true")
        self._check_frozen_backbone()
        self._check_objective()
        return self

    def _check_objective(self) -> None:
        """Check that the target is given if and only if the objective needs it, and the objective's options for the embedding width."""
        name, objective = self.objective.name, OBJECTIVES[self.objective.name]
        if objective.needs_target and self.target is None:
            raise ValueError(f"target: missing; objective {name} needs one")
        if self.target is not None and not objective.needs_target:
            raise ValueError(f"target: has no meaning for objective {name}; remove it")
        if self.target is not None:
            self.target.law()
            if self.target.anneal and not objective.follows_schedule:
                raise ValueError(f"target.anneal: objective {name} does not follow a target that changes; set it to 0")
            density = self.target.density_in_theory()
            if (self.target.anneal or self.target.hold) and not 1e-6 <= density < 1:
                raise ValueError(
                    f"target: density {density:.3g} is out of reach for anneal and hold; expected 1e-6 to 1, so change mu or density"
                )
        if self.reconstruction is not None and len({*self.reconstruction.active}) < len(self.reconstruction.active):
            raise ValueError(f"reconstruction.active: {self.reconstruction.active} has a number twice")
        if self.train.best == "excess" and "excess" not in objective.monitored:
            raise ValueError(f"train.best: objective {name} does not measure excess; choose knn_z or knn_features, or set it to null")
        try:
            self.objective.check_dim(self.encoder.dim)
        except ValueError as error:
            raise ValueError(f"objective.{error}") from error

    def _check_frozen_backbone(self) -> None:
        """Refuse keys that have a meaning only with, or only without, a frozen backbone."""
        encoder = self.encoder
        if encoder.freeze_backbone and self.optim.backbone_lr != 1:
            raise ValueError("optim.backbone_lr: has no meaning with encoder.freeze_backbone=true; remove one of them")
        if encoder.cached_views is None:
            return
        refused = {
            "needs encoder.freeze_backbone=true, because features of a backbone that is trained change": not encoder.freeze_backbone,
            "has no meaning with data.streaming=true; set it to null": self.data.streaming,
            "keeps views of one size; set views.local to null": self.views.local is not None,
            "keeps views of one size; set views.start_size to null": self.views.start_size is not None,
            f"{encoder.cached_views} is fewer than views.count = {self.views.count}": encoder.cached_views < self.views.count,
        }
        for reason, wrong in refused.items():
            if wrong:
                raise ValueError(f"encoder.cached_views: {reason}")

    def with_views(self, count: int) -> Recipe:
        """Return the recipe with another number of views of each image."""
        return self.model_copy(update={"views": self.views.model_copy(update={"count": count})})

    @property
    def probe_lr(self) -> float:
        """Peak learning rate used by the online probes: probe.lr * train.batch_size / optim.reference_batch."""
        return self.probe.lr * self.train.batch_size / self.optim.reference_batch

    def _shareable_model(self) -> dict[str, Section]:
        backbone = ModelSource.parse(self.encoder.backbone, timm=True).shareable()
        return {"encoder": self.encoder.model_copy(update={"backbone": backbone})}
