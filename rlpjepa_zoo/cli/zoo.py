"""Commands around the encoders of the zoo: `zoo verify`, `zoo reproduce`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..errors import ModelError, UsageError, ZooError
from .options import AsJson, Overrides, Quiet, Resume, RunFolder, path_option, print_table

zoo_app = typer.Typer(help="Check the encoders of the zoo, or train them again.", no_args_is_help=True, rich_markup_mode=None)


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


@zoo_app.command()
def reproduce(
    name: Annotated[str, typer.Argument(help="Name in the zoo, or another encoder that has a log.")],
    overrides: Overrides = None,
    steps: Annotated[int | None, typer.Option(min=1, help="End after so many steps, to compare the first losses only.")] = None,
    out: RunFolder = Path("runs/reproduced"),
    resume: Resume = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Train an encoder again from its recipe, and compare the losses with those of its log.

    Give the images with data.path=DIR where the recipe names no data set. Ends with exit code 4 if a loss differs by more than 5 %.
    """
    from ..report.reproduce import TOLERANCE
    from ..report.reproduce import reproduce as run

    found = run(name, overrides or [], steps, out, resume, progress=not quiet)
    largest = found.largest
    if as_json:
        print(json.dumps([number._asdict() | {"difference": number.difference} for number in found.numbers], indent=1))
    else:
        rows = [
            [number.step, number.name, f"{number.logged:.4f}", f"{number.now:.4f}", f"{number.difference:.2%}"] for number in found.numbers
        ]
        print_table(["step", "", "log", "now", "difference"], [[str(cell) for cell in row] for row in rows])
    text = f"the largest difference of a loss is {largest.difference:.2%}, at step {largest.step}"
    if not found.same:
        raise ModelError(f"{name}: {text}, more than {TOLERANCE:.0%}; other images, other versions, or another recipe?")
    if not as_json:
        print(f"{text}; at most {TOLERANCE:.0%} is the same")
