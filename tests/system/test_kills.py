"""Slow: a run is killed at random instants, half of them while it writes a checkpoint, and resumed until it is complete.

pytest -m slow -s tests/system/test_kills.py
"""

import os
import random
import signal
import time
from pathlib import Path

import pytest
from processes import run_alone
from runs import codes, rows, tiny

from rlpjepa_zoo.training.checkpoint import latest
from rlpjepa_zoo.training.tasks.pretrain import train

KILLS = 60
RECIPE = ["train.epochs=40", "train.checkpoint_minutes=0", "probe.every_epochs=40"]  # 120 steps, a checkpoint after each

pytestmark = pytest.mark.slow


def start(run: Path) -> int:
    """Fork a process that resumes the run; its process id."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            train(tiny(*RECIPE), run, resume=True, progress=False)
            code = 0
        finally:
            os._exit(code)
    return pid


def ended(pid: int) -> int | None:
    """Exit code, or None while it runs."""
    done, status = os.waitpid(pid, os.WNOHANG)
    return None if done == 0 else os.waitstatus_to_exitcode(status)


def kill_in_a_write(pid: int, run: Path, source: random.Random) -> int | None:
    """SIGKILL soon after the second temporary folder of a checkpoint appears; the exit code if the run ends first."""
    seen: set[str] = set()
    while (code := ended(pid)) is None:
        home = run / "checkpoints"
        fresh = {p.name for p in home.iterdir() if p.name.startswith(".tmp-") and p.name.endswith(f"-{pid}")} if home.is_dir() else set()
        seen |= fresh
        if fresh and len(seen) >= 2:
            time.sleep(source.uniform(0, 0.008))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return None
    return code


def kill_at_random(pid: int, source: random.Random) -> int | None:
    deadline = time.monotonic() + source.uniform(0.05, 1.5)
    while (code := ended(pid)) is None and time.monotonic() < deadline:
        time.sleep(0.002)
    if code is None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return code


def kill_and_resume(tmp_path: Path) -> None:
    """Kill and resume runs until there are enough kills."""
    train(tiny(*RECIPE), tmp_path / "whole", progress=False)
    source, kills, inside, runs = random.Random(0), 0, 0, 0
    while kills < KILLS:
        runs += 1
        run, step, code = tmp_path / f"run{runs}", 0, None
        while code is None:
            pid = start(run)
            if kills >= KILLS:
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            else:
                code = kill_in_a_write(pid, run, source) if kills % 2 else kill_at_random(pid, source)
            if code is None:
                kills += 1
                inside += any((run / "checkpoints").glob(f".tmp-*-{pid}"))
            found, damaged = latest(run)
            assert damaged == []
            assert (found.step if found else 0) >= step
            step = found.step if found else 0
        assert code == 0
        assert rows(run) == rows(tmp_path / "whole")
        assert codes(run / "encoder").equal(codes(tmp_path / "whole/encoder"))
    print(
        f"\n{kills} kills, {inside} of them inside the writing of a checkpoint; {runs} runs, all bit-equal; 0 checkpoints lost", flush=True
    )
    assert inside >= KILLS // 3


def test_random_kills_lose_no_checkpoint_and_end_bit_equal(tmp_path: Path) -> None:
    run_alone(kill_and_resume, tmp_path, limit=900)  # torch refuses to fork a process that other tests have made start autograd's threads
