"""Frozen evaluation of an encoder on one split: its embeddings, its dense features and raw pixels, measured by probes."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..core import rng
from ..core.source import ModelSource
from ..data.images import Images
from ..errors import DataError, UsageError
from ..models.encoder import SparseEncoder
from ..models.factory import create_encoder, fresh_copy
from ..models.pretrained import load_encoder
from ..sparse.embeddings import SparseEmbeddings
from .encoding import encode_sparse, pixel_size
from .intervals import paired_difference
from .metrics import sparse_densities
from .probes.base import Array, Scores
from .protocol import ProbeBar, Protocol, measure

__all__ = ["budget_curve", "check_budgets", "evaluate", "with_results"]

log = logging.getLogger("rlpjepa_zoo")

MOST_PIXELS = 1 << 29
"""Numbers of raw pixels (2 GB as float32) above which they are not measured."""
MOST_FEATURES = 1 << 30
"""Numbers of dense features (4 GB as float32) above which their memory is logged."""


@contextmanager
def _tensors_on_cpu() -> Iterator[None]:
    """The CPU as the device of new tensors inside the block, whatever `torch.set_default_device` says: features and codes lie there."""
    with torch.device("cpu"):
        yield


@_tensors_on_cpu()
def evaluate(
    encoder: SparseEncoder, train: Images, test: Images, batch_size: int | None = None, num_workers: int = 0, progress: bool = False,
    with_pixels: bool = True, limit: int | None = None, *, probes: Sequence[str] | Mapping[str, Mapping[str, Any]] | str | None = None,
    budgets: Sequence[int] | str = (), seeds: int = 3, against: Sequence[str] = (), note: str = "", **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """Measure the sparse embedding z, the dense features and raw pixels of a frozen encoder on one split, and the density of z.

    Images are read and encoded once. Memory: one batch of `batch_size`, the features (float32) and the pixels (uint8) of all images, and
    about twice the representation that is being measured.

    Args:
        encoder: frozen; used in evaluation mode.
        train, test: labelled images; probes are fitted on the first and scored on the second. Images with a label < 0 are left out.
        batch_size: images of a forward pass; chosen by the size of the input when None (on a CPU 256 up to 79 pixels, 32 at 224).
        num_workers: threads that decode.
        progress: show on stderr what is encoded and measured: a bar with the time left on a terminal, else a line for each.
        with_pixels: measure raw pixels too, shrunk to a longest side of 32.
        limit: use at most this many training images, drawn at random.
        probes: names of `rlpjepa_zoo.evaluation.probes.PROBES`: knn, linear, few_shot, mlp, retrieval, clustering; or "all"; or a mapping of names to
            hyper-parameters, such as ``{"knn": {"k": 5}, "few_shot": {"draws": 20}}``. None: knn, linear, few_shot.
        budgets: measure z also with only the k largest values of each image, for each k of these; "auto" is 1, 2, 4, ... up to 64 or D.
        seeds: repetitions of what is random.
        against: representations to compare with on the same images: "pixels", "random" (the same architecture, fresh weights), "timm:NAME" (pretrained
            features), or any source of `load_encoder`; each with its own preprocessing.
        note: how the split was made, for the protocol.
        options: hyper-parameters of the probes by name, as of `Protocol`: k, temperature, grid, shots, draws, queries.

    Returns:
        A dict that JSON can hold. Always: n_train, n_test, l0, l1, dead (of z on the test images), seeds, protocol (text).
        For each space of z, features, pixels and each requested measure of knn, linear, one_shot, shot_5, shot_10, mlp, map,
        precision_at_1, precision_at_10, nmi: measure_space, a mean, and measure_std_space, its standard deviation over repetitions
        (over draws for few-shot, over seeds for the others; kNN and retrieval are deterministic and have none). Where they apply:
        chosen_c: space -> C of the linear probe for each seed; skipped: measure -> reason;
        curve: lists of equal length, active and measures and measure_std of z;
        against: name -> l0, measures as above, and differences: a list of measure, space, minus (the other's space), difference, low,
        high (95 % paired bootstrap over test images, over queries for map), n; for every measure but nmi and the precisions.

    Raises:
        DataError: no labels, no readable images, or the other encoders cannot read the same images.
        NonFiniteError: an encoder gives NaN or infinity.
        UsageError: an unknown probe or a number out of range.

    Example:
        >>> import rlpjepa_zoo
        >>> from rlpjepa_zoo.config.pretrain import Data
        >>> from rlpjepa_zoo.data.sources import open_source
        >>> digits = open_source(Data(source="digits"))
        >>> encoder = rlpjepa_zoo.create_encoder("test_resnet", dim=16)
        >>> report = evaluate(encoder, digits.train.take(range(100)), digits.eval.take(range(50)), probes=["knn"])
        >>> report["n_train"], 0 <= report["knn_z"] <= 1, report["protocol"].split(";")[0]
        (100, True, 'kNN: k = 20, cosine, T = 0.07, deterministic')
    """
    protocol = Protocol((probes,) if isinstance(probes, str) else probes, seeds, **options)
    budgets = check_budgets(budgets, encoder.config.dim)
    if "pixels" in against and not with_pixels:
        raise UsageError('against: "pixels" needs with_pixels=True (--pixels)')
    train, test, note = _labelled_parts(train, test, limit, note)
    others = {name: _other_encoder(name, encoder) for name in dict.fromkeys(against) if name != "pixels"}
    images, skipped = _LabelledSplit(train, test, {"batch_size": batch_size, "num_workers": num_workers, "progress": progress}), {}
    if with_pixels and len(images) * 3 * math.prod(pixel_size(encoder.config.preprocess)) > MOST_PIXELS:
        skipped["pixels"] = "more than 2 GB of raw pixels; measure them on fewer images with limit"
        log.warning("raw pixels left out: %s", skipped["pixels"])
    spaces, y, test_y = images.encode(encoder, with_pixels and not skipped)
    z = spaces["z"]
    report: dict[str, Any] = sparse_densities(z[1]) | {"n_train": len(y), "n_test": len(test_y), "seeds": seeds}
    total = len(protocol.probes) * (len(spaces) + len(budgets) + sum(len(names) for _, names in others.values()))
    with ProbeBar(total, not progress) as bar:
        scores = {space: measure(*_floats(spaces.pop(space), y, test_y), protocol, bar, space) for space in [*spaces]}
        for space, of_space in scores.items():
            report |= of_space.flat(space)
        sentences = [protocol.describe(len(y), len(test_y), scores["z"].skipped), *_of_pixels(encoder, scores), *([note] if note else [])]
        report |= {"protocol": "; ".join([*sentences, "encoder frozen, one training run"]), "skipped": skipped | scores["z"].skipped}
        report["chosen_c"] = {space: of_space.chosen_c for space, of_space in scores.items() if of_space.chosen_c}
        if budgets:
            report["curve"] = budget_curve(*z, y, test_y, protocol, budgets, bar)
        report["against"] = {name: images.compare(name, *other, scores, (y, test_y), protocol, bar) for name, other in others.items()}
    if "pixels" in against and "pixels" in scores:
        report["against"]["pixels"] = {"differences": _differences(scores, {"pixels": scores["pixels"]})}
    return {key: value for key, value in report.items() if value not in ({}, [])}


def _labelled_parts(train: Images, test: Images, limit: int | None, note: str) -> tuple[Images, Images, str]:
    """Training images, at most `limit`, and test images, all with a label, and the note with what was drawn.

    Raises:
        DataError: no labels, training images of one class, or no test image of a training class.
    """
    if train.labels is None or test.labels is None:
        raise DataError("evaluation needs labels; put the images of each class into a folder of its own, or name data.label_column")
    train, test = _with_labels(train, "training"), _with_labels(test, "test")
    if limit is not None and limit < len(train):
        note = "; ".join(text for text in (f"{limit} of {len(train)} training images, drawn at random", note) if text)
        train = train.take(torch.randperm(len(train), generator=rng.generator(0, "evaluate"))[:limit].numpy())
    if len(np.unique(train.labels)) < 2:  # type: ignore[arg-type]
        drawn = "" if limit is None else f" (limit: {limit})"
        raise DataError(f"evaluation: the {len(train)} labelled training images{drawn} are all of one class; expected at least two classes")
    if not np.isin(test.labels, train.labels).any():  # type: ignore[arg-type]
        raise DataError(f"evaluation: none of the {len(test)} test images is of a class of the training images")
    return train, test, note


def _floats(parts: tuple[Any, Any], y: Array, test_y: Array) -> tuple[Any, Array, Any, Array]:
    """Arguments of `measure` from training and test rows; raw pixels become float32 in 0..1."""
    x, test_x = (part.astype(np.float32) / 255 if getattr(part, "dtype", None) == np.uint8 else part for part in parts)
    return x, y, test_x, test_y


def _of_pixels(encoder: SparseEncoder, scores: dict[str, Scores]) -> list[str]:
    """A sentence for the protocol if raw pixels were measured at another size than that of the input."""
    (height, width), size = pixel_size(encoder.config.preprocess), encoder.config.preprocess.size
    if "pixels" not in scores or (height, width) == size:
        return []
    return [f"raw pixels: {height} x {width}, shrunk from {size[0]} x {size[1]}"]


def _with_labels(images: Images, role: str) -> Images:
    """The images that have a label. The others can neither vote nor be scored, and are not counted."""
    known = np.flatnonzero(images.labels >= 0) if images.labels is not None else np.zeros(0, np.int64)
    if not len(known):
        raise DataError(f"evaluation: no labelled images among the {len(images)} {role} images; name the classes of both parts alike")
    if len(known) == len(images):
        return images
    log.info("%d of %d %s images have no label and are left out", len(images) - len(known), len(images), role)
    return images.take(known)


@dataclass(frozen=True)
class _LabelledSplit:
    """The labelled images on which one or several encoders are measured."""

    train: Images
    test: Images
    options: dict[str, Any]
    """How images are encoded: batch_size, num_workers, progress."""

    def __len__(self) -> int:
        return len(self.train) + len(self.test)

    def encode(self, encoder: SparseEncoder, with_pixels: bool = False) -> tuple[dict[str, tuple[Any, Any]], Array, Array]:
        """Training and test rows of z (sparse), of features (dense) and perhaps of raw pixels (uint8), and the labels of both."""
        if len(self) * encoder.config.features > MOST_FEATURES:
            size = 4e-9 * len(self) * encoder.config.features
            log.warning("the features of %d images take %.1f GB, and probes about three times as much", len(self), size)
        train, test = (
            encode_sparse(encoder, images, role, with_pixels=with_pixels, **self.options)
            for role, images in (("training", self.train), ("test", self.test))
        )
        spaces: dict[str, tuple[Any, Any]] = {"z": (train.z, test.z), "features": (train.features, test.features)}
        return spaces | ({"pixels": (train.pixels, test.pixels)} if with_pixels else {}), train.labels, test.labels

    def compare(
        self, name: str, other: SparseEncoder, names: tuple[str, ...], ours: dict[str, Scores], labels: tuple[Array, Array],
        protocol: Protocol, bar: ProbeBar,
    ) -> dict[str, Any]:  # fmt: skip
        """Entry of "against" in a report: another encoder measured on the same images, and the differences to it.

        Args:
            name, other: the other encoder.
            names: its representations to measure.
            ours: scores of the evaluated encoder.
            labels: of the training and test images that the evaluated encoder could read.
            protocol: of both.
            bar: progress bar.
        """
        spaces, y, test_y = self.encode(other)
        if not (np.array_equal(y, labels[0]) and np.array_equal(test_y, labels[1])):
            raise DataError("evaluation: the encoders that are compared could not read the same images")
        theirs = {space: measure(spaces[space][0], y, spaces[space][1], test_y, protocol, bar, f"{space} of {name}") for space in names}
        entry: dict[str, Any] = {"l0": spaces["z"][1].l0} if "z" in names else {}
        for space, scores in theirs.items():
            entry |= scores.flat(space)
        return entry | {"differences": _differences(ours, theirs)}


def _other_encoder(name: str, encoder: SparseEncoder) -> tuple[SparseEncoder, tuple[str, ...]]:
    """An encoder to compare with, and the names of its representations that are worth measuring."""
    if name == "random":
        with rng.seeded(0, "against-random"):
            return fresh_copy(encoder).to(encoder.device), ("z", "features")
    if ModelSource.parse(name).timm:  # its projector has fresh weights, so z is left out
        return create_encoder(name, dim=1, hidden_dim=1, pretrained=True).to(encoder.device), ("features",)
    return load_encoder(name, device=str(encoder.device)), ("z", "features")


def _differences(ours: dict[str, Scores], theirs: dict[str, Scores]) -> list[dict[str, Any]]:
    """z and features, each minus the other's representation of that name, or minus the first one it has."""
    rows = []
    for space in ("z", "features"):
        minus = space if space in theirs else next(iter(theirs))
        for name in ours[space].per_image:
            interval = paired_difference(ours[space].per_image[name], theirs[minus].per_image[name])
            rows.append({"measure": name, "space": space, "minus": minus, **interval})
    return rows


def check_budgets(asked: Sequence[int] | str, dim: int) -> list[int]:
    """Numbers of active dimensions, rising and without repetition; "auto" is 1, 2, 4, ... up to 64 or D.

    Raises:
        UsageError: a number outside 1 .. D, or another word than "auto".

    Example:
        >>> check_budgets("auto", 20), check_budgets([8, 4], 20)
        ([1, 2, 4, 8, 16], [4, 8])
    """
    if asked == "auto":
        return [2**i for i in range(7) if 2**i <= dim]
    if isinstance(asked, str):
        raise UsageError(f"budgets: expected auto or numbers such as 4,8,16, got '{asked}'")
    for active in asked:
        if not 1 <= active <= dim:
            raise UsageError(f"budgets: expected numbers of active dimensions in 1 .. {dim}, the width of z, got {active}")
    return sorted(set(asked))


def budget_curve(
    z: SparseEmbeddings, test_z: SparseEmbeddings, y: Array, test_y: Array, protocol: Protocol, budgets: Sequence[int],
    bar: ProbeBar | None = None,
) -> dict[str, list[Any]]:  # fmt: skip
    """Measures of z when only the largest values of each image are kept, in training and in test images.

    Returns:
        Lists of equal length: active, and for each measure its mean and, as measure_std, its spread.
    """
    curve: dict[str, list[Any]] = {"active": list(budgets)}
    for active in budgets:
        scores = measure(z.top_k(active), y, test_z.top_k(active), test_y, protocol, bar, f"z with {active} active")
        for name, value in scores.mean.items():
            curve.setdefault(name, []).append(value)
            if name in scores.spread:
                curve.setdefault(f"{name}_std", []).append(scores.spread[name])
    return curve


def with_results(info: dict[str, Any], report: dict[str, Any], data: str) -> dict[str, Any]:
    """An encoder's `config.info` with the report of `evaluate`, for its card; figures are rounded to four digits.

    Args:
        info: `config.info` of the encoder.
        report: what `evaluate` returned.
        data: name of the data set.
    """

    def rounded(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: rounded(v) for k, v in value.items()}
        return [rounded(v) for v in value] if isinstance(value, list) else round(value, 4) if isinstance(value, float) else value

    if "against" in report:
        report = {**report, "against": {ModelSource.parse(name).label: entry for name, entry in report["against"].items()}}
    density = {**info.get("density", {}), "eval": round(report["l0"], 4), "eval_images": f"test images of {data}"}
    return {**info, "results": rounded({**report, "data": data}), "density": density}
