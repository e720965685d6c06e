"""The model card (README.md of a published folder), generated from config.json's block; never edited by hand."""

from __future__ import annotations

from typing import Any

import yaml


def _percent(value: Any) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _density(value: Any) -> str:
    return "-" if value is None else f"{value:.3f}"


def render(config: dict[str, Any], name: str = "owner/repo") -> str:
    """Markdown of the card.

    Args:
        config: config.json as a dict, with the block "rlpjepa_zoo".
        name: what the examples load.
    """
    block = config["rlpjepa_zoo"]
    info = block.get("info", {})
    sections = [
        _front(config, info),
        _head(config, block, name),
        _use(config, block, name),
        _densities(block, info),
        _results(info),
        _origin(block, info),
        _LIMITS,
    ]
    return "\n\n".join(section.strip() for section in sections if section) + "\n"


def _front(config: dict[str, Any], info: dict[str, Any]) -> str:
    data: dict[str, Any] = {
        "library_name": "timm",
        "pipeline_tag": "image-feature-extraction",
        "license": "apache-2.0",
        "tags": ["image-feature-extraction", "timm", "rlpjepa_zoo", "sparse", "self-supervised"],
    }
    results = info.get("results", {})
    metrics = [
        {"type": "accuracy", "name": label, "value": results[key]}
        for key, label in _RESULTS.items()
        if isinstance(results.get(key), float) and not key.endswith("pixels")
    ]
    if metrics:
        dataset = {"type": str(info.get("data", "images")), "name": str(info.get("data", "images"))}
        data["model-index"] = [
            {
                "name": config["architecture"],
                "results": [{"task": {"type": "image-feature-extraction"}, "dataset": dataset, "metrics": metrics}],
            }
        ]
    return "---\n" + yaml.safe_dump(data, sort_keys=False) + "---"


def _head(config: dict[str, Any], block: dict[str, Any], name: str) -> str:
    head = block["projector"]
    target = block.get("info", {}).get("target")
    text = f"# Sparse image encoder: {config['architecture']}, {head['dim']} dimensions\n\n"
    if target is None:
        return (
            text
            + "Backbone and rectified projector, **not trained** by Rectified LpJEPA: the codes are non-negative and sparse but mean nothing yet."
        )
    return text + (
        f"Trained without labels by Rectified LpJEPA (arXiv 2602.01456) so that its embeddings are non-negative and sparse: they are matched to the "
        f"rectified generalized Gaussian with p = {target['p']:g}, mu = {target['mu']:.4g}, sigma = {target['sigma']:.4g}."
    )


def _use(config: dict[str, Any], block: dict[str, Any], name: str) -> str:
    text = f"""## Use

```python
import rlpjepa_zoo as rz

enc = rz.load_encoder("{name}")
e = enc.embed(["a.jpg", "b.jpg"])  # SparseEmbeddings: CSR, values >= 0, exact zeros
```
"""
    if "/" not in name and ":" not in name:  # a name of the zoo, which only this package resolves
        return text
    if block.get("needs_package"):
        return (
            text
            + f"\n`{config['architecture']}` has a small-image stem that plain timm does not know: `import rlpjepa_zoo.resnet` first, then timm opens the backbone."
        )
    return (
        text
        + f"""
The dense backbone alone opens in plain timm, without this package:

```python
import timm

backbone = timm.create_model("{name if name.startswith("local-dir:") else "hf-hub:" + name}", pretrained=True).eval()
```
"""
    )


def _densities(block: dict[str, Any], info: dict[str, Any]) -> str:
    density = info.get("density")
    if not density:
        return ""
    return f"""## Density (fraction of non-zero coordinates)

| asked | theory of the target | measured, training batches | measured, evaluation mode |
|---|---|---|---|
| {_density(density.get("asked"))} | {_density(density.get("theory"))} | {_density(density.get("train"))} | {_density(density.get("eval"))} |

Random projections pin mean and covariance of the embeddings and only weakly the mass at zero, so the measured density follows the
asked one without being equal to it. `enc.embed(..., max_active=k)` bounds it at use."""


_RESULTS = {
    "knn_features": "kNN top-1, backbone features",
    "knn_z": "kNN top-1, sparse embedding",
    "linear_features": "linear probe, backbone features",
    "linear_z": "linear probe, sparse embedding",
    "one_shot_features": "1-shot, backbone features",
    "one_shot_z": "1-shot, sparse embedding",
    "knn_pixels": "kNN top-1, raw pixels",
    "linear_pixels": "linear probe, raw pixels",
    "one_shot_pixels": "1-shot, raw pixels",
}


def _results(info: dict[str, Any]) -> str:
    results = info.get("results", {})
    rows = [f"| {label} | {_percent(results[key])} |" for key, label in _RESULTS.items() if results.get(key) is not None]
    if not rows:
        return ""
    note = f"\n\n{results['protocol']}" if results.get("protocol") else ""
    return "## Results\n\n| measure | accuracy |\n|---|---|\n" + "\n".join(rows) + note


def _origin(block: dict[str, Any], info: dict[str, Any]) -> str:
    lines = []
    if "training" in info:
        lines += [f"- {key}: {value}" for key, value in info["training"].items()]
    if info.get("recipe"):
        lines.append(f"- recipe: `recipe.yaml` in this folder (`{info['recipe']}`)")
    lines.append("- versions: " + ", ".join(f"{k} {v}" for k, v in block.get("versions", {}).items()))
    return "## Training\n\n" + "\n".join(lines)


_LIMITS = """## Limits

Embeddings describe images like those of the training data; nothing was filtered for fairness or safety. One training run, one seed,
unless stated otherwise above. In the paper's tables the backbone's dense features probe better than the sparse embedding.

## Citation

Rectified LpJEPA: Joint-Embedding Predictive Architectures with Sparse and Maximum-Entropy Representations. arXiv 2602.01456."""
