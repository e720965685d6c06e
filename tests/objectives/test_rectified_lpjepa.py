"""Directions, the sliced distance, the invariance and the loss against loops, numpy, plain autograd and METHOD B."""

import re

import numpy as np
import oracles
import pytest
import torch
from torch import Tensor

from rlpjepa_zoo.distributions import RectifiedGeneralizedGaussian, sigma_gn
from rlpjepa_zoo.errors import NonFiniteError
from rlpjepa_zoo.objectives.base import Terms, invariance
from rlpjepa_zoo.objectives.rectified_lpjepa import RectifiedLpJEPALoss
from rlpjepa_zoo.ops.directions import FAMILIES, directions, parse_directions
from rlpjepa_zoo.ops.sliced_wasserstein import sliced_wasserstein

KINDS = [*FAMILIES, "axes+random", "eigen+random", "eigen-bottom+orthogonal", "eigen:3+axes:5+random", "random+orthogonal"]


def source(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def uniform(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(*shape, generator=source(seed), dtype=dtype)


def target(p: float = 1.0, mu: float = 0.0) -> RectifiedGeneralizedGaussian:
    return RectifiedGeneralizedGaussian(mu, sigma_gn(p), p)


def slices(n: int, dim: int, kind: str = "random", seed: int = 9) -> Tensor:
    return directions(kind, n, dim, source(seed), features=uniform(4 * dim, dim, seed=seed, dtype=torch.float32)).double()


def value_and_gradient(z: Tensor, y: Tensor, c: Tensor, chunk: int = 2048) -> tuple[float, Tensor]:
    z = z.detach().requires_grad_()
    loss = sliced_wasserstein(z, y, c, chunk)
    return loss.item(), torch.autograd.grad(loss, z)[0]


def difference(got: Tensor, wanted: Tensor) -> float:
    """Largest difference as a fraction of the largest wanted entry."""
    return float((got - wanted).abs().max() / wanted.abs().max())


# --- sliced distance: value -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_permuted_copy_is_at_distance_zero(kind: str) -> None:
    y = target().sample((50, 12), source()).double()
    shuffled = torch.stack([y[torch.randperm(50, generator=source(i))] for i in range(3)])
    assert float(sliced_wasserstein(shuffled, y, slices(48, 12, kind))) < 1e-28
    assert float(sliced_wasserstein(y.flip(0) + 0.1, y, slices(48, 12, kind))) > 1e-4


@pytest.mark.parametrize("kind", ["axes", "orthogonal", "eigen"])
def test_zero_embedding_gives_the_mean_square_of_the_target(kind: str) -> None:
    y = target().sample((64, 16), source()).double()
    assert float(sliced_wasserstein(torch.zeros_like(y), y, slices(32, 16, kind))) == pytest.approx(float(y.square().mean()), rel=1e-6)


def test_zero_embedding_gives_the_second_moment_for_random_directions() -> None:
    y = target(1.0, -0.5).sample((256, 64), source())
    got = sliced_wasserstein(torch.zeros_like(y), y, directions("random", 4096, 64, source()))
    assert float(got) == pytest.approx(float(y.square().mean()), rel=0.05)


@pytest.mark.parametrize("s", [0.0, 0.5, 1.0, 3.0])
def test_scaled_target_gives_the_squared_excess(s: float) -> None:
    y = target().sample((64, 16), source()).double()
    wanted = (s - 1) ** 2 * float(y.square().mean())
    assert float(sliced_wasserstein(s * y, y, slices(32, 16, "orthogonal"))) == pytest.approx(wanted, rel=1e-6, abs=1e-25)


@pytest.mark.parametrize("delta", [-0.7, 0.3, 2.0])
def test_shifted_target_gives_the_squared_shift(delta: float) -> None:
    y = target().sample((64, 16), source()).double()
    assert float(sliced_wasserstein(y + delta, y, slices(16, 16, "axes"))) == pytest.approx(delta**2, rel=1e-12)
    assert float(sliced_wasserstein(y + delta, y, slices(4096, 16))) == pytest.approx(delta**2, rel=0.1)


@pytest.mark.parametrize(("p", "mu", "low", "high"), [(1.0, 0.0, 2.1, 2.4), (2.0, 0.0, 1.9, 2.1), (1.0, -1.0, 0.65, 0.75)])
@pytest.mark.parametrize("batch", [64, 128, 256])
def test_floor_of_matched_samples_is_kappa_over_batch(p: float, mu: float, low: float, high: float, batch: int) -> None:
    values = []
    for seed in range(6):
        g = source(100 * batch + seed)
        a, b = target(p, mu).sample((batch, 512), g), target(p, mu).sample((batch, 512), g)
        values.append(float(sliced_wasserstein(a, b, directions("random", 1024, 512, g))))
    assert 0.85 * low < batch * np.mean(values) < 1.15 * high


@pytest.mark.parametrize(("batch", "wanted"), [(64, 0.0321), (128, 0.0166), (256, 0.0087)])
def test_floor_method_equals_the_values_of_the_sheet(batch: int, wanted: float) -> None:
    loss = RectifiedLpJEPALoss(target())
    assert loss.floor(batch, 512, repeats=6) == pytest.approx(wanted, rel=0.05)
    assert loss.floor(16, 8, n=32) == loss.floor(16, 8, n=32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 2, 33])
def test_value_equals_the_brute_force(kind: str, batch: int) -> None:
    z, y, c = uniform(batch, 10, seed=1), uniform(batch, 10, seed=2), slices(40, 10, kind)
    assert float(sliced_wasserstein(z, y, c)) == pytest.approx(oracles.sliced(z.numpy(), y.numpy(), c.numpy()), rel=1e-12)


def test_each_slice_is_an_optimal_transport() -> None:
    z, y, c = uniform(21, 6, seed=1), 2 * uniform(21, 6, seed=2), slices(8, 6)
    for row in c:
        wanted = oracles.transport((z @ row).numpy(), (y @ row).numpy())
        assert float(sliced_wasserstein(z, y, row[None])) == pytest.approx(wanted, rel=1e-12)


def test_many_views_give_the_mean_over_views() -> None:
    z, y, c = uniform(3, 20, 5, seed=1), uniform(20, 5, seed=2), slices(16, 5)
    each = [float(sliced_wasserstein(view, y, c)) for view in z]
    assert len(set(each)) == 3
    assert float(sliced_wasserstein(z, y, c)) == pytest.approx(np.mean(each), rel=1e-12)
    assert float(sliced_wasserstein(z[:1], y, c)) == each[0]


# --- sliced distance: gradient --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7, 4), (1, 7, 4), (3, 7, 4)])
@pytest.mark.parametrize("chunk", [3, 100])
def test_gradient_equals_finite_differences(shape: tuple[int, ...], chunk: int) -> None:
    z, y, c = uniform(*shape, seed=1).requires_grad_(), uniform(7, 4, seed=2), slices(11, 4)
    assert torch.autograd.gradcheck(lambda x: sliced_wasserstein(x, y, c, chunk), [z], eps=1e-7, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(30, 10), (1, 30, 10), (2, 30, 10), (3, 30, 10)])
