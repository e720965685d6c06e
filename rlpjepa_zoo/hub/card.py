"""The model card: README.md of a published folder and its figures, a function of config.json alone; never edited by hand.

The text is in card.md.j2. This module defines the record that the card shows, and prepares what the template takes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..core.measures import measure_label
from ..core.source import ModelSource
from ..errors import ModelError, UsageError
from ..text import code, markdown, printable, quoted
from . import card_figures
from .card_figures import ACCURACIES, SPACES, classifier_results, codes_tables, encoder_results, transfer_tables
from .folder import snapshot_folder
from .format import CARD, LOG, NOTICE, Published, is_card, pack

__all__ = ["Info", "Start", "checked_info", "files", "render", "rewritten"]


def files(model: Published) -> dict[str, bytes]:
    """The card, its figures and the notice: README.md, training.png if the run was recorded, accuracy.png if a curve was measured, NOTICE."""
    info, figures = model.info, dict[str, bytes]()
    theory = (info.get("density") or {}).get("theory")
    if info.get("history") and theory is not None:
        figures["training.png"] = card_figures.training(info["history"], theory)
    if any(((info.get("results") or {}).get("curve") or {}).get(kind) for kind in ACCURACIES):
        figures["accuracy.png"] = card_figures.accuracy(info["results"])
    notice = {NOTICE: info["notice"].encode()} if info.get("notice") else {}
    return {CARD: render(model, tuple(figures)).encode(), **figures, **notice}


def rewritten(
    path: Path, name: str, license: str | None = None, notes: str | None = None, chosen: str | None = None, *, log: bytes | None = None,
    info: Mapping[str, Any] | None = None,
) -> dict[str, bytes]:  # fmt: skip
    """The files of a published folder with a new card; weights, golden codes and recipe are unchanged.

    Args:
        path: the folder.
        name: source name in the examples.
        license: SPDX identifier; unchanged when None.
        notes: Markdown of your own that the card shows; unchanged when None.
        chosen: rule by which this checkpoint was selected, if any; appended to the protocol.
        log: the log of the run (metrics.jsonl); unchanged when None.
        info: the record; unchanged when None.

    Raises:
        ModelError: a file other than the card does not verify.
    """
    model, contents = snapshot_folder(path)
    given = {key: value for key, value in (("license", license), ("notes", notes)) if value is not None}
    try:
        record = checked_info({**(model.info if info is None else info), **given})
    except UsageError as error:
        raise (UsageError if given or info is not None else ModelError)(f"{path}/config.json: {error}") from error
    results = record.get("results")
    if chosen is not None and results:
        results["protocol"] = "; ".join(text for text in (results.get("protocol"), chosen) if text)
    model = dataclasses.replace(model, name=name, info=record)
    kept = {name: content for name, content in contents.items() if not is_card(name)} | ({} if log is None else {LOG: log})
    return pack(model, kept | files(model))


MOST_NOTES = 100_000
"""Largest number of characters of the user's own text."""


# --- the record that the card shows ---------------------------------------------------------------------------------------------------

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
    dead: Number | None = None
    always_on: Number | None = None
    held: bool | None = None
    held_on: str | None = None
    shift_images: int | None = None


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
    command: str | None = None
    data: str | None = None
    curve: _Curve | None = None
    skipped: dict[str, str] | None = None
    against: dict[str, _Against] | None = None


class _Codes(_Open):
    """Measures of codes of k values, of this encoder and of other methods on the same images."""

    data: str
    protocol: str
    k: list[int]
    rows: dict[str, dict[str, list[float | None]]]
    """Method -> measure -> one value for each k."""

    @model_validator(mode="after")
    def _one_for_each_k(self) -> Self:
        for method, measures in self.rows.items():
            for name, values in measures.items():
                if len(values) != len(self.k):
                    raise ValueError(f"{name} of {method} has {len(values)} numbers for {len(self.k)} values of k")
        return self


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
    transfer: dict[str, _Results] | None = None
    """Results on other data sets, by their name."""
    codes: _Codes | None = None
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
    notes: str | None = Field(None, max_length=MOST_NOTES)
    notice: str | None = Field(None, max_length=MOST_NOTES)
    """Attributions that must stay with the weights; also the file NOTICE."""


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
    compared = {f"results.against.{name}": scores for name, scores in (results.get("against") or {}).items()}
    transferred = {f"transfer.{name}": scores for name, scores in (record.get("transfer") or {}).items()}
    for where, scores in {"results": results, **compared, **transferred}.items():
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


# --- what the template shows ---------------------------------------------------------------------------------------------------------


def render(model: Published, figures: tuple[str, ...] = ()) -> str:
    """Markdown of the card.

    Args:
        model: as in config.json.
        figures: file names of the figures beside the card.
    """
    return _template().render(_context(model, figures))


