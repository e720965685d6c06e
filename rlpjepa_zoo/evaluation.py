"""Frozen evaluation: kNN, linear probe and one-shot accuracy of embeddings, of dense features and of raw pixels, on one split."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from . import collectives, streams
from .encoder import SparseEncoder
from .errors import DataError
from .images import Images
from .metrics import dead, l0, l1
from .preprocess import batched, ready
from .recipe import Recipe
from .sources import Source
from .sparse import SparseEmbeddings

log = logging.getLogger("rlpjepa_zoo")

__all__ = [
    "accuracy_table",
    "budget_curve",
    "during_training",
    "labelled",
    "encode",
    "evaluate",
    "knn_accuracy",
    "linear_accuracy",
    "one_shot_accuracy",
    "with_results",
]


@torch.no_grad()
def encode(
    encoder: SparseEncoder, images: Images, batch_size: int = 256, num_workers: int = 0, progress: bool = False, none_is_fine: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Features (n, F), embeddings z (n, D) and labels (n,) of all readable images, float32 on the CPU; evaluation mode, put back afterwards.
    DataError when none can be read, unless `none_is_fine`."""
    features, codes, rows = [], [], []
    prepare = encoder.config.preprocess
    groups = ready(batched(range(len(images)), batch_size), images.read, prepare, num_workers)
    bar = tqdm(total=len(images), desc="encode", unit="image", disable=not progress, leave=False)
    with encoder.evaluating(), bar, closing(groups):
        for group in groups:
            bar.update(len(group.items))
            if group.good:
                out = encoder.both(prepare.normalised(group.pixels.to(encoder.device)))
                features.append(out.features.float().cpu())
                codes.append(out.z.float().cpu())
                rows += [group.items[i] for i in group.good]
    if not rows and not none_is_fine:
        raise DataError("none of the images can be read")
    if not rows:
        return torch.zeros(0, encoder.config.features), torch.zeros(0, encoder.config.dim), torch.zeros(0, dtype=torch.long)
    labels = np.full(len(rows), -1) if images.labels is None else images.labels[rows]
    return torch.cat(features), torch.cat(codes), torch.from_numpy(np.asarray(labels))


def pixels(encoder: SparseEncoder, images: Images) -> tuple[Tensor, Tensor]:
    """Raw pixels in 0..1, resized and cropped like the input, as flat rows (n, 3 H W), and labels: the baseline every embedding should beat."""
    groups = list(ready(batched(range(len(images)), 256), images.read, encoder.config.preprocess))
    rows = [group.items[i] for group in groups for i in group.good]
    labels = np.full(len(rows), -1) if images.labels is None else images.labels[rows]
    return torch.cat([group.pixels for group in groups]).permute(0, 3, 1, 2).flatten(1).float() / 255, torch.from_numpy(np.asarray(labels))


