"""Random bases by fast transforms: orthonormality, transposes, and moments of uniform directions."""

import pytest
import torch

from rlpjepa_zoo.ops.directions import direction_blocks, directions
from rlpjepa_zoo.ops.hadamard import Rotations


def source(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("chunk", [1, 250])
@pytest.mark.parametrize("dim", [64, 96, 100, 127, 512])
def test_rotations_are_orthonormal_and_project_back_by_transpose(dim: int, chunk: int) -> None:
    (block,) = direction_blocks("hadamard", 2 * dim + 7, dim, source())
    assert isinstance(block, Rotations) and block.table.shape == (5, dim)
    c = block.matrix().double()
    assert c.shape == (2 * dim + 7, dim)
    for basis in (c[:dim], c[dim : 2 * dim]):
        assert float((basis @ basis.T - torch.eye(dim)).abs().max()) < 1e-5
    x, g = torch.randn(dim, 6, generator=source(1)), torch.randn(len(c), 6, generator=source(2))
    prepared, back = block.prepare(x), torch.zeros(dim, 6)
    for low, high in block.chunks(chunk):
        assert torch.allclose(block.project(prepared, low, high), (c[low:high] @ x.double()).float(), atol=1e-5)
        back += block.project_back(g[low:high].clone(), low, high)
    assert torch.allclose(block.prepare_back(back), (c.T @ g.double()).float(), atol=1e-4)


@pytest.mark.parametrize(("dim", "draws"), [(64, 500), (96, 500), (768, 100)])
def test_rotations_have_the_moments_of_uniform_directions(dim: int, draws: int) -> None:
    c = torch.cat([directions("hadamard", dim, dim, source(seed)) for seed in range(draws)]).double()
    x = torch.zeros(dim, 4, dtype=torch.float64)
    x[0, 0], x[:, 1] = 1.0, dim**-0.5  # sparse vectors are the hardest for a fast transform,
    x[:2, 2], x[[0, dim // 3], 3] = 0.5**0.5, 0.5**0.5  # and coordinates that differ in one digit for an uneven one
    p = c @ x
    assert torch.allclose(p.square().mean(0), torch.full((4,), 1 / dim, dtype=torch.float64), rtol=1e-5)
    fourth = 3 / (dim * (dim + 2))
    blocks = p.pow(4).view(draws, dim, 4).mean(1)
    assert float((blocks.std(0) / draws**0.5 / fourth).max()) < 0.01, "differences of a few percent would be seen"
    assert ((blocks.mean(0) - fourth).abs() < 4 * blocks.std(0) / draws**0.5).all()
    assert float((p.sum(0) / len(p)).abs().max()) < 4 / len(p) ** 0.5
