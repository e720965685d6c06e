"""The command line: thin calls of the functions of the package. Results on stdout, progress and log on stderr, errors in one line.

Nothing heavy is imported before a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from ..errors import DataError, OutputError, UsageError, ZooError, first_line

app = typer.Typer(
    name="rlpjepa", help="Sparse, non-negative image embeddings of a density you choose (Rectified LpJEPA on timm).",
    no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip

T = TypeVar("T")
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Values that replace those of the recipe.")]
RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's name (rlpjepa list --recipes) or YAML file.")]
SourceName = Annotated[str, typer.Argument(metavar="SOURCE", help="Zoo name, owner/repo[@revision] on the Hub, or a folder.")]
RunFolder = Annotated[Path, typer.Option(help="Folder of the run.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in --out, if there is one.")]
AllowChange = Annotated[list[str] | None, typer.Option(metavar="KEY", help="Recipe key that may differ from the resumed run.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bar.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images at a time.")]
Workers = Annotated[int, typer.Option(min=0, help="Threads that decode images; 0 decodes between batches.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; the best there is when not given.")]


def _version(asked: bool) -> None:
    if asked:
        from .. import __version__

        print(f"rlpjepa_zoo {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error (also accepted after the command).")] = False,
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=_version, help="Print the version.")] = False,
) -> None:
    pass


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything the demo makes.")] = Path("rlpjepa-demo"),
    density: Annotated[float, typer.Option(help="Fraction of non-zeros to ask for, between 0 and 1.")] = 0.12,
    epochs: Annotated[float, typer.Option(help="Passes over the 1437 training digits.")] = 50,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Pretrain on scikit-learn's digits, publish to a folder, load it back, embed, evaluate and draw (a minute or two on a CPU)."""
    from ..report.demo import run

    _print(run(out, density, epochs, progress=not quiet), as_json)


@app.command()
def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    out: RunFolder = Path("runs/latest"),
    resume: Resume = False,
    allow_change: AllowChange = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Pretrain an encoder by a recipe; also under `accelerate launch -m rlpjepa_zoo train ...` and torchrun."""
    from ..config.pretrain import Recipe
    from ..training.tasks.pretrain import train as run

    resolved = Recipe.load(recipe, overrides or [])
    _go("encoder", out, lambda: run(resolved, out, resume, allow_change or [], progress=not quiet), as_json)


def _go(made: str, out: Path, work: Callable[[], Path], as_json: bool) -> None:
    """Do a run, and print where what it made is, with the figures of its summary."""
    from ..core import distributed

    try:
        folder = work()
        if distributed.rank() == 0:
            summary = json.loads((out / "summary.json").read_text())
            _print({made: str(folder), **{k: v for k, v in summary.items() if not isinstance(v, dict | list)}}, as_json)
    finally:
        distributed.shut_down()


@app.command()
def finetune(
    recipe: RecipeName,
    overrides: Overrides = None,
    out: RunFolder = Path("runs/latest"),
    resume: Resume = False,
    allow_change: AllowChange = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Make an encoder a classifier of labelled images; also under `accelerate launch -m rlpjepa_zoo finetune ...` and torchrun."""
    from ..config.finetune import TuningRecipe
    from ..training.tasks.finetune import finetune as run

    resolved = TuningRecipe.load(recipe, overrides or [])
    _go("classifier", out, lambda: run(resolved, out, resume, allow_change or [], progress=not quiet), as_json)