def test_gradient_equals_plain_autograd(kind: str, shape: tuple[int, ...]) -> None:
    z, y, c = uniform(*shape, seed=1).requires_grad_(), uniform(30, 10, seed=2), slices(41, 10, kind)
    wanted = oracles.sliced_autograd(z, y, c)
    value, gradient = value_and_gradient(z, y, c, chunk=16)
    assert value == pytest.approx(wanted.item(), rel=1e-12)
    assert difference(gradient, torch.autograd.grad(wanted, z)[0]) < 1e-10


def test_gradient_follows_what_comes_before_and_after() -> None:
    w, x, y, c = uniform(6, 5, seed=3), uniform(2, 12, 6, seed=1), uniform(12, 5, seed=2), slices(9, 5)
    gradients = []
    for loss in (sliced_wasserstein, oracles.sliced_autograd):
        leaf = w.clone().requires_grad_()
        (7 * loss((x @ leaf - 1).relu(), y, c).sqrt()).backward()
        gradients.append(leaf.grad)
    assert difference(gradients[0], gradients[1]) < 1e-10


@pytest.mark.parametrize("chunk", [1, 7, 50, 99, 100, 4096])
def test_chunk_changes_neither_value_nor_gradient(chunk: int) -> None:
    z, y, c = uniform(2, 20, 8, seed=1), uniform(20, 8, seed=2), slices(100, 8)
    wanted, wanted_gradient = value_and_gradient(z, y, c, 33)
    value, gradient = value_and_gradient(z, y, c, chunk)
    assert value == pytest.approx(wanted, rel=1e-12)
    assert difference(gradient, wanted_gradient) < 1e-12


