"""kNN against float64 loops and scikit-learn, on dense and on sparse rows."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from clusters import Array, clusters, codes, sparse
from sklearn.neighbors import KNeighborsClassifier

from rlpjepa_zoo.errors import DataError
from rlpjepa_zoo.evaluation.probes.knn import knn, knn_accuracy


def loop_knn(bank: Array, bank_y: Array, x: Array, k: int, temperature: float, leave_one_out: bool = False) -> list[int]:
    """`knn` in float64, one query after the other; ties in the order of rows."""
    b, q = np.asarray(bank, np.float64), np.asarray(x, np.float64)
    predicted = []
    for i, query in enumerate(q):
        lengths = np.linalg.norm(b, axis=1) * np.linalg.norm(query)
        cosine = np.divide(b @ query, lengths, out=np.zeros(len(b)), where=lengths > 0)
        order = [j for j in np.argsort(-cosine, kind="stable") if not (leave_one_out and j == i)][:k]
        votes = np.zeros(int(bank_y.max()) + 1)
        for j in order:
            votes[bank_y[j]] += math.exp(cosine[j] / temperature)
        predicted.append(int(votes.argmax()))
    return predicted


@pytest.mark.parametrize("form", [np.asarray, sparse], ids=["dense", "sparse"])
@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("k", [1, 7, 20])
def test_knn_equals_a_float64_loop(rng: np.random.Generator, form: Callable[..., Any], leave_one_out: bool, k: int) -> None:
    bank, bank_y = codes(rng, noise=1.5)
    bank[7] = 0
    x = bank if leave_one_out else codes(rng, 80, noise=1.5)[0]
    expected = loop_knn(bank, bank_y, x, k, 0.07, leave_one_out)
    assert knn(form(bank), bank_y, form(x), k, 0.07, leave_one_out).tolist() == expected
    assert len(set(expected)) == 4


@pytest.mark.parametrize("form", [np.asarray, sparse], ids=["dense", "sparse"])
def test_equally_near_rows_of_lower_index_vote(form: Callable[..., Any]) -> None:
    bank = np.zeros((40, 5), np.float32)
    bank[:, 0] = np.linspace(1, 2, 40)  # one direction: all cosines are 1
    bank[::4] = [0, 3, 0, 0, 0]
    y = np.where(np.arange(40) < 14, 1, 0)
    queries = np.array([[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 1]], np.float32)
    for k in (1, 5, 10, 19, 20, 25, 33):
        assert knn(form(bank), y, form(queries), k).tolist() == loop_knn(bank, y, queries, k, 0.07)


def test_one_neighbour_equals_scikit_learn(rng: np.random.Generator) -> None:
    bank, bank_y = clusters(rng)
    x, y = clusters(rng, 80)
    other = KNeighborsClassifier(1, metric="cosine", algorithm="brute").fit(bank.numpy(), bank_y.numpy())
    assert knn_accuracy(bank, bank_y, x, y, k=1) == pytest.approx(other.score(x.numpy(), y.numpy()), abs=1e-12)


def test_knn_handles_more_queries_than_a_tile(rng: np.random.Generator) -> None:
    bank, bank_y = clusters(rng, 1300, 4)
    other = KNeighborsClassifier(2, metric="cosine", algorithm="brute").fit(bank.numpy(), bank_y.numpy())
    second = other.kneighbors(bank.numpy(), return_distance=False)[:, 1]
    accuracy = knn_accuracy(bank, bank_y, bank, bank_y, k=1, leave_one_out=True)
    assert accuracy == pytest.approx(float((bank_y[second] == bank_y).float().mean()), abs=2 / 1300)


def test_leave_one_out_row_never_votes_for_itself() -> None:
    x = torch.eye(6) + 0.01
    y = torch.arange(6)
    assert knn_accuracy(x, y, x, y, k=1) == 1
    assert knn_accuracy(x, y, x, y, k=1, leave_one_out=True) == 0
    assert knn_accuracy(x, y, x, y, k=100, leave_one_out=True) == 0


def test_single_image_without_neighbours_is_refused() -> None:
    x, y = torch.ones(1, 3), torch.zeros(1, dtype=torch.long)
    with pytest.raises(DataError, match="kNN: a single labelled image has no neighbour that can vote"):
        knn_accuracy(x, y, x, y, leave_one_out=True)
    assert knn_accuracy(x, y, x, y) == 1


def test_every_row_votes_if_k_exceeds_the_bank(rng: np.random.Generator) -> None:
    bank, bank_y = clusters(rng, 10)
    x, y = clusters(rng, 30)
    assert knn_accuracy(bank, bank_y, x, y, k=1000) == knn_accuracy(bank, bank_y, x, y, k=10)


@pytest.mark.parametrize("temperature", [0.03, 0.005, 1e-4])
def test_low_temperature_tends_to_the_nearest_neighbour(rng: np.random.Generator, temperature: float) -> None:
    bank, bank_y = clusters(rng, 200, 64, classes=3, noise=3.0)
    x, y = clusters(rng, 100, 64, classes=3, noise=3.0)
    nearest = knn_accuracy(bank, bank_y, x, y, k=1)
    assert knn_accuracy(bank, bank_y, x, y, k=20, temperature=temperature) == pytest.approx(
        nearest, abs=0.08 if temperature > 0.01 else 0.02
    )


def test_rows_of_zeros_give_no_nan() -> None:
    bank = torch.cat([torch.zeros(3, 4), torch.eye(4)])
    bank_y = torch.tensor([1, 1, 1, 0, 0, 2, 2])
    assert knn_accuracy(bank, bank_y, torch.eye(4), torch.tensor([0, 0, 2, 2]), k=1) == 1
    for leave_one_out in (False, True):
        assert 0 <= knn_accuracy(bank, bank_y, bank, bank_y, k=3, leave_one_out=leave_one_out) <= 1
    assert knn_accuracy(bank[:3], bank_y[:3], torch.zeros(2, 4), torch.tensor([1, 1]), k=2) == 1


def test_query_of_a_class_without_voters_counts_as_wrong() -> None:
    assert knn_accuracy(torch.eye(2), torch.tensor([0, 1]), torch.eye(2), torch.tensor([0, 7]), k=1) == 0.5


def test_rows_without_labels_neither_vote_nor_count(rng: np.random.Generator) -> None:
    bank, bank_y = clusters(rng, 60)
    x, y = clusters(rng, 40)
    expected = knn_accuracy(bank, bank_y, x, y, k=5)
    more_bank, more_y = torch.cat([x, bank]), torch.cat([torch.full((40,), -1), bank_y])
    assert knn_accuracy(more_bank, more_y, torch.cat([x, x]), torch.cat([y, torch.full((40,), -1)]), k=5) == expected
    mixed = torch.where(torch.arange(60) % 3 == 0, -1, bank_y)
    labelled = mixed >= 0
    assert knn_accuracy(bank, mixed, bank, mixed, k=5, leave_one_out=True) == knn_accuracy(
        bank[labelled], bank_y[labelled], bank[labelled], bank_y[labelled], k=5, leave_one_out=True
    )
    with pytest.raises(DataError, match="no labelled"):
        knn_accuracy(bank, torch.full((60,), -1), x, y)
    with pytest.raises(DataError, match="no labelled"):
        knn_accuracy(bank, bank_y, x, torch.full((40,), -1))
