"""Training checkpoints: a directory published by one rename, verified by its manifest, without pickle.

    checkpoints/step-00000123/{model,optimizer}.safetensors  state.json  MANIFEST.json

A new checkpoint is written to a temporary folder (files synced, manifest last) and renamed. Old ones are removed after that, so at every
instant at least one complete checkpoint exists. No random state is stored: draws are functions of (seed, step).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core import distributed
from ..core.files import (
    disk_reason,
    existing_parent,
    parse_json,
    remove_partials,
    sha256,
    sync_folder,
    write_durably,
)
from ..errors import ModelError, OutputError
from ..ops.tensors import load_tensors, tensor_bytes

__all__ = ["Checkpoint", "check_space", "latest", "optimizer_state", "remove_leftovers", "restore_optimizer", "save"]

_STEP = re.compile(r"step-(\d{8})")
FORMAT = 1
"""Format of a checkpoint. A newer format is refused."""
_OTHER_FILES = 16_000_000
"""Bytes for logs and small files of a run."""


class Checkpoint(NamedTuple):
    """What a run needs to resume."""

    step: int
    """Number of steps made."""
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]
    """JSON-able."""


def save(run: Path, checkpoint: Checkpoint, keep: int = 2, also: Collection[int] = ()) -> Path:
    """Save a checkpoint of a run; remove all but the newest `keep` and those of the steps in `also`.

    Raises:
        OutputError: disk full, no permission, folder gone; earlier checkpoints stay.
    """
    home = run / "checkpoints"
    final = home / f"step-{checkpoint.step:08d}"
    contents: dict[str, bytes] = {}
    partial = home / f".tmp-{checkpoint.step:08d}-{os.getpid()}"
    try:
        home.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        contents = {
            "model.safetensors": tensor_bytes(checkpoint.model),
            "optimizer.safetensors": tensor_bytes(checkpoint.optimizer),
            "state.json": json.dumps(checkpoint.state, indent=1, allow_nan=False).encode(),
        }
        manifest = {name: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)} for name, data in contents.items()}
        for name, data in contents.items():
            write_durably(partial / name, data)
        write_durably(partial / "MANIFEST.json", json.dumps({"format": FORMAT, "step": checkpoint.step, "files": manifest}).encode())
        sync_folder(partial)
        if _verifies(checkpoint.step, final):  # this step was saved before; steps are deterministic, so it is the same
            shutil.rmtree(partial, ignore_errors=True)
        else:
            if final.exists():
                os.rename(final, final.with_name(f".del-{final.name}-{os.getpid()}"))
            os.rename(partial, final)
            sync_folder(home)
        saved = _steps(home)
        newer = [entry for entry in saved if entry[0] > checkpoint.step]  # damaged, as the run did not resume from them
        older = [entry for entry in saved if entry[0] <= checkpoint.step][:-keep]
        for _, old in [entry for entry in older if entry[0] not in also] + newer:
            os.rename(old, old.with_name(f".del-{old.name}-{os.getpid()}"))  # a partly removed folder never has the name of a checkpoint
        for doomed in home.glob(".del-*"):
            shutil.rmtree(doomed, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = disk_reason(error, run, sum(map(len, contents.values())))
        raise OutputError(f"{final}: checkpoint not written: {reason}; earlier ones are untouched") from error
    return final


def remove_leftovers(run: Path) -> None:
    """Remove what a killed run left unfinished or half deleted. The caller holds the lock of the run directory."""
    remove_partials(run)
    home = run / "checkpoints"
    for path in [*home.glob(".tmp-*"), *home.glob(".del-*")] if home.is_dir() else []:
        shutil.rmtree(path, ignore_errors=True)


def check_space(run: Path, size: int) -> None:
    """Refuse a run if the disk has no room for two checkpoints of `size` bytes and the other files. Existing checkpoints count.

    Raises:
        OutputError: names the bytes needed and the bytes free.
    """
    needed = max(1, 2 - len(_steps(run / "checkpoints"))) * size + _OTHER_FILES
    free = shutil.disk_usage(existing_parent(run)).free
    if free < needed:
        room = f"{needed / 1e6:.0f} MB are needed for two checkpoints, {free / 1e6:.0f} MB are free"
        raise OutputError(f"{run}: too little room on the disk: {room}; make room, or choose another --out")


def _verifies(step: int, path: Path) -> bool:
    try:
        return _read(step, path).step == step
    except ModelError:
        return False


def _steps(home: Path) -> list[tuple[int, Path]]:
    """Steps and folders of the checkpoints, oldest first; other entries are ignored."""
    return sorted((int(match[1]), path) for path in home.iterdir() if (match := _STEP.fullmatch(path.name))) if home.is_dir() else []


def latest(run: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, and one line for each newer one that does not.

    Returns:
        (None, []) when the run has none.

    Raises:
        ModelError: there are checkpoints and none verifies; the run does not silently start again.
    """
    damaged: list[str] = []
    for step, path in reversed(_steps(run / "checkpoints")):
        try:
            return _read(step, path), damaged
        except ModelError as error:
            damaged.append(str(error))
    if damaged:
        raise ModelError(f"{run}: none of {len(damaged)} checkpoints can be used: {'; '.join(damaged)}")
    return None, []


