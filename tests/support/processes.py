"""Run a function on several gloo processes of this machine, or in one process of its own.

Each process of pytest starts one server that imports torch and the package once and forks the ranks (the start method "forkserver"), so a rank starts
in a tenth of a second instead of five. Every call gets new processes, so no state passes from one call to the next.
"""

import functools
import multiprocessing.forkserver
import os
import stat
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from pictures import small_pictures

PRELOADED = [  # a module that is missing would only cost time, so test_ranks.py checks the names
    "torch.distributed.fsdp",
    "accelerate",
    "datasets",
    "hypothesis",
    "pytest",
    "rlpjepa_zoo.cli.app",
    "rlpjepa_zoo.embedding.extract",
    "rlpjepa_zoo.training.tasks.finetune",
    "rlpjepa_zoo.training.tasks.pretrain",
]
ENVIRONMENT = dict(os.environ)
"""Environment of the session; a test may have changed some variables before the server starts."""

PATIENCE = 300.0
"""Seconds after which ranks count as hanging. The cores may be busy, so this says nothing about speed."""


@functools.cache
def start_server() -> None:
    """Start the server that forks, once for each process of pytest."""
    mp.get_context("forkserver").set_forkserver_preload(PRELOADED)
    now = dict(os.environ)
    try:
        _set_environment(ENVIRONMENT)
        multiprocessing.forkserver.ensure_running()
    finally:
        _set_environment(now)


def _set_environment(values: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(values)


def _rank(rank: int, fn: Callable[..., Any], world: int, folder: str, environment: dict[str, str], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    group = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    _set_environment(environment | group | {"ACCELERATE_USE_CPU": "true"})  # Accelerate uses the group that is there and opens no port
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=PATIENCE))
    try:
        with small_pictures():
            torch.save(fn(*args), f"{folder}/{rank}.pt")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def run_ranks(fn: Callable[..., Any], world: int, *args: Any, limit: float = PATIENCE) -> list[Any]:
    """`fn(*args)` on each of `world` ranks; returns what each returned, in rank order.

    `fn` must be importable (a module's top level) and its arguments and value picklable.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a rank raised; carries its traceback.
        TimeoutError: the ranks did not end within `limit` seconds.
    """
    start_server()
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        arguments = (fn, world, folder, dict(os.environ), args)
        context = mp.start_processes(_rank, arguments, nprocs=world, join=False, start_method="forkserver")
        _join(context, limit)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _alone(_: int, fn: Callable[..., None], environment: dict[str, str], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    _set_environment(environment)
    with small_pictures():
        fn(*args)


def run_alone(fn: Callable[..., None], *args: Any, limit: float = PATIENCE) -> None:
    """`fn(*args)` in one new process without a group, as `run_ranks` does; for functions that change the state of their process."""
    start_server()
    context = mp.start_processes(_alone, (fn, dict(os.environ), args), nprocs=1, join=False, start_method="forkserver")
    _join(context, limit)


def _join(context: Any, limit: float) -> None:
    """Wait for all processes and kill those that are left; errors as of `run_ranks`."""
    deadline = time.monotonic() + limit
    try:
        while not context.join(timeout=1.0):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{len(context.processes)} processes were still running after {limit} s")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
            process.join()


def program(folder: Path, name: str, text: str) -> None:
    """Write a shell script that stands in for a program."""
    path = folder / name
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def alive(pid: int) -> bool:
    """Not gone, and not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(pids: list[int], seconds: float = PATIENCE) -> bool:
    """Whether all these processes end within some seconds."""
    deadline = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(alive, pids))
