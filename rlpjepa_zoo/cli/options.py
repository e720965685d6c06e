"""Options that several commands share, and what commands print and write."""

from __future__ import annotations

import functools
import inspect
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..core.source import expanded
from ..errors import OutputError, UsageError, ZooError
from ..text import printable


def path_option(*names: str, help: str) -> Any:
    """An option that is a path, see `rlpjepa_zoo.core.source.expanded`; shells do not expand ``~`` in ``--out=~/embeddings``."""
    return typer.Option(*names, parser=expanded, metavar="PATH", help=help)


Overrides = Annotated[list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Values that replace those of the recipe.")]
RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="Name of a recipe (see rlpjepa list --recipes), or a YAML file.")]
SourceName = Annotated[str, typer.Argument(metavar="SOURCE", help="Zoo name, owner/repo[@revision] on the Hub, or a folder.")]
RunFolder = Annotated[Path, path_option(help="Folder of the run.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint in --out, if there is one.")]
AllowChange = Annotated[list[str] | None, typer.Option(metavar="KEY", help="Recipe key that may differ from the resumed run.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress bar.")]
BatchSize = Annotated[
    int | None, typer.Option(min=1, help="Images per batch; if not given, 256 up to 79 x 79 pixels, 32 of 224 x 224 (GPU: 256).")
]
Workers = Annotated[int, typer.Option(min=0, help="Threads that decode images; 0 decodes between batches.")]
ImagesToRead = Annotated[
    list[str],
    typer.Argument(
        metavar="IMAGES...",
        help="Folders, image files, a list of files (.txt), parquet or tar files, or a data set on the Hub (owner/name, streamed).",
    ),
]
IdColumn = Annotated[str | None, typer.Option(help="Column that holds the ids; row numbers if not given.")]
ImageColumn = Annotated[
    str | None, typer.Option(help="Column that holds the images, or suffix in tar files, such as left.png; found if not given.")
]
AllowPaths = Annotated[bool, typer.Option("--allow-paths", help="Open files that rows of a table name outside of the table's folder.")]
DataSplit = Annotated[str | None, typer.Option("--split", help="Split of a data set on the Hub; train if not given.")]
DataRevision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a data set on the Hub.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out and list images that cannot be read.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; the best available one if not given.")]
License = Annotated[str | None, typer.Option("--license", help="Licence of the weights on the card, such as apache-2.0.")]
Private = Annotated[
    bool | None, typer.Option("--private/--public", help="Visibility; what exists must have it. What is new is private if not given.")
]
Notes = Annotated[Path | None, path_option(help="Markdown file with your own text for the card.")]
Imports = Annotated[
    list[str] | None,
    typer.Option("--import", metavar="MODULE", help="Module to import first, for backbones or objectives of yours that it registers."),
]


