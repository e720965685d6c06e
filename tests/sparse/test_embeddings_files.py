"""Files of embeddings in a hostile world: flipped bits, bombs, other programs that write them again, odd paths; ids and columns of any source."""

import io
import json
import logging
import os
import pickle
import struct
import tracemalloc
import zipfile

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from refusals import refused
from safetensors.numpy import save as pack

import rlpjepa_zoo as rz
from rlpjepa_zoo.errors import DataError, UsageError, ZooError
from rlpjepa_zoo.sparse.checksum import BLANK, KEY, add_checksum, is_intact
from rlpjepa_zoo.sparse.embeddings import SparseEmbeddings

SUFFIXES = (".safetensors", ".npz", ".parquet")
N, D = 12, 17
LABELS = {"label": np.arange(N) % 3, "note": [None if i % 4 == 0 else f"n{i}" for i in range(N)]}


@pytest.fixture
def dense(rng):
    x = np.where(rng.random((N, D)) < 0.3, rng.random((N, D)) + 0.01, 0).astype(np.float32)
    x[[0, 5]], x[:, -1] = 0, 0
    return x


@pytest.fixture
def e(dense):
    return SparseEmbeddings.from_dense(dense, [f"é{i}" for i in range(N)], {"model": "m"}, LABELS)


def same(a, b):
    columns = a.columns.keys() == b.columns.keys() and all(a.columns[k].tolist() == b.columns[k].tolist() for k in b.columns)
    return a == b and a.meta == b.meta and columns


# --- checksums -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_no_flipped_bit_changes_what_is_loaded(tmp_path, e, suffix, rng):
    path = e.save(tmp_path / f"e{suffix}")
    content, refusals = path.read_bytes(), 0
    for bit in rng.choice(8 * len(content), 200, replace=False):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            found = SparseEmbeddings.load(path)
        except ZooError as error:
            assert len(str(error).splitlines()) == 1 and len(str(error)) < 600
            refusals += 1
        else:
            assert same(found, e), bit
    assert refusals > (100 if suffix == ".npz" else 180)  # a zip file holds times and flags that nobody reads


def test_flipped_value_is_refused_as_damaged(tmp_path, e):
    for suffix, word in ((".safetensors", "checksum"), (".parquet", "checksum"), (".npz", "damaged")):
        path = e.save(tmp_path / f"e{suffix}")
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        with refused(DataError, match=word):
            SparseEmbeddings.load(path)


def test_text_of_the_user_that_looks_like_a_checksum_is_no_checksum(tmp_path, dense):
    fake = BLANK.replace("0", "7")
    e = SparseEmbeddings.from_dense(dense, [fake] * N, {"model": fake}, {fake: [fake] * N})
    for suffix in SUFFIXES:
        assert same(SparseEmbeddings.load(e.save(tmp_path / f"e{suffix}")), e)


