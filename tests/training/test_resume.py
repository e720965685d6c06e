"""A changed recipe is refused on resume unless each change is allowed."""

from pathlib import Path

import pytest
from runs import tiny

from rlpjepa_zoo.errors import RecipeError, UsageError
from rlpjepa_zoo.training.tasks.pretrain import train


def test_removed_key_is_a_change_and_unknown_allowance_is_refused(tmp_path: Path) -> None:
    more = ["train.epochs=2", "encoder.args={drop_path_rate: 0.1}"]
    train(tiny(*more), tmp_path / "run", progress=False)
    with pytest.raises(RecipeError, match=r"encoder\.args\.drop_path_rate: 0\.1 -> 'absent'"):
        train(tiny("train.epochs=2"), tmp_path / "run", resume=True, progress=False)
    with pytest.raises(UsageError, match="optim.lrr"):
        train(tiny(*more), tmp_path / "run", resume=True, allow_change=["optim.lrr"], progress=False)