def _read(step: int, path: Path) -> Checkpoint:
    manifest_path = path / "MANIFEST.json"
    if not manifest_path.is_file():
        raise ModelError(f"{path}: no MANIFEST.json")
    manifest = parse_json(manifest_path.read_bytes(), str(manifest_path))
    if isinstance(manifest, dict) and isinstance(manifest.get("format"), int) and manifest["format"] > FORMAT:
        raise ModelError(f"{path}: format {manifest['format']}, this version reads {FORMAT}; upgrade rlpjepa_zoo")
    files = manifest.get("files") if isinstance(manifest, dict) and manifest.get("format") == FORMAT else None
    if (
        not isinstance(files, dict)
        or manifest.get("step") != step
        or set(files) != {"model.safetensors", "optimizer.safetensors", "state.json"}
    ):
        raise ModelError(f"{manifest_path}: not the manifest of step {step}")
    for name, entry in files.items():
        file = path / name
        if (
            not file.is_file()
            or not isinstance(entry, dict)
            or file.stat().st_size != entry.get("size")
            or sha256(file) != entry.get("sha256")
        ):
            raise ModelError(f"{file}: missing or differs from its sha256")
    model, optimizer = (load_tensors(path / name) for name in ("model.safetensors", "optimizer.safetensors"))
    return Checkpoint(step, model, optimizer, parse_json((path / "state.json").read_bytes(), str(path / "state.json"), limit=1 << 28))


# --- optimizer state as tensors + JSON ------------------------------------------------------------------------------------------------


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by ``<parameter number>.<state name>``, and the values that are not tensors. All ranks must call this if tensors are sharded."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for number, entries in optimizer.state_dict()["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{number}.{name}"] = distributed.full_tensor(value.detach()).cpu().contiguous()
            elif value is not None:
                scalars[f"{number}.{name}"] = value
    return tensors, scalars


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], scalars: dict[str, Any]) -> None:
    """Restore what `optimizer_state` returned. Parameter groups and learning rates come from the recipe and are not stored.

    Raises:
        ModelError: the state belongs to other parameters.
    """
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **scalars}.items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = value
    current = optimizer.state_dict()
    known = {n for group in current["param_groups"] for n in group["params"]}
    if not set(state) <= known:
        raise ModelError(f"checkpoint: optimizer state of {len(state)} parameters, the model has {len(known)}")
    optimizer.load_state_dict({"state": state, "param_groups": current["param_groups"]})
    for parameter, entries in optimizer.state.items():  # the fast paths expect the memory format of the parameter
        for name, value in entries.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                entries[name] = distributed.copy_with_layout(value, parameter)
