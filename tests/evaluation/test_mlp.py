"""The MLP probe."""

import numpy as np

from rlpjepa_zoo.evaluation.probes.linear import linear
from rlpjepa_zoo.evaluation.probes.mlp import mlp


def test_mlp_solves_a_task_that_is_not_linear(rng: np.random.Generator) -> None:
    x = rng.uniform(0.2, 1, (600, 2)) * rng.choice([-1, 1], (600, 2))
    y = (x[:, 0] * x[:, 1] > 0).astype(int)
    assert (mlp(x[:400], y[:400], x[400:]) == y[400:]).mean() > 0.95 > 0.7 > (linear(x[:400], y[:400], x[400:]) == y[400:]).mean()
    assert np.array_equal(mlp(x[:100], y[:100], x), mlp(x[:100], y[:100], x))
