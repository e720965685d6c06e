"""The parser of source names (zoo names, repositories on the Hub, folders, timm models), and what of them may be published."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import UsageError

__all__ = ["ModelSource", "expanded", "is_repository", "shareable_path"]

_RUNS = "runs"
"""Folder of all runs in the documents."""


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from, parsed from text by `ModelSource.parse`.

    Attributes:
        text: the source as given.
        kind: ``"folder"`` (a local path), ``"hub"`` (a repository), or ``"name"`` (a zoo name or a timm architecture; also anything invalid,
            which the caller refuses).
        value: the path, ``owner/repo``, or the name, without prefix and revision.
        revision: branch, tag or commit after ``@``; None without one.
        timm: whether it is a plain timm model rather than an encoder or classifier of this package.

    Example:
        >>> ModelSource.parse("hf-hub:owner/repo@v1").value, ModelSource.parse("timm:resnet18").kind
        ('owner/repo', 'name')
    """

    text: str
    kind: Literal["folder", "hub", "name"]
    value: str
    revision: str | None = None
    timm: bool = False

    @classmethod
    def parse(cls, source: str | Path, *, timm: bool = False, look_for_folders: bool = True) -> ModelSource:
        """Parse ``timm:NAME``, ``hf-hub:owner/repo@revision``, ``local-dir:PATH``, ``owner/repo@revision``, an existing folder, or a name.

        Args:
            source: the text; a `Path` is always a folder. After ``timm:`` the grammar is timm's: ``hf-hub:``, ``local-dir:`` or a name.
            timm: read the text as a timm name even without ``timm:``, as in `create_encoder` and ``encoder.backbone`` of a recipe.
            look_for_folders: whether text without prefix is a folder if one of that name exists; never for timm names. False reads names
                that were written earlier, such as those on cards.
        """
        text = str(source)
        name = text.removeprefix("timm:")
        timm = timm or name != text
        if isinstance(source, Path):
            return cls(text, "folder", text)
        if name.startswith("local-dir:"):
            return cls(text, "folder", name.removeprefix("local-dir:"), timm=timm)
        if look_for_folders and name and not timm and _exists(expanded(name), folder=True):
            return cls(text, "folder", name)
        repo, _, revision = name.removeprefix("hf-hub:").partition("@")
        if name.startswith("hf-hub:") or (is_repository(repo) and not timm):
            return cls(text, "hub", repo, revision or None, timm)
        return cls(text, "name", name, timm=timm)

    @classmethod
    def folder(cls, path: str | Path) -> ModelSource:
        """Source of a folder; its text is ``local-dir:PATH``.

        Example:
            >>> ModelSource.folder("runs/digits").text
            'local-dir:runs/digits'
        """
        return cls(f"local-dir:{path}", "folder", str(path))

    @classmethod
    def repository(cls, name: str, revision: str | None = None) -> ModelSource:
        """Source of a repository on the Hub; its text is ``hf-hub:NAME@REVISION``.

        Args:
            name: ``owner/repo``, or ``owner/repo@revision``.
            revision: branch, tag or commit, if `name` has none.

        Example:
            >>> ModelSource.repository("owner/repo", "v1").text, ModelSource.repository("owner/repo@v1").revision
            ('hf-hub:owner/repo@v1', 'v1')
        """
        return cls.parse(f"hf-hub:{name}" + (f"@{revision}" if revision else ""), look_for_folders=False)

    @property
    def bare(self) -> str:
        """The text without prefix, with the revision.

        Example:
            >>> ModelSource.parse("hf-hub:owner/repo@v1").bare, ModelSource.parse("local-dir:/data/run").bare
            ('owner/repo@v1', '/data/run')
        """
        return f"{self.value}@{self.revision}" if self.revision else self.value

    @property
    def timm_name(self) -> str:
        """Name that `timm.create_model` takes.

        Example:
            >>> ModelSource.parse("timm:resnet18").timm_name, ModelSource.parse("owner/repo@v1").timm_name
            ('resnet18', 'hf-hub:owner/repo@v1')
        """
        return {"folder": "local-dir:", "hub": "hf-hub:", "name": ""}[self.kind] + self.bare

    @property
    def existing_folder(self) -> Path | None:
        """The folder of an encoder or classifier of this package, if it exists; None for a timm model and for other kinds."""
        return self.path if self.kind == "folder" and not self.timm and _exists(self.path, folder=True) else None

    @property
    def path(self) -> Path:
        """The folder, with ``~`` expanded.

        Raises:
            ValueError: not a folder.
        """
        if self.kind != "folder":
            raise ValueError(f"'{self.text}' is not a folder")
        return expanded(self.value)

    @property
    def has_prefix(self) -> bool:
        """Whether the text says what it is: ``timm:``, ``hf-hub:`` or ``local-dir:``."""
        return self.text.startswith(("timm:", "hf-hub:", "local-dir:"))

    @property
    def is_local(self) -> bool:
        """Whether the text names a place on this machine: a folder, an existing file, or a path written as one."""
        if self.kind == "folder":
            return True
        if self.timm or self.kind == "hub" and self.has_prefix:
            return False
        return self.text.startswith(("/", "~", "./", "../")) or (bool(self.text) and _exists(expanded(self.text)))

    @property
    def missing_folder(self) -> bool:
        """Whether the text, without prefix, revision and folder of that name, reads as a path: it starts or ends like one, is too deep for a
        repository, begins with the folder that the documents use for runs, or its parent is a folder here.

        Example:
            >>> ModelSource.parse("./gone").missing_folder, ModelSource.parse("owner/repo").missing_folder
            (True, False)
        """
        if self.kind == "folder" or self.timm or self.has_prefix or self.revision or not re.search(r"[/\\]|^~", self.text):
            return False
        path = expanded(self.text)
        as_path = self.text.startswith(("/", "~", "./", "../")) or self.text.endswith("/") or "\\" in self.text or self.text.count("/") > 1
        return as_path or path.parts[0] == _RUNS or (bool(path.parent.name) and _exists(path.parent, folder=True))

    @property
    def label(self) -> str:
        """Name for tables and cards: of a local path only the last part; ``timm:`` is kept.

        Example:
            >>> ModelSource.parse("timm:local-dir:/data/vit").label, ModelSource.parse("local-dir:/data/run").label
            ('timm:vit', 'run')
        """
        if not self.is_local:
            return self.text
        return ("timm:" if self.text.startswith("timm:") else "") + _last_part(self.value)

    def shareable(self) -> str:
        """Source text for published recipes: of a local path only the last part. A timm folder keeps ``local-dir:``, as its bare name
        would be an architecture.

        Example:
            >>> ModelSource.parse("timm:local-dir:/data/vit").shareable(), ModelSource.parse("local-dir:/data/run").shareable()
            ('timm:local-dir:vit', 'run')
        """
        if not (self.timm and self.is_local):
            return self.label
        return ("timm:" if self.text.startswith("timm:") else "") + "local-dir:" + _last_part(self.value)


