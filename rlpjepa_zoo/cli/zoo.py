"""Commands around the encoders of the zoo: `zoo verify`, `zoo push`, `zoo reproduce`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from ..errors import ModelError, UsageError, ZooError
from .hub import file_sizes, files_to_push, interruptible, print_sizes, send
from .options import AsJson, Overrides, Private, Quiet, Resume, RunFolder, path_option, print_table

T = TypeVar("T")
zoo_app = typer.Typer(help="Check the encoders of the zoo, publish them, or train them again.", no_args_is_help=True, rich_markup_mode=None)

Pattern = Annotated[str, typer.Argument(help="Shell pattern of names.")]
TITLE = "Sparse image encoders"
ABOUT = "Sparse, non-negative image embeddings of a chosen density, on timm backbones. Load one: rlpjepa_zoo.load_encoder('owner/name')"
"""Title and text of the collection; the Hub takes at most 150 characters of text."""


@zoo_app.command()
def verify(
    pattern: Pattern = "*",
    root: Annotated[Path | None, path_option("--folder", help="Check FOLDER/NAME instead of the shipped files.")] = None,
    online: Annotated[bool, typer.Option("--hub", help="Check the pinned commit of the repository on the Hub.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check encoders of the zoo: listed figures, sha256 of every file, golden codes."""
    from ..models.pretrained import verify_entry

    names = _matching(pattern)
    if online and root is not None:
        raise UsageError("--hub and --folder: give one of them")
    checks = {name: partial(verify_entry, name, root, online) for name in names}
    _, failed = _each(checks, None if as_json else lambda folder: "ok")
    if as_json:
        print(json.dumps({name: str(failed.get(name, "ok")) for name in names}, indent=1))
    _raise_first(failed, f"{len(failed)} of {len(names)} encoders do not verify")


@zoo_app.command()
def push(
    owner: Annotated[str, typer.Argument(metavar="OWNER", help="User or organisation on the Hub; an encoder goes to OWNER/NAME.")],
    pattern: Pattern = "*",
    private: Private = None,
    title: Annotated[str | None, typer.Option(help=f"Title of the collection of the encoders; '{TITLE}' if not given.")] = None,
    no_collection: Annotated[bool, typer.Option("--no-collection", help="Make no collection.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print files, sizes and the collection; send nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Publish the shipped encoders of the zoo on the Hugging Face Hub, and a collection of them.

    Verifies all of them first. Each repository gets one commit of the files that differ. If one fails, the others are published nevertheless;
    the same command again sends what is missing. Log in with `hf auth login`, or set HF_TOKEN.
    """
    from ..hub import zoo
    from ..models.pretrained import verify_entry

    if title is not None and no_collection:
        raise UsageError("--title and --no-collection: give one of them")
    if title is not None and not title.strip():
        raise UsageError("--title: expected some text, got none")
    folders = _shipped(owner, pattern)
    _, failed = _each({repo: partial(verify_entry, folder.name, folder.parent) for repo, folder in folders.items()})
    _raise_first(failed, f"{len(failed)} of {len(folders)} encoders do not verify, so nothing was sent")
    about = None if no_collection else {"title": title or TITLE, "description": ABOUT}
    notes = {repo: zoo.summary(folder.name) for repo, folder in folders.items()}
    if dry_run:
        files = {repo: file_sizes(files_to_push(str(folder), repo)[1]) for repo, folder in folders.items()}
        _show_plan(files, about and {"owner": owner, **about, "notes": notes}, as_json)
        return

    def publish(repo: str) -> dict[str, Any]:
        kind, contents = files_to_push(str(folders[repo]), repo)
        return send(contents, repo, kind=kind, private=private)

    pushed, failed = _each({repo: partial(publish, repo) for repo in folders}, None if as_json else _changes)
    collected, unmade = dict[str, str](), dict[str, ZooError]()
    if pushed and about:
        collect = partial(zoo.collect, owner, {repo: notes[repo] for repo in pushed}, private=private, **about)
        collected, unmade = _each({"collection": partial(interruptible, collect)}, None if as_json else str)
    if as_json:
        errors = {name: str(error) for name, error in (failed | unmade).items()}
        print(json.dumps({"repositories": pushed, **collected, "errors": errors}, indent=1))
    _raise_first(failed, f"{len(failed)} of {len(folders)} encoders were not published")
    _raise_first(unmade, "the encoders were published without their collection")


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


def _matching(pattern: str) -> list[str]:
    """Return the names of the zoo that match.

    Raises:
        UsageError: there are none.
    """
    from ..hub import zoo

    names = zoo.list_encoders(pattern)
    if not names:
        raise UsageError(f"'{pattern}': no encoder of the zoo matches; see rlpjepa list")
    return names


def _shipped(owner: str, pattern: str) -> dict[str, Path]:
    """Return the shipped folders of the encoders that match, by the repository of the owner.

    Raises:
        UsageError: there are none, or the owner cannot have such repositories.
    """
    from ..core.source import is_repository
    from ..hub import zoo

    folders = {f"{owner}/{name}": folder for name in _matching(pattern) if (folder := zoo.local_folder(name)) is not None}
    if not folders:
        raise UsageError(f"'{pattern}': these encoders do not ship with this package, so they cannot be published from here")
    if not all(map(is_repository, folders)):
        raise UsageError(f"OWNER: expected a user or an organisation on the Hub, got '{owner}'")
    return folders


def _each(steps: Mapping[str, Callable[[], T]], show: Callable[[T], str] | None = None) -> tuple[dict[str, T], dict[str, ZooError]]:
    """Take every step, also after one has failed.

    Args:
        steps: by name.
        show: text of a result; a line is printed after each step. None prints nothing.

    Returns:
        Results and errors, by name.
    """
    done, failed = dict[str, T](), dict[str, ZooError]()
    for name, step in steps.items():
        try:
            done[name] = step()
        except ZooError as error:
            failed[name] = error
        if show is not None:
            print(f"{name}: {failed[name] if name in failed else show(done[name])}", flush=True)
    return done, failed


def _raise_first(failed: Mapping[str, ZooError], what: str) -> None:
    """Raise one error of the class of the first, if there is any."""
    for first in failed.values():
        raise type(first)(f"{what}; the first: {first}")


def _changes(pushed: dict[str, Any]) -> str:
    return f"{pushed['url']} ({', '.join(pushed['changed']) or 'nothing changed, so nothing was sent'})"


def _show_plan(files: dict[str, dict[str, int]], collection: dict[str, Any] | None, as_json: bool) -> None:
    """Print what a push would send: files and sizes by repository, and the collection."""
    in_all = sum(sum(sizes.values()) for sizes in files.values())
    if as_json:
        print(json.dumps({"repositories": files, "bytes": in_all, "collection": collection}, indent=1))
        return
    for repo, sizes in files.items():
        print_sizes(sizes, f"bytes, to {repo}\n")
    if collection is not None:
        print(f"Collection of {collection['owner']}: {collection['title']}\n{collection['description']}")
        print("\n".join(f"{repo}: {note}" for repo, note in collection["notes"].items()) + "\n")
    print(f"{in_all:>12,}  bytes in all, to {len(files)} {'repository' if len(files) == 1 else 'repositories'}; nothing was sent")
