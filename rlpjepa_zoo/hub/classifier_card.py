"""The card of a published classifier, a function of config.json alone, like that of an encoder in `rlpjepa_zoo.hub.card`."""

from __future__ import annotations

from typing import Any

import yaml

__all__ = ["render"]

_SHOWN = 30
"""Classes named on the card, at most."""


def render(config: dict[str, Any], name: str, licence: str) -> str:
    """Markdown of the card.

    Args:
        config: config.json as a dict, with the block "rlpjepa_zoo".
        name: what the examples load.
        licence: the section about it.
    """
    block = config["rlpjepa_zoo"]
    info = block.get("info", {})
    parts = [_front(block, info, name), _head(config, block, info), str(info.get("notes") or ""), _use(config, block, name),
             _results(info), _training(block, info), licence]  # fmt: skip
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _front(block: dict[str, Any], info: dict[str, Any], name: str) -> str:
    results = info.get("results") or {}
    from_z = block["classifier"]["input"] == "z"
    data: dict[str, Any] = {"library_name": "timm", "pipeline_tag": "image-classification"}
    data |= {key: info[key] for key in ("license", "base_model") if info.get(key)}
    data |= {"datasets": [info["dataset"]]} if info.get("dataset") else {}
    plain = not (from_z or block.get("needs_package"))
    data["tags"] = [*(["timm"] if plain else []), "rlpjepa_zoo", *(["sparse"] if from_z else []), "image-classification"]
    metrics = [{"type": "accuracy", "name": f"{key[0]}{key[1:3]}-{key[3]} accuracy", "value": round(results[key], 4)}
               for key in ("top1", "top5") if isinstance(results.get(key), float)]  # fmt: skip
    if metrics:
        label = str(info.get("data") or "images")
        entry = {
            "task": {"type": "image-classification", "name": "Image classification"},
            "dataset": {"type": info.get("dataset") or label, "name": label},
            "metrics": metrics,
        }
        title = name.removeprefix("hf-hub:") if "local-dir:" not in name else "classifier"
        data["model-index"] = [{"name": title, "results": [entry]}]
    return "---\n" + yaml.safe_dump(data, sort_keys=False, allow_unicode=True) + "---"


def _head(config: dict[str, Any], block: dict[str, Any], info: dict[str, Any]) -> str:
    classes, (height, width) = block["classifier"]["classes"], block["preprocess"]["size"]
    names = ", ".join(f"`{c}`" for c in classes[:_SHOWN]) + (f" and {len(classes) - _SHOWN} more" if len(classes) > _SHOWN else "")
    bottleneck = (
        f"; it classifies the {block['projector']['dim']} non-negative numbers of the rectified projector" if block["projector"] else ""
    )
    start = f", started from {info['start']}" if info.get("start") else ""
    return (
        f"# Image classifier: {config['architecture']}, {len(classes)} classes\n\n"
        f"This model tells {height} x {width} images of {info.get('data', 'images')} apart{start}{bottleneck}. Classes: {names}."
    )


def _use(config: dict[str, Any], block: dict[str, Any], name: str) -> str:
    text = f"""## Use

With the Python package rlpjepa_zoo:

```python
import rlpjepa_zoo as rz

classifier = rz.load_classifier("{name}")
found = classifier.predict(["a.jpg", "b.jpg"])  # ids, labels, probabilities
```

Loading verifies the sha256 of every file and that two golden images give their golden logits."""
    if block["projector"]:
        return text + " `model.safetensors` is the backbone in timm's format, `head.safetensors` the projector and the linear layer."
    timm_name = name if name.startswith("local-dir:") else f"hf-hub:{name}"
    first = (
        "import rlpjepa_zoo.resnet  # registers the architecture, which plain timm does not know\n" if block.get("needs_package") else ""
    )
    return f"""{text}

With timm:

```python
{first}import timm
from PIL import Image

model = timm.create_model("{timm_name}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
logits = model(transform(Image.open("a.jpg").convert("RGB")).unsqueeze(0))
```"""


def _results(info: dict[str, Any]) -> str:
    results = info.get("results") or {}
    if "top1" not in results:
        return ""
    cells = [("top-1", f"{100 * results['top1']:.2f} %")]
    cells += [("top-5", f"{100 * results['top5']:.2f} %")] if "top5" in results else []
    cells += [("cross-entropy", f"{results['loss']:.4f} nats")]
    head, line, row = (" | ".join(part) for part in ([k for k, _ in cells], ["---"] * len(cells), [v for _, v in cells]))
    counts = f"n = {results.get('n_test', 0):,} held-out images; trained on n = {results.get('n_train', 0):,} labelled images"
    return f"## Results\n\n| {head} |\n|{line}|\n| {row} |\n\n{counts}; {results.get('protocol', 'one seed')}."


def _training(block: dict[str, Any], info: dict[str, Any]) -> str:
    lines = ["## Training", ""]
    lines += [f"- {key}: {info[key]}" for key in ("start", "method", "data", "augmentations") if info.get(key)]
    lines += [f"- {key}: {value}" for key, value in (info.get("training") or {}).items()]
    if info.get("recipe"):
        lines.append(f"- recipe: [`recipe.yaml`](recipe.yaml) (`{info['recipe']}`); `rlpjepa finetune recipe.yaml` runs it again")
    lines.append("- versions: " + ", ".join(f"{k} {v}" for k, v in block.get("versions", {}).items()))
    return "\n".join(lines)