def test_small_step_against_the_gradient_lowers_the_loss() -> None:
    z, y, c = uniform(2, 40, 8, seed=1), target().sample((40, 8), source()).double(), slices(64, 8)
    value, gradient = value_and_gradient(z, y, c)
    assert value_and_gradient(z - gradient, y, c)[0] < value - 0.4 * float(gradient.square().sum())


def test_input_without_gradient_gives_a_value_without_gradient() -> None:
    z, y, c = uniform(20, 8, seed=1), uniform(20, 8, seed=2), slices(10, 8)
    assert not sliced_wasserstein(z, y, c).requires_grad
    wanted = value_and_gradient(z, y, c)[0]
    with torch.no_grad():
        inside = sliced_wasserstein(z.requires_grad_(), y, c)
    assert not inside.requires_grad and inside.item() == wanted


# --- sliced distance: precision and odd inputs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype, autocast: bool) -> None:
    z, y, c = uniform(2, 32, 16, seed=1).to(dtype), target().sample((32, 16), source()), directions("random", 64, 16, source())
    wanted, wanted_gradient = value_and_gradient(z.float(), y, c)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        leaf = z.clone().requires_grad_()
        loss = sliced_wasserstein(leaf, y, c)
    assert loss.dtype == torch.float32 and loss.item() == wanted
    loss.backward()
    assert leaf.grad is not None and torch.equal(leaf.grad, wanted_gradient.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    z, y, c = uniform(2, 32, 16, seed=1, dtype=dtype), uniform(32, 16, seed=2, dtype=dtype), slices(64, 16).to(dtype)
    wanted, wanted_gradient = value_and_gradient(z, y, c)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, gradient = value_and_gradient(z, y, c)
    assert value == wanted and torch.equal(gradient, wanted_gradient)
    assert sliced_wasserstein(z, y, c).dtype == dtype


def test_inputs_are_left_as_they_were() -> None:
    tensors = uniform(2, 20, 8, seed=1), uniform(20, 8, seed=2), slices(10, 8)
    copies = [t.clone() for t in tensors]
    value_and_gradient(*tensors, chunk=4)
    assert all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True))


@pytest.mark.parametrize("fill", [0.0, 0.7])
def test_collapsed_embedding_gets_a_finite_gradient_that_is_right_in_sum(fill: float) -> None:
    z, y, c = torch.full((16, 6), fill, dtype=torch.float64).requires_grad_(), target().sample((16, 6), source()).double(), slices(40, 6)
    wanted = oracles.sliced_autograd(z, y, c)
    value, gradient = value_and_gradient(z, y, c)
    assert value == pytest.approx(wanted.item(), rel=1e-12)
    assert bool(torch.isfinite(gradient).all())
    assert difference(gradient.sum(0), torch.autograd.grad(wanted, z)[0].sum(0)) < 1e-10


