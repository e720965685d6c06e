"""SparseEmbeddings against numpy and scipy, its three file formats, and damaged files."""

import errno
import json
import os
import resource
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from refusals import refused
from safetensors.numpy import save as pack

from rlpjepa_zoo.errors import DataError, ModelError, OutputError, UsageError
from rlpjepa_zoo.sparse import io
from rlpjepa_zoo.sparse.embeddings import SparseEmbeddings

SUFFIXES = (".safetensors", ".npz", ".parquet")
NAMES = ["é ü/ñ.jpg", "日本語 ☃.png", "", "a,b\t'\"\\.png", "עברית.png", "line\nbreak.png"]


def random_dense(rng, n, dim, density=0.3):
    return np.where(rng.random((n, dim)) < density, rng.random((n, dim)) + 0.01, 0).astype(np.float32)


@pytest.fixture
def dense(rng):
    x = random_dense(rng, 12, 17)
    x[[0, 5, 6, 11]] = 0
    return x


# --- construction and access --------------------------------------------------------------------------------------------------------------


def test_dense_round_trip_with_empty_rows_is_exact(dense):
    e = SparseEmbeddings.from_dense(dense)
    oracle = scipy.sparse.csr_array(dense)
    np.testing.assert_array_equal(e.indptr, oracle.indptr)
    np.testing.assert_array_equal(e.indices, oracle.indices)
    assert e.values.tobytes() == oracle.data.tobytes()
    assert e.to_dense().tobytes() == dense.tobytes()
    assert (e.indptr.dtype, e.indices.dtype, e.values.dtype) == (np.int64, np.int32, np.float32)


def test_negative_zero_is_dropped():
    x = np.array([[-0.0, 1.0, 0.0], [-0.0, -0.0, -0.0]], dtype=np.float32)
    e = SparseEmbeddings.from_dense(x)
    assert e.nnz == 1
    assert not np.signbit(e.to_dense()).any()


def test_no_rows_and_only_zero_rows_are_valid():
    for n in (0, 3):
        e = SparseEmbeddings.from_dense(np.zeros((n, 5)))
        assert (e.shape, e.nnz, e.l0, len(e)) == ((n, 5), 0, 0.0, n)
        assert e.to_dense().shape == (n, 5)
        assert e.top_k(2) == e
        assert SparseEmbeddings.concat([e, e]).shape == (2 * n, 5)


def test_no_rows_accept_an_empty_list_of_ids():
    assert len(SparseEmbeddings.from_dense(np.zeros((0, 4)), ids=[])) == 0


def test_smallest_and_largest_float32_are_kept():
    x = np.array([[np.float32(1e-45), np.finfo(np.float32).max, 0]], dtype=np.float32)
    np.testing.assert_array_equal(SparseEmbeddings.from_dense(x).to_dense(), x)


def test_from_dense_takes_lists_and_tensors_with_gradient(dense):
    tensor = torch.from_numpy(dense).requires_grad_()
    assert SparseEmbeddings.from_dense(tensor) == SparseEmbeddings.from_dense(dense.tolist()) == SparseEmbeddings.from_dense(dense)


def test_from_dense_takes_bfloat16():
    x = torch.tensor([[0.0, 1.5], [2.25, 0.0]], dtype=torch.bfloat16)
    np.testing.assert_array_equal(SparseEmbeddings.from_dense(x).to_dense(), x.float().numpy())


def test_from_scipy_sorts_columns_and_drops_explicit_zeros(dense):
    coo = scipy.sparse.coo_array(([3.0, 0.0, 1.0, 2.0], ([1, 0, 1, 1], [4, 2, 0, 0])), shape=(2, 5))
    e = SparseEmbeddings.from_scipy(coo)
    np.testing.assert_array_equal(e.to_dense(), coo.toarray())
    assert e.nnz == 2
    np.testing.assert_array_equal(SparseEmbeddings.from_scipy(scipy.sparse.csc_matrix(dense)).to_dense(), dense)


def test_nnz_and_l0_equal_counts(dense):
    e = SparseEmbeddings.from_dense(dense)
    assert e.nnz == np.count_nonzero(dense)
    assert e.l0 == pytest.approx((dense > 0).mean(), abs=1e-12)


