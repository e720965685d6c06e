"""Names of models and data: zoo names, repositories on the Hub, folders."""

from __future__ import annotations

import re


def is_repository(name: str) -> bool:
    """Whether a name can be that of a repository on the Hub: ``owner/name`` of ASCII letters, digits, ``-``, ``_`` and ``.``.

    Example:
        >>> is_repository("owner/sparse-vit"), is_repository("owner/a--b"), is_repository("vit")
        (True, False, False)
    """
    parts = name.split("/")
    good = len(parts) == 2 and len(name) <= 96 and all(re.fullmatch(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?", part) for part in parts)
    return good and "--" not in name and ".." not in name and not name.endswith(".git")