def test_ties_between_rows_do_not_change_the_value() -> None:
    z, y, c = uniform(12, 6, seed=1).relu(), uniform(24, 6, seed=2), slices(40, 6)
    doubled = torch.cat([z, z])
    doubled[:, 2] = 0.25
    value, gradient = value_and_gradient(doubled, y, c)
    assert value == pytest.approx(oracles.sliced(doubled.numpy(), y.numpy(), c.numpy()), rel=1e-12)
    assert bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["z", "y"])
def test_value_that_is_not_finite_is_not_hidden(bad: float, where: str) -> None:
    z, y, c = uniform(2, 8, 4, seed=1), uniform(8, 4, seed=2), slices(10, 4)
    (z[1] if where == "z" else y)[3, 2] = bad
    value, gradient = value_and_gradient(z, y, c)
    assert not np.isfinite(value)
    assert not bool(torch.isfinite(gradient).all())


REFUSED = [
    ((4, 3), (5, 3), (2, 3), 8, "sizes differ"),
    ((2, 4, 3), (2, 4, 3), (2, 3), 8, "expected z"),
    ((4, 3), (4, 3), (2, 4), 8, "sizes differ"),
    ((4,), (4, 3), (2, 3), 8, "expected z"),
    ((4, 3), (4, 3), (3,), 8, "expected z"),
    ((0, 3), (0, 3), (2, 3), 8, "empty"),
    ((0, 4, 3), (4, 3), (2, 3), 8, "empty"),
    ((4, 3), (4, 3), (0, 3), 8, "no directions"),
    ((4, 3), (4, 3), (2, 3), 0, "chunk"),
]


@pytest.mark.parametrize(("z", "y", "c", "chunk", "message"), REFUSED)
def test_inputs_that_do_not_fit_are_refused(z: tuple[int, ...], y: tuple[int, ...], c: tuple[int, ...], chunk: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sliced_wasserstein(torch.zeros(z), torch.zeros(y), torch.zeros(c), chunk)


def test_target_with_a_gradient_is_refused() -> None:
    with pytest.raises(ValueError, match="detach"):
        sliced_wasserstein(torch.zeros(4, 3), torch.zeros(4, 3, requires_grad=True), torch.eye(3))


# --- directions -----------------------------------------------------------------------------------------------------------------------


def spectrum(batch: int, dim: int, seed: int = 0) -> Tensor:
    """Features of a known, well separated covariance, off centre."""
    rotation = np.linalg.qr(np.random.default_rng(seed).normal(size=(dim, dim)))[0]
    x = np.random.default_rng(seed + 1).normal(size=(batch, dim)) * 0.7 ** np.arange(dim)
    return torch.from_numpy(x @ rotation + 3).float()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "dim"), [(40, 10), (33, 10), (32, 16)])
def test_directions_are_float32_unit_vectors_from_the_generator_alone(kind: str, n: int, dim: int) -> None:
    x = spectrum(200, dim)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    c = directions(kind, n, dim, source(1), features=x)
    assert torch.equal(torch.get_rng_state(), before)
    assert c.shape == (n, dim) and c.dtype == torch.float32 and not c.requires_grad
    torch.testing.assert_close(c.norm(dim=1), torch.ones(n), rtol=0, atol=2e-6)
    torch.rand(5)
    assert torch.equal(c, directions(kind, n, dim, source(1), features=x))
    if "random" in kind or "orthogonal" in kind:
        assert not torch.equal(c, directions(kind, n, dim, source(2), features=x))


