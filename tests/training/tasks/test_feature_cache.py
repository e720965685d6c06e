"""Frozen or slowly trained backbones: training on cached features equals training on fresh ones, also after a resume."""

import json
from pathlib import Path

import pytest
import torch
from models import settled
from refusals import refused
from runs import codes, of_folder, rows, tiny, train_in_two_parts
from safetensors import safe_open
from safetensors.torch import save_file

from rlpjepa_zoo.data.sources import open_source
from rlpjepa_zoo.errors import DataError, RecipeError, UsageError
from rlpjepa_zoo.models.pretrained import load_encoder
from rlpjepa_zoo.training.optim import build_optimizer, set_learning_rates
from rlpjepa_zoo.training.tasks import feature_cache
from rlpjepa_zoo.training.tasks.encoders import build_encoder
from rlpjepa_zoo.training.tasks.feature_cache import CachedViews
from rlpjepa_zoo.training.tasks.pretrain import param_groups, train

FROZEN = ["encoder.freeze_backbone=true"]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A pretrained one: a folder that timm opens."""
    return f"encoder.backbone=local-dir:{settled().eval().save_pretrained(tmp_path_factory.mktemp('encoders') / 'plain')}"


def test_cached_features_give_the_losses_of_fresh_ones(backbone: str, tmp_path: Path) -> None:
    """In the first epoch the views of both are those of epoch 0."""
    for name, more in (("cached", ["encoder.cached_views=2"]), ("fresh", [])):
        train(tiny(backbone, "encoder.pretrained=true", "train.epochs=1", *FROZEN, *more), tmp_path / name, progress=False)
    for a, b in zip(rows(tmp_path / "cached"), rows(tmp_path / "fresh"), strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - {"kind"}:
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-4), (a["step"], key)
    assert torch.allclose(codes(tmp_path / "cached/encoder"), codes(tmp_path / "fresh/encoder"), atol=1e-3)


def test_published_encoder_is_complete_with_unchanged_backbone(backbone: str, tmp_path: Path) -> None:
    recipe = tiny(backbone, "encoder.pretrained=true", "encoder.cached_views=4", *FROZEN)
    published, start = load_encoder(train(recipe, tmp_path / "run", progress=False)), load_encoder(backbone.partition(":")[2])
    assert published.config.dim == 32 and published.config.recipe is not None
    for a, b in zip(published.backbone.state_dict().values(), start.backbone.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_stopped_and_resumed_is_bit_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    recipe = tiny("encoder.cached_views=5", *FROZEN, "train.precision=bf16")
    with caplog.at_level("INFO", "rlpjepa_zoo"):
        train(recipe, tmp_path / "unbroken", progress=False)
    assert "cached features: 5 views of 96 images, 96 wide, float32" in caplog.text
    train_in_two_parts(monkeypatch, recipe, tmp_path / "run", 7)
    assert rows(tmp_path / "run") == rows(tmp_path / "unbroken")
    assert torch.equal(codes(tmp_path / "run/encoder"), codes(tmp_path / "unbroken/encoder"))


def test_views_are_drawn_by_seed_epoch_and_row() -> None:
    cached = CachedViews(torch.arange(60.0).view(10, 6, 1), torch.arange(10), views=3, seed=0)
    rows_ = torch.arange(10)
    drawn = torch.stack([cached.drawn(epoch, rows_) for epoch in range(200)])
    assert all(len(set(views)) == 3 for views in drawn.view(-1, 3).tolist())
    counts = torch.bincount(drawn.flatten(), minlength=6) / drawn.numel()
    assert counts == pytest.approx(1 / 6, abs=0.01)
    batch = cached[7, [4, 2]]
    assert batch.labels.tolist() == [4, 2] and batch.images[0].shape == (3, 2, 1)
    assert batch.images[0][:, 0, 0].tolist() == [24 + v for v in cached.drawn(7, torch.tensor([4]))[0].tolist()]
    assert torch.equal(cached.drawn(7, torch.tensor([4, 2])), cached.drawn(7, rows_)[[4, 2]])


def test_large_features_are_kept_in_float16_or_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    need = 4 * 96 * 4 * 96 / 2**30  # in float32
    more = ["encoder.cached_views=4", "train.epochs=1", *FROZEN]
    with caplog.at_level("INFO", "rlpjepa_zoo"):
        train(tiny(*more, f"data.cache_gb={0.6 * need}"), tmp_path / "half", progress=False)
    assert "float16" in caplog.text
    with refused(RecipeError, match=r"encoder\.cached_views: 4 views of 96 images with 96 features need .* data\.cache_gb is"):
        train(tiny(*more, f"data.cache_gb={0.4 * need}"), tmp_path / "none", progress=False)


KEPT = ["encoder.cached_views=3", "train.epochs=1", *FROZEN]


def cached(caplog: pytest.LogCaptureFixture, run: Path, *more: str) -> str:
    """Train on cached features; returns how they came about."""
    caplog.clear()
    with caplog.at_level("INFO", "rlpjepa_zoo"):
        train(tiny(*KEPT, *more), run, progress=False)
    return next(line for line in caplog.messages if line.startswith("cached features"))


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for features."""
    monkeypatch.setenv("RLPJEPA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache/features"


def test_features_are_kept_for_a_resume_and_for_another_density(kept: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert "read from" not in cached(caplog, tmp_path / "a")
    assert "read from" in cached(caplog, tmp_path / "b", "target.density=0.3", "optim.lr=0.01")
    assert "read from" in cached(caplog, tmp_path / "c")
    assert rows(tmp_path / "c") == rows(tmp_path / "a") and torch.equal(codes(tmp_path / "c/encoder"), codes(tmp_path / "a/encoder"))


def test_time_of_encoding_counts_in_every_run_that_uses_it(kept: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cached(caplog, tmp_path / "a")
    (file,) = kept.iterdir()
    with safe_open(file, "pt") as saved:
        tensors, about = {name: saved.get_tensor(name) for name in saved.keys()}, saved.metadata()
    assert float(about["seconds"]) > 0
    save_file(tensors, file, {**about, "seconds": "630"})
    assert "read from" in cached(caplog, tmp_path / "b")
    assert 10.5 <= load_encoder(tmp_path / "b").config.info["training"]["minutes"] < 15


def test_features_are_those_of_backbone_images_and_views() -> None:
    def key(*more: str) -> str:
        recipe = tiny(*KEPT, *more)
        return feature_cache._key(build_encoder(recipe), open_source(recipe.data), recipe, 8, torch.float32, torch.contiguous_format)

    others = (
        "seed=1", "views.jitter=0.5", "data.image_size=24", "data.limit=95", "encoder.cached_views=4", "data.mean=[0.4, 0.5, 0.5]",
        "data.interpolation=bilinear", "train.precision=bf16", "encoder.backbone=test_vit",
    )  # fmt: skip
    assert key() == key("target.density=0.3", "encoder.dim=16", "train.epochs=7", "train.batch_size=16")
    assert len({key(), *map(key, others)}) == len(others) + 1


def test_damaged_features_are_encoded_again(kept: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cached(caplog, tmp_path / "a")
    (file,) = kept.iterdir()
    content = bytearray(file.read_bytes())
    content[-5000] ^= 1
    file.write_bytes(content)
    assert "read from" not in cached(caplog, tmp_path / "b") and "differs from its sha256" in caplog.text
    assert rows(tmp_path / "b") == rows(tmp_path / "a")
    file.write_bytes(b"")
    assert feature_cache._read(file) is None


def test_kept_features_are_bounded_and_a_failure_is_a_warning(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cached(caplog, tmp_path / "a")
    (first,) = kept.iterdir()
    monkeypatch.setenv("RLPJEPA_CACHE_GB", str(1.5 * first.stat().st_size / 2**30))
    cached(caplog, tmp_path / "b", "seed=1")
    assert len(list(kept.iterdir())) == 1 and not first.exists()  # the older one went
    monkeypatch.setenv("RLPJEPA_CACHE_GB", "0")
    cached(caplog, tmp_path / "c", "seed=2")
    assert "not kept on disk" in caplog.text and len(list(kept.iterdir())) == 1
    monkeypatch.setenv("RLPJEPA_CACHE_GB", "many")
    with refused(UsageError, match="RLPJEPA_CACHE_GB: expected a number of GB, got 'many'"):
        train(tiny(*KEPT), tmp_path / "d", progress=False)
    monkeypatch.delenv("RLPJEPA_CACHE_GB")
    (tmp_path / "file").touch()
    monkeypatch.setenv("RLPJEPA_CACHE", str(tmp_path / "file"))
    cached(caplog, tmp_path / "e")
    assert "features are not kept on disk" in caplog.text


def test_unreadable_images_are_counted_once_and_replaced(image_folder: Path, tmp_path: Path) -> None:
    (image_folder / "red" / "03.png").write_bytes(b"not an image")
    more = ["encoder.cached_views=3", "train.batch_size=8", "train.epochs=3", *FROZEN]
    train(of_folder(image_folder, *more), tmp_path / "run", progress=False)
    listed = [json.loads(line) for line in (tmp_path / "run/bad_images.jsonl").read_text().splitlines()]
    assert len(listed) == 1 and "red/03.png" in listed[0]["reason"]
    for file in image_folder.rglob("*.png"):
        file.write_bytes(b"broken")
    with refused(DataError, match="50 images in a row cannot be read"):
        train(of_folder(image_folder, *more), tmp_path / "none", progress=False)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["encoder.cached_views=4"], "encoder.cached_views: needs encoder.freeze_backbone=true"),
        (["encoder.cached_views=1", *FROZEN], "encoder.cached_views: 1 is fewer than views.count = 2"),
        (["encoder.cached_views=4", *FROZEN, "views.local={count: 2, size: 16}"], "encoder.cached_views: keeps views of one size"),
        (["encoder.cached_views=4", *FROZEN, "views.start_size=16"], "encoder.cached_views: keeps views of one size"),
        (
            [
                "encoder.cached_views=4",
                *FROZEN,
                "data.source=hf",
                "data.name=a/b",
                "data.limit=null",
                "data.streaming=true",
                "data.length=9",
            ],
            "encoder.cached_views: has no meaning with data.streaming",
        ),
        (["optim.backbone_lr=0.1", *FROZEN], "optim.backbone_lr: has no meaning with encoder.freeze_backbone=true"),
    ],
)
def test_contradictory_keys_are_refused_by_name(more: list[str], message: str) -> None:
    with refused(RecipeError, match=message):
        tiny(*more)


@pytest.mark.parametrize("name", ["adamw", "lars"])
def test_backbone_has_its_own_learning_rate(name: str) -> None:
    encoder, recipe = settled(), tiny(f"optim.name={name}", "optim.backbone_lr=0.01", "optim.warmup_start_lr=0")
    optimizer = build_optimizer(name, param_groups(encoder, None, recipe), recipe.optim)
    set_learning_rates(optimizer, recipe.optim, 50, 100, 10)
    named, plain = {id(p): n for n, p in encoder.named_parameters()}, tiny(f"optim.name={name}")
    rates = {named[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert set(rates) == set(named.values())
    assert len(build_optimizer(name, param_groups(encoder, None, plain), plain.optim).param_groups) == 2
    top = rates["projector.0.weight"]
    for parameter, rate in rates.items():
        assert rate == pytest.approx(0.01 * top if parameter.startswith("backbone.") else top), parameter


def test_backbone_with_a_low_rate_moves_less(tmp_path: Path) -> None:
    moved = []
    for i, factor in enumerate(("1", "0.001")):
        recipe = tiny(f"optim.backbone_lr={factor}", "train.epochs=1")
        start, end = build_encoder(recipe), load_encoder(train(recipe, tmp_path / str(i), progress=False))
        moved.append(float((start.backbone.conv1[0].weight - end.backbone.conv1[0].weight).abs().max()))
    assert 0 < moved[1] < 0.01 * moved[0]