def test_seal_covers_every_byte_but_its_own_digits(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(pack({"x": np.arange(5)}, metadata={"rlpjepa_zoo": json.dumps({KEY: BLANK})}))
    add_checksum(path)
    content = path.read_bytes()
    assert is_intact(io.BytesIO(content)) is True
    at = content.index(b"sha256-of-this-file:") + 20
    assert is_intact(io.BytesIO(content[:at] + b"0" * 64 + content[at + 64 :])) is False
    for other in (b"", b"PAR1", b"\0" * 40, content[:20], b"PAR1" + b"\xff" * 20):
        assert is_intact(io.BytesIO(other)) is None


def old_files(folder, dense):
    """Files as the first format had them: without checksum, ids in the header or of fixed width."""
    e = SparseEmbeddings.from_dense(dense)
    ids, header = [f"é{i}" for i in range(N)], {"format": "rlpjepa_zoo.sparse/1", "dim": D, "meta": {"model": "m"}}
    columns = {"indices": e.indices.astype(np.int16), "values": e.values}
    (folder / "e.safetensors").write_bytes(
        pack({"indptr": e.indptr, **columns}, metadata={"rlpjepa_zoo": json.dumps(header | {"ids": ids})})
    )
    np.savez_compressed(
        folder / "e.npz", format=b"csr", shape=np.array((N, D)), data=e.values, indices=e.indices, indptr=e.indptr, ids=np.array(ids),
        header=np.array(json.dumps(header)),
    )  # fmt: skip
    table = e.to_arrow().set_column(0, "id", pa.array(ids)).replace_schema_metadata({"rlpjepa_zoo": json.dumps(header)})
    pq.write_table(table, folder / "e.parquet", compression="zstd")
    return SparseEmbeddings.from_dense(dense, ids)


def test_files_of_the_first_format_load(tmp_path, dense):
    expected = old_files(tmp_path, dense)
    for suffix in SUFFIXES:
        found = SparseEmbeddings.load(tmp_path / f"e{suffix}")
        assert found == expected and found.meta == {"model": "m"} and not found.columns


# --- written again by other programs ----------------------------------------------------------------------------------------------------


def list_view(column):
    column = column.combine_chunks()
    offsets = np.asarray(column.offsets)
    return pa.ListViewArray.from_arrays(pa.array(offsets[:-1], pa.int32()), pa.array(np.diff(offsets), pa.int32()), column.values)


def replaced(table, **columns):
    for name, column in columns.items():
        table = table.set_column(table.schema.get_field_index(name), name, column)
    return table.replace_schema_metadata(None)


def by_datasets(old, new):
    import datasets

    datasets.Dataset.from_parquet(str(old), cache_dir=str(new.parent / "cache")).to_parquet(str(new))


AGAIN = {
    "pandas": lambda old, new: pd.read_parquet(old).to_parquet(new),
    "pandas, columns reversed": lambda old, new: pd.read_parquet(old).iloc[:, ::-1].to_parquet(new, row_group_size=5),
    "polars": lambda old, new: pl.read_parquet(old).write_parquet(new),
    "polars, int64 and categories": lambda old, new: (
        pl.read_parquet(old).with_columns(pl.col("indices").cast(pl.List(pl.Int64)), pl.col("id").cast(pl.Categorical)).write_parquet(new)
    ),
    "datasets": by_datasets,
    "arrow, header kept": lambda old, new: pq.write_table(pq.read_table(old), new, row_group_size=5),
    "arrow, dictionary of ids": lambda old, new: pq.write_table(
        replaced(t := pq.read_table(old), id=t["id"].cast(pa.large_string()).dictionary_encode()), new
    ),
    "arrow, list views": lambda old, new: pq.write_table(
        replaced(t := pq.read_table(old), indices=list_view(t["indices"]), values=list_view(t["values"])), new
    ),
}


@pytest.mark.parametrize("values", ["float32", "uint8"])
@pytest.mark.parametrize("program", AGAIN)
def test_parquet_that_another_program_wrote_again_loads(tmp_path, e, program, values, caplog):
    old = e.save(tmp_path / "old.parquet", values)
    AGAIN[program](old, tmp_path / "new.parquet")
    expected, found = SparseEmbeddings.load(old), SparseEmbeddings.load(tmp_path / "new.parquet", dim=D)
    assert found == expected and all(found.columns[k].tolist() == expected.columns[k].tolist() for k in LABELS)
    inferred = SparseEmbeddings.load(tmp_path / "new.parquet")
    if "header kept" in program:
        assert inferred.dim == D and not caplog.records
    else:
        assert inferred.dim == int(e.indices.max()) + 1 < D and "does not tell the width" in caplog.text


def test_rows_that_arrow_filters_load_with_the_old_header(tmp_path, e):
    table = pq.read_table(e.save(tmp_path / "old.parquet"))
    pq.write_table(table.slice(3, 4), tmp_path / "new.parquet")
    assert same(SparseEmbeddings.load(tmp_path / "new.parquet"), e[3:7])


def test_other_width_is_refused(tmp_path, e):
    path = e.save(tmp_path / "e.parquet")
    with refused(UsageError, match="has width 17, not 20"):
        SparseEmbeddings.load(path, dim=20)


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"indices": [[0]], "values": [[1.0]]}, "no column 'id'"),
        ({"id": ["x", None], "indices": [[0], [0]], "values": [[1.0], [1.0]]}, "row 1: no id"),
        ({"id": ["x", "y"], "indices": [[0], None], "values": [[1.0], [1.0]]}, "row 1: column 'indices' has no value"),
        ({"id": ["x"], "indices": [[0, None]], "values": [[1.0, 2.0]]}, "null"),
        ({"id": ["x", "y"], "indices": [[0], [0, 1]], "values": [[1.0], [1.0]]}, "row 1: indices and values have different lengths"),
        ({"id": ["x"], "indices": ["a"], "values": [[1.0]]}, "expected lists of numbers"),
        ({"id": ["x"], "indices": [["a"]], "values": [[1.0]]}, "expected numbers"),
        ({"id": ["x"], "indices": [[0.5]], "values": [[1.0]]}, "expected integers"),
        ({"id": ["x"], "indices": [[1, 0]], "values": [[1.0, 2.0]]}, "row 0"),
        ({"id": [1.5], "indices": [[0]], "values": [[1.0]]}, "row 0 has 1.5"),
        ({"id": ["x"], "indices": [[0]], "values": [[1.0]], "scale": [2.0]}, "codes"),
    ],
)
def test_table_that_is_no_embeddings_is_refused_with_its_row(tmp_path, columns, words):
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    with refused(DataError, match=words):
        SparseEmbeddings.load(tmp_path / "t.parquet")


