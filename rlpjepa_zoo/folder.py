"""The published folder: what `save_pretrained` writes, the Hub holds and `load_encoder` reads.

    config.json           timm's own, plus one block "rlpjepa_zoo"; timm and transformers ignore the block
    model.safetensors     the bare timm backbone
    head.safetensors      the projector
    golden.safetensors    two images, their preprocessed inputs, features and codes
    recipe.yaml           how it was trained (absent when it was not trained from a recipe)
    README.md             the card, generated

Nothing here is pickled. config.json is written last and holds the sha256 of every other file, so a folder that is half old and half
new does not verify.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from .errors import ModelError, OutputError, UsageError

FORMAT = 1
BLOCK = "rlpjepa_zoo"
REQUIRED = ("model.safetensors", "head.safetensors", "golden.safetensors", "README.md")
OPTIONAL = ("recipe.yaml",)
NAMES = ("config.json", *REQUIRED, *OPTIONAL)
MAX_JSON = 1 << 20


def parse_json(text: bytes, name: str, limit: int = MAX_JSON) -> Any:
    """Strict JSON: UTF-8, at most 1 MiB, no duplicate keys, no NaN or Infinity.

    Raises:
        ModelError: with the line where parsing stopped.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [k for k, _ in pairs]
        if len(set(keys)) != len(keys):
            raise ValueError(f"key '{next(k for k in keys if keys.count(k) > 1)}' is given twice")
        return dict(pairs)

    def constant(value: str) -> Any:
        raise ValueError(f"{value} is not a JSON number")

    if len(text) > limit:
        raise ModelError(f"{name}: {len(text)} bytes, the limit is {limit}")
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{name}: not valid JSON ({error})") from error


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_durably(path: Path, data: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Wait until renames inside a folder are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_folder(folder: str | Path, files: dict[str, bytes], config: dict[str, Any]) -> Path:
    """Publish `files` and `config` as a folder; a new one appears by one rename, an existing one is updated file by file, config.json last.

    Files in the folder that are not ours are left alone.

    Raises:
        OutputError: no permission, disk full, or the path is a file.
        UsageError: the folder holds files of our names (a README.md, say) that are not of an encoder.
    """
    folder = Path(folder)
    if folder.name in ("", ".."):
        folder = folder.resolve()
    listed = {name: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)} for name, data in sorted(files.items())}
    config = {**config, BLOCK: {**config[BLOCK], "files": listed}}
    try:
        contents = {**files, "config.json": (json.dumps(config, indent=2, allow_nan=False) + "\n").encode()}
    except (TypeError, ValueError) as error:
        raise UsageError(f"info: not JSON ({error}); expected text, finite numbers, lists and objects") from error
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        others = [name for name in NAMES if (folder / name).exists()]
        if others and "config.json" not in others:
            raise UsageError(f"{folder}: holds {others[0]}, which is not of an encoder; choose another folder")
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for name, data in contents.items():
            write_durably(partial / name, data)
        sync_folder(partial)
        if not folder.exists():
            os.rename(partial, folder)
        else:
            for name in contents:
                os.replace(partial / name, folder / name)
            for name in set(OPTIONAL) - set(contents):
                (folder / name).unlink(missing_ok=True)
            sync_folder(folder)
        sync_folder(folder.parent)
    except OSError as error:
        raise OutputError(f"{folder}: cannot write the encoder: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def read_config(folder: str | Path) -> dict[str, Any]:
    """config.json of a published folder, checked for format and for the types of what we read from it.

    Raises:
        ModelError: not a folder of ours, or one of a newer format.
    """
    folder = Path(folder)
    path = folder / "config.json"
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such folder")
    if not path.is_file():
        raise ModelError(f"{folder}: no config.json; expected a folder written by save_pretrained with {', '.join(NAMES)}")
    config = parse_json(path.read_bytes(), str(path))
    block = config.get(BLOCK) if isinstance(config, dict) else None
    if not isinstance(block, dict):
        raise ModelError(
            f"{path}: no '{BLOCK}' block, so this is not a sparse encoder; for a plain timm model use "
            f"create_encoder('local-dir:{folder}', pretrained=True) and train a projector"
        )
    if not isinstance(block.get("format"), int) or not 1 <= block["format"] <= FORMAT:
        raise ModelError(f"{path}: format {block.get('format')!r}, this version reads 1 to {FORMAT}; update rlpjepa_zoo")
    shapes: dict[str, type] = {"info": dict, "projector": dict, "preprocess": dict, "files": dict}
    for key, kind in shapes.items():
        if not isinstance(block.get(key, {} if key == "info" else None), kind):
            raise ModelError(f"{path}: {BLOCK}.{key}: expected an object, got {type(block.get(key)).__name__}")
    if not isinstance(config.get("architecture"), str) or not isinstance(config.get("model_args", {}), dict):
        raise ModelError(f"{path}: expected 'architecture' (a string) and 'model_args' (an object)")
    return config


def verify(folder: str | Path, config: dict[str, Any]) -> None:
    """Compare every listed file with its sha256.

    Raises:
        ModelError: naming the file that is missing or differs.
    """
    folder, files = Path(folder), config[BLOCK]["files"]
    for name in sorted({*REQUIRED, *files}):
        if name not in NAMES or name == "config.json":
            raise ModelError(f"{folder}/config.json: lists an unexpected file {name!r}; expected {', '.join(NAMES[1:])}")
        entry, path = files.get(name), folder / name
        if not isinstance(entry, dict):
            raise ModelError(f"{folder}/config.json: {name} is not listed with its sha256")
        if not path.is_file():
            raise ModelError(f"{path}: missing; download or save the encoder again")
        if path.stat().st_size != entry.get("size") or sha256(path) != entry.get("sha256"):
            raise ModelError(
                f"{path}: differs from the sha256 in config.json (damaged or from another version); download or save the encoder again"
            )