@pytest.mark.parametrize("kind", KINDS)
def test_directions_are_not_touched_by_autocast(kind: str) -> None:
    x = spectrum(200, 10)
    wanted = directions(kind, 40, 10, source(1), features=x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(directions(kind, 40, 10, source(1), features=x), wanted)


@pytest.mark.parametrize("kind", ["orthogonal", "axes", "eigen", "eigen-bottom"])
@pytest.mark.parametrize(("n", "dim"), [(5, 12), (12, 12), (30, 12), (1, 1), (3, 1)])
def test_blocks_of_a_basis_are_orthonormal(kind: str, n: int, dim: int) -> None:
    for block in directions(kind, n, dim, source(), features=spectrum(100, dim)).split(dim):
        torch.testing.assert_close(block @ block.T, torch.eye(len(block)), rtol=0, atol=3e-6)


def test_each_orthogonal_block_is_another_basis() -> None:
    first, second = directions("orthogonal", 24, 12, source()).split(12)
    assert float((first @ second.T).abs().max()) < 0.99


@pytest.mark.parametrize("kind", ["random", "orthogonal"])
def test_random_directions_are_isotropic(kind: str) -> None:
    c = directions(kind, 20_000, 5, source()).double()
    assert float(c.mean(0).abs().max()) < 4 * (1 / 5 / 20_000) ** 0.5
    torch.testing.assert_close(c.T @ c / len(c), torch.eye(5, dtype=torch.float64) / 5, rtol=0, atol=0.01)
    torch.testing.assert_close((c**4).mean(0), torch.full((5,), 3 / 35, dtype=torch.float64), rtol=0.05, atol=0)


@pytest.mark.parametrize(("n", "dim"), [(3, 8), (8, 8), (16, 8), (21, 8)])
def test_axes_cover_each_coordinate_before_any_repeats(n: int, dim: int) -> None:
    c = directions("axes", n, dim, source())
    assert set(c.unique().tolist()) <= {0.0, 1.0}
    counts = c.sum(0)
    assert counts.sum() == n and counts.max() - counts.min() <= 1
    for block in c.split(dim):
        assert block.sum(0).max() == 1


def test_axes_of_an_incomplete_round_are_drawn_at_random() -> None:
    drawn = {tuple(directions("axes", 3, 8, source(i)).argmax(1).tolist()) for i in range(20)}
    assert len(drawn) > 10


@pytest.mark.parametrize("views", [1, 2])
def test_eigen_directions_are_the_eigenvectors_of_the_covariance(views: int) -> None:
    x = spectrum(300, 10)
    features = x.requires_grad_() if views == 1 else x.view(2, 150, 10).requires_grad_()
    values, vectors = np.linalg.eigh(np.cov(x.detach().double().numpy().T))
    assert np.all(values[1:] / values[:-1] > 1.1)
    falling = torch.from_numpy(vectors[:, ::-1].T.copy())
    for kind, wanted in (("eigen", falling), ("eigen-bottom", falling.flip(0))):
        c = directions(kind, 10, 10, source(), features=features).double()
        torch.testing.assert_close((c * wanted).sum(1).abs(), torch.ones(10, dtype=torch.float64), rtol=0, atol=1e-5)
        for n in (4, 23):
            assert torch.equal(directions(kind, n, 10, source(), features=features).double(), c.repeat(3, 1)[:n])


@pytest.mark.parametrize("batch", [1, 2, 6, 12])
def test_eigen_basis_of_a_small_batch_is_completed_to_an_orthonormal_one(batch: int) -> None:
    x = uniform(batch, 12, seed=1, dtype=torch.float32)
    c = directions("eigen", 12, 12, source(), features=x)
    torch.testing.assert_close(c @ c.T, torch.eye(12), rtol=0, atol=3e-6)
    centred = x - x.mean(0)
    span = c[: batch - 1]
    torch.testing.assert_close(centred @ span.T @ span, centred, rtol=0, atol=1e-5)
    other = directions("eigen", 12, 12, source(1), features=x)
    torch.testing.assert_close(other[: batch - 1], span, rtol=0, atol=1e-5)
    assert batch == 12 or not torch.allclose(other[batch - 1 :], c[batch - 1 :], atol=1e-2)


@pytest.mark.parametrize("fill", [0.0, 0.3, 1e4])
def test_eigen_basis_of_constant_features_is_orthonormal(fill: float) -> None:
    c = directions("eigen", 8, 8, source(), features=torch.full((16, 8), fill))
    torch.testing.assert_close(c @ c.T, torch.eye(8), rtol=0, atol=3e-6)


def test_eigen_basis_survives_dead_coordinates() -> None:
    x = spectrum(64, 8)
    x[:, [1, 5]] = 0
    c = directions("eigen", 8, 8, source(), features=x)
    torch.testing.assert_close(c @ c.T, torch.eye(8), rtol=0, atol=3e-6)
    assert float(c[:6, [1, 5]].abs().max()) < 1e-5


def test_mix_is_made_of_its_families() -> None:
    x = spectrum(100, 10)
    c = directions("eigen:3+axes+random", 40, 10, source(), features=x)
    alone = directions("eigen", 3, 10, source(), features=x)
    assert torch.equal(c[:3], alone)
    assert torch.equal(c[3:13], torch.eye(10))
    assert float(c[13:].abs().max()) < 1


@pytest.mark.parametrize(
    ("kind", "n", "wanted"),
    [
        ("random", 7, [("random", 7)]),
        ("random:7", 7, [("random", 7)]),
        ("axes", 25, [("axes", 25)]),
        ("axes+random", 25, [("axes", 10), ("random", 15)]),
        (" eigen + random ", 25, [("eigen", 10), ("random", 15)]),
        ("eigen-bottom+random", 25, [("eigen-bottom", 5), ("random", 20)]),
        ("random+orthogonal", 25, [("random", 12), ("orthogonal", 13)]),
        ("axes:4+random", 25, [("axes", 4), ("random", 21)]),
        ("axes:4+random:21", 25, [("axes", 4), ("random", 21)]),
        ("axes+eigen", 20, [("axes", 10), ("eigen", 10)]),
        ("axes:0+random", 25, [("random", 25)]),
    ],
)
def test_kind_is_split_into_counts(kind: str, n: int, wanted: list[tuple[str, int]]) -> None:
    assert parse_directions(kind, n, 10) == wanted


@pytest.mark.parametrize(
    ("kind", "n"),
    [
        ("axes+random", 10), ("axes+random", 4), ("random:6", 7), ("axes:4+random:20", 25), ("axes:4+random:22", 25), ("axes+eigen", 25),
        ("random+orthogonal", 1), ("axes:0", 3), ("axes:30+random", 25),
    ],
)  # fmt: skip
def test_counts_that_do_not_add_up_are_refused(kind: str, n: int) -> None:
    with pytest.raises(ValueError, match="add up"):
        directions(kind, n, 10, source(), features=spectrum(20, 10))


@pytest.mark.parametrize(
    "kind", ["", "ranom", "Random", "axes+", "+random", "axes:-1+random", "axes:x+random", "axes,random", "eigen_bottom"]
)
def test_unknown_kind_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match="unknown family"):
        directions(kind, 20, 10, source())


