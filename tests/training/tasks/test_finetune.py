"""Fine-tuning: losses, rates and draws against independent implementations, exact resuming, and the published folder."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_server import FakeHub, User
from models import settled
from PIL import Image
from processes import run_ranks
from refusals import refused
from runs import stop_after
from runs import tiny as tiny_encoder
from torch import Tensor

import rlpjepa_zoo as rz
from rlpjepa_zoo.cli.app import run as cli
from rlpjepa_zoo.config.finetune import TuningRecipe, load_any
from rlpjepa_zoo.config.load import list_recipes
from rlpjepa_zoo.config.pretrain import Recipe
from rlpjepa_zoo.core import distributed
from rlpjepa_zoo.core.rng import key
from rlpjepa_zoo.data.images import Images
from rlpjepa_zoo.data.sources import Source, open_source
from rlpjepa_zoo.errors import DataError, ModelError, RecipeError, StoppedBySignal, UsageError
from rlpjepa_zoo.models.classifier import make_classifier
from rlpjepa_zoo.training import setup
from rlpjepa_zoo.training.checkpoint import latest
from rlpjepa_zoo.training.optim import build_optimizer
from rlpjepa_zoo.training.tasks.finetune import FinetuneTask, finetune, mix_images, param_groups, select_labelled, smoothed_cross_entropy
from rlpjepa_zoo.training.trainer import Trainer

TINY = [
    "data.limit=192", "views.rotate=0", "views.translate=0", "views.zoom=[1, 1]", "train.batch_size=64", "train.epochs=4", "train.log_every=1",
    "train.every_epochs=2", "train.checkpoint_minutes=1000", "optim.warmup_epochs=0.5", "classifier.linear_epochs=1",
]  # fmt: skip
TUNING = [name for name in list_recipes() if isinstance(load_any(name), TuningRecipe)]


def tiny(*more: str) -> TuningRecipe:
    return TuningRecipe.load("finetune-digits", [*TINY, *more])


def rows(run: Path) -> list[dict]:
    read = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in read]


def logits(folder: Path | str) -> Tensor:
    return rz.load_classifier(folder)(torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)).detach()


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder of 32-pixel images without batch norm in its backbone."""
    encoder = settled("test_vit", img_size=32, patch_size=8).eval()
    return encoder.save_pretrained(tmp_path_factory.mktemp("encoders") / "vit")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with averaged weights, MixUp, CutMix and a frozen first epoch."""
    run = tmp_path_factory.mktemp("runs") / "finished"
    finetune(
        tiny("train.ema=0.6", "classifier.mixup=0.4", "classifier.cutmix=1", "train.best=top1", "optim.lr=0.02", "optim.head_lr=5"),
        run,
        progress=False,
    )
    return run


# --- recipes ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TUNING)
def test_shipped_recipe_parses_and_survives_its_dump(name: str) -> None:
    recipe = TuningRecipe.load(name)
    assert recipe.name == name and TuningRecipe.parse(recipe.dump()) == recipe
    if recipe.data.source in ("folder", "hf"):  # the only ones with a place
        assert "/some" not in TuningRecipe.load(name, ["data.path=/some/where"]).shareable()
    assert recipe.views.count == 1 and recipe.data.image_size is None


def test_recipe_kind_follows_from_its_sections() -> None:
    assert {"finetune-cifar10", "finetune-cifar100", "finetune-digits", "finetune-folder", "probe-cifar10"} <= set(TUNING)
    assert isinstance(load_any("digits"), Recipe)
    with refused(RecipeError, match=r"finetune-digits: has the section 'start', so it is a recipe for `rlpjepa finetune`"):
        Recipe.load("finetune-digits")
    with refused(RecipeError, match=r"digits: has the section 'encoder', so it is a recipe for `rlpjepa train`"):
        TuningRecipe.load("digits")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("classifier.mixupp=1", "classifier.mixupp: unknown key. Did you mean 'mixup'"), ("encoder.dim=3", "encoder: unknown key"),
        ("optim.name=lars", "optim.name"), ("optim.layer_decay=1.5", "optim.layer_decay"), ("views.count=2", "views.count"),
        ("data.streaming=true", "data.streaming: has no meaning"), ("classifier.linear_epochs=4", "classifier.linear_epochs: 4 must be fewer than train.epochs"),
        ("classifier.lora={rank: 4}", "classifier.lora: has no meaning with classifier.train=full"), ("start.args={img_size: 3}", "start.args"),
        ("classifier.train=linear", "classifier.linear_epochs: has no meaning"), ("classifier.lora.rang=4", "classifier.lora.rang: unknown key"),
        ("data.per_class=3", "data.per_class: has no meaning together with data.limit"),
        ("optim.trust_coefficient=1", "optim.trust_coefficient"), ("train.best=knn_z", "train.best"), ("classifier.label_smoothing=1", "label_smoothing"),
    ],
)  # fmt: skip
def test_wrong_key_or_value_is_refused_by_name(override: str, message: str) -> None:
    with refused(RecipeError, match=message.replace("(", r"\(")):
        tiny(override)


@pytest.mark.parametrize("name", ["optim.backbone_lr=0.1", "optim.layer_decay=0.5"])
def test_rates_of_a_frozen_backbone_are_refused(name: str) -> None:
    linear = ["classifier.train=linear", "classifier.linear_epochs=0", "optim.layer_decay=1"]
    tiny(*linear)
    with refused(RecipeError, match=f"{name.partition('=')[0]}: has no meaning with classifier.train=linear"):
        tiny(*linear, name)


def test_local_paths_are_not_published(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for source, name in (
        (f"timm:local-dir:{tmp_path}/mine", "timm:local-dir:mine"),
        (f"local-dir:{tmp_path}/mine", "mine"),
        (f"local-dir:{tmp_path}/gone", "gone"),
        (f"{tmp_path}/mine", "mine"),
        ("timm:resnet18.a1_in1k", "timm:resnet18.a1_in1k"),
        ("owner/repo", "owner/repo"),
    ):
        recipe = tiny(f"start.source={source}")
        assert recipe.start.name == name and str(tmp_path) not in recipe.shareable()
        assert TuningRecipe.parse(recipe.shareable()).start.source == name


def test_z_of_a_timm_model_and_a_missing_source_are_refused(tmp_path: Path) -> None:
    with refused(RecipeError, match="start.input: timm:test_vit has no rectified projector"):
        tiny("start.source=timm:test_vit", "start.input=z")
    with refused(RecipeError, match="start.source: what to start from is not given"):
        finetune(tiny("start.source=null"), tmp_path / "run", progress=False)


def test_recipe_takes_missing_preprocessing_from_the_encoder() -> None:
    recipe, preprocess = tiny("data.crop_pct=0.7"), settled().config.preprocess
    data = recipe.with_preprocess(vars(preprocess)).data
    assert (data.image_size, data.mean, data.std, data.interpolation, data.crop_pct) == (
        32,
        preprocess.mean,
        preprocess.std,
        "bilinear",
        0.7,
    )


# --- labelled images --------------------------------------------------------------------------------------------------------------------


def some(labels: list[int]) -> Images:
    return Images(lambda i: Image.new("RGB", (8, 8)), [f"i{i}" for i in range(len(labels))], labels, ["a", "b", "c"])


def test_images_per_class_are_drawn_by_the_seed() -> None:
    images = some([0, 1, 2, -1] * 25)
    drawn = select_labelled(images, 7, seed=1)
    assert np.bincount(drawn.labels).tolist() == [7, 7, 7] and len(set(drawn.ids)) == 21  # type: ignore[arg-type]
    assert drawn.ids == select_labelled(images, 7, seed=1).ids != select_labelled(images, 7, seed=2).ids
    with refused(DataError, match=r"data\.per_class: 26 images of each class are asked for, 'a' has 25"):
        select_labelled(images, 26, seed=1)


def test_unlabelled_images_are_left_out_or_refused() -> None:
    assert select_labelled(some([0, -1, 1, -1]), None, 0).ids == ["i0", "i2"]
    for images in (some([-1, -1]), Images(lambda i: None, ["x"])):
        with refused(DataError, match="fine-tuning needs labelled images"):
            select_labelled(images, None, 0)


def test_evaluation_images_without_training_class_are_refused() -> None:
    task = FinetuneTask(tiny("train.best=null"))
    for held_out, labels in ((some([-1, -1]), "-1"), (Images(lambda i: None, ["x", "y"]), "none")):
        with refused(
            DataError, match=r"data\.eval_split: none of the 2 evaluation images has the label of a training class; name the classes"
        ):
            task.select_images(Source(some([0, 1, 2]), held_out, 3, 3))
        task.select_images(Source(some([0, 1, 2]), None, 3, 3))
        assert labels and task.source.eval is None


def test_alarm_compares_top1_with_the_most_frequent_class() -> None:
    task = FinetuneTask(tiny())
    for labels, top1, wrong in (
        ([0, 1] * 50, 0.7, False), ([0, 1] * 50, 0.6, True), ([0] * 90 + [1] * 10, 0.93, True), ([0] * 90 + [1] * 10, 1.0, False),
        ([0, 1, 2] * 33, 0.52, False), ([0, 1, 2] * 33, 0.4, True),
    ):  # fmt: skip
        task.select_images(Source(some([0, 1, 2]), some(labels), 3, 3))
        alarms = task.alarms({"top1": top1, "n_test": len(labels)})
        assert bool(alarms) == wrong, (labels[:3], top1, alarms)
        assert task.alarms({"top1": top1, "n_test": len(labels)}, final=False) == []
    assert "top-1 0.400, and the most frequent class has a share of 0.333" in alarms[0]


def test_number_of_unlabelled_images_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:

    def some_without(data, seed):  # type: ignore[no-untyped-def]
        source = open_source(data, seed)
        source.train.labels[:50] = -1
        return source

    monkeypatch.setattr(setup, "open_source", some_without)
    with caplog.at_level("INFO", "rlpjepa_zoo"):
        finetune(tiny("train.epochs=2", "classifier.linear_epochs=0"), tmp_path / "run", progress=False)
    assert "50 of 192 training images have no label and are left out" in caplog.text
    assert rz.load_classifier(tmp_path / "run").config.info["training"]["images"] == 142


# --- what a step minimises --------------------------------------------------------------------------------------------------------------


def oracle(scores: np.ndarray, shares: np.ndarray, smoothing: float) -> float:
    """Cross-entropy in float64 against shares of classes, a part of which is spread evenly over all."""
    shares = (1 - smoothing) * shares + smoothing / scores.shape[1]
    shifted = scores - scores.max(1, keepdims=True)
    return float(-(shares * (shifted - np.log(np.exp(shifted).sum(1, keepdims=True)))).sum(1).mean())


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("half", [False, True])
def test_loss_is_smoothed_cross_entropy_in_float32(rng: np.random.Generator, smoothing: float, half: bool) -> None:
    scores, labels = rng.normal(0, 3, (11, 10)), rng.integers(0, 10, 11)
    given = torch.tensor(scores, dtype=torch.bfloat16 if half else torch.float32)
    loss = smoothed_cross_entropy(given, torch.tensor(labels), smoothing)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(oracle(given.double().numpy(), np.eye(10)[labels], smoothing), rel=1e-5)


def test_mixup_uses_one_weight_per_step_for_images_and_targets(rng: np.random.Generator) -> None:
    x, labels = torch.tensor(rng.normal(size=(6, 3, 4, 4)), dtype=torch.float32), torch.tensor([0, 1, 2, 3, 4, 5])
    before = torch.get_rng_state()
    images, targets = mix_images(x, labels, 10, 0.8, 0, seed=0, step=3)
    assert torch.equal(torch.get_rng_state(), before)
    weight = float(targets[0, 0])
    partner = [int(targets[i].double().numpy().argsort()[-2 if weight >= 0.5 else -1]) for i in range(6)]
    for i, j in enumerate(partner):
        assert targets[i].sum() == pytest.approx(1) and i != j
        assert torch.allclose(images[i], weight * x[i] + (1 - weight) * x[j], atol=1e-6)
    again, other = mix_images(x, labels, 10, 0.8, 0, seed=0, step=3), mix_images(x, labels, 10, 0.8, 0, seed=0, step=4)
    assert torch.equal(again[0], images) and not torch.equal(other[0], images)


def test_cutmix_targets_are_the_shares_of_pixels(rng: np.random.Generator) -> None:
    x, labels = torch.arange(5.0).view(5, 1, 1, 1).expand(5, 3, 16, 16).contiguous(), torch.arange(5)
    seen = []
    for step in range(4):
        images, targets = mix_images(x, labels, 5, 0, 1.0, 0, step)
        for i in range(5):
            shares = torch.stack([(images[i, 0] == c).double().mean() for c in range(5)])
            assert torch.allclose(shares, targets[i].double(), atol=1e-6)
        seen.append(float(targets[0, 0]))
    assert len(set(seen)) > 1


def test_labels_without_mixing_are_unchanged() -> None:
    x, labels = torch.zeros(2, 3, 4, 4), torch.tensor([1, 0])
    images, targets = mix_images(x, labels, 3, 0, 0, 0, 0)
    assert images is x and targets is labels


# --- rates ------------------------------------------------------------------------------------------------------------------------------


def test_rates_decay_by_layer_and_the_head_has_its_own(vit: Path) -> None:
    recipe = tiny("optim.lr=0.008", "optim.layer_decay=0.5", "optim.head_lr=3", "optim.weight_decay=0.1")
    classifier = make_classifier(rz.load_encoder(vit), list("abc"), "z")
    optimizer = build_optimizer(recipe.optim.name, param_groups(classifier, recipe.lr, recipe.optim), recipe.optim)
    named = {id(p): name for name, p in classifier.named_parameters()}
    rates = {named[id(p)]: (group["peak"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    assert set(rates) == set(named.values())
    top = recipe.lr
    assert rates["head.weight"] == (pytest.approx(3 * top), 0.1) and rates["head.bias"] == (pytest.approx(3 * top), 0)
    assert rates["projector.0.weight"] == (pytest.approx(top), 0.1)
    depth = len(classifier.backbone.blocks)
    for i in range(depth):
        for part in ("attn.qkv.weight", "mlp.fc1.weight"):
            assert rates[f"backbone.blocks.{i}.{part}"] == (pytest.approx(top * 0.5 ** (depth - 1 - i)), 0.1)
    assert rates["backbone.norm.weight"] == (pytest.approx(top), 0)
    assert rates["backbone.patch_embed.proj.weight"][0] == pytest.approx(top * 0.5**depth)
    assert rates["backbone.pos_embed"][1] == 0  # which timm never decays


def test_backbone_is_frozen_in_the_linear_epochs_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    seen: list[tuple[Tensor, Tensor]] = []
    right = Trainer._update

    def update(self, *given):  # type: ignore[no-untyped-def]
        norm = right(self, *given)
        state = self.core.state_dict()
        seen.append((torch.cat([v.flatten().double() for k, v in state.items() if k.startswith("backbone")]), state["head.weight"].clone()))
        return norm

    monkeypatch.setattr(Trainer, "_update", update)
    finetune(tiny("classifier.linear_epochs=2"), tmp_path / "run", progress=False)
    assert all(torch.equal(body, seen[0][0]) for body, _ in seen[:6]) and not torch.equal(
        seen[6][0], seen[5][0]
    )  # batch statistics included
    assert all(not torch.equal(a, b) for (_, a), (_, b) in zip(seen, seen[1:], strict=False))


def test_linear_run_leaves_the_backbone_unchanged(tmp_path: Path) -> None:
    recipe = tiny(
        "classifier.train=linear", "classifier.linear_epochs=0", "optim.name=sgd", "optim.layer_decay=1", "start.input=z", "optim.lr=4"
    )
    finetune(recipe, tmp_path / "run", progress=False)
    classifier, encoder = rz.load_classifier(tmp_path / "run"), rz.load_encoder("test_resnet.digits")
    assert all(
        torch.equal(a, b) for a, b in zip(classifier.backbone.state_dict().values(), encoder.backbone.state_dict().values(), strict=True)
    )
    assert classifier.projector is not None and torch.equal(classifier.projector[0].weight, encoder.projector[0].weight)  # type: ignore[index]
    assert classifier.config.info["results"]["top1"] > 0.5


# --- runs -------------------------------------------------------------------------------------------------------------------------------


def test_run_learns_and_records_its_results(finished: Path) -> None:
    classifier = rz.load_classifier(finished)
    results, last = classifier.config.info["results"], rows(finished)[-1]
    assert results["top1"] == last["top1"] > 0.5 and results["top5"] == last["top5"] >= results["top1"]
    assert (results["n_train"], results["n_test"]) == (192, 360)
    assert {p.name for p in finished.iterdir()} >= {"classifier", "classifier-best", "recipe.yaml", "summary.json", "checkpoints"}
    assert TuningRecipe.load(finished / "recipe.yaml").data.image_size == 32  # the preprocessing of the encoder is written down
    test = open_source(load_any("digits").data).eval
    assert test is not None and test.labels is not None
    prediction = classifier.predict(test)
    assert prediction.ids == test.ids and prediction.probabilities.sum(1) == pytest.approx(1, abs=1e-5)
    assert np.mean([int(label) == y for label, y in zip(prediction.labels, test.labels, strict=True)]) == results["top1"]
    right = np.log(prediction.probabilities.astype(np.float64)[np.arange(360), test.labels])
    assert -right.mean() == pytest.approx(results["loss"], rel=1e-4)


@pytest.mark.parametrize("step", [2, 7])
def test_stopped_and_resumed_is_bit_equal(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    recipe, run = TuningRecipe.load(finished / "recipe.yaml"), tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_after(patch, step)
        with pytest.raises(StoppedBySignal):
            finetune(recipe, run, progress=False)
    assert latest(run)[0].step == step  # type: ignore[union-attr]
    with refused(RecipeError, match=r"classifier\.mixup: 0\.4 -> 0\.5"):
        finetune(TuningRecipe.load(finished / "recipe.yaml", ["classifier.mixup=0.5"]), run, resume=True, progress=False)
    finetune(recipe, run, resume=True, progress=False)
    assert rows(run) == rows(finished) and torch.equal(logits(run), logits(finished))
    assert torch.equal(logits(run / "classifier-best"), logits(finished / "classifier-best"))


def test_card_of_the_best_names_how_it_was_chosen(finished: Path) -> None:
    note = "selected by top1 on these evaluation images, so the value is optimistic."
    assert note in (finished / "classifier-best/README.md").read_text() and note not in (finished / "classifier/README.md").read_text()


def on_two_ranks(folder: str, source: str) -> str:
    """A transformer, and a single linear layer on cached features, have no batch statistics, so processes must agree with one."""
    finetune(tiny(f"start.source={source}", "train.epochs=2"), Path(folder) / "tuned", progress=False)
    more = ["encoder.cached_views=3", "encoder.projector_depth=1", "train.epochs=2", "encoder.freeze_backbone=true"]
    rz.train(tiny_encoder(*more), Path(folder) / "cached", progress=False)
    return f"{distributed.rank()} of {distributed.world_size()}"


def test_two_processes_learn_what_one_does(vit: Path, tmp_path: Path) -> None:
    assert run_ranks(on_two_ranks, 2, str(tmp_path / "two"), str(vit)) == ["0 of 2", "1 of 2"]
    on_two_ranks(str(tmp_path / "one"), str(vit))
    for kind in ("tuned", "cached"):
        for a, b in zip(rows(tmp_path / "one" / kind), rows(tmp_path / "two" / kind), strict=True):
            assert a.keys() == b.keys() and a.get("n_test") == b.get("n_test")
            for name in {"loss", "lr", "grad_norm", "matching", "knn_features"} & a.keys():
                assert a[name] == pytest.approx(b[name], rel=2e-4), (kind, a["step"], name)
    assert torch.allclose(logits(tmp_path / "one/tuned"), logits(tmp_path / "two/tuned"), atol=1e-3)


def test_best_by_an_unusable_metric_is_refused(image_folder: Path, tmp_path: Path) -> None:
    more = [
        f"data.path={image_folder}",
        "train.batch_size=8",
        "start.source=test_resnet.digits",
        "train.precision=no",
        "data.image_size=32",
        "train.epochs=8",
        "train.min_steps=1",
        "optim.lr=0.1",
    ]
    with refused(RecipeError, match="train.best: top1 needs evaluation images"):
        finetune(TuningRecipe.load("finetune-folder", [*more, "train.best=top1"]), tmp_path / "a", progress=False)
    for part in ("train", "val"):
        (tmp_path / "data" / part).mkdir(parents=True)
        for name in ("red", "blue"):
            (tmp_path / "data" / part / name).symlink_to(image_folder / name)
    more[0] = f"data.path={tmp_path / 'data'}"
    with refused(RecipeError, match="train.best: top5 is always 1 with 2 classes"):
        finetune(TuningRecipe.load("finetune-folder", [*more, "train.best=top5"]), tmp_path / "b", progress=False)
    classifier = rz.load_classifier(
        finetune(TuningRecipe.load("finetune-folder", [*more, "train.num_workers=0"]), tmp_path / "c", progress=False)
    )
    assert classifier.classes == ("blue", "red") and set(classifier.config.info["results"]) == {
        "top1",
        "loss",
        "n_test",
        "n_train",
        "protocol",
    }
    prediction = classifier.predict(image_folder)
    assert [name.partition("/")[0] for name in prediction.ids] == prediction.labels  # reddish and bluish noise


# --- the published folder ---------------------------------------------------------------------------------------------------------------

PLAIN = """
import sys, torch, timm
for name in ("test_resnet", "test_vit", "resnet10_small_narrow"):
    if name == "resnet10_small_narrow":
        assert not any(module.startswith("rlpjepa_zoo") for module in sys.modules)
        import rlpjepa_zoo.resnet
    model = timm.create_model(f"local-dir:{name}", pretrained=True).eval()
    torch.save(model(torch.load("x")).detach(), name + "/logits")
