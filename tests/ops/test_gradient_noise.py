"""Noise of the gradient by directions, against a brute force, and the number of directions for a given error."""

import oracles
import pytest
import torch
from torch import Tensor

from rlpjepa_zoo.bench.loss import states
from rlpjepa_zoo.config.pretrain import Recipe
from rlpjepa_zoo.distributions import RectifiedGeneralizedGaussian, sigma_gn
from rlpjepa_zoo.errors import RecipeError
from rlpjepa_zoo.objectives.rectified_lpjepa import PAPER_ERROR
from rlpjepa_zoo.ops.directions import directions
from rlpjepa_zoo.ops.gradient_noise import directions_needed, gradient_error, matched
from rlpjepa_zoo.training.tasks.pretrain import build_objective

BATCH, DIM = 24, 64


def gradient(z: Tensor, y: Tensor, c: Tensor) -> Tensor:
    x = z.double().requires_grad_()
    return torch.autograd.grad(oracles.sliced_autograd(x, y.double(), c.double()), x)[0]


@pytest.mark.parametrize("state", ["early", "near", "matched"])
@pytest.mark.parametrize(("kind", "n"), [("random", 64), ("hadamard", 128)])
def test_error_equals_the_brute_force(state: str, kind: str, n: int) -> None:
    z, y = states(BATCH, DIM)[state]
    everything = gradient(z, y, directions("orthogonal", 400 * DIM, DIM, torch.Generator().manual_seed(5)))
    errors = []
    for seed in range(12):
        drawn = gradient(z, y, directions(kind, n, DIM, torch.Generator().manual_seed(seed)))
        errors.append(float((drawn - everything).norm() / everything.norm()) ** 2)
    brute = (sum(errors) / len(errors)) ** 0.5
    assert gradient_error(kind, n, z, y, draws=24) == pytest.approx(brute, rel=0.12)


def test_error_falls_with_the_root_of_the_number() -> None:
    z, y = states(BATCH, DIM)["near"]
    for kind in ("random", "orthogonal", "hadamard"):
        assert gradient_error(kind, DIM, z, y, draws=32) / gradient_error(kind, 4 * DIM, z, y, draws=32) == pytest.approx(2, rel=0.15)


@pytest.mark.parametrize("state", ["early", "near", "matched"])
def test_bases_beat_random_directions_and_transforms_equal_bases(state: str) -> None:
    z, y = states(BATCH, DIM)[state]
    random, bases, transforms = (gradient_error(kind, DIM, z, y, draws=32) for kind in ("random", "orthogonal", "hadamard"))
    assert bases < 0.95 * random and transforms == pytest.approx(bases, rel=0.12)


@pytest.mark.parametrize("kind", ["random", "orthogonal", "hadamard"])
def test_directions_needed_gives_the_requested_error(kind: str) -> None:
    z, y = states(BATCH, DIM)["near"]
    n = directions_needed(kind, 0.2, z, y, draws=32)
    assert (kind == "random" or n % DIM == 0) and gradient_error(kind, n, z, y, seed=1, draws=16) < 0.2 * 1.1
    assert gradient_error(kind, n // 2, z, y, seed=1, draws=16) > 0.2
    assert directions_needed(kind, 1e6, z, y) == (1 if kind == "random" else DIM)


@pytest.mark.parametrize("seed", range(8))
def test_one_direction_is_enough_if_all_give_one_gradient(seed: int) -> None:
    z, y = torch.randn(2, 16, 1, generator=torch.Generator().manual_seed(seed))  # of one dimension all directions are 1 or -1; no ties
    for kind in ("random", "orthogonal", "hadamard"):
        assert gradient_error(kind, 3, z, y, draws=7) < 1e-5 and directions_needed(kind, 0.1, z, y, draws=7) == 1


def test_families_with_constant_error_are_refused() -> None:
    with pytest.raises(ValueError, match="expected one of random, orthogonal, hadamard, got 'axes'"):
        directions_needed("axes", 0.3, *matched(RectifiedGeneralizedGaussian(0.0, sigma_gn(1.0), 1.0), 8, 8))


def test_auto_gives_the_number_for_the_error() -> None:
    asked = ["objective.directions=hadamard", "objective.num_directions=auto"]
    few, many = (build_objective(Recipe.load("digits", [*asked, *more])).n for more in (["objective.gradient_error=1"], []))
    dim = Recipe.load("digits").encoder.dim
    assert few % dim == many % dim == 0 and few < many
    z, y = matched(build_objective(Recipe.load("digits")).target, Recipe.load("digits").train.batch_size, dim)
    assert gradient_error("hadamard", many, z, y, seed=3) < PAPER_ERROR * 1.05 < gradient_error("hadamard", many - dim, z, y, seed=3) * 1.1


def test_default_error_of_auto_is_that_of_the_paper() -> None:
    z, y = matched(RectifiedGeneralizedGaussian(0.0, sigma_gn(1.0), 1.0), 256, 512)
    assert gradient_error("random", 8192, z, y, draws=4) == pytest.approx(PAPER_ERROR, abs=0.04)


@pytest.mark.parametrize("error", ["1e-9", "1e-200"])
def test_error_that_needs_too_many_directions_is_refused(error: str) -> None:
    asked = ["objective.directions=hadamard", "objective.num_directions=auto", f"objective.gradient_error={error}"]
    with pytest.raises(RecipeError, match=r"objective.gradient_error: an error of .* takes more than 1,048,576 directions"):
        build_objective(Recipe.load("digits", asked))