@pytest.mark.parametrize(("n", "dim"), [(0, 4), (-1, 4), (4, 0)])
def test_no_directions_are_refused(n: int, dim: int) -> None:
    with pytest.raises(ValueError, match=re.escape(f"got n = {n}, dim = {dim}")):
        directions("random", n, dim, source())


@pytest.mark.parametrize("kind", ["eigen", "eigen-bottom", "eigen+random"])
def test_eigen_directions_need_finite_features(kind: str) -> None:
    with pytest.raises(ValueError, match="features"):
        directions(kind, 20, 10, source())
    x = spectrum(20, 10)
    x[3, 4] = torch.nan
    with pytest.raises(NonFiniteError, match="NaN"):
        directions(kind, 20, 10, source(), features=x)


# --- invariance -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("views", [1, 2, 3, 5])
def test_invariance_equals_the_mean_over_pairs(views: int) -> None:
    z = uniform(views, 9, 7, seed=views)
    assert float(invariance(z)) == pytest.approx(oracles.invariance(z.numpy()), rel=1e-12)


@pytest.mark.parametrize("views", [1, 2, 3])
def test_invariance_gradient_equals_finite_differences(views: int) -> None:
    assert torch.autograd.gradcheck(invariance, [uniform(views, 4, 3).requires_grad_()])


