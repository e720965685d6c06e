"""A tiny encoder, its record, and the faults and users of the loopback Hub that the tests share."""

import torch

import rlpjepa_zoo as rz
from rlpjepa_zoo.data.preprocess import Preprocess

REPO = "owner/sparse-vit"
WRITER, READER = "hf_writer", "hf_reader"
INFO = {
    "recipe": "tiny",
    "data": "digits",
    "license": "apache-2.0",
    "target": {"p": 1.0, "mu": -0.5, "sigma": 0.7071},
    "density": {"asked": 0.31, "theory": 0.303, "train": 0.29, "eval": 0.3},
    "results": {"knn_z": 0.7, "n_test": 10, "protocol": "made-up figures", "curve": {"active": [1, 2, 4], "knn": [0.2, 0.4, 0.6]}},
    "history": [{"step": s, "l0": 0.5 - s / 100, "excess": 1 / s} for s in range(1, 10)] + [{"step": 9, "l0_eval": 0.3}],
    "training": {"steps": 9, "seed": 0},
}
FILES = {"config.json", "README.md", "recipe.yaml", "training.png", "accuracy.png"} | {
    f"{n}.safetensors" for n in ("model", "head", "golden")
}
BUSY = [{"status": 429, "headers": {"Retry-After": "2"}}, {"status": 500}, {"status": 503}, {"drop": True}]
ids = {"ids": lambda value: str(value).replace(" ", "")}


def make(seed=0, name="test_vit", **options):
    """A tiny encoder whose batch statistics are not those of a fresh one."""
    torch.manual_seed(seed)
    if name == "test_vit":
        options = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, **options}
    preprocess = Preprocess((16, 16), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), "bilinear", 0.9)
    enc = rz.create_encoder(name, dim=12, hidden_dim=10, preprocess=preprocess, **options)
    with torch.no_grad():
        enc(1 + 2 * torch.randn(16, 3, 16, 16))
    return enc.eval()


def codes(enc):
    with torch.no_grad():
        return enc(torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)))


def published_files(encoder: rz.SparseEncoder) -> dict[str, bytes]:
    """The files of the published folder of an encoder from `make`."""
    return encoder.contents(name=REPO, recipe="name: tiny\n", info=INFO)
