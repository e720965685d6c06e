"""Files of a run directory, written and read: recipe.yaml, metrics.jsonl, bad_images.jsonl, summary.json, run_id."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from ..config.finetune import TuningRecipe, load_any
from ..config.pretrain import Recipe
from ..core import distributed, files
from ..errors import DataError, OutputError, UsageError, no_folder
from ..progress import progress_bar

__all__ = ["BadImages", "RunFiles", "RunLog", "history", "is_number", "read_metrics", "read_run", "run_id"]

log = logging.getLogger("rlpjepa_zoo")

_NAMED = 5
"""Unreadable images that the log names; bad_images.jsonl has all."""
_POINTS = 100
"""Rows of each kind in `history`."""


# --- writing -----------------------------------------------------------------------------------------------------------------------------


def run_id(out: Path) -> str:
    """Identifier of a run for trackers; created once and kept in the run directory."""
    path = out / "run_id"
    try:
        if not path.is_file():
            files.write_durably(path, uuid.uuid4().hex.encode())
        return path.read_text().strip()
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error


class RunLog:
    """Writes recipe.yaml, metrics.jsonl, bad_images.jsonl and summary.json; only the main process writes.

    Args:
        out: run directory.
        main: whether this is the main process.
        track: also receives the numbers of each row, and its step.
    """

    def __init__(self, out: Path, main: bool, track: Callable[[dict[str, Any], int], None] | None = None) -> None:
        self.out, self.main, self.track = out, main, track
        self.bar: Any = None
        """Progress bar, above which evaluations are printed."""
        self._warned: set[str] = set()

    def open(self, recipe: str, step: int | None, bad: Mapping[int, str]) -> None:
        """Write the recipe, and remove rows that were written after the checkpoint to resume, so that no step occurs twice.

        Args:
            recipe: text of recipe.yaml.
            step: step of that checkpoint; None for a new run.
            bad: unreadable images at that step: row -> reason.

        Raises:
            OutputError: the directory cannot be written.
        """
        if not self.main:
            return
        path = self.out / "metrics.jsonl"
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            rows = read_metrics(path)[0] if step is not None and path.is_file() else []
            earlier = [json.dumps(row) for row in rows if row["step"] <= (step or 0)]
            reasons = [json.dumps({"row": row, "reason": reason}) for row, reason in bad.items()]
            for name, text in (("recipe.yaml", recipe), (path.name, _lines(earlier)), ("bad_images.jsonl", _lines(reasons))):
                if text or name == path.name:
                    aside = self.out / f".{name}.new"
                    files.write_durably(aside, text.encode())
                    aside.replace(self.out / name)
                else:
                    (self.out / name).unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(f"{self.out}: cannot be written: {error.strerror or error}") from error

    def progress_bar(self, title: str, done: int, total: int, hidden: bool) -> Any:
        """A context with a progress bar on stderr that counts steps: an image is in many steps, and in each it gives several views."""
        self.bar = progress_bar(title, total, hidden=hidden, unit="step", done=done)
        return self.bar

    def row(self, values: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl; non-finite numbers become null. A full disk or a tracker that fails is a warning, not an error.

        Args:
            values: with `step` and `kind`; of the kind "eval" they are printed above the progress bar too.
        """
        if not self.main:
            return
        self._append("metrics.jsonl", {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()})
        if self.track is not None:
            try:
                self.track({k: v for k, v in values.items() if isinstance(v, int | float) and k != "step"}, values["step"])
            except Exception as error:  # for example, the server of the tracker is down
                self.warn_once(f"tracker: {type(error).__name__}: {error}")
        if values["kind"] == "eval" and self.bar is not None and not self.bar.disable:
            numbers = ", ".join(f"{k} {v:.4f}" for k, v in values.items() if isinstance(v, float) and k != "epoch")
            if numbers:  # a run without evaluation images measures nothing
                self.bar.write(f"step {values['step']}: {numbers}", file=sys.stderr)

    def bad_image(self, row: int, reason: str, quiet: bool) -> None:
        """Append a line to bad_images.jsonl and, unless `quiet`, log it."""
        if self.main and not quiet:
            log.warning("image left out: %s", reason)
        self._append("bad_images.jsonl", {"row": row, "reason": reason})

    def non_finite(self, step: int, seed: int, epoch: int, rows: Sequence[int], terms: str) -> None:
        """Append a line to nonfinite.jsonl: what makes the batch of a step again.

        Args:
            step: its number, from 1.
            seed, epoch, rows: its draws are a function of these; a row below 0, -1 - n, could not be read and another took its place.
            terms: values of the terms of the loss.
        """
        self._append("nonfinite.jsonl", {"step": step, "seed": seed, "epoch": epoch, "rows": list(rows), "terms": terms})

    def summary(self, values: Mapping[str, Any]) -> None:
        """Write summary.json.

        Raises:
            OutputError: it cannot be written.
        """
        with files.atomic_file(self.out / "summary.json") as aside:
            aside.write_text(json.dumps(values, indent=1) + "\n")

    def warn_once(self, sentence: str) -> None:
        """Log a warning the first time that it occurs."""
        if sentence not in self._warned:
            self._warned.add(sentence)
            log.warning("%s", sentence)

    def _append(self, name: str, values: Mapping[str, Any]) -> None:
        if self.main:
            try:
                with open(self.out / name, "a") as file:
                    file.write(json.dumps(values) + "\n")
            except OSError as error:
                self.warn_once(f"{name}: {error.strerror or error}")


