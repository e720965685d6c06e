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

from .errors import OutputError, UsageError, ZooError, first_line

app = typer.Typer(
    name="rlpjepa", help="Sparse, non-negative image embeddings of a density you choose (Rectified LpJEPA on timm).",
    no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip

T = TypeVar("T")
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Values that replace those of the recipe.")]
RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's name (rlpjepa list --recipes) or YAML file.")]
SourceName = Annotated[str, typer.Argument(metavar="SOURCE", help="Zoo name, owner/repo[@revision] on the Hub, or a folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bar.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images at a time.")]
Workers = Annotated[int, typer.Option(min=0, help="Processes that decode images; 0 decodes in this one.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; the best there is when not given.")]


def _version(asked: bool) -> None:
    if asked:
        from . import __version__

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
    from .demo import run

    _print(run(out, density, epochs, progress=not quiet), as_json)


@app.command()
def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/latest"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in --out, if there is one.")] = False,
    allow_change: Annotated[list[str] | None, typer.Option(metavar="KEY", help="Recipe key that may differ from the resumed run.")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Pretrain an encoder by a recipe; also under `accelerate launch -m rlpjepa_zoo train ...` and torchrun."""
    from . import collectives
    from .recipe import Recipe
    from .training import train as run

    resolved = Recipe.load(recipe, overrides or [])
    try:
        folder = run(resolved, out, resume, allow_change or [], progress=not quiet)
        if collectives.rank() == 0:
            summary = json.loads((out / "summary.json").read_text())
            _print({"encoder": str(folder), **{k: v for k, v in summary.items() if not isinstance(v, dict | list)}}, as_json)
    finally:
        collectives.shut_down()


@app.command()
def finetune(
    recipe: RecipeName,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/latest"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in --out, if there is one.")] = False,
    allow_change: Annotated[list[str] | None, typer.Option(metavar="KEY", help="Recipe key that may differ from the resumed run.")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Make an encoder a classifier of labelled images; also under `accelerate launch -m rlpjepa_zoo finetune ...` and torchrun."""
    from . import collectives
    from .tuning import finetune as run
    from .tuning_recipe import TuningRecipe

    resolved = TuningRecipe.load(recipe, overrides or [])
    try:
        folder = run(resolved, out, resume, allow_change or [], progress=not quiet)
        if collectives.rank() == 0:
            summary = json.loads((out / "summary.json").read_text())
            _print({"classifier": str(folder), **{k: v for k, v in summary.items() if not isinstance(v, dict | list)}}, as_json)
    finally:
        collectives.shut_down()


@app.command()
def check(recipe: RecipeName, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Validate a recipe and print it in full, with its expected density and number of parameters; trains nothing."""
    from .tuning_recipe import TuningRecipe, load_any

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

    from .errors import RecipeError
    from .model import build_encoder

    mu, sigma = recipe.target.law()
    empty = recipe.model_copy(update={"encoder": recipe.encoder.model_copy(update={"pretrained": False})})
    with torch.device("meta"):
        encoder = build_encoder(empty)
        side = recipe.data.image_size
        try:
            encoder.eval()(torch.empty(2, 3, side, side))
        except Exception as error:
            raise RecipeError(f"encoder: {recipe.encoder.backbone} does not take {side}-pixel images: {first_line(error)}") from error
    return {
        "target": f"rectified generalized Gaussian, p = {recipe.target.p:g}, mu = {mu:.6g}, sigma = {sigma:.6g}",
        "expected density": recipe.target.density_in_theory(),
        "parameters, backbone": sum(p.numel() for p in encoder.backbone.parameters()),
        "parameters, projector": sum(p.numel() for p in encoder.projector.parameters()),
        "features": encoder.config.features,
        "peak learning rate": recipe.lr,
    }


def _facts_of_tuning(recipe: Any) -> tuple[Any, dict[str, Any]]:
    """The recipe with what it leaves to the encoder it starts from, which is loaded, and derived numbers."""
    from .tuning import start_encoder

    encoder = start_encoder(recipe)
    return recipe.settled(encoder.config.preprocess), {
        "starts from": f"{encoder.config.architecture}{', fresh weights' if recipe.start.random else ''}",
        "parameters, backbone": sum(p.numel() for p in encoder.backbone.parameters()),
        "classifies": f"{recipe.start.input} ({encoder.config.features if recipe.start.input == 'features' else encoder.config.dim})",
        "peak learning rate": recipe.lr,
    }


@app.command()
def embed(
    source: SourceName,
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGES...", help="A folder, image files, or a parquet file with an image column.")
    ],
    out: Annotated[Path, typer.Option(help="File to write: .safetensors, .npz or .parquet.")],
    batch_size: BatchSize = 256,
    num_workers: Workers = 0,
    max_active: Annotated[int | None, typer.Option(min=1, help="Keep only this many largest values of each image.")] = None,
    values: Annotated[str, typer.Option(help="float32 (exact) or float16.")] = "float32",
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave unreadable images out, list them in OUT.failed.jsonl, and go on.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    revision: Revision = None,
    device: Device = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write sparse embeddings of images to one file."""
    if out.suffix not in (".safetensors", ".npz", ".parquet"):
        raise UsageError(f"--out {out}: expected a file ending in .safetensors, .npz or .parquet")
    if values not in ("float32", "float16"):
        raise UsageError(f"--values: expected float32 or float16, got {values}")
    if out.exists() and not overwrite:
        raise UsageError(f"--out {out}: exists; add --overwrite to replace it")
    if not out.parent.is_dir():
        raise OutputError(f"--out {out}: no folder {out.parent}")
    from .images import open_images
    from .loading import load_encoder

    opened = open_images(images[0] if len(images) == 1 else images)
    encoder = load_encoder(source, revision=revision, device=_device(device))
    failures: list[tuple[Any, str]] = []
    found = encoder.embed(
        opened, batch_size, num_workers, max_active, progress=not quiet, on_error="skip" if skip_bad else "raise", failures=failures
    )
    found.save(out, values=values)  # type: ignore[arg-type]
    if failures:
        listing = out.with_name(out.name + ".failed.jsonl")
        listing.write_text("".join(json.dumps({"id": str(i), "reason": reason}) + "\n" for i, reason in failures))
        logging.getLogger("rlpjepa_zoo").warning("%d of %d images could not be read, see %s", len(failures), len(opened), listing)
    n, dim = found.shape
    _print(
        {
            "file": str(out), "images": n, "skipped": len(failures), "dim": dim, "density": found.l0, "bytes": out.stat().st_size,
            "bytes as dense float32": 4 * n * dim, "model": found.meta["model"],
        },
        as_json,
    )  # fmt: skip


@app.command(name="eval")
def evaluate(
    source: SourceName,
    data: Annotated[
        str,
        typer.Option(
            help="digits, a folder (train/ and val/ with a folder per class, or parquet files), or a recipe whose data section to use."
        ),
    ],
    overrides: Overrides = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use at most this many training images, drawn at random.")] = None,
    pixels: Annotated[bool, typer.Option(help="Measure raw pixels too.")] = True,
    batch_size: BatchSize = 256,
    num_workers: Workers = 0,
    curve: Annotated[bool, typer.Option("--curve", help="Measure also with only the 1, 2, 4, ... largest values of each image.")] = False,
    on_card: Annotated[bool, typer.Option("--card", help="Write the results into the card of SOURCE, a folder.")] = False,
    out: Annotated[Path | None, typer.Option(help="Also write the report to this JSON file.")] = None,
    revision: Revision = None,
    device: Device = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """kNN, linear and 1-shot accuracy of the sparse embedding, the dense features and raw pixels."""
    from .errors import DataError
    from .evaluation import accuracy_table, with_results
    from .evaluation import evaluate as run
    from .loading import load_encoder
    from .recipe import Data, Recipe
    from .sources import open_source

    if Path(data).is_dir():
        parquet = any(Path(data).rglob("*.parquet"))
        section = Data(source="hf", path=data, eval_split="test") if parquet else Data(source="folder", path=data)
        if overrides:
            raise UsageError(f"'{overrides[0]}': overrides belong to a recipe, and --data {data} is a folder")
    else:
        section = Recipe.load(data, overrides or []).data
    if section.streaming:
        raise UsageError(f"--data {data}: evaluation needs all images at once; set data.streaming=false and data.length=null")
    opened = open_source(section)
    if opened.eval is None:
        raise DataError(
            f"--data {data}: no evaluation images; expected a folder val/ or test/ beside train/, or a recipe with data.eval_split"
        )
    place = _own_folder(source, "--card") if on_card else None
    encoder = load_encoder(source, revision=revision, device=_device(device))
    report = run(
        encoder, opened.train, opened.eval, batch_size, num_workers, progress=not quiet, with_pixels=pixels, limit=limit, curve=curve
    )
    if place is not None:
        info = with_results(encoder.config.info, report, section.name or section.label())
        encoder.save_pretrained(place, info=info, name=_name(place))
    if out is not None:
        _write(out, json.dumps({"source": source, "data": data, **report}, indent=1) + "\n")
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
    from . import zoo

    if recipes:
        import fnmatch

        from .recipe import list_recipes

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
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Folder of a run or of an encoder, or a zoo name.")],
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
    """Publish an encoder or a classifier on the Hugging Face Hub.

    It is verified, then sent as one commit with what changed. Log in with `hf auth login`, or set HF_TOKEN.
    """
    import tempfile

    from . import card, folder, hub, publish, zoo
    from .loading import load_published

    if not zoo.is_repository(repo):
        raise UsageError(f"OWNER/NAME: expected a repository such as you/encoder, got '{repo}'")
    path = hub.resolve(source if source in zoo.list_encoders() or source.startswith("hf-hub:") else f"local-dir:{_plain(source)}")
    contents = card.rewritten(path, repo, license, _text(notes))
    with tempfile.TemporaryDirectory() as scratch:
        load_published(folder.write_folder(Path(scratch) / "model", contents))  # what does not load is not published
    if dry_run:
        rows = {name: len(content) for name, content in sorted(contents.items())}
        if as_json:
            _print({"repo": repo, "files": rows}, True)
            return
        print("\n".join(f"{size:>12,}  {name}" for name, size in rows.items()))
        print(f"{sum(rows.values()):>12,}  bytes in all, to {repo}; nothing was sent\n")
        print(contents["README.md"].decode(), end="")
        return

    def send() -> publish.Pushed:
        return publish.push(
            contents, repo, private=private, new_private=True, revision=revision, tag=tag, create_pr=create_pr, message=message,
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
    from . import card as cards
    from . import folder, hub

    if write and out is not None:
        raise UsageError("--write and --out: give one of them")
    path = hub.resolve(source, revision)
    contents = cards.rewritten(path, name or _name(path), license, _text(notes))
    if write:
        print(folder.write_folder(_own_folder(source, "--write"), contents) / "README.md")
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
    from .report import write

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
    from .export import export as run
    from .loading import load_encoder

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
    from . import zoo
    from .loading import verify_entry

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
    from . import folder

    path = Path(_plain(source)).expanduser()
    if not path.is_dir() or path.parent.name == "snapshots":
        raise UsageError(f"{option}: '{source}' is not a folder of your own, so its card cannot be written")
    return folder.find(path)


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
    from . import folder

    return str(folder.read_config(path)[folder.BLOCK].get("name", "owner/repo"))


def _device(asked: str | None) -> str:
    import torch

    if asked is None:
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=asked)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {asked}: not available here ({str(error).splitlines()[0]})") from error
    return asked


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error


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
