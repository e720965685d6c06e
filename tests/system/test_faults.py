"""Checks the table in FAULTS.md and provokes the faults that belong to no single module: interrupted writes, disk errors, resumes at every step,
changing images, workers that die or hang."""

import ast
import errno
import functools
import io
import json
import logging
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import equal, forked, made, same, steps
from images import photos, toy
from PIL import Image
from processes import PATIENCE, alive, gone
from refusals import refused
from runs import TINY, codes, of_folder, poison, rows, stop_after, tiny

from rlpjepa_zoo.config.pretrain import Recipe
from rlpjepa_zoo.core.files import lock
from rlpjepa_zoo.data.decode import decode
from rlpjepa_zoo.data.files.listing import list_images
from rlpjepa_zoo.data.images import Images
from rlpjepa_zoo.data.loader import Batches, make_loader
from rlpjepa_zoo.data.sources import Source, open_images
from rlpjepa_zoo.errors import DataError, NonFiniteError, OutputError, StoppedBySignal
from rlpjepa_zoo.ops.sliced_wasserstein import sliced_wasserstein
from rlpjepa_zoo.training import checkpoint, run_dir, trainer
from rlpjepa_zoo.training.checkpoint import latest, remove_leftovers, save
from rlpjepa_zoo.training.tasks.encoders import build_encoder
from rlpjepa_zoo.training.tasks.heads import EncoderWithHeads
from rlpjepa_zoo.training.tasks.pretrain import train

HERE = Path(__file__).parents[1]

SMALL = [
    "data.limit=96", "train.batch_size=32", "train.epochs=2", "probe.every_epochs=2", "probe.bank=32", "probe.eval_images=16",
    "encoder.dim=16", "encoder.hidden_dim=16", "objective.num_directions=16",
]  # fmt: skip
"""Two epochs of three steps."""


def small(*more: str) -> Recipe:
    return tiny(*SMALL, *more)


# --- the catalogue itself -------------------------------------------------------------------------------------------------------------

RANGES = {
    "I": range(1, 24),
    "R": range(1, 19),
    "D": range(1, 18),
    "N": range(1, 15),
    "A": range(1, 23),
    "E": range(1, 12),
    "X": range(1, 12),
    "H": range(1, 32),
    "C": range(1, 15),
    "S": range(1, 8),
    "B": range(1, 163),
}
IDS = [f"{group}{number:02d}" for group, numbers in RANGES.items() for number in numbers]


@functools.cache
def known_tests(folder: Path) -> dict[str, set[str]]:
    """The marks slow and gpu of every test function, by ``room/file::name``."""
    marks_of_tests = {}
    for path in folder.rglob("test_*.py"):
        tree = ast.parse(path.read_text())
        of_module = {
            mark
            for node in tree.body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"
            for mark in ("slow", "gpu")
            if f"pytest.mark.{mark}" in ast.unparse(node.value)
        }
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                own = {mark for mark in ("slow", "gpu") for d in node.decorator_list if ast.unparse(d) == f"pytest.mark.{mark}"}
                marks_of_tests[f"{path.relative_to(folder)}::{node.name}"] = own | of_module
    return marks_of_tests


def problems(text: str, known: dict[str, set[str]]) -> list[str]:
    """Errors of the tables: IDs missing, unknown or twice, rows without test or reason, tests that do not exist or have other marks."""
    table = [[cell.strip() for cell in line.strip().strip("|").split(" | ")] for line in text.splitlines() if re.match(r"\| [A-Z]\d", line)]
    seen = [row[0] for row in table]
    wrong = [f"{name}: no row" for name in IDS if name not in seen] + [f"{name}: unknown" for name in seen if name not in IDS]
    wrong += [f"{name}: {seen.count(name)} rows" for name in set(seen) if seen.count(name) > 1]
    for name, *cells in table:
        if len(cells) != 3 or not all(cells):
            wrong.append(f"{name}: expected four filled columns, found {1 + len(cells)}")
            continue
        tests = re.findall(r"`([\w/]+\.py::\w+)`(?: \((\w+)\))?", cells[2])
        if not tests and not re.match(r"reason: \S.{20,}", cells[2]):
            wrong.append(f"{name}: neither a test nor a reason")
        for test, mark in tests:
            if test not in known:
                wrong.append(f"{name}: there is no {test}")
            elif known[test] != ({mark} if mark else set()):
                wrong.append(f"{name}: {test} has the marks {known[test]}, the table says '{mark}'")
    return wrong


def test_every_fault_has_an_existing_test_or_a_reason() -> None:
    assert problems((HERE / "FAULTS.md").read_text(), known_tests(HERE)) == []


