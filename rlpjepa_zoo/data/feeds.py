"""Images in a fixed order, read from any row on, however many there are: what `embed` takes.

Folders, lists of files, parquet files, tar files of WebDataset, Hugging Face data sets, local or streamed from the Hub. Nothing is kept but names.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from ..core import source as source_names
from ..errors import DataError, HubError, UsageError, first_line
from ..hub import download as hub
from ..hub import retry
from . import images

__all__ = ["Feed", "Row", "named", "open_feed", "spans"]

log = logging.getLogger("rlpjepa_zoo")

_RESERVED = ("id", "indices", "values", "scale")
"""Columns of the embeddings themselves."""
_TARS = (".tar", ".tar.gz", ".tgz")
_MOST_BYTES = 1 << 28
"""Of one member of a tar file that is read as an image."""
_ROWS = 256
"""Of a parquet file, that are in memory at a time."""


class Row(NamedTuple):
    """One image: its id, how to get it (from any thread; DataError when it cannot be read), and what is passed along."""

    id: str | int
    read: Callable[[], Image.Image]
    columns: dict[str, Any]


@dataclass(frozen=True)
class Feed:
    """Rows in a fixed order.

    Attributes:
        rows: from a row number to an iterator over all rows from there on.
        length: number of rows; None when it is not known beforehand.
        expected: number of rows, for a progress bar only, where somebody says so and may be wrong.
        identity: JSON-able; differs when other images are meant. Names and sizes are compared, not every pixel.
        columns: what is passed along: name to the feature as a Hugging Face data set describes it.
        seekable: `rows(n)` costs no more than `rows(0)`.
    """

    rows: Callable[[int], Iterator[Row]]
    length: int | None
    identity: dict[str, Any]
    columns: dict[str, dict[str, Any]] = field(default_factory=dict)
    seekable: bool = False
    expected: int | None = None


def named(name: str | int, reason: str) -> str:
    """Why an image cannot be read, with its id."""
    return reason if str(name) in reason else f"{name}: {reason}"


def spans(feed: Feed, size: int, wanted: Callable[[int], bool]) -> Iterator[tuple[int, Iterator[Row]]]:
    """Cut a feed into spans of `size` rows (the last may be shorter) and give the wanted ones, by number, each with its rows.

    The rows of a span are to be used up before the next is asked for. A feed that cannot seek is read once, through all that lies between;
    of one without a length, one empty span ends it.
    """
    rows: Iterator[Row] | None = None
    at = 0
    for k in itertools.count():
        start = k * size
        if feed.length is not None and start >= feed.length:
            return
        if not wanted(k):
            continue
        if rows is None or feed.seekable:
            rows, at = feed.rows(start), start
        for _ in itertools.islice(rows, start - at):
            pass
        given = 0

        def counted(rows: Iterator[Row] = rows) -> Iterator[Row]:
            nonlocal given
            for row in itertools.islice(rows, size):
                given += 1
                yield row

        yield k, counted()
        at = start + given
        if given < size:
            return


def open_feed(
    source: Any, *, split: str | None = None, columns: Sequence[str] = (), id_column: str | None = None, image_column: str | None = None,
    revision: str | None = None,
) -> Feed:  # fmt: skip
    """Rows of a folder (or several), files, a list of files (.txt), parquet or tar files, a Hugging Face data set, its id on the Hub (streamed), or
    anything that `rlpjepa_zoo.data.images.open_images` takes.

    Args:
        source: where the images are; a path that exists is taken for that, else ``owner/name`` is looked for on the Hub.
        split: of a data set on the Hub; train when None.
        columns: passed along beside the class label, of parquet files and data sets; of tar files, suffixes of text members (json, txt).
        id_column: its values are the ids, instead of row numbers.
        image_column: the first that holds images when None.
        revision: of a data set on the Hub; what it stands for is looked up and pinned.

    Raises:
        DataError: nothing there, or not what it should be.
        UsageError: options that this source has no use for.
        HubError: the Hub refused or cannot be reached.
    """
    asked = _Asked(tuple(columns), id_column, image_column)
    names = [str(item) for item in source] if isinstance(source, list | tuple) and all(isinstance(s, str | Path) for s in source) else None
    if isinstance(source, str | Path):
        names = [str(source)]
    if names is not None:
        return _of_names(names, asked, split, revision)
    if type(source).__module__.split(".")[0] == "datasets" and hasattr(source, "features"):
        return _of_dataset(source, asked)
    asked.refuse("images in memory")
    return _of_images(images.open_images(source), {"images": "in memory"})


class _Asked(NamedTuple):
    columns: tuple[str, ...]
    id: str | None
    image: str | None

    def refuse(self, what: str) -> None:
        if self.columns or self.id or self.image:
            raise UsageError(f"columns: {what} have none; leave the options for columns out")


def _of_names(names: list[str], asked: _Asked, split: str | None, revision: str | None) -> Feed:
    paths = [Path(name).expanduser() for name in names]
    if len(names) == 1 and not paths[0].exists() and source_names.is_repository(names[0]):
        return _of_hub(names[0], asked, split or "train", revision)
    for what, given in (("revision", revision), ("split", split)):
        if given is not None:
            raise UsageError(f"'{names[0]}' is not a data set on the Hub, so it has no {what}; leave it out")
    if missing := [name for name, path in zip(names, paths, strict=True) if not path.exists()]:
        raise DataError(f"{missing[0]}: no such file or folder" + (f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""))
    if len(paths) == 1 and paths[0].suffix == ".txt":
        asked.refuse("lists of files")
        return _of_images(images.open_images(_listed(paths[0])), _files_identity(_listed(paths[0])))
    files = [file for path in paths for file in (_inside(path) if path.is_dir() else [path])]
    kinds = {"parquet" if f.suffix == ".parquet" else "tar" if _is_tar(f) else "image" for f in files}
    if len(kinds) > 1:
        raise DataError(f"{names[0]}: parquet files, tar files and images are not embedded together; name those of one kind")
    if kinds == {"parquet"}:
        return _of_parquet(files, asked)
    if kinds == {"tar"}:
        return _of_tars(files, asked)
    asked.refuse("image files")
    if len(paths) == 1 and paths[0].is_dir():
        return _of_folder(paths[0], files)
    if sum(path.is_dir() for path in paths):  # ids as they would be given one by one
        files = [file for path in paths for file in (images.list_images(path) if path.is_dir() else [path])]
    return _of_images(images.open_images(files), _files_identity(files))


def _inside(folder: Path) -> list[Path]:
    """The images of a folder; of one without images, its parquet or tar files."""
    others = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".") and (p.suffix == ".parquet" or _is_tar(p)))
    try:
        found = images.list_images(folder)
    except DataError:
        kept = [p for p in others if p.suffix == ".parquet"] or others
        if not kept:
            raise
        return kept
    if others:
        log.warning(
            "%s: %d images are taken; %d parquet or tar files beside them are not: name those to embed them",
            folder,
            len(found),
            len(others),
        )
    return found


def _is_tar(path: Path) -> bool:
    return path.name.lower().endswith(_TARS)


def _listed(path: Path) -> list[Path]:
    try:
        found = [Path(line) for line in path.read_text("utf-8", "surrogateescape").splitlines() if line.strip()]
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    if not found:
        raise DataError(f"{path}: lists no files; expected one path in each line")
    return found


def _files_identity(files: Iterable[Path], root: Path | None = None) -> dict[str, Any]:
    """Number and sizes of files, and a hash of their names and sizes."""
    digest, n, total = hashlib.sha256(), 0, 0
    for file in files:
        size = file.stat().st_size
        name = os.fsencode(file.relative_to(root) if root else file)
        digest.update(b"%d %b\0" % (size, name))
        n, total = n + 1, total + size
    return {"files": n, "bytes": total, "sha256 of names and sizes": digest.hexdigest()}


# --- one by one -----------------------------------------------------------------------------------------------------------------------


def _of_images(opened: images.Images, identity: dict[str, Any]) -> Feed:
    labelled = opened.labels is not None

    def rows(start: int) -> Iterator[Row]:
        for i in range(start, len(opened)):
            label = {"label": int(opened.labels[i])} if opened.labels is not None else {}
            yield Row(opened.ids[i], partial(opened.read, i), label)

    columns = {"label": _label(opened.classes)} if labelled else {}
    return Feed(rows, len(opened), {**identity, "rows": len(opened)}, columns, seekable=True)


def _label(classes: Sequence[str] | None) -> dict[str, Any]:
    return {"names": list(classes), "_type": "ClassLabel"} if classes else {"dtype": "int64", "_type": "Value"}


def _of_folder(root: Path, files: list[Path]) -> Feed:
    """Ids are paths below the folder; when all images lie in several sub-folders, those are the classes."""
    ids = [file.relative_to(root).as_posix() for file in files]
    identity = {"folder": root.resolve().name, **_files_identity(files, root)}
    tops = {name.partition("/")[0] if "/" in name else None for name in ids}
    classes = sorted(top for top in tops if top is not None) if None not in tops and len(tops) > 1 else []
    number = {name: k for k, name in enumerate(classes)}
    labels = [number[name.partition("/")[0]] for name in ids] if classes else None
    return _of_images(images.Images(partial(_below, root, ids), ids, labels, classes or None), identity)


def _below(root: Path, names: Sequence[str], i: int) -> Path:
    return root / names[i]


# --- parquet and data sets ------------------------------------------------------------------------------------------------------------


def _kept(features: Any, asked: _Asked) -> tuple[str, list[str]]:
    """The image column and those passed along: the class label, and what was asked for."""
    image, label = images.image_column(features, asked.image), images.label_column(features)
    for name in (*asked.columns, *([asked.id] if asked.id else [])):
        if name not in features:
            raise DataError(f"no column '{name}'; the data set has {', '.join(features)}")
    for name in asked.columns:
        if name in _RESERVED:
            raise UsageError(f"columns: '{name}' is a name of the embeddings themselves; use it as the id column, or rename it")
        if type(features[name]).__name__ in ("Image", "Audio", "Video"):
            raise UsageError(
                f"columns: '{name}' holds {type(features[name]).__name__.lower()}s, which are not passed along; name columns of text or numbers"
            )
    return image, list(dict.fromkeys([*([label] if label else []), *asked.columns]))


def _cell_row(name: str | int, value: Any, columns: dict[str, Any]) -> Row:
    return Row(name, partial(_read_cell, value, f"row {name}" if isinstance(name, int) else name), columns)


def _read_cell(value: Any, name: str) -> Image.Image:
    try:
        return images.decode(images.cell(value), name)
    except DataError as error:
        raise error if str(error).startswith(name) else DataError(f"{name}: {error}") from error


def _described(features: Any, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    import datasets

    return {name: datasets.Features({name: features[name]}).to_dict()[name] for name in names}


def _record(record: dict[str, Any], at: int, image: str, kept: Sequence[str], asked: _Asked) -> Row:
    name = record[asked.id] if asked.id else at
    if not isinstance(name, str | int) or isinstance(name, bool):
        raise DataError(f"row {at}: column '{asked.id}' is to hold ids, but there is {name!r}; expected text or an integer")
    return _cell_row(name, record[image], {k: record[k] for k in kept})


def _of_dataset(dataset: Any, asked: _Asked, identity: dict[str, Any] | None = None, total: int | None = None) -> Feed:
    if dataset.features is None:
        raise DataError("the stream does not tell its columns; give parquet files, or a data set that is not streamed")
    image, kept = _kept(dataset.features, asked)
    wanted = list(dict.fromkeys([image, *kept, *([asked.id] if asked.id else [])]))
    raw = images.undecoded(dataset.select_columns(wanted).with_format(None), image)
    whole = hasattr(dataset, "__len__")

    def rows(start: int) -> Iterator[Row]:
        if whole:
            source: Iterable[dict[str, Any]] = (raw[i] for i in range(start, len(raw)))
        else:
            source = raw.skip(start) if start else raw
        try:
            for at, record in enumerate(source, start):
                yield _record(record, at, image, kept, asked)
        except DataError:
            raise
        except Exception as error:  # a file cut short, the network, ...
            raise retry.trouble(error, "data") or DataError(f"data: {first_line(error)}") from error

    length = len(dataset) if whole else None
    identity = identity or {"dataset": getattr(dataset, "_fingerprint", None) or str(dataset.features)}
    identity |= {"rows": length, **_chosen(image, kept, asked)}
    return Feed(rows, length, identity, _described(dataset.features, kept), seekable=whole, expected=total)


def _chosen(image: str, kept: Sequence[str], asked: _Asked) -> dict[str, Any]:
    """Of an identity: the columns that are read."""
    return {"image column": image, "id column": asked.id, "columns": list(kept)}


def _of_hub(name: str, asked: _Asked, split: str, revision: str | None) -> Feed:
    import datasets

    level = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity_error()
    try:
        commit = hub.dataset_commit(name, revision)
        stream = datasets.load_dataset(name, split=split, revision=commit, streaming=True)
        known = (stream.info.splits or {}).get(split)
        total = known.num_examples if known is not None and known.num_examples else None
    except (DataError, HubError):
        raise
    except Exception as error:
        raise retry.trouble(error, f"data: {name}") or DataError(f"data: '{name}': {first_line(error)}") from error
    finally:
        datasets.logging.set_verbosity(level)
    return _of_dataset(stream, asked, {"dataset": name, "revision": commit, "split": split}, total)


def _of_parquet(files: list[Path], asked: _Asked) -> Feed:
    """Read a few rows at a time, so that memory does not grow with the files."""
    with _opened(files[0]) as first:
        features = _columns(first.schema_arrow)
    image, kept = _kept(features, asked)
    wanted = list(dict.fromkeys([image, *kept, *([asked.id] if asked.id else [])]))
    counts = []
    for file in files:
        with _opened(file) as one:
            here = _columns(one.schema_arrow)
            counts.append(one.metadata.num_rows)
        for name in wanted:
            if name not in here:
                raise DataError(f"{file}: no column '{name}', which {files[0]} has")
            if here[name] != features[name]:
                raise DataError(
                    f"{file}: column '{name}' is {here[name]}, in {files[0]} it is {features[name]}; embed them into two folders"
                )

    def rows(start: int) -> Iterator[Row]:
        at = 0
        for file, count in zip(files, counts, strict=True):
            if at + count > start:
                for number, record in enumerate(_records(file, max(0, start - at), wanted), max(at, start)):
                    yield _record(record, number, image, kept, asked)
            at += count

    identity = {**_files_identity(files, _common(files)), "rows": sum(counts), **_chosen(image, kept, asked)}
    return Feed(rows, sum(counts), identity, _described(features, kept))


def _opened(path: Path) -> Any:
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path, memory_map=False, buffer_size=1 << 20, pre_buffer=False)
    except Exception as error:
        raise DataError(f"{path}: cannot be read as parquet ({first_line(error)})") from error


def _columns(schema: Any) -> Any:
    """Columns as a Hugging Face data set describes them, less those of types that it does not know."""
    import datasets
    import pyarrow as pa

    known = [column for column in schema if not pa.types.is_map(column.type)]
    return datasets.Features.from_arrow_schema(pa.schema(known, metadata=schema.metadata))


def _records(file: Path, start: int, wanted: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Rows of a parquet file from one on; row groups before it are not read."""
    with _opened(file) as one:
        at, group = 0, 0
        while group < one.metadata.num_row_groups and at + one.metadata.row_group(group).num_rows <= start:
            at += one.metadata.row_group(group).num_rows
            group += 1
        batches = one.iter_batches(_ROWS, row_groups=list(range(group, one.metadata.num_row_groups)), columns=list(wanted))
        while True:
            try:
                batch = next(batches, None)
                records = [] if batch is None else batch.slice(min(max(start - at, 0), batch.num_rows)).to_pylist()
            except (OSError, ValueError) as error:  # damaged pages, text that is not UTF-8
                raise DataError(f"{file}: row {at} or one after it cannot be read ({first_line(error)})") from error
            if batch is None:
                return
            at += batch.num_rows
            yield from records


