"""Versions of installed packages, modules of the user, and data that ships with this package."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from importlib import metadata
from pathlib import Path

from ..errors import UsageError, first_line

_USER_MODULES: dict[str, str] = {}
"""Versions of the modules that `import_user_module` has imported, by name."""


def resource(name: str) -> Path:
    """A folder that ships with the package (``recipes`` or ``hub``): inside it in a wheel, beside it in a checkout."""
    package = Path(__file__).parent.parent
    shipped = package / "_shipped" / name
    return shipped if shipped.is_dir() else package.parent / name


def import_user_module(name: str) -> None:
    """Import a module of the user, for what it registers: backbones with timm, objectives and the like with our registries.

    Args:
        name: dotted name; the current folder is searched first.

    Raises:
        UsageError: no such module, or an error of the module.
    """
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise UsageError(f"--import {name}: it needs {error.name}, which is not installed") from error
        fix = f"; give the name {name.removesuffix('.py')}" if name.endswith(".py") else ""
        raise UsageError(f"--import {name}: no such module in this folder or on the path of Python{fix}") from error
    except (Exception, SystemExit) as error:
        raise UsageError(f"--import {name}: {type(error).__name__}: {first_line(error)}") from error
    _USER_MODULES[name] = str(getattr(module, "__version__", "imported"))


def versions() -> dict[str, str]:
    """Versions of the packages that affect results, and the imported modules of the user; packages that are not installed are left out."""
    names = ("rlpjepa-zoo", "torch", "torchvision", "timm", "accelerate", "datasets", "huggingface_hub", "numpy", "scikit-learn")
    return {name: version for name in names if (version := _version(name)) is not None} | _USER_MODULES


@functools.cache  # a run asks for it several times, and each answer parses a file of metadata
def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
