"""Encoders that runs start from: refused arguments, fresh weights by the seed, preprocessing of a pretrained backbone."""

from pathlib import Path

import pytest
from models import settled
from refusals import refused
from runs import tiny

import rlpjepa_zoo as rz
from rlpjepa_zoo.cli.app import run as cli
from rlpjepa_zoo.config.finetune import TuningRecipe
from rlpjepa_zoo.errors import RecipeError
from rlpjepa_zoo.training.tasks.encoders import build_encoder, preprocessing_warnings, start_encoder


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
