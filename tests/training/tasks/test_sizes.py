"""Sizes of images that a backbone does not take are refused before the first step, with a change that works."""

import re
from pathlib import Path

import pytest
import torch
from refusals import refused
from runs import tiny

from rlpjepa_zoo.cli.app import run as cli
from rlpjepa_zoo.config.finetune import TuningRecipe
from rlpjepa_zoo.errors import RecipeError
from rlpjepa_zoo.training.tasks.encoders import build_encoder
from rlpjepa_zoo.training.tasks.finetune import FinetuneTask, finetune
from rlpjepa_zoo.training.tasks.pretrain import train

REFUSED = [
    (["encoder.backbone=vit_tiny_patch16_224", "data.image_size=64"], "data.image_size", "encoder.args.img_size=64"),
    (["encoder.backbone=swin_tiny_patch4_window7_224", "data.image_size=64"], "data.image_size", "encoder.args.img_size=64"),
    (["encoder.backbone=test_convnext3", "data.image_size=16"], "data.image_size", "data.image_size=32"),
    (["encoder.backbone=vit_tiny_patch16_224", "data.image_size=224", "views.local={count: 1, size: 96}"], "views.local.size", "encoder.args.dynamic_img_size=true"),
    (
        ["encoder.backbone=vit_tiny_patch16_224", "encoder.args={img_size: 32, patch_size: 8, dynamic_img_size: true, depth: 1}", "views.start_size=16"],
        "views.start_size, grown to 20",
        "views.start_size=null",
    ),
    (
        ["encoder.backbone=vit_tiny_patch16_224", "data.image_size=224", "encoder.args={dynamic_img_size: true}", "views.local={count: 1, size: 90}"],
        "views.local.size",
        "views.local.size=96",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("more", "key", "fix"), REFUSED)
def test_a_size_that_the_backbone_does_not_take_is_refused_with_a_change_that_works(more: list[str], key: str, fix: str) -> None:
    with refused(RecipeError, match=rf"{re.escape(key)}: \w+ does not take images of \d+ pixels \(.+\); (give|set) {re.escape(fix)}"):
        build_encoder(tiny(*more))
    changed = tiny(*more, fix)
    with torch.device("meta"):
        build_encoder(changed)


def test_train_check_and_finetune_refuse_a_size_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["encoder.backbone=vit_tiny_patch16_224", "data.image_size=64"]
    with refused(RecipeError, match=r"give encoder\.args\.img_size=64"):
        train(tiny(*more), tmp_path / "run", progress=False)
    tuning = ["start={source: 'timm:vit_tiny_patch16_224', random: true}", "data.image_size=64"]
    with refused(RecipeError, match=r"give start\.args\.img_size=64"):
        finetune(TuningRecipe.load("finetune-digits", tuning), tmp_path / "tuned", progress=False)
    assert not (tmp_path / "run/checkpoints").exists() and not (tmp_path / "tuned/checkpoints").exists()
    assert cli(["check", "digits", *more]) == 2 == cli(["check", "finetune-digits", *tuning])
    said = capsys.readouterr().err.splitlines()
    assert "give encoder.args.img_size=64" in said[-2] and "give start.args.img_size=64" in said[-1]
    assert FinetuneTask(TuningRecipe.load("finetune-digits", [*tuning, "start.args.img_size=64"])).recipe.start.args
