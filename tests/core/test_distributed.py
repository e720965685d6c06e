"""One process: every collective is the identity. Two gloo processes: values, gradients, and the loss under DistributedDataParallel."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from processes import run_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rlpjepa_zoo.core import distributed
from rlpjepa_zoo.distributions import RectifiedGeneralizedGaussian, sigma_gn
from rlpjepa_zoo.errors import DataError
from rlpjepa_zoo.objectives.rectified_lpjepa import RectifiedLpJEPALoss

WORLD, BATCH, WIDTH, INPUTS, COUNT = 2, 24, 6, 5, 33
KINDS = ("random", "orthogonal", "eigen+random", "axes+random")
SIZES = ((3, 1), (0, 2), (2, 2), (0, 0))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(width: int) -> nn.Module:
    net = nn.Sequential(nn.Linear(INPUTS, width), nn.ReLU()).double()
    with torch.no_grad():
        for i, parameter in enumerate(net.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=10 + i) - 0.3)
    return net


def share(x: Tensor, dim: int = 0) -> Tensor:
    """This rank's share of the tensor that one process has."""
    return x.chunk(distributed.world_size(), dim)[distributed.rank()]


def train_step(kind: str, views: int = 2, n: int = COUNT, width: int = WIDTH) -> dict[str, Any]:
    """Terms averaged over ranks and parameter gradients of one step, on one process or on many."""
    net = network(width)
    model = DistributedDataParallel(net) if dist.is_initialized() else net
    images = share(2 * draw(views, BATCH, INPUTS, seed=1) - 1, 1)
    law = RectifiedGeneralizedGaussian(-0.2, sigma_gn(1.0), 1.0)
    z = model(images.flatten(0, 1)).unflatten(0, images.shape[:2])
    terms = RectifiedLpJEPALoss(law, kind=kind, n=n, chunk=7)(z, step=3)
    terms.total.backward()
    return {
        "terms": [distributed.mean_over_ranks(term).item() for term in (terms.total, *terms.parts.values())],
        "gradients": [parameter.grad.clone() for parameter in net.parameters()],
    }


