"""Pretraining by Rectified LpJEPA, as a task of `rlpjepa_zoo.training.trainer`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from ..config.pretrain import Recipe
from ..core import distributed, rng
from ..data.batch import Batch
from ..data.loader import rows_loader
from ..data.sources import Source
from ..errors import NonFiniteError, RecipeError
from ..evaluation.metrics import alarms, batch_metrics
from ..evaluation.training_eval import during_training, has_labels
from ..models.encoder import SparseEncoder
from . import publisher
from .feature_cache import cache_views
from .online_probes import EncoderWithProbes, Result, build_encoder, build_objective
from .optim import make_optimizer
from .task import Loss, Task, agree
from .trainer import run

__all__ = ["train"]

_ALL_ZERO = 3
"""Logged steps in a row with nothing but zeros in z, after which a run is over: no gradient reaches a rectified zero."""


def train(recipe: Recipe, out: str | Path, resume: bool = False, allow_change: Sequence[str] = (), progress: bool = True) -> Path:
    """Pretrain an encoder; returns the folder it is published in (`out/encoder`).

    Args:
        recipe: the run.
        out: folder of the run; one run at a time may hold it.
        resume: go on from the newest checkpoint that verifies; from the start if there is none.
        allow_change: dotted recipe keys that may differ from the run that is resumed; ``data`` for other images under the same name.
        progress: show a progress bar on stderr.

    Raises:
        UsageError: the folder is in use, or holds a run and `resume` is not set.
        RecipeError: the recipe differs from that of the run, or does not fit the processes or device.
        DataError, ModelError, OutputError: as their names say.
        NonFiniteError: loss or gradient was not finite in more than `train.max_skipped` steps in a row, or every embedding became zero.
        StoppedBySignal: SIGTERM or SIGINT; a checkpoint was saved.
    """
    return run(_Pretraining(recipe), Path(out), resume, allow_change, progress)


class _Pretraining(Task):
    """Views of an image agree, and their embeddings have the law of the target; linear probes watch."""

    name = "encoder"
    best = {"knn_z": True, "knn_features": True, "excess": False}
    calls = ("both",)
    lighter = ", objective.chunk"

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.zeros = 0

    @property
    def every_epochs(self) -> int:
        return self.recipe.probe.every_epochs

    def accept(self, source: Source) -> Source:
        best = self.recipe.train.best
        if best in ("knn_z", "knn_features") and not has_labels(source):
            raise RecipeError(f"train.best: {best} needs evaluation images with labels; use excess, or set it to null")
        return source

    def build(self) -> SparseEncoder:
        return build_encoder(self.recipe)

    def wrap(self, core: SparseEncoder, source: Source) -> EncoderWithProbes:
        self.objective = build_objective(self.recipe)
        with rng.seeded(self.recipe.seed, "init-probes"):
            return EncoderWithProbes(core, source.classes if self.recipe.probe.online else 0)

    def ready(
        self, core: SparseEncoder, source: Source, autocast: Callable[[], AbstractContextManager[Any]], memory: Any, progress: bool
    ) -> list[tuple[int, str]]:
        if self.recipe.encoder.cached_views is None:
            return []
        if any(hasattr(p, "full_tensor") for p in core.parameters()):
            raise RecipeError("encoder.cached_views: not for sharded weights; use data parallelism, or set it to null")
        self.cached, bad = cache_views(core, source, self.recipe, autocast, memory, progress)
        return bad

    def loader(self, source: Source, steps: range, finish: bool) -> DataLoader[Batch]:
        if self.recipe.encoder.cached_views is None:
            return super().loader(source, steps, finish)
        return rows_loader(self.cached, source.length, self.recipe, steps, distributed.rank(), distributed.world_size())

    def optimizer(self, core: SparseEncoder, module: Any) -> torch.optim.Optimizer:
        return make_optimizer(core, module.probes, self.recipe)

    def loss(self, output: Result, step: int) -> Loss:
        terms = self.objective(output.z, step)
        return Loss(terms.total + output.probe_loss, {"loss": terms.total, **terms.parts})

    def numbers(self, loss: Loss, output: Result) -> dict[str, float]:
        parts = torch.stack([*(value.detach() for value in loss.terms.values()), output.probe_loss.detach()]).float()
        numbers = distributed.mean_over_ranks(torch.cat([parts, output.probe_right.detach().float()]))
        terms = dict(zip(loss.terms, numbers.tolist(), strict=False))
        probe_loss, *right = numbers.tolist()[len(terms) :]
        row = terms | self.objective.monitor(terms)
        row |= batch_metrics(output.z.detach().flatten(0, 1))
        self.device = output.z.device
        return row | dict(zip(("probe_features", "probe_z"), right, strict=False)) | ({"probe_loss": probe_loss} if right else {})

    def noted(self, step: int, row: Mapping[str, float]) -> dict[str, float]:
        self.zeros = self.zeros + 1 if agree(self.device, row["l0"])[0] == 0 else 0
        if self.zeros >= _ALL_ZERO:
            raise NonFiniteError(
                f"step {step}: every embedding is zero, and a rectified zero has no gradient to leave it by; "
                f"lower optim.lr = {self.recipe.optim.lr:g} or raise the density of the target; the last checkpoint is from before"
            )
        return {"l0_train": row["l0"], "excess": row["excess"]} if math.isfinite(row["l0"] + row["excess"]) else {}

    def brief(self, row: Mapping[str, float], metrics: Mapping[str, float]) -> dict[str, str]:
        knn = {"knn": f"{metrics['knn_features']:.3f}"} if "knn_features" in metrics else {}
        return {"loss": f"{row['loss']:.3f}", "l0": f"{row['l0']:.3f}", **knn}

    def measure(self, shown: SparseEncoder, source: Source, autocast: Callable[[], AbstractContextManager[Any]]) -> dict[str, float]:
        return during_training(shown, source, self.recipe, autocast)

    def alarms(self, metrics: Mapping[str, float], still_training: bool = False) -> list[str]:
        return alarms(metrics, self.recipe.target.density_in_theory(), still_training)

    def chosen(self, metric: str) -> str:
        return "chosen by the excess of training batches" if metric == "excess" else super().chosen(metric)

    def aim(self, source: Source) -> str:
        return f"{self.recipe.encoder.backbone} + projector, {self.objective.describe()}"

    def describe(
        self, core: SparseEncoder, source: Source, metrics: Mapping[str, float], training: Mapping[str, Any], log_file: Path
    ) -> dict[str, Any]:
        return publisher.describe(self.recipe, source, core, metrics, training, log_file)

    def state(self) -> dict[str, Any]:
        return {"zeros": self.zeros, **self.objective.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.zeros = state["zeros"]
        self.objective.load_state(state)