def test_default_ids_are_row_numbers_and_given_ids_are_kept(dense):
    np.testing.assert_array_equal(SparseEmbeddings.from_dense(dense).ids, np.arange(12))
    assert SparseEmbeddings.from_dense(dense[:6], ids=NAMES).ids.tolist() == NAMES


def test_equality_compares_values_ids_and_width(dense):
    e = SparseEmbeddings.from_dense(dense)
    changed = dense.copy()
    changed[dense > 0] *= np.float32(1.0001)
    assert e == SparseEmbeddings.from_dense(dense.copy())
    assert e != SparseEmbeddings.from_dense(changed)
    assert e != SparseEmbeddings.from_dense(dense, ids=np.arange(12) + 1)
    assert e != SparseEmbeddings.from_dense(np.pad(dense, ((0, 0), (0, 1))))
    assert e != "something else"


# --- indexing ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "index",
    [
        slice(None), slice(2, 7), slice(-4, None), slice(None, None, 3), slice(None, None, -1), slice(9, 2, -2), slice(5, 5),
        [3, 3, 0, -1], [], np.array([11, 0, 5]), np.array([1, 2], dtype=np.uint8), np.arange(12) % 3 == 0, np.zeros(12, bool),
    ],
    ids=repr,
)  # fmt: skip
def test_indexing_equals_numpy(dense, index):
    ids = np.array([f"r{i}" for i in range(12)])
    part = SparseEmbeddings.from_dense(dense, ids, {"model": "m"})[index]
    np.testing.assert_array_equal(part.to_dense(), dense[index])
    np.testing.assert_array_equal(part.ids, ids[index])
    assert part.meta == {"model": "m"}


@pytest.mark.parametrize("index", [0, 4, 11, -1, -12, np.int64(7), np.array(4)], ids=repr)
def test_one_row_keeps_two_dimensions(dense, index):
    part = SparseEmbeddings.from_dense(dense)[index]
    np.testing.assert_array_equal(part.to_dense(), dense[index][None])
    assert part.ids.tolist() == [int(index) % 12]


@pytest.mark.parametrize("index", [12, -13, [0, 12], np.ones(11, bool)], ids=repr)
def test_missing_rows_raise_index_error(dense, index):
    with pytest.raises(IndexError):
        SparseEmbeddings.from_dense(dense)[index]


def test_scikit_learn_accepts_to_scipy(dense):
    from sklearn.cluster import KMeans

    matrix = SparseEmbeddings.from_dense(dense).to_scipy()
    assert matrix.indptr.dtype == matrix.indices.dtype == np.int32
    assert len(KMeans(2, n_init=1, random_state=0).fit(matrix).labels_) == len(dense)


def test_iteration_gives_every_row_once(dense):
    e = SparseEmbeddings.from_dense(dense)
    assert SparseEmbeddings.concat(list(e)) == e


def test_slice_shares_no_memory(dense):
    e = SparseEmbeddings.from_dense(dense)
    part = e[2:5]
    part.values[:] = 99
    np.testing.assert_array_equal(e.to_dense(), dense)


# --- top_k and concat ----------------------------------------------------------------------------------------------------------------


def brute_top_k(dense, k):
    out = np.zeros_like(dense)
    for row, target in zip(dense, out, strict=True):
        best = sorted(np.flatnonzero(row), key=lambda c: (-row[c], c))[:k]
        target[best] = row[best]
    return out


@pytest.mark.parametrize("k", [1, 2, 3, 5, 17, 100])
def test_top_k_equals_brute_force_and_ties_go_to_the_lower_column(rng, dense, k):
    tied = (np.round(dense * 3) / 3).astype(np.float32)
    tied[3] = 1
    for x in (dense, tied):
        np.testing.assert_array_equal(SparseEmbeddings.from_dense(x).top_k(k).to_dense(), brute_top_k(x, k))


@pytest.mark.parametrize("k", [0, -1])
def test_top_k_below_one_is_refused(dense, k):
    with refused(UsageError, match="top_k"):
        SparseEmbeddings.from_dense(dense).top_k(k)


