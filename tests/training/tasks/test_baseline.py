"""Few labels: steps instead of epochs, and the accuracy that needs no training, which fine-tuning has to beat."""

import json
from pathlib import Path

import numpy as np
import pytest
from processes import run_ranks

import rlpjepa_zoo as rz
from rlpjepa_zoo.config.finetune import TuningRecipe
from rlpjepa_zoo.data.sources import open_source
from rlpjepa_zoo.training.tasks.baseline import nearest_mean
from rlpjepa_zoo.training.tasks.finetune import FinetuneTask, finetune

FEW = [
    "data.per_class=4",
    "train.batch_size=16",
    "train.epochs=4",
    "optim.warmup_epochs=1",
    "classifier.linear_epochs=0",
    "train.num_workers=0",
]


def few(*more: str) -> TuningRecipe:
    return TuningRecipe.load("finetune-digits", [*FEW, *more])


@pytest.mark.parametrize("name", ["finetune-folder", "finetune-cifar10", "finetune-cifar100", "finetune-digits"])
def test_linear_and_adapters_replace_the_keys_that_only_full_training_has(name: str) -> None:
    more = ["start.source=test_resnet.digits"]
    linear = TuningRecipe.load(name, [*more, "classifier.train=linear"])
    assert (linear.classifier.linear_epochs, linear.optim.layer_decay, linear.optim.backbone_lr) == (0, 1, 1)
    assert TuningRecipe.load(name, [*more, "classifier.train=lora"]).classifier.linear_epochs == 0


def test_few_images_get_the_steps_that_the_recipe_asks_for(tmp_path: Path) -> None:
    given = few("train.min_steps=60", "classifier.linear_epochs=2")
    assert (
        given.lengthened(100_000) is given and given.lengthened(15) is given
    )  # enough steps; less than a batch, which is refused elsewhere
    longer = given.lengthened(40)  # 2 steps an epoch
    assert longer.steps(40) == (60, 2) and longer.lengthened(40) == longer
    assert (longer.train.epochs, longer.optim.warmup_epochs, longer.classifier.linear_epochs, longer.train.every_epochs) == (
        30,
        7.5,
        15,
        38,
    )
    finetune(few("train.min_steps=14"), tmp_path / "run", progress=False)
    assert json.loads((tmp_path / "run/summary.json").read_text())["steps"] == 14
    assert TuningRecipe.load("finetune-folder", ["data.path=x"]).train.min_steps


def of_start() -> float:
    task = FinetuneTask(few())
    task.setup(open_source(few().data))
    assert task.source.eval is not None
    return nearest_mean(task.core, task.source.images, task.source.eval, batch_size=64)


def test_baseline_is_the_nearest_class_mean_by_cosine_on_any_number_of_processes() -> None:
    task = FinetuneTask(few())
    task.setup(open_source(few().data))
    encoder, train, test = rz.load_encoder("test_resnet.digits"), task.source.images, task.source.eval
    assert test is not None and train.labels is not None

    def unit(images) -> np.ndarray:  # type: ignore[no-untyped-def]
        from rlpjepa_zoo.evaluation.encoding import encode

        x = encode(encoder.eval(), images)[0].double().numpy()
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    x = unit(train)
    means = np.stack([x[train.labels == c].sum(0) for c in range(10)])
    scores = unit(test) @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T
    wanted = float((scores.argmax(1) == test.labels).mean())
    assert of_start() == pytest.approx(wanted, abs=1 / 360) and wanted > 0.5
    assert run_ranks(of_start, 2) == pytest.approx([of_start()] * 2, abs=1 / 360)


def test_training_that_loses_to_no_training_is_an_alarm(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = tmp_path / "run"
    finetune(few("optim.lr=1e-6", "optim.min_lr=0", "optim.warmup_start_lr=0"), run, progress=False)
    summary = json.loads((run / "summary.json").read_text())
    assert (
        summary["top1"]
        < summary["top1_nearest_mean"]
        == json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["top1_nearest_mean"]
    )
    assert any(text.startswith("training lost to no training") for text in summary["alarms"]) and "make more than 8 steps" in caplog.text
    finetune(few("start.random=true", "train.epochs=2", "optim.layer_decay=1"), tmp_path / "random", progress=False)
    assert "top1_nearest_mean" not in json.loads((tmp_path / "random/summary.json").read_text())
