"""Starting runs: launch files, the SLURM script, sharded weights (FSDP 2)."""

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from processes import run_ranks
from runs import TINY, codes, rows, tiny

from rlpjepa_zoo.core import distributed
from rlpjepa_zoo.errors import RecipeError
from rlpjepa_zoo.training import setup
from rlpjepa_zoo.training.checkpoint import latest
from rlpjepa_zoo.training.tasks.pretrain import train
from rlpjepa_zoo.training.trainer import Trainer

RECIPES = Path(__file__).parents[2] / "recipes"
LAUNCH = sorted((RECIPES / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("file", LAUNCH, ids=lambda file: file.stem)
def test_a_launch_file_is_one_that_accelerate_reads(file: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    found = load_config_from_file(str(file))
    assert found.num_processes == {"cpu": 2, "gpu1": 1, "gpu8": 8, "gpu2x8": 16, "fsdp2": 8}[file.stem]
    assert str(found.mixed_precision) == "no"  # the recipe decides
    assert (found.num_machines, str(getattr(found.distributed_type, "value", found.distributed_type))) == {
        "cpu": (1, "MULTI_GPU"), "gpu1": (1, "NO"), "gpu8": (1, "MULTI_GPU"), "gpu2x8": (2, "MULTI_GPU"), "fsdp2": (1, "FSDP"),
    }[file.stem]  # fmt: skip


def test_accelerate_makes_fsdp_2_of_its_launch_file() -> None:
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    arguments = launch_command_parser().parse_args(["--config_file", str(RECIPES / "accelerate/fsdp2.yaml"), "-m", "rlpjepa_zoo", "train"])
    arguments, _, _ = _validate_launch_command(arguments)
    environment = prepare_multi_gpu_env(arguments)
    assert environment["ACCELERATE_USE_FSDP"] == "true" and environment["FSDP_VERSION"] == "2"
    assert environment["FSDP_AUTO_WRAP_POLICY"] == "SIZE_BASED_WRAP" and environment["FSDP_MIN_NUM_PARAMS"] == "1000000"


# --- SLURM ----------------------------------------------------------------------------------------------------------------------------


def program(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def job(folder: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    """The batch script with programs in the place of SLURM's: one node, two processes."""
    folder.mkdir(exist_ok=True)
    program(folder, "srun", 'shift; exec "$@"')
    program(folder, "scontrol", f'[ "$1" = show ] && echo localhost || echo "$@" >> {folder}/asked')
    program(folder, "scancel", "exit 1")  # no such step here: the script signals it itself
    environment = {
        **os.environ, "PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "here", "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NUM_NODES": "1", "SLURM_GPUS_ON_NODE": "2", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = ["bash", str(RECIPES / "slurm/train.sbatch"), "digits", *TINY, *more, "--out", str(out)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def test_a_slurm_job_that_is_warned_saves_goes_back_into_the_queue_and_goes_on(tmp_path: Path) -> None:
    run, more = tmp_path / "run", ["train.epochs=20", "train.checkpoint_minutes=1000", "probe.every_epochs=20"]
    first = job(tmp_path / "bin", run, *more)
    deadline = time.monotonic() + 90
    while not (run / "metrics.jsonl").is_file() or len((run / "metrics.jsonl").read_text().splitlines()) < 8:
        assert time.monotonic() < deadline and first.poll() is None, first.communicate()[0]
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGUSR1)  # as --signal=B:USR1 does: to the batch shell alone
    said, _ = first.communicate(timeout=60)
    assert first.returncode != 0 and "back into the queue" in said
    assert (tmp_path / "bin/asked").read_text().split() == ["requeue", str(os.getpid())]
    found, damaged = latest(run)
    assert found is not None and 8 <= found.step < 60 and not damaged
    logged = rows(run)
    train(tiny(*more), run, resume=True, progress=False)
    assert rows(run)[: found.step] == logged[: found.step] and (run / "summary.json").is_file()


# --- sharded weights ------------------------------------------------------------------------------------------------------------------

UNIT = 20_000
"""Parameters from which a module is sharded on its own: the encoder and its backbone are, the projector is not."""
VIT = [
    "train.channels_last=false",
    "encoder.backbone=test_vit",
    "encoder.args={img_size: 32, patch_size: 8}",
    "train.epochs=2",
    "optim.lr=0.002",
]


def fsdp(**options: Any) -> Any:
    """An Accelerator that shards as its launch file says; by itself it does so on GPUs only."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.utils import DistributedType

    made, asked = Accelerator(**options), yaml.safe_load((RECIPES / "accelerate/fsdp2.yaml").read_text())["fsdp_config"]
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=asked["fsdp_version"], auto_wrap_policy=asked["fsdp_auto_wrap_policy"].lower(), min_num_params=UNIT,
        reshard_after_forward=asked["fsdp_reshard_after_forward"], cpu_ram_efficient_loading=asked["fsdp_cpu_ram_efficient_loading"],
    )  # fmt: skip
    made.state.fsdp_plugin, made.state.distributed_type = plugin, DistributedType.FSDP
    return made


def run_half(folder: Path) -> set[torch.dtype]:
    """What the last layer of the projector gives out in training when the recipe asks for bfloat16."""
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
        train(tiny(*VIT, "train.precision=bf16", "train.epochs=1"), folder, progress=False)
    return seen


def run_sharded(folder: str) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "Accelerator", fsdp)
        seen: list[bool] = []
        original = distributed.full_tensor
        patch.setattr(distributed, "full_tensor", lambda x: (seen.append(hasattr(x, "full_tensor")), original(x))[1])
        train(tiny(*VIT), Path(folder) / "sharded", progress=False)
        dtypes = run_half(Path(folder) / "half")
        train(tiny(*VIT, "optim.clip_grad=0.5"), Path(folder) / "clipped", progress=False)
        try:
            train(tiny(*VIT, "train.ema=0.9"), Path(folder) / "ema", progress=False)
            refused = ""
        except RecipeError as error:
            refused = str(error)
        half = tiny(*VIT, "train.epochs=1", "optim.warmup_epochs=0.5")
        train(half, Path(folder) / "resumed", progress=False)
        train(tiny(*VIT), Path(folder) / "resumed", resume=True, allow_change=["train.epochs"], progress=False)
    train(tiny(*VIT), Path(folder) / "plain", progress=False)
    train(tiny(*VIT, "optim.clip_grad=0.5"), Path(folder) / "plain-clipped", progress=False)
    train(half, Path(folder) / "plain-resumed", progress=False)
    train(tiny(*VIT), Path(folder) / "plain-resumed", resume=True, allow_change=["train.epochs"], progress=False)
    return {"sharded": any(seen), "refused": refused, "dtypes": dtypes}


def close(a: Path, b: Path, steps: int = 1000) -> None:
    for x, y in zip(rows(a)[:steps], rows(b)[:steps], strict=True):
        for name in ("loss", "invariance", "matching", "grad_norm", "l0", "l0_eval"):
            assert (name in x) == (name in y)
            if name in x:
                tolerance = {"rel": 1e-4, "abs": 1e-6} if name[:2] != "l0" else {"abs": 2e-3}  # counts jump
                assert x[name] == pytest.approx(y[name], **tolerance), (x["step"], name)
    assert steps < 1000 or torch.allclose(codes(a / "encoder"), codes(b / "encoder"), atol=1e-4)


def test_sharded_weights_train_as_whole_ones_and_leave_the_same_files(tmp_path: Path) -> None:
    found = run_ranks(run_sharded, 2, str(tmp_path), limit=150)
    assert all(f["dtypes"] == {torch.bfloat16} for f in found)
    assert all(f["sharded"] and "train.ema: not kept for sharded weights" in f["refused"] for f in found)
    close(tmp_path / "sharded", tmp_path / "plain")
    close(tmp_path / "resumed", tmp_path / "plain-resumed")
    close(tmp_path / "clipped", tmp_path / "plain-clipped", steps=3)  # norms are summed in other orders, which sorting amplifies
    a, b = (latest(tmp_path / name)[0] for name in ("sharded", "plain"))
    assert a is not None and b is not None
    assert {k: v.shape for k, v in a.model.items()} == {k: v.shape for k, v in b.model.items()}
    assert {k: v.shape for k, v in a.optimizer.items()} == {k: v.shape for k, v in b.optimizer.items()}
    longer = tiny(*VIT, "train.epochs=3")  # one process goes on from the checkpoint of two that were sharded
    for name in ("sharded", "plain"):
        train(longer, tmp_path / name, resume=True, allow_change=["train.epochs"], progress=False)
    close(tmp_path / "sharded", tmp_path / "plain")
