"""InfoNCE as a term of the objective: its value is in tests/bench, here its gradient on two processes and its place in the loss."""

import pytest
import torch
from processes import run_ranks

from rlpjepa_zoo.core import distributed
from rlpjepa_zoo.distributions import RectifiedGeneralizedGaussian, sigma_gn
from rlpjepa_zoo.objectives.contrast import info_nce
from rlpjepa_zoo.objectives.rectified_lpjepa import RectifiedLpJEPALoss


def of_rank() -> list[float]:
    """Value and gradient for a weight, averaged over ranks."""
    x = torch.randn(3, 8, 5, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(1)).requires_grad_()
    share = 8 // distributed.world_size()
    z = (x[:, distributed.rank() * share :][:, :share] @ weight).relu()
    loss = info_nce(z, 0.3, distributed.gather_with_grad(z, dim=1))
    loss.backward()
    assert weight.grad is not None
    return distributed.mean_over_ranks(torch.cat([loss.detach()[None], weight.grad.flatten()])).tolist()


def test_two_processes_give_value_and_gradient_of_one() -> None:
    for rank in run_ranks(of_rank, 2):
        assert rank == pytest.approx(of_rank(), rel=1e-4, abs=1e-6)


def test_it_is_a_term_with_a_weight_and_nothing_for_one_view() -> None:
    law = RectifiedGeneralizedGaussian(0.0, sigma_gn(1.0), 1.0)
    z = torch.rand(2, 16, 8, generator=torch.Generator().manual_seed(0))
    plain, with_contrast = (RectifiedLpJEPALoss(law, n=16, contrast_weight=weight)(z, 0) for weight in (0.0, 2.0))
    assert "contrast" not in plain.parts
    assert float(with_contrast.total - plain.total) == pytest.approx(2 * float(info_nce(z, 0.2)), rel=1e-4)
    assert float(info_nce(z[:1], 0.2)) == 0
