"""One, two and four gloo processes make the same updates, and two repeat a run bit for bit; planted mistakes as in public code are noticed."""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import PRELOADED, run_ranks
from runs import codes, rows, stop_after, tiny
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rlpjepa_zoo.core import distributed as collectives
from rlpjepa_zoo.core import rng
from rlpjepa_zoo.distributions import RectifiedGeneralizedGaussian, sigma_gn
from rlpjepa_zoo.errors import StoppedBySignal
from rlpjepa_zoo.objectives.rectified_lpjepa import RectifiedLpJEPALoss
from rlpjepa_zoo.training.checkpoint import latest
from rlpjepa_zoo.training.tasks.pretrain import train

UPDATES, VIEWS, BATCH, INPUTS, HIDDEN, WIDTH, DIRECTIONS = 20, 2, 24, 5, 16, 8, 34  # 34 directions: uneven shares for four
CASES = [
    ("random", torch.float64),
    ("orthogonal", torch.float64),
    ("eigen+random", torch.float64),
    ("hadamard", torch.float64),
    ("random", torch.float32),
]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4}
"""Relative to the largest entry after twenty steps of AdamW, which amplifies rounding."""


def draw(*shape: int, seed: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def updates(kind: str, dtype: torch.dtype) -> dict[str, Any]:
    """Losses of twenty updates and the parameters after them, on one process or on a rank of several."""
    width, n = (64, 150) if kind == "hadamard" else (WIDTH, DIRECTIONS)  # transforms begin at 64
    net = nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, width), nn.ReLU()).to(dtype)
    with torch.no_grad():
        for i, parameter in enumerate(net.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=10 + i) - 0.4)
    model = DistributedDataParallel(net) if dist.is_initialized() else net
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=1e-4)
    objective = RectifiedLpJEPALoss(RectifiedGeneralizedGaussian(-0.2, sigma_gn(1.0), 1.0), kind=kind, n=n, chunk=7)
    losses = []
    for step in range(UPDATES):
        images = (2 * draw(VIEWS, BATCH, INPUTS, seed=100 + step) - 1).to(dtype)
        images = images.chunk(collectives.world_size(), 1)[collectives.rank()]
        terms = objective(model(images.flatten(0, 1)).unflatten(0, images.shape[:2]), step)
        optimizer.zero_grad()
        terms.total.backward()
        optimizer.step()
        losses.append(collectives.mean_over_ranks(terms.total).item())
    return {"losses": losses, "parameters": [p.detach().clone() for p in net.parameters()]}


# --- planted mistakes -----------------------------------------------------------------------------------------------------------------


@contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    right = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, right)


def without_reduction() -> dict[str, Any]:
    """The backward of the gather drops the gradients of the other ranks."""

    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].narrow(ctx.dim, dist.get_rank() * ctx.rows, ctx.rows), None

    with patched(collectives._Gather, "backward", staticmethod(backward)):
        return updates("random", torch.float64)


def with_targets_of_each_rank() -> dict[str, Any]:
    """Every rank draws its own target, as with a generator seeded by rank."""
    right = rng.generator

    def generator(seed: int, purpose: Any, *counters: Any, **options: Any) -> torch.Generator:
        return right(seed, purpose, *counters, *([dist.get_rank()] if purpose == "target" else []), **options)

    with patched(rng, "generator", generator):
        return updates("random", torch.float64)


def with_directions_of_each_rank() -> dict[str, Any]:
    """Every rank takes the first share of the directions instead of its own."""
    right = collectives.rank

    def first() -> int:
        return 0

    def loss(self: RectifiedLpJEPALoss, z: Tensor, step: int) -> Any:
        with patched(collectives, "rank", first):
            return right_call(self, z, step)

    right_call = RectifiedLpJEPALoss.__call__
    with patched(RectifiedLpJEPALoss, "__call__", loss):
        result = updates("random", torch.float64)
    assert collectives.rank is right
    return result


MISTAKES: dict[str, Callable[[], dict[str, Any]]] = {
    "no reduction": without_reduction,
    "targets of each rank": with_targets_of_each_rank,
    "the same directions everywhere": with_directions_of_each_rank,
}


