"""Checkpoints: bit-equal round trips; whatever fails, at least one checkpoint verifies at every instant."""

import errno
import json
import os
import random
import resource
import shutil
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
from checkpoints import equal, forked, made, same, steps
from torch import Tensor

from rlpjepa_zoo.config.pretrain import Recipe
from rlpjepa_zoo.core.files import lock
from rlpjepa_zoo.errors import ModelError, OutputError, UsageError
from rlpjepa_zoo.training import checkpoint
from rlpjepa_zoo.training.checkpoint import Checkpoint, latest, optimizer_state, remove_leftovers, restore_optimizer, save
from rlpjepa_zoo.training.optim import build_optimizer, set_learning_rates
from rlpjepa_zoo.training.tasks.pretrain import param_groups, train

FILES = ["model.safetensors", "optimizer.safetensors", "state.json", "MANIFEST.json"]


@contextmanager
def refused(kind: type[Exception], *fragments: str) -> Iterator[None]:
    with pytest.raises(kind) as caught:
        yield
    assert type(caught.value) is kind and len(str(caught.value).splitlines()) == 1, str(caught.value)
    for fragment in fragments:
        assert fragment in str(caught.value)


# --- round trips --------------------------------------------------------------------------------------------------------------------


def test_no_checkpoint_is_none_without_complaint(tmp_path: Path) -> None:
    assert latest(tmp_path / "nowhere") == (None, [])
    (tmp_path / "checkpoints").mkdir()
    assert latest(tmp_path) == (None, [])


def test_every_dtype_and_odd_value_comes_back_bit_for_bit(tmp_path: Path) -> None:
    odd = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-45, 3.4e38]
    model: dict[str, Tensor] = {str(d): torch.tensor(odd, dtype=d) for d in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}
    model |= {
        "long": torch.tensor([-(2**63), 2**63 - 1]),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 4),
    }
    state = {"text": "Größe\n\u2028", "big": 2**70, "small": 1e-300, "nested": {"list": [1, None, True, {"a": "b"}]}, "empty": {}}
    saved = Checkpoint(7, model, {}, state)
    assert save(tmp_path, saved) == tmp_path / "checkpoints" / "step-00000007"
    loaded, damaged = latest(tmp_path)
    assert same(loaded, saved) and damaged == []


def test_long_list_of_bad_images_comes_back(tmp_path: Path) -> None:
    state = {"bad": {str(row): f"images/{row:07d}.jpg: cannot be read as an image (image file is truncated)" for row in range(20000)}}
    saved = made(3)._replace(state=state)
    save(tmp_path, saved)
    assert same(latest(tmp_path)[0], saved)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def optimizer_of(net: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    return build_optimizer(recipe.optim.name, param_groups(net, None, recipe), recipe.optim)


def advance(net: Net, optimizer: torch.optim.Optimizer, recipe: Recipe, span: range) -> None:
    for step in span:
        set_learning_rates(optimizer, recipe.optim, step, 20, 2)
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("name", ["adamw", "lars"])
def test_restored_optimizer_continues_bit_for_bit(tmp_path: Path, name: str) -> None:
    recipe = Recipe.load("digits", [f"optim.name={name}", "optim.lr=0.05", "optim.warmup_epochs=2", "train.epochs=10"])
    unbroken = Net()
    advance(unbroken, optimizer_of(unbroken, recipe), recipe, range(12))
    first = Net()
    optimizer = optimizer_of(first, recipe)
    advance(first, optimizer, recipe, range(7))
    tensors, scalars = optimizer_state(optimizer)
    assert tensors and json.loads(json.dumps(scalars)) == scalars
    save(tmp_path, Checkpoint(7, dict(first.state_dict()), tensors, {"optimizer": scalars}))
    loaded, _ = latest(tmp_path)
    assert loaded is not None and equal(loaded.model, dict(first.state_dict())) and equal(loaded.optimizer, tensors)
    second = Net()
    again = optimizer_of(second, recipe)
    second.load_state_dict(loaded.model)
    restore_optimizer(again, loaded.optimizer, loaded.state["optimizer"])
    assert equal(optimizer_state(again)[0], tensors)
    advance(second, again, recipe, range(7, 12))
    assert equal(dict(second.state_dict()), dict(unbroken.state_dict()))
    forgotten = Net()
    forgotten.load_state_dict(loaded.model)
    advance(forgotten, optimizer_of(forgotten, recipe), recipe, range(7, 12))
    assert not equal(dict(forgotten.state_dict()), dict(unbroken.state_dict()))


def test_optimizer_state_of_more_parameters_is_refused() -> None:
    net = Net()
    optimizer = optimizer_of(net, Recipe.load("digits"))
    with refused(ModelError, "optimizer state"):
        restore_optimizer(optimizer, {"99.exp_avg": torch.zeros(3)}, {})


# --- retention ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [2, 3])
def test_only_the_newest_are_kept(tmp_path: Path, keep: int) -> None:
    for step in (5, 10, 200, 1000, 1001):
        save(tmp_path, made(step), keep)
        assert same(latest(tmp_path)[0], made(step))
    assert steps(tmp_path) == ["step-00000200", "step-00001000", "step-00001001"][-keep:]


def test_saving_a_step_again_keeps_it_and_its_predecessor(tmp_path: Path) -> None:
    for step in (1, 2, 2, 2):
        save(tmp_path, made(step))
    assert steps(tmp_path) == ["step-00000001", "step-00000002"] and same(latest(tmp_path)[0], made(2))


def test_saving_a_damaged_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, made(1))
    save(tmp_path, made(2))
    (tmp_path / "checkpoints/step-00000002/model.safetensors").write_bytes(b"x")
    save(tmp_path, made(2))
    loaded, damaged = latest(tmp_path)
    assert same(loaded, made(2)) and damaged == []


