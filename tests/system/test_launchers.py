"""Several processes and their launchers: killed, stopped, hung, or never met. Each test starts torchrun or `accelerate launch`."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import alive, gone, run_ranks
from refusals import refused
from runs import TINY, codes, rows, stop_after, tiny, wait_for_step

from rlpjepa_zoo.core import distributed, signals
from rlpjepa_zoo.errors import RecipeError, StoppedBySignal
from rlpjepa_zoo.training.checkpoint import latest
from rlpjepa_zoo.training.tasks.pretrain import train

LONG = ["train.epochs=1000", "probe.every_epochs=1000", "train.checkpoint_minutes=0", "train.log_every=50"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


class Launched:
    """A launcher and the processes that train."""

    def __init__(self, process: subprocess.Popen[str], run: Path) -> None:
        self.process, self.run = process, run

    def ranks(self) -> list[int]:
        """Their process ids, in rank order."""
        found = {}
        for entry in Path(f"/proc/{self.process.pid}/task").glob("*/children"):
            for pid in entry.read_text().split():
                environment = dict(item.partition("=")[::2] for item in Path(f"/proc/{pid}/environ").read_text().split("\0"))
                found[int(environment.get("RANK", len(found)))] = int(pid)
        return [found[rank] for rank in sorted(found)]

    def ended(self, seconds: float) -> tuple[int, str]:
        """Exit code and what was said."""
        _, err = self.process.communicate(timeout=seconds)
        return self.process.returncode, err


@contextmanager
def launched(run: Path, launcher: list[str], *more: str, step: int = 2) -> Iterator[Launched]:
    """A run under a launcher, from its first checkpoints on; nothing is left of it afterwards."""
    words = [sys.executable, *launcher, "-m", "rlpjepa_zoo", "train", "digits", *TINY, *LONG, *more, "--out", str(run), "--quiet"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
    found = Launched(process, run)
    pids: list[int] = []
    try:
        wait_for_step(run, step)
        pids = found.ranks()
        yield found
    finally:
        for pid in [process.pid, *pids, *(found.ranks() if process.poll() is None else [])]:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
        if process.poll() is None:
            process.communicate(timeout=30)


def whole(run: Path, at_least: int) -> None:
    found, damaged = latest(run)
    assert found is not None and found.step >= at_least and damaged == []


# --- the launcher ---------------------------------------------------------------------------------------------------------------------


def test_ranks_of_a_launcher_that_is_killed_save_and_end(tmp_path: Path) -> None:
    with launched(tmp_path / "run", TORCHRUN, "train.checkpoint_minutes=1000", "probe.every_epochs=1", step=3) as run:
        ranks = run.ranks()
        assert len(ranks) == 2
        run.process.kill()
        assert gone(ranks, 10)
    whole(tmp_path / "run", 3)


@pytest.mark.slow
def test_a_trainer_whose_accelerate_launch_is_terminated_saves_and_ends(tmp_path: Path) -> None:
    launcher = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes=1"]
    with launched(tmp_path / "run", launcher, "train.checkpoint_minutes=1000", "probe.every_epochs=1", step=3) as run:
        (trainer,) = run.ranks()
        run.process.terminate()
        assert gone([trainer], 10)
        assert run.ended(5)[1].splitlines()[-1].startswith("error: stopped by a signal after step")
    whole(tmp_path / "run", 3)


@pytest.mark.slow
def test_torchrun_passes_sigterm_on_and_all_ranks_save_once_and_end(tmp_path: Path) -> None:
    with launched(tmp_path / "run", TORCHRUN) as run:
        ranks = run.ranks()
        run.process.terminate()
        code, err = run.ended(30)
        assert code != 0 and gone(ranks, 1) and "stopped by a signal after step" in err
    whole(tmp_path / "run", 2)


@pytest.mark.slow
def test_ranks_that_outlast_the_patience_of_torchrun_leave_whole_checkpoints(tmp_path: Path) -> None:
    with launched(tmp_path / "run", [*TORCHRUN, "--shutdown-timeout=2"]) as run:
        ranks = run.ranks()
        for pid in ranks:
            os.kill(pid, signal.SIGSTOP)
        run.process.terminate()
        assert run.ended(30)[0] != 0 and gone(ranks, 1)
    whole(tmp_path / "run", 2)


# --- one of the processes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_when_one_rank_is_killed_all_end_and_the_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    with launched(tmp_path / "run", TORCHRUN, "train.epochs=20", "probe.every_epochs=20") as run:
        ranks = run.ranks()
        os.kill(ranks[1], signal.SIGKILL)
        code, err = run.ended(20)
        assert code != 0 and gone(ranks, 1) and "SIGKILL" in err and "this is a bug" not in err
    whole(tmp_path / "run", 2)
    found = latest(tmp_path / "run")[0]
    assert found is not None and found.step < 60
    train(tiny(*LONG, "train.epochs=20", "probe.every_epochs=20"), tmp_path / "run", resume=True, progress=False)
    assert latest(tmp_path / "run")[0].step == 60  # type: ignore[union-attr]


@pytest.mark.slow
def test_a_rank_that_hangs_is_given_up_after_the_timeout(tmp_path: Path) -> None:
    with launched(tmp_path / "run", [*TORCHRUN, "--shutdown-timeout=2"], "train.timeout_minutes=0.1") as run:
        ranks = run.ranks()
        os.kill(ranks[1], signal.SIGSTOP)
        code, err = run.ended(60)
        assert code != 0 and gone(ranks, 1)
        (line,) = [line for line in err.splitlines() if "error: process 0: another process is gone or does not answer" in line]
        assert "train.timeout_minutes = 0.1" in line and "this is a bug" not in err
    whole(tmp_path / "run", 2)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_processes_that_do_not_meet_say_so_in_one_line(tmp_path: Path, rank: int) -> None:
    """The port of the meeting is somebody else's (seen by the process that opens it), or nobody is there (seen by the others)."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        if rank == 0:
            taken.listen()
        meeting = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        environment = {**os.environ, **meeting, "MASTER_PORT": str(taken.getsockname()[1]), "ACCELERATE_USE_CPU": "true"}
        more = ["train.timeout_minutes=0.05", "--out", str(tmp_path / "run")]
        command = [sys.executable, "-m", "rlpjepa_zoo", "train", "digits", *TINY, *more]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 5 and done.stderr.splitlines()[-1].startswith("error: the processes did not find each other: "), done.stderr
    assert "Traceback" not in done.stderr


