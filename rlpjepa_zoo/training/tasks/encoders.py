"""The encoders that runs start from: of a pretraining recipe, and of a fine-tuning recipe."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch

from ...config.finetune import Start
from ...config.pretrain import Recipe
from ...config.sections import ADOPTED
from ...core import rng
from ...data.preprocess import Preprocess
from ...errors import RecipeError, ZooError
from ...models.classifier import Classifier
from ...models.encoder import EncoderConfig, SparseEncoder
from ...models.factory import create_encoder, fresh_copy, refused_arguments
from ...models.pretrained import load_encoder

__all__ = [
    "build_encoder",
    "check_arguments",
    "check_sizes",
    "preprocessing_warnings",
    "start_encoder",
    "start_weights",
    "with_backbone_preprocess",
]

log = logging.getLogger("rlpjepa_zoo")


def build_encoder(recipe: Recipe) -> SparseEncoder:
    """The encoder of a pretraining recipe, initialised from the seed of the recipe.

    Raises:
        RecipeError: arguments that do not belong to the backbone, or images or local views of a size that it does not take.
        UsageError, ModelError, HubError: as of `create_encoder`.
    """
    recipe = with_backbone_preprocess(recipe)
    options, data = recipe.encoder, cast(Any, recipe.data)  # its values are given now
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
    check_sizes(encoder, recipe.sizes, "encoder.args")
    return encoder


def with_backbone_preprocess(recipe: Recipe) -> Recipe:
    """The recipe with the preprocessing of its pretrained backbone in the place of null.

    Raises:
        RecipeError: the backbone does not take square images, or is preprocessed in a way that a recipe cannot say.
        UsageError, ModelError, HubError: as of `create_encoder`.
    """
    options = recipe.encoder
    if all(getattr(recipe.data, key) is not None for key in ADOPTED):
        return recipe
    check_arguments("encoder.args", options.args)
    with torch.device("meta"):
        skeleton = create_encoder(options.backbone, 1, 1, projector_depth=1, **options.args)
    return recipe.with_preprocess(dataclasses.asdict(skeleton.config.preprocess))


def start_weights(encoder: SparseEncoder) -> dict[str, Any]:
    """The part of an encoder's record that tells which pretrained weights its backbone started from, with the notice that stays with them."""
    return {key: encoder.config.info[key] for key in ("base_model", "backbone", "notice") if key in encoder.config.info}


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


def check_sizes(model: SparseEncoder | Classifier, sizes: Mapping[str, int | None], arguments: str | None) -> None:
    """Refuse images of a size that the backbone does not take, before the run and not in its first step.

    Args:
        model: on any device; on the meta device nothing is computed.
        sizes: recipe key, such as data.image_size -> height and width in pixels, if there are such images.
        arguments: recipe key of the arguments of the backbone, such as encoder.args; None if it cannot be built in another way.

    Raises:
        RecipeError: names the key, the size and, if there is one, an argument or a size with which it works.
    """
    config = model.config.encoder if isinstance(model, Classifier) else model.config
    given = {key: size for key, size in sizes.items() if size is not None}
    for key, size in given.items():
        if (reason := model.size_problem(size, size)) is not None:
            fix = _fix(config, given, key, arguments)
            raise RecipeError(f"{key}: {config.architecture} does not take images of {size} pixels ({reason}); {fix}")


def _fix(config: EncoderConfig, sizes: Mapping[str, int], key: str, arguments: str | None) -> str:
    """The first argument of the backbone, or the next size, with which it takes all sizes."""

    def works(more: Mapping[str, Any], tried: Iterable[int]) -> bool:
        try:
            with torch.device("meta"):
                model = create_encoder(config.architecture, 1, 1, projector_depth=1, **{**config.model_args, **more})
                return all(model.size_problem(size, size) is None for size in tried)
        except ZooError:
            return False

    changes: list[dict[str, Any]] = [{"img_size": sizes[key]}, {"dynamic_img_size": True}] if arguments else []
    for change in changes:
        if works(change, sizes.values()):
            return "; ".join(f"give {arguments}.{name}={str(value).lower()}" for name, value in change.items())
    if "," in key:
        return "set views.start_size=null"
    for size in (-(-sizes[key] // 32) * 32, *config.preprocess.size, 224):
        if size != sizes[key] and works({}, [size]):
            return f"give {key}={size}"
    return "give a size that it takes"
