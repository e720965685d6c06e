"""LeJEPA's loss as the weighted sum of its terms; its gradients over processes are tested with SIGReg."""

import numpy as np
import pytest
import torch

from rlpjepa_zoo.objectives.lejepa import LeJEPALoss
from rlpjepa_zoo.objectives.sigreg import SIGReg


@pytest.mark.parametrize("views", [1, 2, 4])
def test_loss_is_the_weighted_sum_of_its_terms(views: int) -> None:
    z = torch.randn(views, 20, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for regulariser in (SIGReg("lejepa", 16, 1), SIGReg("weak", 4, 1)):
        terms = LeJEPALoss(0.2, regulariser)(z.requires_grad_(), 3)
        with torch.no_grad():
            spread = np.mean([(view - z.mean(0)).square().mean().item() for view in z])
        assert terms.parts["invariance"].item() == pytest.approx(spread, rel=1e-12, abs=1e-30)
        assert terms.parts["matching"].item() == regulariser(z, 3).item()
        assert terms.total.item() == pytest.approx(0.2 * terms.parts["matching"].item() + 0.8 * spread, rel=1e-12)
        parts = [torch.autograd.grad(term, z, retain_graph=True)[0] for term in (terms.total, *terms.parts.values())]
        assert torch.allclose(parts[0], 0.8 * parts[1] + 0.2 * parts[2], rtol=1e-10, atol=1e-14)
