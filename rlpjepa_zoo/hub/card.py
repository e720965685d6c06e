"""The model card: README.md of a published folder and its pictures, a function of config.json alone; never edited by hand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..core.measures import measure_label, measures_of
from ..errors import ModelError, UsageError
from ..sparse.topk import Dial
from . import card_figures, classifier_card
from . import format as hub_format

__all__ = ["checked", "files", "render", "rewritten", "set_license"]

_SPACES = {"z": "sparse embedding z", "features": "dense backbone features", "pixels": "raw pixels"}
_ACCURACIES = ("knn", "linear", "one_shot")


def files(config: dict[str, Any], name: str = "owner/repo") -> dict[str, bytes]:
    """The card and the pictures it shows: README.md, training.png when the run was recorded, accuracy.png when a curve was measured.

    Args:
        config: config.json as a dict, with the block "rlpjepa_zoo".
        name: what the examples load.
    """
    info = config["rlpjepa_zoo"].get("info", {})
    drawn = {}
    theory = (info.get("density") or {}).get("theory")
    if info.get("history") and theory is not None:
        drawn["training.png"] = card_figures.training(info["history"], theory)
    if any(((info.get("results") or {}).get("curve") or {}).get(kind) for kind in _ACCURACIES):
        drawn["accuracy.png"] = card_figures.accuracy(info["results"])
    return {"README.md": render(config, name, tuple(drawn)).encode(), **drawn}


def rewritten(path: Path, name: str, license: str | None = None, notes: str | None = None, chosen: str | None = None) -> dict[str, bytes]:
    """The files of a published folder with the card written anew; weights, golden codes and recipe stay as they are.

    Args:
        path: the folder.
        name: what the examples load.
        license: SPDX identifier; as it was when None.
        notes: Markdown of your own that the card shows; as it was when None.
        chosen: how this one was chosen among others by the figures it shows, added to what is said of how they were measured.

    Raises:
        ModelError: a file other than the card does not verify.
    """
    config, contents = hub_format.snapshot(path)
    block = config[hub_format.BLOCK]
    try:
        block["info"] = checked({**block.get("info", {}), **{k: v for k, v in (("license", license), ("notes", notes)) if v is not None}})
    except UsageError as error:
        raise (UsageError if license is not None or notes is not None else ModelError)(f"{path}/config.json: {error}") from error
    results = block["info"].get("results")
    if chosen is not None and results:
        results["protocol"] = "; ".join(part for part in (results.get("protocol"), chosen) if part)
    block["name"] = name
    set_license(config, block["info"].get("license"))
    kept = {n: data for n, data in contents.items() if n != "README.md" and not n.endswith(".png")}
    return hub_format.seal({**kept, **files(config, name)}, config)


def set_license(config: dict[str, Any], license: str | None) -> None:
    """Say the same licence where timm says it."""
    config["pretrained_cfg"].pop("license", None)
    if license is not None:
        config["pretrained_cfg"]["license"] = license


Number = int | float


class _Open(BaseModel):
    model_config = ConfigDict(extra="allow", allow_inf_nan=False)


class _Target(_Open):
    p: Number
    mu: Number
    sigma: Number


class _Density(_Open):
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
    """Budgets, and for each a measure or its spread."""

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


class _Info(_Open):
    """What the card reads of `EncoderConfig.info`; other keys are kept."""

    target: _Target | None = None
    density: _Density | None = None
    results: _Results | None = None
    history: list[_Row] | None = None
    training: dict[str, str | int | float | None] | None = None
    data: str | None = None
    dataset: str | None = None
    recipe: str | None = None
    base_model: str | None = None
    augmentations: str | None = None
    license: str | None = Field(None, pattern=r"^[a-z0-9][a-z0-9.+-]*$")
    notes: str | None = Field(None, max_length=100_000)


def checked(info: Mapping[str, Any]) -> dict[str, Any]:
    """An encoder's record as plain JSON values, if the card can show it.

    Raises:
        UsageError: a part that is not of the expected type, by name.
    """
    try:
        found = _Info.model_validate(dict(info)).model_dump(exclude_unset=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UsageError(f"info.{where}: {first['msg'].lower()}, got {str(first['input'])[:60]!r}") from error
    results = found.get("results") or {}
    for where, part in [("results", results), *((f"results.against.{k}", v) for k, v in (results.get("against") or {}).items())]:
        for key, value in part.items():
            if not _is_score(key):
                continue
            if value is not None and not isinstance(value, int | float):
                raise UsageError(f"info.{where}.{key}: expected a number, got {str(value)[:60]!r}")
            part[key] = None if value is None else float(value)
    return found


def _is_score(key: str) -> bool:
    """Whether a key of results is measure_space or measure_std_space."""
    stem = next((key.removesuffix(f"_{space}") for space in _SPACES if key.endswith(f"_{space}")), "")
    return measure_label(stem.removesuffix("_std")) is not None


def render(config: dict[str, Any], name: str = "owner/repo", shown: tuple[str, ...] = ()) -> str:
    """Markdown of the card; `shown` are the pictures that lie beside it."""
    block = config["rlpjepa_zoo"]
    info = block.get("info", {})
    if "classifier" in block:
        return classifier_card.render(config, name, _licence(info))
    sections = [
        _front(config, block, info, name),
        _head(config, block, info),
        str(info.get("notes") or ""),
        _use(config, block, name),
        _elsewhere(config, block, name),
        _densities(info),
        _dial(block),
        _results(info, shown),
        _training(config, block, info, shown),
        _LIMITS,
        _licence(info),
        _CITATION,
    ]
    return "\n\n".join(section.strip() for section in sections if section) + "\n"


def _front(config: dict[str, Any], block: dict[str, Any], info: dict[str, Any], name: str) -> str:
    """YAML metadata as the Hub reads it."""
    results = info.get("results") or {}
    metrics = [
        {"type": "accuracy", "name": f"{measure_label(kind)}, {_SPACES[space]}", "value": round(results[f"{kind}_{space}"], 4)}
        for space in ("z", "features")
        for kind in _ACCURACIES
        if isinstance(results.get(f"{kind}_{space}"), float)
    ]
    plain = not block.get("needs_package")
    data: dict[str, Any] = {"library_name": "timm", "pipeline_tag": "image-feature-extraction"}
    for key in ("license", "base_model"):
        if info.get(key):
            data[key] = info[key]
    if info.get("dataset"):
        data["datasets"] = [info["dataset"]]
    data["tags"] = [*(["timm"] if plain else []), "rlpjepa_zoo", "sparse", "self-supervised", "image-feature-extraction"]
    if info.get("target"):
        data["tags"].append("arxiv:2602.01456")
    if metrics:
        label = str(results.get("data") or info.get("data") or "images")
        same = label in (info.get("data"), info.get("dataset"))
        dataset = {"type": info["dataset"] if info.get("dataset") and same else label, "name": label}
        entry = {
            "task": {"type": "image-classification", "name": "kNN and linear probes on frozen embeddings"},
            "dataset": dataset | ({"split": "test"} if "n_test" in results else {}),
            "metrics": metrics,
        }
        data["model-index"] = [
            {"name": name.removeprefix("hf-hub:") if "local-dir:" not in name else config["architecture"], "results": [entry]}
        ]
    return "---\n" + yaml.safe_dump(data, sort_keys=False, allow_unicode=True) + "---"


def _head(config: dict[str, Any], block: dict[str, Any], info: dict[str, Any]) -> str:
    dim, (height, width) = block["projector"]["dim"], block["preprocess"]["size"]
    title = f"# Sparse image encoder: {config['architecture']}, {dim} dimensions\n\n"
    if not info.get("target"):
        return title + (
            "Backbone and rectified projector, **not trained** by Rectified LpJEPA: the codes are non-negative and sparse but mean nothing yet."
        )
    density = info.get("density") or {}
    share = (
        f"of which {density['eval']:.0%} are active on average and the others exactly zero"
        if density.get("eval")
        else "many of them exactly zero"
    )
    images = f" ({info['training']['images']:,} images)" if isinstance((info.get("training") or {}).get("images"), int) else ""
    text = (
        f"This model turns a {height} x {width} image into {dim} non-negative numbers, {share}. It was trained without labels on "
        f"{info.get('data', 'images')}{images} by Rectified LpJEPA ([arXiv 2602.01456](https://arxiv.org/abs/2602.01456)). Use the embeddings "
        "for similarity search, clustering, or as features for a small classifier, on images like those."
    )
    asked, found = density.get("asked"), density.get("eval")
    if asked and found and not 0.67 < found / asked < 1.5:
        text += f"\n\nThe density asked for, {asked:.3g}, was **missed**: {found:.3g} was measured. Longer training or another learning rate may reach it."
    pixels, best = _best(info, "pixels"), max(_best(info, "z"), _best(info, "features"))
    if pixels > best > 0:
        text += "\n\nRaw pixels do better than this encoder in the table below."
    return title + text


def _best(info: dict[str, Any], space: str) -> float:
    results = info.get("results") or {}
    return max([results.get(f"{kind}_{space}") or 0.0 for kind in _ACCURACIES])


def _use(config: dict[str, Any], block: dict[str, Any], name: str) -> str:
    height, width = block["preprocess"]["size"]
    return f"""## Use

