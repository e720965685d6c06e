"""Commands that measure or classify: `eval`, `report`, `predict`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.source import expanded
from ..errors import UsageError
from .options import (
    AllowPaths,
    AsJson,
    BatchSize,
    DataRevision,
    DataSplit,
    Device,
    IdColumn,
    ImageColumn,
    ImagesToRead,
    Overrides,
    Overwrite,
    Quiet,
    Revision,
    SkipBad,
    SourceName,
    Workers,
    card_name,
    check_file,
    choose_device,
    list_failures,
    own_folder,
    path_option,
    print_values,
    typed_command,
    whole_numbers,
    write_file,
)

if TYPE_CHECKING:
    from ..models.classifier import Classifier

_ONLY_ENCODERS = ("probes", "budgets", "shots", "seeds", "queries", "against", "limit", "pixels", "plot", "on_card")
"""Options of `eval` that have no meaning for a classifier."""


def evaluate(
    context: typer.Context,
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
    pixels: Annotated[bool, typer.Option(help="Also measure raw pixels, of larger images shrunk to 32 x 32.")] = True,
    batch_size: BatchSize = None,
    num_workers: Workers = 4,
    plot: Annotated[Path | None, path_option(help="PNG file for a plot of accuracy against active dimensions (budgets: auto).")] = None,
    on_card: Annotated[bool, typer.Option("--card", help="Write the results into the card of SOURCE, a folder.")] = False,
    out: Annotated[Path | None, path_option(help="Also write the report to this JSON file.")] = None,
    revision: Revision = None,
    device: Device = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure an encoder (kNN, linear, few-shot and MLP probes, retrieval, clustering), or the accuracy of a classifier on test images."""
    from ..evaluation.datasets import open_set
    from ..evaluation.evaluate import check_budgets, with_results
    from ..evaluation.evaluate import evaluate as run
    from ..evaluation.protocol import Protocol, default_probes
    from ..evaluation.tables import accuracy_table
    from ..hub.card import rewritten
    from ..hub.folder import write_folder
    from ..models.classifier import Classifier
    from ..models.pretrained import load_published

    overrides = [*(overrides or []), *(["data.allow_paths=true"] if allow_paths else [])]
    if plot is not None and plot.suffix != ".png":
        raise UsageError(f"--plot {plot}: expected a file ending in .png")
    asked = budgets or ("auto" if plot is not None else "")
    counts: Any = asked if asked == "auto" else whole_numbers("--budgets", asked) if asked else ()
    names = default_probes() if probes is None else tuple(name.strip() for name in probes.split(","))
    images_per_class = tuple(whole_numbers("--shots", shots))
    protocol = Protocol(names, seeds, shots=images_per_class, queries=queries)  # refuses wrong values before anything is read
    if plot is not None and not {"knn", "linear", "few_shot" if 1 in images_per_class else ""} & set(protocol.probes):
        raise UsageError("--plot: draws kNN, linear and 1-shot accuracy; add one of them to --probes")
    for option, file in (("--out", out), ("--plot", plot)):
        if file is not None:
            check_file(option, file)
    folder = own_folder(source, "--card") if on_card else None
    encoder, progress = load_published(source, revision=revision, device=choose_device(device)), not (quiet or as_json)
    if isinstance(encoder, Classifier):
        for name in _ONLY_ENCODERS:
            if context.get_parameter_source(name).name == "COMMANDLINE":  # type: ignore[union-attr]
                option = {"pixels": "--pixels", "on_card": "--card"}.get(name, f"--{name}")
                raise UsageError(
                    f"{option}: '{source}' is a classifier, and the option belongs to the evaluation of encoders; leave it out"
                )
        _evaluate_classifier(encoder, source, data, overrides, batch_size, num_workers, progress, out, as_json)
        return
    images = open_set(data, overrides)
    check_budgets(counts, encoder.config.dim)
    report = {"command": typed_command(context)} | run(
        encoder, images.train, images.test, batch_size, num_workers, progress, pixels, limit, probes=names, budgets=counts,
        shots=images_per_class, seeds=seeds, queries=queries, against=against or (), note=images.note,
    )  # fmt: skip
    if folder is not None:
        info = with_results(encoder.config.info, report, images.name)
        write_folder(folder, rewritten(folder, card_name(folder), info=info))
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


def _evaluate_classifier(
    classifier: Classifier, source: str, data: str, overrides: list[str], batch_size: int | None, num_workers: int, progress: bool,
    out: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Measure and print the accuracy of a classifier."""
    from ..evaluation.datasets import open_test_images
    from ..evaluation.tables import classifier_table
    from ..training.tasks.accuracy import evaluate_classifier

    images = open_test_images(data, overrides)
    report = evaluate_classifier(classifier, images.test, batch_size, num_workers, progress, images.note)
    if out is not None:
        write_file(out, (json.dumps({"source": source, "data": data, **report}, indent=1) + "\n").encode())
    print_values(report | {"text": classifier_table(report)}, as_json)


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", parser=expanded, help="Folder of a run, finished or not.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[data.KEY=VALUE]...", help="Where the images are now, such as data.path=DIR.")
    ] = None,
    out: Annotated[Path | None, path_option(help="HTML file to write; RUN/report.html if not given.")] = None,
    images: Annotated[int, typer.Option(help="Largest number of evaluation images to measure; 2 or more.")] = 2000,
    batch_size: BatchSize = None,
    num_workers: Workers = 4,
    device: Device = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write one HTML page about a run: curves; distribution of z, firing rates, neighbours, units; of a classifier classes and mistakes.

    The page loads nothing from outside. Without a published model or without images, it shows the curves only.
    """
    from ..report.report import write_report

    summary = write_report(run, out, overrides or [], images, batch_size, num_workers, choose_device(device), not (quiet or as_json))
    print(json.dumps(summary) if as_json else summary["page"])


def predict(
    classifier: Annotated[
        str, typer.Argument(metavar="CLASSIFIER", help="owner/repo[@revision] on the Hub, or the folder of a classifier or its run.")
    ],
    images: ImagesToRead,
    out: Annotated[Path, path_option(help="File to write (.csv, .jsonl, .parquet), with the columns id, class, probability.")],
    top: Annotated[int, typer.Option(min=1, help="Most probable classes of each image, one row for each.")] = 1,
    batch_size: BatchSize = None,
    num_workers: Workers = 4,
    id_column: IdColumn = None,
    image_column: ImageColumn = None,
    allow_paths: AllowPaths = False,
    split: DataSplit = None,
    data_revision: DataRevision = None,
    skip_bad: SkipBad = False,
    overwrite: Overwrite = False,
    revision: Revision = None,
    device: Device = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Classify images: write the most probable class of each image, in input order, to a table."""
    from ..data.sources import open_images
    from ..embedding.predictions import SUFFIXES, write_predictions
    from ..models.pretrained import load_classifier

    if out.suffix.lower() not in SUFFIXES:
        raise UsageError(f"--out {out}: expected a file ending in {', '.join(SUFFIXES)}")
    check_file("--out", out, overwrite)
    feed = open_images(
        images, split=split, id_column=id_column, image_column=image_column, revision=data_revision, allow_paths=allow_paths, prefix="--",
        on_error="skip" if skip_bad else "raise",
    )  # fmt: skip
    model = load_classifier(classifier, revision=revision, device=choose_device(device))
    count, failures = write_predictions(model, feed, out, top, batch_size, num_workers, skip_bad, not (quiet or as_json))
    list_failures(out, failures, count)
    result = {"file": str(out), "images": count, "skipped": len(failures), "classes": len(model.classes), "model": model.fingerprint()}
    print_values(result, as_json)
