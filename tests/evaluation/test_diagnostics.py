"""Embeddings compared with their target law, against scipy and numpy."""

import numpy as np
import oracles
import pytest
import torch
from scipy import stats

from rlpjepa_zoo.distributions import RectifiedGeneralizedGaussian, sigma_gn
from rlpjepa_zoo.evaluation.diagnostics import coordinate_distances, distance_floor, quantiles, selective_units


@pytest.mark.parametrize(("p", "mu"), [(1.0, -1.0), (2.0, 0.3), (0.7, -0.4)])
def test_quantiles_equal_scipy_and_numpy(p: float, mu: float, rng: np.random.Generator) -> None:
    sigma = sigma_gn(p)
    z = np.maximum(rng.normal(-0.2, 1.3, (300, 20)), 0).astype(np.float32)
    result = quantiles(z, RectifiedGeneralizedGaussian(mu, sigma, p))
    np.testing.assert_allclose(result.target, np.maximum(oracles.law(p, mu, sigma).ppf(1 - result.above), 0), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(result.measured, np.quantile(z, 1 - result.above, method="inverted_cdf"), rtol=1e-6)
    assert result.above.min() == pytest.approx(9.5 / z.size) and min(result.measured[-1], result.target[-1]) == 0
    assert (np.diff(result.measured) <= 0).all() and len(result.above) > 50


def test_draws_of_the_law_lie_on_the_diagonal_and_at_the_floor(rng: np.random.Generator) -> None:
    law = RectifiedGeneralizedGaussian(-1.0, sigma_gn(1.0), 1.0)
    z = law.sample((2000, 64), generator=torch.Generator().manual_seed(1)).numpy()
    result = quantiles(z, law)
    np.testing.assert_allclose(result.measured[40:], result.target[40:], rtol=0.03, atol=0.02)
    floor = distance_floor(2000, law)
    assert coordinate_distances(z, law).mean() == pytest.approx(floor, rel=0.1)
    assert coordinate_distances(2 * z, law).min() > 2 * floor


def test_coordinate_distances_equal_scipy(rng: np.random.Generator) -> None:
    law = RectifiedGeneralizedGaussian(-0.5, sigma_gn(2.0), 2.0)
    z = np.maximum(rng.normal(0, 1, (150, 4)), 0)
    fine = np.maximum(stats.norm(-0.5, 1).ppf((np.arange(200_000) + 0.5) / 200_000), 0)
    exact = [stats.wasserstein_distance(column, fine) for column in z.T]
    np.testing.assert_allclose(coordinate_distances(z, law), exact, atol=0.01)


def test_selective_units_are_alive_and_spread_over_classes(rng: np.random.Generator) -> None:
    labels = np.repeat(np.arange(5), 20)
    z = rng.random((100, 40)).astype(np.float32)
    z[:, 0] = 0
    for unit in range(1, 21):
        z[labels == unit % 5, unit] += 5  # sees one class
    chosen = selective_units(z, labels)
    classes = [unit % 5 for unit, _ in chosen]
    assert len(chosen) == 10 and all(1 <= unit <= 20 for unit, _ in chosen) and max(map(classes.count, range(5))) == 2
    for unit, rows in chosen:
        assert rows == np.argsort(-z[:, unit], kind="stable")[:8].tolist()
    assert len(selective_units(z, None)) == 12
    assert selective_units(np.zeros((9, 3), np.float32), labels[:9]) == []
