"""What is trained: the encoder that a recipe describes, what it is trained for, and linear probes that watch it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from ..config.pretrain import Recipe
from ..core import rng
from ..data.preprocess import Preprocess
from ..distributions import RectifiedGeneralizedGaussian
from ..errors import RecipeError, first_line
from ..models.encoder import Output, SparseEncoder
from ..models.factory import create_encoder, refused_arguments
from ..objectives import OBJECTIVES
from ..objectives.base import Objective

__all__ = ["Result", "EncoderWithProbes", "build_encoder", "build_objective", "check_arguments", "unlike_pretraining"]

log = logging.getLogger("rlpjepa_zoo")


def check_arguments(key: str, arguments: Mapping[str, Any]) -> None:
    """Refuse, among a recipe's arguments of a backbone, those that are not one's own.

    Args:
        key: of the recipe, such as encoder.args.
        arguments: under that key.

    Raises:
        RecipeError: naming the first.
    """
    if taken := refused_arguments(arguments):
        raise RecipeError(f"{key}.{taken[0]}: is not an argument of a backbone, which are those such as img_size or patch_size; remove it")


def build_encoder(recipe: Recipe) -> SparseEncoder:
    """The encoder a recipe describes, initialised from the recipe's seed.

    Raises:
        RecipeError: arguments that are not the backbone's, or local views that it does not take.
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
    for sentence in unlike_pretraining(recipe, encoder):
        log.warning("%s", sentence)
    if recipe.views.local is not None:
        _takes(encoder, recipe.views.local.size, options.backbone)
    return encoder


def build_objective(recipe: Recipe) -> Objective:
    """The objective a recipe describes; all ranks call this together.

    Raises:
        RecipeError: options that cannot be used.
    """
    target = None
    if recipe.target:
        mu, sigma = recipe.target.law()
        target = RectifiedGeneralizedGaussian(mu, sigma, recipe.target.p)
    sizes = {"dim": recipe.encoder.dim, "batch_size": recipe.train.batch_size}
    return OBJECTIVES[recipe.objective.name].build(recipe.objective, target=target, seed=recipe.seed, **sizes)


def unlike_pretraining(recipe: Recipe, encoder: SparseEncoder) -> list[str]:
    """Where a pretrained backbone was trained on images that were brought to its input otherwise, in sentences with the mend."""
    cfg: Any = encoder.backbone.pretrained_cfg
    found = []
    for name in ("mean", "std", "interpolation") if recipe.encoder.pretrained else ():
        given, wanted = _written(getattr(recipe.data, name)), _written(cfg.get(name))
        if wanted not in (None, given):
            was = f"{recipe.encoder.backbone} was pretrained with {wanted}, the recipe has {given}"
            found.append(f"data.{name}: {was}; give data.{name}='{wanted}'")
    return found


def _written(value: Any) -> str | None:
    """A name, or numbers to six digits, as in a recipe; None for what is neither, as a stranger's config.json may hold."""
    if isinstance(value, list | tuple) and all(isinstance(v, int | float) for v in value):
        return f"[{', '.join(f'{v:g}' for v in value)}]"
    return value if isinstance(value, str) else None


@torch.no_grad()
def _takes(encoder: SparseEncoder, size: int, name: str) -> None:
    """Refuse local views that a backbone cannot take before the run, not in its first step."""
    try:
        with encoder.evaluating():
            encoder(torch.zeros(1, 3, size, size))
    except (AssertionError, RuntimeError, ValueError) as error:
        mend = "encoder.args.dynamic_img_size=true lets a ViT take a second size that its patches divide"
        raise RecipeError(f"views.local.size: {name} does not take images of {size} pixels ({first_line(error)}); {mend}") from error


class Result(NamedTuple):
    z: Tensor
    """(V, b, D)"""
    probe_loss: Tensor
    probe_right: Tensor
    """Accuracy of the probes on features and on z over this batch."""


class EncoderWithProbes(nn.Module):
    """Encoder and online probes as one module, so that one wrapper (DDP, autocast) covers both."""

    def __init__(self, encoder: SparseEncoder, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        widths = {"features": encoder.config.features, "z": encoder.config.dim} if classes > 1 else {}
        self.probes = nn.ModuleDict({name: nn.Linear(width, classes) for name, width in widths.items()})

    def forward(self, groups: list[Tensor], labels: Tensor) -> Result:
        """Views of each size, (V b, 3, S, S) each (or their features (V b, F)), through the encoder; the probes see the first size."""
        outs = [self._both(x) for x in groups]
        z = torch.cat([out.z.unflatten(0, (-1, len(labels))) for out in outs])
        out, views = outs[0], len(groups[0]) // len(labels)
        loss, right = out.z.new_zeros((), dtype=torch.float32), []
        known = (labels >= 0).repeat(views)
        count = known.sum().clamp(min=1)
        target = labels.clamp(min=0).repeat(views)
        for name, source in (("features", out.features), ("z", out.z)) if self.probes else ():
            scores = self.probes[name](source.detach().float()).float()
            loss = loss + (nn.functional.cross_entropy(scores, target, reduction="none") * known).sum() / count
            right.append(((scores.argmax(1) == target) & known).sum() / count)
        return Result(z, loss, torch.stack(right) if right else loss.new_zeros(0))

    def _both(self, x: Tensor) -> Output:
        return self.encoder.both(x) if x.dim() == 4 else Output(x, self.encoder.projector(x))
