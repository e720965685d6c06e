"""The list of published encoders, read offline from hub/manifest.json, and their collection on the Hub."""

from __future__ import annotations

import fnmatch
import json
import math
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

from ..core.files import sha256
from ..core.package import resource
from ..errors import UsageError, ZooError, did_you_mean
from .folder import read_folder
from .format import CONFIG, GOLDEN, Published
from .retry import Patience, check_token, explain

__all__ = ["collect", "describe", "entry", "list_encoders", "local_folder", "summary", "write_manifest"]


@cache
def _manifest() -> dict[str, dict[str, Any]]:
    path = resource("hub") / "manifest.json"
    return json.loads(path.read_text())["encoders"] if path.is_file() else {}


def list_encoders(
    pattern: str = "*",
    *,
    data: str | None = None,
    license: str | None = None,
    max_megabytes: float | None = None,
    min_density: float | None = None,
    max_density: float | None = None,
    min_linear: float | None = None,
    min_knn: float | None = None,
) -> list[str]:
    """Names of the zoo's encoders that pass every filter, sorted; no network. An encoder without a figure passes no filter on it.

    Args:
        pattern: shell pattern of names.
        data: part of the training data's name, or a shell pattern of the whole name; in upper or lower case.
        license: SPDX identifier of the weights; in upper or lower case.
        max_megabytes: size of the published files, in units of 10^6 bytes.
        min_density: mean share of non-zero values of z, measured on the encoder's own evaluation images; 0..1.
        max_density: of the same share; 0..1.
        min_linear: accuracy of a linear probe on z, on the encoder's own evaluation images; 0..1.
        min_knn: accuracy of the nearest neighbours by z, on the same images; 0..1.

    Raises:
        UsageError: a bound out of its range, or a smallest density above the largest.

    Example:
        >>> list_encoders("test_resnet.*", data="digits", max_density=0.2)
        ['test_resnet.digits']
    """
    fractions = {"min_density": min_density, "max_density": max_density, "min_linear": min_linear, "min_knn": min_knn}
    for name, value in fractions.items():
        if value is not None and not 0 <= value <= 1:
            raise UsageError(f"{name}: expected a fraction in 0..1, got {value}")
    if max_megabytes is not None and not max_megabytes > 0:
        raise UsageError(f"max_megabytes: expected a positive number, got {max_megabytes}")
    if min_density is not None and max_density is not None and min_density > max_density:
        raise UsageError(f"min_density {min_density} is above max_density {max_density}, so no encoder passes")
    bounds = {
        "megabytes": (None, max_megabytes), "density": (min_density, max_density), "linear_z": (min_linear, None), "knn_z": (min_knn, None),
    }  # fmt: skip

    def passes(record: dict[str, Any]) -> bool:
        texts = _like(record.get("data"), data) and _like(record.get("license"), license, exact=True)
        return texts and all(_within(record.get(key), low, high) for key, (low, high) in bounds.items())

    return sorted(name for name in fnmatch.filter(_manifest(), pattern) if passes(_manifest()[name]))


def _like(text: str | None, wanted: str | None, exact: bool = False) -> bool:
    """Whether a text, in upper or lower case, is the wanted one, or contains it; if that is a shell pattern, the whole text must match it."""
    if text is None or wanted is None:
        return wanted is None
    text, wanted = text.lower(), wanted.lower()
    return text == wanted if exact else fnmatch.fnmatchcase(text, wanted if set("*?[") & set(wanted) else f"*{wanted}*")


def _within(value: float | None, low: float | None, high: float | None) -> bool:
    """Whether a figure lies within the bounds that are given; a missing one does only if none is."""
    if value is None:
        return low is None and high is None
    return (low is None or value >= low) and (high is None or value <= high)


def entry(name: str) -> dict[str, Any]:
    """The manifest's record of one encoder: the figures of `describe`, repository and commit.

    Raises:
        UsageError: no such encoder, with the nearest name.
    """
    if name not in _manifest():
        raise UsageError(
            f"no encoder named '{name}' in the zoo ({len(_manifest())} listed by `rlpjepa list`).{did_you_mean(name, _manifest())}"
        )
    return _manifest()[name]


def local_folder(name: str) -> Path | None:
    """The shipped folder of an encoder, with weights; None if only the Hub has it."""
    folder = resource("hub") / name
    return folder if (folder / "model.safetensors").is_file() else None


