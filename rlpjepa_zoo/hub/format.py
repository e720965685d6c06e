"""The published folder: what `save_pretrained` writes, the Hub holds and `load_encoder` reads.

    config.json           timm's own, plus one block "rlpjepa_zoo"; timm and transformers ignore the block
    model.safetensors     the bare timm backbone
    head.safetensors      the projector
    golden.safetensors    two images, their preprocessed inputs, features and codes (of a classifier: what its linear layer sees, and logits)
    recipe.yaml           how it was trained (absent when it was not trained from a recipe)
    README.md             the card, generated; *.png, its pictures (absent when nothing was measured)

A classifier has a block "classifier" in "rlpjepa_zoo". From features model.safetensors holds its linear layer too, so that it is a timm
classifier like any other, and there is no head.safetensors; from z that file holds the projector and the linear layer.

Nothing here is pickled. config.json is written last and holds the sha256 of every other file and its own, so one flipped byte anywhere
is found, and a folder that is half old and half new does not verify.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..core.files import MAX_JSON, parse_json, sha256, sync_folder, write_durably
from ..errors import ModelError, OutputError, UsageError

FORMAT = 3  # 1 had no sha256 of config.json itself; 3 is written for an encoder with a dial, which readers of 2 would leave out
BLOCK = "rlpjepa_zoo"
REQUIRED = ("model.safetensors", "head.safetensors", "golden.safetensors", "README.md")
OPTIONAL = ("recipe.yaml", "training.png", "accuracy.png")
NAMES = ("config.json", *REQUIRED, *OPTIONAL)
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy")
_BLANK = "0" * 64


def seal(files: Mapping[str, bytes], config: Mapping[str, Any]) -> dict[str, bytes]:
    """`files` and a config.json that holds their sizes and sha256, and the sha256 of itself with that value blank.

    Raises:
        UsageError: `config` is not JSON.
    """
    listed = {name: {"sha256": sha256(content), "size": len(content)} for name, content in sorted(files.items())}
    number = FORMAT if "dial" in config[BLOCK] else 2
    config = {**config, BLOCK: {**config[BLOCK], "format": number, "files": listed, "sha256": _BLANK}}
    try:
        text = json.dumps(config, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise UsageError(f"info: not JSON ({error}); expected text, finite numbers, lists and objects") from error
    if text.count(_BLANK) != 1:
        raise UsageError("info: holds 64 zeros in a row, which stand for the sha256 of config.json; leave them out")
    sealed = text.replace(_BLANK, sha256(text.encode())).encode()
    try:
        parse_json(sealed, "config.json")
    except ModelError as error:
        raise UsageError(f"info: {error}") from error
    return {**files, "config.json": sealed}


def write_folder(folder: str | Path, contents: Mapping[str, bytes]) -> Path:
    """Write what `seal` gave; a new folder appears by one rename, an existing one is updated file by file, config.json last.

    Files in the folder that are not ours are left alone.

    Raises:
        OutputError: no permission, disk full, or the path is a file.
        UsageError: the folder holds files of our names (a README.md, say) that are not of an encoder.
    """
    folder = Path(folder)
    if folder.name in ("", ".."):
        folder = folder.resolve()
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        others = [name for name in NAMES if (folder / name).exists()]
        if others and "config.json" not in others:
            raise UsageError(f"{folder}: holds {others[0]}, which is not of an encoder; choose another folder")
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for name, content in contents.items():
            write_durably(partial / name, content)
        sync_folder(partial)
        if not folder.exists():
            os.rename(partial, folder)
        else:
            for name in contents:
                os.replace(partial / name, folder / name)
            for name in set(NAMES) - set(contents):
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
        inside = next((p.parent.parent for p in sorted(folder.glob("*/encoder/config.json"))), None)
        hint = f"; did you mean {inside}?" if inside else ", such as save_pretrained and the runs of `rlpjepa train` write"
        raise ModelError(f"{folder}: no config.json, so not the folder of an encoder{hint}")
    with open(path, "rb") as file:
        text = file.read(MAX_JSON + 1)
    config = parse_json(text, str(path))
    block = config.get(BLOCK) if isinstance(config, dict) else None
    if not isinstance(block, dict):
        raise ModelError(
            f"{path}: no '{BLOCK}' block, so this is not a sparse encoder; for a plain timm model use "
            f"create_encoder('local-dir:{folder}', pretrained=True) and train a projector"
        )
    if type(block.get("format")) is not int or not 1 <= block["format"] <= FORMAT:
        raise ModelError(f"{path}: format {block.get('format')!r}, this version reads 1 to {FORMAT}; update rlpjepa_zoo")
    if block["format"] >= 2 or "sha256" in block:
        own = ascii(block.get("sha256")).strip("'")
        if text.count(own.encode()) != 1 or sha256(text.replace(own.encode(), _BLANK.encode())) != own:
            raise ModelError(f"{path}: differs from its own sha256 (damaged or edited); download or save the encoder again")
    shapes: dict[str, type] = {"info": dict, "projector": dict, "preprocess": dict, "files": dict}
    for key, kind in shapes.items() | ({("classifier", dict)} if "classifier" in block else set()):
        if not isinstance(block.get(key, {} if key == "info" else None), kind):
            raise ModelError(f"{path}: {BLOCK}.{key}: expected an object, got {type(block.get(key)).__name__}")
    if not isinstance(config.get("architecture"), str) or not isinstance(config.get("model_args", {}), dict):
        raise ModelError(f"{path}: expected 'architecture' (a string) and 'model_args' (an object)")
    return config


def is_classifier(config: Mapping[str, Any]) -> bool:
    """Whether a published folder's config.json is of a classifier, not of an encoder."""
    return "classifier" in config[BLOCK]