def is_repository(name: str) -> bool:
    """Whether a name can be that of a repository on the Hub: ``owner/name`` of ASCII letters, digits, ``-``, ``_`` and ``.``.

    Example:
        >>> is_repository("owner/sparse-vit"), is_repository("owner/a--b"), is_repository("vit")
        (True, False, False)
    """
    parts = name.split("/")
    valid = len(parts) == 2 and len(name) <= 96 and all(re.fullmatch(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?", part) for part in parts)
    return valid and "--" not in name and ".." not in name and not name.endswith(".git")


def shareable_path(path: str | None, name: str | None) -> str | None:
    """What may be published of the local path of a data set: nothing if the data set has a name, else the last part.

    Args:
        path: the path in a recipe, if any.
        name: the public name of the data set, if any.

    Example:
        >>> shareable_path("/data/flowers", None), shareable_path("/data/cifar", "uoft-cs/cifar10")
        ('flowers', None)
    """
    return None if path is None or name is not None else _last_part(path)


def _last_part(path: str) -> str:
    """Name of a folder without its parents; of ``.`` or ``..`` that of the folder it stands for."""
    name = Path(path).name
    return expanded(path).resolve().name if name in ("", "..") or name.startswith("~") else name


def expanded(path: str | Path) -> Path:
    """A path that was given: ``~`` and ``~user`` expanded; unchanged if there is no such user.

    Raises:
        UsageError: no text; `Path("")` would be the working folder.

    Example:
        >>> str(expanded("~no-such-user/a.png"))
        '~no-such-user/a.png'
    """
    if path == "":
        raise UsageError("an empty path; expected a name (is a variable of the shell empty?)")
    return Path(os.path.expanduser(path))


def _exists(path: Path, folder: bool = False) -> bool:
    try:
        return path.is_dir() if folder else path.exists()
    except (OSError, ValueError):  # name too long, NUL
        return False
