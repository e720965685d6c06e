"""Intervals against scipy and against resampling by loops."""

import numpy as np
import pytest
from scipy import stats

from rlpjepa_zoo.evaluation import intervals
from rlpjepa_zoo.evaluation.intervals import mean_interval, paired_difference, share_interval


def test_interval_of_a_difference_equals_resampled_images(rng: np.random.Generator) -> None:
    a, b = rng.random(300) < 0.7, rng.random(300) < 0.6
    interval = paired_difference(a, b)
    means = [float((a[i].astype(float) - b[i]).mean()) for i in rng.integers(0, 300, (20_000, 300))]
    assert interval["difference"] == pytest.approx(a.mean() - b.mean(), abs=1e-12) and interval["n"] == 300
    assert [interval["low"], interval["high"]] == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.006)
    assert paired_difference(a, b) == interval
    assert paired_difference(rng.random(300), b) != paired_difference(rng.random(300), b, seed=1)


def test_intervals_cover_the_true_difference_in_95_of_100_cases(rng: np.random.Generator) -> None:
    inside = 0
    for case in range(400):  # two classifiers that are right together more often than by chance
        both, first, second = rng.random((3, 200))
        a, b = (both < 0.5) | (first < 0.4), (both < 0.5) | (second < 0.3)
        interval = paired_difference(a, b, seed=case, resamples=2000)
        inside += interval["low"] <= 0.5 * (0.4 - 0.3) <= interval["high"]
    assert 0.92 <= inside / 400 <= 0.98


def test_resampling_in_groups_changes_nothing(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = rng.random((2, 60))
    at_once = paired_difference(a, b)
    monkeypatch.setattr(intervals, "_GROUP", 60 * 300)
    assert paired_difference(a, b) == at_once


def test_paired_intervals_of_similar_classifiers_are_narrow(rng: np.random.Generator) -> None:
    a = rng.random(500) < 0.6
    b = np.where(np.arange(500) < 5, ~a, a)
    interval = paired_difference(a, b)
    assert interval["high"] - interval["low"] < 0.03
    thirds = paired_difference(np.full(30, 2 / 3), np.full(30, 1 / 3))
    assert (thirds["low"], thirds["high"]) == pytest.approx((1 / 3, 1 / 3))


def test_interval_of_a_share_equals_wilson_of_scipy() -> None:
    low, high = share_interval(0.8, 50)
    exact = stats.binomtest(40, 50).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx((exact.low, exact.high), rel=1e-6)


def test_interval_of_a_mean_equals_the_normal_of_scipy() -> None:
    values = np.random.default_rng(3).normal(2, 3, 400)
    expected = stats.norm.interval(0.95, values.mean(), stats.sem(values))
    assert mean_interval(values) == pytest.approx((values.mean(), *expected), rel=1e-6)