def test_checkpoint_saved_after_falling_back_is_kept(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        save(tmp_path, made(step), keep=4)
    for step in (30, 40):
        (tmp_path / f"checkpoints/step-000000{step}/model.safetensors").write_bytes(b"x")
    assert same(latest(tmp_path)[0], made(20))
    assert save(tmp_path, made(25), keep=2).is_dir()
    assert same(latest(tmp_path)[0], made(25))
    (tmp_path / "checkpoints/step-00000025/state.json").write_bytes(b"x")
    assert same(latest(tmp_path)[0], made(20))


# --- damage -------------------------------------------------------------------------------------------------------------------------


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "halved": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "emptied": lambda file: file.write_bytes(b""),
    "flipped": flip,
    "zeroed": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"x"),
    "missing": lambda file: file.unlink(),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
}


def two(run: Path) -> Path:
    save(run, made(1))
    return save(run, made(2))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path: Path, name: str, kind: str) -> None:
    newest = two(tmp_path)
    DAMAGE[kind](newest / name)
    loaded, damaged = latest(tmp_path)
    assert same(loaded, made(1))
    assert len(damaged) == 1 and str(newest) in damaged[0] and len(damaged[0].splitlines()) == 1


def test_every_bit_flip_of_a_manifest_is_noticed(tmp_path: Path) -> None:
    manifest = two(tmp_path) / "MANIFEST.json"
    data = manifest.read_bytes()
    for place in range(len(data)):
        manifest.write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
        loaded, damaged = latest(tmp_path)
        assert same(loaded, made(1)) and len(damaged) == 1, place


def test_empty_folder_or_file_named_as_a_step_is_passed_over(tmp_path: Path) -> None:
    newest = two(tmp_path)
    shutil.rmtree(newest)
    newest.mkdir()
    (newest.parent / "step-00000003").write_bytes(b"")
    loaded, damaged = latest(tmp_path)
    assert same(loaded, made(1)) and len(damaged) == 2 and "step-00000003" in damaged[0]


def test_checkpoint_named_as_another_step_is_passed_over(tmp_path: Path) -> None:
    newest = two(tmp_path)
    shutil.copytree(newest, newest.parent / "step-00000003")
    loaded, damaged = latest(tmp_path)
    assert same(loaded, made(2)) and "not the manifest of step 3" in damaged[0]


