"""The clustering probe against scikit-learn."""

import numpy as np
import pytest
from clusters import codes
from sklearn.metrics import mutual_info_score, normalized_mutual_info_score

from rlpjepa_zoo.evaluation.probes.base import fit
from rlpjepa_zoo.evaluation.probes.clustering import clustering


def test_clusters_are_scored_by_normalised_mutual_information(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = codes(rng, 200, 40, noise=1.0)
    fitted = []
    monkeypatch.setattr(f"{clustering.__module__}.fit", lambda *given: fitted.append(fit(*given)) or fitted[-1])
    score = clustering(x, y)
    labels = fitted[0].labels_
    counts = [np.bincount(classes) / len(classes) for classes in (labels, y)]
    entropies = [-(share[share > 0] * np.log(share[share > 0])).sum() for share in counts]
    assert score == pytest.approx(mutual_info_score(y, labels) / np.mean(entropies), abs=1e-9)
    assert score == pytest.approx(normalized_mutual_info_score(y, labels), abs=1e-12) and 0.2 < score < 1
    assert len(set(labels)) == 4 and fitted[0].cluster_centers_.shape == (4, 40)
