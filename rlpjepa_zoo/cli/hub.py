"""Commands around the Hub: `list`, `card`, `push`, `export`."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, TypeVar

import typer

from ..errors import OutputError, UsageError, first_line
from .options import (
    AsJson,
    License,
    Notes,
    Private,
    Revision,
    SourceName,
    card_name,
    format_value,
    own_folder,
    path_option,
    print_table,
    print_values,
)

if TYPE_CHECKING:
    from ..hub.push import Kind

T = TypeVar("T")
Contents: TypeAlias = dict[str, bytes | Path]
"""Bytes, or the local file that holds them, by file name."""
PUSH_THREAD = "hub-push"
"""Name of the thread that pushes; `rlpjepa_zoo.cli.app.main` does not wait for it."""

LIST_COLUMNS = {
    "name": "name",
    "backbone": "architecture",
    "data": "data",
    "dim": "dim",
    "density": "density",
    "licence": "license",
    "linear z": "linear_z",
    "kNN z": "knn_z",
    "MB": "megabytes",
    "repo": "repo",
}
"""Columns of `rlpjepa list`, and their keys in the manifest of the zoo."""


def list_(
    pattern: Annotated[str, typer.Argument(help="Shell pattern of names.")] = "*",
    data: Annotated[str | None, typer.Option(help="Part of the training data's name, or a shell pattern of the whole name.")] = None,
    license: Annotated[str | None, typer.Option(help="Licence of the weights, such as apache-2.0.")] = None,
    max_megabytes: Annotated[float | None, typer.Option(help="Largest size of the published files, in MB.")] = None,
    min_density: Annotated[float | None, typer.Option(help="Smallest measured density of z, in 0..1.")] = None,
    max_density: Annotated[float | None, typer.Option(help="Largest measured density of z, in 0..1.")] = None,
    min_linear: Annotated[float | None, typer.Option(help="Smallest accuracy of a linear probe on z, in 0..1.")] = None,
    min_knn: Annotated[float | None, typer.Option(help="Smallest kNN accuracy of z, in 0..1.")] = None,
    recipes: Annotated[bool, typer.Option("--recipes", help="List recipes instead of encoders.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the encoders of the zoo that pass every filter (offline), or the recipes.

    Accuracies are those on each encoder's own evaluation images. An encoder without a figure passes no filter on it.
    """
    from ..hub import zoo

    filters: dict[str, Any] = {
        "data": data, "license": license, "max_megabytes": max_megabytes, "min_density": min_density, "max_density": max_density,
        "min_linear": min_linear, "min_knn": min_knn,
    }  # fmt: skip
    given = {name: value for name, value in filters.items() if value is not None}
    if recipes:
        import fnmatch

        from ..config.load import list_recipes
        from ..config.plan import command_of

        if given:
            raise UsageError(f"--recipes: takes no filter of encoders; leave out --{next(iter(given)).replace('_', '-')}")
        names = fnmatch.filter(list_recipes(), pattern)
        print(json.dumps(names) if as_json else "\n".join(f"{name:28}rlpjepa {command_of(name)}" for name in names))
        return
    rows = [{"name": name, **zoo.entry(name)} for name in zoo.list_encoders(pattern, **given)]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    print_table(list(LIST_COLUMNS), [[format_value(row.get(key)) for key in LIST_COLUMNS.values()] for row in rows])


