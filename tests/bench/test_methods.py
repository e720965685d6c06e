"""Methods that make sparse codes of features: their codes, their training, and losses against independent statements."""

import math

import numpy as np
import oracles
import pytest
import torch
from runs import CACHED, tiny
from torch import Tensor, nn

from rlpjepa_zoo.bench.methods import METHODS
from rlpjepa_zoo.bench.methods.autoencoders import CSR, CSRv2, TopKAutoencoder
from rlpjepa_zoo.bench.methods.base import Features, Learned
from rlpjepa_zoo.bench.methods.fixed import PrincipalComponents, RandomProjection
from rlpjepa_zoo.bench.methods.ours import Ours
from rlpjepa_zoo.bench.methods.quantisation import ProductQuantisation, kmeans
from rlpjepa_zoo.config.pretrain import Recipe
from rlpjepa_zoo.models.pretrained import load_encoder
from rlpjepa_zoo.objectives.contrast import info_nce
from rlpjepa_zoo.training.tasks.encoders import build_encoder
from rlpjepa_zoo.training.tasks.pretrain import train

Compared = tuple[Recipe, Features]
CPU = torch.device("cpu")
LEARNED = sorted(name for name, kind in METHODS.items() if issubclass(kind, Learned))


def fitted(name: str, compared: Compared, k: int = 4, seed: int = 0):  # type: ignore[no-untyped-def]
    recipe, features = compared
    method = METHODS[name](recipe.model_copy(update={"seed": seed}), CPU)
    method.fit(features, None if method.one_fit else k)
    return method


@pytest.mark.parametrize("name", [name for name, kind in METHODS.items() if kind.default])
def test_codes_are_non_negative_with_at_most_k_values(compared: Compared, name: str) -> None:
    method, test = fitted(name, compared), compared[1].test
    z = method.codes(test, 4)
    assert z.dtype == torch.float32 and len(z) == len(test) and (z >= 0).all() and z.any()
    if method.sparse:
        assert int((z > 0).sum(1).max()) <= 4
    if method.one_fit:
        full = method.codes(test, None)
        assert torch.equal(full.where(z > 0, torch.zeros(())), z)  # the same values, fewer of them
        assert (full.sort(1, descending=True).values[:, :4].relu() == z.sort(1, descending=True).values[:, :4]).all()


@pytest.mark.parametrize("name", [name for name, kind in METHODS.items() if kind.default])
def test_codes_are_a_function_of_the_seed(compared: Compared, name: str) -> None:
    a, b, other = (fitted(name, compared, seed=seed).codes(compared[1].test, 4) for seed in (0, 0, 1))
    assert torch.equal(a, b) and torch.equal(a, other) != METHODS[name].random


def test_all_trained_methods_see_the_same_batches(compared: Compared, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[tuple[int, Tensor]]] = {}
    for name in LEARNED:
        kind, original = METHODS[name], METHODS[name].loss

        def loss(self: Learned, views: Tensor, step: int, name: str = name, original=original) -> Tensor:  # type: ignore[no-untyped-def]
            seen.setdefault(name, []).append((step, views))
            return original(self, views, step)

        with monkeypatch.context() as patch:
            patch.setattr(kind, "loss", loss)
            fitted(name, compared)
    first = seen.pop(LEARNED[0])
    assert [step for step, _ in first] == list(range(8)) and first[0][1].shape == (2, 64, 96)
    for batches in seen.values():
        assert all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in zip(batches, first, strict=True))


