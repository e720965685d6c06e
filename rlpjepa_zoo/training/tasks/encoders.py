"""The encoders that runs start from: of a pretraining recipe, and of a fine-tuning recipe."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

from ...config.finetune import Start
from ...config.pretrain import Recipe
from ...core import rng
from ...data.preprocess import Preprocess
from ...errors import RecipeError, first_line
from ...models.encoder import SparseEncoder
from ...models.factory import create_encoder, fresh_copy, refused_arguments
from ...models.pretrained import load_encoder

__all__ = ["build_encoder", "check_arguments", "preprocessing_warnings", "start_encoder", "start_weights"]

log = logging.getLogger("rlpjepa_zoo")


def build_encoder(recipe: Recipe) -> SparseEncoder:
    """The encoder of a pretraining recipe, initialised from the seed of the recipe.

    Raises:
        RecipeError: arguments that do not belong to the backbone, or local views of a size that it does not take.
        UsageError, ModelError, HubError: as of `create_encoder`.
    """
    options, data = recipe.encoder, recipe.data
    size = (data.image_size, data.image_size)
    check_arguments("encoder.args", options.args)
    with rng.seeded(recipe.seed, "init"):
        encoder = create_encoder(
            options.backbone, options.dim, options.hidden_dim, options.pretrained,
            projector_depth=options.projector_depth, freeze_backbone=options.freeze_backbone,
            preprocess=Preprocess(size, data.mean, data.std, data.interpolation, data.crop_pct), **options.args,
        )  # fmt: skip
    for sentence in preprocessing_warnings(recipe, encoder):
        log.warning("%s", sentence)
    if recipe.views.local is not None:
        _check_size(encoder, recipe.views.local.size, options.backbone)
    return encoder


def start_encoder(start: Start, seed: int) -> SparseEncoder:
    """The encoder that fine-tuning starts from; with `start.random` a fresh one of the same architecture.

    Args:
        start: the section `start` of a recipe.
        seed: of the run; initialises fresh weights.

    Raises:
        RecipeError: no source, or arguments that do not belong to the backbone.
        UsageError, ModelError, HubError: as of `load_encoder` and `create_encoder`.
    """
    check_arguments("start.args", start.args)
    if start.source is None:
        raise RecipeError(
            "start.source: what to start from is not given; add start.source=ENCODER (a zoo name, owner/repo, a folder) or timm:NAME"
        )
    with rng.seeded(seed, "init"):
        if start.of_timm:
            return create_encoder(start.source, 1, 1, not start.random, projector_depth=1, **start.args)
        encoder = load_encoder(start.source, start.revision)
        return fresh_copy(encoder) if start.random else encoder


def start_weights(encoder: SparseEncoder) -> dict[str, Any]:
    """The part of an encoder's record that tells which pretrained weights its backbone started from."""
    return {key: encoder.config.info[key] for key in ("base_model", "backbone") if key in encoder.config.info}


def check_arguments(key: str, arguments: Mapping[str, Any]) -> None:
    """Refuse arguments of a recipe that do not belong to the backbone.

    Args:
        key: recipe key, such as encoder.args.
        arguments: values under that key.

    Raises:
        RecipeError: names the first.
    """
    if refused := refused_arguments(arguments):
        raise RecipeError(f"{key}.{refused[0]}: is not a backbone argument (such as img_size or patch_size); remove it")


def preprocessing_warnings(recipe: Recipe, encoder: SparseEncoder) -> list[str]:
    """Differences between the preprocessing of a recipe and that of its pretrained backbone, in sentences with the fix."""
    cfg: Any = encoder.backbone.pretrained_cfg
    warnings = []
    for name in ("mean", "std", "interpolation") if recipe.encoder.pretrained else ():
        given, wanted = _as_in_a_recipe(getattr(recipe.data, name)), _as_in_a_recipe(cfg.get(name))
        if wanted not in (None, given):
            difference = f"{recipe.encoder.backbone} was pretrained with {wanted}, the recipe has {given}"
            warnings.append(f"data.{name}: {difference}; give data.{name}='{wanted}'")
    return warnings


def _as_in_a_recipe(value: Any) -> str | None:
    """A name, or numbers to six digits, as in a recipe; None for any other value, which an untrusted config.json may hold."""
    if isinstance(value, list | tuple) and all(isinstance(v, int | float) for v in value):
        return f"[{', '.join(f'{v:g}' for v in value)}]"
    return value if isinstance(value, str) else None


@torch.no_grad()
def _check_size(encoder: SparseEncoder, size: int, name: str) -> None:
    """Refuse local views of a size that the backbone does not take before the run, not in its first step."""
    try:
        with encoder.evaluating():
            encoder(torch.zeros(1, 3, size, size))
    except (AssertionError, RuntimeError, ValueError) as error:
        fix = "encoder.args.dynamic_img_size=true lets a ViT take a second size that its patches divide"
        raise RecipeError(f"views.local.size: {name} does not take images of {size} pixels ({first_line(error)}); {fix}") from error
