"""Densities and moments of embeddings against numpy and theory, and the frozen evaluation against brute force."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from rlpjepa_zoo.data.images import Images
from rlpjepa_zoo.data.sources.folder import labelled_folder
from rlpjepa_zoo.distributions import RectifiedGeneralizedGaussian, sigma_gn
from rlpjepa_zoo.errors import DataError
from rlpjepa_zoo.evaluation.evaluate import encode, evaluate
from rlpjepa_zoo.evaluation.metrics import alarms, batch_metrics, covariance, dead, l0, l1, variance
from rlpjepa_zoo.models.encoder import SparseEncoder
from rlpjepa_zoo.models.factory import create_encoder

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


def test_l1_is_the_mean_of_the_rows_and_never_above_l0(rng: np.random.Generator) -> None:
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
    found = batch_metrics(z)
    assert found["l0"] == pytest.approx(density, abs=4 * (density * (1 - density) / z.numel()) ** 0.5 + 1e-4)
    assert found["l1"] == pytest.approx(effective, abs=0.004)
    assert found["mean"] == pytest.approx(mean, abs=4 * (spread / z.numel()) ** 0.5 + 1e-4)
    assert found["variance"] == pytest.approx(spread, rel=0.02)
    assert found["l1"] <= found["l0"]


# --- moments ------------------------------------------------------------------------------------------------------------------------


def test_dead_is_the_share_of_dimensions_that_are_zero_in_every_row() -> None:
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


def test_covariance_of_uncorrelated_dimensions_is_zero_and_of_equal_ones_is_not() -> None:
    z = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    assert float(covariance(z)) == pytest.approx(0, abs=1e-12)
    assert float(covariance(z[:, :1].expand(-1, 2))) == pytest.approx((4 / 3) ** 2, rel=1e-5)


def test_moments_do_not_lose_precision_in_half() -> None:
    z = torch.full((64, 4), 3000.0, dtype=torch.float16)
    z[::2] += 2
    assert float(variance(z)) == pytest.approx(64 / 63, rel=1e-4)
    assert float(covariance(z)) == pytest.approx((64 / 63) ** 2 * 3, rel=1e-3)


def test_batch_metrics_are_the_numbers_of_the_functions(rng: np.random.Generator) -> None:
    z = codes(rng).float()
    found = batch_metrics(z.clone().requires_grad_())
    expected = {"l0": l0(z), "l1": l1(z), "dead": dead(z), "mean": z.mean(), "variance": variance(z), "covariance": covariance(z)}
    assert set(found) == set(expected) and all(type(v) is float for v in found.values())
    for name, value in expected.items():
        assert found[name] == pytest.approx(float(value), rel=1e-6)


# --- evaluate -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder() -> SparseEncoder:
    torch.manual_seed(0)
    return create_encoder("test_resnet", dim=16, hidden_dim=16)


def halves(folder: Path) -> tuple[Images, Images]:
    whole = labelled_folder(folder)
    return whole.take(range(0, len(whole), 2)), whole.take(range(1, len(whole), 2))


def test_evaluation_reports_every_number_and_leaves_the_encoder_as_it_was(encoder: SparseEncoder, image_folder: Path) -> None:
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    encoder.train()
    report = evaluate(encoder, *halves(image_folder))
    measures = ("knn", "linear", "linear_std", "one_shot", "one_shot_std", "shot_5", "shot_5_std", "shot_10", "shot_10_std")
    kinds = [f"{kind}_{name}" for name in ("z", "features", "pixels") for kind in measures]
    assert set(report) == {"n_train", "n_test", "l0", "l1", "dead", "seeds", "protocol", "chosen_c", *kinds}
    assert (report["n_train"], report["n_test"]) == (20, 20)
    assert all(0 <= report[name] <= 1 for name in kinds) and 0 <= report["l1"] <= report["l0"] <= 1
    assert report["linear_pixels"] == 1.0 and report["one_shot_pixels"] > 0.9 and report["knn_features"] > 0.8
    assert encoder.training and all(torch.equal(before[k], v) for k, v in encoder.state_dict().items())


def test_evaluation_without_pixels_or_with_a_limit(encoder: SparseEncoder, image_folder: Path) -> None:
    train, test = halves(image_folder)
    report = evaluate(encoder, train, test, with_pixels=False, limit=12)
    assert report["n_train"] == 12 and not any("pixels" in key for key in report)
    assert report == evaluate(encoder, train, test, with_pixels=False, limit=12)


def test_evaluation_leaves_unreadable_images_out(encoder: SparseEncoder, image_folder: Path) -> None:
    (image_folder / "red" / "04.png").write_bytes(b"junk")
    (image_folder / "blue" / "05.png").write_bytes(b"junk")
    report = evaluate(encoder, *halves(image_folder))
    assert (report["n_train"], report["n_test"]) == (19, 19) and report["linear_pixels"] == 1.0


def test_evaluation_without_labels_is_refused(encoder: SparseEncoder, image_folder: Path) -> None:
    train, test = halves(image_folder)
    bare = Images(lambda i: Image.new("RGB", (8, 8)), range(4))
    unknown = Images(lambda i: Image.new("RGB", (8, 8)), range(4), [-1] * 4)
    for pair in ((bare, test), (train, bare), (bare, bare)):
        with pytest.raises(DataError, match="evaluation needs labels"):
            evaluate(encoder, *pair)
    for pair in ((unknown, test), (train, unknown)):
        with pytest.raises(DataError, match="no labelled images"):
            evaluate(encoder, *pair)


def test_encode_returns_what_the_encoder_gives_in_evaluation_mode(encoder: SparseEncoder, image_folder: Path) -> None:
    train, _ = halves(image_folder)
    features, z, labels = encode(encoder, train, batch_size=7)
    encoder.eval()
    with torch.no_grad():
        expected = encoder.both(torch.stack([encoder.transform(train.read(i)) for i in range(len(train))]))
    encoder.train()
    assert torch.allclose(features, expected.features, atol=1e-5) and torch.allclose(z, expected.z, atol=1e-5)
    assert labels.tolist() == train.labels.tolist() and features.dtype == z.dtype == torch.float32


def test_encoding_nothing_readable_is_refused(encoder: SparseEncoder) -> None:
    with pytest.raises(DataError, match="none of the images"):
        encode(encoder, Images(lambda i: b"junk", range(3), [0, 1, 0]))


@pytest.mark.parametrize(
    ("found", "theory", "words"),
    [
        ({"l0_eval": 0.12, "dead_eval": 0.1}, 0.12, []), ({"l0_eval": 0.17}, 0.12, []), ({"l0_eval": 0.25}, 0.12, ["density missed: 0.25"]),
        ({"l0_eval": 0.05}, 0.12, ["density missed"]), ({"l0_eval": 0.0, "dead_eval": 1.0}, 0.5, ["collapsed", "100% of the dimensions are dead"]),
        ({"l0_eval": 0.12, "dead_eval": 0.6}, 0.12, ["60% of the dimensions are dead"]), ({}, 0.12, []),
    ],
)  # fmt: skip
def test_alarms_name_what_is_wrong_and_only_that(found, theory, words):
    sentences = alarms(found, theory)
    assert len(sentences) == len(words) and all(word in sentence for word, sentence in zip(words, sentences, strict=True))
