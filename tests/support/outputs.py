"""What a command wrote."""

from pathlib import Path


def contents(out: Path) -> dict[str, bytes]:
    """Contents of every file except the lock, by path."""
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file() and p.name != ".lock"}