"""


def test_plain_timm_gives_the_same_logits(tmp_path: Path) -> None:
    made, x = {}, torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.save(x, tmp_path / "x")
    for name in ("test_resnet", "test_vit", "resnet10_small_narrow"):
        options = {"img_size": 32, "patch_size": 8} if name == "test_vit" else {}
        made[name] = make_classifier(settled(name, **options), ["cat", "dog", "owl"]).eval()
        folder = made[name].save_pretrained(tmp_path / name)
        config = json.loads((folder / "config.json").read_text())
        assert config["num_classes"] == 3 and config["label_names"] == ["cat", "dog", "owl"] and not (folder / "head.safetensors").exists()
    subprocess.run([sys.executable, "-c", PLAIN], check=True, cwd=tmp_path)
    for name, classifier in made.items():
        expected = classifier(x)
        assert torch.equal(torch.load(tmp_path / name / "logits"), expected), name
        (tmp_path / name / "logits").unlink()
        assert torch.equal(rz.load_classifier(tmp_path / name)(x), expected)


def test_transformers_gives_the_same_logits(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    classifier = make_classifier(settled("test_resnet"), ["cat", "dog", "owl"]).eval()
    folder = classifier.save_pretrained(tmp_path / "model")
    model = transformers.AutoModelForImageClassification.from_pretrained(str(folder)).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.allclose(model(x).logits, classifier(x), atol=1e-6) and model.config.id2label == {0: "cat", 1: "dog", 2: "owl"}


def test_classifier_of_z_keeps_projector_and_head_in_head_file(tmp_path: Path) -> None:
    classifier = make_classifier(settled("test_resnet"), ["cat", "dog"], "z").eval()
    folder = classifier.save_pretrained(tmp_path / "model")
    import safetensors.torch
    import timm

    held = safetensors.torch.load_file(folder / "head.safetensors")
    assert {"head.weight", "head.bias", "projector.0.weight"} <= set(held) and held["head.weight"].shape == (2, 24)
    x = torch.randn(2, 3, 32, 32)
    backbone = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert torch.equal(backbone(x), classifier.backbone(x))
    again = rz.load_classifier(folder)
    assert torch.equal(again(x), classifier(x)) and again.fingerprint() == classifier.fingerprint()
    assert again.config.input == "z" and again.classes == ("cat", "dog")


@pytest.mark.parametrize("input", ["features", "z"])
def test_any_flipped_byte_is_refused(tmp_path: Path, input: str) -> None:
    folder = make_classifier(settled("test_resnet"), ["cat", "dog"], input).eval().save_pretrained(tmp_path / "model", recipe="name: x\n")
    for path in sorted(folder.iterdir()):
        kept = path.read_bytes()
        place = len(kept) * 2 // 3
        path.write_bytes(kept[:place] + bytes([kept[place] ^ 1]) + kept[place + 1 :])
        with refused(ModelError):
            rz.load_classifier(folder)
        path.write_bytes(kept)
    rz.load_classifier(folder)


def test_folder_with_foreign_golden_logits_is_refused(tmp_path: Path) -> None:
    from published import config_of, reseal

    a = make_classifier(settled("test_resnet"), ["cat", "dog"]).eval()
    b = make_classifier(settled("test_resnet"), ["cat", "dog"]).eval()
    with torch.no_grad():
        b.head.bias += 1
    one, other = a.save_pretrained(tmp_path / "a"), b.save_pretrained(tmp_path / "b")
    mixed = Path(shutil.copytree(one, tmp_path / "mixed"))
    shutil.copy(other / "golden.safetensors", mixed)
    reseal(mixed)
    with refused(ModelError, match="codes differ from the saved ones"):
        rz.load_classifier(mixed)
    for block, message in (
        ({"classes": ["cat"]}, "classifier.classes"),
        ({"classes": list("abc")}, "expected F32"),
        ({"input": "z"}, "classifier.input"),
    ):
        changed = Path(shutil.copytree(one, tmp_path / f"changed{message}"))
        with config_of(changed) as config:
            config["rlpjepa_zoo"]["classifier"] |= block
        with refused(ModelError, match=message):
            rz.load_classifier(changed)


def test_encoder_and_classifier_folders_are_told_apart(tmp_path: Path, finished: Path) -> None:
    with refused(ModelError, match="holds a classifier, not an encoder; use load_classifier"):
        rz.load_encoder(finished)
    with refused(ModelError, match="holds an encoder, not a classifier"):
        rz.load_classifier("test_resnet.digits")


def test_encoder_with_a_dial_is_refused_from_z() -> None:
    encoder = settled().with_budget(3)
    with refused(UsageError, match="the encoder has a dial"):
        make_classifier(encoder, ["cat", "dog"], "z")
    assert make_classifier(encoder, ["cat", "dog"]).config.encoder.dial is None


def test_architecture_without_linear_classifier_works_from_z_only() -> None:
    encoder = rz.create_encoder("deit_tiny_distilled_patch16_224", dim=8, img_size=32, patch_size=16)
    with refused(UsageError, match="its classifier in timm is not one linear layer.*start.input=z"):
        make_classifier(encoder, ["cat", "dog"])
    assert make_classifier(encoder, ["cat", "dog"], "z").head.in_features == 8


@pytest.mark.parametrize("name", ["resnetv2_50", "dla34"])
def test_convolutional_classifier_is_refused_before_training(name: str) -> None:
    with torch.device("meta"):
        encoder = rz.create_encoder(name, dim=8)
    with refused(UsageError, match="its classifier in timm is not one linear layer.*start.input=z"):
        make_classifier(encoder, ["cat", "dog"])


# --- the command line -------------------------------------------------------------------------------------------------------------------


def test_card_and_push_accept_a_classifier(finished: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli(["push", str(finished), "me/digits-classifier", "--dry-run", "--license", "mit"]) == 0
    output = capsys.readouterr().out
    assert "# Image classifier: test_resnet, 10 classes" in output and 'rz.load_classifier("me/digits-classifier")' in output
    assert "pipeline_tag: image-classification" in output and "license: mit" in output and "head.safetensors" not in output.split("---")[0]
    top1 = rz.load_classifier(finished).config.info["results"]["top1"]
    assert f"{100 * top1:.2f} %" in output and "n = 360 held-out images; trained on n = 192 labelled images" in output
    assert cli(["card", str(finished)]) == 0


def test_classifier_is_pushed_and_loaded_from_the_hub(finished: Path, hub_server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_server.users["hf_me"] = User("me")
    monkeypatch.setenv("HF_TOKEN", "hf_me")
    settled("test_resnet").eval().push_to_hub("me/model")
    assert cli(["push", str(finished), "me/model"]) == 0
    assert hub_server.log("me/model")[0].title == "Update image classifier"
    assert torch.equal(logits("me/model"), logits(finished))
    from huggingface_hub import HfApi

    assert "head.safetensors" not in HfApi().list_repo_files("me/model")  # of the encoder that was there before


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["finetune", "digits"], 2, "recipe for `rlpjepa train`"), (["train", "finetune-digits"], 2, "recipe for `rlpjepa finetune`"),
        (["finetune", "finetune-digits", "start.source=no-such-encoder"], 2, "neither a folder, nor a name of the zoo"),
        (["finetune", "finetune-digits", "start.source=timm:resnet81"], 4, "not a timm model"),
        (["finetune", "finetune-digits", "data.per_class=1000"], 3, "data.per_class: 1000 images of each class"),
        (["finetune", "finetune-folder", "start.source=test_resnet.digits"], 3, "data.path"),
        (["finetune", "finetune-digits", "start.source=timm:test_vit", "start.random=true", "start.args={img_size: 16}", "data.image_size=20"], 2, "data.image_size"),
    ],
)  # fmt: skip
def test_mistake_is_one_line_with_its_exit_code(
    arguments: list[str], code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli([*arguments, "--out", str(tmp_path / "run"), "--quiet"]) == code
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error


def test_check_prints_the_resolved_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["check", "finetune-digits", "start.input=z"]) == 0
    output = capsys.readouterr().out
    assert "# classifies: z (256)" in output and TuningRecipe.parse(output).data.image_size == 32


def test_command_fine_tunes_and_prints_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["finetune", "finetune-digits", *TINY, "--out", str(tmp_path / "run"), "--quiet", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["classifier"] == str(tmp_path / "run/classifier") and printed["top1"] > 0.4 and printed["steps"] == 12


# --- adapters ---------------------------------------------------------------------------------------------------------------------------


def test_adapters_are_trained_alone_and_merged(vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft", reason="peft is not installed: pip install 'rlpjepa-zoo[lora]'")
    more = [
        "classifier.train=lora",
        "classifier.linear_epochs=0",
        "classifier.lora={rank: 2, targets: [qkv]}",
        "optim.lr=0.02",
        f"start.source={vit}",
    ]
    folder = finetune(tiny(*more), tmp_path / "run", progress=False)
    merged, start = rz.load_classifier(folder).backbone.state_dict(), rz.load_encoder(vit).backbone.state_dict()
    assert merged.keys() == start.keys()
    changed = {k for k in merged if not torch.equal(merged[k], start[k])}
    assert changed == {k for k in merged if k.endswith("qkv.weight")}
    for name in changed:
        assert int(torch.linalg.matrix_rank((merged[name] - start[name]).double(), rtol=1e-4)) <= 2
    with monkeypatch.context() as patch:
        stop_after(patch, 5, signal.SIGTERM)
        with pytest.raises(StoppedBySignal):
            finetune(tiny(*more), tmp_path / "again", progress=False)
    finetune(tiny(*more), tmp_path / "again", resume=True, progress=False)
    assert torch.equal(logits(tmp_path / "again"), logits(folder)) and rows(tmp_path / "again") == rows(tmp_path / "run")
    with refused(UsageError, match=r"classifier\.lora\.targets: no module of the backbone ends in 'nosuch'"):
        finetune(tiny(*more, "classifier.lora={targets: [qkv, nosuch]}"), tmp_path / "wrong", progress=False)


def test_adapters_without_peft_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with refused(UsageError, match=r"needs peft; pip install 'rlpjepa-zoo\[lora\]'"):
        finetune(tiny("classifier.train=lora", "classifier.linear_epochs=0"), tmp_path / "run", progress=False)


def test_random_streams_are_distinct() -> None:
    assert len({key(0, purpose) for purpose in ("init", "init-head", "init-adapters", "mix", "per_class", "limit", "order")}) == 7
