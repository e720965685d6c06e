"""The dial makes a trained encoder sparser; it is part of the encoder and travels with it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import settled
from published import config_of
from refusals import refused

import rlpjepa_zoo as rz
from rlpjepa_zoo.cli import app as cli
from rlpjepa_zoo.config.pretrain import Recipe
from rlpjepa_zoo.data.sources import open_source
from rlpjepa_zoo.errors import ModelError, UsageError
from rlpjepa_zoo.sparse.embeddings import SparseEmbeddings
from rlpjepa_zoo.sparse.topk import Dial, keep_largest


@given(st.integers(0, 5), st.integers(1, 12), st.integers(1, 14), st.integers(0, 10**6))
def test_keep_largest_equals_a_sort_and_ties_keep_the_lower_column(rows: int, dim: int, k: int, seed: int) -> None:
    z = torch.randint(0, 4, (rows, dim), generator=torch.Generator().manual_seed(seed)).float()  # many ties and zeros
    expected = torch.zeros_like(z)
    for row, values in enumerate(z.tolist()):
        for column in sorted(range(dim), key=lambda c: (-values[c], c))[:k]:
            expected[row, column] = values[column]
    assert torch.equal(keep_largest(z, k), expected)
    assert SparseEmbeddings.from_dense(expected) == SparseEmbeddings.from_dense(z).top_k(k)


def test_gradient_is_that_of_the_kept_values() -> None:
    z = torch.tensor([[3.0, 1.0, 2.0]], requires_grad=True)
    keep_largest(z, 2).sum().backward()
    assert z.grad is not None and z.grad.tolist() == [[1.0, 0.0, 1.0]]


@pytest.mark.parametrize("mode", ["top_k", "threshold"])
def test_asked_density_is_reached_on_unseen_images(mode: str) -> None:
    source = open_source(Recipe.load("digits").data)
    enc = rz.load_encoder("test_resnet.digits")
    assert source.eval is not None
    twin = enc.with_density(0.05, mode, source.train.take(range(500)))  # type: ignore[arg-type]
    e = twin.embed(source.eval)
    assert abs(e.l0 - 0.05) < 0.005, e.l0
    counts = np.diff(e.indptr)
    assert counts.max() == 13 if mode == "top_k" else counts.std() > 1  # a threshold adapts to the image
    assert enc.embed(source.eval).l0 > 0.1  # the encoder itself is as it was


@pytest.mark.parametrize("mode", ["top_k", "threshold"])
def test_dial_is_saved_with_the_encoder(tmp_path: Path, mode: str) -> None:
    enc = settled()
    enc.config.info["results"] = {"knn_z": 0.9, "n_train": 5}
    assert "90.0 %" in enc.contents()["README.md"].decode()
    images = torch.randn(64, 3, 32, 32)
    twin = enc.with_density(0.2, mode, images)  # type: ignore[arg-type]
    path = twin.save_pretrained(tmp_path / "enc")
    again = rz.load_encoder(path)
    assert again.config.dial == twin.config.dial and again.fingerprint() == twin.fingerprint() != enc.fingerprint()
    assert again.embed(images) == twin.embed(images)
    assert json.loads((path / "config.json").read_text())["rlpjepa_zoo"]["format"] == 3
    card = (path / "README.md").read_text()
    assert "asked for 0.2 active" in card and "90.0 %" not in card  # what was measured without the dial is not said of it
    assert again.with_budget(2).config.dial == Dial("top_k", 2)
    plain = json.loads((enc.save_pretrained(tmp_path / "plain") / "config.json").read_text())
    assert plain["rlpjepa_zoo"]["format"] == 2 and "dial" not in plain["rlpjepa_zoo"]


@pytest.mark.parametrize("density", [0.02, 0.3, 0.9])
def test_shift_of_the_biases_gives_any_density(tmp_path: Path, density: float) -> None:
    enc = settled()
    enc.config.info.update({"density": {"asked": 0.5, "eval": 0.1}, "results": {"knn_z": 0.9}})
    images = torch.randn(64, 3, 32, 32)
    before, weights = enc.embed(images), {k: v.clone() for k, v in enc.state_dict().items()}
    twin = enc.with_budget(3).with_density(density, "shift", images)
    assert abs(twin.embed(images).l0 - density) < 1 / (64 * 24)  # at once exact, whether fewer or more values are asked than there were
    assert twin.config.dial is None and twin.config.info["density"]["asked"] == density and "results" not in twin.config.info
    path = twin.save_pretrained(tmp_path / "enc")
    again = rz.load_encoder(path)
    assert again.embed(images) == twin.embed(images) and again.fingerprint() == twin.fingerprint() != enc.fingerprint()
    assert json.loads((path / "config.json").read_text())["rlpjepa_zoo"]["format"] == 2
    assert "one shift of all biases gave the asked density on 64 images" in (path / "README.md").read_text()
    assert enc.embed(images) == before and all(torch.equal(v, weights[k]) for k, v in enc.state_dict().items())
    difference = enc.last_layer.bias - twin.last_layer.bias
    assert torch.allclose(difference, difference[0].expand_as(difference), atol=1e-5)


def test_encoders_with_different_dials_share_weights() -> None:
    enc = settled().eval()
    twin = enc.with_budget(2)
    x = torch.randn(5, 3, 32, 32)
    assert torch.equal(twin(x), keep_largest(enc(x), 2)) and not twin.training
    assert twin.backbone is enc.backbone and enc.config.dial is None


def test_fingerprint_is_recomputed_when_a_weight_changes() -> None:
    enc = settled()
    first = enc.fingerprint()
    assert enc.fingerprint() == first
    with torch.no_grad():
        enc.projector[-2].bias[0] += 1
    second = enc.fingerprint()
    assert second != first
    with torch.no_grad():
        enc.projector[-2].bias[0] -= 1
    enc.load_state_dict(settled().state_dict())
    assert enc.fingerprint() == first


def test_impossible_dials_are_refused() -> None:
    enc = settled()
    images = torch.randn(16, 3, 32, 32)
    for call in (
        lambda: enc.with_budget(0),
        lambda: enc.with_budget(25),
        lambda: enc.with_density(0.0),
        lambda: enc.with_density(1.0),
        lambda: enc.with_density(0.1, "other"),  # type: ignore[arg-type]
        lambda: enc.with_density(0.1, "threshold"),
        lambda: enc.with_density(0.1, "shift"),
        lambda: enc.with_density(0.0001, "shift", images),
        lambda: enc.with_density(0.5, "shift", images[:0]),
        lambda: enc.with_density(0.1, "threshold", images, max_active=3),
        lambda: enc.with_density(0.99, "threshold", images),
        lambda: enc.with_density(0.99, "top_k", images),
        lambda: rz.load_encoder("test_resnet.digits").with_density(0.5),
    ):
        with refused(UsageError):
            call()


@pytest.mark.parametrize(
    "dial", [3, [], {}, {"mode": "top_k"}, {"mode": "top_k", "value": 1.5}, {"mode": "x", "value": 1}, {"mode": "top_k", "value": 0},
             {"mode": "threshold", "value": -1.0}, {"mode": "top_k", "value": 3, "more": 1}, {"mode": "top_k", "value": True}]
)  # fmt: skip
def test_untrusted_dial_is_checked(tmp_path: Path, dial: object) -> None:
    path = settled().with_budget(3).save_pretrained(tmp_path / "enc")
    with config_of(path) as config:
        config["rlpjepa_zoo"]["dial"] = dial
    with refused(ModelError, match="dial"):
        rz.load_encoder(path)


def test_dial_command_writes_an_encoder_with_a_dial(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["dial", "test_resnet.digits", "--density", "0.05", "--out", str(tmp_path / "sparser")]) == 0
    assert "each image keeps its 13 largest values of 256" in capsys.readouterr().out
    assert rz.load_encoder(tmp_path / "sparser").config.dial == Dial("top_k", 13, 0.05)