@pytest.mark.parametrize("views", [2, 3])
def test_invariance_of_equal_views_is_zero(views: int) -> None:
    z = uniform(1, 9, 7).expand(views, 9, 7)
    assert float(invariance(z)) == pytest.approx(0, abs=1e-30)


@pytest.mark.parametrize("views", [2, 3])
def test_invariance_of_half_precision_is_computed_in_float32(views: int) -> None:
    z = uniform(views, 32, 16).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = invariance(z)
    assert got.dtype == torch.float32
    assert float(got) == pytest.approx(oracles.invariance(z.double().numpy()), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_invariance_of_one_view_is_a_float32_zero(dtype: torch.dtype) -> None:
    got = invariance(torch.ones(1, 256, 512, dtype=dtype))
    assert float(got) == 0.0
    assert got.dtype == torch.float32


@pytest.mark.parametrize("views", [1, 2, 3])
def test_invariance_does_not_hide_nan(views: int) -> None:
    z = uniform(views, 4, 3)
    z[0, 1, 2] = torch.nan
    assert bool(invariance(z).isnan())


# --- the objective --------------------------------------------------------------------------------------------------------------------


def objective(kind: str = "random", n: int = 64, seed: int = 3, p: float = 1.0) -> RectifiedLpJEPALoss:
    return RectifiedLpJEPALoss(target(p), kind=kind, n=n, seed=seed)


@pytest.mark.parametrize("kind", ["random", "orthogonal", "axes+random", "eigen+random"])
@pytest.mark.parametrize("p", [0.5, 1.0, 2.0])
def test_loss_is_a_function_of_seed_step_and_embedding(kind: str, p: float) -> None:
    z = uniform(2, 16, 8, seed=1, dtype=torch.float32)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = objective(kind, p=p)(z, 5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(11)
    objective(kind, p=p)(z, 4)
    again = objective(kind, p=p)
    again(z, 1)
    assert all(torch.equal(a, b) for a, b in zip(tensors(first), tensors(again(z, 5)), strict=True))
    assert float(first.parts["matching"]) != float(objective(kind, p=p)(z, 6).parts["matching"])
    assert float(first.parts["matching"]) != float(objective(kind, seed=4, p=p)(z, 5).parts["matching"])
    assert float(first.parts["invariance"]) == float(objective(kind, seed=4, p=p)(z, 6).parts["invariance"])


def tensors(terms: Terms) -> list[Tensor]:
    return [terms.total, *terms.parts.values()]


DRAWN = [(seed, step) for seed in range(3) for step in range(3)]


def test_each_seed_and_step_draws_its_own_target() -> None:
    zeros = torch.zeros(1, 16, 8)
    values = {float(objective("axes", 8, seed)(zeros, step).parts["matching"]) for seed, step in DRAWN}
    assert len(values) == len(DRAWN)


@pytest.mark.parametrize("kind", ["random", "orthogonal"])
def test_each_seed_and_step_draws_its_own_directions(kind: str) -> None:
    negligible = RectifiedGeneralizedGaussian(0.0, 1e-20, 1.0)
    ones = torch.ones(1, 16, 8)
    values = {float(RectifiedLpJEPALoss(negligible, kind=kind, n=3, seed=seed)(ones, step).parts["matching"]) for seed, step in DRAWN}
    assert len(values) == len(DRAWN)


def test_targets_and_directions_are_independent_streams() -> None:
    loss = RectifiedLpJEPALoss(target(2.0), kind="random", n=1000, seed=0)
    drawn: list[Tensor] = []
    y = loss._draw("target", 0, 1000, 8, torch.device("cpu"))
    drawn.append(loss._draw("directions", 0, 1000, 8, torch.device("cpu")))
    drawn.append(loss._draw("target", 1, 1000, 8, torch.device("cpu")))
    for other in drawn:
        assert abs(float(torch.corrcoef(torch.stack([y.flatten(), other.flatten()]))[0, 1])) < 4 / 8000**0.5


def test_terms_are_the_weighted_sum_of_their_parts() -> None:
    z = uniform(3, 16, 8, seed=1).requires_grad_()
    terms = RectifiedLpJEPALoss(target(), 3.0, 7.0, n=64)(z, 0)
    assert terms.parts["invariance"].item() == pytest.approx(oracles.invariance(z.detach().numpy()), rel=1e-12)
    assert terms.total.item() == pytest.approx(3 * terms.parts["invariance"].item() + 7 * terms.parts["matching"].item(), rel=1e-12)
    whole = torch.autograd.grad(terms.total, z, retain_graph=True)[0]
    parts = [torch.autograd.grad(part, z, retain_graph=True)[0] for part in (terms.parts["invariance"], terms.parts["matching"])]
    torch.testing.assert_close(whole, 3 * parts[0] + 7 * parts[1], rtol=1e-12, atol=1e-15)


def test_default_weights_are_those_of_the_paper() -> None:
    terms = RectifiedLpJEPALoss(target(), n=64)(uniform(2, 16, 8), 0)
    assert float(terms.total) == pytest.approx(25 * float(terms.parts["invariance"]) + 125 * float(terms.parts["matching"]), rel=1e-12)


def test_matching_is_the_mean_over_views_against_one_target() -> None:
    z = uniform(3, 16, 8, seed=1)
    each = [float(objective()(view[None], 0).parts["matching"]) for view in z]
    assert float(objective()(z, 0).parts["matching"]) == pytest.approx(np.mean(each), rel=1e-12)


def test_matching_of_zeros_is_the_second_moment() -> None:
    law = target(1.0, -1.0)
    loss = RectifiedLpJEPALoss(law, kind="orthogonal", n=64)
    values = [float(loss(torch.zeros(1, 512, 64), step).parts["matching"]) for step in range(4)]
    assert np.mean(values) == pytest.approx(float(law.second_moment), rel=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_under_autocast_has_the_float32_value(dtype: torch.dtype) -> None:
    z = uniform(2, 16, 8, seed=1).to(dtype)
    wanted = objective("eigen+random")(z.float(), 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = objective("eigen+random")(z, 0)
    assert got.total.dtype == torch.float32
    assert [float(x) for x in tensors(got)] == [float(x) for x in tensors(wanted)]


def test_nan_embedding_gives_a_nan_loss() -> None:
    z = uniform(2, 16, 8, seed=1)
    z[1, 3, 2] = torch.nan
    terms = objective()(z, 0)
    assert bool(terms.total.isnan()) and bool(terms.parts["matching"].isnan())


def test_gradient_descent_on_free_embeddings_reaches_the_floor() -> None:
    loss = RectifiedLpJEPALoss(target(), 0.0, 1.0, n=64)
    z = torch.zeros(1, 64, 8).add_(uniform(1, 64, 8, dtype=torch.float32), alpha=0.01).requires_grad_()
    start = loss(z, 0).parts["matching"].item()
    optimizer = torch.optim.Adam([z], lr=0.03)
    for step in range(150):
        optimizer.zero_grad()
        loss(z, step).total.backward()
        optimizer.step()
    end = np.mean([float(loss(z.detach(), step).parts["matching"]) for step in range(1000, 1010)])
    assert start > 0.3
    assert end < 1.3 * loss.floor(64, 8, repeats=10)
