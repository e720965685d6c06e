"""Commands that compare this package with others: `bench loss`."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UsageError
from .options import AsJson, Device, check_file, choose_device, path_option, print_values, write_file

bench_app = typer.Typer(invoke_without_command=True, rich_markup_mode=None)


def _by_default(command: Callable[..., None]) -> Callable[..., None]:
    """A callback of a group of commands: it has the options of one of them and runs it if none is named."""
    signature = inspect.signature(command, eval_str=True)

    def callback(context: typer.Context, **options: Any) -> None:
        if context.invoked_subcommand is None:
            command(**options)
        elif any(context.get_parameter_source(name).name == "COMMANDLINE" for name in options):  # type: ignore[union-attr]
            raise UsageError(f"bench: options stand behind the command, as in `{context.command_path} {context.invoked_subcommand} --json`")

    first = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    parameters = [first, *signature.parameters.values()]
    callback.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    callback.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return callback


@bench_app.command()
def loss(
    batch: Annotated[int, typer.Option(min=2, help="Images per step.")] = 256,
    dim: Annotated[int, typer.Option(min=1, help="Dimension of the embedding.")] = 512,
    directions: Annotated[int, typer.Option(min=1, help="Directions of the minimal example.")] = 8192,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; the medians are reported.")] = 9,
    device: Device = "cpu",
    out: Annotated[Path | None, path_option(help="JSON file for all measurements.")] = None,
    as_json: AsJson = False,
) -> None:
    """Time the loss beside the minimal example of the paper, in alternation, at equal directions and at equal gradient error.

    Takes a minute on two CPU cores. Also measures POT and lightly if they are installed.
    """
    from ..bench.loss import compare, markdown_table

    if out is not None:
        check_file("--out", out)
    times = compare(batch, dim, directions, repeats, choose_device(device))
    if out is not None:
        write_file(out, (json.dumps(times, indent=1) + "\n").encode())
    print_values({**times, "text": markdown_table(times)}, as_json)


bench_app.callback(help="Compare with others: the loss, and the sparse codes. Without a command, as `bench loss`.")(_by_default(loss))