@pytest.mark.parametrize(
    ("pattern", "replacement", "complaint"),
    [
        (r"\| I07 .*\n", "", "I07: no row"),
        (r"(\| D08 .*\n)", r"\1\1", "D08: 2 rows"),
        (r"\| N14 ", "| N15 ", "N15: unknown"),
        (
            r"training/test_checkpoint\.py::test_files_are",
            "training/test_checkpoint.py::test_no_files_are",
            "there is no training/test_checkpoint.py::test_no_files",
        ),
        (r"(\| A22 .* \| ).*? \|\n", r"\1by inspection |\n", "A22: neither a test nor a reason"),
        (r"(\| X09 .*)\(slow\)", r"\1", "marks {'slow'}, the table says ''"),
        (r"(\| R05 )\|.*?\| ", r"\1| ", "R05: expected four filled columns"),
    ],
)
def test_a_damaged_fault_table_is_noticed(pattern: str, replacement: str, complaint: str) -> None:
    text, count = re.subn(pattern, replacement, (HERE / "FAULTS.md").read_text(), count=1)
    assert count == 1 and any(complaint in line for line in problems(text, known_tests(HERE))), problems(text, known_tests(HERE))


# --- I: killed at every call of a save ------------------------------------------------------------------------------------------------

CALLS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "os.listdir", "shutil.rmtree")
"""Audit events that Python raises before each file system call."""


def die_at(at: int, tell: int | None = None) -> None:
    """Kill this process before its `at`-th file system call; the file `tell` gets the number of calls so far. Cannot be undone."""
    count, fsync = [0], os.fsync

    def call() -> None:
        count[0] += 1
        if tell is not None:
            os.pwrite(tell, struct.pack("<q", count[0]), 0)
        if count[0] == at:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in CALLS:
            call()

    def synced(handle: int) -> None:
        call()
        fsync(handle)
        call()

    sys.addaudithook(hook)
    os.fsync = synced


