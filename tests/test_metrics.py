"""Densities and moments of embeddings against numpy and theory, and the frozen evaluation against brute force."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from rlpjepa_zoo import evaluation
from rlpjepa_zoo.distributions import RectifiedGeneralizedGaussian, sigma_gn
from rlpjepa_zoo.encoder import SparseEncoder
from rlpjepa_zoo.errors import DataError
from rlpjepa_zoo.evaluation import encode, evaluate, knn_accuracy, linear_accuracy, one_shot_accuracy
from rlpjepa_zoo.images import Images
from rlpjepa_zoo.loading import create_encoder
from rlpjepa_zoo.metrics import alarms, batch_metrics, covariance, dead, l0, l1, variance
from rlpjepa_zoo.sources import labelled_folder

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


# --- kNN ----------------------------------------------------------------------------------------------------------------------------


def clusters(rng: np.random.Generator, n: int = 120, d: int = 12, classes: int = 4, noise: float = 1.2) -> tuple[Tensor, Tensor]:
    y = rng.integers(0, classes, n)
    centres = np.random.default_rng(1).normal(size=(classes, d))
    return torch.from_numpy(centres[y] + noise * rng.normal(size=(n, d))).float(), torch.from_numpy(y)


def brute_knn(bank: Tensor, bank_y: Tensor, x: Tensor, y: Tensor, k: int, temperature: float, leave_one_out: bool = False) -> float:
    b, q = bank.double().numpy(), x.double().numpy()
    right = 0
    for i in range(len(q)):
        cosine = b @ q[i] / (np.linalg.norm(b, axis=1) * np.linalg.norm(q[i]))
        others = [j for j in np.argsort(-cosine, kind="stable") if not (leave_one_out and j == i)][:k]
        votes = np.zeros(int(bank_y.max()) + 1)
        for j in others:
            votes[bank_y[j]] += math.exp(cosine[j] / temperature)
        right += int(votes.argmax() == y[i])
    return right / len(q)


@pytest.mark.parametrize("k", [1, 5, 20])
@pytest.mark.parametrize("leave_one_out", [False, True])
def test_knn_matches_brute_force(rng: np.random.Generator, k: int, leave_one_out: bool) -> None:
    bank, bank_y = clusters(rng)
    x, y = (bank, bank_y) if leave_one_out else clusters(rng, 80)
    found = knn_accuracy(bank, bank_y, x, y, k, 0.07, leave_one_out)
    assert found == pytest.approx(brute_knn(bank, bank_y, x, y, k, 0.07, leave_one_out), abs=1e-12)
    assert 0.3 < found < 1


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
    try:
        assert knn_accuracy(x, y, x, y, leave_one_out=True) == 0
    except DataError as error:
        assert "kNN" in str(error)


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


def test_linear_probe_separates_what_is_separable(rng: np.random.Generator) -> None:
    x, y = clusters(rng, 200, noise=0.3)
    test_x, test_y = clusters(rng, 100, noise=0.3)
    assert linear_accuracy(x, y, test_x, test_y) > 0.95


def test_linear_probe_is_at_chance_on_shuffled_labels(rng: np.random.Generator) -> None:
    x, y = clusters(rng, 400, noise=0.3)
    test_x, test_y = clusters(rng, 400, noise=0.3)
    shuffled = torch.from_numpy(rng.permutation(y.numpy()))
    wrong = torch.from_numpy(rng.permutation(test_y.numpy()))
    assert abs(linear_accuracy(x, shuffled, test_x, wrong) - 0.25) < 0.12


def test_linear_probe_does_not_depend_on_the_scale_of_the_features(rng: np.random.Generator) -> None:
    x, y = clusters(rng, 150)
    test_x, test_y = clusters(rng, 100)
    found = linear_accuracy(x, y, test_x, test_y)
    for scale in (1e-6, 1e6):
        assert linear_accuracy(scale * x, y, scale * test_x, test_y) == pytest.approx(found, abs=0.02)


def test_linear_probe_leaves_unknown_labels_out(rng: np.random.Generator) -> None:
    x, y = clusters(rng, 100)
    test_x, test_y = clusters(rng, 50)
    more = torch.cat([x, 100 * torch.ones(5, 12)]), torch.cat([y, torch.full((5,), -1)])
    assert linear_accuracy(*more, test_x, test_y) == linear_accuracy(x, y, test_x, test_y)
    with pytest.raises(DataError, match="two classes"):
        linear_accuracy(x, torch.zeros_like(y), test_x, test_y)
    with pytest.raises(DataError, match="testing"):
        linear_accuracy(x, y, test_x, torch.full((50,), -1))


def test_linear_probe_survives_constant_and_zero_features() -> None:
    x, y = torch.zeros(20, 3), torch.arange(20) % 2
    assert 0 <= linear_accuracy(x, y, x, y) <= 1


# --- one shot -----------------------------------------------------------------------------------------------------------------------


def draws_of(monkeypatch: pytest.MonkeyPatch, x: Tensor, y: Tensor, seed: int = 0) -> list[int]:
    seen: list[int] = []
    original = torch.randint

    def recorded(*given, **options):  # type: ignore[no-untyped-def]
        made = original(*given, **options)
        seen.extend(made.tolist())
        return made

    with monkeypatch.context() as patch:
        patch.setattr(evaluation.torch, "randint", recorded)
        one_shot_accuracy(x, y, x, y, draws=10, seed=seed)
    return seen


def test_one_shot_makes_the_same_draws_whatever_the_representation(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = clusters(rng)
    first = draws_of(monkeypatch, x, y)
    assert len(first) == 40 and len(set(first)) > 10
    assert draws_of(monkeypatch, torch.randn(120, 3), y) == first
    assert draws_of(monkeypatch, x, y, seed=1) != first


def test_one_shot_is_deterministic_and_leaves_the_global_generator_alone(rng: np.random.Generator) -> None:
    x, y = clusters(rng)
    state = torch.get_rng_state()
    found = one_shot_accuracy(x, y, x, y, draws=20)
    assert one_shot_accuracy(x, y, x, y, draws=20) == found and torch.equal(torch.get_rng_state(), state)
    assert one_shot_accuracy(5 * x, y, x, y, draws=20) == pytest.approx(found, abs=1e-9)
    assert one_shot_accuracy(x, y, x, y, draws=20, seed=1) != found


def test_one_shot_matches_brute_force_in_mean_and_deviation(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = clusters(rng, 60)
    test_x, test_y = clusters(rng, 50)
    picks = np.array(draws_of(monkeypatch, x, y)).reshape(10, 4)
    members = [torch.nonzero(y == c).flatten().tolist() for c in range(4)]
    scores = []
    for pick in picks:
        shots = torch.stack([x[members[c][pick[c]]] for c in range(4)])
        cosine = torch.nn.functional.cosine_similarity(test_x[:, None].double(), shots[None].double(), dim=2)
        scores.append(float((cosine.argmax(1) == test_y).double().mean()))
    mean, deviation = one_shot_accuracy(x, y, test_x, test_y, draws=10)
    assert mean == pytest.approx(np.mean(scores), abs=1e-6) and deviation == pytest.approx(np.std(scores, ddof=1), abs=1e-6)
    assert deviation > 0 and 0.3 < mean < 1


def test_one_shot_of_clean_clusters_is_perfect_without_deviation(rng: np.random.Generator) -> None:
    x, y = clusters(rng, noise=0.01)
    assert one_shot_accuracy(x, y, x, y) == (1.0, 0.0)
    assert one_shot_accuracy(x, y, x, y, draws=1) == (1.0, 0.0)


def test_one_shot_leaves_unknown_labels_out_and_needs_some(rng: np.random.Generator) -> None:
    x, y = clusters(rng)
    more = torch.cat([x, torch.randn(9, 12)]), torch.cat([y, torch.full((9,), -1)])
    assert one_shot_accuracy(*more, *more, draws=5) == one_shot_accuracy(x, y, x, y, draws=5)
    with pytest.raises(DataError):
        one_shot_accuracy(x, torch.full((120,), -1), x, y)
    with pytest.raises(DataError):
        one_shot_accuracy(x, y, x, torch.full((120,), -1))


def test_one_shot_of_rows_of_zeros_gives_no_nan() -> None:
    x, y = torch.zeros(8, 3), torch.arange(8) % 2
    mean, deviation = one_shot_accuracy(x, y, x, y, draws=5)
    assert mean == 0.5 and deviation == 0


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
    kinds = [f"{kind}_{name}" for name in ("z", "features", "pixels") for kind in ("knn", "linear", "one_shot", "one_shot_std")]
    assert set(report) == {"n_train", "n_test", "l0", "l1", "dead", "protocol", *kinds}
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
