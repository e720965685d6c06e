"""Objectives in recipes: chosen by name, validated by their own options, built, monitored and resumed."""

from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import rlpjepa_zoo as rz
from rlpjepa_zoo.config.pretrain import Recipe
from rlpjepa_zoo.distributions import RectifiedGeneralizedGaussian, sigma_gn
from rlpjepa_zoo.errors import RecipeError
from rlpjepa_zoo.objectives import OBJECTIVES
from rlpjepa_zoo.objectives.base import Objective, Options, Terms, invariance
from rlpjepa_zoo.objectives.rectified_lpjepa import RectifiedLpJEPALoss, RectifiedLpJEPAOptions

TARGET = RectifiedGeneralizedGaussian(0.0, sigma_gn(1.0), 1.0)


class DistanceOptions(Options):
    name: str = "distance"
    weight: float = 2.0


class Distance(Objective):
    """The smallest objective: agreement of views, no target."""

    Options = DistanceOptions

    def __init__(self, weight: float) -> None:
        self.weight = weight

    @classmethod
    def build(cls, options: DistanceOptions, **run: Any) -> "Distance":
        return cls(options.weight)

    def __call__(self, views: Tensor, step: int) -> Terms:
        difference = invariance(views)
        return Terms(self.weight * difference, {"invariance": difference})

    def describe(self) -> str:
        return f"distance of weight {self.weight:g}"


@pytest.fixture
def distance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OBJECTIVES._load(), "distance", Distance)


def values(**objective: Any) -> dict[str, Any]:
    recipe = yaml.safe_load(Recipe.load("digits").dump())
    return recipe | {"objective": objective}


def text(recipe: dict[str, Any]) -> str:
    return yaml.safe_dump(recipe)


def test_list_objectives_names_every_registered_one() -> None:
    assert rz.list_objectives() == list(OBJECTIVES) and "rectified_lpjepa" in OBJECTIVES
    assert OBJECTIVES["rectified_lpjepa"] is RectifiedLpJEPALoss


def test_recipe_without_a_name_equals_one_with_the_default() -> None:
    """So a run whose checkpoint has no name resumes without --allow-change."""
    recipe = Recipe.load("digits")
    old = yaml.safe_load(recipe.dump())
    assert old["objective"].pop("name") == "rectified_lpjepa"
    assert Recipe.parse(text(old)).flat() == recipe.flat()
    assert isinstance(recipe.objective, RectifiedLpJEPAOptions)


def test_recipe_without_the_section_has_the_default_objective() -> None:
    recipe = values()
    del recipe["objective"]
    assert Recipe.parse(text(recipe)).objective == RectifiedLpJEPAOptions()


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"name": "rectified_lpjep"}, "objective.name: objective 'rectified_lpjep' does not exist. Did you mean 'rectified_lpjepa'?"),
        ({"name": "vicreg2000"}, "Known: rectified_lpjepa."),
        ({"matchign": 1}, "objective.matchign: unknown key. Did you mean 'matching'?"),
        ({"matching": -1}, "objective.matching: got '-1', expected greater than or equal to 0"),
        ({"directions": "axes:500+random", "num_directions": 400}, "objective.directions: the counts of "),
        ({"accumulate": 2}, "objective.accumulate: gradient accumulation is refused"),
    ],
)
def test_objective_mistakes_name_their_key(objective: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(text(values(**objective)))
    assert message in str(caught.value) and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("section", ["rectified_lpjepa", [1]])
def test_objective_that_is_no_section_is_refused(section: Any) -> None:
    with pytest.raises(RecipeError, match="objective: got .*, expected a valid dictionary"):
        Recipe.parse(text(values() | {"objective": section}))


def test_missing_target_is_refused_if_the_objective_needs_one() -> None:
    recipe = values()
    del recipe["target"]
    with pytest.raises(RecipeError, match="target: missing; objective rectified_lpjepa needs one"):
        Recipe.parse(text(recipe))


def test_objective_without_target_takes_none(distance: None) -> None:
    recipe = values(name="distance", weight=3)
    with pytest.raises(RecipeError, match="target: has no meaning for objective distance; remove it"):
        Recipe.parse(text(recipe))
    del recipe["target"]
    parsed = Recipe.parse(text(recipe), ["objective.weight=4"])
    assert parsed.objective == DistanceOptions(weight=4) and Recipe.parse(parsed.dump()) == parsed
    with pytest.raises(RecipeError, match="objective.matching: unknown key. Known keys: name, weight"):
        Recipe.parse(text(recipe), ["objective.matching=4"])
    objective = Distance.build(parsed.objective, target=None, dim=8, batch_size=4, seed=0)
    terms = objective(torch.tensor([[[1.0, 0.0]], [[0.0, 0.0]]]), 0)
    assert float(terms.total) == 2.0 and float(terms.parts["invariance"]) == 0.5
    assert objective.monitor({"invariance": 0.5}, 0) == objective.state() == {}


def test_objective_for_a_run_reports_floor_and_excess() -> None:
    options = RectifiedLpJEPAOptions(directions="random", num_directions=64)
    built = RectifiedLpJEPALoss.build(options, target=TARGET, dim=8, batch_size=16, seed=3)
    floor = RectifiedLpJEPALoss(TARGET, seed=3).floor(16, 8)
    assert built.monitor({"matching": 0.5}, 0) == {"floor": floor, "excess": 0.5 - floor}
    assert built.describe() == f"target l0 0.500, floor {floor:.4g}, 64 random directions"
    alone = RectifiedLpJEPALoss(TARGET, kind="random", n=64)
    assert alone.monitor({"matching": 0.5}, 0) == {} and alone.describe() == "target l0 0.500, 64 random directions"


def test_resumed_objective_keeps_its_number_of_directions() -> None:
    before, after = RectifiedLpJEPALoss(TARGET, n=300), RectifiedLpJEPALoss(TARGET, n=500)
    after.load_state(before.state())
    assert after.n == 300
    after.load_state({})  # a checkpoint from before the number was saved
    assert after.n == 300


def test_objective_that_needs_a_target_is_not_built_without() -> None:
    with pytest.raises(RecipeError, match="target: missing"):
        RectifiedLpJEPALoss.build(RectifiedLpJEPAOptions(), target=None, dim=8, batch_size=16, seed=0)