def test_files_mixed_from_two_steps_are_passed_over(tmp_path: Path) -> None:
    newest = two(tmp_path)
    shutil.copy(tmp_path / "checkpoints/step-00000001/optimizer.safetensors", newest / "optimizer.safetensors")
    assert same(latest(tmp_path)[0], made(1))


def test_manifests_with_other_contents_are_passed_over(tmp_path: Path) -> None:
    manifest = two(tmp_path) / "MANIFEST.json"
    good = json.loads(manifest.read_bytes())
    extra = {**good["files"], "../../evil": good["files"]["state.json"]}
    for bad in (
        {**good, "files": extra},
        {**good, "files": []},
        {**good, "step": "2"},
        [],
        {},
        {"format": 1, "step": 2, "files": dict.fromkeys(FILES[:3], 1)},
        {**good, "format": 0},
    ):
        manifest.write_text(json.dumps(bad))
        assert same(latest(tmp_path)[0], made(1))


def test_newer_checkpoint_format_is_refused_by_its_number(tmp_path: Path) -> None:
    two(tmp_path)
    for path in (tmp_path / "checkpoints").iterdir():
        manifest = path / "MANIFEST.json"
        manifest.write_text(json.dumps({**json.loads(manifest.read_bytes()), "format": 2}))
    with pytest.raises(ModelError, match="format 2, this version reads 1; upgrade"):
        latest(tmp_path)


def test_only_damaged_checkpoints_are_an_error(tmp_path: Path) -> None:
    newest = two(tmp_path)
    flip(newest / "model.safetensors")
    (newest.parent / "step-00000001/MANIFEST.json").unlink()
    with refused(ModelError, "none of 2 checkpoints", "step-00000001", "step-00000002", "no MANIFEST.json", "sha256"):
        latest(tmp_path)


# --- foreign entries ----------------------------------------------------------------------------------------------------------------

FOREIGN = ["step-abc", "step-1", "step-00000009.bak", "Step-00000009", "step--0000009", "other"]


def test_foreign_entries_are_ignored_and_left_alone(tmp_path: Path) -> None:
    two(tmp_path)
    home = tmp_path / "checkpoints"
    for name in (*FOREIGN, ".tmp-00000009-123", ".hidden"):
        (home / name).mkdir()
        (home / name / "MANIFEST.json").write_text("{}")
    (home / "notes.txt").write_text("mine")
    assert same(latest(tmp_path)[0], made(2)) and latest(tmp_path)[1] == []
    for step in (3, 4, 5):
        save(tmp_path, made(step))
    assert same(latest(tmp_path)[0], made(5))
    assert all((home / name / "MANIFEST.json").is_file() for name in (*FOREIGN, ".hidden")) and (home / "notes.txt").read_text() == "mine"


def test_lock_removes_only_leftovers_of_a_killed_run(tmp_path: Path) -> None:
    two(tmp_path)
    home = tmp_path / "checkpoints"
    for name in (".tmp-00000003-4711", ".del-step-00000001-4711", *FOREIGN):
        (home / name).mkdir()
        (home / name / "model.safetensors").write_bytes(b"x")
    (tmp_path / ".tmp-mine").mkdir()
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    assert same(latest(tmp_path)[0], made(2))
    assert (home / ".tmp-00000003-4711").is_dir()
    with lock(tmp_path):
        remove_leftovers(tmp_path)
        assert steps(tmp_path) == sorted([*FOREIGN, "step-00000001", "step-00000002"])
    assert (tmp_path / ".tmp-mine").is_dir() and (tmp_path / "metrics.jsonl").is_file()
    assert same(latest(tmp_path)[0], made(2))


# --- failing disks ------------------------------------------------------------------------------------------------------------------


