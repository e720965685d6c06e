"""What a run tells of itself, and where its encoder is published: the folder of the run and, if the recipe asks for it, the Hub."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from . import card, folder, publish, zoo
from .encoder import SparseEncoder
from .errors import ModelError, UsageError
from .images import Images
from .recipe import Recipe
from .sources import Source

__all__ = ["Publication", "Run", "describe", "history", "is_number", "read_metrics", "read_run"]

log = logging.getLogger("rlpjepa_zoo")

_LAST_PUSH = 120.0
"""Seconds that the end of a run waits for the last push."""


def describe(
    recipe: Recipe, source: Source, encoder: SparseEncoder, metrics: Mapping[str, float], training: Mapping[str, Any], log_file: Path
) -> dict[str, Any]:
    """The record that the card shows: `EncoderConfig.info`.

    Args:
        recipe, source, encoder: of the run.
        metrics: the newest of each kind.
        training: what the section "Training" lists.
        log_file: metrics.jsonl, for the picture.
    """
    mu, sigma = recipe.target.law()
    test = source.eval if isinstance(source.train, Images) else None
    results: dict[str, Any] = {k: v for k, v in metrics.items() if k.startswith("knn")}
    if results:
        bank = source.train if isinstance(source.train, Images) else source.eval
        results["n_train"] = min(recipe.probe.bank, len(bank or ()))
        results |= {"n_test": min(recipe.probe.eval_images, len(test))} if test is not None else {}
        results["protocol"] = (
            f"kNN: k = {recipe.probe.knn_k}, cosine, T = {recipe.probe.knn_temperature:g}; measured in training, "
            f"{'in float32' if recipe.train.precision == 'no' else 'in ' + recipe.train.precision}, one seed"
        )
        results["protocol"] += "" if test is not None else "; every image was scored by the votes of the others"
    cfg: Any = encoder.backbone.pretrained_cfg
    return {
        "recipe": recipe.name, "data": recipe.data.label(), "dataset": recipe.data.name if recipe.data.source == "hf" else None,
        "license": recipe.hub.license, "base_model": cfg.get("hf_hub_id") if recipe.encoder.pretrained else None,
        "augmentations": recipe.views.describe(), "target": {"p": recipe.target.p, "mu": mu, "sigma": sigma},
        "density": {
            "asked": recipe.target.density, "theory": recipe.target.density_in_theory(), "train": metrics.get("l0_train"),
            "eval": metrics.get("l0_eval"), "eval_images": "held-out images" if test is not None else "training images",
        },
        "results": results, "history": history(log_file), "versions": zoo.versions(), "training": dict(training),
    }  # fmt: skip


def history(log_file: Path) -> list[dict[str, float]]:
    """Density and distance over the run: at most a hundred rows of either kind of metrics.jsonl."""
    try:
        rows, _ = read_metrics(log_file)
    except OSError:
        return []
    thin = []
    for kind, keys in (("train", ("l0", "excess")), ("eval", ("l0_eval", "knn_z", "knn_features"))):
        of_kind = [row for row in rows if row.get("kind") == kind]
        every = max(1, -(-len(of_kind) // 100))
        thin += [{"step": row["step"]} | {k: float(f"{row[k]:.5g}") for k in keys if k in row} for row in of_kind[::-every][::-1]]
    return thin


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


class Publication:
    """The encoder of a run, in `out/encoder` and, in the background, on the Hub. One process of a run uses it."""

    def __init__(self, recipe: Recipe, out: Path, encoder: SparseEncoder) -> None:
        self.recipe, self.out, self.encoder = recipe, out, encoder
        self.path = out / "encoder"
        self.name = recipe.hub.repo or f"local-dir:{self.path}"
        self.pusher = publish.Background(self._push) if recipe.hub.repo is not None else None

    def write(self, info: dict[str, Any], step: int, total: int, again: bool = False) -> None:
        """Publish the encoder as it is; `again`: what is there stays if it is of this step, results written into its card included."""
        contents = self._of_step(step) if again else None
        if contents is None:
            contents = self.encoder.contents(self.recipe.shareable(), info, self.name)
            folder.write_folder(self.path, contents)
        if self.pusher is not None:
            self.pusher.submit(contents, f"Step {step} of {total}")

    def finish(self) -> None:
        """Wait a while for the last push; say how to make up for it if it did not arrive."""
        if self.pusher is None or self.pusher.finish(_LAST_PUSH):
            return
        options = self.recipe.hub
        visibility = "" if options.private is None else " --private" if options.private else " --public"
        branch = f" --revision {options.revision}" if options.revision else ""
        log.warning("the last encoder is not on the Hub; send it with: rlpjepa push %s %s%s%s", self.out, options.repo, visibility, branch)

    def _of_step(self, step: int) -> dict[str, bytes] | None:
        """The published files if they are whole, of these weights and of this step."""
        try:
            contents = card.rewritten(self.path, self.name)
            block = folder.read_config(self.path)[folder.BLOCK]
            same = block["fingerprint"] == self.encoder.fingerprint() and block["info"]["training"]["steps"] == step
        except (ModelError, KeyError, TypeError):  # stopped between the last checkpoint and the last publication
            return None
        return contents if same else None

    def _push(self, contents: Mapping[str, bytes], message: str) -> publish.Pushed:
        options = self.recipe.hub
        return publish.push(
            contents, str(options.repo), private=options.private, new_private=True, revision=options.revision, message=message
        )
