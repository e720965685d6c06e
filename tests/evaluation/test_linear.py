"""The linear probe and the choice of its C, against scikit-learn and scipy."""

import numpy as np
import pytest
from clusters import Array, clusters, codes, sparse
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression

from rlpjepa_zoo.errors import DataError
from rlpjepa_zoo.evaluation.probes.base import fit, held_out
from rlpjepa_zoo.evaluation.probes.linear import GRID, choose_c, linear


def scaled(x: Array, test_x: Array) -> tuple[Array, Array]:
    deviation = np.sqrt(np.square(x - x.mean(0)).mean())
    return x / deviation, test_x / deviation


@pytest.mark.parametrize("c", [0.01, 1.0])
def test_linear_probe_equals_scikit_learn_on_scaled_rows(rng: np.random.Generator, c: float) -> None:
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


def test_chosen_c_is_the_best_on_held_out_rows(rng: np.random.Generator) -> None:
    x, y = clusters(rng, 300, 30, noise=3.0)
    scores = {}
    out = held_out(y, 0.2)
    train, test = scaled(x.numpy()[~out], x.numpy()[out])
    for c in GRID:
        scores[c] = LogisticRegression(C=c, max_iter=1000).fit(train, y.numpy()[~out]).score(test, y.numpy()[out])
    chosen = choose_c(x, y)
    assert chosen < 1 and scores[chosen] >= max(scores.values()) - 1 / out.sum() and len(set(scores.values())) > 2
    assert choose_c(x, y, (0.3,)) == 0.3 and choose_c(x, y, (100.0, 1000.0)) in (100.0, 1000.0)
    assert choose_c(x, y, seed=0) == chosen


def test_search_for_c_stops_after_two_worse_values(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = clusters(rng, 300, 30, noise=3.0)
    tried = []
    monkeypatch.setattr(f"{choose_c.__module__}.fit", lambda probe, *given: tried.append(probe.C) or fit(probe, *given))
    chosen = choose_c(x, y, (0.001, 0.01, 1.0, 10.0, 100.0, 1000.0, 10000.0))
    assert tried[0] == 0.001 and tried[-1] < 10000 and tried[-3] == chosen


def test_linear_probe_does_not_depend_on_the_scale_of_rows(rng: np.random.Generator) -> None:
    (x, y), (test_x, _) = clusters(rng, 150), clusters(rng, 100)
    predicted = linear(x, y, test_x)
    for scale in (1e-6, 1e6):
        assert (linear(scale * x, y, scale * test_x) == predicted).mean() >= 0.98


def test_linear_probe_needs_two_classes_and_accepts_zero_rows(rng: np.random.Generator) -> None:
    x, y = clusters(rng, 50)
    for probe in (lambda: linear(x, np.zeros(50), x), lambda: choose_c(x, np.zeros(50))):
        with pytest.raises(DataError, match="two classes"):
            probe()
    with pytest.raises(DataError, match="C cannot be chosen"):
        choose_c(x[:3], [0, 1, 2])
    assert set(linear(np.zeros((20, 3)), np.arange(20) % 2, np.zeros((4, 3)))) <= {0, 1}