class _OwnSlice(torch.autograd.Function):
    """A common wrong gather: its backward ignores the gradients of other ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int) -> Tensor:
        ctx.dim, ctx.rows = dim, x.shape[dim]
        return detached_gather(x, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].narrow(ctx.dim, dist.get_rank() * ctx.rows, ctx.rows), None


def detached_gather(x: Tensor, dim: int = 0) -> Tensor:
    parts = [torch.empty_like(x).contiguous() for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts, dim)


def mutated_step(gather: Callable[[Tensor, int], Tensor]) -> dict[str, Any]:
    right = distributed.gather_with_grad
    distributed.gather_with_grad = gather
    try:
        return train_step("random")
    finally:
        distributed.gather_with_grad = right


def gather_on_a_rank(dim: int, transposed: bool = False) -> dict[str, Any]:
    rank = dist.get_rank()
    leaf = draw(3, 2, 4, seed=20 + rank).requires_grad_()
    x = leaf.transpose(0, 1) if transposed else leaf
    gathered = distributed.gather_with_grad(x, dim)
    weight = draw(*gathered.shape, seed=30 + rank)
    (gathered * weight).sum().backward()
    return {"input": leaf.detach(), "gathered": gathered.detach(), "weight": weight, "gradient": leaf.grad}


def gather_beside_another_branch() -> dict[str, Tensor]:
    """A sum passes one gradient tensor to both of its terms."""
    rank = dist.get_rank()
    x, other = draw(2, 3).requires_grad_(), draw(4, 3).requires_grad_()
    scaled = other * 1.0
    scaled.retain_grad()
    weight = draw(4, 3, seed=40 + rank)
    ((distributed.gather_with_grad(x) + scaled) * weight).sum().backward()
    return {"gradient": other.grad, "inner": scaled.grad, "weight": weight}


def too_few_directions() -> str:
    try:
        RectifiedLpJEPALoss(RectifiedGeneralizedGaussian(0.0, 1.0, 1.0), n=1)(draw(2, 4, 3), 0)
    except ValueError as error:
        return str(error)
    return ""


def what_is_raised(trouble: Exception | None) -> str:
    try:
        distributed.raise_on_all_ranks(trouble)
    except DataError as error:
        return str(error)
    return "went on"


def rows_of(rank: int, sizes: tuple[int, int]) -> Tensor:
    return torch.arange(sizes[rank] * 2).view(-1, 2) + 100 * rank


def on_a_rank() -> dict[str, Any]:
    rank = dist.get_rank()
    own = torch.tensor([rank + 1.0, -rank])
    report: dict[str, Any] = {
        "who": (distributed.rank(), distributed.world_size()),
        "gather": {(dim, flip): gather_on_a_rank(dim, flip) for dim in (0, 1, 2) for flip in (False, True)},
        "beside": gather_beside_another_branch(),
        "mean": distributed.mean_over_ranks(own),
        "max": distributed.max_over_ranks(own),
        "own": own,
        "rows": {sizes: distributed.gather_rows(rows_of(rank, sizes)) for sizes in SIZES},
        "flat": distributed.gather_rows(torch.full((rank + 1,), rank == 1)),
        "objects": distributed.gather_objects({"rank": rank, "names": ["a"] * rank}),
        "steps": {kind: train_step(kind) for kind in KINDS},
        "even": train_step("random", n=32),
        "bases": train_step("axes:10+hadamard", n=175, width=64),
        "views": {views: train_step("random", views) for views in (1, 3)},
        "detached": mutated_step(detached_gather),
        "own slice": mutated_step(_OwnSlice.apply),
        "refusal": too_few_directions(),
        "together": [what_is_raised(trouble) for trouble in (None, DataError("no disk") if rank == 1 else None)],
    }
    distributed.barrier()
    distributed.shut_down()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    report["alone"] = (distributed.rank(), distributed.world_size(), distributed.gather_objects(rank))
    return report


def fail_on_last_rank() -> None:
    if dist.get_rank() == WORLD - 1:
        raise ArithmeticError("told to fail")


@pytest.fixture(scope="module")
def reports() -> list[dict[str, Any]]:
    return run_ranks(on_a_rank, WORLD)


def apart(got: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference of the gradients, relative to the largest entry of each."""
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, expected, strict=True))


# --- one process ----------------------------------------------------------------------------------------------------------------------


def test_one_process_is_rank_zero_of_one() -> None:
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    distributed.barrier()
    distributed.shut_down()


def test_gathers_are_the_identity_on_one_process() -> None:
    x = draw(3, 2).requires_grad_()
    assert distributed.gather_with_grad(x, 1) is x
    assert torch.equal(distributed.gather_rows(x), x)
    assert distributed.gather_objects("a") == ["a"]


@pytest.mark.parametrize("reduce", [distributed.mean_over_ranks, distributed.max_over_ranks])
def test_reductions_give_a_detached_copy_on_one_process(reduce: Callable[[Tensor], Tensor]) -> None:
    x = draw(3).requires_grad_()
    reduced = reduce(x)
    assert torch.equal(reduced, x) and not reduced.requires_grad
    reduced.zero_()
    assert float(x.detach().min()) > 0


# --- two processes: the distributed ---------------------------------------------------------------------------------------------------


def test_ranks_and_world_size_are_reported(reports: list[dict[str, Any]]) -> None:
    assert [r["who"] for r in reports] == [(0, 2), (1, 2)]
    assert [r["alone"] for r in reports] == [(0, 1, [0]), (0, 1, [1])]


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_gather_with_grad_joins_in_rank_order(reports: list[dict[str, Any]], dim: int, transposed: bool) -> None:
    results = [r["gather"][dim, transposed] for r in reports]
    parts = [result["input"].transpose(0, 1) if transposed else result["input"] for result in results]
    assert not torch.equal(parts[0], parts[1])
    for result in results:
        assert torch.equal(result["gathered"], torch.cat(parts, dim))


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_gather_with_grad_sums_the_gradients_of_all_ranks(reports: list[dict[str, Any]], dim: int, transposed: bool) -> None:
    results = [r["gather"][dim, transposed] for r in reports]
    expected = sum(result["weight"] for result in results).chunk(2, dim)
    for result, part in zip(results, expected, strict=True):
        torch.testing.assert_close(result["gradient"], part.transpose(0, 1) if transposed else part, rtol=1e-14, atol=0)


