"""Short training runs: recipes of a few steps, their logs, and signals or non-finite numbers at a chosen step."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from rlpjepa_zoo.config.pretrain import Recipe
from rlpjepa_zoo.errors import StoppedBySignal
from rlpjepa_zoo.models.pretrained import load_encoder
from rlpjepa_zoo.objectives.rectified_lpjepa import RectifiedLpJEPALoss
from rlpjepa_zoo.training import trainer
from rlpjepa_zoo.training.tasks.pretrain import train
from rlpjepa_zoo.training.trainer import Trainer

TINY = [
    "data.limit=96", "encoder.backbone=test_resnet", "encoder.dim=32", "encoder.hidden_dim=32", "encoder.projector_depth=2",
    "objective.num_directions=64", "train.batch_size=32", "train.epochs=4", "train.num_workers=0", "train.log_every=1", "train.precision=no",
    "optim.lr=0.02", "optim.warmup_epochs=0.5", "probe.every_epochs=2", "probe.bank=90", "probe.eval_images=60", "train.checkpoint_minutes=1000",
    "target.hold=false", "reconstruction=null",
]  # fmt: skip

CACHED = ["encoder.freeze_backbone=true", "encoder.cached_views=3", "data.limit=160", "train.batch_size=64"]
"""Further overrides: a frozen backbone whose features are kept, eight steps."""


def tiny(*more: str) -> Recipe:
    """Four epochs of three steps on digits, of the objective alone."""
    return Recipe.load("digits", [*TINY, *more])


def of_folder(path: Path, *more: str) -> Recipe:
    """The same on a folder of images."""
    return Recipe.load(
        "folder-resnet18", [f"data.path={path}", "data.image_size=32", *[t for t in TINY if not t.startswith("data.")], *more]
    )


def rows(run: Path) -> list[dict]:
    """Rows of metrics.jsonl without what depends on the clock."""
    read = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in read]


def codes(folder: Path) -> torch.Tensor:
    """Embeddings of two fixed images by a published encoder."""
    return load_encoder(folder)(torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)).detach()


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGTERM) -> None:
    """Send this process a signal while step `step` is running."""
    original = trainer.set_learning_rates

    def patched(optimizer, options, at, total, per_epoch):  # type: ignore[no-untyped-def]
        if at == step - 1:
            os.kill(os.getpid(), number)
        return original(optimizer, options, at, total, per_epoch)

    monkeypatch.setattr(trainer, "set_learning_rates", patched)


def train_in_two_parts(monkeypatch: pytest.MonkeyPatch, recipe: Recipe, run: Path, step: int) -> None:
    """Train a run that is stopped after a step, and resume it."""
    with monkeypatch.context() as patch:
        stop_after(patch, step)
        with pytest.raises(StoppedBySignal):
            train(recipe, run, progress=False)
    train(recipe, run, resume=True, progress=False)


def wait_for_step(run: Path, step: int) -> None:
    """Wait until a run has saved a checkpoint of this step or a later one."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        home = run / "checkpoints"
        if home.is_dir() and any(int(p.name[5:]) >= step for p in home.iterdir() if p.name.startswith("step-")):
            return
        time.sleep(0.02)
    pytest.fail(f"no checkpoint of step {step} in time")


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int], where: str = "loss") -> None:
    """Make the loss infinite, or one pixel NaN, at some steps (counted from 1)."""
    if where == "loss":
        original = RectifiedLpJEPALoss.__call__

        def broken(self: Any, z: torch.Tensor, step: int) -> Any:
            terms = original(self, z, step)
            return terms._replace(total=terms.total * float("inf")) if step + 1 in steps else terms

        monkeypatch.setattr(RectifiedLpJEPALoss, "__call__", broken)
        return
    original_forward = Trainer._forward

    def forward(self: Any, batch: Any) -> Any:
        if self.step + 1 in steps:
            batch.images[0][0, 0, 0, 0, 0] = float("nan")
        return original_forward(self, batch)

    monkeypatch.setattr(Trainer, "_forward", forward)