With the Python package rlpjepa_zoo:

```python
import rlpjepa_zoo as rz

enc = rz.load_encoder("{name}")
e = enc.embed(["a.jpg", "b.jpg"])  # SparseEmbeddings: CSR rows with ids, values > 0
similarity = e.to_scipy() @ e.to_scipy().T
```

Images are resized, cropped to {height} x {width} and normalised as in training; `enc.embed(..., max_active=k)` keeps the k largest values
of each image. Loading verifies the sha256 of every file and that two golden images give their golden codes."""


def _elsewhere(config: dict[str, Any], block: dict[str, Any], name: str) -> str:
    if "/" not in name and ":" not in name:  # a name of the zoo, which only this package resolves
        return ""
    timm_name = name if name.startswith("local-dir:") else f"hf-hub:{name}"
    ours = block.get("needs_package")
    note = (
        f" (`{config['architecture']}` has a small-image stem that plain timm does not know, so this package must be installed)"
        if ours
        else ""
    )
    first = "import rlpjepa_zoo.resnet  # registers the architecture\n" if ours else ""
    return f"""## With timm or transformers

The dense backbone alone{note}:

```python
{first}import timm
from PIL import Image

backbone = timm.create_model("{timm_name}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(backbone), is_training=False)
features = backbone(transform(Image.open("a.jpg").convert("RGB")).unsqueeze(0))
```

