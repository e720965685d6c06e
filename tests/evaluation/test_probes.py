"""The protocols of frozen evaluation against float64 loops, scikit-learn and scipy, on dense and on sparse rows."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.sparse import csr_array, csr_matrix
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, mutual_info_score, normalized_mutual_info_score
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from rlpjepa_zoo.errors import DataError, UsageError
from rlpjepa_zoo.evaluation import probes
from rlpjepa_zoo.evaluation.probes import (  # fmt: skip
    choose_c,
    clustering,
    few_shot,
    few_shot_shares,
    held_out,
    knn,
    knn_accuracy,
    linear,
    mlp,
    paired,
    retrieval,
    retrieval_each,
    rows,
    unit,
)
from rlpjepa_zoo.evaluation.protocol import PROBES, Protocol, accuracy_table, measure
from rlpjepa_zoo.sparse.embeddings import SparseEmbeddings

Array = np.ndarray[Any, Any]


def clusters(rng: np.random.Generator, n: int = 120, d: int = 12, classes: int = 4, noise: float = 1.2) -> tuple[Tensor, Tensor]:
    y = rng.integers(0, classes, n)
    centres = np.random.default_rng(1).normal(size=(classes, d))
    return torch.from_numpy(centres[y] + noise * rng.normal(size=(n, d))).float(), torch.from_numpy(y)


def codes(rng: np.random.Generator, n: int = 120, d: int = 40, classes: int = 4, noise: float = 0.8) -> tuple[Array, Array]:
    """Sparse and non-negative rows, about a sixth of them non-zeros, and labels."""
    x, y = clusters(rng, n, d, classes, noise)
    return np.maximum(x.numpy() - 1.3, 0), y.numpy()


def sparse(x: Array) -> SparseEmbeddings:
    return SparseEmbeddings.from_dense(x)


# --- representations ----------------------------------------------------------------------------------------------------------------


def test_rows_become_float32_and_stay_sparse_where_that_is_the_faster_form(rng: np.random.Generator) -> None:
    x, _ = codes(rng)
    assert 0.05 < (x != 0).mean() < 0.25
    kept = [rows(form) for form in (sparse(x), csr_matrix(x.astype(np.float64)), csr_array(x).tocsc())]
    assert all(type(form) is csr_array and form.dtype == np.float32 and np.array_equal(form.toarray(), x) for form in kept)
    filled = np.where(rng.random(x.shape) < 0.5, 1.0, 0.0)
    for form in (csr_array(filled), filled, torch.from_numpy(filled), filled.tolist()):
        assert type(rows(form)) is np.ndarray and rows(form).dtype == np.float32 and np.array_equal(rows(form), filled)
    with pytest.raises(UsageError, match=r"\(n, C\)"):
        rows(np.zeros(3))


def test_a_large_dense_matrix_in_csr_stays_csr(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    filled = csr_array(rng.random((20, 10)))
    assert type(rows(filled)) is np.ndarray
    monkeypatch.setattr(probes, "DENSE_SIZE", 199)
    assert type(rows(filled)) is csr_array


def test_unit_rows_have_length_one_also_when_their_squares_overflow_or_vanish(rng: np.random.Generator) -> None:
    x, _ = codes(rng)
    x[3] = 0
    x[4] *= 1e-25 / max(x[4].max(), 1e-9)
    x[5] *= 1e25 / max(x[5].max(), 1e-9)
    for form in (unit(x), unit(sparse(x)).toarray()):
        length = np.sqrt(np.square(form, dtype=np.float64).sum(1))
        assert length[3] == 0 and np.allclose(length[np.abs(x).max(1) > 0], 1, atol=1e-6)


def test_the_scale_is_the_deviation_of_all_numbers_around_the_means_of_their_columns(rng: np.random.Generator) -> None:
    x, _ = codes(rng)
    expected = np.sqrt(np.square(x.astype(np.float64) - x.mean(0, dtype=np.float64)).mean())
    assert probes._scale(x) == pytest.approx(expected, rel=1e-9) and probes._scale(rows(sparse(x))) == pytest.approx(expected, rel=1e-6)


def test_products_come_in_tiles_of_bounded_size(rng: np.random.Generator) -> None:
    x, _ = codes(rng, 70)
    for bank in (x, rows(sparse(x))):
        for queries in (x, rows(sparse(x))):
            parts = list(probes._tiles(queries, bank, 1000))
            assert len(parts) == 5 and all(part.numel() <= 1000 for _, part in parts)
            assert [start for start, _ in parts] == [0, 14, 28, 42, 56]
            assert np.allclose(torch.cat([part for _, part in parts]).numpy(), x @ x.T, rtol=1e-4, atol=1e-5)
    assert [part.shape for _, part in probes._tiles(x[:2], x, 10)] == [(1, 70), (1, 70)]


def test_a_sparse_matrix_is_never_made_dense_as_a_whole(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    (x, y), (test_x, test_y) = codes(rng, 400), codes(rng, 300)
    sizes: list[int] = []
    original = csr_array.toarray

    def watched(self: Any, *given: Any, **options: Any) -> Any:
        sizes.append(math.prod(self.shape))
        return original(self, *given, **options)

    monkeypatch.setattr(csr_array, "toarray", watched)
    monkeypatch.setattr(csr_array, "todense", watched)
    monkeypatch.setattr(probes, "TILE", 4000)
    protocol = Protocol(("all",), (1, 2), seeds=1, draws=3)
    found = measure(sparse(x), y, sparse(test_x), test_y, protocol)
    assert sizes and max(sizes) <= 4000 and not found.skipped
    monkeypatch.undo()
    whole = measure(sparse(x), y, sparse(test_x), test_y, protocol)
    assert found.mean == pytest.approx(whole.mean, abs=1e-9)


def test_held_out_images_are_a_share_of_each_class(rng: np.random.Generator) -> None:
    y = rng.permutation(np.repeat([0, 1, 2, 3, 9], [50, 10, 2, 1, 7]))
    chosen = held_out(y, 0.2)
    assert [int(chosen[y == c].sum()) for c in (0, 1, 2, 3, 9)] == [10, 2, 1, 0, 1]
    assert np.array_equal(chosen, held_out(y, 0.2)) and not np.array_equal(chosen, held_out(y, 0.2, seed=1))
    assert not np.array_equal(chosen, held_out(y, 0.2, purpose="another")) and held_out(y, 0.99)[y == 2].sum() == 1


# --- kNN ----------------------------------------------------------------------------------------------------------------------------


def loop_knn(bank: Array, bank_y: Array, x: Array, k: int, temperature: float, leave_one_out: bool = False) -> list[int]:
    """In float64, one query after the other; stable in ties."""
    b, q = np.asarray(bank, np.float64), np.asarray(x, np.float64)
    found = []
    for i, query in enumerate(q):
        lengths = np.linalg.norm(b, axis=1) * np.linalg.norm(query)
        cosine = np.divide(b @ query, lengths, out=np.zeros(len(b)), where=lengths > 0)
        order = [j for j in np.argsort(-cosine, kind="stable") if not (leave_one_out and j == i)][:k]
        votes = np.zeros(int(bank_y.max()) + 1)
        for j in order:
            votes[bank_y[j]] += math.exp(cosine[j] / temperature)
        found.append(int(votes.argmax()))
    return found


@pytest.mark.parametrize("form", [np.asarray, sparse], ids=["dense", "sparse"])
@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("k", [1, 7, 20])
def test_knn_predicts_what_a_float64_loop_predicts(rng: np.random.Generator, form: Callable[..., Any], leave_one_out: bool, k: int) -> None:
    bank, bank_y = codes(rng, noise=1.5)
    bank[7] = 0
    x = bank if leave_one_out else codes(rng, 80, noise=1.5)[0]
    expected = loop_knn(bank, bank_y, x, k, 0.07, leave_one_out)
    assert knn(form(bank), bank_y, form(x), k, 0.07, leave_one_out).tolist() == expected
    assert len(set(expected)) == 4


@pytest.mark.parametrize("form", [np.asarray, sparse], ids=["dense", "sparse"])
def test_of_equally_near_rows_the_lower_ones_vote(form: Callable[..., Any]) -> None:
    bank = np.zeros((40, 5), np.float32)
    bank[:, 0] = np.linspace(1, 2, 40)  # one direction: all cosines are 1
    bank[::4] = [0, 3, 0, 0, 0]
    y = np.where(np.arange(40) < 14, 1, 0)
    queries = np.array([[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 1]], np.float32)
    for k in (1, 5, 10, 19, 20, 25, 33):
        assert knn(form(bank), y, form(queries), k).tolist() == loop_knn(bank, y, queries, k, 0.07)


def test_knn_of_one_neighbour_is_the_vote_of_scikit_learn(rng: np.random.Generator) -> None:
    bank, bank_y = clusters(rng)
    x, y = clusters(rng, 80)
    other = KNeighborsClassifier(1, metric="cosine", algorithm="brute").fit(bank.numpy(), bank_y.numpy())
    assert knn_accuracy(bank, bank_y, x, y, k=1) == pytest.approx(other.score(x.numpy(), y.numpy()), abs=1e-12)


def test_knn_works_through_more_queries_than_a_block(rng: np.random.Generator) -> None:
    bank, bank_y = clusters(rng, 1300, 4)
    other = KNeighborsClassifier(2, metric="cosine", algorithm="brute").fit(bank.numpy(), bank_y.numpy())
    second = other.kneighbors(bank.numpy(), return_distance=False)[:, 1]
    found = knn_accuracy(bank, bank_y, bank, bank_y, k=1, leave_one_out=True)
    assert found == pytest.approx(float((bank_y[second] == bank_y).float().mean()), abs=2 / 1300)


def test_leave_one_out_never_votes_for_itself() -> None:
    x = torch.eye(6) + 0.01
    y = torch.arange(6)
    assert knn_accuracy(x, y, x, y, k=1) == 1
    assert knn_accuracy(x, y, x, y, k=1, leave_one_out=True) == 0
    assert knn_accuracy(x, y, x, y, k=100, leave_one_out=True) == 0


def test_a_single_image_has_nobody_to_vote_for_it() -> None:
    x, y = torch.ones(1, 3), torch.zeros(1, dtype=torch.long)
    with pytest.raises(DataError, match="kNN: a single labelled image has nobody to vote for it"):
        knn_accuracy(x, y, x, y, leave_one_out=True)
    assert knn_accuracy(x, y, x, y) == 1


def test_knn_takes_every_voter_when_k_is_larger_than_the_bank(rng: np.random.Generator) -> None:
    bank, bank_y = clusters(rng, 10)
    x, y = clusters(rng, 30)
    assert knn_accuracy(bank, bank_y, x, y, k=1000) == knn_accuracy(bank, bank_y, x, y, k=10)


@pytest.mark.parametrize("temperature", [0.03, 0.005, 1e-4])
def test_knn_of_a_low_temperature_is_the_vote_of_the_nearest(rng: np.random.Generator, temperature: float) -> None:
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


def test_unknown_labels_neither_vote_nor_count(rng: np.random.Generator) -> None:
    bank, bank_y = clusters(rng, 60)
    x, y = clusters(rng, 40)
    expected = knn_accuracy(bank, bank_y, x, y, k=5)
    more_bank, more_y = torch.cat([x, bank]), torch.cat([torch.full((40,), -1), bank_y])
    assert knn_accuracy(more_bank, more_y, torch.cat([x, x]), torch.cat([y, torch.full((40,), -1)]), k=5) == expected
    mixed = torch.where(torch.arange(60) % 3 == 0, -1, bank_y)
    kept = mixed >= 0
    assert knn_accuracy(bank, mixed, bank, mixed, k=5, leave_one_out=True) == knn_accuracy(
        bank[kept], bank_y[kept], bank[kept], bank_y[kept], k=5, leave_one_out=True
    )
    with pytest.raises(DataError, match="no labelled"):
        knn_accuracy(bank, torch.full((60,), -1), x, y)
    with pytest.raises(DataError, match="no labelled"):
        knn_accuracy(bank, bank_y, x, torch.full((40,), -1))


def test_queries_of_a_class_without_voters_count_as_wrong() -> None:
    assert knn_accuracy(torch.eye(2), torch.tensor([0, 1]), torch.eye(2), torch.tensor([0, 7]), k=1) == 0.5


# --- linear probe -------------------------------------------------------------------------------------------------------------------


def scaled(x: Array, test_x: Array) -> tuple[Array, Array]:
    deviation = np.sqrt(np.square(x - x.mean(0)).mean())
    return x / deviation, test_x / deviation


@pytest.mark.parametrize("c", [0.01, 1.0])
def test_linear_probe_is_that_of_scikit_learn_on_dense_rows(rng: np.random.Generator, c: float) -> None:
    (x, y), (test_x, _) = codes(rng, 200), codes(rng, 400)
    ready, ready_test = scaled(x.astype(np.float64), test_x.astype(np.float64))
    other = LogisticRegression(C=c, max_iter=1000, tol=1e-8).fit(ready, y).predict(ready_test)
    for form in (np.asarray, sparse):
        assert (linear(form(x), y, form(test_x), c) == other).mean() >= 0.995


def test_linear_probe_reaches_the_optimum_of_its_objective(rng: np.random.Generator) -> None:
    (x, y), (test_x, _) = codes(rng, 150, 8, 3), codes(rng, 400, 8, 3)
    ready, ready_test = scaled(x.astype(np.float64), test_x.astype(np.float64))
    c, target = 0.1, np.eye(3)[y]

    def objective(flat: Array) -> tuple[float, Array]:
        w, b = flat[:24].reshape(8, 3), flat[24:]
        logits = ready @ w + b
        top = logits.max(1, keepdims=True)
        log_sum = top[:, 0] + np.log(np.exp(logits - top).sum(1))
        rest = np.exp(logits - log_sum[:, None]) - target
        gradient = np.concatenate([(w + c * ready.T @ rest).ravel(), c * rest.sum(0)])
        return float(0.5 * np.square(w).sum() + c * (log_sum - logits[np.arange(len(y)), y]).sum()), gradient

    best = minimize(objective, np.zeros(27), jac=True, method="BFGS", options={"gtol": 1e-8}).x
    logits = ready_test @ best[:24].reshape(8, 3) + best[24:]
    clear = np.sort(logits, axis=1)[:, -1] - np.sort(logits, axis=1)[:, -2] > 0.02
    for form in (np.asarray, sparse):
        assert np.array_equal(linear(form(x), y, form(test_x), c)[clear], logits.argmax(1)[clear]) and clear.mean() > 0.9


def test_c_is_the_best_of_the_grid_on_held_out_images(rng: np.random.Generator) -> None:
    x, y = clusters(rng, 300, 30, noise=3.0)
    scores = {}
    out = held_out(y, 0.2)
    train, test = scaled(x.numpy()[~out], x.numpy()[out])
    for c in probes.GRID:
        scores[c] = LogisticRegression(C=c, max_iter=1000).fit(train, y.numpy()[~out]).score(test, y.numpy()[out])
    chosen = choose_c(x, y)
    assert chosen < 1 and scores[chosen] >= max(scores.values()) - 1 / out.sum() and len(set(scores.values())) > 2
    assert choose_c(x, y, (0.3,)) == 0.3 and choose_c(x, y, (100.0, 1000.0)) in (100.0, 1000.0)
    assert choose_c(x, y, seed=0) == chosen


def test_the_grid_is_left_after_two_worse_ones(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = clusters(rng, 300, 30, noise=3.0)
    tried = []
    original = probes._fit
    monkeypatch.setattr(probes, "_fit", lambda probe, *given: tried.append(probe.C) or original(probe, *given))
    chosen = choose_c(x, y, (0.001, 0.01, 1.0, 10.0, 100.0, 1000.0, 10000.0))
    assert tried[0] == 0.001 and tried[-1] < 10000 and tried[-3] == chosen


def test_linear_probe_does_not_depend_on_the_scale_of_the_rows(rng: np.random.Generator) -> None:
    (x, y), (test_x, _) = clusters(rng, 150), clusters(rng, 100)
    found = linear(x, y, test_x)
    for scale in (1e-6, 1e6):
        assert (linear(scale * x, y, scale * test_x) == found).mean() >= 0.98


def test_linear_probe_needs_two_classes_and_survives_rows_of_zeros(rng: np.random.Generator) -> None:
    x, y = clusters(rng, 50)
    for probe in (lambda: linear(x, np.zeros(50), x), lambda: choose_c(x, np.zeros(50))):
        with pytest.raises(DataError, match="two classes"):
            probe()
    with pytest.raises(DataError, match="C cannot be chosen"):
        choose_c(x[:3], [0, 1, 2])
    assert set(linear(np.zeros((20, 3)), np.arange(20) % 2, np.zeros((4, 3)))) <= {0, 1}


# --- few-shot -----------------------------------------------------------------------------------------------------------------------


def former_one_shot(x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor, draws: int, seed: int) -> list[float]:
    """What the first version of the package computed."""
    from rlpjepa_zoo.core import rng as streams

    members = [torch.nonzero(y == c).flatten() for c in y.unique()]
    cosine = torch.nn.functional.normalize(test_x.double()) @ torch.nn.functional.normalize(x.double()).T
    scores = []
    for draw in range(draws):
        source = streams.generator(seed, "one-shot", draw)
        chosen = torch.stack([m[torch.randint(len(m), (1,), generator=source)] for m in members]).flatten()
        scores.append(float((y[chosen][cosine[:, chosen].argmax(1)] == test_y).double().mean()))
    return scores


@pytest.mark.parametrize("seed", [0, 3])
def test_one_shot_is_what_it_was(rng: np.random.Generator, seed: int) -> None:
    (x, y), (test_x, test_y) = clusters(rng, 90), clusters(rng, 70)
    found = few_shot(x, y, test_x, test_y, draws=30, seed=seed)
    assert np.allclose(found, former_one_shot(x, y, test_x, test_y, 30, seed), atol=1e-12) and found.std() > 0


@pytest.mark.parametrize("form", [np.asarray, sparse], ids=["dense", "sparse"])
@pytest.mark.parametrize("shots", [2, 5])
def test_few_shot_is_the_nearest_mean_of_unit_rows(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, form: Callable[..., Any], shots: int
) -> None:
    (x, y), (test_x, test_y) = codes(rng), codes(rng, 50)
    drawn = []
    original = probes._draw
    monkeypatch.setattr(probes, "_draw", lambda *given: drawn.append(original(*given)) or drawn[-1])
    found = few_shot(form(x), y, form(test_x), test_y, shots, draws=6)
    assert len(drawn) == 6 and len({tuple(picks.ravel()) for picks in drawn}) == 6
    for picks, score in zip(drawn, found, strict=True):
        assert all(len(set(picks[c])) == shots and set(y[picks[c]]) == {c} for c in range(4))
        right = 0
        for query, label in zip(test_x.astype(np.float64), test_y, strict=True):
            cosines = []
            for c in range(4):
                mean = np.mean([row / max(np.linalg.norm(row), 1e-300) for row in x[picks[c]].astype(np.float64)], axis=0)
                cosines.append(mean @ query / max(np.linalg.norm(mean) * np.linalg.norm(query), 1e-300))
            right += int(np.argmax(cosines) == label)
        assert score == pytest.approx(right / 50, abs=1e-12)


@pytest.mark.parametrize("shots", [1, 3])
def test_the_share_of_each_image_is_that_of_the_draws_that_classify_it_rightly(rng: np.random.Generator, shots: int) -> None:
    (x, y), (test_x, test_y) = codes(rng), codes(rng, 50)
    scores, shares = few_shot_shares(x, y, test_x, test_y, shots, draws=8)
    alone = [few_shot(x, y, test_x[i : i + 1], test_y[i : i + 1], shots, draws=8).mean() for i in range(50)]
    assert shares.tolist() == pytest.approx(alone, abs=1e-12) and 0 < shares.std()
    assert shares.mean() == pytest.approx(scores.mean(), abs=1e-12)


def test_few_shot_makes_the_same_draws_whatever_the_representation(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = clusters(rng)
    drawn = []
    original = probes._draw
    monkeypatch.setattr(probes, "_draw", lambda *given: drawn.append(original(*given).tolist()) or np.array(drawn[-1]))
    for form, seed in ((x, 0), (torch.randn(120, 3), 0), (x, 1)):
        few_shot(form, y, form, y, 3, draws=4, seed=seed)
    assert drawn[:4] == drawn[4:8] and drawn[:4] != drawn[8:]


def test_few_shot_leaves_the_global_generator_alone_and_refuses_too_few_images(rng: np.random.Generator) -> None:
    x, y = clusters(rng)
    state = torch.get_rng_state()
    assert np.array_equal(few_shot(x, y, x, y, 5, draws=5), few_shot(x, y, x, y, 5, draws=5)) and torch.equal(torch.get_rng_state(), state)
    fewest = int(np.bincount(y).min())
    with pytest.raises(DataError, match=f"class {int(np.bincount(y).argmin())} has {fewest} training images"):
        few_shot(x, y, x, y, fewest + 1)
    for given in ((x[:0], y[:0], x, y), (x, y, x[:0], y[:0])):
        with pytest.raises(DataError, match="no labelled images"):
            few_shot(*given)
    assert few_shot(np.zeros((8, 3)), np.arange(8) % 2, np.zeros((8, 3)), np.arange(8) % 2, draws=5).tolist() == [0.5] * 5


# --- MLP, retrieval, clustering -----------------------------------------------------------------------------------------------------


def test_mlp_solves_what_no_linear_probe_can(rng: np.random.Generator) -> None:
    x = rng.uniform(0.2, 1, (600, 2)) * rng.choice([-1, 1], (600, 2))
    y = (x[:, 0] * x[:, 1] > 0).astype(int)
    assert (mlp(x[:400], y[:400], x[400:]) == y[400:]).mean() > 0.95 > 0.7 > (linear(x[:400], y[:400], x[400:]) == y[400:]).mean()
    assert np.array_equal(mlp(x[:100], y[:100], x), mlp(x[:100], y[:100], x))


@pytest.mark.parametrize("form", [np.asarray, sparse], ids=["dense", "sparse"])
def test_mean_average_precision_is_that_of_scikit_learn(rng: np.random.Generator, form: Callable[..., Any]) -> None:
    (x, y), (test_x, test_y) = codes(rng, 90, 200), codes(rng, 40, 200)
    for part in (x, test_x):
        part[:, 0] = rng.uniform(1, 2, len(part))  # no two rows are orthogonal, so no two cosines are equal
    a, b = x.astype(np.float64), test_x.astype(np.float64)
    cosine = (b / np.linalg.norm(b, axis=1, keepdims=True)) @ (a / np.linalg.norm(a, axis=1, keepdims=True)).T
    assert all(len(set(row.round(9))) == 90 for row in cosine)  # distinct, so that the ranking is one
    found = retrieval(form(x), y, form(test_x), test_y)
    assert found.map == pytest.approx(
        np.mean([average_precision_score(y == c, row) for c, row in zip(test_y, cosine, strict=True)]), abs=1e-5
    )
    order = np.argsort(-cosine, axis=1)
    for n, value in ((1, found.precision_at_1), (10, found.precision_at_10)):
        assert value == pytest.approx((y[order[:, :n]] == test_y[:, None]).mean(), abs=1e-9)
    assert found.queries == 40 and 0.3 < found.map < 1


def test_retrieval_breaks_ties_by_row_and_counts_queries_without_a_right_row_as_zero() -> None:
    x = np.tile([[1.0, 0.0]], (4, 1))
    assert retrieval(x, [0, 0, 1, 1], x[:1], [0]).map == 1 and retrieval(x, [1, 1, 0, 0], x[:1], [0]).map == pytest.approx(
        (1 / 3 + 2 / 4) / 2
    )
    assert retrieval(x, [1, 1, 0, 0], np.zeros((1, 2)), [1]).map == 1
    assert retrieval(x, [0, 0, 1, 1], x[:2], [0, 5]).map == 0.5


def test_the_average_precision_of_each_query_is_that_of_scikit_learn(rng: np.random.Generator) -> None:
    (x, y), (test_x, test_y) = codes(rng, 90, 200), codes(rng, 40, 200)
    x[:, 0], test_x[:, 0] = rng.uniform(1, 2, 90), rng.uniform(1, 2, 40)
    a, b = x.astype(np.float64), test_x.astype(np.float64)
    cosine = (b / np.linalg.norm(b, axis=1, keepdims=True)) @ (a / np.linalg.norm(a, axis=1, keepdims=True)).T
    found = retrieval_each(x, y, test_x, test_y)
    assert found[0].tolist() == pytest.approx(
        [average_precision_score(y == c, row) for c, row in zip(test_y, cosine, strict=True)], abs=1e-5
    )


def test_retrieval_asks_a_random_part_of_many_queries(rng: np.random.Generator) -> None:
    (x, y), (test_x, test_y) = codes(rng), codes(rng, 300)
    part, again, other, whole = (retrieval(x, y, test_x, test_y, *given) for given in ((100,), (100,), (100, 1), ()))
    assert part == again != other and part.queries == 100 and whole.queries == 300 == retrieval(x, y, test_x, test_y, 500).queries
    assert part.map == pytest.approx(whole.map, abs=0.05)


def test_clustering_is_scored_by_normalised_mutual_information(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = codes(rng, 200, 40, noise=1.0)
    seen = {}
    original = probes._fit
    monkeypatch.setattr(probes, "_fit", lambda *given: seen.setdefault("fit", original(*given)))
    found = clustering(x, y)
    labels = seen["fit"].labels_
    counts = [np.bincount(part) / len(part) for part in (labels, y)]
    entropies = [-(share[share > 0] * np.log(share[share > 0])).sum() for share in counts]
    assert found == pytest.approx(mutual_info_score(y, labels) / np.mean(entropies), abs=1e-9)
    assert found == pytest.approx(normalized_mutual_info_score(y, labels), abs=1e-12) and 0.2 < found < 1
    assert len(set(labels)) == 4 and seen["fit"].cluster_centers_.shape == (4, 40)


# --- paired differences -------------------------------------------------------------------------------------------------------------


def test_the_interval_of_a_difference_is_that_of_resampled_images(rng: np.random.Generator) -> None:
    a, b = rng.random(300) < 0.7, rng.random(300) < 0.6
    found = paired(a, b)
    means = [float((a[i].astype(float) - b[i]).mean()) for i in rng.integers(0, 300, (20_000, 300))]
    assert found["difference"] == pytest.approx(a.mean() - b.mean(), abs=1e-12) and found["n"] == 300
    assert [found["low"], found["high"]] == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.006)
    assert paired(a, b) == found
    assert paired(rng.random(300), b) != paired(rng.random(300), b, seed=1)


def test_intervals_hold_the_true_difference_in_95_of_100_cases(rng: np.random.Generator) -> None:
    inside = 0
    for case in range(400):  # two classifiers that are right together more often than by chance
        both, first, second = rng.random((3, 200))
        a, b = (both < 0.5) | (first < 0.4), (both < 0.5) | (second < 0.3)
        found = paired(a, b, seed=case, resamples=2000)
        inside += found["low"] <= 0.5 * (0.4 - 0.3) <= found["high"]
    assert 0.92 <= inside / 400 <= 0.98


def test_many_different_values_are_resampled_in_parts_as_at_once(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = rng.random((2, 60))
    whole = paired(a, b)
    monkeypatch.setattr(probes, "TILE", 60 * 300)
    assert paired(a, b) == whole


def test_pairing_makes_intervals_of_alike_classifiers_narrow(rng: np.random.Generator) -> None:
    a = rng.random(500) < 0.6
    b = np.where(np.arange(500) < 5, ~a, a)
    found = paired(a, b)
    assert found["high"] - found["low"] < 0.03
    thirds = paired(np.full(30, 2 / 3), np.full(30, 1 / 3))
    assert (thirds["low"], thirds["high"]) == pytest.approx((1 / 3, 1 / 3))


# --- all of them --------------------------------------------------------------------------------------------------------------------


def test_every_protocol_gives_the_same_on_sparse_and_on_dense_rows(rng: np.random.Generator) -> None:
    (x, y), (test_x, test_y) = codes(rng, 200), codes(rng, 150)
    protocol = Protocol(("all",), (1, 5), seeds=2, draws=20)
    a, b = measure(x, y, test_x, test_y, protocol), measure(sparse(x), y, sparse(test_x), test_y, protocol)
    assert set(a.mean) == {"knn", "linear", "one_shot", "shot_5", "mlp", "map", "precision_at_1", "precision_at_10", "nmi"} == set(b.mean)
    near = {"linear": 0.02, "mlp": 0.02, "nmi": 0.05}  # k-means from centres that differ by rounding may end elsewhere
    for name, value in a.mean.items():
        assert b.mean[name] == pytest.approx(value, abs=near.get(name, 1e-6)), name
    assert set(a.spread) == {"linear", "one_shot", "shot_5", "mlp", "nmi"} and len(a.chosen_c) == 2


def test_what_is_separable_is_separated(rng: np.random.Generator) -> None:
    y = rng.permutation(np.repeat(np.arange(4), 30))
    x = np.eye(4, 20, dtype=np.float32)[y] + np.where(rng.random((120, 20)) < 0.1, 0.01, 0).astype(np.float32)
    for form in (np.asarray, sparse):
        found = measure(form(x), y, form(x), y, Protocol(("all",), (1, 5), seeds=1))
        assert {name: round(value, 9) for name, value in found.mean.items() if name != "nmi"} == dict.fromkeys(
            set(found.mean) - {"nmi"}, 1.0
        )
        best = max(clustering(form(x), y, seed) for seed in range(8))
        assert best == pytest.approx(1.0)  # one start of k-means may end in a poorer optimum


def test_shuffled_labels_give_chance(rng: np.random.Generator) -> None:
    (x, y), (test_x, test_y) = codes(rng, 400, noise=0.3), codes(rng, 400, noise=0.3)
    found = measure(x, rng.permutation(y), test_x, rng.permutation(test_y), Protocol(("all",), (1, 10), seeds=1)).mean
    assert found.pop("nmi") < 0.05
    for name, value in found.items():
        assert abs(value - 0.25) < 0.1, name


def test_rows_without_a_label_take_no_part(rng: np.random.Generator) -> None:
    x, y = codes(rng)
    more, labels = np.concatenate([x, 9 * np.ones((9, 40), np.float32)]), np.concatenate([y, np.full(9, -1)])
    protocol = Protocol(("all",), (1,), seeds=1, draws=5)
    for form in (np.asarray, sparse):
        assert measure(form(more), labels, form(more), labels, protocol).mean == measure(form(x), y, form(x), y, protocol).mean
    for pair in ((labels * 0 - 1, labels), (labels, labels * 0 - 1)):
        with pytest.raises(DataError, match="no labelled images"):
            measure(more, pair[0], more, pair[1], protocol)


def test_what_cannot_be_measured_is_left_out_with_its_reason(rng: np.random.Generator) -> None:
    x, y = codes(rng, 40)
    found = measure(x, y, x, y, Protocol(shots=(1, 500)))
    assert "one_shot" in found.mean and "shot_500" not in found.mean and "training images" in found.skipped["shot_500"]
    alone = measure(x[:3], np.arange(3), x, y, Protocol(("linear", "knn")))
    assert set(alone.mean) == {"knn"} and "held-out" in alone.skipped["linear"]


def test_a_protocol_says_what_it_does() -> None:
    text = Protocol(("all",), (1, 5), seeds=4, k=9, queries=50).describe(images=7, queries=80)
    for words in (
        "k = 7",
        "T = 0.07",
        "0.0001, 0.001",
        "1, 5-shot",
        "mean of 400 draws",
        "layer of 256",
        "50 test images drawn at random",
        "4 seeds",
    ):
        assert words in text, words
    assert (
        Protocol(("linear",), grid=(1.0,), seeds=1).describe(9, 9) == "linear: logistic regression, L-BFGS of at most 300 iterations, C = 1"
    )
    assert len(PROBES) == len(text.replace("(±", "").split("; "))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"probes": ("knm",)}, "Did you mean 'knn'"), ({"probes": ("zzz",)}, "Known probes: knn"), ({"probes": ()}, "at least one"),
        ({"shots": (0, 1)}, "shots: expected"), ({"shots": ()}, "got none"), ({"seeds": 0}, "seeds: expected >= 1"), ({"k": 0}, "k: expected"),
        ({"temperature": 0.0}, "temperature"), ({"grid": ()}, "grid"), ({"queries": -1}, "queries"),
    ],
)  # fmt: skip
def test_a_protocol_that_cannot_be_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Protocol(**options)


def test_scikit_learn_is_quiet_when_it_stops_early(rng: np.random.Generator) -> None:
    x, y = clusters(rng, 100, 50, noise=3.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        linear(x, y, x, c=1e4, max_iter=2)


def test_the_table_shows_what_was_measured() -> None:
    report = {
        "n_train": 5, "n_test": 4, "protocol": "so", "knn_z": 0.5, "shot_5_z": 0.25, "knn_pixels": 0.75, "skipped": {"shot_10": "too few"},
        "curve": {"active": [1, 2], "knn": [0.1, 0.2]},
        "against": {"other": {"knn_features": 0.125, "differences": [
            {"measure": "knn", "space": "z", "minus": "features", "difference": 0.375, "low": 0.1, "high": 0.6, "n": 4}]}},
    }  # fmt: skip
    text = accuracy_table(report)
    for words in ("kNN", "5-shot", "0.500", "0.750", "0.125", "other:", "+0.375 (95 % +0.100 to +0.600, n = 4)", "too few", "active of z"):
        assert words in text, words
