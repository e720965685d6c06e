"""Commands that embed images, or change how sparse the embeddings are: `embed`, `dial`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import DataError, OutputError, UsageError
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
    Overwrite,
    Quiet,
    Revision,
    SkipBad,
    SourceName,
    Workers,
    check_file,
    choose_device,
    list_failures,
    path_option,
    print_values,
)

if TYPE_CHECKING:
    from ..data.images import ImageRows
    from ..embedding.extract import Extraction
    from ..models.encoder import SparseEncoder

SUFFIXES = (".safetensors", ".npz", ".parquet")
OTHER_FILES = {
    ".csv", ".tsv", ".txt", ".json", ".jsonl", ".npy", ".pt", ".pth", ".pkl", ".pickle", ".h5", ".hdf5", ".arrow", ".feather", ".zip", ".tar", ".gz",
    ".db", ".sqlite", ".mat", ".xlsx", ".bin", ".onnx", ".zarr", ".lance",
}  # fmt: skip
"""Endings that ask for a file, in a format that is not written. Any other name is that of a folder: emb-v1.0, test_resnet.digits."""


def embed(
    source: SourceName,
    images: ImagesToRead,
    out: Annotated[
        Path, path_option(help="File to write (.safetensors, .npz, .parquet), or a folder of parquet files to start or to continue.")
    ],
    batch_size: BatchSize = None,
    num_workers: Workers = 4,
    max_active: Annotated[int | None, typer.Option(min=1, help="Keep at most this many largest values of each image.")] = None,
    min_value: Annotated[float, typer.Option(help="Leave out values below this.")] = 0.0,
    normalize: Annotated[bool, typer.Option("--normalize", help="Rows of length one (L2), so that inner products are cosines.")] = False,
    values: Annotated[str, typer.Option(help="float32 (exact), float16, or uint8 (with one scale per image).")] = "float32",
    precision: Annotated[str, typer.Option(help="float32, or bf16: faster on many processors, with its rounding error.")] = "float32",
    part_rows: Annotated[
        int, typer.Option(min=1, help="Folder: images per file. If the process is killed, at most this many are lost.")
    ] = 4096,
    columns: Annotated[
        str,
        typer.Option(help="Further columns to copy, such as a,b; for tar files suffixes such as json. The class label is always copied."),
    ] = "",
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
    """Write sparse embeddings of images to a file or a folder; a folder also under `accelerate launch -m rlpjepa_zoo embed ...` and torchrun.

    A folder is written in parts. After a stop, the same command continues.
    """
    from ..core import distributed
    from ..data.sources import open_images
    from ..embedding.extract import Extraction, extract
    from ..embedding.manifest import provenance
    from ..models.inference import OutputOptions
    from ..models.pretrained import load_encoder

    to_file = out.suffix.lower() in SUFFIXES and not os.path.isdir(out)
    if out.suffix.lower() in OTHER_FILES and not os.path.isdir(out):
        raise UsageError(f"--out {out}: expected a file ending in .safetensors, .npz or .parquet, or a folder")
    how = Extraction(values, part_rows, OutputOptions(max_active, min_value, precision, normalize), batch_size, num_workers, skip_bad)  # type: ignore[arg-type]
    _check_out(out, to_file, overwrite)
    feed = open_images(
        images,
        split=split,
        columns=[c for c in columns.split(",") if c],
        id_column=id_column,
        image_column=image_column,
        revision=data_revision,
        allow_paths=allow_paths,
        prefix="--",
        on_error="skip" if skip_bad else "raise",
    )
    try:
        distributed.start()
        encoder = load_encoder(source, revision=revision, device=choose_device(device))
        if to_file:
            result = _embed_to_file(encoder, feed, out, how, not quiet)
        else:
            model = provenance(encoder, source, revision)
            totals = extract(encoder, feed, out, how, model=model, overwrite=overwrite, progress=not quiet)
            result = {"folder": str(out), **totals, "model": encoder.fingerprint()}
            if not as_json:
                result["reasons"] = "; ".join(f"{n} x {reason}" for reason, n in result["reasons"].items()) or "-"
        if distributed.rank() == 0:
            print_values(result, as_json)
    finally:
        distributed.shut_down()


def _check_out(out: Path, to_file: bool, overwrite: bool) -> None:
    """Refuse an --out that cannot be written, before anything is loaded."""
    if not to_file:
        if not os.path.isdir(out.parent):
            raise OutputError(f"--out {out}: no folder {out.parent}")
        return
    check_file("--out", out, overwrite)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UsageError(f"--out {out}: several processes write a folder, not a file; give --out DIR")


def _embed_to_file(encoder: SparseEncoder, feed: ImageRows, out: Path, how: Extraction, progress: bool) -> dict[str, Any]:
    """Embed into one file. All embeddings are in memory until it is written."""
    from ..embedding.parts import with_arrow_ids
    from ..sparse.columns import check_names

    check_names(feed.columns)
    failures: list[tuple[Any, str]] = []
    embeddings = encoder.embed(
        feed, how.batch_size, how.num_workers, how.budget.max_active, progress, "skip" if how.skip_bad else "raise", failures,
        min_value=how.budget.min_value, precision=how.budget.precision, normalize=how.budget.normalize,  # type: ignore[arg-type]
    )  # fmt: skip
    if failures and not len(embeddings):
        raise DataError(f"none of the {len(failures)} images can be read; the first: {failures[0][1]}")
    if out.suffix.lower() == ".parquet":
        embeddings = with_arrow_ids(embeddings)
    embeddings.save(out, values=how.values)
    n, dim = embeddings.shape
    list_failures(out, failures, n)
    return {
        "file": str(out), "images": n, "skipped": len(failures), "dim": dim, "density": embeddings.l0, "bytes": out.stat().st_size,
        "bytes as dense float32": 4 * n * dim, "model": embeddings.meta["model"],
    }  # fmt: skip


def dial(
    source: SourceName,
    out: Annotated[Path, path_option(help="Folder for the encoder with the other density.")],
    density: Annotated[float | None, typer.Option(help="Fraction of active dimensions to reach.")] = None,
    budget: Annotated[int | None, typer.Option(min=1, help="Or: largest number of active dimensions.")] = None,
    mode: Annotated[
        str,
        typer.Option(
            help="top_k keeps the largest values of each image; threshold keeps values above one number; shift lowers or raises all biases of "
            "the last layer by one number."
        ),
    ] = "top_k",
    images: Annotated[
        str | None, typer.Option(help="Images to calibrate a threshold or shift on: a folder, files, ... as for embed.")
    ] = None,
    image_column: ImageColumn = None,
    allow_paths: AllowPaths = False,
    num_workers: Workers = 4,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Calibrate without images that cannot be read.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the encoder in OUT.")] = False,
    revision: Revision = None,
    device: Device = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Give a trained encoder another density without training, and save it. Only a shift can raise the density."""
    from ..core.source import ModelSource
    from ..data.sources import open_images
    from ..embedding.parts import arrow_text
    from ..models.pretrained import load_encoder

    if (density is None) == (budget is None):
        raise UsageError("--density and --budget: give one of them")
    if budget is not None and (mode != "top_k" or images is not None):
        raise UsageError("--budget keeps the largest values of any image; --mode and --images belong to --density")
    if os.path.lexists(out) and not overwrite:
        raise UsageError(f"--out {out}: exists; choose another folder, or add --overwrite")
    encoder = load_encoder(source, revision=revision, device=choose_device(device))
    if budget is not None:
        sparser = encoder.with_budget(budget)
    else:
        options: dict[str, Any] = {"num_workers": num_workers, "progress": not quiet, "on_error": "skip" if skip_bad else "raise"}
        feed = None
        if images is not None:
            feed = open_images(
                images, image_column=image_column, allow_paths=allow_paths, prefix="--", on_error="skip" if skip_bad else "raise"
            )
        sparser = encoder.with_density(density or 0.0, mode, feed, **options)  # type: ignore[arg-type]
    sparser.save_pretrained(out, name=arrow_text(ModelSource.folder(out).text))
    setting = sparser.config.dial
    description = f"biases shifted for a density of {density:g}" if setting is None else setting.describe(sparser.config.dim)
    print_values({"encoder": str(out), "dial": description, "model": sparser.fingerprint()}, as_json)