```python
{first}from PIL import Image
from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained("{name.removeprefix("local-dir:")}")
model = AutoModel.from_pretrained("{name.removeprefix("local-dir:")}").eval()
features = model(**processor(Image.open("a.jpg").convert("RGB"), return_tensors="pt")).pooler_output
```

`model.safetensors` is the backbone and `head.safetensors` the projector, as plain tensors."""


def _densities(info: dict[str, Any]) -> str:
    density = info.get("density")
    if not density:
        return ""
    names = ("asked", "theory", "train", "eval")
    where = f" ({density['eval_images']})" if density.get("eval_images") else ""
    cells = " | ".join("-" if density.get(key) is None else f"{density[key]:.3f}" for key in names)
    return f"""## Density (fraction of non-zero coordinates)

| asked | theory of the target | measured, training batches | measured, evaluation mode{where} |
|---|---|---|---|
| {cells} |

Random projections pin mean and covariance of the embeddings and only weakly the mass at zero, so the measured density follows the
asked one without being equal to it. `max_active` bounds it at use."""


def _dial(block: dict[str, Any]) -> str:
    """What is kept of each embedding, of an encoder behind a dial."""
    saved = block.get("dial")
    if saved is None:
        return ""
    try:
        return (
            f"**Dial**: {Dial(**saved).describe(block['projector']['dim'])}. It was set after training; figures of training are without it."
        )
    except (TypeError, ValueError) as error:
        raise ModelError(f"config.json: {hub_format.BLOCK}.dial is not what this version expects ({error})") from error


def _results(info: dict[str, Any], shown: tuple[str, ...]) -> str:
    results = info.get("results") or {}
    kinds = measures_of(results)
    if not kinds:
        return ""
    heading = "top-1 accuracy" if set(kinds) <= set(_ACCURACIES) else "representation"
    lines = ["## Results", "", f"| {heading} | " + " | ".join(_label(k) for k in kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
    lines += _rows(results, kinds, "")
    for name, other in (results.get("against") or {}).items():
        lines += _rows(other, kinds, f"{_cell(name)}: ")
    counts = ", ".join(
        f"{results[key]:,} {what}" for key, what in (("n_train", "training images"), ("n_test", "test images")) if key in results
    )
    note = "; ".join(part for part in (counts, str(results.get("protocol", ""))) if part)
    lines += ["", note] if note else []
    lines += _differences(results)
    curve = results.get("curve")
    if curve:
        measured = [kind for kind in kinds if curve.get(kind)]
        lines += ["", "Accuracy of z when only the largest values of each image are kept:", ""]
        lines += ["| active dimensions | " + " | ".join(map(str, curve["active"])) + " |", "|---" * (len(curve["active"]) + 1) + "|"]
        for kind in measured:
            spreads = curve.get(f"{kind}_std") or [None] * len(curve["active"])
            cells = (_percent(value, spread) for value, spread in zip(curve[kind], spreads, strict=True))
            lines.append(f"| {_label(kind)} | " + " | ".join(cells) + " |")
    if "accuracy.png" in shown:
        lines += ["", "![Accuracy against active dimensions](accuracy.png)"]
    return "\n".join(lines)


def _label(kind: str) -> str:
    return measure_label(kind) or kind


def _cell(text: str) -> str:
    """Free text that stays in its cell and is no markup."""
    return "`" + " ".join(text.replace("|", "/").replace("`", "'").split())[:100] + "`"


def _rows(scores: dict[str, Any], kinds: list[str], before: str) -> list[str]:
    spaces = [space for space in _SPACES if any(f"{kind}_{space}" in scores for kind in kinds)]
    return [f"| {before}{_SPACES[space]} | " + " | ".join(_score(scores, kind, space) for kind in kinds) + " |" for space in spaces]


def _differences(results: dict[str, Any]) -> list[str]:
    rows = [(name, row) for name, other in (results.get("against") or {}).items() for row in other.get("differences", [])]
    if not rows:
        return []
    lines = ["", "Differences on the same test images, with 95 % intervals of a paired bootstrap over images:", ""]
    lines += ["| this encoder | minus | measure | difference | 95 % interval | n |", "|---|---|---|---|---|---|"]
    for name, row in rows:
        other = _cell(name) if row["minus"] == name else f"{_cell(name)}, {_cell(row['minus'])}"
        found = " to ".join(f"{100 * row[end]:+.1f}" for end in ("low", "high"))
        lines.append(
            f"| {_cell(row['space'])} | {other} | {measure_label(row['measure']) or _cell(row['measure'])} | {100 * row['difference']:+.1f} % | {found} % "
            f"| {row['n']:,} |"
        )
    return lines


def _score(results: dict[str, Any], kind: str, space: str) -> str:
    value = results.get(f"{kind}_{space}")
    return "-" if value is None else _percent(value, results.get(f"{kind}_std_{space}"))


def _percent(value: float, spread: float | None) -> str:
    return f"{100 * value:.1f} %" + (f" ± {100 * spread:.1f}" if spread is not None else "")


def _training(config: dict[str, Any], block: dict[str, Any], info: dict[str, Any], shown: tuple[str, ...]) -> str:
    lines = ["## Training", ""]
    if target := info.get("target"):
        law = f"p = {target['p']:g}, mu = {target['mu']:.4g}, sigma = {target['sigma']:.4g}"
        lines.append(
            f"- method: two views of an image must agree, and embeddings are matched to the rectified generalized Gaussian with {law}"
        )
    if info.get("data"):
        lines.append(
            f"- data: {info['data']}"
            + (f" ([{info['dataset']}](https://huggingface.co/datasets/{info['dataset']}))" if info.get("dataset") else "")
        )
    if info.get("augmentations"):
        lines.append(f"- augmentations: {info['augmentations']}")
    lines += [f"- {key}: {value}" for key, value in (info.get("training") or {}).items()]
    if info.get("recipe"):
        lines.append(f"- recipe: [`recipe.yaml`](recipe.yaml) (`{info['recipe']}`); `rlpjepa train recipe.yaml` runs it again")
    lines.append("- versions: " + ", ".join(f"{k} {v}" for k, v in block.get("versions", {}).items()))
    if "training.png" in shown:
        lines += ["", "![Density while training](training.png)"]
    return "\n".join(lines)


def _licence(info: dict[str, Any]) -> str:
    return (
        f"## Licence\n\n{info['license']}"
        if info.get("license")
        else "## Licence\n\nNot stated by who trained it; ask before you reuse it."
    )


_LIMITS = """## Limits

Embeddings describe images like those of the training data; nothing was filtered for fairness or safety. One training run, one seed,
unless stated otherwise above. In the paper's tables the backbone's dense features probe better than the sparse embedding."""

_CITATION = """## Citation

```bibtex
@misc{rectifiedlpjepa2026,
  author = {Kuang, Yilun and Dagade, Yash and Rudner, Tim G. J. and Balestriero, Randall and LeCun, Yann},
  title = {Rectified LpJEPA: Joint-Embedding Predictive Architectures with Sparse and Maximum-Entropy Representations},
  eprint = {2602.01456}, archivePrefix = {arXiv}, year = {2026}
}
```"""
