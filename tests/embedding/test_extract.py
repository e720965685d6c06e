"""Embedding into a folder: complete, in input order, without duplicates, after any interruption and with any number of processes."""

import errno
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from images import write_two_classes
from models import settled
from outputs import contents
from PIL import Image
from processes import run_ranks
from refusals import refused
from rows import N as FEW
from rows import samples, table, tar

import rlpjepa_zoo as rz
from rlpjepa_zoo.core import files
from rlpjepa_zoo.data.sources import open_images
from rlpjepa_zoo.embedding.extract import Extraction, extract
from rlpjepa_zoo.embedding.manifest import provenance
from rlpjepa_zoo.errors import DataError, NonFiniteError, OutputError, StoppedBySignal, UsageError
from rlpjepa_zoo.models.inference import OutputOptions
from rlpjepa_zoo.sparse.embeddings import SparseEmbeddings

N = 30
HOW = Extraction(part_rows=7, batch_size=3, num_workers=2)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_two_classes(tmp_path / "photos", N, widths=3)


def test_rows_equal_embed_in_input_order(photos: Path, tmp_path: Path) -> None:
    enc = settled()
    totals = extract(enc, open_images(photos), tmp_path / "out", HOW)
    e, expected = SparseEmbeddings.load(tmp_path / "out"), enc.embed(photos)
    assert e.ids.tolist() == expected.ids.tolist() == sorted(expected.ids.tolist()) and len(e) == N
    np.testing.assert_allclose(e.to_dense(), expected.to_dense(), rtol=1e-4, atol=1e-5)
    assert totals["rows"] == N and totals["skipped"] == 0 and totals["parts"] == 5 and totals["density"] == pytest.approx(e.l0)
    assert totals["bytes"] == sum(p.stat().st_size for p in (tmp_path / "out/data").iterdir())
    assert json.loads((tmp_path / "out/embeddings.json").read_text())["result"] == totals
    assert enc.training


def test_folder_opens_in_datasets_pandas_polars_and_scipy(photos: Path, tmp_path: Path) -> None:
    import datasets
    import pandas
    import polars

    enc = settled()
    for values in ("float32", "float16", "uint8"):
        out = tmp_path / values
        extract(enc, open_images(photos), out, Extraction(values, 7, batch_size=3))
        e = SparseEmbeddings.load(out)
        rows = datasets.load_dataset(str(out), split="train", cache_dir=str(tmp_path / "cache"))
        assert rows.features["label"].names == ["blue", "red"] and rows["id"][:] == e.ids.tolist()
        frames = [pandas.read_parquet(out / "data"), polars.read_parquet(out / "data/*.parquet").to_pandas()]
        for frame in [rows.with_format("numpy")[:], *frames]:
            assert [("blue", "red")[k] for k in frame["label"]] == [name.split("/")[0] for name in e.ids.tolist()]
            assert np.concatenate([np.asarray(x) for x in frame["indices"]]).tolist() == e.indices.tolist()
            stored = [np.asarray(x, np.float32) for x in frame["values"]]
            scaled = [x * s for x, s in zip(stored, frame["scale"], strict=True)] if values == "uint8" else stored
            np.testing.assert_array_equal(np.concatenate(scaled).astype(np.float32), e.values)
        assert e.to_scipy().shape == (N, 24) and e.to_scipy().nnz == e.nnz
    exact = SparseEmbeddings.load(tmp_path / "float32")
    np.testing.assert_array_equal(SparseEmbeddings.load(tmp_path / "float16").values, exact.values.astype(np.float16).astype(np.float32))
    small = SparseEmbeddings.load(tmp_path / "uint8")
    np.testing.assert_array_equal(small.indices, exact.indices)
    largest = np.repeat(exact.to_dense().max(1), np.diff(exact.indptr))
    assert (np.abs(small.values - exact.values) <= np.maximum(largest / 509, 0) + (exact.values < largest / 255) * largest / 255).all()