# --- memory ----------------------------------------------------------------------------------------------------------------------------


def entry(dtype, shape, data=b""):
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape!r}, }}".ljust(117) + "\n"
    return np.lib.format.magic(1, 0) + struct.pack("<H", len(text)) + text.encode() + data


def archive(path, **changed):
    header = json.dumps({"format": "rlpjepa_zoo.sparse/1", "dim": 4, "meta": {}})
    arrays = {"indptr": np.array([0, 1]), "indices": np.zeros(1, np.int32), "data": np.ones(1, np.float32), "ids": np.arange(1)}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, array in {**arrays, "header": np.array(header)}.items():
            buffer = io.BytesIO()
            np.save(buffer, array)
            file.writestr(f"{name}.npy", changed.get(name, buffer.getvalue()))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"indices": entry("<i4", (900_000_000,))}, "an array of shape"),
        ({"data": entry("|O", (10**12,))}, "an array of shape"),
        ({"ids": entry("<U100000000", (1,))}, "an array of shape"),
        ({"data": entry("<f4", (75_000_000,), bytes(300_000_000))}, "asks for 300,"),
    ],
    ids=["size", "objects", "text", "zeros"],
)
def test_npz_that_asks_for_more_memory_than_it_can_mean_is_refused_before_it_is_read(tmp_path, changed, words):
    archive(tmp_path / "e.npz", **changed)
    tracemalloc.start()
    try:
        with refused(DataError, match=words):
            SparseEmbeddings.load(tmp_path / "e.npz")
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


