"""Published folders on this machine: write, read, verify and find them. `rlpjepa_zoo.hub.format` defines what they hold."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..core.files import MAX_JSON, disk_errors, partial_folder, sha256, sync_folder, write_durably
from ..core.source import expanded
from ..errors import ModelError, UsageError, no_folder
from .format import CARD, CONFIG, RECIPE, REPLACED, Published, is_card, listed_files, parse

__all__ = ["find_folder", "matches", "read_folder", "read_recipe", "snapshot_folder", "verify_folder", "write_folder"]


def write_folder(folder: str | Path, contents: Mapping[str, bytes]) -> Path:
    """Write the result of `pack`. A new folder appears by one rename; in an existing folder files are replaced one by one, config.json last.

    Other files in the folder are not touched.

    Raises:
        OutputError: no permission, disk full, or the path is a file.
        UsageError: the folder holds a file with a name of this format (a README.md, say) and no config.json.
    """
    folder = expanded(folder)
    if folder.name in ("", ".."):
        folder = folder.resolve()
    with disk_errors(folder, sum(map(len, contents.values())), "cannot write the model"):
        existing = [name for name in REPLACED if (folder / name).exists()]
        if existing and CONFIG not in existing:
            raise UsageError(f"{folder}: holds {existing[0]}, which is not of an encoder; choose another folder")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with partial_folder(folder) as partial:
            for name, content in contents.items():
                write_durably(partial / name, content)
            sync_folder(partial)
            if not folder.exists():
                os.rename(partial, folder)
            else:
                for name in contents:
                    os.replace(partial / name, folder / name)
                for name in set(REPLACED) - set(contents):
                    (folder / name).unlink(missing_ok=True)
                sync_folder(folder)
        sync_folder(folder.parent)
    return folder


def read_folder(folder: str | Path) -> Published:
    """The model that the config.json of a folder describes; the other files are not read.

    Raises:
        ModelError: not a published folder, a newer format, or an unexpected value.
    """
    folder = Path(folder)
    path = folder / CONFIG
    if not folder.is_dir():
        raise ModelError(no_folder(folder))
    if not path.is_file():
        inside = next((p.parent.parent for p in sorted(folder.glob(f"*/encoder/{CONFIG}"))), None)
        hint = f"; did you mean {inside}?" if inside else ", such as save_pretrained and the runs of `rlpjepa train` write"
        raise ModelError(f"{folder}: no config.json, so not the folder of an encoder{hint}")
    with open(path, "rb") as file:
        return parse(file.read(MAX_JSON + 1), str(path))


def read_recipe(folder: str | Path, published: Published) -> str | None:
    """The training recipe of a verified folder, YAML text; None if the model was not trained from a recipe."""
    return (Path(folder) / RECIPE).read_text("utf-8", "replace") if RECIPE in published.files else None


def matches(path: Path, entry: Mapping[str, Any]) -> bool:
    """Whether a file has the listed size and sha256."""
    return path.is_file() and path.stat().st_size == entry.get("size") and sha256(path) == entry.get("sha256")


def verify_folder(folder: str | Path, published: Published, only: Iterable[str] | None = None) -> None:
    """Compare every listed file (or only some) with its sha256.

    Raises:
        ModelError: a file is missing or differs; the message names it.
    """
    folder = Path(folder)
    listed = listed_files(published, str(folder))
    for name in listed if only is None else only:
        path = folder / name
        if not path.is_file():
            raise ModelError(f"{path}: missing; download or save the encoder again")
        if not matches(path, listed[name]):
            raise ModelError(
                f"{path}: differs from the sha256 in config.json (damaged, edited or from another version); {_fix(folder, name)}"
            )


def _fix(folder: Path, name: str) -> str:
    if not is_card(name):
        return "download or save the encoder again"
    if folder.parent.name == "snapshots" and name == CARD:  # of the Hub's cache
        return "the card was edited on the Hub: its owner must push again, with own words given by --notes"
    return f"`rlpjepa card {folder} --write` writes the card anew, with your own words if you give them by --notes"


def snapshot_folder(folder: str | Path) -> tuple[Published, dict[str, bytes]]:
    """The model, and the contents of the files that its config.json lists, read once and verified, also while a run replaces them.

    The card and its figures may be edited or missing.

    Raises:
        ModelError: a file is missing or differs; the message names it.
    """
    folder = Path(folder)
    for attempt in range(5):
        if attempt:
            time.sleep(0.2)
        published = read_folder(folder)
        wrong, contents = "", {}
        for name, entry in listed_files(published, str(folder)).items():
            data = (folder / name).read_bytes() if (folder / name).is_file() else b""
            if not is_card(name) and (len(data) != entry["size"] or sha256(data) != entry["sha256"]):
                wrong = name
                break
            contents[name] = data
        if not wrong:
            return published, contents
    verify_folder(folder, published, [wrong])
    raise ModelError(f"{folder}: is being rewritten; try again when that is over")


def find_folder(path: str | Path) -> Path:
    """A published folder: the given one, or `encoder` or `classifier` inside a run folder."""
    path = Path(path)
    inside = (path / name for name in ("encoder", "classifier") if not (path / CONFIG).is_file())
    return next((folder for folder in inside if (folder / CONFIG).is_file()), path)
