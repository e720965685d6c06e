"""Low-rank adapters: which modules get one."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from refusals import refused

from rlpjepa_zoo.config.finetune import Lora
from rlpjepa_zoo.errors import UsageError
from rlpjepa_zoo.training.tasks.lora import add_adapters


def test_grouped_convolutions_get_no_adapter() -> None:
    pytest.importorskip("peft", reason="peft is not installed: pip install 'rlpjepa-zoo[lora]'")

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(8, 8, 3)
            self.block = torch.nn.ModuleDict({"conv": torch.nn.Conv2d(8, 8, 3, groups=8), "last": torch.nn.Conv2d(8, 8, 1)})

    def adapted(**options: Any) -> set[str]:
        holder: Any = SimpleNamespace(backbone=Net(), projector=None)
        add_adapters(holder, Lora(rank=2, **options))
        return {name.partition(".lora_")[0] for name, _ in holder.backbone.named_parameters() if "lora_" in name}

    assert adapted() == {"conv", "block.last"}
    assert adapted(targets=("last",)) == {"block.last"}
    with refused(UsageError, match=r"classifier\.lora\.targets: block\.conv is a convolution of several groups"):
        adapted(targets=("conv",))
    Net.__init__ = lambda self: torch.nn.Module.__init__(self)  # type: ignore[method-assign]
    with refused(UsageError, match=r"classifier\.lora\.targets: the backbone has neither linear layers"):
        adapted()