def killed_in(work: Callable[[], Any], at: int, tell: int | None = None) -> int:
    """Exit status of a copy of this process that does some work and is killed at a file system call."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            signal.alarm(int(PATIENCE))
            die_at(at, tell)
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def number_of_calls(work: Callable[[], Any], scratch: Path) -> int:
    handle = os.open(scratch, os.O_RDWR | os.O_CREAT)
    assert killed_in(work, -1, handle) == 0
    (count,) = struct.unpack("<q", os.pread(handle, 8, 0))
    os.close(handle)
    return count


def killed_at_calls_of_a_save(tmp_path: Path, again: bool, every: int) -> None:
    """Save a new step, or one that exists but is damaged, and kill the process at every n-th call."""
    run, before = tmp_path / "run", tmp_path / "before"
    for step in (1, 2) if again else (1, 2, 3):
        save(before, made(step), keep=3)
    if again:
        shutil.copytree(before / "checkpoints/step-00000002", before / "checkpoints/step-00000003")  # whose manifest says 2
    old, new = made(2 if again else 3), made(3 if again else 4)

    def fresh() -> None:
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(before, run)

    fresh()
    total = number_of_calls(lambda: save(run, new), tmp_path / "count")
    assert total > 40
    kept = []
    for at in range(1, total + 1, every):
        fresh()
        assert killed_in(lambda: save(run, new), at) == -signal.SIGKILL, at
        found, damaged = latest(run)
        assert same(found, old) or same(found, new), (at, steps(run))
        assert all(again and "not the manifest of step 3" in line for line in damaged), (at, damaged)
        kept.append(found.step if found else 0)
        with lock(run):
            remove_leftovers(run)
            assert all(name.startswith("step-") for name in steps(run)), at
        save(run, made(9))
        assert same(latest(run)[0], made(9))
    assert kept == sorted(kept) and set(kept) == {old.step, new.step}


@pytest.mark.parametrize("again", [False, True], ids=["a new step", "a damaged step again"])
def test_a_kill_at_many_calls_of_a_save_leaves_old_or_new(tmp_path: Path, again: bool) -> None:
    killed_at_calls_of_a_save(tmp_path, again, every=4)


@pytest.mark.slow
@pytest.mark.parametrize("again", [False, True], ids=["a new step", "a damaged step again"])
def test_a_kill_at_every_call_of_a_save_leaves_old_or_new(tmp_path: Path, again: bool) -> None:
    killed_at_calls_of_a_save(tmp_path, again, every=1)


def test_a_kill_at_every_call_of_the_sweep_is_cleaned_up(tmp_path: Path) -> None:
    run, before = tmp_path / "run", tmp_path / "before"
    for step in (1, 2):
        save(before, made(step))
    for name in (".tmp-00000003-4711", ".del-step-00000000-4711"):
        shutil.copytree(before / "checkpoints/step-00000002", before / "checkpoints" / name)

    def sweep() -> None:
        with lock(run):
            remove_leftovers(run)

    def fresh() -> None:
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(before, run)

    fresh()
    total = number_of_calls(sweep, tmp_path / "count")
    left = set()
    for at in range(1, total + 1):
        fresh()
        assert killed_in(sweep, at) == -signal.SIGKILL
        assert same(latest(run)[0], made(2))
        left.add(len(steps(run)))
        sweep()
        assert steps(run) == ["step-00000001", "step-00000002"], at
    assert left == {3, 4}  # folders there: the kill is before the call that removes the last one


def test_a_kill_in_the_middle_of_a_write_leaves_the_old(tmp_path: Path) -> None:
    run, size = tmp_path / "run", 4000  # 16 kB a file
    save(run, made(1))

    def write(most: int) -> Callable[[], None]:
        def work() -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # the write that goes over the limit kills, after writing up to it
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            save(run, made(2, size))

        return work

    for most in (1, 100, 8000, 16000):
        assert killed_in(write(most), -1) == -signal.SIGXFSZ
        left = [p for p in (run / "checkpoints").glob(".tmp-*/*") if p.stat().st_size == most]
        assert left, most
        assert same(latest(run)[0], made(1)) and latest(run)[1] == []
        with lock(run):
            remove_leftovers(run)
            assert steps(run) == ["step-00000001"]


def test_a_kill_before_the_first_checkpoint_restarts_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    train(small(), tmp_path / "whole", progress=False)
    with monkeypatch.context() as patch:
        stop_after(patch, 3, signal.SIGKILL)
        assert killed_in(lambda: train(small(), run, progress=False), -1) == -signal.SIGKILL
    assert len(rows(run)) == 2 and latest(run) == (None, [])
    caplog.set_level(logging.INFO, "rlpjepa_zoo")
    train(small(), run, resume=True, progress=False)
    assert "resumed at" not in caplog.text and rows(run) == rows(tmp_path / "whole")


# --- I: signals -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["in a step", "in the save"])
def test_two_signals_are_one_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    run, saved, original = tmp_path / "run", list[int](), checkpoint.save

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    def saving(out: Path, what: Any, *more: Any) -> Path:
        saved.append(what.step)
        if when == "in the save":
            twice()
        return original(out, what, *more)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", saving)
        if when == "in a step":
            right = trainer.set_learning_rates
            patch.setattr(trainer, "set_learning_rates", lambda o, r, at, *more: (twice() if at == 1 else None, right(o, r, at, *more))[1])
        else:
            stop_after(patch, 2, signal.SIGUSR1)
        with pytest.raises(StoppedBySignal) as stopped:
            train(small(), run, progress=False)
    assert stopped.value.exit_code == 143 and saved == ([2] if when == "in a step" else [2, 3])  # that of SIGUSR1 ends, then one step more
    assert steps(run) == [f"step-0000000{step}" for step in saved] and latest(run)[1] == []


# --- I: disks -------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """`mount("size=2m")` mounts a new file system; skips the test where that is not allowed."""
    made_here: list[Path] = []

    def mounted(options: str) -> Path:
        place = tmp_path / f"disk{len(made_here)}"
        place.mkdir()
        if (
            shutil.which("mount") is None
            or subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True).returncode
        ):
            pytest.skip("mounting a file system needs root")
        made_here.append(place)
        return place

    yield mounted
    for place in made_here:
        subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk_is_named_and_keeps_the_old_checkpoint(mount: Callable[..., Path]) -> None:
    run = mount("size=1m") / "run"
    save(run, made(1))
    with refused(OutputError, match=r"run/checkpoints/step-00000002: .*disk full \(.*it needs 4\.0 MB, \d\.\d MB are free\)") as caught:
        save(run, made(2, size=500_000))
    assert caught.value.exit_code == 6 and steps(run) == ["step-00000001"]
    assert same(latest(run)[0], made(1))
    save(run, made(2))
    assert same(latest(run)[0], made(2))


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("name", ["fsync", "rename", "mkdir"])
def test_a_disk_error_at_any_call_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int) -> None:
    right, failed = getattr(os, name), 0
    for at in range(1, 20):
        run, calls = tmp_path / f"run{at}", [0]
        save(run, made(1))
        save(run, made(2))

        def failing(*given: Any, at: int = at, calls: list[int] = calls, **options: Any) -> Any:
            calls[0] += 1
            if calls[0] == at:
                raise OSError(number, os.strerror(number))
            return right(*given, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, name, failing)
            try:
                save(run, made(3))
            except OutputError as error:
                failed += 1
                assert error.exit_code == 6 and os.strerror(number) in str(error) and str(run) in str(error)
        found, damaged = latest(run)
        assert (same(found, made(2)) or same(found, made(3))) and damaged == [] and not any(n.startswith(".tmp") for n in steps(run))
        if calls[0] < at:
            break
    assert failed >= {"fsync": 6, "rename": 2, "mkdir": 1}[name]


def test_a_full_disk_for_the_log_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def full(path: Path, mode: str) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(run_dir, "open", full, raising=False)
    train(small(), tmp_path / "run", progress=False)
    assert caplog.text.count("metrics.jsonl: No space left on device") == 1
    assert latest(tmp_path / "run")[0].step == 6 and (tmp_path / "run/encoder/config.json").is_file()  # type: ignore[union-attr]


def test_a_disk_too_small_is_refused_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    with monkeypatch.context() as patch:
        right = checkpoint.check_space
        patch.setattr(checkpoint, "check_space", lambda run, size: (asked.append(size), right(run, size))[1])
        train(small(), tmp_path / "enough", progress=False)
    newest = sorted((tmp_path / "enough/checkpoints").iterdir())[-1]
    real = sum(p.stat().st_size for p in newest.glob("*.safetensors"))
    assert 0.8 * real < asked[0] < 1.2 * real
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2 * asked[0]))
    with refused(OutputError, match=r"run: too little room on the disk: \d+ MB are needed for two checkpoints, \d+ MB are free") as caught:
        train(small(), tmp_path / "run", progress=False)
    assert caught.value.exit_code == 6 and {p.name for p in (tmp_path / "run").iterdir()} == {".lock"}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=17_000_000 + asked[0]))
    train(small(), tmp_path / "enough", resume=True, progress=False)  # whose two checkpoints make room for the next


def test_an_unwritable_output_is_refused_before_the_first_step(tmp_path: Path, mount: Callable[..., Path]) -> None:
    (tmp_path / "file").write_text("mine")
    place = mount("size=1m")
    (place / "run").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", place], check=True)
    for out in (tmp_path / "file/run", tmp_path / "file", place / "run", place / "new"):
        with refused(OutputError, match=re.escape(str(out))) as caught:
            train(small(), out, progress=False)
        assert caught.value.exit_code == 6
    assert (tmp_path / "file").read_text() == "mine" and list((place / "run").iterdir()) == []


def test_a_moved_run_folder_ends_the_run_and_can_be_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, moved, recipe = tmp_path / "run", tmp_path / "moved", small("train.checkpoint_minutes=0")
    train(recipe, tmp_path / "whole", progress=False)
    with monkeypatch.context() as patch:
        right = trainer.set_learning_rates
        patch.setattr(trainer, "set_learning_rates", lambda o, r, at, *m: (run.rename(moved) if at == 3 else None, right(o, r, at, *m))[1])
        with refused(OutputError, match=f"{re.escape(str(run))}: moved or removed") as caught:
            train(recipe, run, progress=False)
    assert caught.value.exit_code == 6 and not run.exists() and latest(moved)[0].step == 3  # type: ignore[union-attr]
    train(recipe, moved, resume=True, progress=False)
    assert rows(moved) == rows(tmp_path / "whole")


def test_the_newest_checkpoint_is_chosen_by_step_not_by_clock(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in (1, 2):
        save(run, made(step))
    for times in ((2e9, 1e9), (1e9, 1e9), (-1e9, -2e9)):
        for step, when in zip((1, 2), times, strict=True):
            os.utime(run / f"checkpoints/step-0000000{step}", (when, when))
        assert same(latest(run)[0], made(2))
    shutil.copytree(run, tmp_path / "copy")
    assert same(latest(tmp_path / "copy")[0], made(2))
    with lock(run), lock(tmp_path / "copy"):
        save(tmp_path / "copy", made(3))
    assert same(latest(tmp_path / "copy")[0], made(3)) and same(latest(run)[0], made(2))


# --- R: resumes -----------------------------------------------------------------------------------------------------------------------


def only(whole: Path, step: int, run: Path) -> Path:
    """A copy of a run as it was after a step."""
    shutil.copytree(whole, run, ignore=shutil.ignore_patterns("checkpoints", "encoder", "summary.json"))
    shutil.copytree(whole / f"checkpoints/step-{step:08d}", run / f"checkpoints/step-{step:08d}")
    return run


def resumed_at(step: int, whole: Path, run: Path, *more: str) -> None:
    """Resume a copy of the run at a step and compare it with the uninterrupted one, bit for bit."""
    train(small("train.checkpoint_minutes=0", "train.keep=99", *more), only(whole, step, run), resume=True, progress=False)
    assert rows(run) == rows(whole)
    ours, theirs = latest(run)[0], latest(whole)[0]
    assert ours is not None and theirs is not None and ours.step == theirs.step == 6
    assert equal(ours.model, theirs.model) and equal(ours.optimizer, theirs.optimizer)


@pytest.fixture(scope="module")
def every_step(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs that kept a checkpoint of every step."""
    run = tmp_path_factory.mktemp("every") / "step"
    train(small("train.checkpoint_minutes=0", "train.keep=99"), run, progress=False)
    assert len(steps(run)) == 6
    return run