# --- how many there are -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("world", "near"), [(3, "63 or 66"), (100, "100")])
def test_a_batch_that_the_processes_do_not_divide_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: int, near: str
) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: world)
    with refused(RecipeError, match=f"train.batch_size: 64 is not divisible by {world} processes; use {near}$") as caught:
        train(tiny(), tmp_path / "run", progress=False)
    assert caught.value.exit_code == 2 and not (tmp_path / "run").exists()


def test_the_real_number_of_processes_is_said_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "rlpjepa_zoo")
    stop_after(monkeypatch, 1)
    with pytest.raises(StoppedBySignal):
        train(tiny(), tmp_path / "run", progress=False)
    assert "of 64 images, 64 on each of 1 x cpu" in caplog.text


SHARED = ["encoder.projector_depth=1", "encoder.freeze_backbone=true", "train.epochs=2", "probe.every_epochs=2"]
"""No batch statistics, so any number of processes must agree to rounding."""


def on_two_ranks(folder: str) -> str:
    """Two undisturbed runs, and one that one process began and another number is to end."""
    for name in ("first", "second"):
        train(tiny(*SHARED), Path(folder) / name, progress=False)
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 4)
        try:
            train(tiny(*SHARED), Path(folder) / "passed on", resume=True, progress=False)
        except StoppedBySignal as stopped:
            return str(stopped)
    return "finished"


@pytest.mark.slow
def test_two_ranks_repeat_bit_for_bit_and_one_two_one_agree_to_rounding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    passed = tmp_path / "passed on"
    train(tiny(*SHARED), tmp_path / "alone", progress=False)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(StoppedBySignal):
            train(tiny(*SHARED), passed, progress=False)
    assert all("after step 4" in said for said in run_ranks(on_two_ranks, 2, str(tmp_path), limit=120))
    first, second = (latest(tmp_path / name)[0] for name in ("first", "second"))
    assert first is not None and second is not None and all(torch.equal(a, second.model[k]) for k, a in first.model.items())
    assert rows(tmp_path / "first") == rows(tmp_path / "second")
    train(tiny(*SHARED), passed, resume=True, progress=False)
    assert "2 processes before, 1 now: equal up to rounding, not bit for bit" in caplog.text
    alone, mixed = latest(tmp_path / "alone")[0], latest(passed)[0]
    assert alone is not None and mixed is not None and mixed.step == 6
    for name, tensor in alone.model.items():
        for other in (mixed, first):
            assert torch.allclose(tensor.float(), other.model[name].float(), rtol=1e-5, atol=2e-6), name
    assert torch.allclose(codes(passed / "encoder"), codes(tmp_path / "alone/encoder"), atol=1e-5)


def test_the_launcher_is_watched_only_where_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of one's own may outlive the shell that started it."""
    seen: list[Any] = []
    monkeypatch.setattr(signals.Interrupts, "_watch", lambda self: seen.append(self._over))
    train(tiny("train.epochs=1"), tmp_path / "own", progress=False)
    assert seen == []
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    train(tiny("train.epochs=1"), tmp_path / "launched", progress=False)
    assert len(seen) == 1 and seen[0].is_set()
