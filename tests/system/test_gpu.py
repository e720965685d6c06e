"""Tests that need a CUDA device; run with `pytest -m gpu`."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from rlpjepa_zoo.bench.loss import compare
from rlpjepa_zoo.config.pretrain import Recipe
from rlpjepa_zoo.config.sections import Data, Views
from rlpjepa_zoo.data.views import Augment
from rlpjepa_zoo.distributions import RectifiedGeneralizedGaussian, sigma_gn
from rlpjepa_zoo.models.factory import create_encoder
from rlpjepa_zoo.models.pretrained import load_encoder
from rlpjepa_zoo.objectives.rectified_lpjepa import RectifiedLpJEPALoss
from rlpjepa_zoo.ops.directions import FAMILIES, direction_blocks, directions
from rlpjepa_zoo.ops.sliced_wasserstein import sliced_wasserstein
from rlpjepa_zoo.training.tasks.pretrain import train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def law(mu: float = 0.0, p: float = 1.0) -> RectifiedGeneralizedGaussian:
    return RectifiedGeneralizedGaussian(torch.tensor(mu, device="cuda"), sigma_gn(p), p)


@pytest.mark.parametrize("p", [0.5, 1.0, 1.5, 2.0])
def test_samples_are_drawn_on_the_device_from_the_generator(p: float) -> None:
    def draw() -> torch.Tensor:
        return law(-0.5, p).sample((200_000,), generator=torch.Generator("cuda").manual_seed(1))

    assert draw().is_cuda and torch.equal(draw(), draw())
    expected = float(law(-0.5, p).l0)
    assert float((draw() > 0).float().mean()) == pytest.approx(expected, abs=4 * (expected * (1 - expected) / 200_000) ** 0.5)


@pytest.mark.parametrize(("batch", "dim", "n"), [(64, 100, 300), (256, 512, 1024), (1000, 64, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["random", "hadamard"])
def test_loss_and_gradient_match_the_float64_oracle(batch: int, dim: int, n: int, dtype: torch.dtype, kind: str) -> None:
    z = torch.rand(2, batch, dim, device="cuda").to(dtype)
    y, blocks = law().sample((batch, dim)), direction_blocks(kind, n, dim, torch.Generator("cuda").manual_seed(0))
    c = torch.cat([block.matrix() for block in blocks])
    x = z.clone().requires_grad_()
    with torch.autocast("cuda", torch.bfloat16):
        loss = sliced_wasserstein(x, y, blocks)
    loss.backward()
    a, b, k = (t.double().cpu() for t in (z, y, c))
    reference = a.clone().requires_grad_()
    exact = sum(((k @ v.T).sort(1).values - (k @ b.T).sort(1).values).square().mean() for v in reference) / 2
    exact.backward()
    assert loss.dtype == torch.float32 and float(loss) == pytest.approx(float(exact), rel=1e-5)
    error = (x.grad.double().cpu() - reference.grad).norm() / reference.grad.norm()
    assert float(error) < (5e-3 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_directions_live_on_the_device(family: str) -> None:
    c = directions(family, 48, 32, torch.Generator("cuda").manual_seed(0), features=torch.randn(64, 32, device="cuda"))
    assert c.is_cuda and torch.allclose(c.norm(dim=1), torch.ones(48, device="cuda"), atol=1e-5)


def test_objective_is_a_function_of_seed_and_step() -> None:
    z = torch.rand(2, 64, 32, device="cuda")
    loss = RectifiedLpJEPALoss(law(), kind="orthogonal", n=64)
    assert torch.equal(loss(z, 3).total, loss(z, 3).total) and not torch.equal(loss(z, 3).total, loss(z, 4).total)


@pytest.mark.parametrize(
    "more",
    [["train.precision=bf16"], ["train.precision=fp16"], ["train.compile=true"], ["train.precision=no", "train.channels_last=false"],
     ["train.ema=0.9", "views.local={count: 2, size: 16}"]],
)  # fmt: skip
def test_training_learns(tmp_path: Path, more: list[str]) -> None:
    folder = train(
        Recipe.load("digits", ["train.epochs=6", "optim.warmup_epochs=1", "train.log_every=1", *more]), tmp_path / "run", progress=False
    )
    losses = [row["loss"] for row in map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines()) if row["kind"] == "train"]
    assert np.isfinite(losses).all() and np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    assert load_encoder(folder, device="cuda").device.type == "cuda"


def test_embedding_on_the_device_equals_the_cpu() -> None:
    enc, x = create_encoder("test_resnet", dim=32).eval(), torch.randn(16, 3, 32, 32)
    cpu, gpu = enc.embed(x).to_dense(), enc.to("cuda").embed(x).to_dense()
    assert np.allclose(cpu, gpu, atol=1e-3)


def test_views_made_on_the_device_are_those_of_the_cpu() -> None:
    views = Views(count=3, crop_scale=(0.2, 1.0), rotate=10, translate=0.1, blur=0.5, solarize=0.2, equalize=0.2, noise=0.1)
    augment = Augment(views, Data(source="digits", image_size=32, mean=(0, 0, 0), std=(1 / 255, 1 / 255, 1 / 255)), seed=0)
    pixels = torch.randint(0, 256, (64, 3, 9, 9), dtype=torch.uint8).float()
    smooth = torch.nn.functional.interpolate(pixels, size=(40, 48), mode="bicubic").clamp(0, 255).to(torch.uint8)
    cpu, gpu = (augment([smooth.to(device)], 1, torch.arange(64))[0] for device in ("cpu", "cuda"))
    difference = (cpu - gpu.cpu()).abs()
    assert gpu.is_cuda and float((difference > 1.01).float().mean()) < 0.02 and float(difference.mean()) < 0.1


def test_an_fp16_overflow_is_skipped_and_lowers_the_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = RectifiedLpJEPALoss.__call__

    def broken(self, z, step):  # type: ignore[no-untyped-def]
        terms = original(self, z, step)
        return terms._replace(total=terms.total * float("inf")) if step in (4, 5) else terms

    monkeypatch.setattr(RectifiedLpJEPALoss, "__call__", broken)
    recipe = Recipe.load("digits", ["train.epochs=3", "optim.warmup_epochs=1", "train.log_every=1", "train.precision=fp16"])
    train(recipe, tmp_path / "run", progress=False)
    assert json.loads((tmp_path / "run/summary.json").read_text())["skipped"] >= 2


def test_a_run_on_the_device_resumes_where_it_was(tmp_path: Path) -> None:
    more = ["optim.warmup_epochs=1", "train.log_every=1", "train.precision=no"]
    whole, half = (Recipe.load("digits", [f"train.epochs={epochs}", *more]) for epochs in (4, 2))
    train(half, tmp_path / "run", progress=False)
    train(whole, tmp_path / "run", resume=True, allow_change=["train.epochs"], progress=False)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, rows[-1]["step"] + 1))


def test_products_stay_float32_whatever_torch_allows() -> None:
    y, c = law().sample((256, 512)), directions("random", 64, 512, torch.Generator("cuda").manual_seed(0))
    z = torch.rand(2, 256, 512, device="cuda")
    wanted = sliced_wasserstein(z, y, c)
    torch.set_float32_matmul_precision("high")
    try:
        assert torch.equal(sliced_wasserstein(z, y, c), wanted) and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_loss_is_timed_on_the_device() -> None:
    found = compare(64, 64, 256, repeats=2, device="cuda")
    assert all(row["bytes"] > 0 and row["seconds"][0] > 0 for row in found["rows"].values()) and "threads" not in found["machine"]