def test_concat_stacks_rows_ids_and_common_meta(dense):
    a = SparseEmbeddings.from_dense(dense[:5], [f"a{i}" for i in range(5)], {"model": "m", "part": "a"})
    b = SparseEmbeddings.from_dense(dense[5:], [f"longer-{i}" for i in range(7)], {"model": "m", "part": "b"})
    none = SparseEmbeddings.from_dense(dense[:0], meta={"model": "m"})
    e = SparseEmbeddings.concat(part for part in (none, a, b))
    np.testing.assert_array_equal(e.to_dense(), dense)
    assert e.ids.tolist() == a.ids.tolist() + b.ids.tolist()
    assert e.meta == {"model": "m"}


def test_concat_refuses_mixed_models_widths_and_ids_and_no_parts(dense):
    e = SparseEmbeddings.from_dense(dense, meta={"model": "one"})
    for other in (
        SparseEmbeddings.from_dense(dense, meta={"model": "two"}),
        SparseEmbeddings.from_dense(dense[:, :-1], meta={"model": "one"}),
        SparseEmbeddings.from_dense(dense, ids=[f"{i}" for i in range(12)], meta={"model": "one"}),
    ):
        with refused(UsageError, match="concat"):
            SparseEmbeddings.concat([e, other])
    with refused(UsageError, match="at least one"):
        SparseEmbeddings.concat([])


# --- conversion ----------------------------------------------------------------------------------------------------------------------


def test_to_scipy_is_canonical_and_equal(dense):
    matrix = SparseEmbeddings.from_dense(dense).to_scipy()
    assert isinstance(matrix, scipy.sparse.csr_array)
    assert matrix.has_canonical_format
    np.testing.assert_array_equal(matrix.toarray(), dense)


@pytest.mark.parametrize(("layout", "expected"), [("csr", torch.sparse_csr), ("coo", torch.sparse_coo)])
@pytest.mark.parametrize("rows", [0, 12])
def test_to_torch_is_equal(dense, layout, expected, rows):
    tensor = SparseEmbeddings.from_dense(dense[:rows]).to_torch(layout)
    assert tensor.layout == expected
    assert tensor.dtype == torch.float32
    np.testing.assert_array_equal(tensor.to_dense().numpy(), dense[:rows])


def test_to_torch_copies(dense):
    e = SparseEmbeddings.from_dense(dense)
    e.to_torch().values().zero_()
    np.testing.assert_array_equal(e.to_dense(), dense)


def test_to_torch_refuses_other_layouts(dense):
    with refused(UsageError, match="bsr"):
        SparseEmbeddings.from_dense(dense).to_torch("bsr")


def test_to_arrow_holds_ids_columns_and_values(dense):
    import pyarrow as pa

    table = SparseEmbeddings.from_dense(dense, ids=[f"{i}.png" for i in range(12)]).to_arrow()
    assert table.schema.field("id").type == pa.string()
    assert table.schema.field("indices").type == pa.list_(pa.int16())
    assert table.schema.field("values").type == pa.list_(pa.float32())
    for i, row in enumerate(table.to_pylist()):
        assert row["id"] == f"{i}.png"
        assert row["indices"] == np.flatnonzero(dense[i]).tolist()
        assert row["values"] == dense[i][dense[i] > 0].tolist()


# --- files ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("ids", [NAMES, [5, -3, 2**62, 0, 1, 2], None], ids=["unicode", "integers", "numbered"])
def test_file_round_trip_is_exact(tmp_path, dense, suffix, ids):
    e = SparseEmbeddings.from_dense(dense[:6], ids, {"model": "abc", "note": 'ü\n"x"'})
    back = SparseEmbeddings.load(e.save(tmp_path / f"e{suffix}"))
    assert back == e
    assert back.values.tobytes() == e.values.tobytes()
    assert back.ids.tolist() == e.ids.tolist()
    assert back.ids.dtype.kind == e.ids.dtype.kind
    assert back.meta == e.meta
    assert os.listdir(tmp_path) == [f"e{suffix}"]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("n", [0, 3])