@functools.cache
def _template() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True, finalize=lambda value: value if hasattr(value, "__html__") else markdown(value),
    )  # fmt: skip
    environment.filters |= {"code": code, "quoted": quoted}
    return environment.get_template("card.md.j2")


def _context(model: Published, figures: tuple[str, ...]) -> dict[str, Any]:
    """Variables of the template."""
    info = {key: model.info.get(key) for key in (*Info.model_fields, "start", "method")}
    density, results, training = info["density"] or {}, info["results"] or {}, info["training"] or {}
    asked, measured = density.get("asked"), density.get("eval")
    height, width = model.preprocess["size"]
    source = ModelSource.parse(model.name, look_for_folders=False)
    best = {space: max(results.get(f"{kind}_{space}") or 0.0 for kind in ACCURACIES) for space in SPACES}
    return {
        "model": model, "info": info, "classifier": model.classifier, "name": model.name, "height": height, "width": width,
        "figures": figures, "front": _front_matter(model), "notes": str(info["notes"] or "").strip(),
        "data": model.info.get("data", "images"), "start": _start(info),
        "images": f" ({training['images']:,} images)" if isinstance(training.get("images"), int) else "",
        "source": source, "timm_name": (source if source.kind == "folder" else ModelSource.repository(source.bare)).timm_name,
        "density": {key: density.get(key) for key in Density.model_fields},
        "densities": ["-" if density.get(key) is None else f"{density[key]:.3f}" for key in ("asked", "theory", "train", "eval") if density],
        "missed": bool(asked and measured and not 0.67 < measured / asked < 1.5),
        "pixels_are_better": best["pixels"] > max(best["z"], best["features"]),
        "results": encoder_results(results, figures) if model.classifier is None else classifier_results(results),
        "codes": codes_tables(info["codes"] or {}), "transfer": transfer_tables(info["transfer"] or {}),
        "notice": printable(info["notice"] or "", keep="\n").strip().replace("```", ""),
    }  # fmt: skip


def _start(info: dict[str, Any]) -> dict[str, Any]:
    """Fields of `Start`, and its name with link and data as Markdown; cards of earlier versions only have `base_model`."""
    start, repo = info["backbone"] or {}, info["base_model"]
    name = start.get("name") or repo
    link = f"[{markdown(name)}](https://huggingface.co/{quote(repo)})" if repo else f"`{code(name)}`"
    text = link + (f" (trained on {markdown(start['data'])})" if start.get("data") else "")
    return {"name": name, "text": text, "license": start.get("license"), "frozen": start.get("frozen", False)}


def _front_matter(model: Published) -> str:
    """YAML metadata that the Hub reads."""
    info, head = model.info, model.classifier
    task = "image-feature-extraction" if head is None else "image-classification"
    data: dict[str, Any] = {"library_name": "timm", "pipeline_tag": task}
    data |= {key: info[key] for key in ("license", "base_model") if info.get(key)}
    if info.get("dataset"):
        data["datasets"] = [info["dataset"]]
    sparse = model.projector is not None
    tags = {
        "timm": not model.needs_package and not (head is not None and sparse), "rlpjepa_zoo": True, "sparse": sparse,
        "self-supervised": head is None, task: True, "arxiv:2602.01456": head is None and bool(info.get("target")) and not info.get("method"),
    }  # fmt: skip
    data["tags"] = [tag for tag, given in tags.items() if given]
    if entry := _evaluation(model):
        source = ModelSource.parse(model.name, look_for_folders=False)
        unnamed = model.architecture if head is None else "classifier"
        title = unnamed if source.kind == "folder" else source.bare
        data["model-index"] = [{"name": title, "results": [entry]}]
    return printable(yaml.safe_dump(data, sort_keys=False, allow_unicode=True), keep="\n")


def _evaluation(model: Published) -> dict[str, Any]:
    """The results as the Hub's model index has them; empty when nothing was measured."""
    info, results = model.info, model.info.get("results") or {}
    names = {"top1": "top-1 accuracy", "top5": "top-5 accuracy"}
    if model.classifier is None:
        names = {f"{kind}_{space}": f"{measure_label(kind)}, {SPACES[space]}" for space in ("z", "features") for kind in ACCURACIES}
    metrics = [
        {"type": "accuracy", "name": name, "value": round(results[key], 4)}
        for key, name in names.items()
        if isinstance(results.get(key), float)
    ]
    if not metrics:
        return {}
    if model.classifier is not None:
        label = str(info.get("data") or "images")
        task, dataset = "Image classification", {"type": info.get("dataset") or label, "name": label}
    else:
        task, label = "kNN and linear probes on frozen embeddings", str(results.get("data") or info.get("data") or "images")
        same = label in (info.get("data"), info.get("dataset"))
        dataset = {"type": info["dataset"] if info.get("dataset") and same else label, "name": label}
        dataset |= {"split": "test"} if "n_test" in results else {}
    return {"task": {"type": "image-classification", "name": task}, "dataset": dataset, "metrics": metrics}