@app.command()
def check(recipe: RecipeName, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Validate a recipe and print it in full, with its expected density and number of parameters; trains nothing."""
    from ..config.finetune import TuningRecipe, load_any

    resolved = load_any(recipe, overrides or [])
    resolved, facts = _facts_of_tuning(resolved) if isinstance(resolved, TuningRecipe) else (resolved, _facts(resolved))
    if as_json:
        _print({**facts, "recipe": resolved.model_dump(mode="json")}, True)
        return
    print("\n".join(f"# {name}: {_short(value)}" for name, value in facts.items()))
    print(resolved.dump(), end="")


def _facts(recipe: Any) -> dict[str, Any]:
    """Derived numbers of a recipe; builds the encoder without memory and sends one batch of the right size through it."""
    import torch

    from ..errors import RecipeError
    from ..training.tasks.encoders import build_encoder, preprocessing_warnings
    from ..training.tasks.pretrain import build_objective

    mu, sigma = recipe.target.law()
    empty = recipe.model_copy(update={"encoder": recipe.encoder.model_copy(update={"pretrained": False})})
    with torch.device("meta"):
        encoder = build_encoder(empty)
        side = recipe.data.image_size
        try:
            encoder.eval()(torch.empty(2, 3, side, side))
        except Exception as error:
            raise RecipeError(f"encoder: {recipe.encoder.backbone} does not take {side}-pixel images: {first_line(error)}") from error
    for sentence in preprocessing_warnings(recipe, encoder):
        logging.getLogger("rlpjepa_zoo").warning("%s", sentence)
    return {
        "target": f"rectified generalized Gaussian, p = {recipe.target.p:g}, mu = {mu:.6g}, sigma = {sigma:.6g}",
        "expected density": recipe.target.density_in_theory(),
        "parameters, backbone": sum(p.numel() for p in encoder.backbone.parameters()),
        "parameters, projector": sum(p.numel() for p in encoder.projector.parameters()),
        "features": encoder.config.features,
        "peak learning rate": recipe.lr,
        "directions": f"{build_objective(recipe).n} {recipe.objective.directions}",
    }


def _facts_of_tuning(recipe: Any) -> tuple[Any, dict[str, Any]]:
    """The recipe with what it leaves to the encoder it starts from, which is loaded, and derived numbers."""
    import dataclasses

    from ..training.tasks.encoders import start_encoder

    encoder = start_encoder(recipe.start, recipe.seed)
    return recipe.settled(dataclasses.asdict(encoder.config.preprocess)), {
        "starts from": f"{encoder.config.architecture}{', fresh weights' if recipe.start.random else ''}",
        "parameters, backbone": sum(p.numel() for p in encoder.backbone.parameters()),
        "classifies": f"{recipe.start.input} ({encoder.config.features if recipe.start.input == 'features' else encoder.config.dim})",
        "peak learning rate": recipe.lr,
    }


@app.command()
def embed(
    source: SourceName,
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGES...",
            help="Folders, image files, a list of files (.txt), parquet or tar files, or a data set on the Hub (owner/name, streamed).",
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="File to write (.safetensors, .npz, .parquet), or a folder of parquet files to fill or to go on with.")
    ],
    batch_size: BatchSize = 256,
    num_workers: Workers = 4,
    max_active: Annotated[int | None, typer.Option(min=1, help="Keep only this many largest values of each image.")] = None,
    min_value: Annotated[float, typer.Option(help="Leave out values below this.")] = 0.0,
    values: Annotated[str, typer.Option(help="float32 (exact), float16, or uint8 (with a scale for each image).")] = "float32",
    precision: Annotated[str, typer.Option(help="float32, or bf16: faster on many processors, codes differ by its rounding.")] = "float32",
    part_rows: Annotated[
        int, typer.Option(min=1, help="Folder: images in each file; what is lost, at most, when the program is killed.")
    ] = 4096,
    columns: Annotated[
        str, typer.Option(help="Columns to pass along, as in a,b; of tar files, suffixes such as json. The class label always is.")
    ] = "",
    id_column: Annotated[str | None, typer.Option(help="Column that holds the ids; row numbers when not given.")] = None,
    image_column: Annotated[str | None, typer.Option(help="Column that holds the images; found by type when not given.")] = None,
    split: Annotated[str | None, typer.Option(help="Of a data set on the Hub; train when not given.")] = None,
    data_revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a data set on the Hub.")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave unreadable images out, list them, and go on.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    revision: Revision = None,
    device: Device = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write sparse embeddings of images to a file or a folder; into a folder also under `accelerate launch -m rlpjepa_zoo embed ...` and torchrun.

    A folder is written in parts, and the same command goes on where it was stopped.
    """
    from ..core import distributed
    from ..data.feeds import open_feed
    from ..embedding.extract import Extraction, extract, provenance
    from ..models.encoder import OutputOptions
    from ..models.pretrained import load_encoder

    if out.suffix and not out.is_dir() and out.suffix not in (".safetensors", ".npz", ".parquet"):
        raise UsageError(f"--out {out}: expected a file ending in .safetensors, .npz or .parquet, or a folder")
    how = Extraction(values, part_rows, OutputOptions(max_active, min_value, precision), batch_size, num_workers, skip_bad)  # type: ignore[arg-type]
    _check_out(out, overwrite, bool(columns))
    feed = open_feed(
        images,
        split=split,
        columns=[c for c in columns.split(",") if c],
        id_column=id_column,
        image_column=image_column,
        revision=data_revision,
    )
    try:
        distributed.start()
        encoder = load_encoder(source, revision=revision, device=_device(device))
        if out.suffix and not out.is_dir():
            found = _to_file(encoder, feed, out, how, not quiet)
        else:
            found = extract(encoder, feed, out, how, model=provenance(encoder, source, revision), overwrite=overwrite, progress=not quiet)
            found = {"folder": str(out), **found, "model": encoder.fingerprint()}
            if not as_json:
                found["reasons"] = "; ".join(f"{n} x {reason}" for reason, n in found["reasons"].items()) or "-"
        if distributed.rank() == 0:
            _print(found, as_json)
    finally:
        distributed.shut_down()


def _check_out(out: Path, overwrite: bool, columns: bool) -> None:
    if not out.parent.is_dir():
        raise OutputError(f"--out {out}: no folder {out.parent}")
    if not out.suffix or out.is_dir():
        return
    if out.exists() and not overwrite:
        raise UsageError(f"--out {out}: exists; add --overwrite to replace it")
    if columns:
        raise UsageError(
            f"--columns: one file holds ids and embeddings only; columns are passed into a folder, so give --out DIR instead of {out}"
        )
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UsageError(f"--out {out}: several processes write a folder, not a file; give --out DIR")


def _to_file(encoder: Any, feed: Any, out: Path, how: Any, progress: bool) -> dict[str, Any]:
    """Embed into one file; everything is in memory until it is written."""
    failures: list[tuple[Any, str]] = []
    on_error = "skip" if how.skip_bad else "raise"
    budget = {"max_active": how.budget.max_active, "min_value": how.budget.min_value, "precision": how.budget.precision}
    found = encoder.embed(feed, how.batch_size, how.num_workers, progress=progress, on_error=on_error, failures=failures, **budget)
    if failures and not len(found):
        raise DataError(f"none of the {len(failures)} images can be read; the first: {failures[0][1]}")
    found.save(out, values=how.values)
    if failures:
        listing = out.with_name(out.name + ".failed.jsonl")
        _write(listing, "".join(json.dumps({"id": str(i), "reason": reason}) + "\n" for i, reason in failures).encode())
        logging.getLogger("rlpjepa_zoo").warning(
            "%d of %d images could not be read, see %s", len(failures), len(found) + len(failures), listing
        )
    n, dim = found.shape
    return {
        "file": str(out), "images": n, "skipped": len(failures), "dim": dim, "density": found.l0, "bytes": out.stat().st_size,
        "bytes as dense float32": 4 * n * dim, "model": found.meta["model"],
    }  # fmt: skip


@app.command()
def dial(
    source: SourceName,
    out: Annotated[Path, typer.Option(help="Folder for the encoder behind its dial; weights as they are.")],
    density: Annotated[float | None, typer.Option(help="Wanted fraction of active dimensions.")] = None,
    budget: Annotated[int | None, typer.Option(min=1, help="Or: at most this many active dimensions.")] = None,
    mode: Annotated[str, typer.Option(help="top_k keeps each image's largest values; threshold keeps values above one number.")] = "top_k",
    images: Annotated[str | None, typer.Option(help="What a threshold is calibrated on: a folder, files, ... as embed takes them.")] = None,
    num_workers: Workers = 4,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Calibrate without images that cannot be read.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the encoder in OUT.")] = False,
    revision: Revision = None,
    device: Device = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Make a trained encoder sparser, without training; what it then keeps is saved with it."""
    from ..models.pretrained import load_encoder

    if (density is None) == (budget is None):
        raise UsageError("--density and --budget: give one of them")
    if budget is not None and (mode != "top_k" or images is not None):
        raise UsageError("--budget keeps the largest values of any image; --mode and --images belong to --density")
    if out.exists() and not overwrite:
        raise UsageError(f"--out {out}: exists; choose another folder, or add --overwrite")
    encoder = load_encoder(source, revision=revision, device=_device(device))
    if budget is not None:
        twin = encoder.with_budget(budget)
    else:
        options = {"num_workers": num_workers, "progress": not quiet, "on_error": "skip" if skip_bad else "raise"}
        twin = encoder.with_density(density or 0.0, mode, images, **options)  # type: ignore[arg-type]
    twin.save_pretrained(out, name=f"local-dir:{out}")
    how = twin.config.dial
    _print({"encoder": str(out), "dial": "" if how is None else how.describe(twin.config.dim), "model": twin.fingerprint()}, as_json)


@app.command(name="eval")
def evaluate(
    source: SourceName,
    data: Annotated[
        str,
        typer.Option(
            help="digits, cifar10, cifar100, dtd, flowers102, food101, pets, a folder (a folder per class, in train/ and val/ where there "
            "are, or parquet files), or a recipe whose data section to use."
        ),
    ],
    overrides: Overrides = None,
    probes: Annotated[str, typer.Option(help="Of knn,linear,few_shot,mlp,retrieval,clustering; or all.")] = "knn,linear,few_shot",
    budgets: Annotated[
        str | None, typer.Option(help="Measure z also with only this many largest values of each image: 4,8,16, or auto: 1, 2, 4, ... 64.")
    ] = None,
    shots: Annotated[str, typer.Option(help="Images per class of few_shot.")] = "1,5,10",
    seeds: Annotated[int, typer.Option(min=1, help="Repetitions of what is random.")] = 3,
    queries: Annotated[int, typer.Option(min=1, help="Test images that search in retrieval, at most.")] = 2000,
    against: Annotated[
        list[str] | None,
        typer.Option(help="Compare on the same images: pixels, random (fresh weights), timm:NAME, or another SOURCE; may be repeated."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use at most this many training images, drawn at random.")] = None,
    pixels: Annotated[bool, typer.Option(help="Measure raw pixels too.")] = True,
    batch_size: BatchSize = 256,
    num_workers: Workers = 0,
    plot: Annotated[Path | None, typer.Option(help="Draw accuracy against active dimensions into this PNG (budgets: auto).")] = None,
    on_card: Annotated[bool, typer.Option("--card", help="Write the results into the card of SOURCE, a folder.")] = False,
    out: Annotated[Path | None, typer.Option(help="Also write the report to this JSON file.")] = None,
    revision: Revision = None,
    device: Device = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure the sparse embedding, the dense features and raw pixels: kNN, linear, few-shot and MLP probes, retrieval, clustering."""
    from ..evaluation.datasets import open_set
    from ..evaluation.evaluate import accuracy_table, checked_budgets, with_results
    from ..evaluation.evaluate import evaluate as run
    from ..evaluation.protocol import Protocol
    from ..models.pretrained import load_encoder

    if plot is not None and plot.suffix != ".png":
        raise UsageError(f"--plot {plot}: expected a file ending in .png")
    asked = budgets or ("auto" if plot is not None else "")
    wanted: Any = asked if asked == "auto" else _numbers("--budgets", asked) if asked else ()
    names, counts = tuple(name.strip() for name in probes.split(",")), tuple(_numbers("--shots", shots))
    protocol = Protocol(names, counts, seeds, queries=queries)  # refuses before anything is read
    if plot is not None and not {"knn", "linear", "few_shot" if 1 in counts else ""} & set(protocol.probes):
        raise UsageError("--plot: draws kNN, linear and 1-shot accuracy; add one of them to --probes")
    for file in (out, plot):
        if file is not None and not file.absolute().parent.is_dir():
            raise OutputError(f"{file}: no folder {file.parent}")
    place = _own_folder(source, "--card") if on_card else None
    found = open_set(data, overrides or [])
    encoder = load_encoder(source, revision=revision, device=_device(device))
    checked_budgets(wanted, encoder.config.dim)
    report = run(
        encoder, found.train, found.test, batch_size, num_workers, progress=not quiet, with_pixels=pixels, limit=limit, probes=names,
        budgets=wanted, shots=counts, seeds=seeds, queries=queries, against=against or (), note=found.note,
    )  # fmt: skip
    if place is not None:
        info = with_results(encoder.config.info, report, found.name)
        encoder.save_pretrained(place, info=info, name=_name(place))
    if out is not None:
        _write(out, (json.dumps({"source": source, "data": data, **report}, indent=1) + "\n").encode())
    if plot is not None:
        from ..hub.card_figures import accuracy

        _write(plot, accuracy(report))
    if as_json:
        _print(report, True)
        return
    print(accuracy_table(report))
    print(f"density of z {report['l0']:.4f} (effective, l1: {report['l1']:.4f}), dead dimensions {report['dead']:.4f}")


@app.command(name="list")
def list_(
    pattern: Annotated[str, typer.Argument(help="Shell pattern of names.")] = "*",
    recipes: Annotated[bool, typer.Option("--recipes", help="List recipes instead of encoders.")] = False,
    as_json: AsJson = False,
) -> None:
    """The encoders of the zoo (offline), or the recipes."""
    from ..hub import zoo

    if recipes:
        import fnmatch

        from ..config.load import list_recipes

        names = fnmatch.filter(list_recipes(), pattern)
        print(json.dumps(names) if as_json else "\n".join(names))
        return
    rows = [{"name": name, **zoo.entry(name)} for name in zoo.list_encoders(pattern)]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    columns = {
        "name": "name",
        "backbone": "architecture",
        "data": "data",
        "dim": "dim",
        "density": "density",
        "linear z": "linear_z",
        "kNN z": "knn_z",
        "MB": "megabytes",
        "repo": "repo",
    }
    table = [list(columns)] + [[_short(row.get(key)) for key in columns.values()] for row in rows]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    print("\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table))


License = Annotated[str | None, typer.Option("--license", help="Licence of the weights, such as apache-2.0, for the card.")]
Notes = Annotated[Path | None, typer.Option(help="Markdown file of your own words for the card.")]


@app.command()
def push(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Folder of a run, of an encoder or of embeddings, or a zoo name.")],
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository on the Hub; made if missing.")],
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="A new repository is private unless --public; an existing one must agree.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to; made if missing.")] = None,
    tag: Annotated[str | None, typer.Option(help="Name for the commit.")] = None,
    create_pr: Annotated[bool, typer.Option("--pr", help="Open a pull request instead of committing.")] = False,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
    license: License = None,
    notes: Notes = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model in the repository that is not a sparse encoder.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print files, sizes and the card; send nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Publish an encoder, a classifier, or embeddings as a data set, on the Hugging Face Hub.

    An encoder is verified; then what changed is sent as one commit. Log in with `hf auth login`, or set HF_TOKEN.
    """
    import tempfile

    from ..core import source as source_names
    from ..embedding import extract as extraction
    from ..hub import card, zoo
    from ..hub import download as hub
    from ..hub import format as hub_format
    from ..hub import push as publish
    from ..models.pretrained import load_published

    if not source_names.is_repository(repo):
        raise UsageError(f"OWNER/NAME: expected a repository such as you/encoder, got '{repo}'")
    contents: dict[str, bytes | Path]
    if (Path(_plain(source)) / "embeddings.json").is_file():
        kind, contents = publish.DATASET, extraction.publishable(_plain(source), repo, license, _text(notes))
    else:
        kind = publish.MODEL
        path = hub.resolve(source if source in zoo.list_encoders() or source.startswith("hf-hub:") else f"local-dir:{_plain(source)}")
        made = card.rewritten(path, repo, license, _text(notes))
        with tempfile.TemporaryDirectory() as scratch:
            load_published(hub_format.write_folder(Path(scratch) / "model", made))  # what does not load is not published
        contents = {**made}
    if dry_run:
        rows = {name: len(data) if isinstance(data, bytes) else data.stat().st_size for name, data in sorted(contents.items())}
        if as_json:
            _print({"repo": repo, "files": rows}, True)
            return
        print("\n".join(f"{size:>12,}  {name}" for name, size in rows.items()))
        print(f"{sum(rows.values()):>12,}  bytes in all, to {repo}; nothing was sent\n")
        print(bytes(contents["README.md"]).decode(), end="")
        return

    def send() -> publish.Pushed:
        return publish.push(
            contents, repo, kind=kind, private=private, new_private=True, revision=revision, tag=tag, create_pr=create_pr, message=message,
            overwrite=overwrite,
        )  # fmt: skip

    done = _interruptible(send)
    found = {"repo": repo, "commit": done.commit, "changed": list(done.changed), "url": done.url}
    changed = ", ".join(done.changed) or "nothing, so nothing was sent"
    _print(found if as_json else {**found, "changed": changed}, as_json)


@app.command()
def card(
    source: SourceName,
    name: Annotated[str | None, typer.Option(help="What the examples load, such as owner/name; what it says now when not given.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write README.md and its pictures into this folder instead of printing.")] = None,
    write: Annotated[bool, typer.Option("--write", help="Write the card of a folder anew in its place.")] = False,
    license: License = None,
    notes: Notes = None,
    revision: Revision = None,
) -> None:
    """Print a model card, or write it anew.

    It is generated from the record of the run and from what `rlpjepa eval --card` measured.
    """
    from ..hub import card as cards
    from ..hub import download as hub
    from ..hub import format as hub_format

    if write and out is not None:
        raise UsageError("--write and --out: give one of them")
    path = hub.resolve(source, revision)
    contents = cards.rewritten(path, name or _name(path), license, _text(notes))
    if write:
        print(hub_format.write_folder(_own_folder(source, "--write"), contents) / "README.md")
    elif out is not None:
        shown = {n: content for n, content in contents.items() if n == "README.md" or n.endswith(".png")}
        try:
            out.mkdir(parents=True, exist_ok=True)
            for n, content in shown.items():
                (out / n).write_bytes(content)
        except OSError as error:
            raise OutputError(f"--out {out}: cannot be written: {error.strerror or error}") from error
        print(out / "README.md")
    else:
        print(contents["README.md"].decode(), end="")


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, finished or not.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[data.KEY=VALUE]...", help="Where the images are now, such as data.path=DIR.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="HTML file; RUN/report.html when not given.")] = None,
    images: Annotated[int, typer.Option(help="Evaluation images to measure, at most; 2 or more.")] = 2000,
    batch_size: BatchSize = 256,
    num_workers: Workers = 0,
    device: Device = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write one HTML page about a run: curves, law of z, firing rates, nearest neighbours, units.

    It loads nothing from outside. A run without an encoder, or whose images are not there, gets a page of its curves.
    """
    from ..report.report import write

    found = write(run, out, overrides or [], images, batch_size, num_workers, _device(device), progress=not quiet)
    print(json.dumps(found) if as_json else found["page"])


@app.command()
def export(
    source: SourceName,
    out: Annotated[Path, typer.Option(help="File to write: .onnx or .pt2 (torch.export).")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    revision: Revision = None,
    as_json: AsJson = False,
) -> None:
    """Write the sparse encoder as one ONNX or torch.export file.

    The file holds backbone, projector and ReLU, and is checked to give the same codes before it takes its name.
    """
    from ..models.export import export as run
    from ..models.pretrained import load_encoder

    encoder = load_encoder(source, revision=revision)
    path = run(encoder, out, overwrite=overwrite)
    config = encoder.config
    size, mean, std = (
        "x".join(map(str, config.preprocess.size)),
        *(tuple(map(float, v)) for v in (config.preprocess.mean, config.preprocess.std)),
    )
    _print(
        {
            "file": str(path), "bytes": path.stat().st_size,
            "input images": f"float32 (batch, 3, {size.replace('x', ', ')}), RGB in 0..1, resized by {config.preprocess.interpolation} and cropped to "
            f"{size} with crop_pct {config.preprocess.crop_pct:g}, then (x - mean) / std with mean {mean}, std {std}",
            "outputs": f"z (batch, {config.dim}), features (batch, {config.features})",
        },
        as_json,
    )  # fmt: skip


@app.command()
def bench(
    batch: Annotated[int, typer.Option(min=2, help="Images of a step.")] = 256,
    dim: Annotated[int, typer.Option(min=1, help="Width of the embedding.")] = 512,
    directions: Annotated[int, typer.Option(min=1, help="Directions of the minimal example.")] = 8192,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds, of which medians are taken.")] = 9,
    device: Device = "cpu",
    out: Annotated[Path | None, typer.Option(help="JSON file for everything measured.")] = None,
    as_json: AsJson = False,
) -> None:
    """Time the loss beside the paper's minimal example: by turns, at equal directions and at equal gradient error.

    A minute on two CPU cores. POT and lightly are measured too where they are installed.
    """
    from ..report.bench_loss import compare, table

    found = compare(batch, dim, directions, repeats, _device(device))
    if out is not None:
        _write(out, (json.dumps(found, indent=1) + "\n").encode())
    _print({**found, "text": table(found)}, as_json)


zoo_app = typer.Typer(help="The zoo's own list.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(zoo_app, name="zoo")


@zoo_app.command()
def verify(
    pattern: Annotated[str, typer.Argument(help="Shell pattern of names.")] = "*",
    root: Annotated[Path | None, typer.Option("--folder", help="Check FOLDER/NAME instead of what ships.")] = None,
    online: Annotated[bool, typer.Option("--hub", help="Check the repository and commit that the list pins.")] = False,
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
    found: dict[str, str] = {}
    worst: ZooError | None = None
    for name in names:
        try:
            verify_entry(name, root, online)
            found[name] = "ok"
        except ZooError as error:
            found[name], worst = str(error), worst or error
        if not as_json:
            print(f"{name}: {found[name]}", flush=True)
    if as_json:
        print(json.dumps(found, indent=1))
    if worst is not None:
        wrong = sum(text != "ok" for text in found.values())
        raise type(worst)(f"{wrong} of {len(names)} encoders do not verify; the first: {worst}")


# --- around the commands --------------------------------------------------------------------------------------------------------------


def _plain(source: str) -> str:
    return source.removeprefix("local-dir:")


def _own_folder(source: str, option: str) -> Path:
    from ..hub import format as hub_format

    path = Path(_plain(source)).expanduser()
    if not path.is_dir() or path.parent.name == "snapshots":
        raise UsageError(f"{option}: '{source}' is not a folder of your own, so its card cannot be written")
    return hub_format.find(path)


def _text(path: Path | None) -> str | None:
    try:
        return None if path is None else path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--notes {path}: cannot be read as UTF-8 text ({first_line(error)})") from error


def _interruptible(work: Callable[[], T]) -> T:
    """Do it in a thread, so that Ctrl-C is answered while the Hub client waits for its own threads."""
    with_result: Future[T] = Future()

    def run() -> None:
        try:
            with_result.set_result(work())
        except BaseException as error:
            with_result.set_exception(error)

    threading.Thread(target=run, name="hub-push", daemon=True).start()
    return with_result.result()


def _name(path: Path) -> str:
    """What the card of a folder says it is called."""
    from ..hub import format as hub_format

    return str(hub_format.read_config(path)[hub_format.BLOCK].get("name", "owner/repo"))


def _device(asked: str | None) -> str:
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


def _write(path: Path, content: bytes) -> None:
    from ..core.files import whole_file

    with whole_file(path) as aside:
        aside.write_bytes(content)


def _numbers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"{option}: expected whole numbers such as 4,8,16, got '{text}'") from error


def _short(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _print(values: dict[str, Any], as_json: bool) -> None:
    """One JSON object, or `name: value` lines; the value of "text" is printed as it is."""
    if as_json:
        print(json.dumps({k: v for k, v in values.items() if k != "text"}))
    elif "text" in values:
        print(values["text"])
    else:
        print("\n".join(f"{name}: {_short(value)}" for name, value in values.items()))


def _fail(message: str, code: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


def run(arguments: list[str]) -> int:
    """The command line as a function of its arguments; returns the exit code (see `rlpjepa_zoo.errors`)."""
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    click_error = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")
    try:
        outcome = typer.main.get_command(app).main(arguments, prog_name="rlpjepa", standalone_mode=False)
        sys.stdout.flush()
        if outcome == 130:  # typer turns Ctrl-C into this
            raise KeyboardInterrupt
        return outcome if isinstance(outcome, int) else 0
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader is gone; say nothing more at exit
        return 141
    except Exception as error:
        if debug and not isinstance(error, click_error):
            raise
        if isinstance(error, ZooError):
            return _fail(str(error), error.exit_code)
        if isinstance(error, click_error):
            if type(error).__name__ == "NoArgsIsHelpError":
                print(error.format_message())  # type: ignore[attr-defined]
                return 2
            return _fail(f"{error.format_message()} (see rlpjepa --help)", 2)  # type: ignore[attr-defined]
        if type(error).__name__ == "Abort":
            return _fail("interrupted", 130)
        if isinstance(error, OSError) and error.errno in (28, 122):  # ENOSPC, EDQUOT
            return _fail(f"{error.filename or 'output'}: disk full", OutputError.exit_code)
        import traceback

        traceback.print_exc()
        return _fail(f"{type(error).__name__}: {error}; this is a bug of rlpjepa_zoo, please report it with the lines above", 70)


def main() -> None:
    """Entry point of `rlpjepa`."""
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # its retries are reported by ours, in one line each
    if "--quiet" in sys.argv or "--json" in sys.argv or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    log = logging.getLogger("rlpjepa_zoo")
    log.addHandler(handler)
    log.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)
    log.propagate = False
    code = run(sys.argv[1:])
    if any(
        thread.name == "hub-push" for thread in threading.enumerate()
    ):  # the Hub does not answer, and Python would wait for its client's threads
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