def with_imports(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the option --import, which may be repeated."""
    signature = inspect.signature(command, eval_str=True)

    @functools.wraps(command)
    def importing(*, imports: list[str] | None = None, **options: Any) -> None:
        from ..core.package import import_user_module

        for module in imports or []:
            import_user_module(module)
        command(**options)

    option = inspect.Parameter("imports", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Imports)
    parameters = [*signature.parameters.values(), option]
    importing.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    importing.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return importing


def whole_numbers(option: str, text: str) -> list[int]:
    """Return the numbers of an option such as 4,8,16.

    Raises:
        UsageError: other text.
    """
    try:
        return [int(number) for number in text.split(",")]
    except ValueError as error:
        raise UsageError(f"{option}: expected whole numbers such as 4,8,16, got '{text}'") from error


def choose_device(asked: str | None) -> str:
    """Return the device to compute on: the asked one, else the GPU of this process, else mps, else cpu.

    Raises:
        UsageError: the device does not exist here.
    """
    import torch

    if asked is None and torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        return f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
    if asked is None:
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=asked)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {asked}: not available here ({str(error).splitlines()[0]})") from error
    return asked


def own_folder(source: str, option: str) -> Path:
    """Return the encoder folder of a source whose card can be rewritten.

    Raises:
        UsageError: the source is no folder, or lies in the cache of the Hub client.
    """
    from ..core.source import ModelSource
    from ..hub.folder import find_folder

    path = ModelSource.parse(source).existing_folder
    if path is None or path.parent.name == "snapshots":
        raise UsageError(f"{option}: '{source}' is not a folder of your own, so its card cannot be written")
    return find_folder(path)


def card_name(path: Path) -> str:
    """Return the model name on the card of an encoder folder."""
    from ..hub.folder import read_folder

    return read_folder(path).name


def check_file(option: str, path: Path, overwrite: bool = True) -> None:
    """Refuse a file that cannot be written, before anything is loaded.

    Raises:
        OutputError: its folder does not exist, or it is no regular file.
        UsageError: it exists, without `overwrite`.
    """
    from ..core.files import check_replaceable

    if not os.path.isdir(path.absolute().parent):
        raise OutputError(f"{option} {path}: no folder {path.parent}")
    try:
        check_replaceable(path)
    except ZooError as error:
        raise type(error)(f"{option} {error}") from error
    if os.path.lexists(path) and not overwrite:
        raise UsageError(f"{option} {path}: exists; add --overwrite to replace it")


def write_file(path: Path, content: bytes) -> None:
    """Write a file under its final name only when it is complete."""
    from ..core.files import atomic_file

    with atomic_file(path) as aside:
        aside.write_bytes(content)


def list_failures(out: Path, failures: list[tuple[Any, str]], read: int) -> None:
    """Write the unreadable images, if there are any, into a file beside `out`, and log their number."""
    listing = out.with_name(out.name + ".failed.jsonl")
    if not failures:
        listing.unlink(missing_ok=True)  # of an earlier output that was replaced
        return
    write_file(listing, "".join(json.dumps({"id": str(i), "reason": reason}) + "\n" for i, reason in failures).encode())
    logging.getLogger("rlpjepa_zoo").warning("%d of %d images could not be read, see %s", len(failures), read + len(failures), listing)


def format_value(value: Any) -> str:
    """Format a value for people: four digits of a float, thousands separators of an integer, ``-`` for None."""
    return (
        "-"
        if value is None
        else f"{value:.4g}"
        if isinstance(value, float)
        else f"{value:,}"
        if isinstance(value, int)
        else printable(value)
    )


def print_values(values: dict[str, Any], as_json: bool) -> None:
    """Print one JSON object, or `name: value` lines. If there is a value "text", it is printed in the place of the lines."""
    if as_json:
        print(json.dumps({k: v for k, v in values.items() if k != "text"}))
    elif "text" in values:
        print(values["text"])
    else:
        print("\n".join(f"{name}: {format_value(value)}" for name, value in values.items()))


def typed_command(context: typer.Context) -> str:
    """The command as it was given, without where and how results are shown, and without the folders of this machine."""
    from ..bench.machine import shown_command

    words, values = context.command_path.split(), context.params
    for option in context.command.params:
        name = str(option.name)
        given = getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
        if not given or name in ("out", "as_json", "quiet", "plot", "on_card"):
            continue
        if option.param_type_name == "argument":
            words += values[name] if isinstance(values[name], list) else [str(values[name])]
        elif getattr(option, "is_flag", False):
            words.append((option.opts if values[name] else option.secondary_opts)[0])
        else:
            words += [word for value in (values[name] if option.multiple else [values[name]]) for word in (option.opts[0], str(value))]
    return shown_command(words)


def print_table(columns: list[str], rows: list[list[str]]) -> None:
    """Print a table: fitted to the terminal, or with unlimited width if stdout is not a terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*map(printable, row))
    console = Console(width=None if sys.stdout.isatty() else 10_000, color_system=None, highlight=False, markup=False)
    with console.capture() as capture:
        console.print(table)
    print("\n".join(line.rstrip() for line in capture.get().splitlines()))