@pytest.mark.parametrize("step", range(1, 6))
def test_a_resume_at_every_step_of_two_epochs_is_bit_equal(every_step: Path, tmp_path: Path, step: int) -> None:
    resumed_at(step, every_step, tmp_path / "run")


def test_a_resume_with_workers_inside_an_epoch_is_bit_equal(every_step: Path, tmp_path: Path) -> None:
    resumed_at(4, every_step, tmp_path / "run", "train.num_workers=2")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("step", range(1, 6))
def test_a_resume_at_every_step_with_any_workers_is_bit_equal(every_step: Path, tmp_path: Path, step: int, workers: int) -> None:
    resumed_at(step, every_step, tmp_path / "run", f"train.num_workers={workers}")


@pytest.mark.parametrize("more", [["train.checkpoint_minutes=1000"], ["probe.every_epochs=1", "train.num_workers=2"]], ids=str)
def test_saving_and_measuring_do_not_change_the_weights(every_step: Path, tmp_path: Path, more: list[str]) -> None:
    train(small(*more), tmp_path / "run", progress=False)
    ours, theirs = latest(tmp_path / "run")[0], latest(every_step)[0]
    assert ours is not None and theirs is not None and equal(ours.model, theirs.model) and equal(ours.optimizer, theirs.optimizer)