def test_ours_is_what_train_trains(compared: Compared, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """From the same initial projector, the codes of the encoder that a run publishes."""
    recipe, features = compared
    start, build = build_encoder(recipe), Ours.build

    def same_start(self: Ours, features: Features, k: int | None) -> nn.Module:
        module = build(self, features, k)
        self.task.core.projector.load_state_dict(start.projector.state_dict())
        return module

    monkeypatch.setattr(Ours, "build", same_start)
    published = load_encoder(train(tiny(*CACHED), tmp_path / "run", progress=False))
    with torch.no_grad():
        expected = published.eval().outputs(features.test)
    assert torch.allclose(fitted("ours", compared).codes(features.test, None), expected, atol=1e-5) and (expected > 0).any()


# --- losses ---------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("views", [2, 3])
def test_info_nce_equals_its_definition(views: int) -> None:
    z = torch.rand(views, 5, 7, generator=torch.Generator().manual_seed(views))
    assert float(info_nce(z, 0.2)) == pytest.approx(oracles.info_nce(z.numpy(), 0.2), rel=1e-5)


def test_info_nce_equals_that_of_lightly() -> None:
    losses = pytest.importorskip("lightly.loss")
    z = torch.rand(2, 6, 8, generator=torch.Generator().manual_seed(0))
    assert float(info_nce(z, 0.3)) == pytest.approx(float(losses.NTXentLoss(0.3)(z[0], z[1])), rel=1e-5)


def autoencoder(features: int = 6, units: int = 160) -> tuple[TopKAutoencoder, Tensor]:
    """One with biases, on features that are centred and scaled already, and a batch of two views."""
    source = torch.Generator().manual_seed(0)
    model = TopKAutoencoder(torch.tensor([[1.0], [-1.0]]).expand(2, features), units)
    with torch.no_grad():
        model.encoder.weight.copy_(nn.functional.normalize(torch.randn(units, features, generator=source), dim=1))
        model.decoder.copy_(model.encoder.weight)
        for bias in (model.bias, model.encoder.bias):
            bias.normal_(0, 0.1, generator=source)
    return model, torch.randn(2, 4, features, generator=source)


def never_used(model: TopKAutoencoder, views: Tensor, k: int) -> set[int]:
    """Units that no row has among its 4 k largest."""
    with torch.no_grad():
        z, _ = model.terms(views, 4 * k, None)
    return set((z == 0).flatten(0, 1).all(0).nonzero().flatten().tolist())


@pytest.mark.parametrize("with_dead", [False, True])
def test_csr_loss_equals_its_definition(compared: Compared, with_dead: bool) -> None:
    model, views = autoencoder()
    dead = never_used(model, views, 3) if with_dead else set()
    model.idle.zero_()
    model.idle[list(dead)] = 1000
    method = CSR(compared[0], CPU)
    method.module, method.k = model, 3
    parameters = (model.encoder.weight, model.encoder.bias, model.decoder.T, model.bias)
    expected = oracles.csr_loss(views.numpy(), *(p.detach().double().numpy() for p in parameters), 3, dead)
    assert len(dead) >= 64 * with_dead
    assert method.loss(views, 0).item() == pytest.approx(expected, rel=1e-5)


def test_csr_reconstruction_equals_that_of_sentence_transformers() -> None:
    modules = pytest.importorskip(
        "sentence_transformers.sparse_encoder.modules.sparse_auto_encoder", reason="sentence-transformers is not installed"
    )
    losses = pytest.importorskip("sentence_transformers.sparse_encoder.losses.csr")
    model, views = autoencoder()
    dead = list(never_used(model, views, 3))
    model.idle.zero_()
    model.idle[dead] = 1000
    other = modules.SparseAutoEncoder(input_dim=6, hidden_dim=160, k=3, k_aux=160)
    with torch.no_grad():  # its decoder is the weight of the encoder, ours starts so
        other.encoder.weight.copy_(model.encoder.weight)
        other.pre_bias.copy_(model.bias)
        other.latent_bias.copy_(model.encoder.bias)
        other.stats_last_nonzero[dead] = 1000
    outputs = [other({"sentence_embedding": view}) for view in views]
    expected = losses.CSRReconstructionLoss(None, beta=1 / 32).compute_loss_from_embeddings(outputs)
    z, terms = model.terms(views, 3, 12)
    assert torch.allclose(z, torch.stack([output["sentence_embedding"] for output in outputs]), atol=1e-6)
    assert terms["k"].item() == pytest.approx(expected["reconstruction_loss_k"].item(), rel=1e-5)
    assert terms["more"].item() / 8 == pytest.approx(expected["reconstruction_loss_4k"].item(), rel=1e-5)
    assert terms["dead"].item() / 32 == pytest.approx(expected["reconstruction_loss_aux"].item(), rel=1e-5) and terms["dead"].item() > 0


def test_units_are_dead_after_thirty_steps_in_no_code_and_alive_after_one() -> None:
    model, views = autoencoder()
    for step in range(1, 32):
        _, terms = model.terms(views, 3, None)
        assert (terms["dead"].item() > 0) == (step >= 30)
    idle = model.idle.clone()
    model.terms(-views, 3, None)
    assert ((model.idle == 0) & (idle > 0)).any()


def test_decoder_starts_as_the_encoder_and_keeps_rows_of_length_one(compared: Compared) -> None:
    fresh = TopKAutoencoder(compared[1].train, 32)
    assert torch.allclose(fresh.decoder, nn.functional.normalize(fresh.encoder.weight, dim=1))
    trained = fitted("csr", compared).module
    assert torch.allclose(trained.decoder.norm(dim=1), torch.ones(32), atol=1e-5)
    assert not torch.allclose(trained.decoder, nn.functional.normalize(trained.encoder.weight, dim=1), atol=1e-3)


def test_csrv2_lowers_k_in_a_line_over_seven_tenths_of_the_training(compared: Compared) -> None:
    method = CSRv2(compared[0], CPU)
    method.steps, method.k = 100, 4
    assert [method.k_at(step) for step in (0, 35, 70, 99)] == [64, 34, 4, 4]
    method.k = 128
    assert {method.k_at(step) for step in range(100)} == {128}


# --- methods without training ---------------------------------------------------------------------------------------------------------------


def test_principal_components_keep_every_distance_and_their_order(compared: Compared) -> None:
    method: PrincipalComponents = fitted("pca", compared)
    train = compared[1].train
    z = method.codes(train, None)
    assert z.shape[1] == 2 * train.shape[1]
    scores = z[:, : train.shape[1]] - z[:, train.shape[1] :]
    assert torch.allclose(scores.square().sum(1), (train - train.mean(0)).square().sum(1), rtol=1e-3)
    variances = scores.var(0)
    assert (variances[:-1] >= variances[1:] - 1e-6).all() and torch.allclose(torch.cov(scores.T), variances.diag(), atol=1e-4)


def test_random_projections_have_the_density_of_the_target(compared: Compared) -> None:
    method: RandomProjection = fitted("random", compared)
    target = compared[0].target
    assert target is not None
    rates = (method.codes(compared[1].train, None) > 0).float().mean(0)
    assert rates == pytest.approx(target.density_in_theory(), abs=1.5 / len(compared[1].train))


def test_quantised_vectors_have_equal_bytes_and_come_nearer_with_more(compared: Compared) -> None:
    test, errors = nn.functional.normalize(compared[1].test, dim=1), []
    for k in (2, 8):
        method: ProductQuantisation = fitted("pq", compared, k)
        assert len(method.means) == 4 * k and all(len(means) <= 256 for means in method.means)
        errors.append(float((method.codes(compared[1].test, k) - test).square().mean()))
    assert errors[1] < errors[0] < float(test.square().mean())
    assert [ProductQuantisation.allows(k, 96) for k in (24, 25)] == [True, False]


def test_kmeans_finds_groups_and_keeps_centres_without_rows() -> None:
    source = torch.Generator().manual_seed(3)
    groups = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]])
    x = (groups[:, None] + 0.1 * torch.randn(3, 50, 2, generator=source)).flatten(0, 1)
    means = kmeans(x, 12, torch.Generator().manual_seed(0))
    assert torch.cdist(groups, means).amin(1).max() < 0.3 and means.isfinite().all()
    same = kmeans(torch.ones(20, 2), 4, source)
    assert torch.equal(same, torch.ones(4, 2)) and len(kmeans(x[:5], 9, source)) == 5
    assert math.isclose(float(np.mean(kmeans(x, 1, source).numpy())), float(x.mean()), rel_tol=1e-4)