def test_file_round_trip_without_entries(tmp_path, suffix, n):
    e = SparseEmbeddings.from_dense(np.zeros((n, 7)), [f"{i}" for i in range(n)] or None)
    back = SparseEmbeddings.load(e.save(tmp_path / f"e{suffix}"))
    assert back == e
    assert back.shape == (n, 7)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dim", [2**15 - 1, 2**15, 2**15 + 1, 2**31 - 1])
def test_last_column_survives_at_any_width(tmp_path, suffix, dim):
    e = SparseEmbeddings([0, 2], [0, dim - 1], [1.0, 2.0], dim)
    assert SparseEmbeddings.load(e.save(tmp_path / f"e{suffix}")).indices.tolist() == [0, dim - 1]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_float16_rounds_like_numpy_and_is_smaller(tmp_path, rng, suffix):
    dense = random_dense(rng, 200, 64)
    e = SparseEmbeddings.from_dense(dense)
    full, half = e.save(tmp_path / f"full{suffix}"), e.save(tmp_path / f"half{suffix}", values="float16")
    np.testing.assert_array_equal(SparseEmbeddings.load(half).to_dense(), dense.astype(np.float16).astype(np.float32))
    assert half.stat().st_size < full.stat().st_size


@pytest.mark.parametrize("value", [70000.0, 1e-9])
def test_float16_overflow_is_refused_and_writes_nothing(tmp_path, value):
    with refused(DataError, match="float16"):
        SparseEmbeddings.from_dense([[value]]).save(tmp_path / "e.npz", values="float16")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_ids_that_are_not_utf8_round_trip_or_are_refused(tmp_path, suffix):
    name = os.fsdecode(b"caf\xe9.png")
    e = SparseEmbeddings.from_dense(np.eye(2), ids=[name, "b.png"])
    if suffix == ".parquet":
        with refused(DataError, match="id.*UTF-8"):
            e.save(tmp_path / f"e{suffix}")
        assert os.listdir(tmp_path) == []
    else:
        assert SparseEmbeddings.load(e.save(tmp_path / f"e{suffix}")).ids.tolist() == [name, "b.png"]


def test_scipy_reads_npz(tmp_path, dense):
    path = SparseEmbeddings.from_dense(dense, ids=[f"é{i}" for i in range(12)]).save(tmp_path / "e.npz")
    np.testing.assert_array_equal(scipy.sparse.load_npz(path).toarray(), dense)


def test_pandas_reads_parquet(tmp_path, dense):
    import pandas as pd

    frame = pd.read_parquet(SparseEmbeddings.from_dense(dense, ids=[f"é{i}" for i in range(12)]).save(tmp_path / "e.parquet"))
    assert frame["id"].tolist() == [f"é{i}" for i in range(12)]
    for i in range(12):
        np.testing.assert_array_equal(frame["indices"][i], np.flatnonzero(dense[i]))
        np.testing.assert_array_equal(frame["values"][i], dense[i][dense[i] > 0])


@pytest.mark.parametrize("values", ["float32", "float16"])
def test_datasets_reads_parquet(tmp_path, dense, values):
    import datasets

    path = SparseEmbeddings.from_dense(dense).save(tmp_path / "e.parquet", values)
    rows = datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache"))
    assert rows["id"][:] == list(range(12))
    assert [row["indices"] for row in rows] == [np.flatnonzero(r).tolist() for r in dense]
    assert [row["values"] for row in rows] == [r[r > 0].astype(values).tolist() for r in dense]


def test_parquet_of_many_row_groups_is_read(tmp_path, rng):
    import pyarrow.parquet as pq

    e = SparseEmbeddings.from_dense(random_dense(rng, 50, 9))
    pq.write_table(e.to_arrow(), tmp_path / "e.parquet", row_group_size=7)
    assert SparseEmbeddings.load(tmp_path / "e.parquet") == e


# --- invalid matrices ----------------------------------------------------------------------------------------------------------------

GOOD = {"indptr": [0, 2, 2, 3], "indices": [0, 3, 1], "values": [1.0, 2.0, 3.0], "dim": 4}