def test_parquet_that_asks_for_more_memory_than_it_can_mean_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("rlpjepa_zoo.sparse.io._ALLOWANCE", 1 << 20)
    empty = pa.ListArray.from_arrays(pa.array(np.zeros(10**6 + 1, np.int32)), pa.array([], pa.float32()))
    table = pa.table({"id": pa.array(np.zeros(10**6, np.int64)), "indices": empty, "values": empty})
    pq.write_table(table, tmp_path / "e.parquet")
    assert (tmp_path / "e.parquet").stat().st_size < 20_000
    with refused(DataError, match="asks for 24,000,000 bytes"):
        SparseEmbeddings.load(tmp_path / "e.parquet")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_equal_rows_that_compress_a_thousandfold_load_again(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr("rlpjepa_zoo.sparse.io._ALLOWANCE", 1 << 16)
    monkeypatch.setattr("rlpjepa_zoo.sparse.io._EXPANSION", 16)
    e = SparseEmbeddings.from_dense(np.ones((500, 64)), ["same"] * 500)
    assert SparseEmbeddings.load(e.save(tmp_path / f"e{suffix}")) == e


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_one_long_id_does_not_widen_the_others(tmp_path, suffix):
    ids = ["x" * 50_000, *(f"k{i}" for i in range(1999))]
    e = SparseEmbeddings.from_dense(np.eye(2, dtype=np.float32).repeat(1000, 0), ids)
    back = SparseEmbeddings.load(e.save(tmp_path / f"e{suffix}"))
    assert back.ids.tolist() == ids and max(e.ids.nbytes, back.ids.nbytes) < 100 * sum(map(len, ids)) / 50
    assert (tmp_path / f"e{suffix}").stat().st_size < 200_000
    assert e[1:3].ids.tolist() == ids[1:3] and (e.ids == "k7").sum() == 1 and SparseEmbeddings.concat([e, back]).ids.tolist() == ids * 2


def test_repeated_long_text_of_a_parquet_file_is_one_object(tmp_path):
    text = pa.DictionaryArray.from_arrays(pa.array(np.zeros(20_000, np.int32)), pa.array(["x" * 100_000]))
    pq.write_table(pa.table({"id": text, "indices": [[0]] * 20_000, "values": [[1.0]] * 20_000, "note": text}), tmp_path / "e.parquet")
    e = SparseEmbeddings.load(tmp_path / "e.parquet")
    assert len(set(map(id, e.ids))) == len(set(map(id, e.columns["note"]))) == 1


# --- ids -------------------------------------------------------------------------------------------------------------------------------

TEXT = ["a.png", "b.png", "ü.png"]


@pytest.mark.parametrize(
    "hold",
    [
        list, tuple, iter, lambda x: np.array(x), lambda x: np.array(x, object), lambda x: [s.encode() for s in x], lambda x: map(np.str_, x),
        lambda x: pd.Series(x, index=[4, 2, 9]), lambda x: pd.Series(x, dtype="string"), lambda x: pd.Series(x, dtype="category"), pd.Index,
        pl.Series, pa.array, lambda x: pa.chunked_array([x[:1], x[1:]]), lambda x: pa.array(x).dictionary_encode(), lambda x: dict.fromkeys(x).keys(),
        lambda x: [__import__("pathlib").Path(s) for s in x],
    ],
)  # fmt: skip
def test_text_ids_are_taken_from_whatever_holds_them(hold):
    ids = SparseEmbeddings.from_dense(np.eye(3), hold(TEXT)).ids
    assert ids.tolist() == TEXT and set(map(type, ids)) == {str}


@pytest.mark.parametrize(
    "ids", [[3, 1, 2], range(1, 4), pd.Series([3, 1, 2], dtype="Int64"), pl.Series([3, 1, 2]), pa.array([3, 1, 2]), torch.tensor([3, 1, 2]),
            np.array([3, 1, 2], np.uint8)],
)  # fmt: skip
def test_integer_ids_are_int64_from_whatever_holds_them(ids):
    found = SparseEmbeddings.from_dense(np.eye(3), ids).ids
    assert found.dtype == np.int64 and sorted(found) == [1, 2, 3]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_ids_above_int64_are_kept(tmp_path, suffix):
    e = SparseEmbeddings.from_dense(np.eye(3), np.array([0, 5, 2**64 - 1], np.uint64))
    assert SparseEmbeddings.load(e.save(tmp_path / f"e{suffix}")).ids.tolist() == [0, 5, 2**64 - 1]


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (pd.Series(["a", None, "c"]), "row 1 has no id"),
        (pd.Series(["a", pd.NA, "c"], dtype="string"), "row 1 has no id"),
        (["a", "b", float("nan")], "row 2 has no id"),
        (pd.Series([1, None, 3], dtype="Int64"), "row 1 has no id"),
        (pa.array([1, 2, None]), "row 2 has no id"),
        (pd.Series([1, None, 3]), "row 0 has 1.0"),
        ([b"\xff", b"a", b"b"], "row 0 .* not UTF-8"),
        (["a", 1, "b"], "row 1 has 1"),
        ([2**70, 1, 2], "64 bits"),
        ([-1, 1, 2**63], "64 bits"),
        ("abc", "expected a list"),
        (np.ones((3, 1), int), "shape"),
        (["a", "b"], "expected 3"),
        (pd.Series(pd.to_datetime(["2020", "2021", "2022"])), "row 0 has"),
    ],
)
def test_missing_and_strange_ids_are_refused_by_row(ids, words):
    with refused(DataError, match=words):
        SparseEmbeddings.from_dense(np.eye(3), ids)


# --- columns, normalisation, memory of its own -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_columns_survive_indexing_concatenation_and_files(tmp_path, e, suffix):
    both = SparseEmbeddings.concat([e[:3], e[[5, 1]]])
    back = SparseEmbeddings.load(both.top_k(2).save(tmp_path / f"e{suffix}"))
    assert back.columns["label"].tolist() == [0, 1, 2, 2, 1] and back.columns["label"].dtype == np.int64
    assert back.columns["note"].tolist() == [None, "n1", "n2", "n5", "n1"]
    assert same(pickle.loads(pickle.dumps(e)), e)