class Failing:
    """Calls a function of the system, except that its n-th call says the disk is full."""

    def __init__(self, function: Callable[..., Any], fails_at: int) -> None:
        self.function, self.left = function, fails_at

    def __call__(self, *given: Any, **options: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.function(*given, **options)


def calls_survived(run: Path, monkeypatch: pytest.MonkeyPatch, name: str, step: int, before: list[Checkpoint]) -> int:
    """Save with each call of os.`name` failing in turn; the number of calls that a save makes."""
    for at in range(1, 50):
        shutil.rmtree(run, ignore_errors=True)
        for old in before:
            save(run, old)
        failing = Failing(getattr(os, name), at)
        with monkeypatch.context() as patch:
            patch.setattr(os, name, failing)
            try:
                save(run, made(step))
            except OutputError as error:
                assert "disk full (No space left on device" in str(error) and error.exit_code == 6 and len(str(error).splitlines()) == 1
        loaded, damaged = latest(run)
        newest = same(loaded, before[-1]) or same(loaded, made(step))
        assert newest and damaged == [], f"call {at} of {name}: newest is {loaded and loaded.step} of {steps(run)}"
        assert not any(entry.startswith(".tmp-") for entry in steps(run)), f"call {at} of {name}"
        if failing.left > 0:
            return at - 1
        save(run, made(step + 1))
        assert same(latest(run)[0], made(step + 1))
    raise AssertionError("a save that never ends")


@pytest.mark.parametrize(("name", "calls"), [("fsync", 6), ("rename", 2), ("mkdir", 1), ("open", 2)])
def test_full_disk_at_any_call_leaves_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, calls: int) -> None:
    assert calls_survived(tmp_path / "run", monkeypatch, name, 3, [made(1), made(2)]) >= calls


@pytest.mark.parametrize("name", ["fsync", "rename"])
@pytest.mark.parametrize("before", [[1], [1, 2]])
def test_full_disk_while_a_step_is_saved_again_leaves_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, before: list[int]
) -> None:
    calls_survived(tmp_path / "run", monkeypatch, name, before[-1], [made(step) for step in before])


