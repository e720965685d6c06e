"""Our own method, as `rlpjepa train` trains it, and the head of an encoder that it has trained."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn as nn
from torch import Tensor

from ...config.pretrain import Recipe
from ...errors import RecipeError, ZooError
from ...evaluation.training_eval import shift_on
from ...models.encoder import SparseEncoder
from ...models.pretrained import load_encoder
from ...ops.modules import make_projector
from ...training.optim import ParamGroup
from ...training.tasks.pretrain import PretrainTask
from . import METHODS
from .base import Features, Learned, Method

__all__ = ["Ours", "PublishedHead"]


@METHODS.register("ours")
class Ours(Learned):
    """The projector and the objective of the recipe, trained once for every k.

    Loss, parameter groups and module are those of `PretrainTask`, without the online probes, which never change an encoder.
    """

    order = 10

    def build(self, features: Features, k: int | None) -> nn.Module:
        config = features.encoder.config
        projector = make_projector(config.features, config.hidden_dim, config.dim, config.projector_depth)
        probe = self.recipe.probe.model_copy(update={"online": False})
        self.task = PretrainTask(self.recipe.model_copy(update={"probe": probe}))
        self.task.source = features.source
        self.task.core = SparseEncoder(features.encoder.backbone, projector, config, freeze_backbone=True)
        return self.task.module()

    def param_groups(self) -> list[ParamGroup]:
        return self.task.param_groups()

    def loss(self, views: Tensor, step: int) -> Tensor:
        unknown = torch.full(views.shape[1:2], -1, device=views.device)
        return self.task.step(self.module, [views.flatten(0, 1)], unknown, step).loss

    def encode(self, x: Tensor) -> Tensor:
        return self.task.core.outputs(x)

    def after_update(self) -> None:
        self.task.after_update()

    @torch.no_grad()
    def finish(self, features: Features) -> None:
        """The exact shift of a held density, on all training images."""
        target = self.recipe.target
        if target is not None and target.hold:
            self.task.core = self.task.core.shifted(shift_on(self.task.core, features.train, target.density_in_theory()))

    def clipped(self) -> Iterable[nn.Parameter]:
        return self.task.core.parameters()  # as in a run, without the decoder


@METHODS.register("published")
class PublishedHead(Method):
    """The projector of the published encoder whose backbone gives the features, as it is, without a dial.

    The backbone is that of an encoder of this package, such as ``encoder.backbone=local-dir:FOLDER``.
    """

    order = 5
    default = False
    random = False

    @classmethod
    def check(cls, recipe: Recipe) -> None:
        dim = cls._load(recipe).config.dim
        if not recipe.encoder.pretrained:
            raise RecipeError("encoder.pretrained: method published needs the features of the trained backbone; set it to true")
        if recipe.encoder.dim != dim:
            raise RecipeError(f"encoder.dim: the published encoder has {dim} dimensions; give encoder.dim={dim}")

    @staticmethod
    def _load(recipe: Recipe) -> SparseEncoder:
        try:
            return load_encoder(recipe.encoder.backbone)
        except ZooError as error:
            raise RecipeError(
                f"encoder.backbone: method published needs an encoder of this package, such as local-dir:FOLDER ({error})"
            ) from error

    def fit(self, features: Features, k: int | None) -> None:
        self.encoder = self._load(self.recipe).to(self.device)

    def encode(self, x: Tensor) -> Tensor:
        return self.encoder.outputs(x)