def test_dropped_paths_equal_those_of_the_uninterrupted_run(every_step: Path, tmp_path: Path) -> None:
    drop = ["encoder.args={drop_path_rate: 0.6}", "train.checkpoint_minutes=0", "train.keep=99"]
    train(small(*drop), tmp_path / "whole", progress=False)
    assert rows(tmp_path / "whole") != rows(every_step)  # the rate does something
    train(small(*drop), only(tmp_path / "whole", 2, tmp_path / "run"), resume=True, progress=False)
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    assert torch.equal(codes(tmp_path / "run/encoder"), codes(tmp_path / "whole/encoder"))


def test_another_number_of_threads_is_logged_at_resume(
    every_step: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = only(every_step, 5, tmp_path / "run")
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 3)
    train(small("train.checkpoint_minutes=0", "train.keep=99"), run, resume=True, progress=False)
    assert f"{threads} threads before, {threads + 3} now: equal up to rounding, not bit for bit" in caplog.text


# --- N: numbers -----------------------------------------------------------------------------------------------------------------------


def test_an_infinite_gradient_is_not_clipped_into_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, {3})
    train(small("optim.clip_grad=1.0"), tmp_path / "run", progress=False)
    found = latest(tmp_path / "run")[0]
    assert found is not None and all(bool(v.isfinite().all()) for v in [*found.model.values(), *found.optimizer.values()])
    assert [row.get("skipped", 0) for row in rows(tmp_path / "run") if row["kind"] == "train"] == [0, 0, 1, 1, 1, 1]


def test_batches_of_one_constant_image_give_finite_numbers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "black").mkdir()
    for i in range(24):
        Image.new("RGB", (20, 20)).save(tmp_path / "black" / f"{i}.png")
    recipe = of_folder(tmp_path / "black", *SMALL[1:], "train.batch_size=8")
    train(recipe, tmp_path / "run", progress=False)
    found = [row for row in rows(tmp_path / "run") if row["kind"] == "train"]
    assert len(found) == 6 and all(v is not None for row in found for v in row.values()) and not any("skipped" in row for row in found)
    assert all(0 < row["dead"] < 1 for row in found)
    state = latest(tmp_path / "run")[0]
    assert state is not None and all(bool(v.isfinite().all()) for v in state.model.values())