def matches(path: Path, entry: Mapping[str, Any]) -> bool:
    """Whether a file has the listed size and sha256."""
    return path.is_file() and path.stat().st_size == entry.get("size") and sha256(path) == entry.get("sha256")


def listed_files(config: Mapping[str, Any], where: str) -> dict[str, dict[str, Any]]:
    """The files that config.json lists, with size and sha256.

    Raises:
        ModelError: a name that is not one of ours, or a file without its sha256.
    """
    files = config[BLOCK]["files"]
    absent = {"head.safetensors"} if is_classifier(config) and not config[BLOCK]["projector"] else set()
    for name in sorted({*REQUIRED, *files} - absent):
        if name not in NAMES or name == "config.json":
            raise ModelError(f"{where}/config.json: lists an unexpected file {name!r}; expected {', '.join(NAMES[1:])}")
        entry = files.get(name)
        if not isinstance(entry, dict) or type(entry.get("size")) is not int or not isinstance(entry.get("sha256"), str):
            raise ModelError(f"{where}/config.json: {name} is not listed with its size and sha256")
    return dict(files)


def verify(folder: str | Path, config: Mapping[str, Any], only: Iterable[str] | None = None) -> None:
    """Compare every listed file (or only some) with its sha256.

    Raises:
        ModelError: naming the file that is missing or differs.
    """
    folder = Path(folder)
    listed = listed_files(config, str(folder))
    for name in listed if only is None else only:
        path = folder / name
        if not path.is_file():
            raise ModelError(f"{path}: missing; download or save the encoder again")
        if not matches(path, listed[name]):
            raise ModelError(
                f"{path}: differs from the sha256 in config.json (damaged, edited or from another version); {_mend(folder, name)}"
            )


def _mend(folder: Path, name: str) -> str:
    if name != "README.md" and not name.endswith(".png"):
        return "download or save the encoder again"
    if folder.parent.name == "snapshots":  # of the Hub's cache
        return "the card was edited on the Hub: its owner must push again, with own words given by --notes"
    return f"`rlpjepa card {folder} --write` writes the card anew, with your own words if you give them by --notes"


def snapshot(folder: str | Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """config.json and the contents of the files it lists, read once and verified, even while a run replaces them.

    Cards and pictures may be edited or missing.

    Raises:
        ModelError: naming the file that is missing or differs.
    """
    folder = Path(folder)
    for attempt in range(5):
        if attempt:
            time.sleep(0.2)
        config = read_config(folder)
        listed = listed_files(config, str(folder))
        wrong = ""
        contents = {}
        for name, entry in listed.items():
            data = (folder / name).read_bytes() if (folder / name).is_file() else b""
            shown = name == "README.md" or name.endswith(".png")
            if not shown and (len(data) != entry["size"] or sha256(data) != entry["sha256"]):
                wrong = name
                break
            contents[name] = data
        if not wrong:
            return config, contents
    verify(folder, config, [wrong])
    raise ModelError(f"{folder}: is being rewritten; try again when that is over")


def find(path: str | Path) -> Path:
    """A published folder: itself, or `encoder` or `classifier` inside the folder of a run."""
    path = Path(path)
    inside = (path / name for name in ("encoder", "classifier") if not (path / "config.json").is_file())
    return next((found for found in inside if (found / "config.json").is_file()), path)
