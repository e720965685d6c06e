"""Retrieval against scikit-learn."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from clusters import codes, sparse
from sklearn.metrics import average_precision_score

from rlpjepa_zoo.evaluation.probes.retrieval import retrieval


@pytest.mark.parametrize("form", [np.asarray, sparse], ids=["dense", "sparse"])
def test_means_over_queries_equal_scikit_learn(rng: np.random.Generator, form: Callable[..., Any]) -> None:
    (x, y), (test_x, test_y) = codes(rng, 90, 200), codes(rng, 40, 200)
    for rows in (x, test_x):
        rows[:, 0] = rng.uniform(1, 2, len(rows))  # no two rows are orthogonal, so no two cosines are equal
    a, b = x.astype(np.float64), test_x.astype(np.float64)
    cosine = (b / np.linalg.norm(b, axis=1, keepdims=True)) @ (a / np.linalg.norm(a, axis=1, keepdims=True)).T
    assert all(len(set(row.round(9))) == 90 for row in cosine)  # distinct, so that the ranking is one
    result = retrieval(form(x), y, form(test_x), test_y)
    assert result.average_precision.mean() == pytest.approx(
        np.mean([average_precision_score(y == c, row) for c, row in zip(test_y, cosine, strict=True)]), abs=1e-5
    )
    order = np.argsort(-cosine, axis=1)
    for n, value in ((1, result.precision_at_1), (10, result.precision_at_10)):
        assert value.mean() == pytest.approx((y[order[:, :n]] == test_y[:, None]).mean(), abs=1e-9)
    assert len(result.average_precision) == 40 and 0.3 < result.average_precision.mean() < 1


def test_equally_near_rows_gain_nothing_from_their_order(rng: np.random.Generator) -> None:
    """Codes of two of 500 values know nothing of the class; nearly all cosines are 0, and the bank is sorted by class."""
    x = np.zeros((600, 500))
    for row in x:
        row[rng.choice(500, 2, replace=False)] = rng.uniform(1, 2, 2)
    y = np.repeat(np.arange(10), 30)
    result = retrieval(x[:300], y, x[300:], y)
    by_chance = np.mean([average_precision_score(y == 0, rng.random(300)) for _ in range(200)])
    assert result.average_precision.mean() == pytest.approx(by_chance, abs=0.015)  # 0.22 if equally near rows stay in their order


def test_a_query_without_relevant_rows_counts_as_zero() -> None:
    x = np.tile([[1.0, 0.0]], (4, 1))
    assert retrieval(x, [0, 0, 0, 0], x[:2], [0, 5]).average_precision.tolist() == [1, 0]


def test_average_precision_of_each_query_equals_scikit_learn(rng: np.random.Generator) -> None:
    (x, y), (test_x, test_y) = codes(rng, 90, 200), codes(rng, 40, 200)
    x[:, 0], test_x[:, 0] = rng.uniform(1, 2, 90), rng.uniform(1, 2, 40)
    a, b = x.astype(np.float64), test_x.astype(np.float64)
    cosine = (b / np.linalg.norm(b, axis=1, keepdims=True)) @ (a / np.linalg.norm(a, axis=1, keepdims=True)).T
    result = retrieval(x, y, test_x, test_y)
    assert result.average_precision.tolist() == pytest.approx(
        [average_precision_score(y == c, row) for c, row in zip(test_y, cosine, strict=True)], abs=1e-5
    )


def test_many_queries_are_sampled_at_random(rng: np.random.Generator) -> None:
    (x, y), (test_x, test_y) = codes(rng), codes(rng, 300)
    sample, again, other, full = (np.stack(retrieval(x, y, test_x, test_y, *given)) for given in ((100,), (100,), (100, 1), ()))
    assert np.array_equal(sample, again) and not np.array_equal(again, other) and sample.shape == (3, 100)
    assert full.shape == (3, 300) == np.stack(retrieval(x, y, test_x, test_y, 500)).shape
    assert sample[0].mean() == pytest.approx(full[0].mean(), abs=0.05)
