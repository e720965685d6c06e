"""What recipes of every kind have in common: reading, writing, learning rate, number of steps, and what may be published."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import ValidationError, model_validator

from ..core.schema import Section
from ..core.source import shareable_path
from ..errors import RecipeError, UsageError
from .errors import explain
from .load import override, read_text, read_yaml, write_yaml
from .sections import ADOPTED, Data, Views
from .training_sections import Hub, Optim, Train

__all__ = ["KINDS", "Plan", "command_of", "data_section", "kind_of"]

KINDS = {"train": ("encoder", "target", "objective", "probe"), "finetune": ("start", "classifier")}
"""Commands that take a recipe, and the sections that only their recipes have."""


def kind_of(values: dict[str, Any]) -> str:
    """Return the command that a recipe is for, told by its sections."""
    return max(KINDS, key=lambda kind: sum(section in values for section in KINDS[kind]))


def command_of(source: str | Path) -> str:
    """Return the command that a recipe is for, from its sections alone; `source` as for `Plan.load`."""
    return kind_of(read_yaml(read_text(source), str(source)))


class Plan(Section):
    """Base of all recipes."""

    kind: ClassVar[str]
    """Command that takes recipes of this class."""

    if TYPE_CHECKING:
        name: str
        seed: int
        data: Data
        views: Views
        optim: Optim
        train: Train
        hub: Hub

    @model_validator(mode="after")
    def _schedule_and_views_agree(self) -> Self:
        if self.optim.warmup_epochs >= self.train.epochs:
            raise ValueError(f"optim.warmup_epochs: {self.optim.warmup_epochs:g} must be fewer than train.epochs = {self.train.epochs:g}")
        if self.optim.min_lr > self.lr:
            raise ValueError(f"optim.min_lr: {self.optim.min_lr:g} is above the rate used, {self.lr:g}")
        for name, size in self.sizes.items():
            if self.views.blur and size is not None and size < 7:
                raise ValueError(f"views.blur: its 13 taps need images of at least 7 pixels, {name} is {size}")
        start, full = self.views.start_size, self.data.image_size
        if start is not None and full is not None and start > full:
            raise ValueError(f"views.start_size: views grow, but {start} is above data.image_size = {full}; lower it, or set it to null")
        return self

    @property
    def sizes(self) -> dict[str, int | None]:
        """Recipe key -> height and width of the images that the backbone sees, in pixels; None where there are none or not known yet. Views that
        grow have a key for each size on the way."""
        local, full = self.views.local, self.data.image_size
        sizes = {"data.image_size": full, "views.start_size": self.views.start_size, "views.local.size": local.size if local else None}
        if self.views.start_size is not None and full is not None:
            grown = {self.views.size_at(epoch, self.train.epochs, full) for epoch in range(math.ceil(self.train.epochs))}
            sizes |= {f"views.start_size, grown to {size}": size for size in sorted(grown - {full, self.views.start_size})}
        return sizes

    @property
    def lr(self) -> float:
        """Peak learning rate used: optim.lr * train.batch_size / optim.reference_batch."""
        return self.optim.lr * self.train.batch_size / self.optim.reference_batch

    def steps(self, images: int) -> tuple[int, int]:
        """Return (steps of the run, steps of an epoch) for a number of training images; the incomplete last batch is dropped."""
        per_epoch = images // self.train.batch_size
        return max(1, round(self.train.epochs * per_epoch)), per_epoch

    def with_preprocess(self, preprocess: Mapping[str, Any]) -> Self:
        """Return the recipe with the preprocessing of the model in the place of null.

        Args:
            preprocess: fields of `rlpjepa_zoo.data.preprocess.Preprocess`: size, mean, std, interpolation, crop_pct.

        Raises:
            RecipeError: the model does not take square images, or the recipe contradicts the values.
        """
        height, width = preprocess["size"]
        if dict(self.data)["image_size"] is None and height != width:
            raise RecipeError(f"data.image_size: the model takes {height} x {width} pixels; give one size, as views are square")
        given = {**preprocess, "image_size": height}
        values = self.model_dump(mode="json")
        values["data"] |= {k: given[k] for k in ADOPTED if values["data"][k] is None}
        return self._validated(values, where=self.name)

    def dump(self) -> str:
        """Return canonical YAML with every field written out."""
        return write_yaml(self.model_dump(mode="json"))

    def flat(self) -> dict[str, Any]:
        """Return every value under its dotted key."""

        def dotted(values: dict[str, Any], prefix: str) -> dict[str, Any]:
            flat: dict[str, Any] = {}
            for key, value in values.items():
                flat |= dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
            return flat

        return dotted(self.model_dump(mode="json"), "")

    def shareable(self) -> str:
        """Return `dump` without personal and machine-specific values, for publishing.

        Paths keep their last component; data.path is removed if data.name names the data set. Of `hub` only the licence remains, so that
        running the recipe again does not push to the same repository.
        """
        path = shareable_path(self.data.path, self.data.name)
        common = {"data": self.data.model_copy(update={"path": path}), "hub": Hub(license=self.hub.license)}
        return self.model_copy(update=common | self._shareable_model()).dump()

    def _shareable_model(self) -> dict[str, Section]:
        """Sections that name a model, without folders of this machine."""
        raise NotImplementedError

    @classmethod
    def _drop_replaced(cls, values: dict[str, Any], overrides: Sequence[str]) -> None:
        """Remove from the values of a recipe, in place, the keys that an override of another key replaces."""

    @classmethod
    def load(cls, source: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Read a recipe.

        Args:
            source: path of a YAML file, or name of a shipped recipe (see `list_recipes`).
            overrides: ``"section.key=value"``; target.mu replaces target.density and the other way round.

        Raises:
            RecipeError: names the key, what was given and what was expected.
        """
        return cls.parse(read_text(source), overrides, where=str(source))

    @classmethod
    def parse(cls, text: str, overrides: Sequence[str] = (), where: str = "recipe") -> Self:
        """Read a recipe from YAML text.

        Args:
            text: YAML.
            overrides: as for `load`.
            where: name of the recipe, for error messages.

        Raises:
            RecipeError: as for `load`.
        """
        values = read_yaml(text, where)
        for given in overrides:
            override(values, given, cls)
        cls._drop_replaced(values, overrides)
        return cls._validated(values, where)

    @classmethod
    def _validated(cls, values: dict[str, Any], where: str) -> Self:
        """Return the recipe of some values; errors as of `load`."""
        kind = kind_of(values)
        marks = [section for section in KINDS[kind] if section in values]
        if kind != cls.kind and marks:
            raise RecipeError(
                f"{where}: has the section '{marks[0]}', so it is a recipe for `rlpjepa {kind}`, not for `rlpjepa {cls.kind}`"
            )
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise RecipeError(f"{where}: {explain(error, cls)}") from error
        except RecipeError as error:
            raise RecipeError(f"{where}: {error}") from error


def data_section(values: dict[str, str], overrides: Sequence[str] = ()) -> Data:
    """Return a data section that belongs to no recipe.

    Args:
        values: keys of the section.
        overrides: ``"data.key=value"``.

    Raises:
        RecipeError: names the key, what was given and what was expected.
        UsageError: an override of another section.

    Example:
        >>> data_section({"source": "hf", "name": "uoft-cs/cifar10"}, ["data.eval_split=test"]).eval_split
        'test'
    """
    recipe: dict[str, Any] = {"data": dict(values)}
    for given in overrides:
        override(recipe, given, _DataOnly)
    if extra := sorted(recipe.keys() - {"data"}):
        raise UsageError(
            f"override of '{extra[0]}': only data.KEY=VALUE has a meaning here; overrides of other sections belong to a recipe"
        )
    try:
        return _DataOnly.model_validate(recipe).data
    except ValidationError as error:
        raise RecipeError(explain(error, _DataOnly)) from error


class _DataOnly(Section):
    data: Data