def _common(files: Sequence[Path]) -> Path:
    return Path(os.path.commonpath([file.parent for file in files]))


# --- tar files ------------------------------------------------------------------------------------------------------------------------


def _of_tars(files: list[Path], asked: _Asked) -> Feed:
    """WebDataset: members of one sample follow each other and share their name up to its first dot. Nothing is ever written to disk.

    What is passed along, and whether a class is a number or text, is told by the first sample; other samples may lack it.
    """
    if asked.id or asked.image:
        raise UsageError(
            "columns: tar files have members, not columns; name passed-along ones by suffix (json, txt) with the option for columns"
        )
    first = next(_samples(files[0]), ("", {}))[1]
    suffixes = [suffix.lower().removeprefix(".") for suffix in asked.columns]
    for suffix in suffixes:
        if suffix in (*_RESERVED, "label"):
            raise UsageError(f"columns: '{suffix}' is a name of the embeddings themselves; rename the members")
        if suffix not in first:
            raise DataError(f"{files[0]}: the first sample has no member '.{suffix}'; it has {', '.join(first) or 'none'}")
    text = first.get("cls")
    numbers = isinstance(text, bytes) and text.strip().lstrip(b"-").isdigit()
    label = None if text is None else _label(None) if numbers else {"dtype": "string", "_type": "Value"}
    root = _common(files)

    def rows(start: int) -> Iterator[Row]:
        at = 0
        for file in files:
            place = file.relative_to(root).as_posix()
            for key, members in _samples(file):
                if at >= start:
                    name = f"{place[: place.lower().rindex('.t')]}/{key}" if len(files) > 1 else key
                    yield _sample_row(name, members, label, suffixes)
                at += 1

    columns = {} if label is None else {"label": label}
    columns |= {suffix: {"dtype": "string", "_type": "Value"} for suffix in suffixes}
    plain = all(file.suffix.lower() == ".tar" for file in files)  # whose headers are found without reading what lies between
    length = sum(1 for file in files for _ in _samples(file, contents=False)) if plain else None
    return Feed(rows, length, {**_files_identity(files, root), "rows": length, "columns": list(columns)}, columns)


