"""The folder of embeddings that `rlpjepa embed --out DIR` writes. This module alone knows its names, its manifest and its checks.

    DIR/data/part-000000.parquet ...   rows in input order, see `rlpjepa_zoo.sparse.parquet`; each file complete or absent
    DIR/data/.part-000003.json         in place of a part of which no image can be read, because datasets opens no folder with an empty part
    DIR/embeddings.json                the manifest: what was embedded, by which encoder and how; after the end, totals and sha256 of the parts
    DIR/failed.jsonl                   images that could not be read, and why
    DIR/README.md                      a data set card
    DIR/.lock                          held by the run that writes

Other programs leave files in any folder (`rlpjepa_zoo.core.files.left_behind`); they are not touched and do no harm.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..core import files
from ..errors import DataError, ModelError, first_line
from . import io
from .csr import check_csr, number_array
from .parquet import HEADER

__all__ = [
    "CARD", "FAILED", "MANIFEST", "EncoderRecord", "Manifest", "Options", "Summary", "Totals", "empty_part_path", "is_ours", "is_partial",
    "listed_names", "listed_parts", "part_number", "part_path", "part_paths", "read_manifest", "read_summary", "verified_parts", "write_manifest",
]  # fmt: skip

MANIFEST, FAILED, CARD = "embeddings.json", "failed.jsonl", "README.md"
_PART = re.compile(r"part-(\d{6,12})\.parquet")
_EMPTY = re.compile(r"\.part-(\d{6,12})\.json")
_STEM = re.compile(r"\.?part-\d{6,12}|embeddings|failed|README")
_MOST_BYTES = 1 << 26
"""Largest manifest that is read: that of a billion images has 25 MB."""

Record = TypeVar("Record", bound="_Record")
Count = Annotated[int, Field(ge=0, lt=2**53)]
Positive = Annotated[int, Field(ge=1, lt=2**53)]
Text = Annotated[str, Field(max_length=4096)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=(), populate_by_name=True)


class EncoderRecord(_Record):
    """The encoder. `fingerprint` is that of its weights."""

    source: Text
    revision: Text | None = None
    fingerprint: Text
    architecture: Text
    dim: Annotated[int, Field(ge=1, lt=2**31)]
    preprocess: Text = ""
    dial: dict[Text, int | float | Text] | None = None


class Options(_Record):
    """Options that must not change when a folder is continued."""

    values: Literal["float32", "float16", "uint8"]
    part_rows: Positive
    max_active: Positive | None = None
    min_value: Annotated[float, Field(ge=0)] = 0.0
    precision: Literal["float32", "bf16"] = "float32"
    normalize: bool = False


class MadeWith(_Record):
    """What changes the values by rounding only."""

    batch_size: Positive
    threads: Positive
    versions: dict[Text, Text] = {}


class Totals(_Record):
    """Totals of a finished folder. `reasons` counts why images could not be read, `density` is the fraction of numbers that are not zero."""

    rows: Positive
    skipped: Count
    reasons: dict[str, Positive] = {}
    dim: Annotated[int, Field(ge=1, lt=2**31)]
    density: Annotated[float, Field(ge=0, le=1)]
    bytes: Positive
    dense_bytes: Annotated[int, Field(alias="bytes as dense float32", ge=1, lt=2**90)]
    parts: Positive
    columns: list[Text] = []


class Manifest(_Record):
    """embeddings.json. `input` names the images, `sha256` holds the digest of each part; both it and `result` are None until the end."""

    format: Literal[1] = 1
    model: EncoderRecord
    input: dict[str, Any]
    options: Options
    made_with: MadeWith | None = Field(default=None, alias="made with")
    result: Totals | None = None
    sha256: dict[Annotated[str, Field(pattern=rf"^{_PART.pattern}$")], Digest] | None = None

    def json_text(self) -> str:
        """The file, without what is not known yet."""
        known = {key: value for key, value in self.model_dump(by_alias=True).items() if value is not None}
        return json.dumps(known, indent=1) + "\n"


class Summary(_Record):
    """What a part says of itself. `failed` holds id and reason of the images that could not be read, `model` the encoder's fingerprint."""

    number: Count
    rows: Count
    nnz: Count
    failed: list[Annotated[list[str], Field(min_length=2, max_length=2)]] = []
    model: Text


# --- names ---------------------------------------------------------------------------------------------------------------------------


def part_number(path: Path) -> int | None:
    """Return the number of a part, told by its file name; None for other files."""
    name = _PART.fullmatch(path.name) or _EMPTY.fullmatch(path.name)
    return None if name is None else int(name[1])


def part_path(out: Path, number: int) -> Path:
    return out / "data" / f"part-{number:06d}.parquet"


def empty_part_path(out: Path, number: int) -> Path:
    return out / "data" / f".part-{number:06d}.json"


def part_paths(out: Path) -> list[Path]:
    """Return the parquet files of a folder of embeddings, in input order."""
    paths = [path for path in (out / "data").iterdir() if _PART.fullmatch(path.name)] if (out / "data").is_dir() else []
    return sorted(paths, key=part_number)  # type: ignore[arg-type]


def is_partial(path: Path) -> bool:
    """Whether a killed run left this file half written."""
    name = files.unfinished(path.name)
    return name is not None and _STEM.fullmatch(name) is not None


def is_ours(path: Path, out: Path) -> bool:
    """Whether a file or folder in `out`, or in its data/, is one that embedding writes."""
    if path.parent == out:
        return path.name in ("data", MANIFEST, FAILED, CARD, ".lock") or is_partial(path)
    return part_number(path) is not None or is_partial(path)


