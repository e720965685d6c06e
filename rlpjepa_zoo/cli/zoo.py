"""Commands around the encoders of the zoo: `zoo verify`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError, ZooError
from .options import AsJson, path_option

zoo_app = typer.Typer(help="Check the encoders of the zoo.", no_args_is_help=True, rich_markup_mode=None)


@zoo_app.command()
def verify(
    pattern: Annotated[str, typer.Argument(help="Shell pattern of names.")] = "*",
    root: Annotated[Path | None, path_option("--folder", help="Check FOLDER/NAME instead of the shipped files.")] = None,
    online: Annotated[bool, typer.Option("--hub", help="Check the pinned commit of the repository on the Hub.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check encoders of the zoo: listed figures, sha256 of every file, golden codes."""
    from ..hub import zoo
    from ..models.pretrained import verify_entry

    names = zoo.list_encoders(pattern)
    if not names:
        raise UsageError(f"'{pattern}': no encoder of the zoo matches; see rlpjepa list")
    if online and root is not None:
        raise UsageError("--hub and --folder: give one of them")
    outcomes: dict[str, str] = {}
    first_error: ZooError | None = None
    for name in names:
        try:
            verify_entry(name, root, online)
            outcomes[name] = "ok"
        except ZooError as error:
            outcomes[name], first_error = str(error), first_error or error
        if not as_json:
            print(f"{name}: {outcomes[name]}", flush=True)
    if as_json:
        print(json.dumps(outcomes, indent=1))
    if first_error is not None:
        wrong = sum(text != "ok" for text in outcomes.values())
        raise type(first_error)(f"{wrong} of {len(names)} encoders do not verify; the first: {first_error}")
