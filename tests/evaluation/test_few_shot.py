"""Few-shot accuracy against loops, and its random draws."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from clusters import clusters, codes, sparse
from torch import Tensor

from rlpjepa_zoo.core.rng import generator
from rlpjepa_zoo.errors import DataError
from rlpjepa_zoo.evaluation.probes import few_shot as module
from rlpjepa_zoo.evaluation.probes.few_shot import few_shot


def former_one_shot(x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor, draws: int, seed: int) -> list[float]:
    """One-shot accuracies as the first version of the package computed them."""
    members = [torch.nonzero(y == c).flatten() for c in y.unique()]
    cosine = torch.nn.functional.normalize(test_x.double()) @ torch.nn.functional.normalize(x.double()).T
    scores = []
    for draw in range(draws):
        source = generator(seed, "one-shot", draw)
        chosen = torch.stack([m[torch.randint(len(m), (1,), generator=source)] for m in members]).flatten()
        scores.append(float((y[chosen][cosine[:, chosen].argmax(1)] == test_y).double().mean()))
    return scores


@pytest.mark.parametrize("seed", [0, 3])
def test_one_shot_equals_its_first_version(rng: np.random.Generator, seed: int) -> None:
    (x, y), (test_x, test_y) = clusters(rng, 90), clusters(rng, 70)
    accuracies, _ = few_shot(x, y, test_x, test_y, draws=30, seed=seed)
    assert np.allclose(accuracies, former_one_shot(x, y, test_x, test_y, 30, seed), atol=1e-12) and accuracies.std() > 0


@pytest.mark.parametrize("form", [np.asarray, sparse], ids=["dense", "sparse"])
@pytest.mark.parametrize("shots", [2, 5])
def test_few_shot_is_the_nearest_mean_of_unit_rows(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, form: Callable[..., Any], shots: int
) -> None:
    (x, y), (test_x, test_y) = codes(rng), codes(rng, 50)
    drawn = []
    draw = module._draw
    monkeypatch.setattr(module, "_draw", lambda *given: drawn.append(draw(*given)) or drawn[-1])
    accuracies, _ = few_shot(form(x), y, form(test_x), test_y, shots, draws=6)
    assert len(drawn) == 6 and len({tuple(picks.ravel()) for picks in drawn}) == 6
    for picks, score in zip(drawn, accuracies, strict=True):
        assert all(len(set(picks[c])) == shots and set(y[picks[c]]) == {c} for c in range(4))
        right = 0
        for query, label in zip(test_x.astype(np.float64), test_y, strict=True):
            cosines = []
            for c in range(4):
                mean = np.mean([row / max(np.linalg.norm(row), 1e-300) for row in x[picks[c]].astype(np.float64)], axis=0)
                cosines.append(mean @ query / max(np.linalg.norm(mean) * np.linalg.norm(query), 1e-300))
            right += int(np.argmax(cosines) == label)
        assert score == pytest.approx(right / 50, abs=1e-12)


@pytest.mark.parametrize("shots", [1, 3])
def test_share_of_an_image_is_its_accuracy_over_draws(rng: np.random.Generator, shots: int) -> None:
    (x, y), (test_x, test_y) = codes(rng), codes(rng, 50)
    accuracies, shares = few_shot(x, y, test_x, test_y, shots, draws=8)
    alone = [few_shot(x, y, test_x[i : i + 1], test_y[i : i + 1], shots, draws=8)[0].mean() for i in range(50)]
    assert shares.tolist() == pytest.approx(alone, abs=1e-12) and 0 < shares.std()
    assert shares.mean() == pytest.approx(accuracies.mean(), abs=1e-12)


def test_draws_do_not_depend_on_the_representation(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = clusters(rng)
    drawn = []
    draw = module._draw
    monkeypatch.setattr(module, "_draw", lambda *given: drawn.append(draw(*given).tolist()) or np.array(drawn[-1]))
    for form, seed in ((x, 0), (torch.randn(120, 3), 0), (x, 1)):
        few_shot(form, y, form, y, 3, draws=4, seed=seed)
    assert drawn[:4] == drawn[4:8] and drawn[:4] != drawn[8:]


def test_global_generator_is_unused_and_few_images_are_refused(rng: np.random.Generator) -> None:
    x, y = clusters(rng)
    state = torch.get_rng_state()
    (first, _), (second, _) = (few_shot(x, y, x, y, 5, draws=5) for _ in range(2))
    assert np.array_equal(first, second) and torch.equal(torch.get_rng_state(), state)
    fewest = int(np.bincount(y).min())
    with pytest.raises(DataError, match=f"class {int(np.bincount(y).argmin())} has {fewest} training images"):
        few_shot(x, y, x, y, fewest + 1)
    for given in ((x[:0], y[:0], x, y), (x, y, x[:0], y[:0])):
        with pytest.raises(DataError, match="no labelled images"):
            few_shot(*given)
    accuracies, _ = few_shot(np.zeros((8, 3)), np.arange(8) % 2, np.zeros((8, 3)), np.arange(8) % 2, draws=5)
    assert accuracies.tolist() == [0.5] * 5
