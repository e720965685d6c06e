"""The files that a run writes about itself while it goes, written and read: recipe.yaml, metrics.jsonl, bad_images.jsonl, summary.json."""

from __future__ import annotations

import json
import logging
import math
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..config.plan import Plan
from ..config.pretrain import Recipe
from ..core import files
from ..errors import OutputError, UsageError

__all__ = ["Journal", "Run", "is_number", "read_metrics", "read_run", "run_id"]

log = logging.getLogger("rlpjepa_zoo")


def run_id(out: Path) -> str:
    """The name under which trackers know a run, made once and kept in its folder."""
    path = out / "run_id"
    try:
        if not path.is_file():
            files.write_durably(path, uuid.uuid4().hex.encode())
        return path.read_text().strip()
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error


class Journal:
    """recipe.yaml, metrics.jsonl and bad_images.jsonl of a run; only its main process writes."""

    def __init__(self, out: Path, recipe: Plan, main: bool) -> None:
        self.out, self.recipe, self.main = out, recipe, main
        self.said: set[str] = set()

    def open(self, step: int | None, bad: Mapping[int, str]) -> None:
        """Write the recipe, and cut what was written after the checkpoint that is resumed, so that each file is one unbroken record.

        Args:
            step: of that checkpoint; None for a new run.
            bad: unreadable images known by then.

        Raises:
            OutputError: the folder cannot be written.
        """
        if not self.main:
            return
        path = self.out / "metrics.jsonl"
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            rows = read_metrics(path)[0] if step is not None and path.is_file() else []
            kept = [json.dumps(row) for row in rows if row["step"] <= (step or 0)]
            reasons = [json.dumps({"row": row, "reason": reason}) for row, reason in bad.items()]
            for name, text in (("recipe.yaml", self.recipe.dump()), (path.name, _lines(kept)), ("bad_images.jsonl", _lines(reasons))):
                if text or name == path.name:
                    aside = self.out / f".{name}.new"
                    files.write_durably(aside, text.encode())
                    aside.replace(self.out / name)
                else:
                    (self.out / name).unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(f"{self.out}: cannot be written: {error.strerror or error}") from error

    def row(self, values: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl, null for what is not finite. A full disk for logs does not end a run."""
        self._append("metrics.jsonl", {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()})

    def bad_image(self, row: int, reason: str, quiet: bool) -> None:
        """A line of bad_images.jsonl and, unless `quiet`, of the log."""
        if self.main and not quiet:
            log.warning("image left out: %s", reason)
        self._append("bad_images.jsonl", {"row": row, "reason": reason})

    def once(self, sentence: str) -> None:
        """Warn, the first time that this is said."""
        if sentence not in self.said:
            self.said.add(sentence)
            log.warning("%s", sentence)

    def _append(self, name: str, values: Mapping[str, Any]) -> None:
        if self.main:
            try:
                with open(self.out / name, "a") as file:
                    file.write(json.dumps(values) + "\n")
            except OSError as error:
                self.once(f"{name}: {error.strerror or error}")


def _lines(lines: list[str]) -> str:
    return "".join(line + "\n" for line in lines)


class Run(NamedTuple):
    """The files of a run's folder, as far as they are written."""

    path: Path
    recipe: Recipe
    rows: list[dict[str, Any]]
    damaged: int
    """Lines of metrics.jsonl that cannot be read."""
    summary: dict[str, Any]
    """Empty while the run goes on."""

    def series(self, key: str, kind: str) -> tuple[list[float], list[float]]:
        """Steps and values of the rows of a kind that hold a finite number of that name."""
        found = [(row["step"], row[key]) for row in self.rows if row.get("kind") == kind and is_number(row.get(key))]
        return [step for step, _ in found], [value for _, value in found]

    @property
    def info(self) -> dict[str, Any]:
        """What `describe` gave at the end of the run."""
        found = self.summary.get("info")
        return found if isinstance(found, dict) else {}

    def last(self, key: str, kind: str = "train") -> float | None:
        values = self.series(key, kind)[1]
        return values[-1] if values else None


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Rows of metrics.jsonl, and how many lines cannot be read: a run that was killed leaves its last one cut short."""
    rows = [_object(line) for line in path.read_bytes().splitlines()]
    good = [row for row in rows if is_number(row.get("step"))]
    return good, len(rows) - len(good)


def read_run(path: Path) -> Run:
    """Recipe, metrics and summary of a run's folder; lines of metrics.jsonl that cannot be read are counted and left out."""
    if not path.is_dir():
        raise UsageError(f"{path}: no such folder; expected the folder of a run, which `rlpjepa train --out` writes")
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
    if not is_number(summary.get("steps")) or summary["steps"] < rows[-1]["step"]:  # of an earlier, shorter run in this folder
        summary = {}
    return Run(path, Recipe.load(path / "recipe.yaml", ["hub={}"]), rows, damaged, summary)  # where it was pushed plays no part


def _object(text: bytes) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def is_number(value: Any) -> bool:
    """A finite number, not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
