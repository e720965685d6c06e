"""Charts of a report."""

import numpy as np

from rlpjepa_zoo.report.charts import thin


def test_thinning_keeps_extremes(rng: np.random.Generator) -> None:
    x = np.arange(20_001.0)
    y = rng.normal(size=len(x))
    y[7003], y[12_345] = 50.0, -40.0
    a, b = thin(x, y)
    assert len(a) <= 500 and a[0] == 0 and a[-1] == 20_000 and (np.diff(a) > 0).all()
    assert (7003.0, 50.0) in zip(a, b, strict=True) and (12_345.0, -40.0) in zip(a, b, strict=True)
    assert all(y[int(i)] == v for i, v in zip(a, b, strict=True))
    assert thin(x[:500], y[:500])[0] is not None and len(thin(x[:500], y[:500])[0]) == 500
