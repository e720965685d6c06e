"""Collective operations; the only module that imports torch.distributed. On one process every function is the identity."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

DistError: type[Exception] = getattr(dist, "DistError", RuntimeError)
"""The exception that torch raises when processes cannot connect."""


def _active() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if _active() else 1


def rank() -> int:
    """Index of this process, from 0."""
    return dist.get_rank() if _active() else 0


class _Gather(torch.autograd.Function):
    """Concatenate over ranks; the gradient is the sum of all ranks' gradients, cut to this rank's rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int) -> Tensor:
        ctx.dim, ctx.rows = dim, x.shape[dim]
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].clone(memory_format=torch.contiguous_format)  # autograd may pass the same tensor to other branches
        dist.all_reduce(grad)
        return grad.narrow(ctx.dim, dist.get_rank() * ctx.rows, ctx.rows), None


def gather_with_grad(x: Tensor, dim: int = 0) -> Tensor:
    """Concatenate `x` of all ranks along `dim`, in rank order, keeping the gradient.

    With a loss computed from the gathered batch on every rank and gradients *averaged* over ranks (what DistributedDataParallel
    does), parameters receive exactly the gradient of one process that sees the joined batch. `Accelerator.gather` has no
    gradient, and a backward that only cuts out its own rows is wrong.

    Args:
        x: tensor of equal shape on all ranks.
        dim: the dimension to concatenate.
    """
    return _Gather.apply(x, dim) if _active() else x


@torch.no_grad()
def mean_over_ranks(x: Tensor) -> Tensor:
    """Average a tensor of equal shape over ranks (a new tensor, without gradient)."""
    x = x.detach().clone()
    if _active():
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x


@torch.no_grad()
def max_over_ranks(x: Tensor) -> Tensor:
    """Element-wise maximum over ranks; with it all ranks agree on a flag."""
    x = x.detach().clone()
    if _active():
        dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x


@torch.no_grad()
def gather_rows(x: Tensor) -> Tensor:
    """Concatenate tensors (n_r, ...) of all ranks along their first dimension; n_r may differ by rank."""
    if not _active():
        return x
    sizes = [torch.zeros(1, dtype=torch.long, device=x.device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(x)], device=x.device))
    padded = x.new_zeros((int(max(sizes)), *x.shape[1:]))
    padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(n)] for part, n in zip(parts, sizes, strict=True)])


def full_tensor(x: Tensor) -> Tensor:
    """The complete tensor if `x` is sharded over ranks (all ranks must call this), else `x`."""
    gather = getattr(x, "full_tensor", None)
    full: Tensor = x if gather is None else gather()
    return full


def copy_with_layout(x: Tensor, like: Tensor) -> Tensor:
    """A copy of `x` with its own dtype and the device, memory format and sharding of `like`, which has the same shape."""
    if hasattr(like, "full_tensor"):
        from torch.distributed.tensor import DTensor, distribute_tensor

        if isinstance(like, DTensor):
            return distribute_tensor(x.to(like.device), like.device_mesh, like.placements)
    return torch.empty_like(like, dtype=x.dtype).copy_(x)


def gather_objects(value: Any) -> list[Any]:
    """The values of all ranks, in rank order; for small host-side objects such as the list of unreadable images."""
    if not _active():
        return [value]
    out: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(out, value)
    return out


def raise_on_all_ranks(trouble: BaseException | None) -> None:
    """Raise the error of one rank on all ranks, so that no rank waits for one that has ended. All ranks call this; it is also a barrier.

    Args:
        trouble: this rank's error, or None.

    Raises:
        BaseException: this rank's error, else one with the type and text of the lowest rank's error.
    """
    if trouble is None and not _active():
        return
    failures = gather_objects(None if trouble is None else (type(trouble), str(trouble)))
    if trouble is not None:
        raise trouble
    for number, failure in enumerate(failures):
        if failure is not None:
            kind, text = failure
            try:
                error = kind(f"process {number}: {text}")
            except TypeError:  # the type needs further arguments
                error = RuntimeError(f"process {number}: {kind.__name__}: {text}")
            raise error


@contextmanager
def fail_together() -> Iterator[None]:
    """Run a block in which a rank may fail; then all ranks fail, see `raise_on_all_ranks`. The block must not contain a collective operation."""
    trouble = None
    try:
        yield
    except Exception as error:
        trouble = error
    raise_on_all_ranks(trouble)


@torch.no_grad()
def from_main(x: Tensor) -> None:
    """Overwrite a tensor with its value on rank 0."""
    if _active():
        dist.broadcast(x, 0)


def gather_before(module: torch.nn.Module, method: str) -> None:
    """Make a sharded module (FSDP 2) gather its weights before this method too, not only before `forward`; no effect on other modules."""
    if any(hasattr(p, "full_tensor") for p in module.parameters()):
        from torch.distributed.fsdp import register_fsdp_forward_method

        register_fsdp_forward_method(module, method)


def report(doing: str) -> None:
    """Tell the other ranks what this one begins, for `silent_ranks`. Costs one message to the store of the group.

    Args:
        doing: such as "to save a checkpoint".
    """
    if _active():
        with suppress(RuntimeError):  # the rank that keeps the store is gone
            dist.distributed_c10d._get_default_store().set(f"rlpjepa/doing/{dist.get_rank()}", doing)


def silent_ranks(wait: float = 3.0) -> dict[int, str]:
    """The ranks that do not give up with this one, because they hang or have ended, and what each began last. Called after a timeout.

    Args:
        wait: seconds that the other ranks have to give up too.

    Returns:
        Empty if the store of the group does not answer.
    """
    found: dict[int, str] = {}

    def ask() -> None:
        store = dist.distributed_c10d._get_default_store()
        with suppress(RuntimeError):
            store.set(f"rlpjepa/gives up/{dist.get_rank()}", "")
            time.sleep(wait)
            for other in range(dist.get_world_size()):
                if not store.check([f"rlpjepa/gives up/{other}"]):
                    key = f"rlpjepa/doing/{other}"
                    found[other] = store.get(key).decode() if store.check([key]) else "to start"

    if _active():
        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(wait + 10)  # a store that a stopped process keeps never answers
    return dict(found)


def barrier() -> None:
    """Wait for all ranks."""
    if _active():
        dist.barrier()


def start(patience: timedelta = timedelta(days=30)) -> None:
    """Connect the processes of a launch (torchrun, accelerate), if there are several, for small exchanges on the CPU.

    Args:
        patience: how long a rank waits for another that still works; the launcher ends all ranks when one dies.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and dist.is_available() and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=patience)


def shut_down() -> None:
    """Leave the process group, if there is one; torch warns about programs that end without leaving."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
