"""The picture of a run on its card."""

from pathlib import Path

import pytest
from pictures import real_training_picture
from PIL import Image
from runs import tiny

from rlpjepa_zoo.training.tasks.pretrain import train

HISTORIES = {
    "a run": [{"step": i, "l0": 0.5 - i / 100, "excess": 0.1 / i} for i in range(1, 9)] + [{"step": 9, "l0_eval": 0.4}],
    "no distance": [{"step": 1, "l0": 0.5}, {"step": 2, "l0": 0.4}],
    "distance below its floor": [{"step": 1, "l0": 0.5, "excess": -0.1}],
    "skipped step": [{"step": 1, "l0": None, "excess": None}, {"step": 2, "l0": 0.4, "excess": 0.2}],
    "nothing measured": [{"step": 1}],
}


@pytest.mark.parametrize("history", HISTORIES.values(), ids=HISTORIES)
def test_a_history_makes_the_same_bytes_again(history: list[dict[str, float]]) -> None:
    picture = real_training_picture(history, 0.5)
    assert picture[:4] == b"\x89PNG" and picture == real_training_picture(history, 0.5) != real_training_picture(history, 0.3)


def test_a_run_has_the_real_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlpjepa_zoo.hub.card_figures.training", real_training_picture)
    train(tiny("train.epochs=1"), tmp_path / "run", progress=False)
    with Image.open(tmp_path / "run/encoder/training.png") as picture:
        assert picture.size == (936, 494)
