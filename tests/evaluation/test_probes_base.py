"""What probes share: the form of rows, products in tiles, held-out rows, scikit-learn fits."""

import warnings

import numpy as np
import pytest
import torch
from clusters import clusters, codes, sparse
from scipy.sparse import csr_array, csr_matrix
from sklearn.exceptions import ConvergenceWarning

from rlpjepa_zoo.errors import UsageError
from rlpjepa_zoo.evaluation.probes import base
from rlpjepa_zoo.evaluation.probes.base import held_out, rows, spread, tiles, unit
from rlpjepa_zoo.evaluation.probes.linear import linear


def test_rows_become_float32_and_dense_above_a_quarter_non_zeros(rng: np.random.Generator) -> None:
    x, _ = codes(rng)
    assert 0.05 < (x != 0).mean() < 0.25
    converted = [rows(form) for form in (sparse(x), csr_matrix(x.astype(np.float64)), csr_array(x).tocsc())]
    assert all(type(form) is csr_array and form.dtype == np.float32 and np.array_equal(form.toarray(), x) for form in converted)
    filled = np.where(rng.random(x.shape) < 0.5, 1.0, 0.0)
    for form in (csr_array(filled), filled, torch.from_numpy(filled), filled.tolist()):
        assert type(rows(form)) is np.ndarray and rows(form).dtype == np.float32 and np.array_equal(rows(form), filled)
    with pytest.raises(UsageError, match=r"\(n, C\)"):
        rows(np.zeros(3))


def test_large_matrix_in_csr_stays_csr(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    filled = csr_array(rng.random((20, 10)))
    assert type(rows(filled)) is np.ndarray
    monkeypatch.setattr(base, "DENSE_SIZE", 199)
    assert type(rows(filled)) is csr_array


def test_unit_rows_have_length_one_despite_overflow_or_underflow(rng: np.random.Generator) -> None:
    x, _ = codes(rng)
    x[3] = 0
    x[4] *= 1e-25 / max(x[4].max(), 1e-9)
    x[5] *= 1e25 / max(x[5].max(), 1e-9)
    for form in (unit(x), unit(sparse(x)).toarray()):
        length = np.sqrt(np.square(form, dtype=np.float64).sum(1))
        assert length[3] == 0 and np.allclose(length[np.abs(x).max(1) > 0], 1, atol=1e-6)


def test_spread_is_the_deviation_around_column_means(rng: np.random.Generator) -> None:
    x, _ = codes(rng)
    expected = np.sqrt(np.square(x.astype(np.float64) - x.mean(0, dtype=np.float64)).mean())
    assert spread(x) == pytest.approx(expected, rel=1e-9) and spread(rows(sparse(x))) == pytest.approx(expected, rel=1e-6)


def test_products_come_in_tiles_of_bounded_size(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "TILE", 1000)
    x, _ = codes(rng, 70)
    for bank in (x, rows(sparse(x))):
        for queries in (x, rows(sparse(x))):
            blocks = list(tiles(queries, bank))
            assert len(blocks) == 5 and all(block.numel() <= 1000 for _, block in blocks)
            assert [start for start, _ in blocks] == [0, 14, 28, 42, 56]
            assert np.allclose(torch.cat([block for _, block in blocks]).numpy(), x @ x.T, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(base, "TILE", 10)
    assert [block.shape for _, block in tiles(x[:2], x)] == [(1, 70), (1, 70)]


def test_held_out_rows_are_a_share_of_each_class(rng: np.random.Generator) -> None:
    y = rng.permutation(np.repeat([0, 1, 2, 3, 9], [50, 10, 2, 1, 7]))
    chosen = held_out(y, 0.2)
    assert [int(chosen[y == c].sum()) for c in (0, 1, 2, 3, 9)] == [10, 2, 1, 0, 1]
    assert np.array_equal(chosen, held_out(y, 0.2)) and not np.array_equal(chosen, held_out(y, 0.2, seed=1))
    assert not np.array_equal(chosen, held_out(y, 0.2, purpose="another")) and held_out(y, 0.99)[y == 2].sum() == 1


def test_no_convergence_warning_at_the_iteration_limit(rng: np.random.Generator) -> None:
    x, y = clusters(rng, 100, 50, noise=3.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        linear(x, y, x, c=1e4, max_iter=2)