# --- equal updates --------------------------------------------------------------------------------------------------------------------


def on_a_rank() -> dict[Any, dict[str, Any]]:
    results: dict[Any, dict[str, Any]] = {case: updates(*case) for case in CASES}
    return results | {name: mistaken() for name, mistaken in MISTAKES.items()}


@pytest.fixture(scope="module")
def ranks() -> dict[int, list[dict[Any, dict[str, Any]]]]:
    """Results of each rank of two and of four."""
    return {world: run_ranks(on_a_rank, world) for world in (2, 4)}


@pytest.fixture(scope="module")
def alone() -> dict[Any, dict[str, Any]]:
    return {case: updates(*case) for case in CASES}


def apart(result: dict[str, Any], wanted: dict[str, Any]) -> float:
    """Largest difference of losses and of parameters, relative to the largest entry of each."""
    pairs = [
        (torch.tensor(result["losses"]), torch.tensor(wanted["losses"])),
        *zip(result["parameters"], wanted["parameters"], strict=True),
    ]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_several_processes_make_the_updates_of_one(ranks: Any, alone: Any, world: int, case: tuple[str, torch.dtype]) -> None:
    for rank in ranks[world]:
        assert apart(rank[case], alone[case]) < TOLERANCE[case[1]]
    for a, b in zip(ranks[world][0][case]["parameters"], ranks[world][-1][case]["parameters"], strict=True):
        assert torch.equal(a, b)


def test_the_updates_change_the_network(alone: Any) -> None:
    for case in CASES:
        assert alone[case]["losses"][-1] < 0.9 * alone[case]["losses"][0]


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_noticed(ranks: Any, alone: Any, world: int, mistake: str) -> None:
    for rank in ranks[world]:
        assert apart(rank[mistake], alone["random", torch.float64]) > 1e-3


@pytest.mark.parametrize("module", PRELOADED)
def test_preloaded_module_exists(module: str) -> None:
    assert importlib.util.find_spec(module) is not None


# --- whole runs -----------------------------------------------------------------------------------------------------------------------

SHARED = ["encoder.projector_depth=1", "encoder.freeze_backbone=true", "train.epochs=2", "probe.every_epochs=2"]
"""A model without batch statistics, so any number of processes must agree to rounding."""


def on_two_ranks(folder: str) -> str:
    """Two undisturbed runs, and one that one process began: it is resumed and stopped again."""
    for name in ("first", "second"):
        train(tiny(*SHARED), Path(folder) / name, progress=False)
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 4)
        try:
            train(tiny(*SHARED), Path(folder) / "handed over", resume=True, progress=False)
        except StoppedBySignal as stopped:
            return str(stopped)
    return "finished"


@pytest.mark.slow
def test_two_ranks_repeat_bit_for_bit_and_agree_with_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    mixed_run = tmp_path / "handed over"
    train(tiny(*SHARED), tmp_path / "alone", progress=False)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(StoppedBySignal):
            train(tiny(*SHARED), mixed_run, progress=False)
    assert all("after step 4" in message for message in run_ranks(on_two_ranks, 2, str(tmp_path)))
    first, second = (latest(tmp_path / name)[0] for name in ("first", "second"))
    assert first is not None and second is not None and all(torch.equal(a, second.model[k]) for k, a in first.model.items())
    assert rows(tmp_path / "first") == rows(tmp_path / "second")
    train(tiny(*SHARED), mixed_run, resume=True, progress=False)
    assert "2 processes before, 1 now: equal up to rounding, not bit for bit" in caplog.text
    alone, mixed = latest(tmp_path / "alone")[0], latest(mixed_run)[0]
    assert alone is not None and mixed is not None and mixed.step == 6
    for name, tensor in alone.model.items():
        for other in (mixed, first):
            assert torch.allclose(tensor.float(), other.model[name].float(), rtol=1e-5, atol=2e-6), name
    assert torch.allclose(codes(mixed_run / "encoder"), codes(tmp_path / "alone/encoder"), atol=1e-5)
