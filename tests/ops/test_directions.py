"""Families of directions and their mixes: unit length, orthonormality, isotropy, eigenvectors, counts."""

import re

import numpy as np
import pytest
import torch
from torch import Tensor

from rlpjepa_zoo.errors import NonFiniteError
from rlpjepa_zoo.ops.directions import FAMILIES, directions, parse_directions

KINDS = [*FAMILIES, "axes+random", "eigen+random", "eigen-bottom+orthogonal", "eigen:3+axes:5+random", "random+orthogonal"]


def source(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def spectrum(batch: int, dim: int, seed: int = 0) -> Tensor:
    """Features of a known, well separated covariance, off centre."""
    rotation = np.linalg.qr(np.random.default_rng(seed).normal(size=(dim, dim)))[0]
    x = np.random.default_rng(seed + 1).normal(size=(batch, dim)) * 0.7 ** np.arange(dim)
    return torch.from_numpy(x @ rotation + 3).float()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "dim"), [(40, 10), (33, 10), (32, 16)])
def test_directions_are_unit_vectors_from_their_generator(kind: str, n: int, dim: int) -> None:
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
def test_autocast_does_not_change_directions(kind: str) -> None:
    x = spectrum(200, 10)
    expected = directions(kind, 40, 10, source(1), features=x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(directions(kind, 40, 10, source(1), features=x), expected)


@pytest.mark.parametrize("kind", ["orthogonal", "axes", "eigen", "eigen-bottom"])
@pytest.mark.parametrize(("n", "dim"), [(5, 12), (12, 12), (30, 12), (1, 1), (3, 1)])
def test_blocks_of_a_basis_are_orthonormal(kind: str, n: int, dim: int) -> None:
    for block in directions(kind, n, dim, source(), features=spectrum(100, dim)).split(dim):
        torch.testing.assert_close(block @ block.T, torch.eye(len(block)), rtol=0, atol=3e-6)


def test_orthogonal_blocks_are_different_bases() -> None:
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
    for kind, expected in (("eigen", falling), ("eigen-bottom", falling.flip(0))):
        c = directions(kind, 10, 10, source(), features=features).double()
        torch.testing.assert_close((c * expected).sum(1).abs(), torch.ones(10, dtype=torch.float64), rtol=0, atol=1e-5)
        for n in (4, 23):
            assert torch.equal(directions(kind, n, 10, source(), features=features).double(), c.repeat(3, 1)[:n])


@pytest.mark.parametrize("batch", [1, 2, 6, 12])
def test_eigen_basis_of_a_small_batch_is_completed(batch: int) -> None:
    x = torch.rand(batch, 12, generator=source(1))
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


def test_mix_consists_of_its_families() -> None:
    x = spectrum(100, 10)
    c = directions("eigen:3+axes+random", 40, 10, source(), features=x)
    alone = directions("eigen", 3, 10, source(), features=x)
    assert torch.equal(c[:3], alone)
    assert torch.equal(c[3:13], torch.eye(10))
    assert float(c[13:].abs().max()) < 1


@pytest.mark.parametrize(
    ("kind", "n", "expected"),
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
def test_kind_is_parsed_into_counts(kind: str, n: int, expected: list[tuple[str, int]]) -> None:
    assert parse_directions(kind, n, 10) == expected


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
def test_fewer_than_one_direction_is_refused(n: int, dim: int) -> None:
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


def test_directions_are_float32_whatever_the_default_dtype() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        assert {directions(family, 70, 64, source(), torch.rand(9, 64, dtype=torch.float32)).dtype for family in FAMILIES} == {
            torch.float32
        }
    finally:
        torch.set_default_dtype(torch.float32)
