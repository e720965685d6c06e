"""Training by an objective without a target law: log, resume, card, `rlpjepa check` and report."""

import json
from pathlib import Path

import pytest
import yaml
from objectives import Spread
from runs import codes, rows, stop_after, tiny

from rlpjepa_zoo.cli import app as cli
from rlpjepa_zoo.config.pretrain import Recipe
from rlpjepa_zoo.errors import RecipeError, StoppedBySignal
from rlpjepa_zoo.objectives import OBJECTIVES
from rlpjepa_zoo.training.tasks.pretrain import train


def without_target(*overrides: str) -> Recipe:
    values = yaml.safe_load(tiny().dump()) | {"objective": {"name": "spread", "spread": 2.0}}
    del values["target"]
    return Recipe.parse(yaml.safe_dump(values), overrides)


@pytest.fixture(autouse=True)
def spread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OBJECTIVES._load(), "spread", Spread)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    train(without_target(), tmp_path / "run", progress=False)
    return tmp_path / "run"


def test_log_has_the_terms_and_no_distance(run: Path) -> None:
    logged = [row for row in rows(run) if row["kind"] == "train"]
    assert len(logged) == 12 and all(
        {"loss", "invariance", "spread", "l0"} <= set(row) and not {"excess", "floor"} & set(row) for row in logged
    )
    assert all(row["loss"] == pytest.approx(row["invariance"] + 2 * row["spread"], rel=1e-5) for row in logged)
    assert json.loads((run / "summary.json").read_text())["alarms"] == []


def test_stopped_run_resumes_to_the_same_encoder(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        with pytest.raises(StoppedBySignal):
            train(without_target(), tmp_path / "again", progress=False)
    train(without_target(), tmp_path / "again", resume=True, progress=False)
    assert rows(tmp_path / "again") == rows(run) and (codes(tmp_path / "again/encoder") == codes(run / "encoder")).all()


def test_card_names_the_objective_and_no_target(run: Path) -> None:
    card = (run / "encoder/README.md").read_text()
    method = "objective spread: agreement of views, and a spread of each dimension with weight 2"
    assert f"by the {method}." in card and f"- method: {method}" in card and "not trained" not in card
    assert "2602.01456" not in card and "rectified generalized Gaussian" not in card and "Random projections" not in card
    assert "| - | - | 0." in card, "no density asked for or in theory, both measured"


def test_check_prints_no_target(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["check", str(run / "recipe.yaml"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert "target" not in facts and "expected density" not in facts and facts["recipe"]["target"] is None
    assert facts["objective"] == "agreement of views, and a spread of each dimension with weight 2"


def test_report_shows_each_term_and_no_law(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["report", str(run), "--images", "30", "--quiet"]) == 0
    page = (run / "report.html").read_text()
    assert "Law of z" not in page and "Density in theory" not in page and "Matching and its floor" not in page
    assert "spread over steps." in page and "Invariance over steps." in page and "Firing rates" in page


def test_best_by_excess_is_refused() -> None:
    with pytest.raises(RecipeError, match="train.best: objective spread does not measure excess; choose knn_z or knn_features"):
        without_target("train.best=excess")
