"""Sharded weights (FSDP 2) on two processes train as unsharded ones and leave the same files."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from processes import run_ranks
from runs import codes, rows, stop_after, tiny

from rlpjepa_zoo.core import distributed
from rlpjepa_zoo.errors import RecipeError, StoppedBySignal
from rlpjepa_zoo.training import setup
from rlpjepa_zoo.training.checkpoint import latest
from rlpjepa_zoo.training.tasks.pretrain import train
from rlpjepa_zoo.training.trainer import Trainer

RECIPES = Path(__file__).parents[2] / "recipes"
UNIT = 20_000
"""Parameters from which a module is sharded on its own: the encoder and its backbone are, the projector is not."""
VIT = [
    "train.channels_last=false",
    "encoder.backbone=test_vit",
    "encoder.args={img_size: 32, patch_size: 8, depth: 2}",
    "train.epochs=2",
    "optim.lr=0.002",
    "target.hold=true",
    "reconstruction.active=[4]",
]
CLIPPED = [*VIT, "train.epochs=1", "optim.clip_grad=0.5"]


def fsdp(**options: Any) -> Any:
    """An Accelerator that shards as the launch file says; Accelerate itself shards on GPUs only."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.utils import DistributedType

    made, asked = Accelerator(**options), yaml.safe_load((RECIPES / "accelerate/fsdp2.yaml").read_text())["fsdp_config"]
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=asked["fsdp_version"], auto_wrap_policy=asked["fsdp_auto_wrap_policy"].lower(), min_num_params=UNIT,
        reshard_after_forward=asked["fsdp_reshard_after_forward"], cpu_ram_efficient_loading=asked["fsdp_cpu_ram_efficient_loading"],
    )  # fmt: skip
    made.state.fsdp_plugin, made.state.distributed_type = plugin, DistributedType.FSDP
    return made


def dtypes_in_half_precision(folder: Path) -> set[torch.dtype]:
    """Types that the last layer of the projector returns in training when the recipe asks for bfloat16."""
    seen: set[torch.dtype] = set()
    with pytest.MonkeyPatch.context() as patch:
        right = Trainer._forward

        def forward(self: Any, batch: Any) -> Any:
            last = [m for m in self.core.projector.modules() if isinstance(m, torch.nn.Linear)][-1]
            handle = last.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
            try:
                return right(self, batch)
            finally:
                handle.remove()

        patch.setattr(Trainer, "_forward", forward)
        stop_after(patch, 1)
        with pytest.raises(StoppedBySignal):
            train(tiny(*VIT, "train.precision=bf16"), folder, progress=False)
    return seen


def run_sharded(folder: str) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "Accelerator", fsdp)
        seen: list[bool] = []
        original = distributed.full_tensor
        patch.setattr(distributed, "full_tensor", lambda x: (seen.append(hasattr(x, "full_tensor")), original(x))[1])
        train(tiny(*VIT), Path(folder) / "sharded", progress=False)
        dtypes = dtypes_in_half_precision(Path(folder) / "half")
        train(tiny(*CLIPPED), Path(folder) / "clipped", progress=False)
        try:
            train(tiny(*VIT, "train.ema=0.9"), Path(folder) / "ema", progress=False)
            refused = ""
        except RecipeError as error:
            refused = str(error)
        with pytest.MonkeyPatch.context() as stopping:
            stop_after(stopping, 3)
            with pytest.raises(StoppedBySignal):
                train(tiny(*VIT), Path(folder) / "resumed", progress=False)
        train(tiny(*VIT), Path(folder) / "resumed", resume=True, progress=False)
    train(tiny(*VIT), Path(folder) / "plain", progress=False)
    train(tiny(*CLIPPED), Path(folder) / "plain-clipped", progress=False)
    return {"sharded": any(seen), "refused": refused, "dtypes": dtypes}


def close(a: Path, b: Path, steps: int = 1000) -> None:
    for x, y in zip(rows(a)[:steps], rows(b)[:steps], strict=True):
        for name in ("loss", "invariance", "matching", "grad_norm", "l0", "l0_eval"):
            assert (name in x) == (name in y)
            if name in x:
                tolerance = {"rel": 1e-4, "abs": 1e-6} if name[:2] != "l0" else {"abs": 2e-3}  # counts jump
                assert x[name] == pytest.approx(y[name], **tolerance), (x["step"], name)
    assert steps < 1000 or torch.allclose(codes(a / "encoder"), codes(b / "encoder"), atol=1e-4)


@pytest.mark.slow
def test_sharded_weights_train_like_unsharded_ones(tmp_path: Path) -> None:
    results = run_ranks(run_sharded, 2, str(tmp_path))
    assert all(result["dtypes"] == {torch.bfloat16} for result in results)
    assert all(result["sharded"] and "train.ema: not kept for sharded weights" in result["refused"] for result in results)
    close(tmp_path / "sharded", tmp_path / "plain")
    close(tmp_path / "resumed", tmp_path / "plain")
    close(tmp_path / "clipped", tmp_path / "plain-clipped", steps=3)  # norms are summed in other orders, which sorting amplifies
    a, b = (latest(tmp_path / name)[0] for name in ("sharded", "plain"))
    assert a is not None and b is not None
    assert {k: v.shape for k, v in a.model.items()} == {k: v.shape for k, v in b.model.items()}
    assert {k: v.shape for k, v in a.optimizer.items()} == {k: v.shape for k, v in b.optimizer.items()}
    longer = tiny(*VIT, "train.epochs=3")  # one process goes on from the checkpoint of two that were sharded
    for name in ("sharded", "plain"):
        train(longer, tmp_path / name, resume=True, allow_change=["train.epochs"], progress=False)
    close(tmp_path / "sharded", tmp_path / "plain")