def test_columns_are_read_only_and_checked(e):
    with pytest.raises(TypeError):
        e.columns["label"] = [1] * N
    assert e.with_columns({}).columns == {} and e.with_columns({"x": range(N)}).columns["x"].tolist() == list(range(N))
    for columns, words in (({"x": [1]}, "'x' has 1 values, expected 12"), ({"values": [1] * N}, "'values' is not free")):
        with refused(DataError, match=words):
            e.with_columns(columns)
    with refused(UsageError, match="different columns"):
        SparseEmbeddings.concat([e, e.with_columns({})])
    with refused(DataError, match="'x' cannot be saved"):
        e.with_columns({"x": [1, "a"] * (N // 2)}).to_arrow()


def test_normalised_rows_find_themselves_by_inner_products(dense):
    dense[3] *= 1e25
    dense[4] *= 1e-25
    e = SparseEmbeddings.from_dense(dense, meta={"model": "m"}, columns=LABELS).normalize()
    lengths = np.linalg.norm(e.to_dense().astype(np.float64), axis=1)
    np.testing.assert_allclose(lengths, np.where(dense.any(1), 1, 0), atol=1e-6)
    scores = (e.to_scipy() @ e.to_scipy().T).toarray()
    found = np.flatnonzero(dense.any(1))
    assert scores[found].argmax(1).tolist() == found.tolist() and e.meta == {"model": "m"} and "label" in e.columns
    assert SparseEmbeddings.from_dense([[1e30, 1e-30]]).normalize().to_dense().tolist() == [[1, 0]]


def test_scipy_matrix_does_not_share_memory(e):
    before = e.to_dense()
    matrix = e.to_scipy()
    matrix.data[:], matrix.indices[:], matrix.indptr[:] = 9, 0, 0
    np.testing.assert_array_equal(e.to_dense(), before)


# --- paths -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["emb:v1", "s3://bucket", "file:x", "é ☃", os.fsdecode(b"caf\xe9"), "a.b.c", "%41", "-x"])
@pytest.mark.parametrize("suffix", [*SUFFIXES, ".PARQUET"])
def test_any_path_is_a_path(tmp_path, monkeypatch, e, name, suffix):
    monkeypatch.chdir(tmp_path)
    path = f"{name}{suffix}"
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    assert same(SparseEmbeddings.load(e.save(path)), e)
    assert rz.load_embeddings(path) == e


def test_pointer_of_git_lfs_is_named(tmp_path):
    (tmp_path / "e.parquet").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with refused(DataError, match="git lfs pull"):
        SparseEmbeddings.load(tmp_path / "e.parquet")


def test_no_warning_without_need(tmp_path, e, caplog):
    caplog.set_level(logging.INFO)
    SparseEmbeddings.load(e.save(tmp_path / "e.parquet"))
    assert not caplog.records


@pytest.mark.parametrize("nest", ["list", "struct", "map"])
def test_long_text_repeated_inside_lists_and_structs_is_counted_before_it_is_expanded(tmp_path, nest):
    """The file has 50 kB. Arrow holds the text once; Python would hold it for each row."""
    n = 20_000
    text = pa.DictionaryArray.from_arrays(pa.array(np.zeros(n, np.int32)), pa.array([200_000 * "x"]))
    offsets, ones = pa.array(np.arange(n + 1, dtype=np.int32)), pa.array(np.ones(n, np.int32))
    nested = {
        "list": lambda: pa.ListArray.from_arrays(offsets, text),
        "struct": lambda: pa.StructArray.from_arrays([text], ["s"]),
        "map": lambda: pa.MapArray.from_arrays(offsets, pa.array(n * ["k"]), text),
    }[nest]()
    lists = {name: pa.ListArray.from_arrays(offsets, ones) for name in ("indices", "values")}
    pq.write_table(pa.table({"id": pa.array(range(n)), **lists, "copied": nested}), tmp_path / "e.parquet", compression="zstd")
    with refused(DataError, match="asks for 4,0.* bytes of memory"):
        SparseEmbeddings.load(tmp_path / "e.parquet")


def test_lists_and_structs_of_texts_are_read_as_written(tmp_path):
    copied = {
        "tags": [["a", "b"], ["a"], []],
        "about": [{"s": "a", "n": 1}, {"s": "a", "n": 2}, {"s": "b", "n": 3}],
        "raw": [b"\xff", b"\xff", None],
    }
    table = pa.table({"id": ["x", "y", "z"], "indices": [[0], [1], []], "values": [[1.0], [2.0], []], **copied})
    pq.write_table(table, tmp_path / "e.parquet")
    e = SparseEmbeddings.load(tmp_path / "e.parquet", dim=4)
    assert {name: column.tolist() for name, column in e.columns.items()} == copied