def test_gather_with_grad_keeps_the_gradient_of_other_branches(reports: list[dict[str, Any]]) -> None:
    for r in reports:
        torch.testing.assert_close(r["beside"]["gradient"], r["beside"]["weight"])
        torch.testing.assert_close(r["beside"]["inner"], r["beside"]["weight"])


def test_reductions_agree_on_both_ranks_and_keep_their_input(reports: list[dict[str, Any]]) -> None:
    for rank, r in enumerate(reports):
        assert r["mean"].tolist() == [1.5, -0.5]
        assert r["max"].tolist() == [2.0, 0.0]
        assert r["own"].tolist() == [rank + 1.0, -rank]


@pytest.mark.parametrize("sizes", SIZES)
def test_gather_rows_joins_uneven_parts(reports: list[dict[str, Any]], sizes: tuple[int, int]) -> None:
    expected = torch.cat([rows_of(rank, sizes) for rank in range(WORLD)])
    for r in reports:
        assert torch.equal(r["rows"][sizes], expected)


def test_gather_rows_keeps_booleans_and_one_dimension(reports: list[dict[str, Any]]) -> None:
    for r in reports:
        assert r["flat"].tolist() == [False, True, True]


def test_gather_objects_in_rank_order(reports: list[dict[str, Any]]) -> None:
    for r in reports:
        assert r["objects"] == [{"rank": 0, "names": []}, {"rank": 1, "names": ["a"]}]


# --- two processes: the loss ----------------------------------------------------------------------------------------------------------


def assert_equal_to_one_process(results: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    for result in results:
        assert result["terms"] == pytest.approx(expected["terms"], rel=1e-10, abs=0)
        assert apart(result["gradients"], expected["gradients"]) < 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_get_loss_and_gradient_of_one_process(reports: list[dict[str, Any]], kind: str) -> None:
    assert_equal_to_one_process([r["steps"][kind] for r in reports], train_step(kind))


def test_even_shares_of_directions_equal_one_process(reports: list[dict[str, Any]]) -> None:
    assert_equal_to_one_process([r["even"] for r in reports], train_step("random", n=32))


def test_shares_that_split_a_basis_equal_one_process(reports: list[dict[str, Any]]) -> None:
    assert_equal_to_one_process([r["bases"] for r in reports], train_step("axes:10+hadamard", n=175, width=64))


@pytest.mark.parametrize("views", [1, 3])
def test_other_numbers_of_views_equal_one_process(reports: list[dict[str, Any]], views: int) -> None:
    assert_equal_to_one_process([r["views"][views] for r in reports], train_step("random", views))


def test_families_of_directions_differ_in_gradient() -> None:
    gradients = [train_step(kind)["gradients"] for kind in KINDS]
    assert all(apart(a, b) > 1e-3 for i, a in enumerate(gradients) for b in gradients[:i])


@pytest.mark.parametrize("mutation", ["detached", "own slice"])
def test_wrong_gather_changes_the_gradient(reports: list[dict[str, Any]], mutation: str) -> None:
    expected = train_step("random")
    for r in reports:
        assert r[mutation]["terms"] == pytest.approx(expected["terms"], rel=1e-10)
        assert apart(r[mutation]["gradients"], expected["gradients"]) > 1e-2


def test_fewer_directions_than_ranks_are_refused_on_every_rank(reports: list[dict[str, Any]]) -> None:
    for r in reports:
        assert "fewer than 2 ranks" in r["refusal"]


def test_error_of_one_rank_is_raised_on_all(reports: list[dict[str, Any]]) -> None:
    assert [r["together"] for r in reports] == [["went on", "process 1: no disk"], ["went on", "no disk"]]
    assert what_is_raised(None) == "went on" and what_is_raised(DataError("full")) == "full"


def test_error_of_a_rank_is_raised_in_the_parent() -> None:
    with pytest.raises(mp.ProcessRaisedException, match="told to fail"):
        run_ranks(fail_on_last_rank, WORLD)
