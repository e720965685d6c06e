"""`rlpjepa zoo reproduce`: the same losses again, other ones, and folders that cannot be compared."""

import json
from pathlib import Path

import pytest
from refusals import refused
from runs import rows, tiny

from rlpjepa_zoo.cli.app import run as cli
from rlpjepa_zoo.errors import ModelError, UsageError
from rlpjepa_zoo.hub import card
from rlpjepa_zoo.hub.folder import write_folder
from rlpjepa_zoo.models.pretrained import load_encoder
from rlpjepa_zoo.report.reproduce import Reproduction, compare, reproduce
from rlpjepa_zoo.training.tasks.pretrain import train


@pytest.fixture(scope="module")
def entry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published encoder with the log of its run."""
    root = tmp_path_factory.mktemp("entry")
    folder = train(tiny("probe.every_epochs=1"), root / "run", progress=False)
    return write_folder(root / "entry", card.rewritten(folder, "entry", log=(root / "run/metrics.jsonl").read_bytes()))


def test_the_log_is_part_of_the_folder(entry: Path, tmp_path: Path) -> None:
    assert load_encoder(entry).config.recipe is not None
    again = write_folder(tmp_path / "again", card.rewritten(entry, "other"))
    assert (again / "log.jsonl").read_bytes() == (entry / "log.jsonl").read_bytes()
    (again / "log.jsonl").write_text("{}")
    with refused(ModelError, match=r"log\.jsonl: differs"):
        load_encoder(again)


def test_the_first_steps_are_the_same_again(entry: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["zoo", "reproduce", str(entry), "--steps", "7", "--out", str(tmp_path / "run"), "--quiet", "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert [number["step"] for number in numbers if number["name"] == "loss"] == [*range(1, 8)]
    assert {number["name"] for number in numbers} == {"loss", "l0_eval", "knn_z", "knn_features"}
    assert {number["difference"] for number in numbers} == {0.0}
    assert [row for row in rows(tmp_path / "run") if row["kind"] == "train"][-1]["step"] == 7
    assert cli(["zoo", "reproduce", str(entry), "--resume", "--out", str(tmp_path / "run"), "--quiet"]) == 0  # the rest
    out = capsys.readouterr().out
    assert "the largest difference of a loss is 0.00%" in out and "at most 5% is the same" in out
    assert rows(tmp_path / "run")[-1]["step"] == 12


def test_another_seed_is_another_loss(entry: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["zoo", "reproduce", str(entry), "seed=5", "optim.lr=0.1", "--steps", "8", "--out", str(tmp_path / "run"), "--quiet"]) == 4
    error = capsys.readouterr().err.splitlines()[-1]
    assert "the largest difference of a loss is" in error and "more than 5%; other images" in error


def test_what_cannot_be_compared_is_refused(entry: Path, tmp_path: Path) -> None:
    without = load_encoder(entry).save_pretrained(tmp_path / "without")
    with refused(ModelError, match=r"has no log\.jsonl, so there is nothing to compare with"):
        reproduce(str(without), [], 3, tmp_path / "run")
    with refused(UsageError, match=r"train\.log_every: the log is compared step by step; leave it out"):
        reproduce(str(entry), ["train.log_every=3"], 7, tmp_path / "run")
    sparse = write_folder(tmp_path / "sparse", card.rewritten(entry, "sparse", log=b'{"kind": "train", "step": 20, "loss": 1.0}\n'))
    with refused(UsageError, match=r"--steps 3: the first loss in the log of .+ is that of step 20; give at least 20"):
        reproduce(str(sparse), [], 3, tmp_path / "run")
    empty = write_folder(tmp_path / "empty", card.rewritten(entry, "empty", log=b'{"kind": "eval", "step": 20}\n'))
    with refused(ModelError, match=r"no loss in its log\.jsonl"):
        reproduce(str(empty), [], None, tmp_path / "run", progress=False)


def test_a_loss_that_is_lost_or_zero_is_a_difference() -> None:
    def log(*losses: float | None) -> list[dict]:
        return [{"kind": "train", "step": step, "loss": loss} for step, loss in enumerate(losses, 1)]

    assert not Reproduction(compare(log(2.0, 2.0), log(2.0, None)), Path()).same
    assert not Reproduction(compare(log(0.0, 2.0), log(0.1, 2.0)), Path()).same
    assert Reproduction(compare(log(0.0, 2.0), log(0.0, 2.05)), Path()).same
