"""Encoders that runs start from: refused arguments, fresh weights by the seed, preprocessing of a pretrained backbone."""

import dataclasses
from pathlib import Path

import pytest
from models import settled
from refusals import refused
from runs import tiny

import rlpjepa_zoo as rz
from rlpjepa_zoo.cli.app import run as cli
from rlpjepa_zoo.config.finetune import TuningRecipe
from rlpjepa_zoo.config.pretrain import Recipe
from rlpjepa_zoo.config.sections import ADOPTED
from rlpjepa_zoo.errors import RecipeError
from rlpjepa_zoo.models.pretrained import load_encoder
from rlpjepa_zoo.training.tasks.encoders import build_encoder, preprocessing_warnings, start_encoder
from rlpjepa_zoo.training.tasks.pretrain import train


def tuning(*more: str) -> TuningRecipe:
    return TuningRecipe.load("finetune-digits", [*more])


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A pretrained backbone: a folder that timm opens, with mean 0.5, 0.4, 0.3, std 0.2, 0.25, 0.3 and bilinear."""
    return f"encoder.backbone=local-dir:{settled().eval().save_pretrained(tmp_path_factory.mktemp('encoders') / 'plain')}"


@pytest.mark.parametrize(
    "argument", ["preprocess: x", "freeze_backbone: true", "dim: 5", "checkpoint_path: x", "pretrained_cfg_overlay: {file: x}"]
)
def test_arguments_foreign_to_the_backbone_are_refused(argument: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlpjepa_zoo.models.factory._backbone", lambda *given, **options: pytest.fail("built"))
    name = argument.partition(":")[0]
    with refused(RecipeError, match=rf"start\.args\.{name}: is not a backbone argument"):
        start_encoder(tuning("start.source=timm:test_vit", f"start.args={{{argument}}}").start, 0)
    with refused(RecipeError, match=rf"encoder\.args\.{name}: is not a backbone argument"):
        build_encoder(tiny(f"encoder.args={{{argument}}}"))


def test_random_start_depends_on_the_seed_only(tmp_path: Path) -> None:
    vit = settled("test_vit", img_size=32, patch_size=8).eval().save_pretrained(tmp_path / "vit")
    given, a, b, c = (start_encoder(recipe.start, recipe.seed) for recipe in (tuning(f"start.source={vit}", *more) for more in (
        [], ["start.random=true"], ["start.random=true"], ["start.random=true", "seed=1"])))  # fmt: skip
    assert given.fingerprint() == rz.load_encoder(vit).fingerprint() != a.fingerprint() == b.fingerprint() != c.fingerprint()
    assert a.config.model_args == given.config.model_args and a.config.preprocess == given.config.preprocess


def test_preprocessing_unlike_that_of_the_backbone_is_a_warning(backbone: str, caplog: pytest.LogCaptureFixture) -> None:
    alike = ["data.mean=[0.5, 0.4, 0.3]", "data.std=[0.2, 0.25, 0.3]", "data.interpolation=bilinear"]
    build_encoder(tiny(backbone, "encoder.pretrained=true", *alike))
    build_encoder(tiny(backbone, "encoder.pretrained=false"))
    untrusted = settled()
    untrusted.backbone.pretrained_cfg = {"mean": "x", "std": [None], "interpolation": 3}
    assert len(preprocessing_warnings(tiny("encoder.pretrained=true"), untrusted)) == 1  # the mean is a name
    assert not caplog.records
    build_encoder(tiny(backbone, "encoder.pretrained=true", "data.std=[0.2, 0.25, 0.3]", "data.interpolation=bicubic"))
    warnings = [record.getMessage() for record in caplog.records]
    assert [text.partition(":")[0] for text in warnings] == ["data.mean", "data.interpolation"]
    assert "was pretrained with [0.5, 0.4, 0.3], the recipe has [" in warnings[0] and warnings[0].endswith(
        "; give data.mean='[0.5, 0.4, 0.3]'"
    )
    assert cli(["check", "digits", backbone, "encoder.pretrained=true", *alike[:2], "data.interpolation=bicubic"]) == 0
    assert caplog.records[-1].getMessage().startswith("data.interpolation") and len(caplog.records) == 3


def test_null_preprocessing_is_that_of_the_pretrained_backbone(backbone: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nulls = [f"data.{key}=null" for key in ("image_size", "mean", "std", "interpolation", "crop_pct")]
    more = [backbone, "encoder.pretrained=true", *nulls, "train.epochs=1", "optim.warmup_epochs=0"]
    adopted = load_encoder(train(tiny(*more, "data.crop_pct=0.8"), tmp_path / "run", progress=False)).config.preprocess
    assert adopted == dataclasses.replace(settled().config.preprocess, crop_pct=0.8)
    written = Recipe.load(tmp_path / "run/recipe.yaml").data
    assert (written.mean, written.interpolation, written.image_size, written.crop_pct) == ((0.5, 0.4, 0.3), "bilinear", 32, 0.8)
    assert cli(["check", "digits", *more]) == 0 and "mean:\n  - 0.5\n  - 0.4\n" in capsys.readouterr().out
    with refused(RecipeError, match="data.image_size: null takes the value of a pretrained backbone"):
        tiny(*nulls)
    shipped = Recipe.load("sparsify-folder", ["data.path=x"]).data
    assert [getattr(shipped, key) for key in ADOPTED] == [None] * 5