@pytest.mark.parametrize(
    ("change", "row"),
    [
        ({"indptr": [0, 3, 2, 3]}, 1),
        ({"indices": [0, 4, 1]}, 0),
        ({"indices": [0, 3, 10**9]}, 2),
        ({"indices": [0, 3, 2**40]}, 2),
        ({"indices": np.array([0, 3, 2**64 - 1], dtype=np.uint64)}, 2),
        ({"indices": [-1, 3, 1]}, 0),
        ({"indices": [3, 0, 1]}, 0),
        ({"indices": [3, 3, 1]}, 0),
        ({"values": [1.0, 2.0, 0.0]}, 2),
        ({"values": [1.0, 2.0, -3.0]}, 2),
        ({"values": [1.0, np.nan, 3.0]}, 0),
        ({"values": [1.0, 2.0, np.inf]}, 2),
        ({"values": [-0.0, 2.0, 3.0]}, 0),
        ({"values": [1.0, 2.0, 1e-60]}, 2),
    ],
    ids=repr,
)
def test_bad_entry_is_refused_with_its_row(change, row):
    SparseEmbeddings(**GOOD)
    with refused(DataError, match=rf"^row {row}:"):
        SparseEmbeddings(**GOOD | change)


@pytest.mark.parametrize(
    "change",
    [
        {"indptr": []},
        {"indptr": [1, 2, 2, 3]},
        {"indptr": [0, 2, 2, 4]},
        {"indptr": [0, 2, 2, 2]},
        {"indptr": [0, 1.5, 2, 3]},
        {"indptr": [[0, 2, 2, 3]]},
        {"indptr": ["a", "b"]},
        {"indptr": 3},
        {"indices": [0, 3]},
        {"indices": [0.0, 3.5, 1.0]},
        {"indices": [[0], [3], [1]]},
        {"indices": 0},
        {"values": [1.0, 2.0]},
        {"values": [[1.0], [2.0], [3.0]]},
        {"values": ["x", "y", "z"]},
        {"dim": 0},
        {"dim": -4},
        {"dim": 2**31},
        {"dim": 4.5},
        {"ids": ["a", "b"]},
        {"ids": [1.5, 2.5, 3.5]},
        {"ids": [["a"], ["b"], ["c"]]},
        {"ids": [True, False, True]},
    ],
    ids=repr,
)
def test_arrays_that_do_not_fit_are_refused(change):
    with refused(DataError):
        SparseEmbeddings(**GOOD | change)


def test_negative_or_non_finite_dense_number_is_refused_with_its_row(dense):
    for value in (-1e-30, np.nan, np.inf):
        bad = dense.copy()
        bad[7, 3] = value
        with refused(DataError, match=r"^row 7:"):
            SparseEmbeddings.from_dense(bad)


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4)])
def test_dense_array_that_is_no_matrix_is_refused(shape):
    with refused(DataError, match="matrix"):
        SparseEmbeddings.from_dense(np.zeros(shape))


# --- damaged files -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=SUFFIXES)
def saved(request, tmp_path, dense):
    return SparseEmbeddings.from_dense(dense, [f"é{i}" for i in range(12)], {"model": "m"}).save(tmp_path / f"e{request.param}")


