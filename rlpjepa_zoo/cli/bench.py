"""Commands that compare this package with others: `bench loss`, `bench codes`."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UsageError
from .options import (
    AsJson,
    Device,
    Overrides,
    Quiet,
    RecipeName,
    check_file,
    choose_device,
    path_option,
    print_values,
    typed_command,
    whole_numbers,
    with_imports,
    write_file,
)

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
    batch: Annotated[int, typer.Option(min=2, max=1 << 16, help="Images per step.")] = 256,
    dim: Annotated[int, typer.Option(min=1, max=1 << 16, help="Dimension of the embedding.")] = 512,
    directions: Annotated[int, typer.Option(min=1, max=1 << 20, help="Directions of the minimal example.")] = 8192,
    repeats: Annotated[int, typer.Option(min=1, max=1000, help="Rounds; the medians are reported.")] = 9,
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


def codes(
    context: typer.Context,
    recipe: RecipeName,
    overrides: Overrides = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Any of features,ours,csr,csrv2,topk_sae,ncl,pca,random,pq; all of these if not given. Also published: the head of an encoder."
        ),
    ] = None,
    k: Annotated[str | None, typer.Option("--k", help="Values of a code; 2,4,8,16,32,64 if not given.")] = None,
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Repetitions of what is random.")] = 3,
    linear: Annotated[
        str, typer.Option(metavar="some|all|none", help="Where to train a linear probe; some: with all values and at k = 8 and 32.")
    ] = "some",
    device: Device = None,
    out: Annotated[
        Path | None,
        path_option(help="JSON file for all measurements; OUT.part has those of the methods so far, and the same command goes on from it."),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Compare methods that make sparse codes of the features of a frozen backbone: same features, batches, steps and optimiser.

    RECIPE is a pretraining recipe with encoder.freeze_backbone and encoder.cached_views, such as sparsify-folder, on images with labels.
    Its own objective is one of the methods. Without test images in the data, a fifth of the images is held out.
    """
    from ..bench.codes import Asked, compare_codes, default_methods
    from ..bench.tables import codes_table
    from ..config.pretrain import Recipe

    if out is not None:
        check_file("--out", out)
    names = default_methods() if methods is None else tuple(name.strip() for name in methods.split(","))
    asked: Any = Asked(names, None if k is None else tuple(whole_numbers("--k", k)), seeds, linear)  # type: ignore[arg-type]  # refused there if it is another word
    resolved = Recipe.load(recipe, overrides or [])
    command = typed_command(context)
    aside = None if out is None else out.with_name(out.name + ".part")

    def save(found: dict[str, Any], path: Path | None) -> None:
        if path is not None:
            write_file(path, (json.dumps({"command": command, **found}, indent=1) + "\n").encode())

    part = _read_part(aside)
    found = compare_codes(resolved, asked, choose_device(device), not (quiet or as_json), lambda report: save(report, aside), part)
    save(found, out)
    if aside is not None:
        aside.unlink(missing_ok=True)
    print_values({"command": command, **found, "text": codes_table(found)}, as_json)


def _read_part(path: Path | None) -> dict[str, Any] | None:
    """What an interrupted comparison has saved; None for nothing, or for what is no JSON object."""
    try:
        found = None if path is None else json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


bench_app.command("codes")(with_imports(codes))
bench_app.callback(help="Compare with others: the loss, and the sparse codes. Without a command, as `bench loss`.")(_by_default(loss))
