"""The record of a model (`EncoderConfig.info`, `ClassifierConfig.info`) that its card shows: keys, types, and what timm's names of weights tell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..core.measures import measure_label
from ..errors import UsageError

__all__ = ["SPACES", "Density", "Info", "Start", "checked_info", "pretraining_data"]

SPACES = {"z": "sparse embedding z", "features": "dense backbone features", "pixels": "raw pixels"}
"""Representations that are measured, by the suffix of their keys in results."""
_DATA = {
    "in1k": "ImageNet-1k", "in12k": "ImageNet-12k", "in21k": "ImageNet-21k", "in22k": "ImageNet-22k", "inw21k": "ImageNet-W21k",
    "inat21": "iNaturalist 2021", "jft": "JFT-300M", "lvd142m": "LVD-142M", "lvd1689m": "LVD-1689M", "laion2b": "LAION-2B",
    "laion400m": "LAION-400M", "laiona": "LAION-Aesthetic", "webli": "WebLI", "datacompxl": "DataComp-XL", "datacomp1b": "DataComp-1B",
    "dfndr2b": "DFNDR-2B", "dfn2b": "DFN-2B", "dfn5b": "DFN-5B", "metaclip": "MetaCLIP", "metaclip2": "MetaCLIP 2", "merged2b": "Merged-2B",
    "openai": "the image-text pairs of OpenAI's CLIP", "yfcc15m": "YFCC-15M", "yfcc100m": "YFCC-100M", "ig1b": "Instagram images",
}  # fmt: skip
"""Data sets by their names in timm's tags of weights."""


def pretraining_data(tag: str | None) -> str | None:
    """Data sets that a tag of timm's weights names, in order; None if it names none.

    Example:
        >>> pretraining_data("augreg_in21k_ft_in1k"), pretraining_data("fb_dist")
        ('ImageNet-21k, then ImageNet-1k', None)
    """
    named = [_DATA[word] for word in (tag or "").split("_") if word in _DATA]
    return ", then ".join(dict.fromkeys(named)) or None


Number = int | float


class _Open(BaseModel):
    model_config = ConfigDict(extra="allow", allow_inf_nan=False)


class _Target(_Open):
    p: Number
    mu: Number
    sigma: Number


class Density(_Open):
    asked: Number | None = None
    theory: Number | None = None
    train: Number | None = None
    eval: Number | None = None
    eval_images: str | None = None


class _Row(_Open):
    step: Number
    l0: Number | None = None
    excess: Number | None = None
    l0_eval: Number | None = None


class _Curve(_Open):
    """Numbers of active dimensions, and for each number the value or the spread of a measure."""

    __pydantic_extra__: dict[str, list[float] | None]
    active: list[int]

    @model_validator(mode="after")
    def _equally_long(self) -> Self:
        for name, values in self.__pydantic_extra__.items():
            if values is not None and len(values) != len(self.active):
                raise ValueError(f"{name} has {len(values)} numbers for {len(self.active)} budgets")
        return self


class _Difference(_Open):
    measure: str
    space: str
    minus: str
    difference: float
    low: float
    high: float
    n: int


class _Against(_Open):
    differences: list[_Difference] = []


class _Results(_Open):
    n_train: int | None = None
    n_test: int | None = None
    protocol: str | None = None
    data: str | None = None
    curve: _Curve | None = None
    skipped: dict[str, str] | None = None
    against: dict[str, _Against] | None = None


class Start(_Open):
    """The weights that the backbone started from.

    Attributes:
        name: of the pretrained model, such as resnet50.a1_in1k; None for random weights.
        data: what those weights were trained on, where timm's tag of the weights tells.
        license: of those weights, where timm states it.
        frozen: whether the backbone was not trained further.
    """

    name: str | None = None
    data: str | None = None
    license: str | None = None
    frozen: bool = False


class Info(_Open):
    """What the card reads of `EncoderConfig.info`; other keys are kept."""

    target: _Target | None = None
    density: Density | None = None
    results: _Results | None = None
    history: list[_Row] | None = None
    training: dict[str, str | int | float | None] | None = None
    data: str | None = None
    dataset: str | None = None
    recipe: str | None = None
    base_model: str | None = None
    """Repository of the start weights on the Hub, for the metadata of the card."""
    backbone: Start | None = None
    augmentations: str | None = None
    license: str | None = Field(None, pattern=r"^[a-z0-9][a-z0-9.+-]*$")
    notes: str | None = Field(None, max_length=100_000)


def checked_info(info: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a model, `EncoderConfig.info`, as plain JSON values.

    Raises:
        UsageError: a value has another type than the card expects; the message names its key.
    """
    try:
        record = Info.model_validate(dict(info)).model_dump(exclude_unset=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UsageError(f"info.{where}: {first['msg'].lower()}, got {str(first['input'])[:60]!r}") from error
    results = record.get("results") or {}
    for where, scores in [("results", results), *((f"results.against.{k}", v) for k, v in (results.get("against") or {}).items())]:
        for key, value in scores.items():
            if not _is_score(key):
                continue
            if value is not None and not isinstance(value, int | float):
                raise UsageError(f"info.{where}.{key}: expected a number, got {str(value)[:60]!r}")
            scores[key] = None if value is None else float(value)
    return record


def _is_score(key: str) -> bool:
    """Whether a key of results is measure_space or measure_std_space."""
    stem = next((key.removesuffix(f"_{space}") for space in SPACES if key.endswith(f"_{space}")), "")
    return measure_label(stem.removesuffix("_std")) is not None