def test_truncated_file_is_refused_at_any_length(saved):
    content = saved.read_bytes()
    for cut in sorted({0, 1, 4, 8, 9, 40, len(content) // 4, len(content) // 2, len(content) - 9, len(content) - 1}):
        saved.write_bytes(content[:cut])
        with refused(DataError, ModelError, match=saved.name):
            SparseEmbeddings.load(saved)


def test_newer_format_is_refused_with_the_fix(tmp_path, monkeypatch, dense):
    e = SparseEmbeddings.from_dense(dense)
    with monkeypatch.context() as patch:
        patch.setattr(io, "FORMAT", "rlpjepa_zoo.sparse/9")
        paths = [e.save(tmp_path / f"e{suffix}") for suffix in SUFFIXES]
    for path in paths:
        with refused(ModelError, match="update rlpjepa_zoo"):
            SparseEmbeddings.load(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_file_of_another_kind_is_refused(tmp_path, suffix, dense):
    import pandas as pd

    path = tmp_path / f"other{suffix}"
    {
        ".safetensors": lambda: path.write_bytes(pack({"x": dense})),
        ".npz": lambda: scipy.sparse.save_npz(path, scipy.sparse.csr_array(dense)),
        ".parquet": lambda: pd.DataFrame({"id": [1], "x": [2]}).to_parquet(path),
    }[suffix]()
    with refused(DataError, ModelError, match=path.name):
        SparseEmbeddings.load(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_renamed_file_is_refused(tmp_path, suffix, dense):
    path = SparseEmbeddings.from_dense(dense).save(tmp_path / f"e{suffix}")
    for other in set(SUFFIXES) - {suffix}:
        renamed = path.rename(path.with_suffix(other))
        with refused(DataError, ModelError, match=renamed.name):
            SparseEmbeddings.load(renamed)
        renamed.rename(path)


@pytest.mark.parametrize("name", ["e.csv", "e", "e.NPZ.bak"])
def test_other_suffixes_are_refused_when_saving_and_loading(tmp_path, dense, name):
    (tmp_path / name).write_text("unchanged")
    with refused(UsageError, match="safetensors, .npz or .parquet"):
        SparseEmbeddings.from_dense(dense).save(tmp_path / name)
    with refused(UsageError, match="safetensors, .npz or .parquet"):
        SparseEmbeddings.load(tmp_path / name)
    assert (tmp_path / name).read_text() == "unchanged"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_missing_file_or_folder_is_refused(tmp_path, suffix):
    (tmp_path / f"folder{suffix}").mkdir()
    for name in (f"none{suffix}", f"folder{suffix}"):
        with refused(DataError, match=name):
            SparseEmbeddings.load(tmp_path / name)


@pytest.mark.parametrize(
    "header",
    ["[]", "3", "null", "{}", '{"format": "rlpjepa_zoo.sparse/1"}', "DIM", '{"format": 1, "dim": 4, "meta": {}}'] +
    [json.dumps({"format": "rlpjepa_zoo.sparse/1", "dim": dim, "meta": {}}) for dim in (None, "x", [4], 1e400, 0, -1)] +
    [json.dumps({"format": "rlpjepa_zoo.sparse/1", "dim": 4, "meta": meta}) for meta in (3, ["a"], "abc")] +
    [json.dumps({"format": "rlpjepa_zoo.sparse/1", "dim": 4, "meta": {}, "ids": ids}) for ids in (["a"], "abc", 3)],
)  # fmt: skip
def test_hostile_header_is_refused(tmp_path, header):
    path = tmp_path / "e.safetensors"
    arrays = {"indptr": np.array([0, 2, 2, 3]), "indices": np.array([0, 3, 1], np.int16), "values": np.ones(3, np.float32)}
    if "ids" not in header:
        arrays["ids"] = np.arange(3)
    path.write_bytes(pack(arrays, metadata={"rlpjepa_zoo": header}))
    with refused(DataError, ModelError, match="e.safetensors"):
        SparseEmbeddings.load(path)


@pytest.mark.parametrize("header", ["[]", "3", "null"])
def test_header_that_is_no_object_is_refused(tmp_path, header):
    path = tmp_path / "e.npz"
    np.savez(path, indptr=np.array([0, 1]), indices=np.array([2]), data=np.ones(1), ids=np.arange(1), header=np.array(header))
    with refused(DataError, ModelError, match="e.npz"):
        SparseEmbeddings.load(path)


def test_invalid_rows_in_a_file_are_refused_with_file_and_row(tmp_path):
    path = tmp_path / "e.safetensors"
    arrays = {"indptr": np.array([0, 1, 2]), "indices": np.array([0, 9], np.int16), "values": np.ones(2, np.float32), "ids": np.arange(2)}
    path.write_bytes(pack(arrays, metadata={"rlpjepa_zoo": json.dumps({"format": "rlpjepa_zoo.sparse/1", "dim": 4, "meta": {}})}))
    with refused(DataError, match=r"e\.safetensors: row 1"):
        SparseEmbeddings.load(path)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickle_in_npz_is_refused_and_not_run(tmp_path):
    path, marker = tmp_path / "e.npz", tmp_path / "marker"
    header = json.dumps({"format": "rlpjepa_zoo.sparse/1", "dim": 4, "meta": {}})
    ids = np.array([Bomb(marker)], dtype=object)
    np.savez(path, indptr=np.array([0, 0]), indices=np.zeros(0, int), data=np.zeros(0), ids=ids, header=np.array(header))
    with refused(DataError, match=path.name):
        SparseEmbeddings.load(path)
    assert not marker.exists()
    np.load(path, allow_pickle=True)["ids"]
    assert marker.exists()


# --- atomic writing ------------------------------------------------------------------------------------------------------------------


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("step", ["replace", "fsync"])
def test_failing_disk_leaves_the_old_file_and_no_partial(monkeypatch, saved, step):
    before = saved.read_bytes()
    monkeypatch.setattr(os, step, full)
    with refused(OutputError, match="No space left"):
        SparseEmbeddings.from_dense(np.eye(3)).save(saved)
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


def test_short_write_leaves_the_old_file_and_no_partial(saved, rng):
    before = saved.read_bytes()
    large = SparseEmbeddings.from_dense(rng.random((300, 300)))
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, old[1]))
    try:
        with pytest.raises(OutputError) as info:
            large.save(saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert len(str(info.value).splitlines()) == 1
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_unwritable_path_is_an_output_error(tmp_path, suffix, dense):
    e = SparseEmbeddings.from_dense(dense)
    (tmp_path / "file").touch()
    (tmp_path / f"folder{suffix}").mkdir()
    for path in (f"missing/e{suffix}", f"folder{suffix}", f"file/e{suffix}", f"{'x' * 250}{suffix}"):
        with refused(OutputError, match="cannot write|not a regular file"):
            e.save(tmp_path / path)
    assert sorted(os.listdir(tmp_path)) == ["file", f"folder{suffix}"]


# --- property ------------------------------------------------------------------------------------------------------------------------

matrices = hnp.arrays(
    np.float32,
    st.tuples(st.integers(0, 7), st.integers(1, 9)),
    elements=st.one_of(st.just(0.0), st.just(-0.0), st.floats(0, 3, width=16), st.floats(0, float(np.finfo(np.float32).max), width=32)),
)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(x=matrices, k=st.integers(1, 10), data=st.data())
def test_any_matrix_equals_numpy(x, k, data):
    e = SparseEmbeddings.from_dense(x)
    x = np.abs(x)
    assert e.to_dense().tobytes() == x.tobytes()
    assert (e.values > 0).all()
    np.testing.assert_array_equal(e.to_scipy().toarray(), x)
    np.testing.assert_array_equal(e.top_k(k).to_dense(), brute_top_k(x, k))
    rows = data.draw(st.lists(st.integers(-len(x), len(x) - 1), max_size=6)) if len(x) else []
    np.testing.assert_array_equal(e[rows].to_dense(), x[np.array(rows, dtype=int)])
    cut = data.draw(st.integers(0, len(x)))
    assert SparseEmbeddings.concat([e[:cut], e[cut:]]) == e


@settings(max_examples=25, deadline=None, derandomize=True)
@given(x=matrices, text=st.booleans(), suffix=st.sampled_from(SUFFIXES), data=st.data())
def test_any_matrix_round_trips_through_a_file(tmp_path_factory, x, text, suffix, data):
    name = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)
    ids = data.draw(st.lists(name if text else st.integers(-(2**63), 2**63 - 1), min_size=len(x), max_size=len(x))) or None
    e = SparseEmbeddings.from_dense(x, ids)
    path = tmp_path_factory.getbasetemp() / f"property{suffix}"
    back = SparseEmbeddings.load(e.save(path))
    assert back == e
    assert back.ids.tolist() == e.ids.tolist()


def test_nbytes_counts_values_columns_and_row_starts() -> None:
    narrow, wide = (SparseEmbeddings([0, 1, 3], [2, 0, 1], [1.0, 2.0, 3.0], dim) for dim in (4, 2**16))
    assert narrow.nbytes == 3 * 8 + 3 * 4 + 3 * 2 and wide.nbytes == 3 * 8 + 3 * 4 + 3 * 4
