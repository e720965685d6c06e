"""Our own method, as `rlpjepa train` trains it."""

from __future__ import annotations

import torch
import torch.nn as nn
from torch import Tensor

from ...models.encoder import SparseEncoder, make_projector
from ...training.optim import ParamGroup
from ...training.tasks.pretrain import PretrainTask
from . import METHODS
from .base import Features, Learned

__all__ = ["Ours"]


@METHODS.register("ours")
class Ours(Learned):
    """The projector and the objective of the recipe, trained once for every k.

    Loss, parameter groups and module are those of `PretrainTask`, without the online probes, which never change an encoder.
    What the task does after each update of the weights belongs into `after_update`, and what it does with a trained core into `finish`.
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