def test_ties_give_equal_values_in_any_order_equal_bits_in_one() -> None:
    source = torch.Generator().manual_seed(0)
    z = (torch.rand(2, 40, 6, generator=source, dtype=torch.float64) - 0.7).relu()  # mostly zeros
    y, c = torch.rand(40, 6, generator=source, dtype=torch.float64), torch.eye(6, dtype=torch.float64)

    def both(order: torch.Tensor) -> tuple[float, torch.Tensor]:
        leaf = z[:, order].clone().requires_grad_()
        loss = sliced_wasserstein(leaf, y, c)
        return loss.item(), torch.autograd.grad(loss, leaf)[0]

    value, gradient = both(torch.arange(40))
    assert value == both(torch.arange(40))[0] and torch.equal(gradient, both(torch.arange(40))[1])
    for _ in range(5):
        other, moved = both(torch.randperm(40, generator=source))
        assert other == pytest.approx(value, rel=1e-14)
        assert torch.allclose(moved.sum(1), gradient.sum(1), atol=1e-15)


def test_non_finite_steps_end_a_run_with_exit_code_7(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, set(range(2, 100)), "pixels")
    with refused(NonFiniteError, match="step 3: .*2 steps in a row") as caught:
        train(small("train.max_skipped=1"), tmp_path / "run", progress=False)
    assert caught.value.exit_code == 7


# --- A: images ------------------------------------------------------------------------------------------------------------------------


def jpeg(seed: int = 0, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (24, 32, 3), dtype=np.uint8)).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def with_exif(block: bytes) -> bytes:
    return jpeg()[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 8) + b"Exif\0\0" + block + jpeg()[2:]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_exif_is_decoded_or_refused(rng: np.random.Generator) -> None:
    zero = b"II*\0" + struct.pack("<IHHHIII", 8, 1, 0x011A, 5, 1, 26, 0) + struct.pack("<II", 72, 0)  # a resolution of 72 / 0
    assert decode(with_exif(zero)).size == (32, 24)
    exif = Image.Exif()
    exif[0x0112], exif[0x011A], exif[0x010F] = 6, 72.5, "maker"
    block = exif.tobytes().removeprefix(b"Exif\0\0")
    assert decode(with_exif(block)).size == (24, 32)
    sizes = set()
    for _ in range(400):
        mutated = bytearray(block)
        for at in rng.integers(0, len(block), rng.integers(1, 6)):
            mutated[at] = rng.integers(0, 256)
        try:
            sizes.add(decode(with_exif(bytes(mutated))).size)
        except DataError as error:
            assert len(str(error).splitlines()) == 1
    assert sizes == {(24, 32), (32, 24)}


def test_a_flipped_jpeg_bit_is_seen_by_the_data_fingerprint(image_folder: Path, tmp_path: Path) -> None:
    flipped = 0
    for at in range(200, len(jpeg()) - 2, 37):
        data = bytearray(jpeg())
        data[at] ^= 16
        try:
            flipped += not np.array_equal(np.asarray(decode(bytes(data))), np.asarray(decode(jpeg())))
        except DataError:
            pass
    assert flipped > 3  # other pictures, and nothing in the file tells
    from rlpjepa_zoo.data.sources import fingerprint

    def of(data: bytes) -> str:
        return fingerprint(Source(Images(lambda i: data, ["a.jpg"]), None, 1, 0))

    other = bytearray(jpeg())
    other[-20] ^= 16
    assert of(jpeg()) == of(jpeg()) != of(bytes(other))


def test_copies_of_an_image_keep_their_own_names(image_folder: Path) -> None:
    first = image_folder / "red" / "00.png"
    shutil.copy(first, image_folder / "red" / "copy.png")
    shutil.copy(first, image_folder / "blue" / "copy.png")
    found = open_images(image_folder)
    assert len(found) == 42 == len(set(found.ids)) and {"red/copy.png", "blue/copy.png"} <= set(found.ids)
    assert len(open_images([first, first])) == 2


def test_rows_without_a_label_are_left_out_of_the_probes() -> None:
    torch.manual_seed(0)
    model = EncoderWithHeads(build_encoder(small()), 10)
    x = torch.rand(8, 3, 32, 32)
    labels = torch.tensor([3, -1, 5, -1])
    out = model([x], labels)
    assert out.z.shape == (2, 4, 16) and bool(out.probe_loss.isfinite())
    out.probe_loss.backward()
    bias = model.probes["z"].bias.grad
    assert bias is not None and bool((bias[[3, 5]] < 0).all()) and abs(float(bias.sum())) < 1e-6
    none = model([x], torch.full((4,), -1))
    assert none.probe_loss.item() == 0 and none.probe_accuracy.tolist() == [0, 0]


