"""The model card: README.md of a published folder and its pictures, a function of config.json alone; never edited by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from . import folder, pictures
from .folder import Content

__all__ = ["files", "render", "rewritten"]

_SPACES = {"z": "sparse embedding z", "features": "dense backbone features", "pixels": "raw pixels"}
_MEASURES = {"knn": "kNN", "linear": "linear probe", "one_shot": "1-shot"}


def files(config: dict[str, Any], name: str = "owner/repo") -> dict[str, bytes]:
    """The card and the pictures it shows: README.md, training.png when the run was recorded, accuracy.png when a curve was measured.

    Args:
        config: config.json as a dict, with the block "rlpjepa_zoo".
        name: what the examples load.
    """
    info = config["rlpjepa_zoo"].get("info", {})
    drawn = {}
    if info.get("history"):
        drawn["training.png"] = pictures.training(info["history"], info["density"]["theory"])
    if info.get("results", {}).get("curve"):
        drawn["accuracy.png"] = pictures.accuracy(info["results"])
    return {"README.md": render(config, name, tuple(drawn)).encode(), **drawn}


def rewritten(path: Path, name: str) -> dict[str, Content]:
    """The files of a published folder with the card written anew for `name`; weights, golden codes and recipe stay as they are.

    Raises:
        ModelError: a file other than the card does not verify.
    """
    config = folder.read_config(path)
    listed = {n: entry for n, entry in folder.listed_files(config, str(path)).items() if n != "README.md" and not n.endswith(".png")}
    folder.verify(path, config, only=listed)
    config[folder.BLOCK]["name"] = name
    return folder.seal({**{n: path / n for n in listed}, **files(config, name)}, config)


def render(config: dict[str, Any], name: str = "owner/repo", shown: tuple[str, ...] = ()) -> str:
    """Markdown of the card; `shown` are the pictures that lie beside it."""
    block = config["rlpjepa_zoo"]
    info = block.get("info", {})
    sections = [
        _front(config, block, info),
        _head(config, block, info),
        _use(config, block, name),
        _elsewhere(config, block, name),
        _densities(info),
        _results(info, shown),
        _training(config, block, info, shown),
        _LIMITS,
        _licence(info),
        _CITATION,
    ]
    return "\n\n".join(section.strip() for section in sections if section) + "\n"


def _front(config: dict[str, Any], block: dict[str, Any], info: dict[str, Any]) -> str:
    """YAML metadata as the Hub reads it."""
    results = info.get("results", {})
    metrics = [
        {"type": "accuracy", "name": f"{measure}, {_SPACES[space]}", "value": results[f"{kind}_{space}"]}
        for space in ("z", "features")
        for kind, measure in _MEASURES.items()
        if isinstance(results.get(f"{kind}_{space}"), float)
    ]
    data: dict[str, Any] = {"library_name": "timm", "pipeline_tag": "image-feature-extraction"}
    if info.get("license"):
        data["license"] = info["license"]
    if info.get("dataset"):
        data["datasets"] = [info["dataset"]]
    if info.get("base_model"):
        data["base_model"] = info["base_model"]
    data["tags"] = ["timm", "rlpjepa_zoo", "sparse", "self-supervised", "image-feature-extraction"]
    if info.get("target"):
        data["tags"].append("arxiv:2602.01456")
    if metrics:
        label = str(results.get("data", info.get("data", "images")))
        entry = {
            "task": {"type": "image-classification", "name": "frozen evaluation"},
            "dataset": {
                "type": info["dataset"] if info.get("dataset") and "data" not in results else label,
                "name": label,
                "split": "test",
            },
            "metrics": metrics,
        }
        data["model-index"] = [{"name": f"{config['architecture']}, {block['projector']['dim']} dimensions", "results": [entry]}]
    return "---\n" + yaml.safe_dump(data, sort_keys=False, allow_unicode=True) + "---"


def _head(config: dict[str, Any], block: dict[str, Any], info: dict[str, Any]) -> str:
    dim, target = block["projector"]["dim"], info.get("target")
    title = f"# Sparse image encoder: {config['architecture']}, {dim} dimensions\n\n"
    if target is None:
        return title + (
            "Backbone and rectified projector, **not trained** by Rectified LpJEPA: the codes are non-negative and sparse but mean nothing yet."
        )
    density = info.get("density", {}).get("eval")
    active = f", of which {density:.1%} are active on average and the others exactly zero" if density else ", many of them exactly zero"
    return title + (
        f"Images to {dim} non-negative numbers{active}. Trained without labels by Rectified LpJEPA (arXiv 2602.01456): "
        f"two views of an image must agree, and the embeddings are matched to the rectified generalized Gaussian with p = {target['p']:g}, "
        f"mu = {target['mu']:.4g}, sigma = {target['sigma']:.4g}."
    )


def _use(config: dict[str, Any], block: dict[str, Any], name: str) -> str:
    height, width = block["preprocess"]["size"]
    return f"""## Use