def push(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Folder of a run, of an encoder or of embeddings, or a zoo name.")],
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository on the Hub; created if missing.")],
    private: Private = None,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to; created if missing.")] = None,
    tag: Annotated[str | None, typer.Option(help="Tag for the commit.")] = None,
    create_pr: Annotated[bool, typer.Option("--pr", help="Open a pull request instead of committing.")] = False,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
    license: License = None,
    notes: Notes = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model in the repository that is not a sparse encoder.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print files, sizes and the card; send nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Publish an encoder, a classifier, or embeddings as a data set, on the Hugging Face Hub.

    Verifies an encoder first, then sends the changed files as one commit. Log in with `hf auth login`, or set HF_TOKEN.
    """
    from ..core.source import is_repository

    if not is_repository(repo):
        raise UsageError(f"OWNER/NAME: expected a repository such as you/encoder, got '{repo}'")
    kind, contents = files_to_push(source, repo, license, _read_notes(notes))
    if dry_run:
        sizes = file_sizes(contents)
        if as_json:
            print_values({"repo": repo, "files": sizes}, True)
            return
        print_sizes(sizes, f"bytes in all, to {repo}; nothing was sent\n")
        print(bytes(contents["README.md"]).decode(), end="")
        return
    pushed = send(
        contents, repo, kind=kind, private=private, revision=revision, tag=tag, create_pr=create_pr, message=message, overwrite=overwrite
    )
    changed = ", ".join(pushed["changed"]) or "nothing, so nothing was sent"
    print_values(pushed if as_json else {**pushed, "changed": changed}, as_json)


def file_sizes(contents: Contents) -> dict[str, int]:
    """Return the bytes of each file to push, by name."""
    return {name: len(data) if isinstance(data, bytes) else data.stat().st_size for name, data in sorted(contents.items())}


def print_sizes(sizes: dict[str, int], in_all: str) -> None:
    """Print the size and name of each file, and a last line about their sum."""
    print("\n".join(f"{size:>12,}  {name}" for name, size in sizes.items()))
    print(f"{sum(sizes.values()):>12,}  {in_all}")


def send(contents: Contents, repo: str, **options: Any) -> dict[str, Any]:
    """Push files with the options of `rlpjepa_zoo.hub.push.push` and return what `--json` prints; a new repository is private."""
    from ..hub.push import push as push_files

    pushed = interruptible(lambda: push_files(contents, repo, new_private=True, **options))
    return {"repo": repo, "commit": pushed.commit, "changed": list(pushed.changed), "url": pushed.url}


def files_to_push(source: str, repo: str, license: str | None = None, notes: str | None = None) -> tuple[Kind, Contents]:
    """Return the kind of repository and the files for it. What does not load raises here and is not published."""
    import tempfile

    from ..core.source import ModelSource
    from ..embedding.card import publishable
    from ..hub import zoo
    from ..hub.card import rewritten
    from ..hub.download import resolve
    from ..hub.folder import write_folder
    from ..hub.push import DATASET, MODEL
    from ..models.pretrained import load_published

    place = ModelSource.parse(source)
    if place.existing_folder is not None and (place.existing_folder / "embeddings.json").is_file():
        return DATASET, publishable(place.existing_folder, repo, license, notes)
    if place.kind != "folder" and source not in zoo.list_encoders() and not place.has_prefix:
        place = ModelSource.folder(source)  # a missing folder, not a repository
    folder = resolve(place.text)
    contents = rewritten(folder, repo, license, notes)
    with tempfile.TemporaryDirectory() as scratch:
        load_published(write_folder(Path(scratch) / "model", contents))
    return MODEL, {**contents}


def _read_notes(path: Path | None) -> str | None:
    from ..hub.card import MOST_NOTES

    if path is None:
        return None
    try:
        with open(path, "rb") as file:  # also a pipe, as of `--notes <(command)`
            text = file.read(MOST_NOTES + 1).decode("utf-8")
        if len(text) > MOST_NOTES:
            raise UsageError(f"--notes {path}: more than {MOST_NOTES:,} characters; expected a Markdown text for a card")
        return text
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--notes {path}: cannot be read as UTF-8 text ({first_line(error)})") from error


def interruptible(work: Callable[[], T]) -> T:
    """Call `work` in a thread, so that Ctrl-C ends the command while the Hub client waits for its own threads."""
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, name=PUSH_THREAD, daemon=True).start()
    return result.result()


def card(
    source: SourceName,
    name: Annotated[str | None, typer.Option(help="Name that the examples load, such as owner/name; unchanged if not given.")] = None,
    out: Annotated[Path | None, path_option(help="Write README.md and its pictures into this folder instead of printing.")] = None,
    write: Annotated[bool, typer.Option("--write", help="Rewrite the card of SOURCE, a folder.")] = False,
    license: License = None,
    notes: Notes = None,
    revision: Revision = None,
) -> None:
    """Print a model card, or rewrite it.

    It is generated from the record of the run and from the results of `rlpjepa eval --card`.
    """
    from ..hub.card import rewritten
    from ..hub.download import resolve
    from ..hub.folder import write_folder

    if write and out is not None:
        raise UsageError("--write and --out: give one of them")
    path = resolve(source, revision)
    contents = rewritten(path, name or card_name(path), license, _read_notes(notes))
    if write:
        print(write_folder(own_folder(source, "--write"), contents) / "README.md")
    elif out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
            for file, content in contents.items():
                if file == "README.md" or file.endswith(".png"):
                    (out / file).write_bytes(content)
        except OSError as error:
            raise OutputError(f"--out {out}: cannot be written: {error.strerror or error}") from error
        print(out / "README.md")
    else:
        print(contents["README.md"].decode(), end="")


def export(
    source: SourceName,
    out: Annotated[Path, path_option(help="File to write: .onnx or .pt2 (torch.export).")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    revision: Revision = None,
    as_json: AsJson = False,
) -> None:
    """Write an encoder or a classifier as one ONNX or torch.export file.

    The file holds all layers; of an encoder it gives z and features, of a classifier logits and probabilities. It is checked to give the same
    numbers before it is moved to OUT.
    """
    from ..models.classifier import Classifier
    from ..models.export import export as run
    from ..models.pretrained import load_published

    model = load_published(source, revision=revision)
    path, config, preprocess = run(model, out, overwrite=overwrite), model.config, model.config.preprocess
    height, width = preprocess.size
    mean, std = (tuple(map(float, values)) for values in (preprocess.mean, preprocess.std))
    both = (
        (("logits", config.dim), ("probabilities", config.dim))
        if isinstance(model, Classifier)
        else (("z", config.dim), ("features", config.features))
    )
    print_values(
        {
            "file": str(path), "bytes": path.stat().st_size,
            "input images": f"float32 (batch, 3, {height}, {width}), RGB in 0..1, resized by {preprocess.interpolation} and cropped to "
            f"{height}x{width} with crop_pct {preprocess.crop_pct:g}, then (x - mean) / std with mean {mean}, std {std}",
            "outputs": ", ".join(f"{name} (batch, {width})" for name, width in both),
        },
        as_json,
    )  # fmt: skip