@pytest.mark.parametrize("name", FILES)
def test_partly_written_file_leaves_the_older_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    two(tmp_path)
    original = checkpoint.write_durably

    def half(path: Path, data: bytes) -> None:
        original(path, data[: len(data) // 2] if path.name == name else data)
        if path.name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_durably", half)
        with refused(OutputError, "step-00000003", "No space left on device"):
            save(tmp_path, made(3))
    assert steps(tmp_path) == ["step-00000001", "step-00000002"] and same(latest(tmp_path)[0], made(2))
    save(tmp_path, made(3))
    assert same(latest(tmp_path)[0], made(3))


def test_refused_write_leaves_the_older_checkpoints(tmp_path: Path) -> None:
    two(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10000, hard))
    try:
        with refused(OutputError, "step-00000003"):
            save(tmp_path, made(3, size=20000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert steps(tmp_path) == ["step-00000001", "step-00000002"] and same(latest(tmp_path)[0], made(2))


def test_files_are_synced_before_the_rename_and_the_folder_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, os.rename

    def synced(handle: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    def renamed(a: Path, b: Path) -> None:
        events.append(f"-> {Path(b).name}")
        rename(a, b)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    save(tmp_path, made(1))
    published = events.index("-> step-00000001")
    assert set(events[:published]) >= set(FILES) and events[published - 2] == "MANIFEST.json" and events[published - 1].startswith(".tmp-")
    assert events[published + 1] == "checkpoints"


def test_run_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with refused(OutputError, "step-00000001"):
        save(tmp_path / "file" / "run", made(1))
    with refused(OutputError, "cannot be written"), lock(tmp_path / "file"):
        pytest.fail("locked a file")


# --- what is in the files -----------------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, Any]:
    """Parse every byte of every file as safetensors or JSON."""
    parsed: dict[str, Any] = {}
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        if file.suffix == ".json":
            parsed[file.name] = json.loads(data.decode("utf-8"))
        else:
            (length,) = struct.unpack("<Q", data[:8])
            header = json.loads(data[8 : 8 + length])
            header.pop("__metadata__", None)
            assert max((entry["data_offsets"][1] for entry in header.values()), default=0) == len(data) - 8 - length
            parsed[file.name] = header
    return parsed


def test_checkpoint_holds_no_pickle_and_no_random_state(tmp_path: Path) -> None:
    small = [
        "data.limit=64", "train.batch_size=32", "train.epochs=1", "optim.warmup_epochs=0.5", "train.num_workers=0", "train.precision=no",
        "encoder.dim=16", "objective.num_directions=32", "probe.bank=32", "probe.eval_images=32",
    ]  # fmt: skip
    leftover = tmp_path / "run/checkpoints/.tmp-00000001-4711"
    leftover.mkdir(parents=True)
    train(Recipe.load("digits", small), tmp_path / "run", progress=False)
    assert not leftover.exists(), "a run removes what a killed run left"
    names = sorted(p.name for p in (tmp_path / "run").rglob("*") if p.is_file())
    assert not [n for n in names if Path(n).suffix not in (".safetensors", ".json", ".jsonl", ".yaml", ".md", ".png", "")], names
    parsed = contents(tmp_path / "run/checkpoints/step-00000002")
    assert sorted(parsed) == sorted(FILES)
    words = [word for part in parsed.values() for word in part] + [key.partition(".")[2] for key in parsed["optimizer.safetensors"]]
    assert not [w for w in words if any(hint in w.lower() for hint in ("rng", "random", "generator"))]
    assert all(entry["dtype"] != "U8" for name in FILES[:2] for entry in parsed[name].values())


# --- one run, one folder ------------------------------------------------------------------------------------------------------------


@contextmanager
def holder(run: Path) -> Iterator[int]:
    ready, tell = os.pipe()

    def hold() -> None:
        with lock(run):
            os.write(tell, b"x")
            time.sleep(600)  # until it is killed

    try:
        with forked(hold) as child:
            assert os.read(ready, 1) == b"x"
            yield child
    finally:
        os.close(ready)
        os.close(tell)


def test_second_holder_is_refused_with_the_first_named(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").write_text("a longer line that an earlier holder left " * 3)
    with holder(tmp_path / "run") as child:
        with refused(UsageError, str(tmp_path / "run"), f"in use by process {child} on {socket.gethostname()};"), lock(tmp_path / "run"):
            pytest.fail("two holders")
        with lock(tmp_path / "other"):
            pass


def test_killed_holder_releases_the_lock_at_once(tmp_path: Path) -> None:
    with holder(tmp_path):
        pass
    with lock(tmp_path), refused(UsageError, f"process {os.getpid()} on"), lock(tmp_path):
        pytest.fail("two holders")


def test_refused_holder_does_not_disturb_the_first(tmp_path: Path) -> None:
    with holder(tmp_path) as child:
        (tmp_path / "checkpoints" / ".tmp-00000001-1").mkdir(parents=True)
        for _ in range(3):
            with refused(UsageError, f"process {child} on"), lock(tmp_path):
                pytest.fail("two holders")
        assert (tmp_path / "checkpoints" / ".tmp-00000001-1").is_dir()


def test_lock_is_released_after_success_or_failure(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), lock(tmp_path):
            raise ZeroDivisionError
    with lock(tmp_path):
        pass


# --- kills --------------------------------------------------------------------------------------------------------------------------


def test_kill_at_any_instant_leaves_a_valid_newest_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, made(1))
    started = time.monotonic()
    save(tmp_path, made(2))
    one_save = time.monotonic() - started
    chance, newest, leftovers = random.Random(0), 2, 0

    def forever() -> None:
        for step in range(newest + 1, 10**6):
            save(tmp_path, made(step))

    for kill in range(15):
        with forked(forever):
            time.sleep(0.002 + chance.uniform(0, 6 * one_save))
        loaded, damaged = latest(tmp_path)
        assert damaged == [] and loaded is not None and loaded.step >= newest, kill
        assert same(loaded, made(loaded.step)), kill
        assert sum(name.startswith("step-") for name in steps(tmp_path)) >= 2, kill
        leftovers += any(not name.startswith("step-") for name in steps(tmp_path))
        newest = loaded.step
        with lock(tmp_path):
            remove_leftovers(tmp_path)
            assert all(name.startswith("step-") for name in steps(tmp_path)), kill
    assert newest > 2 and leftovers > 0
