"""Ten steps of the recipes that no computer here can train: on images of the real sizes in the real layouts, to an encoder that loads.

The default suite replaces the backbone by a tiny one. The slow tests train the real network, on a CPU, with a small batch.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
from hub_server import FakeHub, User
from layouts import celeba_parquet, cifar_parquet, imagenet_folders, imagenet_parquet, write
from runs import rows, train_in_two_parts

from rlpjepa_zoo.cli.app import run as cli
from rlpjepa_zoo.config.finetune import load_any
from rlpjepa_zoo.config.load import list_recipes
from rlpjepa_zoo.config.pretrain import Recipe
from rlpjepa_zoo.data.sources import open_source
from rlpjepa_zoo.models.encoder import SparseEncoder
from rlpjepa_zoo.models.pretrained import load_encoder
from rlpjepa_zoo.training.checkpoint import latest
from rlpjepa_zoo.training.tasks.pretrain import train

SETS = ("cifar10", "cifar100", "imagenet100", "imagenet1k", "celeba")
REAL = [name for name in list_recipes() if name.split("-")[0] in SETS and name != "cifar10-cpu"]
CLASSES = {"cifar10": 10, "cifar100": 100, "imagenet100": 100, "imagenet1k": 1000, "celeba": 0}
TINY = [
    "encoder.backbone=test_resnet", "encoder.args={}", "encoder.dim=64", "encoder.hidden_dim=64", "objective.num_directions=64", "train.num_workers=0",
]  # fmt: skip
STEPS = 10
Data = Callable[[str], Path]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """The folder of the data set of a recipe, written when it is needed first."""
    root = tmp_path_factory.mktemp("data")

    def folder(recipe: str) -> Path:
        path, classes = root / recipe.split("-")[0], CLASSES[recipe.split("-")[0]]
        if path.exists():
            return path
        if path.name.startswith("imagenet"):
            return imagenet_folders(path, classes)
        return write(path, cifar_parquet(classes) if classes else celeba_parquet())

    return folder


def ten_steps(batch: int, *more: str) -> list[str]:
    """Overrides that end a run after ten steps of a small batch, with fewer images in its evaluation; the schedules keep their length.

    The memory for decoded images is a thousandth too, so CIFAR fits in it and photographs do not, as with all the images.
    """
    short = [f"train.batch_size={batch}", f"train.stop_after={STEPS}", "train.log_every=1", "probe.bank=16", "probe.eval_images=8"]
    return [*short, "data.cache_gb=0.001", *more]


def check_run(recipe: Recipe, run: Path, encoder: SparseEncoder) -> None:
    """Ten logged steps with finite losses, a checkpoint, an evaluation on held-out images, and an encoder that embeds an image."""
    logged = rows(run)
    steps, (evaluation,) = [row for row in logged if row["kind"] == "train"], [row for row in logged if row["kind"] == "eval"]
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1)) and all(row["loss"] is not None for row in steps)
    newest, damaged = latest(run)
    assert newest is not None and newest.step == STEPS and damaged == []
    source = open_source(recipe.data)
    assert source.classes == CLASSES[recipe.name.split("-")[0]] and source.eval is not None and evaluation["n_eval"] == 8
    assert ("probe_z" in steps[-1] and "knn_z" in evaluation) == (source.classes > 0)
    assert encoder.config.preprocess.size == (recipe.data.image_size,) * 2
    embeddings = encoder.embed([source.eval.read(0)])
    assert embeddings.shape == (1, recipe.encoder.dim) and (embeddings.values > 0).all()


@pytest.mark.parametrize("name", ["imagenet100-resnet50", "imagenet1k-resnet50", "cifar10-resnet18", "celeba-resnet50"])
def test_ten_steps_of_a_tiny_network_on_local_files(tmp_path: Path, data: Data, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = ten_steps(4, f"data.path={data(name)}", *TINY)
    assert cli(["check", name, *given]) == 0 and "# evaluation images: " in capsys.readouterr().out
    recipe = Recipe.load(name, given)
    check_run(recipe, tmp_path / "run", load_encoder(train(recipe, tmp_path / "run", progress=False)))


def test_ten_steps_on_the_parquet_files_of_imagenet(tmp_path: Path) -> None:
    more = ["data.source=hf", "data.name=ILSVRC/imagenet-1k", "data.eval_split=validation"]
    path = write(tmp_path / "data", imagenet_parquet())
    recipe = Recipe.load("imagenet1k-resnet50", ten_steps(4, f"data.path={path}", *more, *TINY))
    check_run(recipe, tmp_path / "run", load_encoder(train(recipe, tmp_path / "run", progress=False)))


def test_ten_steps_from_the_hub_to_the_hub(tmp_path: Path, hub_server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but the recipe and where to publish: the images come from the repository that the recipe names."""
    hub_server.put("uoft-cs/cifar100", cifar_parquet(100), type="dataset")
    hub_server.users["hf_you"] = User("you")
    monkeypatch.setenv("HF_TOKEN", "hf_you")
    recipe = Recipe.load("cifar100-resnet18", ten_steps(8, *TINY, "hub.repo=you/sparse", "hub.license=apache-2.0"))
    train(recipe, tmp_path / "run", progress=False)
    check_run(recipe, tmp_path / "run", load_encoder("you/sparse"))


@pytest.mark.parametrize("name", [name for name in list_recipes() if isinstance(load_any(name), Recipe)])
def test_check_asks_for_the_images_only(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A recipe of the Hub or of images in a package needs nothing; one of local files names data.path. Neither downloads weights."""
    local = load_any(name).data.source in ("folder", "parquet")
    assert cli(["check", name]) == (3 if local else 0)
    out, err = capsys.readouterr()
    assert ("data.path" in err and "add data.path=DIR" in err) if local else "# peak learning rate" in out


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_ten_steps_of_the_real_network_in_two_parts(tmp_path: Path, data: Data, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after five steps and resumed; everything but batch and number of workers is that of the recipe."""
    recipe = Recipe.load(name, ten_steps(8 if "cifar" in name else 2, f"data.path={data(name)}", "train.num_workers=1"))
    train_in_two_parts(monkeypatch, recipe, tmp_path / "run", 5)
    check_run(recipe, tmp_path / "run", load_encoder(tmp_path / "run"))
