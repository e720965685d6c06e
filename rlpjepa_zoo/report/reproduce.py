"""`rlpjepa zoo reproduce`: train an encoder of the zoo again from its recipe, and compare the losses with its log."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..config.pretrain import Recipe
from ..core.files import parse_json
from ..errors import ModelError, UsageError
from ..hub.download import resolve
from ..hub.folder import read_folder, read_recipe, verify_folder
from ..hub.format import LOG
from ..training.run_dir import read_metrics
from ..training.tasks.pretrain import train

__all__ = ["TOLERANCE", "Compared", "Reproduction", "compare", "reproduce"]

TOLERANCE = 0.05
"""Largest relative difference of a loss that counts as the same. Threads, processors and versions of torch round differently. The value
is chosen, not measured: on the machine of the log the losses are equal."""
_KEYS = ("l0_eval", "knn_z", "knn_features")
"""Measures of evaluations that are compared if both runs measured them at the same step."""


class Compared(NamedTuple):
    """A number of the published log, and the same number now."""

    step: int
    name: str
    logged: float
    now: float

    @property
    def difference(self) -> float:
        """Relative difference of a loss, absolute difference of a share; infinite if a number is not finite."""
        if not (math.isfinite(self.logged) and math.isfinite(self.now)):
            return math.inf
        return abs(self.now - self.logged) / (max(abs(self.logged), 1e-12) if self.name == "loss" else 1.0)


class Reproduction(NamedTuple):
    """Result of `reproduce`."""

    numbers: list[Compared]
    run: Path
    """Run directory."""

    @property
    def largest(self) -> Compared:
        """The loss with the largest difference."""
        return max((number for number in self.numbers if number.name == "loss"), key=lambda number: number.difference)

    @property
    def same(self) -> bool:
        """Whether every loss is within `TOLERANCE`."""
        return self.largest.difference <= TOLERANCE


def compare(published: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> list[Compared]:
    """Losses of the same steps, and measures of the evaluations after the same steps. A loss that is not finite is null in a log.

    Args:
        published, rows: rows of two logs.

    Example:
        >>> compare([{"kind": "train", "step": 5, "loss": 2.0}], [{"kind": "train", "step": 5, "loss": 2.1, "lr": 1.0}])
        [Compared(step=5, name='loss', logged=2.0, now=2.1)]
    """

    def numbers(log: Sequence[dict[str, Any]]) -> dict[tuple[int, str], float]:
        wanted = {"train": ("loss",), "eval": _KEYS}
        found = [(row["step"], name, row.get(name)) for row in log for name in wanted.get(str(row.get("kind")), ())]
        lost = [(step, name, math.nan if value is None and name == "loss" else value) for step, name, value in found]
        return {(step, name): value for step, name, value in lost if isinstance(value, int | float)}

    now = numbers(rows)
    return [Compared(*place, value, now[place]) for place, value in numbers(published).items() if place in now]


def reproduce(
    name: str, overrides: Sequence[str], steps: int | None, out: Path, resume: bool = False, progress: bool = True
) -> Reproduction:
    """Train an encoder again from its recipe, and compare with its log.

    Args:
        name: of the zoo, or any source of an encoder with a log.
        overrides: recipe keys, such as ``data.path=DIR``.
        steps: end after so many steps; None trains the whole run.
        out: run directory.
        resume: go on with the run in `out`.
        progress: show progress bars on stderr.

    Raises:
        ModelError: no recipe or no log, a log that cannot be read, or a loss of the log was not logged again.
        UsageError, RecipeError, DataError and others: as of `resolve` and `train`.
    """
    folder = resolve(name)
    published = read_folder(folder)
    verify_folder(folder, published)
    text = read_recipe(folder, published)
    if text is None or LOG not in published.files:
        raise ModelError(f"{name}: has no {'recipe.yaml' if text is None else LOG}, so there is nothing to compare with")
    for key in ("train.stop_after", "train.log_every"):
        if any(override.partition("=")[0] == key for override in overrides):
            raise UsageError(
                f"{key}: the log is compared step by step; leave it out{', and give --steps' if key == 'train.stop_after' else ''}"
            )
    rows = [parse_json(line, f"{folder / LOG}") for line in (folder / LOG).read_bytes().splitlines()]
    logged = sorted(row["step"] for row in rows if row.get("kind") == "train")
    if not logged:
        raise ModelError(f"{name}: no loss in its {LOG}, so there is nothing to compare with")
    if steps is not None and steps < logged[0]:
        raise UsageError(f"--steps {steps}: the first loss in the log of {name} is that of step {logged[0]}; give at least {logged[0]}")
    train(
        Recipe.parse(text, [*overrides, *([] if steps is None else [f"train.stop_after={steps}"])]), out, resume=resume, progress=progress
    )
    again, _ = read_metrics(out / "metrics.jsonl")
    numbers = compare(rows, again)
    missing = {step for step in logged if step <= again[-1]["step"]} - {number.step for number in numbers if number.name == "loss"}
    if missing:
        raise ModelError(
            f"{name}: the loss of step {min(missing)} is in its log and not in that of {out}; the recipe has another length or interval"
        )
    return Reproduction(numbers, out)
