"""Damage published folders on purpose. Written against the JSON of config.json, independently of the code under test."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch


def read_config(path: Path) -> dict[str, Any]:
    return json.loads((path / "config.json").read_text())


def write_config(path: Path, config: Any) -> None:
    """Write config.json with a correct sha256 of itself, if it can have one, so that other checks are reached."""
    block = config.get("rlpjepa_zoo")
    if isinstance(block, dict) and "sha256" in block:
        block["sha256"] = "0" * 64
    text = json.dumps(config)
    (path / "config.json").write_text(text.replace("0" * 64, hashlib.sha256(text.encode()).hexdigest(), 1))


def reseal(path: Path) -> None:
    """List the present sha256 and size of every file in config.json."""
    config = read_config(path)
    for name in config["rlpjepa_zoo"]["files"]:
        data = (path / name).read_bytes()
        config["rlpjepa_zoo"]["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    write_config(path, config)


@contextmanager
def tensors(path: Path, name: str) -> Iterator[dict[str, Any]]:
    """Change the tensors of a file; afterwards the folder verifies."""
    content = safetensors.torch.load_file(path / name)
    yield content
    safetensors.torch.save_file({key: value.contiguous() for key, value in content.items()}, path / name, metadata={"format": "pt"})
    reseal(path)


@contextmanager
def config_of(path: Path) -> Iterator[dict[str, Any]]:
    """Change config.json; afterwards the folder verifies."""
    config = read_config(path)
    yield config
    write_config(path, config)