def describe(folder: Path) -> dict[str, Any]:
    """The manifest's record of a published folder, a function of its files alone.

    ``parameters`` counts the weights and biases of backbone and projector. ``bytes_per_image`` is the mean size of an embedding as
    `SparseEmbeddings` saves it: 4 bytes for each non-zero value (float32) and 2 for its column (int16; 4 beyond 32,768 dimensions).
    The start of its row and its id are not counted. ``megabytes`` is the size of all files but config.json.
    """
    from ..sparse.io import index_dtype  # imports numpy, which the list of the zoo does without

    model = read_folder(folder)
    results, density = model.info.get("results") or {}, (model.info.get("density") or {}).get("eval")
    dim = None if model.projector is None else model.projector.dim
    return {
        "architecture": model.architecture,
        "parameters": _parameters(folder, model),
        "image_size": list(model.preprocess["size"]),
        "data": model.info.get("data"),
        "license": model.info.get("license"),
        "dim": dim,
        "density": density,
        "bytes_per_image": None if dim is None or density is None else round(density * dim * (4 + index_dtype(dim)().itemsize)),
        **{key: results[key] for key in ("knn_z", "linear_z", "knn_features", "linear_features") if key in results},
        "megabytes": round(sum(entry["size"] for entry in model.files.values()) / 1e6, 2),
        "sha256": sha256(folder / CONFIG),
        "repo": None,
        "commit": None,
    }


def _parameters(folder: Path, model: Published) -> int:
    """Number of weights and biases, by the headers of the files; integers and the statistics of batch normalisation are none.

    Constants that a few of timm's architectures save count too, and shared tensors count as often as they are saved.
    """
    from ..ops.tensors import tensor_shapes  # imports torch

    tensors = (tensor for file in model.tensor_files if file != GOLDEN for tensor in tensor_shapes(folder / file).items())
    trained = (shape for name, (dtype, shape) in tensors if "F" in dtype and not name.endswith(("running_mean", "running_var")))
    return sum(math.prod(shape) for shape in trained)


def write_manifest(root: Path) -> None:
    """Describe every published folder below hub/ in hub/manifest.json; repositories and commits already listed there are kept."""
    path = root / "manifest.json"
    listed = json.loads(path.read_text())["encoders"] if path.is_file() else {}
    encoders = {config.parent.name: describe(config.parent) for config in sorted(root.glob(f"*/{CONFIG}"))}
    for name, record in encoders.items():
        record |= {key: listed.get(name, {}).get(key) for key in ("repo", "commit")}
    path.write_text(json.dumps({"format": 1, "encoders": encoders}, indent=1) + "\n")
    _manifest.cache_clear()


# --- on the Hub ----------------------------------------------------------------------------------------------------------------------


def summary(name: str) -> str:
    """One line about an encoder, at most 500 characters: what it is, its density and the accuracy of z on its own evaluation images."""
    record = entry(name)
    text = f"{record['architecture']}, {record['parameters'] / 1e6:.3g} M parameters, trained on {record['data'] or 'images'}"
    if record["density"] is not None:
        text += f": {record['dim']} dimensions, density {record['density']:.3g}, {record['bytes_per_image']} bytes an image"
    scores = [f"{label} {record[key]:.3f}" for key, label in (("knn_z", "kNN"), ("linear_z", "linear")) if record.get(key) is not None]
    return (f"{text}; accuracy of z: {', '.join(scores)}" if scores else text)[:500]


def collect(
    owner: str, notes: Mapping[str, str], *, title: str, description: str, private: bool | None = None, token: str | None = None
) -> str:
    """Make the collection of that title, or complete it; only what differs is sent. Returns its address.

    Args:
        owner: user or organisation on the Hub.
        notes: text beside each model, by repository. Other items of the collection stay.
        title: identifies the collection among those of the owner.
        description: at most 150 characters.
        private: visibility; an existing collection must have it. A new one is private when None.
        token: with write permission; the stored login when None.

    Raises:
        UsageError: the collection has the other visibility.
        HubError: one line with the fix.
    """
    from huggingface_hub import HfApi

    api, where = HfApi(token=check_token(token)), f"{owner}: collection '{title}'"
    patience = Patience(where)
    hidden = private is not False
    try:
        found = patience(lambda: api.create_collection(title, namespace=owner, description=description, private=hidden, exists_ok=True))
        if private is not None and found.private != private:
            raise UsageError(
                f"{where}: is {'private' if found.private else 'public'} already; change that on its page, or leave the option out"
            )
        if found.description != description:
            patience(lambda: api.update_collection_metadata(found.slug, description=description))
        items = {item.item_id: item for item in found.items if item.item_type == "model"}
        for repo, note in notes.items():
            if repo not in items:
                patience(partial(api.add_collection_item, found.slug, repo, "model", note=note, exists_ok=True))
            elif items[repo].note != note:
                patience(partial(api.update_collection_item, found.slug, items[repo].item_object_id, note=note))
    except ZooError:
        raise
    except Exception as error:
        raise explain(error, where) from error
    return found.url
