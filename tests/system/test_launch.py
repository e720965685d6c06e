"""Starting runs: launch files, the SLURM script, torchrun and `accelerate launch`; their processes are killed, stopped, hang, or never meet."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from processes import PATIENCE, alive, gone, program
from refusals import refused
from runs import TINY, rows, stop_after, tiny, wait_for_step

from rlpjepa_zoo.core import distributed, signals
from rlpjepa_zoo.errors import RecipeError, StoppedBySignal
from rlpjepa_zoo.training.checkpoint import latest
from rlpjepa_zoo.training.tasks.pretrain import train

RECIPES = Path(__file__).parents[2] / "recipes"
LAUNCH_FILES = sorted((RECIPES / "accelerate").glob("*.yaml"))
LONG = ["train.epochs=1000", "probe.every_epochs=1000", "train.checkpoint_minutes=0", "train.log_every=50"]
STEPS_OF_LONG = 3000
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def newest_step(run: Path, at_least: int) -> int:
    """Step of the newest checkpoint of a run that was stopped before its end; no checkpoint is damaged."""
    newest, damaged = latest(run)
    assert newest is not None and damaged == []
    assert at_least <= newest.step < STEPS_OF_LONG
    return newest.step


def resume_to_the_end(run: Path, *more: str) -> None:
    """Resume a run of which few steps are left."""
    epochs = newest_step(run, 1) // 3 + 2
    train(tiny(*more, f"train.epochs={epochs}"), run, resume=True, allow_change=["train.epochs"], progress=False)
    assert newest_step(run, 1) == 3 * epochs and (run / "summary.json").is_file()


# --- launch files ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", LAUNCH_FILES, ids=lambda file: file.stem)
def test_accelerate_reads_the_launch_file(file: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(file))
    assert config.num_processes == {"cpu": 2, "gpu1": 1, "gpu8": 8, "gpu2x8": 16, "fsdp2": 8}[file.stem]
    assert str(config.mixed_precision) == "no"  # the recipe decides
    assert (config.num_machines, str(getattr(config.distributed_type, "value", config.distributed_type))) == {
        "cpu": (1, "MULTI_GPU"), "gpu1": (1, "NO"), "gpu8": (1, "MULTI_GPU"), "gpu2x8": (2, "MULTI_GPU"), "fsdp2": (1, "FSDP"),
    }[file.stem]  # fmt: skip


def test_accelerate_starts_fsdp_2_from_its_launch_file() -> None:
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    arguments = launch_command_parser().parse_args(["--config_file", str(RECIPES / "accelerate/fsdp2.yaml"), "-m", "rlpjepa_zoo", "train"])
    arguments, _, _ = _validate_launch_command(arguments)
    environment = prepare_multi_gpu_env(arguments)
    assert environment["ACCELERATE_USE_FSDP"] == "true" and environment["FSDP_VERSION"] == "2"
    assert environment["FSDP_AUTO_WRAP_POLICY"] == "SIZE_BASED_WRAP" and environment["FSDP_MIN_NUM_PARAMS"] == "1000000"


# --- SLURM ----------------------------------------------------------------------------------------------------------------------------


def job_number() -> int:
    """A job number whose port, which the script derives from it, is free."""
    while True:
        number = int.from_bytes(os.urandom(2))
        with socket.socket() as free, suppress(OSError):
            free.bind(("", 20000 + number % 20000))
            return number


def job(number: int, folder: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    """Start the batch script with stand-ins for the programs of SLURM: one node, two processes."""
    folder.mkdir(exist_ok=True)
    program(folder, "srun", 'shift; exec "$@"')
    program(folder, "scontrol", f'[ "$1" = show ] && echo localhost || echo "$@" >> {folder}/calls')
    program(folder, "scancel", "exit 1")  # no such step here: the script signals it itself
    environment = {
        **os.environ, "PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "here", "SLURM_JOB_ID": str(number),
        "SLURM_JOB_NUM_NODES": "1", "SLURM_GPUS_ON_NODE": "2", "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    command = ["bash", str(RECIPES / "slurm/train.sbatch"), "digits", *TINY, *more, "--out", str(out)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


@pytest.mark.slow
def test_warned_slurm_job_saves_is_requeued_and_resumes(tmp_path: Path) -> None:
    number, run, more = job_number(), tmp_path / "run", ["probe.every_epochs=1000", "train.checkpoint_minutes=1000"]
    first = job(number, tmp_path / "bin", run, *more, "train.epochs=1000")
    try:
        deadline = time.monotonic() + PATIENCE
        while not (run / "metrics.jsonl").is_file() or len((run / "metrics.jsonl").read_text().splitlines()) < 8:
            assert time.monotonic() < deadline and first.poll() is None, first.communicate()[0]
            time.sleep(0.05)
        os.kill(first.pid, signal.SIGUSR1)  # as --signal=B:USR1 does: to the batch shell alone
        output, _ = first.communicate(timeout=PATIENCE)
    finally:
        if first.poll() is None:
            os.killpg(first.pid, signal.SIGKILL)
            first.communicate()
    assert first.returncode != 0 and "back into the queue" in output
    assert (tmp_path / "bin/calls").read_text().split() == ["requeue", str(number)]
    step, logged = newest_step(run, 8), rows(run)
    resume_to_the_end(run, *more)
    assert rows(run)[:step] == logged[:step]


# --- torchrun and accelerate launch ---------------------------------------------------------------------------------------------------


class Launched:
    """A launcher and the processes that train."""

    def __init__(self, process: subprocess.Popen[str], run: Path) -> None:
        self.process, self.run = process, run

    def ranks(self) -> list[int]:
        """Process ids of the ranks, in rank order."""
        pids = {}
        for entry in Path(f"/proc/{self.process.pid}/task").glob("*/children"):
            for pid in entry.read_text().split():
                environment = dict(item.partition("=")[::2] for item in Path(f"/proc/{pid}/environ").read_text().split("\0"))
                pids[int(environment.get("RANK", len(pids)))] = int(pid)
        return [pids[rank] for rank in sorted(pids)]

    def end(self) -> tuple[int, str]:
        """Wait for the launcher; its exit code and stderr."""
        _, err = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, err


@contextmanager
def launched(run: Path, launcher: list[str], *more: str, step: int = 2) -> Iterator[Launched]:
    """A run under a launcher that has saved a checkpoint of `step`; all its processes are killed afterwards."""
    words = [sys.executable, *launcher, "-m", "rlpjepa_zoo", "train", "digits", *TINY, *LONG, *more, "--out", str(run), "--quiet"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
    started = Launched(process, run)
    pids: list[int] = []
    try:
        wait_for_step(run, step)
        pids = started.ranks()
        yield started
    finally:
        for pid in [process.pid, *pids, *(started.ranks() if process.poll() is None else [])]:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
        if process.poll() is None:
            process.communicate(timeout=PATIENCE)


@pytest.mark.slow
def test_ranks_of_a_killed_launcher_save_and_end(tmp_path: Path) -> None:
    with launched(tmp_path / "run", TORCHRUN, "train.checkpoint_minutes=1000", "probe.every_epochs=1", step=3) as run:
        ranks = run.ranks()
        assert len(ranks) == 2
        run.process.kill()
        assert gone(ranks)
    newest_step(tmp_path / "run", 3)


@pytest.mark.slow
def test_trainer_of_a_terminated_accelerate_launch_saves_and_ends(tmp_path: Path) -> None:
    launcher = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes=1"]
    with launched(tmp_path / "run", launcher, "train.checkpoint_minutes=1000", "probe.every_epochs=1", step=3) as run:
        (trainer,) = run.ranks()
        run.process.terminate()
        assert gone([trainer])
        assert run.end()[1].splitlines()[-1].startswith("error: stopped by a signal after step")
    newest_step(tmp_path / "run", 3)


@pytest.mark.slow
def test_torchrun_forwards_sigterm_and_all_ranks_save_once_and_end(tmp_path: Path) -> None:
    with launched(tmp_path / "run", TORCHRUN) as run:
        ranks = run.ranks()
        run.process.terminate()
        code, err = run.end()
        assert code != 0 and gone(ranks) and "stopped by a signal after step" in err
    newest_step(tmp_path / "run", 2)


@pytest.mark.slow
def test_ranks_killed_by_torchrun_leave_whole_checkpoints(tmp_path: Path) -> None:
    with launched(tmp_path / "run", [*TORCHRUN, "--shutdown-timeout=2"]) as run:
        ranks = run.ranks()
        for pid in ranks:
            os.kill(pid, signal.SIGSTOP)
        run.process.terminate()
        assert run.end()[0] != 0 and gone(ranks)
    newest_step(tmp_path / "run", 2)


# --- one of the processes -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_rank_ends_all_and_the_run_resumes(tmp_path: Path) -> None:
    with launched(tmp_path / "run", TORCHRUN) as run:
        ranks = run.ranks()
        os.kill(ranks[1], signal.SIGKILL)
        code, err = run.end()
        assert code != 0 and gone(ranks) and "SIGKILL" in err and "this is a bug" not in err
    newest_step(tmp_path / "run", 2)
    resume_to_the_end(tmp_path / "run", *LONG)


@pytest.mark.slow
def test_a_hanging_rank_is_given_up_after_the_timeout(tmp_path: Path) -> None:
    with launched(tmp_path / "run", [*TORCHRUN, "--shutdown-timeout=2"], "train.timeout_minutes=0.1") as run:
        ranks = run.ranks()
        os.kill(ranks[1], signal.SIGSTOP)
        code, err = run.end()
        assert code != 0 and gone(ranks)
        (line,) = [line for line in err.splitlines() if line.startswith("error: process 0: ")]
        assert re.match("error: process 0: (process 1 began .* and is gone or hangs|another process is gone or does not answer)", line)
        assert "train.timeout_minutes = 0.1" in line and "this is a bug" not in err
    newest_step(tmp_path / "run", 2)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_cannot_connect_fail_in_one_line(tmp_path: Path, rank: int) -> None:
    """The rendezvous port is taken (rank 0 fails), or nothing listens on it (the other ranks fail)."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        if rank == 0:
            taken.listen()
        rendezvous = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        environment = {**os.environ, **rendezvous, "MASTER_PORT": str(taken.getsockname()[1]), "ACCELERATE_USE_CPU": "true"}
        more = ["train.timeout_minutes=0.05", "--out", str(tmp_path / "run")]
        command = [sys.executable, "-m", "rlpjepa_zoo", "train", "digits", *TINY, *more]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 5 and done.stderr.splitlines()[-1].startswith("error: the processes did not find each other: "), done.stderr
    assert "Traceback" not in done.stderr


# --- the number of processes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("world", "near"), [(3, "30 or 33"), (100, "100")])
def test_a_batch_not_divisible_by_the_processes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: int, near: str) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: world)
    with refused(RecipeError, match=f"train.batch_size: 32 is not divisible by {world} processes; use {near}$") as caught:
        train(tiny(), tmp_path / "run", progress=False)
    assert caught.value.exit_code == 2 and not (tmp_path / "run").exists()


def test_the_number_of_processes_is_logged_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "rlpjepa_zoo")
    stop_after(monkeypatch, 1)
    with pytest.raises(StoppedBySignal):
        train(tiny(), tmp_path / "run", progress=False)
    assert "of 32 images, 32 on each of 1 x cpu" in caplog.text


def test_a_launcher_is_watched_only_if_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run without launcher may outlive the shell that started it."""
    watched: list[Any] = []
    monkeypatch.setattr(signals.Interrupts, "_watch", lambda self: watched.append(self._over))
    train(tiny("train.epochs=1"), tmp_path / "own", progress=False)
    assert watched == []
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    train(tiny("train.epochs=1"), tmp_path / "launched", progress=False)
    assert len(watched) == 1 and watched[0].is_set()
