"""What the cases of the property test start from: images, an encoder, a run, embeddings, recipes; all of them valid and small."""

import io
import itertools
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

TUNING = """
name: tuning
data: {source: folder, path: in/images, image_size: 32}
start: {source: in/encoder, input: features}
classifier: {train: linear}
optim: {name: adamw, lr: 2e-3, warmup_epochs: 0}
train: {epochs: 1, batch_size: 4, precision: "no", num_workers: 0}
"""
PRETRAINING = """
name: pretraining
data: {source: folder, path: in/images, image_size: 32, mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}
views: {crop_scale: [0.3, 1.0], flip: 0.5}
encoder: {backbone: test_resnet, dim: 16, hidden_dim: 16, projector_depth: 2}
target: {p: 1.0, density: 0.2}
objective: {num_directions: 16, directions: random}
optim: {name: adamw, lr: 1e-3, warmup_epochs: 0}
probe: {every_epochs: 1, bank: 8, eval_images: 8, knn_k: 3}
train: {epochs: 1, batch_size: 4, precision: "no", num_workers: 0}
"""
SMALL = (
    "data.image_size=32 data.limit=8 views.count=2 views.local=null encoder.backbone=test_resnet encoder.args={} encoder.dim=16 encoder.hidden_dim=16 "
    "encoder.projector_depth=2 objective.num_directions=16 train.epochs=1 train.batch_size=4 train.num_workers=0 train.compile=false probe.bank=8 "
    "probe.eval_images=8"
).split()
"""Overrides, given last, that keep a training run short whatever was drawn before. `check` gets the values without them."""
MEMBERS = (
    "images",
    "encoder",
    "classifier",
    "run",
    "parts",
    "photo.tar",
    "photo.parquet",
    "photo.zip",
    "codes.safetensors",
    "codes.npz",
    "codes.parquet",
)


def picture(i: int, kind: str = "PNG", size: tuple[int, int] = (20, 24)) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def build(root: Path) -> None:
    """Write the members of the world into an empty folder."""
    import datasets
    import torch

    from rlpjepa_zoo import create_encoder
    from rlpjepa_zoo.cli.app import run
    from rlpjepa_zoo.data.preprocess import Preprocess
    from rlpjepa_zoo.models.classifier import make_classifier

    for i, (name, kind) in enumerate(itertools.product("ab", ("PNG", "PNG", "JPEG", "WEBP"))):
        folder = root / "images" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i:02d}.{kind.lower()}").write_bytes(picture(i, kind))
    torch.manual_seed(0)
    encoder = create_encoder("test_resnet", dim=16, hidden_dim=16, preprocess=Preprocess((32, 32), (0.5,) * 3, (0.5,) * 3, "bilinear", 1.0))
    with torch.no_grad():
        encoder(1 + 2 * torch.randn(8, 3, 32, 32))
    encoder.eval().save_pretrained(root / "encoder")
    make_classifier(encoder, ["a", "b"]).save_pretrained(root / "classifier")
    names = sorted((root / "images").rglob("*.*"))
    with tarfile.open(root / "photo.tar", "w") as archive:
        for i, path in enumerate(names):
            for suffix, content in ((path.suffix, path.read_bytes()), (".cls", b"%d" % (i % 2)), (".json", b'{"i": %d}' % i)):
                member = tarfile.TarInfo(f"x/s{i:02d}{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    with zipfile.ZipFile(root / "photo.zip", "w") as archive:
        for path in names:
            archive.write(path, path.relative_to(root))
    cells = [{"bytes": path.read_bytes(), "path": None} for path in names]
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"]), "note": datasets.Value("string")}
    rows = {"image": cells, "label": [i % 2 for i in range(len(names))], "note": [f"n{i}" for i in range(len(names))]}
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(root / "photo.parquet")
    codes = encoder.embed(root / "images", num_workers=0)
    for suffix in ("safetensors", "npz", "parquet"):
        codes.save(root / f"codes.{suffix}")
    (root / "in").symlink_to(".")
    (root / "recipe.yaml").write_text(PRETRAINING)
    os.chdir(root)
    (root / "tuning.yaml").write_text(TUNING)
    for command in (
        ["check", "tuning.yaml"],
        ["embed", "encoder", "images", "--out", "parts", "--part-rows", "3", "--num-workers", "0", "--quiet"],
        ["train", "recipe.yaml", "--out", "run", "--quiet"],
    ):
        if run(command) != 0:
            raise RuntimeError(f"{command} failed in the world of the property test")
