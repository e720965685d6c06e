"""What only a CUDA device can show; run with `pytest -m gpu`."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from rlpjepa_zoo.distributions import RectifiedGeneralizedGaussian, sigma_gn
from rlpjepa_zoo.loading import create_encoder, load_encoder
from rlpjepa_zoo.objectives import FAMILIES, RectifiedLpJEPALoss, directions, sliced_wasserstein
from rlpjepa_zoo.recipe import Recipe
from rlpjepa_zoo.training import train

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
def test_loss_and_gradient_match_the_float64_oracle(batch: int, dim: int, n: int, dtype: torch.dtype) -> None:
    z = torch.rand(2, batch, dim, device="cuda").to(dtype)
    y, c = law().sample((batch, dim)), directions("random", n, dim, torch.Generator("cuda").manual_seed(0))
    x = z.clone().requires_grad_()
    with torch.autocast("cuda", torch.bfloat16):
        loss = sliced_wasserstein(x, y, c)
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
    assert torch.equal(loss(z, 3).loss, loss(z, 3).loss) and not torch.equal(loss(z, 3).loss, loss(z, 4).loss)


@pytest.mark.parametrize(
    "more",
    [["train.precision=bf16"], ["train.precision=fp16"], ["train.compile=true"], ["train.precision=no", "train.channels_last=false"]],
)
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
