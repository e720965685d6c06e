"""`rlpjepa bench codes`: methods that make sparse codes of the features of a frozen backbone, on the same features, batches and steps.

Backbone features are computed once. Each method is fitted for each seed, with the optimiser and schedule of the recipe, and its codes are
measured with only their k largest values, for several k, and with all. Methods whose fit depends on k are fitted for each k.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from ..config.pretrain import Recipe
from ..errors import NonFiniteError, UsageError
from ..evaluation.intervals import paired_difference
from ..progress import progress_bar
from .features import check_recipe, load_features
from .machine import machine
from .measures import DENSE, PROTOCOL, densities, measure
from .methods import METHODS
from .methods.base import Features, Method
from .scores import PerImage, packed, unpacked

__all__ = ["ALL", "K", "LINEAR_K", "Asked", "compare_codes", "default_methods"]

log = logging.getLogger(__name__)

K = (2, 4, 8, 16, 32, 64)
"""Values of a code, unless others are asked for; the standard of the field, and the two of CSRv2 below it."""
ALL = "all"
"""Stands in results for the k of a code with all its values."""
LINEAR_K = (8, 32)
"""Where the linear probe, which is slow, is measured beside codes with all values."""

_GROWING = ("rows", "fits", "differences", "against_dense")
"""What a report gains with each method."""
_Intervals = dict[str, dict[str, dict[str, Mapping[str, float]]]]
"""A difference with its interval, by measure, k and method."""


def default_methods() -> tuple[str, ...]:
    """The methods that are compared if none is named, in the order of tables."""
    return tuple(name for name in _all_methods() if METHODS[name].default)


def _all_methods() -> tuple[str, ...]:
    return tuple(sorted(METHODS, key=lambda name: METHODS[name].order))


class Asked(NamedTuple):
    """What to compare."""

    methods: tuple[str, ...]
    k: tuple[int, ...] | None = None
    """Values of a code; None for those of `K` that the encoder has dimensions for."""
    seeds: int = 3
    """Repetitions, with the seeds that follow the seed of the recipe."""
    linear: Literal["some", "all", "none"] = "some"
    """Where to train a linear probe: with all values and at `LINEAR_K`, everywhere, or nowhere."""

    def checked(self, recipe: Recipe) -> Asked:
        """The same in order, without repetitions, and with the numbers of values.

        Raises:
            UsageError: names the option.
        """
        for name in self.methods:
            METHODS[name]
        if not self.methods:
            raise UsageError(f"--methods: expected at least one of {', '.join(_all_methods())}")
        dim = recipe.encoder.dim
        values = [k for k in K if k <= dim] if self.k is None else self.k
        if (wrong := next((k for k in values if not 1 <= k <= dim), None)) is not None:
            raise UsageError(f"--k: expected numbers from 1 to encoder.dim = {dim}, got {wrong}")
        if self.linear not in ("some", "all", "none"):
            raise UsageError(f"--linear: expected some, all or none, got '{self.linear}'")
        methods = tuple(name for name in _all_methods() if name in self.methods)
        return self._replace(methods=methods, k=tuple(sorted({*values})))

    def with_linear(self, k: int | None) -> bool:
        """Whether a linear probe is trained for this k."""
        return self.linear == "all" or (self.linear == "some" and (k is None or k in LINEAR_K))


def compare_codes(
    recipe: Recipe,
    asked: Asked,
    device: str = "cpu",
    progress: bool = False,
    save: Callable[[dict[str, Any]], None] | None = None,
    part: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Fit and measure methods.

    Args:
        recipe: of a pretraining run with a frozen backbone and cached views.
        asked: methods, values of a code, repetitions.
        device: where backbone and methods compute.
        progress: show progress bars on stderr.
        save: called after each method with the report of the methods so far and their ``scores``.
        part: what `save` got from an interrupted comparison of the same recipe, question, images, machine and versions; its methods are taken
            over.

    Returns:
        ``asked``, ``recipe`` (YAML, shareable), ``data``, ``backbone``, numbers of images, classes, features and units, ``checksum`` of the features, ``protocol``;
        ``methods``, a line about each; ``rows``, for each method, seed and k the measures and the density; ``fits``, for each method and seed
        (and k, if it is fitted for each) its seconds; ``differences``, for each measure, k and method the best mean over seeds minus its
        own, over test images, with a 95 % interval; ``against_dense``, for each measure, k and method its own minus that of the features with
        all values (empty if `features` is not compared); machine and versions.

    Raises:
        RecipeError, UsageError: what was asked does not fit, before anything is encoded; or `part` is of another comparison.
        DataError, ModelError, HubError: as of `load_features`.
        NonFiniteError: a training diverged.
    """
    check_recipe(recipe, device)
    asked = asked.checked(recipe)
    for name in asked.methods:
        METHODS[name].check(recipe)
    recipe, features = load_features(recipe, device, progress)
    kinds = {name: METHODS[name] for name in asked.methods}
    rows, fits, scores = list[dict[str, Any]](), list[dict[str, Any]](), PerImage()

    def report() -> dict[str, Any]:
        return {
            "asked": asked._asdict() | {"seeds": [recipe.seed + i for i in range(asked.seeds)], "device": device},
            **_about(recipe, features), "methods": {name: _first_line(kind) for name, kind in kinds.items()},
            "rows": rows, "fits": fits, "differences": _differences(scores), "against_dense": _against_dense(scores), **machine(device),
        }  # fmt: skip

    if part is not None:
        if other := [key for key, value in _plain(report()).items() if key not in _GROWING and part.get(key) != value]:
            raise UsageError(f"OUT.part is of another comparison (other {', '.join(other)}); move it away to begin anew")
        rows, fits, scores = list(part["rows"]), list(part["fits"]), unpacked(part["scores"])
        log.info("went on with the results of: %s", ", ".join(dict.fromkeys(row["method"] for row in rows)))
    done = {row["method"] for row in rows}
    todo = {name: [*_cells(kind, asked, features, recipe.seed)] for name, kind in kinds.items() if name not in done}
    with progress_bar("compare codes", sum(map(len, todo.values())), hidden=not progress, unit="code") as bar:
        for name, cells in todo.items():
            fitted: Method | None = None
            before: tuple[int, int | None] | None = None
            for seed, k in cells:
                bar.set_postfix_str(f"{name}, seed {seed}, k = {k or ALL}", refresh=False)
                key = (seed, None if kinds[name].one_fit else k)
                if fitted is None or key != before:
                    fitted, seconds = _fit(kinds[name], recipe.model_copy(update={"seed": seed}), features, key[1], device)
                    fits.append({"method": name, "seed": seed, "k": key[1], "seconds": round(seconds, 3)})
                    before = key
                rows.append({"method": name, "seed": seed, "k": k or ALL} | _measured(fitted, name, seed, k, asked, features, scores))
                bar.update()
            if save is not None:
                save(report() | {"scores": packed(scores)})
    return report()


