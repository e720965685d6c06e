"""Densities and moments of embeddings against numpy and theory, and the alarms."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from rlpjepa_zoo.distributions import RectifiedGeneralizedGaussian, sigma_gn
from rlpjepa_zoo.evaluation.metrics import alarms, batch_metrics, covariance, dead, l0, l1, variance

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def codes(rng: np.random.Generator, n: int = 60, d: int = 17) -> Tensor:
    return torch.from_numpy(np.maximum(rng.normal(-0.3, 1, (n, d)), 0))


# --- densities ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_hot_rows_have_density_one_over_d(dtype: torch.dtype) -> None:
    z = (torch.eye(8) * torch.arange(1, 9)).to(dtype)
    assert float(l0(z)) == pytest.approx(1 / 8, rel=1e-6) and float(l1(z)) == pytest.approx(1 / 8, rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_constant_rows_have_density_one(dtype: torch.dtype) -> None:
    z = torch.full((5, 32), 0.37).to(dtype)
    assert float(l0(z)) == 1 and float(l1(z)) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_zeros_have_density_zero_without_nan(dtype: torch.dtype) -> None:
    z = torch.zeros(4, 6, dtype=dtype)
    assert float(l0(z)) == 0 and float(l1(z)) == 0 and float(dead(z)) == 1
    assert all(math.isfinite(v) for v in batch_metrics(z).values())
    z[0] = 1
    assert float(l1(z)) == pytest.approx(0.25, rel=1e-6)


@pytest.mark.parametrize("k", [1, 2, 5, 11, 16])
def test_k_equal_values_have_density_k_over_d(k: int) -> None:
    z = torch.zeros(7, 16)
    for row in range(7):
        z[row, torch.randperm(16, generator=torch.Generator().manual_seed(row))[:k]] = 0.1 + row
    assert float(l0(z)) == pytest.approx(k / 16, rel=1e-6) and float(l1(z)) == pytest.approx(k / 16, rel=1e-5)


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-30, 1e-3, 1.0, 1e20, 1e37])
def test_density_does_not_depend_on_the_scale(scale: float) -> None:
    z = torch.zeros(3, 10)
    z[:, :4] = scale
    assert float(l0(z)) == pytest.approx(0.4) and float(l1(z)) == pytest.approx(0.4, rel=1e-4)


def test_densities_of_half_precision_extremes_are_right() -> None:
    z = torch.zeros(2, 10, dtype=torch.float16)
    z[0, :5], z[1, :5] = 65504.0, 6e-8
    assert float(l0(z)) == pytest.approx(0.5) and float(l1(z)) == pytest.approx(0.5, rel=1e-5)
    assert all(math.isfinite(v) for v in batch_metrics(z).values())


def test_l1_is_the_mean_over_rows_and_never_above_l0(rng: np.random.Generator) -> None:
    z = codes(rng)
    expected = np.mean([(np.abs(r).sum() / np.linalg.norm(r)) ** 2 / 17 for r in z.numpy()])
    assert float(l1(z)) == pytest.approx(expected, rel=1e-12)
    for row in z:
        assert 1 / 17 - 1e-12 <= float(l1(row[None])) <= float(l0(row[None])) + 1e-6


def test_l0_counts_every_non_zero_however_small() -> None:
    assert float(l0(torch.tensor([[0.0, -0.0, 1e-45, -1.0]]))) == 0.5


# METHOD A, scale of unit variance before rectification: l0, E[Y]^2/E[Y^2], mean, variance
@pytest.mark.parametrize(
    ("p", "mu", "density", "effective", "mean", "spread"),
    [
        (1.0, 0.0, 0.5, 0.25, 0.3536, 0.375), (1.0, -1.0, 0.1216, 0.0608, 0.0860, 0.1142), (2.0, 0.0, 0.5, 0.3183, 0.3989, 0.3408),
        (2.0, 1.0, 0.8413, 0.6098, 1.0833, 0.7511), (0.5, 0.0, 0.5, 0.15, 0.2739, 0.425), (1.0, 0.25, 0.6489, 0.3490, 0.4983, 0.4631),
    ],
)  # fmt: skip
def test_measures_of_target_samples_match_theory(p: float, mu: float, density: float, effective: float, mean: float, spread: float) -> None:
    law = RectifiedGeneralizedGaussian(torch.tensor(mu, dtype=torch.float64), sigma_gn(p), p)
    z = law.sample((200, 2048), generator=torch.Generator().manual_seed(0))
    metrics = batch_metrics(z)
    assert metrics["l0"] == pytest.approx(density, abs=4 * (density * (1 - density) / z.numel()) ** 0.5 + 1e-4)
    assert metrics["l1"] == pytest.approx(effective, abs=0.004)
    assert metrics["mean"] == pytest.approx(mean, abs=4 * (spread / z.numel()) ** 0.5 + 1e-4)
    assert metrics["variance"] == pytest.approx(spread, rel=0.02)
    assert metrics["l1"] <= metrics["l0"]


# --- moments ------------------------------------------------------------------------------------------------------------------------


def test_dead_is_the_share_of_dimensions_that_are_always_zero() -> None:
    z = torch.ones(5, 8)
    z[:, :3] = 0
    z[1:, 3] = 0
    assert float(dead(z)) == pytest.approx(3 / 8)
    assert float(dead(torch.ones(2, 4))) == 0


def test_variance_and_covariance_match_numpy(rng: np.random.Generator) -> None:
    z = torch.from_numpy(rng.normal(size=(40, 6)) @ rng.normal(size=(6, 6)) + 3)
    expected = np.cov(z.numpy(), rowvar=False)
    off = expected - np.diag(np.diag(expected))
    assert float(variance(z)) == pytest.approx(np.diag(expected).mean(), rel=1e-5)
    assert float(covariance(z)) == pytest.approx((off**2).sum() / 6, rel=1e-4)


def test_covariance_is_zero_only_for_uncorrelated_dimensions() -> None:
    z = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    assert float(covariance(z)) == pytest.approx(0, abs=1e-12)
    assert float(covariance(z[:, :1].expand(-1, 2))) == pytest.approx((4 / 3) ** 2, rel=1e-5)


def test_moments_in_half_precision_are_exact() -> None:
    z = torch.full((64, 4), 3000.0, dtype=torch.float16)
    z[::2] += 2
    assert float(variance(z)) == pytest.approx(64 / 63, rel=1e-4)
    assert float(covariance(z)) == pytest.approx((64 / 63) ** 2 * 3, rel=1e-3)


def test_batch_metrics_equal_the_single_functions(rng: np.random.Generator) -> None:
    z = codes(rng).float()
    metrics = batch_metrics(z.clone().requires_grad_())
    expected = {"l0": l0(z), "l1": l1(z), "dead": dead(z), "mean": z.mean(), "variance": variance(z), "covariance": covariance(z)}
    assert set(metrics) == set(expected) and all(type(v) is float for v in metrics.values())
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(float(value), rel=1e-6)


# --- alarms -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metrics", "theory", "words"),
    [
        ({"l0_eval": 0.12, "dead_eval": 0.04, "always_on_eval": 0.0}, 0.12, []), ({"l0_eval": 0.17}, 0.12, []), ({"l0_eval": 0.25}, 0.12, ["density missed: 0.25"]),
        ({"l0_eval": 0.0}, 0.0, []),
        ({"l0_eval": 0.05}, 0.12, ["density missed"]), ({"l0_eval": 0.0, "dead_eval": 1.0}, 0.5, ["collapsed", "100% of the dimensions are dead"]),
        ({"l0_eval": 0.12, "dead_eval": 0.6}, 0.12, ["60% of the dimensions are dead"]), ({}, 0.12, []),
        ({"l0_eval": 0.9, "dead_eval": 0.04, "always_on_eval": 0.5}, None, []),
        ({"l0_eval": 0.12, "always_on_eval": 0.06}, 0.12, ["6% of the dimensions are always on"]),
        ({"l0_eval": 0.12, "dead_eval": 0.06}, 0.12, ["6% of the dimensions are dead (no evaluation image activates them); train with target"]),
        ({"l0_eval": 0.01, "dead_eval": 0.4, "n_eval": 100}, 0.01, []), ({"l0_eval": 0.01, "dead_eval": 0.4, "n_eval": 400}, 0.01, ["40%"]),
        ({"l0_eval": 0.0, "dead_eval": 1.0}, None, ["100% of the dimensions are dead"]),
    ],
)  # fmt: skip
def test_alarms_name_exactly_what_is_wrong(metrics: dict[str, float], theory: float | None, words: list[str]) -> None:
    sentences = alarms(metrics, theory)
    assert len(sentences) == len(words) and all(word in sentence for word, sentence in zip(words, sentences, strict=True))


def test_alarms_that_training_may_correct_come_at_its_end() -> None:
    metrics = {"l0_eval": 0.3, "dead_eval": 0.3, "always_on_eval": 0.3}
    assert len(alarms(metrics, 0.1)) == 3 and alarms(metrics, 0.1, still_training=True) == []
    assert "rlpjepa dial --density 0.1 --mode shift" in alarms(metrics, 0.1)[0]