def test_files_that_vanish_or_change_in_a_run_are_counted(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = trainer.set_learning_rates

    def meanwhile(optimizer: Any, recipe: Any, at: int, *more: Any) -> Any:
        if at == 1:
            (image_folder / "red/03.png").unlink()
            (image_folder / "blue/07.png").write_bytes(b"")
        return right(optimizer, recipe, at, *more)

    monkeypatch.setattr(trainer, "set_learning_rates", meanwhile)
    recipe = of_folder(image_folder, *SMALL[1:], "train.batch_size=8", "data.cache_gb=0")
    train(recipe, tmp_path / "run", progress=False)
    listed = {json.loads(line)["reason"].split(":")[0] for line in (tmp_path / "run/bad_images.jsonl").read_text().splitlines()}
    assert listed == {"red/03.png", "blue/07.png"}


def test_archives_are_neither_listed_nor_opened(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("../../evil.jpg", jpeg())
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        entry = tarfile.TarInfo("/evil.jpg")
        entry.size = len(jpeg())
        tar.addfile(entry, io.BytesIO(jpeg()))
    with refused(DataError, match="no images found"):
        list_images(tmp_path)
    for name in ("a.zip", "b.tar"):
        with refused(DataError, match="cannot be read as an image"):
            decode(tmp_path / name)
    with refused(DataError, match="cannot be read as an image"):
        next(open_images(tmp_path / "a.zip").rows()).read()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.zip", "b.tar"] and not (tmp_path.parent / "evil.jpg").exists()


# --- X: workers and memory ------------------------------------------------------------------------------------------------------------


class Odd:
    """Encoded images; one calls a function when a worker reads it."""

    def __init__(self, row: int, what: Callable[[], Any]) -> None:
        self.row, self.what, self.main = row, what, os.getpid()

    def __call__(self, i: int) -> bytes:
        if i == self.row and os.getpid() != self.main:
            self.what()
        return jpeg(i)


def odd(what: Callable[[], Any], row: int = 5) -> Source:
    return Source(Images(Odd(row, what), [f"photo-{i}" for i in range(40)]), None, 40, 0)


@pytest.mark.parametrize("where", ["in the step", "at the next batch"])
def test_a_killed_worker_is_one_error_line_at_once(where: str) -> None:
    """torch raises from a handler of SIGCHLD, so in the middle of the code that runs then."""
    loader = make_loader(photos(), toy("train.num_workers=2"), range(50))
    workers = list[int]()
    with (
        refused(DataError, match=r"DataLoader worker .*out of memory\? Lower train\.num_workers") as caught,
        Batches(loader) as batches,
    ):
        batches.next()
        workers += [worker.pid for worker in batches.iterator._workers]  # type: ignore[attr-defined]
        os.kill(workers[0], signal.SIGKILL)
        if where == "in the step":
            time.sleep(PATIENCE)  # the handler interrupts it
        for _ in range(50):
            batches.next()
    assert caught.value.exit_code == 3 and gone(workers)


def test_a_hanging_worker_ends_the_run_and_is_ended_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.5)  # how long torch waits for a worker to end by itself
    loader = make_loader(odd(lambda: time.sleep(100 * PATIENCE)), toy("train.num_workers=1", "train.loader_timeout_minutes=0.02"), range(5))
    with (
        refused(
            DataError, match=r"no batch from the workers: .*1\.2 seconds while they read photo-5; .*train\.loader_timeout_minutes"
        ) as caught,
        Batches(loader) as batches,
    ):
        (worker,) = batches.iterator._workers  # type: ignore[attr-defined]
        for _ in range(5):
            batches.next()
    assert caught.value.exit_code == 3 and gone([worker.pid])


def test_a_worker_slow_within_the_limit_is_waited_for() -> None:
    with Batches(
        make_loader(odd(lambda: time.sleep(0.5)), toy("train.num_workers=1", "train.loader_timeout_minutes=5"), range(5))
    ) as batches:
        assert sum(len(batches.next().rows) for _ in range(5)) == 40
    assert make_loader(photos(), toy(), range(1)).timeout == 0  # without workers there is nobody to wait for


def children(pid: int) -> list[int]:
    return [int(p) for t in Path(f"/proc/{pid}/task").iterdir() for p in (t / "children").read_text().split()]


def test_workers_end_when_the_main_process_is_killed(image_folder: Path, tmp_path: Path) -> None:
    recipe = of_folder(
        image_folder, "train.batch_size=8", "train.epochs=1000", "train.num_workers=2", "probe.every_epochs=1000", "data.cache_gb=0"
    )

    def work() -> None:
        signal.alarm(0)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        train(recipe, tmp_path / "run", progress=False)

    with forked(work) as child:
        deadline = time.monotonic() + PATIENCE
        while not ((tmp_path / "run/metrics.jsonl").is_file() and rows(tmp_path / "run")) and time.monotonic() < deadline:
            time.sleep(0.02)
        workers = children(child)
        assert len(workers) == 2 and all(map(alive, workers))
    assert gone(workers)
    assert not [name for name in os.listdir("/dev/shm") for pid in (child, *workers) if name.startswith(f"torch_{pid}_")]


def test_a_worker_out_of_shared_memory_is_one_error_line() -> None:
    loader = make_loader(odd(lambda: os.kill(os.getpid(), signal.SIGBUS)), toy("train.num_workers=1"), range(5))
    with refused(DataError, match=r"DataLoader worker .*out of shared memory, /dev/shm: .*train\.num_workers"), Batches(loader) as batches:
        for _ in range(5):
            batches.next()


def test_prefetched_batches_fit_shared_memory_or_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, one = toy("train.num_workers=2"), 8 * 2 * 3 * 12 * 12 * 4 + 65536  # bytes of a batch
    usage = shutil.disk_usage(HERE)

    def prefetch(batches_free: float) -> int | None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=int(batches_free * one) + 1))
        return make_loader(photos(), recipe, range(1)).prefetch_factor

    assert [prefetch(n) for n in (1000, 10, 9, 8, 6, 4)] == [4, 4, 3, 3, 2, 1]
    with refused(OutputError, match="/dev/shm: too little shared memory: 0.4 MB are needed for batches of 2 workers.*train.num_workers"):
        prefetch(3.9)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "code"), [("64k", 6), ("6m", 0)])