def _labelled(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x[y >= 0], y[y >= 0]


def _unit(x: Tensor) -> Tensor:
    """Rows of unit length; a row of zeros stays zero, so its cosine with anything is 0."""
    return x / x.norm(dim=1, keepdim=True).clamp(min=1e-12)


@torch.no_grad()
def knn_accuracy(
    bank: Tensor, bank_labels: Tensor, x: Tensor, labels: Tensor, k: int = 20, temperature: float = 0.07, leave_one_out: bool = False
) -> float:
    """Top-1 accuracy of a vote of the k nearest by cosine, weighted by exp(cosine / T); labels < 0 are left out.

    Args:
        bank, bank_labels: (m, C), (m,) voters.
        x, labels: (n, C), (n,) queries.
        k: voters, at most m.
        temperature: T > 0.
        leave_one_out: the queries are the bank itself; nobody votes for itself.
    """
    bank, bank_labels = _labelled(bank.float(), bank_labels)
    x, labels = _labelled(x.float(), labels)
    if not len(bank) or not len(x):
        raise DataError("kNN: no labelled images")
    bank, x = _unit(bank), _unit(x)
    k = min(k, len(bank) - int(leave_one_out))
    if k < 1:
        raise DataError("kNN: a single labelled image has nobody to vote for it")
    classes = int(max(bank_labels.max(), labels.max())) + 1
    right = 0
    for start in range(0, len(x), 1024):
        cosine = x[start : start + 1024] @ bank.T
        if leave_one_out:
            cosine[torch.arange(len(cosine)), torch.arange(start, start + len(cosine))] = -torch.inf
        near, which = cosine.topk(k, dim=1)
        votes = torch.zeros(len(cosine), classes).scatter_add_(1, bank_labels[which], ((near - near[:, :1]) / temperature).exp())
        right += int((votes.argmax(1) == labels[start : start + 1024]).sum())
    return right / len(x)


def linear_accuracy(x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor, c: float = 1.0, max_iter: int = 300) -> float:
    """Test accuracy of multinomial logistic regression (scikit-learn, L2 with inverse strength c) on features divided by their overall
    standard deviation on the training set; fixed, so that it is not tuned on the test images."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    (x, y), (test_x, test_y) = _labelled(x.float(), y), _labelled(test_x.float(), test_y)
    if len(y.unique()) < 2 or not len(test_y):
        raise DataError("linear probe: needs labelled images of at least two classes for training and some for testing")
    scale = (x - x.mean(0)).square().mean().sqrt().clamp(min=1e-12)
    probe = LogisticRegression(C=c, max_iter=max_iter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        probe.fit((x / scale).numpy(), y.numpy())
    return float(probe.score((test_x / scale).numpy(), test_y.numpy()))


def one_shot_accuracy(x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor, draws: int = 100, seed: int = 0) -> tuple[float, float]:
    """Accuracy of the nearest (cosine) of one random example per class: mean and standard deviation over draws.

    The same draws are made whatever x is, so representations of one data set compare pairwise.
    """
    (x, y), (test_x, test_y) = _labelled(x.float(), y), _labelled(test_x.float(), test_y)
    if not len(y) or not len(test_y):
        raise DataError("1-shot: no labelled images")
    rows = [torch.nonzero(y == c).flatten() for c in y.unique()]
    cosine = _unit(test_x) @ _unit(x).T
    scores = []
    for draw in range(draws):
        source = streams.generator(seed, "one-shot", draw)
        chosen = torch.stack([r[torch.randint(len(r), (1,), generator=source)] for r in rows]).flatten()
        scores.append(float((y[chosen][cosine[:, chosen].argmax(1)] == test_y).float().mean()))
    return float(np.mean(scores)), float(np.std(scores, ddof=1)) if draws > 1 else 0.0


def evaluate(
    encoder: SparseEncoder, train: Images, test: Images, batch_size: int = 256, num_workers: int = 0, k: int = 20, temperature: float = 0.07,
    progress: bool = False, with_pixels: bool = True, limit: int | None = None, curve: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """kNN, linear and one-shot accuracy of z, of features and of raw pixels, and the density of z.

    Args:
        encoder: frozen; used in evaluation mode.
        train, test: labelled images; the first fits and votes, the second is scored.
        limit: use at most this many training images, drawn at random.
        curve: measure z also with only its 1, 2, 4, ... largest values kept.

    Returns:
        JSON-able: n_train, n_test, protocol, l0, l1, dead, for each of z, features, pixels the keys knn_*, linear_*, one_shot_*, one_shot_std_*,
        and curve: lists active, knn, linear, one_shot.

    Raises:
        DataError: no labels.
    """
    if train.labels is None or test.labels is None:
        raise DataError("evaluation needs labels; put the images of each class into a folder of its own, or name data.label_column")
    if limit is not None and limit < len(train):
        train = train.take(torch.randperm(len(train), generator=streams.generator(0, "evaluate"))[:limit].numpy())
    features, z, y = encode(encoder, train, batch_size, num_workers, progress)
    test_features, test_z, test_y = encode(encoder, test, batch_size, num_workers, progress)
    spaces = {"z": (z, test_z), "features": (features, test_features)}
    if with_pixels and (len(y) + len(test_y)) * 3 * math.prod(encoder.config.preprocess.size) > 1 << 30:
        log.warning("raw pixels left out: more than 4 GB; measure them on fewer images with limit")
    elif with_pixels:
        spaces["pixels"] = (pixels(encoder, train)[0], pixels(encoder, test)[0])
    k = min(k, len(y))
    report: dict[str, Any] = {
        "n_train": len(y), "n_test": len(test_y), "l0": float(l0(test_z)), "l1": float(l1(test_z)), "dead": float(dead(test_z)),
        "protocol": f"kNN: k = {k}, cosine, T = {temperature:g}; linear: logistic regression, C = 1; 1-shot: nearest by cosine of one image "
        "per class, mean of 100 draws (± their standard deviation); encoder frozen, one seed",
    }  # fmt: skip
    for name, (a, b) in spaces.items():
        report[f"knn_{name}"] = knn_accuracy(a, y, b, test_y, k, temperature)
        report[f"linear_{name}"] = linear_accuracy(a, y, b, test_y)
        report[f"one_shot_{name}"], report[f"one_shot_std_{name}"] = one_shot_accuracy(a, y, b, test_y)
    if curve:
        report["curve"] = budget_curve(z, y, test_z, test_y, k, temperature)
    return report


def budget_curve(z: Tensor, y: Tensor, test_z: Tensor, test_y: Tensor, k: int = 20, temperature: float = 0.07) -> dict[str, list[Any]]:
    """Accuracy when only the largest values of each embedding are kept: 1, 2, 4, ... up to 64 or D.

    Returns:
        Lists of equal length: active, knn, linear, one_shot.
    """
    found: dict[str, list[Any]] = {"active": [2**i for i in range(7) if 2**i <= z.shape[1]], "knn": [], "linear": [], "one_shot": []}
    for active in found["active"]:
        a, b = (torch.from_numpy(SparseEmbeddings.from_dense(x).top_k(active).to_dense()) for x in (z, test_z))
        found["knn"].append(knn_accuracy(a, y, b, test_y, k, temperature))
        found["linear"].append(linear_accuracy(a, y, b, test_y))
        found["one_shot"].append(one_shot_accuracy(a, y, b, test_y)[0])
    return found


def labelled(source: Source) -> bool:
    """Whether `during_training` can measure kNN."""
    voting = source.train if isinstance(source.train, Images) else source.eval
    scored = source.eval if source.eval is not None else voting
    return all(part is not None and part.labels is not None and bool((part.labels >= 0).any()) for part in (voting, scored))


@torch.no_grad()
def during_training(
    encoder: SparseEncoder, source: Source, recipe: Recipe, autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> dict[str, float]:
    """Density in evaluation mode and, where labels exist, kNN on features and z; every rank encodes its share of the rows.

    Args:
        encoder, source, recipe: of the run.
        autocast: a context for the precision of the forward passes.

    Returns:
        l0_eval, l1_eval, dead_eval, knn_features, knn_z; nothing when a stream has no evaluation images.
    """
    probe, batch = recipe.probe, max(64, recipe.train.batch_size // 2)

    def some(images: Images, most: int, purpose: str) -> Images:
        if len(images) <= most:
            return images
        return images.take(torch.randperm(len(images), generator=streams.generator(recipe.seed, purpose))[:most].sort().values.numpy())

    def codes(images: Images) -> tuple[Tensor, Tensor, Tensor]:
        mine = images.take(np.arange(collectives.rank(), len(images), collectives.world_size()))
        with autocast():
            parts = encode(encoder, mine, batch, recipe.train.num_workers, none_is_fine=True)  # on this rank
        features, z, labels = (collectives.gather_rows(part.to(encoder.device)).cpu() for part in parts)
        if not len(z):
            raise DataError("none of the images for evaluation can be read")
        return features, z, labels

    if not isinstance(source.train, Images):
        bank, held_out = source.eval and some(source.eval, probe.eval_images, "eval"), None
    else:
        bank, held_out = some(source.train, probe.bank, "bank"), source.eval
    if bank is None:
        return {}
    features, z, y = codes(bank)
    others = None if held_out is None else codes(some(held_out, probe.eval_images, "eval"))
    seen = z if others is None else others[1]
    found = {"l0_eval": float(l0(seen)), "l1_eval": float(l1(seen)), "dead_eval": float(dead(seen))}
    test_features, test_z, test_y = (features, z, y) if others is None else others
    if int((y >= 0).sum()) > 1 and bool((test_y >= 0).any()):
        for name, a, b in (("features", features, test_features), ("z", z, test_z)):
            found[f"knn_{name}"] = knn_accuracy(a, y, b, test_y, probe.knn_k, probe.knn_temperature, leave_one_out=others is None)
    return found


def with_results(info: dict[str, Any], report: dict[str, Any], data: str) -> dict[str, Any]:
    """An encoder's `config.info` with what `evaluate` found on `data`, for its card; figures are rounded to four digits."""

    def rounded(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: rounded(v) for k, v in value.items()}
        return [rounded(v) for v in value] if isinstance(value, list) else round(value, 4) if isinstance(value, float) else value

    density = {**info.get("density", {}), "eval": round(report["l0"], 4), "eval_images": f"test images of {data}"}
    return {**info, "results": rounded({**report, "data": data}), "density": density}


def accuracy_table(report: dict[str, Any]) -> str:
    """kNN, linear and 1-shot accuracy of each representation and how they were measured, as text."""
    lines = [f"{'':<16}{'kNN':>9}{'linear':>9}{'1-shot':>9}"]
    for name, label in (("z", "z (sparse)"), ("features", "features (dense)"), ("pixels", "raw pixels")):
        if f"knn_{name}" in report:
            lines.append(f"{label:<16}" + "".join(f"{report[f'{kind}_{name}']:>9.3f}" for kind in ("knn", "linear", "one_shot")))
    return "\n".join([*lines, f"{report['n_train']} training and {report['n_test']} test images; {report['protocol']}"])
