"""The reconstruction term against a statement in numpy, its invariances, and its gradient on two processes."""

import numpy as np
import pytest
import torch
from processes import run_ranks

from rlpjepa_zoo.core import distributed
from rlpjepa_zoo.objectives.reconstruction import ReconstructionLoss


def batch(n: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(3)
    return torch.randn(n, 5, generator=source) * 3 + 2, torch.randn(n, 9, generator=source).relu()


def term(active: list[int]) -> ReconstructionLoss:
    torch.manual_seed(1)
    return ReconstructionLoss(5, 9, active)


def test_term_is_the_mean_squared_error_of_the_largest_values() -> None:
    features, z = batch()
    module = term([2, 4])
    weight, bias = module.weight.detach().numpy(), module.bias.detach().numpy()
    wanted = features.numpy() - features.numpy().mean(0)
    wanted = wanted / np.sqrt((wanted**2).mean())
    errors = []
    for k in (2, 4):
        kept = np.zeros_like(z.numpy())
        for row, values in enumerate(z.numpy()):
            for column in np.argsort(-values, kind="stable")[:k]:
                kept[row, column] = values[column]
        errors.append(((kept @ weight + bias - wanted) ** 2).mean())
    assert float(module(features, z).detach()) == pytest.approx(np.mean(errors), rel=1e-5)


def test_more_values_than_dimensions_are_all_values() -> None:
    features, z = batch()
    assert torch.equal(term([9])(features, z), term([40])(features, z))
    assert torch.equal(term([2, 9])(features, z), term([2, 40])(features, z))


def test_shift_and_scale_of_the_features_do_not_matter_and_they_get_no_gradient() -> None:
    features, z = batch()
    features.requires_grad_()
    z.requires_grad_()
    loss = term([3])(features, z)
    loss.backward()
    assert features.grad is None and z.grad is not None and int((z.grad != 0).sum(1).max()) == 3
    assert float(term([3])(features.detach() * 7 - 4, z.detach()).detach()) == pytest.approx(float(loss.detach()), rel=1e-5)
    assert torch.isfinite(term([3])(torch.ones(4, 5), z[:4]))  # equal features
    with torch.autocast("cpu", torch.bfloat16):
        assert float(term([3])(features.detach().bfloat16().float(), z.detach()).detach()) == pytest.approx(float(loss.detach()), rel=0.02)


def of_rank() -> list[float]:
    features, z = batch()
    share = len(z) // distributed.world_size()
    mine = slice(distributed.rank() * share, (distributed.rank() + 1) * share)
    module = term([2, 9])
    loss = module(features[mine], z[mine])
    loss.backward()
    assert module.weight.grad is not None
    return distributed.mean_over_ranks(torch.cat([loss.detach()[None], module.weight.grad.flatten()])).tolist()


def test_two_processes_give_the_gradient_of_one() -> None:
    for rank in run_ranks(of_rank, 2):
        assert rank == pytest.approx(of_rank(), rel=1e-4, abs=1e-6)