def test_a_small_dev_shm_is_refused_or_suffices(image_folder: Path, tmp_path: Path, size: str, code: int) -> None:
    if subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", "/dev/shm"], capture_output=True).returncode:
        pytest.skip("another /dev/shm needs root")
    more = [t for t in TINY if not t.startswith(("data.", "train."))]
    recipe = [*more, "data.image_size=64", "train.batch_size=16", "train.num_workers=1", "train.precision=no", "train.epochs=30"]
    start = f"mount -t tmpfs -o size={size} tmpfs /dev/shm && exec {sys.executable} -m rlpjepa_zoo train folder-resnet18 --quiet"
    command = f"{start} data.path={image_folder} --out {tmp_path / 'run'} {' '.join(recipe)}"
    done = subprocess.run(["unshare", "-m", "bash", "-c", command], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    assert code == 0 or "/dev/shm: too little shared memory: 4.9 MB are needed" in done.stderr.splitlines()[-1]


def test_out_of_memory_is_one_line_and_keeps_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = trainer.Trainer._forward
    monkeypatch.setattr(
        trainer.Trainer, "_forward", lambda self, batch: (torch.empty(10**15) if self.step == 4 else None, right(self, batch))[1]
    )
    with refused(OutputError, match=r"out of memory \(.*can't allocate memory.*lower train\.batch_size = 32") as caught:
        train(small("train.checkpoint_minutes=0"), tmp_path / "run", progress=False)
    assert caught.value.exit_code == 6 and latest(tmp_path / "run")[0].step == 4  # type: ignore[union-attr]
    monkeypatch.setattr(trainer.Trainer, "_forward", lambda self, batch: (_ for _ in ()).throw(RuntimeError("a bug of ours")))
    with pytest.raises(RuntimeError, match="^a bug of ours$"):
        train(small(), tmp_path / "other", progress=False)


def resident() -> float:
    """Resident memory of this process in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


@pytest.mark.slow
def test_ten_thousand_steps_do_not_grow_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, right = [], run_dir.RunLog.row
    monkeypatch.setattr(run_dir.RunLog, "row", lambda self, values: (seen.append((values["step"], resident())), right(self, values))[1])
    recipe = small(
        "train.batch_size=8", "train.epochs=834", "probe.every_epochs=200", "train.log_every=200", "train.checkpoint_minutes=0.1"
    )
    train(recipe, tmp_path / "run", progress=False)
    at, held = np.array([s for s in seen if s[0] >= 2000]).T
    slope = 1000 * float(np.polyfit(at, held, 1)[0])
    print(f"\n{slope:.3f} MB in 1000 steps, {held[0]:.0f} to {held[-1]:.0f} MB")
    assert at[-1] >= 10000 and slope < 1