def _samples(file: Path, contents: bool = True) -> Iterator[tuple[str, dict[str, bytes | DataError]]]:
    """Key and members by suffix (empty ones without `contents`), of each sample that has an image."""
    key, members = "", dict[str, bytes | DataError]()
    try:
        with tarfile.open(file) as archive:
            for member in archive:
                folder, _, name = member.name.rpartition("/")
                stem, dot, suffix = name.partition(".")
                if not member.isfile() or not stem or not dot:
                    continue
                stem = f"{folder}/{stem}" if folder else stem
                if stem != key:
                    if _image_of(members) is not None:
                        yield key, members
                    key, members = stem, {}
                suffix = suffix.lower()
                if suffix in members or (_is_image(suffix) and _image_of(members) is not None):
                    raise DataError(
                        f"{file}: '{member.name}' belongs to the sample '{key}', which has an image already: WebDataset cuts names at their first dot; "
                        "rename the members, or unpack the archive and embed the folder"
                    )
                if member.size > _MOST_BYTES:
                    members[suffix] = DataError(f"{member.size} bytes, the limit is {_MOST_BYTES}")
                else:
                    opened = archive.extractfile(member) if contents else None
                    members[suffix] = opened.read() if opened is not None else b""
                archive.members = []  # type: ignore[attr-defined]  # else the archive remembers every one
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{file}: cannot be read as a tar file after '{key}' ({first_line(error)})") from error
    if _image_of(members) is not None:
        yield key, members


def _is_image(suffix: str) -> bool:
    return f".{suffix.rpartition('.')[2]}" in images.SUFFIXES


def _image_of(members: dict[str, bytes | DataError]) -> str | None:
    return next((suffix for suffix in members if _is_image(suffix)), None)


def _sample_row(key: str, members: dict[str, bytes | DataError], label: dict[str, Any] | None, suffixes: Sequence[str]) -> Row:
    columns = {suffix: _text(members.get(suffix)) for suffix in suffixes}
    if label is not None:
        text = _text(members.get("cls"))
        try:
            columns["label"] = text if text is None or label.get("dtype") == "string" else int(text)
        except ValueError as error:
            raise DataError(f"{key}.cls: expected a class number, as in the first sample, got {str(text)[:40]!r}") from error
    content = members[_image_of(members) or ""]
    return Row(key, partial(_read_member, content, key), columns)


def _text(member: bytes | DataError | None) -> Any:
    return member.decode("utf-8", "replace").strip() if isinstance(member, bytes) else None


def _read_member(content: bytes | DataError, name: str) -> Image.Image:
    if isinstance(content, DataError):
        raise DataError(f"{name}: {content}")
    return images.decode(content, name)
