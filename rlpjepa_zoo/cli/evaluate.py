"""Commands that measure: `eval`, `report`, `bench`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import OutputError, UsageError
from .options import (
    AllowPaths,
    AsJson,
    BatchSize,
    Device,
    Overrides,
    Quiet,
    Revision,
    SourceName,
    Workers,
    card_name,
    choose_device,
    own_folder,
    print_values,
    write_file,
)


def evaluate(
    source: SourceName,
    data: Annotated[
        str,
        typer.Option(
            help="digits, cifar10, cifar100, dtd, flowers102, food101, pets, a folder (one folder per class, in train/ and val/ if they "
            "exist, or parquet files), or a recipe whose data section is used."
        ),
    ],
    overrides: Overrides = None,
    probes: Annotated[
        str | None, typer.Option(help="Any of knn,linear,few_shot,mlp,retrieval,clustering; or all. Without it: knn,linear,few_shot.")
    ] = None,
    budgets: Annotated[
        str | None, typer.Option(help="Also measure z with only this many largest values of each image: 4,8,16, or auto: 1, 2, 4, ... 64.")
    ] = None,
    shots: Annotated[str, typer.Option(help="Images per class of few_shot.")] = "1,5,10",
    seeds: Annotated[int, typer.Option(min=1, help="Repetitions of random measurements.")] = 3,
    queries: Annotated[int, typer.Option(min=1, help="Largest number of test images that search in retrieval.")] = 2000,
    against: Annotated[
        list[str] | None,
        typer.Option(help="Compare on the same images: pixels, random (fresh weights), timm:NAME, or another SOURCE; may be repeated."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Largest number of training images, drawn at random.")] = None,
    allow_paths: AllowPaths = False,
    pixels: Annotated[bool, typer.Option(help="Also measure raw pixels.")] = True,
    batch_size: BatchSize = 256,
    num_workers: Workers = 0,
    plot: Annotated[Path | None, typer.Option(help="PNG file for a plot of accuracy against active dimensions (budgets: auto).")] = None,
    on_card: Annotated[bool, typer.Option("--card", help="Write the results into the card of SOURCE, a folder.")] = False,
    out: Annotated[Path | None, typer.Option(help="Also write the report to this JSON file.")] = None,
    revision: Revision = None,
    device: Device = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure the sparse embedding, the dense features and raw pixels: kNN, linear, few-shot and MLP probes, retrieval, clustering."""
    from ..evaluation.datasets import open_set
    from ..evaluation.evaluate import check_budgets, with_results
    from ..evaluation.evaluate import evaluate as run
    from ..evaluation.protocol import Protocol, default_probes
    from ..evaluation.tables import accuracy_table
    from ..models.pretrained import load_encoder

    if plot is not None and plot.suffix != ".png":
        raise UsageError(f"--plot {plot}: expected a file ending in .png")
    asked = budgets or ("auto" if plot is not None else "")
    counts: Any = asked if asked == "auto" else _whole_numbers("--budgets", asked) if asked else ()
    names = default_probes() if probes is None else tuple(name.strip() for name in probes.split(","))
    images_per_class = tuple(_whole_numbers("--shots", shots))
    protocol = Protocol(names, seeds, shots=images_per_class, queries=queries)  # refuses wrong values before anything is read
    if plot is not None and not {"knn", "linear", "few_shot" if 1 in images_per_class else ""} & set(protocol.probes):
        raise UsageError("--plot: draws kNN, linear and 1-shot accuracy; add one of them to --probes")
    for file in (out, plot):
        if file is not None and not file.absolute().parent.is_dir():
            raise OutputError(f"{file}: no folder {file.parent}")
    folder = own_folder(source, "--card") if on_card else None
    images = open_set(data, [*(overrides or []), *(["data.allow_paths=true"] if allow_paths else [])])
    encoder = load_encoder(source, revision=revision, device=choose_device(device))
    check_budgets(counts, encoder.config.dim)
    report = run(
        encoder, images.train, images.test, batch_size, num_workers, progress=not quiet, with_pixels=pixels, limit=limit, probes=names,
        budgets=counts, shots=images_per_class, seeds=seeds, queries=queries, against=against or (), note=images.note,
    )  # fmt: skip
    if folder is not None:
        info = with_results(encoder.config.info, report, images.name)
        encoder.save_pretrained(folder, info=info, name=card_name(folder))
    if out is not None:
        write_file(out, (json.dumps({"source": source, "data": data, **report}, indent=1) + "\n").encode())
    if plot is not None:
        from ..hub.card_figures import accuracy

        write_file(plot, accuracy(report))
    if as_json:
        print_values(report, True)
        return
    print(accuracy_table(report))
    print(f"density of z {report['l0']:.4f} (effective, l1: {report['l1']:.4f}), dead dimensions {report['dead']:.4f}")


def _whole_numbers(option: str, text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError as error:
        raise UsageError(f"{option}: expected whole numbers such as 4,8,16, got '{text}'") from error


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, finished or not.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[data.KEY=VALUE]...", help="Where the images are now, such as data.path=DIR.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="HTML file to write; RUN/report.html if not given.")] = None,
    images: Annotated[int, typer.Option(help="Largest number of evaluation images to measure; 2 or more.")] = 2000,
    batch_size: BatchSize = 256,
    num_workers: Workers = 0,
    device: Device = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write one HTML page about a run: curves, distribution of z, firing rates, nearest neighbours, units.

    The page loads nothing from outside. Without an encoder or without images, it shows the curves only.
    """
    from ..report.report import write_report

    summary = write_report(run, out, overrides or [], images, batch_size, num_workers, choose_device(device), progress=not quiet)
    print(json.dumps(summary) if as_json else summary["page"])


def bench(
    batch: Annotated[int, typer.Option(min=2, help="Images per step.")] = 256,
    dim: Annotated[int, typer.Option(min=1, help="Dimension of the embedding.")] = 512,
    directions: Annotated[int, typer.Option(min=1, help="Directions of the minimal example.")] = 8192,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; the medians are reported.")] = 9,
    device: Device = "cpu",
    out: Annotated[Path | None, typer.Option(help="JSON file for all measurements.")] = None,
    as_json: AsJson = False,
) -> None:
    """Time the loss beside the minimal example of the paper, in alternation, at equal directions and at equal gradient error.

    Takes a minute on two CPU cores. Also measures POT and lightly if they are installed.
    """
    from ..report.bench_loss import compare, markdown_table

    times = compare(batch, dim, directions, repeats, choose_device(device))
    if out is not None:
        write_file(out, (json.dumps(times, indent=1) + "\n").encode())
    print_values({**times, "text": markdown_table(times)}, as_json)