```python
import rlpjepa_zoo as rz

enc = rz.load_encoder("{name}")
e = enc.embed(["a.jpg", "b.jpg"])  # SparseEmbeddings: CSR rows with ids, values > 0
```

Images are resized, cropped to {height} x {width} and normalised as in training; `enc.embed(..., max_active=k)` keeps the k largest values
of each image. Loading verifies the sha256 of every file and that two golden images give their golden codes."""


def _elsewhere(config: dict[str, Any], block: dict[str, Any], name: str) -> str:
    if "/" not in name and ":" not in name:  # a name of the zoo, which only this package resolves
        return ""
    timm_name = name if name.startswith("local-dir:") else f"hf-hub:{name}"
    if block.get("needs_package"):
        return f"""## Without this package

`{config["architecture"]}` has a small-image stem that plain timm does not know: `import rlpjepa_zoo.resnet` first, then timm and
transformers open the backbone (`{timm_name}`). `model.safetensors` is the backbone and `head.safetensors` the projector, as plain tensors."""
    return f"""## Without this package

The dense backbone opens in plain timm and in transformers:

```python
import timm

backbone = timm.create_model("{timm_name}", pretrained=True).eval()
```

```python
from transformers import AutoImageProcessor, AutoModel

processor, model = AutoImageProcessor.from_pretrained("{name.removeprefix("local-dir:")}"), AutoModel.from_pretrained("{name.removeprefix("local-dir:")}")
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


def _results(info: dict[str, Any], shown: tuple[str, ...]) -> str:
    results = info.get("results", {})
    kinds = [kind for kind in _MEASURES if any(f"{kind}_{space}" in results for space in _SPACES)]
    if not kinds:
        return ""
    lines = ["## Results", "", "| top-1 accuracy | " + " | ".join(_MEASURES[k] for k in kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
    for space, label in _SPACES.items():
        if any(f"{kind}_{space}" in results for kind in kinds):
            lines.append(f"| {label} | " + " | ".join(_score(results, kind, space) for kind in kinds) + " |")
    counts = ", ".join(
        f"{results[key]:,} {what}" for key, what in (("n_train", "training images"), ("n_test", "test images")) if key in results
    )
    note = "; ".join(part for part in (counts, str(results.get("protocol", ""))) if part)
    lines += ["", note] if note else []
    curve = results.get("curve")
    if curve:
        measured = [kind for kind in _MEASURES if kind in curve]
        lines += ["", "Accuracy of z when only the largest values of each image are kept:", ""]
        lines += ["| active dimensions | " + " | ".join(map(str, curve["active"])) + " |", "|---" * (len(curve["active"]) + 1) + "|"]
        lines += [f"| {_MEASURES[kind]} | " + " | ".join(f"{100 * v:.1f} %" for v in curve[kind]) + " |" for kind in measured]
    if "accuracy.png" in shown:
        lines += ["", "![Accuracy against active dimensions](accuracy.png)"]
    return "\n".join(lines)


def _score(results: dict[str, Any], kind: str, space: str) -> str:
    value, spread = results.get(f"{kind}_{space}"), results.get(f"{kind}_std_{space}")
    if value is None:
        return "-"
    return f"{100 * value:.1f} %" + (f" ± {100 * spread:.1f}" if spread is not None else "")


def _training(config: dict[str, Any], block: dict[str, Any], info: dict[str, Any], shown: tuple[str, ...]) -> str:
    lines = ["## Training", ""]
    if "data" in info:
        lines.append(
            f"- data: {info['data']}"
            + (f" ([{info['dataset']}](https://huggingface.co/datasets/{info['dataset']}))" if info.get("dataset") else "")
        )
    if info.get("augmentations"):
        lines.append(f"- augmentations: {info['augmentations']}")
    lines += [f"- {key}: {value}" for key, value in info.get("training", {}).items()]
    if info.get("recipe"):
        lines.append(f"- recipe: [`recipe.yaml`](recipe.yaml) (`{info['recipe']}`); `rlpjepa train recipe.yaml` runs it again")
    lines.append("- versions: " + ", ".join(f"{k} {v}" for k, v in block.get("versions", {}).items()))
    if "training.png" in shown:
        lines += ["", "![Density and distance to the target while training](training.png)"]
    return "\n".join(lines)


def _licence(info: dict[str, Any]) -> str:
    return f"## Licence\n\n{info['license']}" if info.get("license") else "## Licence\n\nNot stated by who trained it."


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
