"""Training, evaluation and streaming on real images: the CIFAR-10 files in the folder RLPJEPA_CIFAR10."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from rlpjepa_zoo.config.pretrain import Recipe
from rlpjepa_zoo.data.loader import Batches, make_loader
from rlpjepa_zoo.data.sources import open_source
from rlpjepa_zoo.evaluation.encoding import Encoded, encode_sparse
from rlpjepa_zoo.evaluation.probes.knn import knn_accuracy
from rlpjepa_zoo.models.pretrained import load_encoder
from rlpjepa_zoo.training.tasks.pretrain import train

SMALL = [
    "data.limit=600", "encoder.backbone=test_resnet", "encoder.dim=64", "encoder.hidden_dim=64", "objective.num_directions=128", "train.num_workers=0",
    "train.batch_size=100", "train.epochs=4", "train.log_every=1", "probe.every_epochs=4", "probe.bank=500", "probe.eval_images=300", "optim.lr=0.01",
]  # fmt: skip


def recipe(path: Path, *more: str) -> Recipe:
    return Recipe.load("cifar10-cpu", [f"data.path={path}", *more])


def test_the_files_are_read_with_labels(cifar10: Path) -> None:
    source = open_source(recipe(cifar10).data)
    assert (len(source.train), source.classes) == (50_000, 10) and source.eval is not None
    assert source.train.read(0).size == (32, 32) and (np.bincount(source.train.labels) == 5000).all()


def test_the_shipped_encoder_beats_pixels_on_unseen_images(cifar10: Path) -> None:
    enc, source = load_encoder("resnet10_small_narrow.cifar10"), open_source(recipe(cifar10).data)
    bank, test = source.train.take(range(2500)), source.eval.take(range(700))
    of_bank, of_test = (encode_sparse(enc, images, with_pixels=True) for images in (bank, test))

    def accuracy(read: Callable[[Encoded], np.ndarray]) -> float:
        return knn_accuracy(read(of_bank), of_bank.labels, read(of_test), of_test.labels)

    raw = accuracy(lambda encoded: encoded.pixels / np.float32(255))
    assert accuracy(lambda encoded: encoded.features) > raw + 0.08
    assert accuracy(lambda encoded: encoded.z.to_dense()) > raw + 0.05
    assert 0.40 < of_test.z.l0 < 0.52


def test_training_learns_on_real_images(cifar10: Path, tmp_path: Path) -> None:
    train(recipe(cifar10, *SMALL), tmp_path / "run", progress=False)
    found = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in found if row["kind"] == "train"]
    assert np.mean(losses[-4:]) < 0.85 * np.mean(losses[:4])


def test_streaming_gives_the_same_batch_to_any_number_of_workers(cifar10: Path) -> None:
    more = ["data.streaming=true", "data.length=50000", "data.shuffle_buffer=200", "train.batch_size=32"]
    seen = []
    for workers in (0, 1):
        asked = recipe(cifar10, *more, f"train.num_workers={workers}")
        with Batches(make_loader(open_source(asked.data), asked, range(1, 3))) as batches:
            seen.append([batches.next() for _ in range(2)])
    for a, b in zip(*seen, strict=True):
        assert torch.equal(a.images[0], b.images[0]) and torch.equal(a.labels, b.labels) and a.images[0].shape == (2, 32, 3, 32, 32)
