"""Run a function on several gloo processes of this machine."""

import os
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _child(rank: int, fn: Callable[..., Any], world: int, folder: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "ACCELERATE_USE_CPU": "true"} | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
    }  # for Accelerate, which finds the group made
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world, timeout=timedelta(seconds=30))
    try:
        torch.save(fn(*args), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def run_ranks(fn: Callable[..., Any], world: int, *args: Any, limit: float = 60.0) -> list[Any]:
    """`fn(*args)` on each of `world` ranks; returns what each returned, in rank order.

    `fn` must be importable (a module's top level) and its arguments and value picklable.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a rank raised; carries its traceback.
        TimeoutError: the ranks did not end within `limit` seconds.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        context = mp.spawn(_child, (fn, world, folder, args), nprocs=world, join=False)
        deadline = time.monotonic() + limit
        try:
            while not context.join(timeout=0.2):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{world} ranks were still running after {limit} s")
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
                process.join()
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world)]


def alive(pid: int) -> bool:
    """Not gone, and not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(pids: list[int], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(alive, pids))
