"""docs/cost.md is made from benchmarks/cost.json and the counts are right: the recipes, known networks, and the memory of a step on a CPU."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import timm
import torch
from runs import tiny
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from rlpjepa_zoo.bench.loss import peak_memory
from rlpjepa_zoo.config.load import list_recipes
from rlpjepa_zoo.config.pretrain import Recipe
from rlpjepa_zoo.training.tasks.encoders import build_encoder
from rlpjepa_zoo.training.tasks.pretrain import build_objective, train

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def cost() -> Iterator[ModuleType]:
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        yield importlib.import_module("cost")
    finally:
        sys.path.pop(0)


@pytest.fixture(scope="module")
def found() -> dict:
    return json.loads((ROOT / "benchmarks/cost.json").read_text())


def test_the_page_is_up_to_date(cost: ModuleType, found: dict) -> None:
    page = (ROOT / "docs/cost.md").read_text()
    for name, content in cost.sections(found).items():
        assert f"-->\n{content}<!-- end of {name} -->" in page, "run python tools/cost.py --write"


def test_every_recipe_of_the_paper_has_a_row(found: dict) -> None:
    sets = ("cifar10", "cifar100", "imagenet100", "imagenet1k", "celeba")
    assert [name for name in list_recipes() if name.split("-")[0] in sets] == [name for name in found["recipes"] if name != "digits"]


def test_lengths_are_those_of_the_recipes(cost: ModuleType, found: dict) -> None:
    for name, recipe in cost.recipes().items():
        row, steps = found["recipes"][name], recipe.steps(cost.images_of(recipe))[0]
        assert (row["steps"], row["views"], row["epochs"]) == (
            steps,
            recipe.views.count * steps * recipe.train.batch_size,
            recipe.train.epochs,
        ), "run python tools/cost.py --write"


@pytest.mark.parametrize("name", ["digits", "cifar10-resnet18", "imagenet100-vit-small"])
def test_counts_are_those_of_the_network(cost: ModuleType, found: dict, name: str) -> None:
    row, recipe = found["recipes"][name], Recipe.load(name)
    assert cost.macs_per_view(recipe) == row["macs per view"]
    assert sum(p.numel() for p in cost.skeleton(recipe).parameters()) == row["parameters"]
    assert cost.activation_bytes(recipe) == pytest.approx(row["activation bytes per view"], rel=0.05)


def test_macs_of_the_measured_networks_are_counted_alike(cost: ModuleType) -> None:
    speed = cost.RTX3090["resnet50"]
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        timm.create_model(speed.model)(torch.zeros(2, 3, 224, 224))
    assert counter.get_total_flops() / 4 == speed.macs
    assert speed.flops == 6 * speed.macs * speed.per_second


def test_kept_tensors_of_a_known_network(cost: ModuleType) -> None:
    """A linear layer keeps its input, a ReLU its output, which is the input of the next layer; all in bf16. The copies of weights in bf16 do not depend
    on the number of views."""

    class Known(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 8), nn.ReLU())

        both = property(lambda self: self.layers)

    with torch.device("meta"):
        network = Known()
    few, many = cost.saved_bytes(network, 4, 8), cost.saved_bytes(network, 4, 16)
    assert (many - few) / 8 == 2 * (48 + 32 + 8)


@pytest.mark.parametrize(("name", "batch"), [("digits", 64), ("cifar10-resnet18", 8)])
def test_memory_is_a_little_above_the_peak_of_a_step(cost: ModuleType, name: str, batch: int) -> None:
    recipe = Recipe.load(
        name, [f"train.batch_size={batch}", "objective.num_directions=512", "objective.directions=random", "target.hold=false"]
    )
    encoder, objective, size = (
        build_encoder(recipe).train().to(memory_format=torch.channels_last),
        build_objective(recipe),
        recipe.data.image_size,
    )

    def step() -> None:
        views = torch.randn(2 * batch, 3, size, size).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            z = encoder.both(views).z.unflatten(0, (2, batch))
        objective(z, 0).total.backward()

    parameters = sum(p.numel() for p in encoder.parameters())
    expected = cost.memory(recipe, parameters, cost.activation_bytes(recipe))
    of_a_step = sum(expected.values()) - expected["weights"] - expected["optimiser"]  # the others are there before
    assert 0.67 < peak_memory(step) / of_a_step < 1


def test_a_run_gives_the_times_of_all_recipes(cost: ModuleType, found: dict, tmp_path: Path) -> None:
    train(Recipe.load("digits", ["train.stop_after=4", "train.log_every=1", "train.num_workers=0"]), tmp_path / "run", progress=False)
    text = cost.of_run(tmp_path / "run", found)
    assert "images a second, loading and views included (median of 3 rows)" in text and text.count("| at the measured speed |") == 1
    assert text.count("| estimate |") == len(found["recipes"]) - 1


def test_a_run_of_another_network_measures_no_recipe(cost: ModuleType, found: dict, tmp_path: Path) -> None:
    train(tiny("train.stop_after=3"), tmp_path / "run", progress=False)
    assert cost.of_run(tmp_path / "run", found).count("| estimate |") == len(found["recipes"])


def test_a_run_of_one_logged_step_has_no_speed(cost: ModuleType, found: dict, tmp_path: Path) -> None:
    train(tiny("train.stop_after=1"), tmp_path / "run", progress=False)
    with pytest.raises(SystemExit, match=r"train at least 2 \* train.log_every = 2 steps"):
        cost.of_run(tmp_path / "run", found)


@pytest.mark.parametrize(
    ("hours", "text"), [(0.05, "3 minutes"), (3.09, "3.1 hours"), (58.2, "58 hours"), (144.5, "6 days"), (3000, "125 days")]
)
def test_times_are_short(cost: ModuleType, hours: float, text: str) -> None:
    assert cost.span(hours) == text