# --- manifest ------------------------------------------------------------------------------------------------------------------------


def read_manifest(out: Path) -> Manifest | None:
    """Return embeddings.json of a folder; None if it does not exist.

    Raises:
        DataError: the file is damaged, or of another format.
    """
    path = out / MANIFEST
    if not path.is_file():
        return None
    try:
        with open(path, "rb") as file:
            stored = files.parse_json(file.read(_MOST_BYTES + 1), str(path), _MOST_BYTES)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ModelError as error:
        raise DataError(f"{path}: damaged ({error}); embed into another folder, or add --overwrite") from error
    version = stored.get("format") if isinstance(stored, dict) else None
    if type(version) is int and version > 1:
        raise DataError(f"{path}: format {version}, this version reads 1; update rlpjepa_zoo")
    return _record(Manifest, stored, path, "embed into another folder, or add --overwrite")


def write_manifest(out: Path, manifest: Manifest) -> None:
    """Write embeddings.json completely or not at all."""
    with files.atomic_file(out / MANIFEST) as aside:
        aside.write_text(manifest.json_text(), "utf-8")


def _record(kind: type[Record], stored: Any, path: Path, mend: str) -> Record:
    """Check a record that was read.

    Raises:
        DataError: names the file and the first key that is not as expected.
    """
    try:
        return kind.model_validate(stored)
    except (ValidationError, RecursionError) as error:
        first = error.errors(include_url=False)[0] if isinstance(error, ValidationError) else {"loc": (), "msg": "nested too deep"}
        where = ".".join(str(key)[:40] for key in first["loc"]) or "the whole"
        raise DataError(f"{path}: damaged ({where}: {first['msg'][:200]}); {mend}") from error


# --- parts ---------------------------------------------------------------------------------------------------------------------------


def read_summary(path: Path, sha256: str | None = None) -> Summary:
    """Read a whole part, check it, and return its summary.

    Args:
        path: the part.
        sha256: digest that the file must have.

    Raises:
        DataError: the file is damaged or no part.
    """
    mend = "not a part of embeddings, or a damaged one"
    if path.suffix == ".json":
        try:
            stored = files.parse_json(path.read_bytes()[: _MOST_BYTES + 1], str(path), _MOST_BYTES)
        except (OSError, ModelError) as error:
            raise DataError(f"{path}: {mend} ({first_line(error)})") from error
        rows, nnz = 0, 0
    else:
        arrays = io.read(path, sha256)
        indptr, indices, values = (number_array(name, getattr(arrays, name)) for name in ("indptr", "indices", "values"))
        try:
            check_csr(indptr, indices, values, arrays.dim or 0)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
        rows, nnz = len(indptr) - 1, len(values)
        stored = _stored_summary(path)
    summary = _record(Summary, stored, path, mend)
    if (summary.number, summary.rows, summary.nnz) != (part_number(path), rows, nnz):
        raise DataError(f"{path}: {mend} (it is part {summary.number} with {summary.rows} rows, holds {rows})")
    return summary


def _stored_summary(path: Path) -> dict[str, Any]:
    import pyarrow.parquet as pq

    try:
        with open(path, "rb") as file, pq.ParquetFile(file) as opened:
            header = json.loads((opened.metadata.metadata or {})[HEADER.encode()])
        return {**header["part"], "model": header["meta"]["model"]}
    except Exception as error:
        raise DataError(f"{path}: not a part of embeddings ({first_line(error)})") from error


def listed_parts(out: Path, manifest: Manifest) -> list[tuple[Path, str | None]]:
    """Return the parts of a finished folder and the sha256 that each must have (None in a folder of an earlier version).

    Raises:
        DataError: not finished, or a part is missing or too many.
    """
    paths = part_paths(out)
    if manifest.result is None:
        raise DataError(f"{out}: not finished; run the same `rlpjepa embed` again, or load the parts you want one by one")
    if len(paths) != manifest.result.parts or (manifest.sha256 is not None and manifest.sha256.keys() != {path.name for path in paths}):
        raise DataError(f"{out}: {len(paths)} parts, {manifest.result.parts} were written; run the same `rlpjepa embed` again")
    digests = manifest.sha256 or {}
    return [(path, digests.get(path.name)) for path in paths]


def listed_names(manifest: Manifest, where: str) -> list[str]:
    """Return the names of the parts of a finished folder, as on the Hub.

    Raises:
        DataError: not finished.
    """
    if manifest.result is None:
        raise DataError(f"{where}: not finished; push the finished folder")
    earlier = (part_path(Path(), number).name for number in range(manifest.result.parts))  # a version that did not list them
    return [f"data/{name}" for name in sorted(manifest.sha256 or earlier)]


def verified_parts(out: Path, dim: int | None) -> tuple[int | None, list[tuple[Path, str | None]]]:
    """Return the width and the parquet files of a folder, each with the sha256 that it must have.

    A folder without manifest is any data/*.parquet.

    Args:
        out: the folder.
        dim: width that is expected, if any.

    Raises:
        DataError: another folder, or one that is not finished.
    """
    paths = sorted(path for path in out.glob("data/*.parquet") if not files.left_behind(path.name))
    if not paths:
        raise DataError(f"{out}: no data/*.parquet, so not a folder of embeddings; expected one that `rlpjepa embed --out DIR` wrote")
    manifest = read_manifest(out)
    if manifest is None:
        return dim, [(path, None) for path in paths]
    return manifest.model.dim if dim is None else dim, listed_parts(out, manifest)