def _cells(kind: type[Method], asked: Asked, features: Features, seed: int) -> Iterator[tuple[int, int | None]]:
    """Seeds and k of the codes of a method, None for all values; what is fitted once comes together."""
    for i in range(asked.seeds if kind.random else 1):
        for k in [*(asked.k or ()), None]:
            if kind.one_fit if k is None else kind.allows(k, features.train.shape[1]):
                yield seed + i, k


def _fit(kind: type[Method], recipe: Recipe, features: Features, k: int | None, device: str) -> tuple[Method, float]:
    """A fitted method, and the seconds that it took."""
    method, started = kind(recipe, torch.device(device)), time.perf_counter()
    method.fit(features, k)
    if method.device.type == "cuda":
        torch.cuda.synchronize(method.device)
    return method, time.perf_counter() - started


def _measured(method: Method, name: str, seed: int, k: int | None, asked: Asked, features: Features, scores: PerImage) -> dict[str, float]:
    """Measures and density of the codes of a fitted method; adds the scores of each test image to `scores`."""
    train, test = (method.codes(x, k) for x in (features.train, features.test))
    if not (train.isfinite().all() and test.isfinite().all()):
        raise NonFiniteError(f"method {name}, seed {seed}: codes are NaN or infinite; lower optim.lr = {method.recipe.optim.lr:g}")
    found = measure(train, features.train_labels, test, features.test_labels, asked.with_linear(k))
    for measured, each in found.per_image.items():
        scores.setdefault((measured, str(k or ALL)), {}).setdefault(name, []).append(each)
    values = {measured: float(np.round(value, 5)) for measured, value in found.values.items()}
    return values | (densities(train, test) if method.sparse else {})


def _about(recipe: Recipe, features: Features) -> dict[str, Any]:
    """Images, backbone and protocol of a comparison."""
    steps, _ = recipe.steps(features.source.length)
    return {
        "recipe": recipe.shareable(), "data": recipe.data.label(), "backbone": features.encoder.config.architecture,
        "n_train": len(features.train), "n_test": len(features.test), "classes": len(features.train_labels[features.train_labels >= 0].unique()),
        "features": features.train.shape[1], "units": recipe.encoder.dim, "checksum": _checksum(features),
        "protocol": f"{PROTOCOL}. Trained methods: {steps} steps of {recipe.train.batch_size} images, {recipe.views.count} of "
        f"{recipe.encoder.cached_views} random views each, {recipe.optim.name}, lr = {recipe.lr:g}",
    }  # fmt: skip


def _checksum(features: Features) -> str:
    """Of the features that are measured, the first 16 digits of their sha256."""
    digest = hashlib.sha256()
    for part in (features.train, features.test, features.train_labels, features.test_labels):
        digest.update(part.contiguous().numpy().data)
    return digest.hexdigest()[:16]


def _plain(report: Mapping[str, Any]) -> dict[str, Any]:
    """A report as JSON gives it back."""
    read: dict[str, Any] = json.loads(json.dumps(report))
    return read


def _first_line(kind: type[Method]) -> str:
    return (kind.__doc__ or "").strip().splitlines()[0]


def _differences(scores: PerImage) -> _Intervals:
    """Best method minus each, for each measure and k, with intervals over test images; scores of an image are averaged over repetitions."""
    found: _Intervals = {}
    for (measured, k), of in scores.items():
        means = {name: np.mean(repetitions, axis=0) for name, repetitions in of.items()}
        best = max(means, key=lambda name: float(means[name].mean()))
        found.setdefault(measured, {})[k] = {name: _rounded(paired_difference(means[best], mean)) for name, mean in means.items()}
    return found


def _against_dense(scores: PerImage) -> _Intervals:
    """Each method minus the features with all values, for each measure and k, with intervals as those of `_differences`."""
    found: _Intervals = {}
    for (measured, k), of in scores.items():
        dense = scores.get((measured, ALL), {}).get(DENSE)
        if dense is not None:
            reference = np.mean(dense, axis=0)
            found.setdefault(measured, {})[k] = {
                name: _rounded(paired_difference(np.mean(repetitions, axis=0), reference)) for name, repetitions in of.items()
            }
    return found


def _rounded(interval: Mapping[str, float]) -> dict[str, float]:
    return {name: value if name == "n" else round(value, 5) for name, value in interval.items()}
