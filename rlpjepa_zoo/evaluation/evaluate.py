"""Frozen evaluation of an encoder on one split: its embeddings, its dense features and raw pixels, by the protocols of `probes`."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..config.pretrain import Recipe
from ..core import distributed, rng
from ..data.images import Images
from ..data.preprocess import batched, ready
from ..data.sources import Source
from ..errors import DataError, NonFiniteError, UsageError
from ..models.encoder import SparseEncoder
from ..models.factory import create_encoder
from ..models.pretrained import load_encoder
from ..sparse.embeddings import SparseEmbeddings
from .metrics import dead, l0, l1
from .probes import Array, knn_accuracy, paired
from .protocol import DEFAULT_PROBES, Protocol, Scores, accuracy_table, measure

log = logging.getLogger("rlpjepa_zoo")

__all__ = [
    "accuracy_table",
    "budget_curve",
    "checked_budgets",
    "during_training",
    "labelled",
    "encode",
    "evaluate",
    "knn_accuracy",
    "pixels",
    "with_results",
]


PART = 1 << 26
"""Numbers of z that are dense at a time (256 MB)."""


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


def evaluate(
    encoder: SparseEncoder, train: Images, test: Images, batch_size: int = 256, num_workers: int = 0, k: int = 20, temperature: float = 0.07,
    progress: bool = False, with_pixels: bool = True, limit: int | None = None, *, probes: Sequence[str] | str = DEFAULT_PROBES,
    budgets: Sequence[int] | str = (), shots: Sequence[int] = (1, 5, 10), seeds: int = 3, queries: int = 2000, against: Sequence[str] = (),
    note: str = "",
) -> dict[str, Any]:  # fmt: skip
    """Measure the sparse embedding z, the dense features and raw pixels of a frozen encoder on one split, and the density of z.

    Args:
        encoder: frozen; used in evaluation mode.
        train, test: labelled images; the first fits and votes, the second is scored. Rows with a label < 0 take no part.
        batch_size, num_workers: of encoding.
        k, temperature: of the kNN vote.
        with_pixels: measure raw pixels too.
        limit: use at most this many training images, drawn at random.
        probes: of `scores.PROBES`: knn, linear, few_shot, mlp, retrieval, clustering; or "all".
        budgets: measure z also with only this many largest values of each image kept; "auto" is 1, 2, 4, ... up to 64 or D.
        shots: images per class of few_shot.
        seeds: repetitions of what is random.
        queries: test images that search in retrieval, at most.
        against: what to compare with on the same images: "pixels", "random" (the same architecture, fresh weights), "timm:NAME" (pretrained
            features), or any source of `load_encoder`; each with its own preprocessing.
        note: how the split was made, for the protocol.

    Returns:
        JSON-able. Always: n_train, n_test, l0, l1, dead (of z on the test images), seeds, protocol (text). For each space of z, features, pixels and each
        measure of knn, linear, one_shot, shot_5, shot_10, mlp, map, precision_at_1, precision_at_10, nmi that was asked for: measure_space, a
        mean, and measure_std_space, its standard deviation, where there are repetitions: over draws for few-shot, over seeds for the
        others (kNN and retrieval are deterministic). Where they apply:
        chosen_c: space -> C of the linear probe for each seed; skipped: measure -> why it was left out;
        curve: lists of equal length, active and measures and measure_std of z;
        against: name -> l0, measures as above, and differences: a list of measure, space, minus (the other's space), difference, low,
        high (95 % paired bootstrap over test images; of map over queries), n; of every measure but nmi and the precisions.

    Raises:
        DataError: no labels, or the other encoders cannot read the same images.
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
    protocol = Protocol((probes,) if isinstance(probes, str) else tuple(probes), tuple(shots), seeds, k, temperature, queries=queries)
    grid = checked_budgets(budgets, encoder.config.dim)
    if "pixels" in against and not with_pixels:
        raise UsageError("against: pixels are to be compared with but not measured; leave one of the two out")
    if train.labels is None or test.labels is None:
        raise DataError("evaluation needs labels; put the images of each class into a folder of its own, or name data.label_column")
    train, test = _with_labels(train, "training"), _with_labels(test, "test")
    others = {name: _other(name, encoder) for name in dict.fromkeys(against) if name != "pixels"}
    if limit is not None and limit < len(train):
        note = "; ".join(part for part in (f"{limit} of {len(train)} training images, drawn at random", note) if part)
        train = train.take(torch.randperm(len(train), generator=rng.generator(0, "evaluate"))[:limit].numpy())
    task = _Task(train, test, protocol, {"batch_size": batch_size, "num_workers": num_workers, "progress": progress})
    spaces, y, test_y = task.encoded(encoder)
    report: dict[str, Any] = _density(spaces["z"][1]) | {"n_train": len(y), "n_test": len(test_y), "seeds": seeds}
    skipped = {}
    if with_pixels and (len(y) + len(test_y)) * 3 * math.prod(encoder.config.preprocess.size) > 1 << 30:
        skipped["pixels"] = "more than 4 GB of raw pixels; measure them on fewer images with limit"
        log.warning("raw pixels left out: %s", skipped["pixels"])
    elif with_pixels:
        spaces["pixels"] = (pixels(encoder, train)[0], pixels(encoder, test)[0])
    scores = {space: measure(a, y, b, test_y, protocol) for space, (a, b) in spaces.items()}
    for space, found in scores.items():
        report |= found.flat(space)
    said = [protocol.describe(len(y), len(test_y), scores["z"].skipped), *([note] if note else []), "encoder frozen, one training run"]
    report |= {"protocol": "; ".join(said), "skipped": skipped | scores["z"].skipped}
    report["chosen_c"] = {space: found.chosen_c for space, found in scores.items() if found.chosen_c}
    if grid:
        report["curve"] = budget_curve(*spaces["z"], y, test_y, protocol, grid)
    report["against"] = {name: task.compared(other, scores, (y, test_y)) for name, other in others.items()}
    if "pixels" in against and "pixels" in scores:
        report["against"]["pixels"] = {"differences": _differences(scores, {"pixels": scores["pixels"]})}
    return {key: value for key, value in report.items() if value not in ({}, [])}


def _with_labels(images: Images, part: str) -> Images:
    """Those that have a label: the others can neither vote nor be scored, and are not counted."""
    known = np.flatnonzero(images.labels >= 0) if images.labels is not None else np.zeros(0, np.int64)
    if not len(known):
        raise DataError(f"evaluation: no labelled images among the {len(images)} {part} images; name the classes of both parts alike")
    if len(known) == len(images):
        return images
    log.info("%d of %d %s images have no label and are left out", len(images) - len(known), len(images), part)
    return images.take(known)


@dataclass(frozen=True)
class _Task:
    """The images on which several encoders are measured, and how."""

    train: Images
    test: Images
    protocol: Protocol
    options: dict[str, Any]

    def encoded(self, encoder: SparseEncoder) -> tuple[dict[str, tuple[Any, Any]], Array, Array]:
        """Training and test rows of z (sparse) and of features (dense), and the labels of both."""
        (features, z, y), (test_features, test_z, test_y) = (_encoded(encoder, part, self.options) for part in (self.train, self.test))
        return {"z": (z, test_z), "features": (features, test_features)}, y, test_y

    def compared(
        self, other: tuple[SparseEncoder, tuple[str, ...]], ours: dict[str, Scores], labels: tuple[Array, Array]
    ) -> dict[str, Any]:
        """What `evaluate` reports of another encoder, measured on the same images."""
        encoder, names = other
        spaces, y, test_y = self.encoded(encoder)
        if not (np.array_equal(y, labels[0]) and np.array_equal(test_y, labels[1])):
            raise DataError("evaluation: the encoders that are compared could not read the same images")
        theirs = {name: measure(spaces[name][0], y, spaces[name][1], test_y, self.protocol) for name in names}
        found: dict[str, Any] = {"l0": spaces["z"][1].l0} if "z" in names else {}
        for name, scores in theirs.items():
            found |= scores.flat(name)
        return found | {"differences": _differences(ours, theirs)}


def _encoded(encoder: SparseEncoder, images: Images, options: dict[str, Any]) -> tuple[Array, SparseEmbeddings, Array]:
    """`encode` in parts, so that z is never dense as a whole."""
    size = max(1, PART // encoder.config.dim)
    parts = []
    for start in range(0, max(len(images), 1), size):
        features, z, y = encode(encoder, images.take(range(start, min(start + size, len(images)))), **options, none_is_fine=True)
        if not torch.isfinite(z).all() or not torch.isfinite(features).all():
            raise NonFiniteError("the encoder gave NaN or infinity; its weights are damaged or diverged")
        parts.append((features.numpy(), SparseEmbeddings.from_dense(z), y.numpy()))
    features, z, y = zip(*parts, strict=True)
    found = np.concatenate(features), SparseEmbeddings.concat(z), np.concatenate(y)
    if not len(found[2]):
        raise DataError("none of the images can be read")
    return found


def _density(z: SparseEmbeddings) -> dict[str, float]:
    """l0, l1 and dead as `rlpjepa_zoo.evaluation.metrics` defines them, of sparse rows."""
    n, dim = z.shape
    of_row, values = np.repeat(np.arange(n), np.diff(z.indptr)), z.values.astype(np.float64)
    sums, squares = np.bincount(of_row, values, n), np.bincount(of_row, values**2, n)
    effective = sums**2 / np.where(squares > 0, squares, 1)
    return {"l0": z.l0, "l1": float(effective.mean() / dim), "dead": 1 - len(np.unique(z.indices)) / dim}


def _other(name: str, encoder: SparseEncoder) -> tuple[SparseEncoder, tuple[str, ...]]:
    """An encoder to compare with, and which of its representations mean something."""
    config = encoder.config
    if name == "random":
        with rng.seeded(0, "against-random"):
            made = create_encoder(
                config.architecture, config.dim, config.hidden_dim, projector_depth=config.projector_depth, preprocess=config.preprocess,
                **config.model_args,
            )  # fmt: skip
        return made.to(encoder.device), ("z", "features")
    if name.startswith("timm:"):  # its projector is fresh, so only the backbone's features mean something
        return create_encoder(name.removeprefix("timm:"), dim=1, hidden_dim=1, pretrained=True).to(encoder.device), ("features",)
    return load_encoder(name, device=str(encoder.device)), ("z", "features")


def _differences(ours: dict[str, Scores], theirs: dict[str, Scores]) -> list[dict[str, Any]]:
    """z and features, each minus the other's counterpart, or minus what the other has."""
    found = []
    for space in ("z", "features"):
        minus = space if space in theirs else next(iter(theirs))
        for name in ours[space].right:
            interval = paired(ours[space].right[name], theirs[minus].right[name])
            found.append({"measure": name, "space": space, "minus": minus, **interval})
    return found


def checked_budgets(asked: Sequence[int] | str, dim: int) -> list[int]:
    """Numbers of active dimensions, rising; "auto" is 1, 2, 4, ... up to 64 or D.

    Raises:
        UsageError: not in 1 .. D.

    Example:
        >>> checked_budgets("auto", 20), checked_budgets([8, 4], 20)
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
    z: SparseEmbeddings, test_z: SparseEmbeddings, y: Array, test_y: Array, protocol: Protocol, budgets: Sequence[int]
) -> dict[str, list[Any]]:
    """Measures of z when only the largest values of each image are kept, in training and test images alike.

    Returns:
        Lists of equal length: active, and for each measure its mean and, as measure_std, its spread.
    """
    found: dict[str, list[Any]] = {"active": list(budgets)}
    for active in budgets:
        scores = measure(z.top_k(active), y, test_z.top_k(active), test_y, protocol)
        for name, value in scores.mean.items():
            found.setdefault(name, []).append(value)
            if name in scores.spread:
                found.setdefault(f"{name}_std", []).append(scores.spread[name])
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
        return images.take(torch.randperm(len(images), generator=rng.generator(recipe.seed, purpose))[:most].sort().values.numpy())

    def codes(images: Images) -> tuple[Tensor, Tensor, Tensor]:
        mine = images.take(np.arange(distributed.rank(), len(images), distributed.world_size()))
        with autocast():
            parts = encode(encoder, mine, batch, recipe.train.num_workers, none_is_fine=True)  # on this rank
        features, z, labels = (distributed.gather_rows(part.to(encoder.device)).cpu() for part in parts)
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

    if "against" in report:  # of paths the last part is enough for others
        report = {**report, "against": {_public(name): found for name, found in report["against"].items()}}
    density = {**info.get("density", {}), "eval": round(report["l0"], 4), "eval_images": f"test images of {data}"}
    return {**info, "results": rounded({**report, "data": data}), "density": density}


def _public(name: str) -> str:
    """The name of what was compared with, without folders of one machine."""
    kind, _, place = name.rpartition("local-dir:")
    if kind or name.startswith("local-dir:") or Path(name).expanduser().exists():
        return kind + Path(place or name).name
    return name