@pytest.mark.parametrize("kind", ["parquet", "tar", "hf", "stream"])
def test_every_source_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    enc = settled()
    expected = enc.embed([Image.open(__import__("io").BytesIO(cell["bytes"])) for cell in raw()]).to_dense()
    sources = {"parquet": tmp_path / "t.parquet", "hf": table(), "stream": table().to_iterable_dataset()}
    if kind == "parquet":
        table().to_parquet(str(tmp_path / "t.parquet"))
    source: Any = tar(tmp_path / "x.tar", samples(range(FEW))) if kind == "tar" else sources[kind]
    totals = extract(enc, open_images(source), tmp_path / "out", Extraction(part_rows=4, batch_size=3, num_workers=1))
    e = SparseEmbeddings.load(tmp_path / "out")
    np.testing.assert_allclose(e.to_dense(), expected, rtol=1e-4, atol=1e-5)
    assert totals["rows"] == FEW and totals["parts"] == 3


def raw() -> list[dict[str, Any]]:
    import datasets

    return table().cast_column("image", datasets.Image(decode=False))["image"][:]


def test_stopped_run_continues_and_ends_byte_equal(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enc = settled()
    extract(enc, open_images(photos), tmp_path / "unbroken", HOW)
    write = files.atomic_file
    for stop in range(1, 8):
        out, seen = tmp_path / f"out{stop}", [0]

        def failing(path: Path, seen: list[int] = seen, stop: int = stop) -> Any:
            seen[0] += 1
            if seen[0] == stop:
                raise KeyboardInterrupt
            return write(path)

        with monkeypatch.context() as patch:
            patch.setattr("rlpjepa_zoo.core.files.atomic_file", failing)
            with pytest.raises(KeyboardInterrupt):
                extract(enc, open_images(photos), out, HOW)
        before = {name: (out / name).stat().st_mtime_ns for name in contents(out) if "part-" in name}
        assert len(before) == min(5, max(0, stop - 2))
        with refused(DataError, match="not finished" if len(before) else "no data/"):
            SparseEmbeddings.load(out)
        extract(enc, open_images(photos), out, HOW)
        assert contents(out) == contents(tmp_path / "unbroken")
        assert all((out / name).stat().st_mtime_ns == at for name, at in before.items())  # finished parts are not made again


def test_run_killed_at_random_times_ends_byte_equal(photos: Path, tmp_path: Path) -> None:
    enc = settled()
    started = time.monotonic()
    extract(enc, open_images(photos), tmp_path / "unbroken", HOW)
    usual, source, kills = time.monotonic() - started, random.Random(0), 0
    while kills < 6:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                extract(enc, open_images(photos), tmp_path / "out", HOW)
                code = 0
            finally:
                os._exit(code)
        time.sleep(usual * source.random())
        os.kill(pid, signal.SIGKILL)
        ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert ended in (-signal.SIGKILL, 0)
        if ended:
            kills += 1
        else:  # it ended before the kill
            __import__("shutil").rmtree(tmp_path / "out")
    extract(enc, open_images(photos), tmp_path / "out", HOW)
    assert contents(tmp_path / "out") == contents(tmp_path / "unbroken")


def test_damaged_and_partial_files_are_made_again(photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    enc, out = settled(), tmp_path / "out"
    extract(enc, open_images(photos), out, HOW)
    before = contents(out)
    (out / "data/part-000001.parquet").write_bytes(before["data/part-000001.parquet"][:500])
    (out / "data/.part-000003.77.partial.parquet").write_bytes(b"half")
    (out / "data/part-000004.parquet").unlink()
    extract(enc, open_images(photos), out, HOW)
    assert contents(out) == before
    assert "part-000001.parquet: damaged" in caplog.text


def share(photos: Path, out: Path) -> dict[str, Any]:
    return extract(settled(), open_images(photos), out, HOW)


def test_two_and_three_processes_write_the_files_of_one(photos: Path, tmp_path: Path) -> None:
    one = share(photos, tmp_path / "one")
    for world in (2, 3):
        totals = run_ranks(share, world, photos, tmp_path / str(world))
        assert totals == [one] * world
        assert contents(tmp_path / str(world)) == contents(tmp_path / "one")


def test_unreadable_images_are_listed_also_after_a_resume(photos: Path, tmp_path: Path) -> None:
    enc, out = settled(), tmp_path / "out"
    (photos / "blue/00.png").write_bytes(b"")
    (photos / "red/13.png").write_bytes(b"\x89PNG no")
    how = Extraction(part_rows=7, batch_size=3, num_workers=2, skip_bad=True)
    with refused(DataError, match=r"blue/00\.png: .*--skip-bad"):
        extract(enc, open_images(photos), out, HOW)
    totals = extract(enc, open_images(photos), out, how)  # with the option that the error names
    assert totals["rows"] == N - 2 and totals["skipped"] == 2 and sum(totals["reasons"].values()) == 2
    rows = [json.loads(line) for line in (out / "failed.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["blue/00.png", "red/13.png"] and all("cannot be read" in row["reason"] for row in rows)
    before = contents(out)
    (out / "data/part-000002.parquet").unlink()
    (out / "failed.jsonl").unlink()
    extract(enc, open_images(photos), out, how)
    assert contents(out) == before
    for path in photos.rglob("*.png"):
        path.write_bytes(b"none")
    with refused(DataError, match="none of the images can be read; the first of 30"):
        extract(enc, open_images(photos), tmp_path / "bad", how)


def test_other_encoder_images_or_options_need_overwrite(photos: Path, tmp_path: Path) -> None:
    enc, out = settled(), tmp_path / "out"
    extract(enc, open_images(photos), out, HOW)
    before = contents(out)
    other = settled()
    with torch.no_grad():
        other.projector[-2].bias += 1
    for encoder, how, words in (
        (other, HOW, "another model: fingerprint"),
        (enc.with_budget(3), HOW, "another model: dial"),
        (enc, Extraction("float16", 7, batch_size=3), "another options: values was 'float32', is 'float16'"),
        (enc, Extraction(part_rows=8, batch_size=3), "part_rows was 7, is 8"),
        (enc, Extraction(part_rows=7, batch_size=3, budget=OutputOptions(max_active=2)), "max_active was None, is 2"),
    ):
        with refused(UsageError, match=words):
            extract(encoder, open_images(photos), out, how)
    (photos / "blue/00.png").unlink()
    with refused(UsageError, match="another input"):
        extract(enc, open_images(photos), out, HOW)
    assert contents(out) == before
    extract(other, open_images(photos), out, HOW, overwrite=True)
    assert len(SparseEmbeddings.load(out)) == N - 1


def test_other_batch_size_continues_with_a_warning(photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    enc, out = settled(), tmp_path / "out"
    extract(enc, open_images(photos), out, HOW)
    (out / "data/part-000000.parquet").unlink()
    extract(enc, open_images(photos), out, Extraction(part_rows=7, batch_size=5))
    assert "batch_size 3 -> 5; equal up to rounding" in caplog.text and len(SparseEmbeddings.load(out)) == N


def test_foreign_folder_is_refused_and_unchanged(photos: Path, tmp_path: Path) -> None:
    for name in ("notes.txt", "README.md"):
        out = tmp_path / name.split(".")[0]
        out.mkdir()
        (out / name).write_text("mine")
        with refused(UsageError, match="which does not belong to embeddings"):
            extract(settled(), open_images(photos), out, HOW)
        assert (out / name).read_text() == "mine"
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn/embeddings.json").write_text("{")
    with refused(DataError, match="embeddings.json: damaged"):
        extract(settled(), open_images(photos), tmp_path / "torn", HOW)


def test_overwrite_never_removes_foreign_files(photos: Path, tmp_path: Path) -> None:
    home = tmp_path / "set"
    (home / "data").mkdir(parents=True)
    table().to_parquet(str(home / "data/train-0.parquet"))
    (home / "README.md").write_text("a card")
    before = contents(home)
    for overwrite in (False, True):
        with refused(UsageError, match="which does not belong to embeddings"):
            extract(settled(), open_images(home), home, HOW, overwrite=overwrite)
    assert contents(home) == before
    extract(settled(), open_images(photos), tmp_path / "out", HOW)
    (tmp_path / "out/data/mine.parquet").write_bytes(b"mine")
    with refused(UsageError, match=r"data/mine\.parquet"):
        extract(settled(), open_images(photos), tmp_path / "out", HOW, overwrite=True)


def test_other_columns_count_as_other_input(tmp_path: Path) -> None:
    table().to_parquet(str(tmp_path / "t.parquet"))
    enc, how = settled(), Extraction(part_rows=4, batch_size=3)
    extract(enc, open_images(tmp_path / "t.parquet"), tmp_path / "out", how)
    for options in ({"columns": ["note"]}, {"id_column": "key"}):
        with refused(UsageError, match="another input: (columns|id column) was"):
            extract(enc, open_images(tmp_path / "t.parquet", **options), tmp_path / "out", how)  # type: ignore[arg-type]


def test_folder_with_a_part_without_images_opens(photos: Path, tmp_path: Path) -> None:
    import datasets

    for name in ("blue/14.png", "blue/16.png"):
        (photos / name).write_bytes(b"")
    enc, out, how = settled(), tmp_path / "out", Extraction(part_rows=1, batch_size=3, num_workers=0, skip_bad=True)
    totals = extract(enc, open_images(photos), out, how)
    assert (
        totals["rows"] == N - 2
        and totals["parts"] == N - 2
        and [row["id"] for row in map(json.loads, (out / "failed.jsonl").open())] == ["blue/14.png", "blue/16.png"]
    )
    assert (
        len(datasets.load_dataset(str(out), split="train", cache_dir=str(tmp_path / "cache"))) == N - 2 == len(SparseEmbeddings.load(out))
    )
    before = contents(out)
    (out / "data/part-000003.parquet").unlink()
    extract(enc, open_images(photos), out, how)
    assert contents(out) == before


def test_encoded_images_are_freed_after_decoding(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gc
    import weakref

    from rlpjepa_zoo.data.images import ImageRows, Row

    class Cell:
        def __call__(self) -> Image.Image:
            return Image.new("RGB", (32, 32))

    alive: list[weakref.ref[Cell]] = []

    def rows(start: int) -> Any:
        for i in range(start, 40):
            cell = Cell()
            alive.append(weakref.ref(cell))
            yield Row(i, cell, {})

    held: list[int] = []
    codes = rz.SparseEncoder.codes

    def counting(self: Any, *args: Any) -> Any:
        gc.collect()
        held.append(sum(ref() is not None for ref in alive))
        return codes(self, *args)

    monkeypatch.setattr(rz.SparseEncoder, "codes", counting)
    gc.freeze()  # what other tests left is not searched: one collection took 0.5 s
    try:
        extract(settled(), ImageRows(rows, 40, {}), tmp_path / "out", Extraction(part_rows=40, batch_size=2, num_workers=1))
    finally:
        gc.unfreeze()
    assert max(held) <= 8 < len(held)  # a few batches, not a whole part


def failing_share(photos: Path, out: Path) -> str:
    try:
        extract(settled(), open_images(photos), out, HOW)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "done"


def test_processes_with_different_images_stop_at_once(photos: Path, tmp_path: Path) -> None:
    errors = run_ranks(other_share, 2, photos, tmp_path / "out")
    assert all(text.startswith("UsageError") and "processes see another input" in text for text in errors)
    assert list((tmp_path / "out/data").iterdir()) == []


def other_share(photos: Path, out: Path) -> str:
    from rlpjepa_zoo.core import distributed

    if distributed.rank() == 1:
        photos = photos / "red"
    return failing_share(photos, out)


def test_file_name_that_is_not_utf8_becomes_an_escaped_id(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for name in (b"good.png", b"bad\xff.png"):
        Image.new("RGB", (32, 32)).save(os.fsdecode(os.path.join(os.fsencode(tmp_path / "photos"), name)))
    extract(settled(), open_images(tmp_path / "photos"), tmp_path / "out", HOW)
    assert SparseEmbeddings.load(tmp_path / "out").ids.tolist() == ["bad\\xff.png", "good.png"]


def test_folder_whose_name_is_not_utf8_is_embedded(photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"\xff")
    shutil.copytree(photos, folder)
    extract(settled(), open_images(folder), tmp_path / "out", HOW)
    loaded, expected = SparseEmbeddings.load(tmp_path / "out"), settled().embed(folder)
    assert loaded.ids.tolist() == expected.ids.tolist() and np.allclose(loaded.to_dense(), expected.to_dense(), atol=1e-6)
    assert json.loads((tmp_path / "out/embeddings.json").read_text())["input"]["folder"] == "\\xff"


def test_very_long_image_is_skipped_without_using_memory(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    Image.new("1", (100_000, 1)).save(tmp_path / "photos/line.png")
    Image.new("RGB", (32, 32)).save(tmp_path / "photos/good.png")
    totals = extract(settled(), open_images(tmp_path / "photos"), tmp_path / "out", Extraction(skip_bad=True))
    assert totals["skipped"] == 1 and "line.png: 100000 x 1 pixels: too long and thin" in (tmp_path / "out/failed.jsonl").read_text()


def test_full_disk_keeps_the_finished_parts(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow.parquet as pq

    enc, out, write, calls = settled(), tmp_path / "out", pq.ParquetWriter.write_table, [0]

    def full(*args: Any, **options: Any) -> None:
        calls[0] += 1
        if calls[0] == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*args, **options)

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with refused(OutputError, match=r"part-000002\.parquet: cannot write: disk full \(No space left"):
        extract(enc, open_images(photos), out, HOW)
    assert sorted(p.name for p in (out / "data").iterdir()) == ["part-000000.parquet", "part-000001.parquet"]
    extract(enc, open_images(photos), out, HOW)
    extract(enc, open_images(photos), tmp_path / "unbroken", HOW)
    assert contents(out) == contents(tmp_path / "unbroken")


def test_nan_is_refused_and_not_written(photos: Path, tmp_path: Path) -> None:
    enc = settled()
    with torch.no_grad():
        enc.projector[-2].weight[0, 0] = torch.nan
    with refused(NonFiniteError, match="NaN or infinity for the batch that starts at 'blue/00.png'"):
        extract(enc, open_images(photos), tmp_path / "out", HOW)
    assert list((tmp_path / "out/data").iterdir()) == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_stops_between_batches_and_call_continues(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int
) -> None:
    enc, out, batches = settled(), tmp_path / "out", [0]
    codes = type(enc).codes

    def signalled(self: Any, *args: Any) -> Any:
        batches[0] += 1
        if batches[0] == 5:
            os.kill(os.getpid(), number)
        return codes(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(type(enc), "codes", signalled)
        with refused(StoppedBySignal, match="the same command continues") as caught:
            extract(enc, open_images(photos), out, HOW)
    assert caught.value.exit_code == code
    extract(enc, open_images(photos), out, HOW)
    extract(enc, open_images(photos), tmp_path / "unbroken", HOW)
    assert contents(out) == contents(tmp_path / "unbroken")


def test_second_run_into_a_folder_is_refused(photos: Path, tmp_path: Path) -> None:
    from rlpjepa_zoo.core.files import lock

    with lock(tmp_path / "out"), refused(UsageError, match="in use by process"):
        extract(settled(), open_images(photos), tmp_path / "out", HOW)


def test_every_file_holds_its_provenance(photos: Path, tmp_path: Path) -> None:
    enc = settled().with_budget(3)
    model = provenance(enc, str(tmp_path), "abc")
    extract(enc, open_images(photos), tmp_path / "out", HOW, model=model)
    for part in (tmp_path / "out/data").iterdir():
        meta = SparseEmbeddings.load(part).meta
        recorded = json.loads(meta["provenance"])
        assert (
            meta["model"] == enc.fingerprint()
            and recorded["model"] == model.model_dump(exclude_none=True)
            and recorded["options"]["values"] == "float32"
        )
        assert recorded["input"]["files"] == N and recorded["model"]["dial"] == {"mode": "top_k", "value": 3}
    assert model.source == tmp_path.name  # no path of this machine


def test_parts_of_two_encoders_do_not_load(photos: Path, tmp_path: Path) -> None:
    enc = settled()
    for name, encoder in (("a", enc), ("b", enc.with_budget(3))):
        extract(encoder, open_images(photos), tmp_path / name, HOW)
    (tmp_path / "b/data/part-000000.parquet").rename(tmp_path / "a/data/part-000004.parquet")
    with refused(DataError, match="damaged or changed: its sha256"):
        SparseEmbeddings.load(tmp_path / "a")
    (tmp_path / "a/embeddings.json").unlink()  # then the folder is any parquet files
    with refused(UsageError, match="rows of different encoders do not mix"):
        SparseEmbeddings.load(tmp_path / "a")
    with refused(DataError, match="no data/"):
        SparseEmbeddings.load(tmp_path)


def test_embed_applies_budgets_and_precision(photos: Path) -> None:
    enc = settled()
    exact = enc.embed(photos)
    assert enc.embed(photos, max_active=4) == exact.top_k(4)
    least = float(np.median(exact.values))
    dense = exact.to_dense()
    largest = SparseEmbeddings.from_dense(np.where(dense >= least, dense, 0), exact.ids, exact.meta)
    assert exact.at_least(least) == largest
    assert enc.embed(photos, min_value=least) == largest and 0 < largest.nnz < exact.nnz
    half = enc.embed(photos, precision="bf16").to_dense()
    assert 0 < np.abs(half - exact.to_dense()).max() < 0.05
    for options in ({"min_value": -1.0}, {"precision": "fp8"}, {"min_value": float("nan")}):
        with refused(UsageError):
            enc.embed(photos, **options)


def test_sparse_files_are_an_eighth_of_dense_ones(tmp_path: Path, rng: np.random.Generator) -> None:
    dense = np.where(rng.random((2000, 512)) < 0.06, rng.laplace(size=(2000, 512)).__abs__(), 0).astype(np.float32)
    e = SparseEmbeddings.from_dense(dense, [f"folder/image-{i:06d}.jpg" for i in range(2000)])
    assert e.l0 == pytest.approx(0.06, abs=0.002)
    sizes = {}
    for suffix in (".parquet", ".safetensors", ".npz"):
        for values in ("float32", "float16") + (("uint8",) if suffix != ".npz" else ()):
            path = e.save(tmp_path / f"{values}{suffix}", values)
            sizes[path.name] = dense.nbytes / path.stat().st_size
            if values == "float32":
                assert SparseEmbeddings.load(path) == e
            once = SparseEmbeddings.load(path)
            assert once.ids.tolist() == e.ids.tolist() and np.array_equal(once.indices, e.indices)
    assert sizes["float32.parquet"] > 8 and sizes["float16.safetensors"] > 8 and sizes["uint8.parquet"] > 16, sizes


def test_command_embeds_into_a_folder_and_continues(photos: Path, tmp_path: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    settled().save_pretrained(tmp_path / "enc")
    words = [
        "embed",
        tmp_path / "enc",
        photos,
        "--out",
        tmp_path / "out",
        "--part-rows",
        7,
        "--quiet",
        "--max-active",
        5,
        "--values",
        "uint8",
    ]
    code, out, _ = run(*words, "--json")
    printed = json.loads(out)
    assert code == 0 and printed["rows"] == N and printed["density"] <= 5 / 24
    before = contents(tmp_path / "out")
    code, out, _ = run(*words)
    assert code == 0 and contents(tmp_path / "out") == before and "rows: 30" in out
    assert rz.SparseEmbeddings.load(tmp_path / "out").meta["model"] == printed["model"]


def test_command_errors_are_one_line_with_their_code(
    photos: Path, tmp_path: Path, run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    settled().save_pretrained(tmp_path / "enc")
    (tmp_path / "file").write_text("")
    embed = ["embed", tmp_path / "enc", photos, "--quiet", "--out"]
    for words, expected in (
        ([*embed, tmp_path / "out", "--values", "int4"], 2),
        ([*embed, tmp_path / "out", "--precision", "fp8"], 2),
        ([*embed, tmp_path / "out", "--columns", "note"], 2),
        ([*embed, tmp_path / "out.csv"], 2),
        ([*embed, tmp_path / "no" / "out"], 6),
        ([*embed, tmp_path / "file" / "out"], 6),
        (["embed", tmp_path / "enc", tmp_path / "nowhere", "--out", tmp_path / "out"], 3),
        (["embed", tmp_path / "nowhere", photos, "--out", tmp_path / "out"], 2),
        ([*embed, tmp_path / "out.npz", "--columns", "note"], 2),
        ([*embed, tmp_path / "out", "--split", "test"], 2),
        (["dial", tmp_path / "enc", "--out", tmp_path / "enc", "--budget", "3"], 2),
        (["dial", tmp_path / "enc", "--out", tmp_path / "d"], 2),
        (["dial", tmp_path / "enc", "--out", tmp_path / "d", "--density", "0.2", "--budget", "3"], 2),
        (["dial", tmp_path / "enc", "--out", tmp_path / "d", "--density", "1.5"], 2),
        (["dial", tmp_path / "enc", "--out", tmp_path / "d", "--density", "0.1", "--mode", "threshold"], 2),
        (["dial", tmp_path / "enc", "--out", tmp_path / "d", "--budget", "3", "--images", photos], 2),
    ):
        code, out, err = run(*words)
        assert (code, out) == (expected, ""), (words, err)
        assert err.startswith("error: ") and err.count("\n") == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = run(*embed, tmp_path / "out.npz")
    assert code == 2 and "several processes write a folder" in err


def test_pushed_folder_opens_as_a_data_set_from_the_hub(
    photos: Path, tmp_path: Path, hub_server: Any, run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    from huggingface_hub import snapshot_download

    enc, out = settled(), tmp_path / "out"
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    code, _, err = run("push", out, "owner/rows")
    assert code == 4 and "no such file or folder; " in err
    extract(enc, open_images(photos), out, HOW)
    (out / "data/part-000004.parquet").rename(tmp_path / "kept")
    code, _, err = run("push", out, "owner/rows")
    assert code == 2 and "4 parts, 5 were written" in err
    (tmp_path / "kept").rename(out / "data/part-000004.parquet")
    code, printed, _ = run("push", out, "owner/rows", "--dry-run")
    assert code == 0 and "part-000004.parquet" in printed and ("dataset", "owner/rows") not in hub_server.repos
    code, printed, _ = run("push", out, "owner/rows", "--license", "cc-by-4.0", "--json")
    assert code == 0 and len(json.loads(printed)["changed"]) == 7
    assert [entry.title for entry in hub_server.log("owner/rows", type="dataset")] == ["Upload sparse embeddings", "initial commit"]
    rows = datasets.load_dataset("owner/rows", split="train", token="hf_writer")
    assert rows["id"][:] == SparseEmbeddings.load(out).ids.tolist() and rows.features["label"].names == ["blue", "red"]
    assert SparseEmbeddings.load(snapshot_download("owner/rows", repo_type="dataset")) == SparseEmbeddings.load(out)
    assert "license: cc-by-4.0" in hub_server.files("owner/rows", type="dataset")["README.md"].decode()
    extract(enc, open_images(photos), out, Extraction(part_rows=15, batch_size=3), overwrite=True)
    code, printed, _ = run("push", out, "owner/rows", "--license", "cc-by-4.0", "--json")
    left = hub_server.files("owner/rows", type="dataset")
    assert code == 0 and sorted(name for name in left if name.startswith("data/")) == [
        "data/part-000000.parquet",
        "data/part-000001.parquet",
    ]
    hub_server.put("owner/pictures", {"data/train.parquet": b"of somebody"}, type="dataset")
    code, _, err = run("push", out, "owner/pictures")
    assert code == 2 and "holds another dataset" in err


def test_batch_size_threads_and_part_size_change_no_row(photos: Path, tmp_path: Path) -> None:
    enc = settled()
    extract(enc, open_images(photos), tmp_path / "one", Extraction(num_workers=0))
    expected = SparseEmbeddings.load(tmp_path / "one")
    for i, how in enumerate(
        (Extraction(part_rows=1, batch_size=9), Extraction(part_rows=8, batch_size=1, num_workers=3), Extraction(part_rows=N, batch_size=4))
    ):
        extract(enc, open_images(photos), tmp_path / str(i), how)
        e = SparseEmbeddings.load(tmp_path / str(i))
        assert (
            e.ids.tolist() == expected.ids.tolist()
            and np.array_equal(e.indptr, expected.indptr)
            and np.array_equal(e.indices, expected.indices)
        )
        np.testing.assert_allclose(e.values, expected.values, rtol=1e-4, atol=1e-6)


def test_no_file_or_thread_is_left_open(photos: Path, tmp_path: Path) -> None:
    import gc
    import threading

    enc = settled()
    extract(enc, open_images(photos), tmp_path / "first", HOW)
    gc.collect()  # files that earlier tests left to it
    held, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    for i in range(3):
        extract(enc, open_images(photos), tmp_path / str(i), HOW)
    (photos / "red/13.png").write_bytes(b"")
    with refused(DataError):
        extract(enc, open_images(photos), tmp_path / "bad", HOW)
    assert len(os.listdir("/proc/self/fd")) == held and threading.active_count() == threads


def test_large_counts_and_wide_rows_use_64_bit_types(monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow as pa

    wide = SparseEmbeddings([0, 2], [5, 40_000], [1.0, 2.0], 2**16)
    assert str(wide.to_arrow().schema.field("indices").type) == "list<item: int32>"
    monkeypatch.setattr("rlpjepa_zoo.sparse.io.INT32_LIMIT", 2)
    assert wide.to_arrow().schema.field("indices").type == pa.large_list(pa.int32()) and wide.to_scipy().indptr.dtype == np.int64


MEASURE = """
import sys
import torch
import rlpjepa_zoo as rz
from rlpjepa_zoo.embedding.extract import Extraction, extract
from rlpjepa_zoo.data.sources import open_images
torch.set_num_threads(1)
extract(rz.load_encoder("test_resnet.digits"), open_images(sys.argv[2:]), sys.argv[1], Extraction(num_workers=2, part_rows=1000))
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])  # ru_maxrss counts the parent's too
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path) -> None:
    import subprocess
    import sys

    source, peaks = table(), []
    one = tmp_path / "images.parquet"
    import datasets

    datasets.concatenate_datasets([source] * 200).to_parquet(str(one))
    for copies in (1, 10):
        command = [sys.executable, "-c", MEASURE, str(tmp_path / str(copies)), *[str(one)] * copies]
        peaks.append(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]))
        assert len(list((tmp_path / str(copies) / "data").iterdir())) == -(-FEW * 200 * copies // 1000)
    print(f"largest resident memory: {peaks[0] / 1024:.1f} MB for {FEW * 200} images, {peaks[1] / 1024:.1f} MB for ten times as many")
    assert peaks[1] < 1.05 * peaks[0]