def _lines(lines: list[str]) -> str:
    return "".join(line + "\n" for line in lines)


class BadImages:
    """Counts unreadable training images, each once, and writes them down.

    Args:
        run_log: where they are written.
        images: number of training images, of one epoch for a stream.
        max_fraction: `train.max_bad_fraction`.
        stream_steps: of a stream, the number of steps of an epoch; its images are counted in each epoch.
    """

    def __init__(self, run_log: RunLog, images: int, max_fraction: float, stream_steps: int | None = None) -> None:
        self.run_log, self.images, self.max_fraction, self.stream_steps = run_log, images, max_fraction, stream_steps
        self.reasons: dict[int, str] = {}
        self.error: DataError | None = None
        """Set when more images are unreadable than the recipe allows."""

    def add(self, bad: Iterable[tuple[int, str]], step: int) -> None:
        """Add the (row, reason) of images that were unreadable by some step; known rows are ignored."""
        new = [entry for entry in bad if entry[0] not in self.reasons]
        for row, reason in new:
            self.reasons[row] = reason
            self.run_log.bad_image(row, reason, quiet=len(self.reasons) > _NAMED)
        epochs = -(-step // self.stream_steps) if self.stream_steps is not None else 1
        if new and len(self.reasons) > self.max_fraction * self.images * max(1, epochs):
            allowed = f"train.max_bad_fraction = {self.max_fraction:g}"
            counted = f"{len(self.reasons)} of {self.images} images cannot be read"
            self.error = DataError(f"{counted}, more than {allowed}; see {self.run_log.out / 'bad_images.jsonl'}")

    def share(self, step: int) -> None:
        """Add the images that other ranks could not read. All ranks call it."""
        for bad in distributed.gather_objects(list(self.reasons.items())):
            self.add(bad, step)


# --- reading -----------------------------------------------------------------------------------------------------------------------------


R = TypeVar("R", bound=Recipe | TuningRecipe)


class RunFiles(NamedTuple, Generic[R]):
    """Contents of a run directory, of a finished or an unfinished run."""

    path: Path
    recipe: R
    rows: list[dict[str, Any]]
    damaged: int
    """Lines of metrics.jsonl that cannot be read."""
    summary: dict[str, Any]
    """Empty while the run goes on."""

    def series(self, key: str, kind: str) -> tuple[list[float], list[float]]:
        """Steps and values of the rows of a kind that hold a finite number under this key."""
        points = [(row["step"], row[key]) for row in self.rows if row.get("kind") == kind and is_number(row.get(key))]
        return [step for step, _ in points], [value for _, value in points]

    @property
    def info(self) -> dict[str, Any]:
        """The record of the artifact at the end of the run, as on its card."""
        record = self.summary.get("info")
        return record if isinstance(record, dict) else {}

    def last(self, key: str, kind: str = "train") -> float | None:
        """The newest value of `series`."""
        values = self.series(key, kind)[1]
        return values[-1] if values else None


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Rows of metrics.jsonl, and the number of unreadable lines; a killed run can leave an incomplete last line."""
    rows = [_object(line) for line in path.read_bytes().splitlines()]
    good = [row for row in rows if is_number(row.get("step"))]
    return good, len(rows) - len(good)


def history(log_file: Path) -> list[dict[str, float]]:
    """Density, excess and kNN accuracy over the run: at most a hundred rows of either kind of metrics.jsonl."""
    try:
        rows, _ = read_metrics(log_file)
    except OSError:
        return []
    points = []
    for kind, keys in (("train", ("l0", "excess")), ("eval", ("l0_eval", "knn_z", "knn_features"))):
        of_kind = [row for row in rows if row.get("kind") == kind]
        every = max(1, -(-len(of_kind) // _POINTS))
        points += [
            {"step": row["step"]} | {k: float(f"{row[k]:.5g}") for k in keys if row.get(k) is not None} for row in of_kind[::-every][::-1]
        ]
    return points


def read_run(path: Path) -> RunFiles[Any]:
    """Recipe, metrics and summary of a run directory; unreadable lines of metrics.jsonl are counted and left out.

    Raises:
        UsageError: no run directory, or one without any measurement.
    """
    if not os.path.isdir(path):
        raise UsageError(f"{no_folder(path)}; expected the folder of a run, which `rlpjepa train --out` writes")
    for name in ("recipe.yaml", "metrics.jsonl"):
        if not (path / name).is_file():
            inside = next((p.parent for p in sorted(path.glob("*/metrics.jsonl"))), None)
            hint = f"; did you mean {inside}?" if inside else "; expected the folder of a run, which `rlpjepa train --out` writes"
            raise UsageError(f"{path}: no {name} in it{hint}")
    try:
        rows, damaged = read_metrics(path / "metrics.jsonl")
        summary = _object((path / "summary.json").read_bytes()) if (path / "summary.json").is_file() else {}
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not rows:
        raise UsageError(f"{path}/metrics.jsonl: holds no measurement yet; try again after train.log_every steps")
    if not is_number(summary.get("steps")) or summary["steps"] < rows[-1]["step"]:  # left by an earlier, shorter run in this folder
        summary = {}
    return RunFiles(path, load_any(path / "recipe.yaml", ["hub={}"]), rows, damaged, summary)  # the section hub is not needed


def _object(text: bytes) -> dict[str, Any]:
    """A JSON object; empty for anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def is_number(value: Any) -> bool:
    """Whether a value is a finite number and not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
