"""Low-rank adapters of a classifier's backbone. The only module that imports peft."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence

import torch.nn as nn

from ...config.finetune import Lora
from ...errors import UsageError, did_you_mean, first_line
from ...models.classifier import Classifier

__all__ = ["add_adapters", "merge_adapters"]


def add_adapters(classifier: Classifier, options: Lora) -> None:
    """Add low-rank adapters to the backbone, in place; only they and the linear layer keep their gradient.

    Raises:
        UsageError: peft is missing, or cannot adapt these modules.
    """
    try:
        import peft
    except ImportError as error:
        raise UsageError("classifier.train=lora needs peft; pip install 'rlpjepa-zoo[lora]'") from error
    names = _adapted_modules(classifier.backbone, options.targets)
    exact = "|".join(map(re.escape, names))  # peft matches a list of names by their ends, which other modules may share
    config = peft.LoraConfig(r=options.rank, lora_alpha=options.alpha, target_modules=exact, lora_dropout=0.0)
    try:
        peft.inject_adapter_in_model(config, classifier.backbone)
    except ValueError as error:
        raise UsageError(f"classifier.lora.targets: {first_line(error)}") from error
    if classifier.projector is not None:
        classifier.projector.requires_grad_(False)
    classifier.steady = True


def merge_adapters(classifier: Classifier) -> Classifier:
    """A copy without adapters, whose weights contain them."""
    from peft.tuners.lora import LoraLayer

    merged = copy.deepcopy(classifier)
    for name, module in list(merged.backbone.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            parent, _, last = name.rpartition(".")
            setattr(merged.backbone.get_submodule(parent), last, module.get_base_layer())
    return merged.requires_grad_(False)


def _adapted_modules(backbone: nn.Module, targets: Sequence[str] | None) -> list[str]:
    """Names of the modules that get an adapter.

    Args:
        backbone: the model to adapt.
        targets: ends of module names. None selects all linear layers or, if there are none, all convolutions with one group: the update of
            a grouped convolution is not the product of two small ones.

    Raises:
        UsageError: a target has no module or is a grouped convolution, or nothing can be adapted.
    """
    named = dict(backbone.named_modules())
    if targets is not None:
        matches = {target: [name for name in named if name == target or name.endswith(f".{target}")] for target in targets}
        if missing := [target for target, names in matches.items() if not names]:
            hint = did_you_mean(missing[0], {name.rpartition(".")[2] for name in named})
            raise UsageError(f"classifier.lora.targets: no module of the backbone ends in '{missing[0]}'.{hint}")
        chosen = [name for name in named if any(name in names for names in matches.values())]
        for name in chosen:
            if getattr(named[name], "groups", 1) > 1:
                raise UsageError(f"classifier.lora.targets: {name} is a convolution of several groups, which gets no adapter; leave it out")
        return chosen
    chosen = [name for name, m in named.items() if isinstance(m, nn.Linear)]
    chosen = chosen or [name for name, m in named.items() if isinstance(m, nn.Conv2d) and m.groups == 1]
    if not chosen:
        raise UsageError(
            "classifier.lora.targets: the backbone has neither linear layers nor plain convolutions; use classifier.train=full"
        )
    return chosen
