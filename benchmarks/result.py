"""What the benchmarks share: their options and how they tell what they found."""

import argparse
import json
import platform
from pathlib import Path
from typing import Any

from rlpjepa_zoo.cli.options import write_file
from rlpjepa_zoo.core import package


def parser(text: str | None) -> argparse.ArgumentParser:
    """A parser that shows a module's docstring as it is and takes --json."""
    made = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", type=Path, help="also write the result to this file")
    return made


def tell(command: str, found: dict[str, Any], cores: str, path: Path | None) -> None:
    """Print what was found, with the command, the machine and the versions, and write it to a file if one is given."""
    whole = {"command": command, **found, "machine": f"{cores}, {platform.machine()}", "versions": package.versions()}
    text = json.dumps(whole, indent=1)
    print(text)
    if path is not None:
        write_file(path, (text + "\n").encode())
