"""The features that methods are compared on: images of a recipe, seen once through its frozen backbone."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor

from ..config.pretrain import Recipe
from ..core import rng
from ..data.images import Images
from ..data.loader import steps_of_an_epoch
from ..data.sources import Source, open_source
from ..errors import RecipeError
from ..evaluation.encoding import encode_sparse
from ..evaluation.probes.base import Array
from ..training.tasks.encoders import build_encoder, with_backbone_preprocess
from ..training.tasks.feature_cache import cache_views
from .methods.base import Features

__all__ = ["TEST_SHARE", "check_recipe", "load_features", "with_test_images"]

TEST_SHARE = 0.2
"""Share of the images that are held out for testing if the data have no test images."""


def check_recipe(recipe: Recipe, device: str = "cpu") -> None:
    """Refuse a recipe on whose features methods cannot be compared.

    Raises:
        RecipeError: names the key and the fix.
    """
    if recipe.encoder.cached_views is None:
        frozen = "" if recipe.encoder.freeze_backbone else "encoder.freeze_backbone=true "
        raise RecipeError(
            f"encoder.cached_views: codes are compared on cached features of a frozen backbone; give {frozen}encoder.cached_views=8"
        )
    if recipe.views.count < 2:
        raise RecipeError("views.count: contrastive methods need two views of an image or more; give views.count=2")
    if recipe.train.ema is not None:
        raise RecipeError("train.ema: methods are compared without averaged weights; set it to null")
    if recipe.train.precision == "fp16" and torch.device(device).type == "cpu":
        raise RecipeError("train.precision: fp16 needs a GPU; use bf16 or no")


def with_test_images(source: Source, recipe: Recipe) -> tuple[Source, Images]:
    """Training and test images: those of the data, at most `probe.eval_images` for testing; else a random fifth, which is not trained on.

    Raises:
        RecipeError: fewer than two classes, or no test image with a label.
    """
    images, test = source.images, source.eval
    if test is None:
        order = torch.randperm(len(images), generator=rng.generator(recipe.seed, "bench-test")).numpy()
        count = round(TEST_SHARE * len(images))
        images, test = images.take(np.sort(order[count:])), images.take(np.sort(order[:count]))
    elif len(test) > recipe.probe.eval_images:
        order = torch.randperm(len(test), generator=rng.generator(recipe.seed, "eval")).numpy()
        test = test.take(np.sort(order[: recipe.probe.eval_images]))
    fix = "one folder for each class, or a column of class labels (data.label_column)"
    if len(np.unique(_known(images))) < 2:
        raise RecipeError(f"data: codes are compared by labels, and the training images have fewer than two classes; expected {fix}")
    if not len(_known(test)):
        raise RecipeError(f"data: codes are compared by labels, and no test image has one; expected {fix}")
    return source._replace(train=images, eval=test, length=len(images)), test


def _known(images: Images) -> Array:
    """Known labels."""
    labels = np.zeros(0, np.int64) if images.labels is None else images.labels
    return labels[labels >= 0]


def load_features(recipe: Recipe, device: str = "cpu", progress: bool = False) -> tuple[Recipe, Features]:
    """Encode the images of a recipe: random views of training images, which stay on disk for later calls, and all images as evaluations see them.

    Args:
        recipe: checked by `check_recipe`.
        device: where the backbone runs.
        progress: show progress bars on stderr.

    Returns:
        The recipe with the preprocessing of its backbone, and the features.

    Raises:
        RecipeError: fewer than two classes, or as of `build_encoder` and `cache_views`.
        DataError: images that cannot be opened or read, or fewer than one batch.
        UsageError, ModelError, HubError: as of `create_encoder`.
    """
    source, test = with_test_images(open_source(recipe.data, recipe.seed), recipe)
    steps_of_an_epoch(source, recipe)
    recipe = with_backbone_preprocess(recipe)
    memory_format = torch.channels_last if recipe.train.channels_last else torch.contiguous_format
    encoder = build_encoder(recipe).to(memory_format=memory_format).to(device)

    def precision() -> AbstractContextManager[None]:
        kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(recipe.train.precision)
        return nullcontext() if kind is None else torch.autocast(torch.device(device).type, kind)

    def clean(images: Images, role: str) -> tuple[Tensor, Tensor]:
        with precision():
            encoded = encode_sparse(encoder, images, role, num_workers=recipe.train.num_workers, progress=progress)
        return torch.from_numpy(encoded.features), torch.from_numpy(encoded.labels)

    views, _, _ = cache_views(encoder, source, recipe, precision, memory_format, progress)
    return recipe, Features(encoder, source, views, *clean(source.images, "training"), *clean(test, "test"))
