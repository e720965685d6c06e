"""What a run tells of itself, and where its encoder is published: the folder of the run and, if the recipe asks for it, the Hub."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config.plan import Plan
from ..config.pretrain import Recipe
from ..core import package
from ..data.images import Images
from ..data.sources import Source
from ..errors import ModelError
from ..hub import card
from ..hub.folder import read_folder, write_folder
from ..hub.push import Background, Pushed, push
from ..models.encoder import SparseEncoder
from .run_dir import read_metrics

__all__ = ["Publication", "describe", "history"]

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
        "results": results, "history": history(log_file), "versions": package.versions(), "training": dict(training),
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
        thin += [
            {"step": row["step"]} | {k: float(f"{row[k]:.5g}") for k in keys if row.get(k) is not None} for row in of_kind[::-every][::-1]
        ]
    return thin


class Publication:
    """What a run trained, in a folder of that of the run and, in the background, on the Hub. One process of a run uses it.

    Args:
        recipe, out: of the run.
        kind: what it is; the name of its folder.
    """

    def __init__(self, recipe: Plan, out: Path, kind: str = "encoder") -> None:
        self.recipe, self.out, self.kind = recipe, out, kind
        self.path = out / kind
        self.name = recipe.hub.repo or f"local-dir:{self.path}"
        self.pusher = Background(self._push) if recipe.hub.repo is not None else None

    def write(self, model: Any, info: dict[str, Any], step: int, total: int, again: bool = False) -> None:
        """Publish the model (with `fingerprint` and `contents`) as it is; `again`: what is there stays if it is of this step, results written into its card included."""
        contents = self._of_step(model, step) if again else None
        if contents is None:
            contents = model.contents(self.recipe.shareable(), info, self.name)
            write_folder(self.path, contents)
        if self.pusher is not None:
            self.pusher.submit(contents, f"Step {step} of {total}")

    def copy_as(self, name: str, chosen: str) -> None:
        """A second copy of what was published last, beside it, whose card says how it was chosen."""
        write_folder(self.out / name, card.rewritten(self.path, f"local-dir:{self.out / name}", chosen=chosen))

    def finish(self) -> None:
        """Wait a while for the last push; say how to make up for it if it did not arrive."""
        if self.pusher is None or self.pusher.finish(_LAST_PUSH):
            return
        options = self.recipe.hub
        visibility = "" if options.private is None else " --private" if options.private else " --public"
        branch = f" --revision {options.revision}" if options.revision else ""
        log.warning(
            "the last %s is not on the Hub; send it with: rlpjepa push %s %s%s%s", self.kind, self.out, options.repo, visibility, branch
        )

    def _of_step(self, model: Any, step: int) -> dict[str, bytes] | None:
        """The published files if they are whole, of these weights and of this step."""
        try:
            contents = card.rewritten(self.path, self.name)
            published = read_folder(self.path)
            same = published.fingerprint == model.fingerprint() and published.info["training"]["steps"] == step
        except (ModelError, KeyError, TypeError):  # stopped between the last checkpoint and the last publication
            return None
        return contents if same else None

    def _push(self, contents: Mapping[str, bytes], message: str) -> Pushed:
        options = self.recipe.hub
        return push(contents, str(options.repo), private=options.private, new_private=True, revision=options.revision, message=message)
