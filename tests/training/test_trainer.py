"""The training loop learns, resumes bit for bit, stops with a one-line error, and gives the same results on two processes as on one."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import forked
from processes import PATIENCE, run_ranks
from runs import TINY, codes, of_folder, rows, stop_after, tiny, wait_for_step

from rlpjepa_zoo.config.pretrain import Recipe
from rlpjepa_zoo.core.files import lock
from rlpjepa_zoo.errors import DataError, NonFiniteError, OutputError, RecipeError, StoppedBySignal, UsageError
from rlpjepa_zoo.models.pretrained import load_encoder
from rlpjepa_zoo.objectives.rectified_lpjepa import RectifiedLpJEPALoss
from rlpjepa_zoo.training import checkpoint
from rlpjepa_zoo.training.checkpoint import latest
from rlpjepa_zoo.training.tasks.pretrain import train


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "unbroken"
    train(tiny(), run, progress=False)
    return run


def test_run_writes_its_files_and_metrics(unbroken: Path) -> None:
    names = {p.name for p in unbroken.iterdir()}
    assert {"recipe.yaml", "metrics.jsonl", "checkpoints", "encoder", "summary.json"} <= names
    assert Recipe.load(unbroken / "recipe.yaml") == tiny()
    kinds = [row["kind"] for row in rows(unbroken)]
    assert kinds.count("train") == 12 and kinds.count("eval") == 2
    train_row, eval_row = rows(unbroken)[-2], rows(unbroken)[-1]
    assert {
        "loss",
        "invariance",
        "matching",
        "floor",
        "excess",
        "lr",
        "grad_norm",
        "l0",
        "l1",
        "dead",
        "variance",
        "covariance",
        "probe_z",
    } <= set(train_row)
    assert {"l0_eval", "l1_eval", "dead_eval", "knn_features", "knn_z"} <= set(eval_row)
    info = load_encoder(unbroken / "encoder").config.info
    assert info["density"]["asked"] == 0.12 and info["training"]["steps"] == 12
    assert info["results"]["knn_z"] == eval_row["knn_z"]


def test_loss_falls(unbroken: Path) -> None:
    losses = [row["loss"] for row in rows(unbroken) if row["kind"] == "train"]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])


def test_two_runs_are_bit_equal(unbroken: Path, tmp_path: Path) -> None:
    train(tiny(), tmp_path / "again", progress=False)
    assert rows(tmp_path / "again") == rows(unbroken)
    assert torch.equal(codes(tmp_path / "again/encoder"), codes(unbroken / "encoder"))


def test_workers_evaluation_and_checkpoints_do_not_change_training(unbroken: Path, tmp_path: Path) -> None:
    train(tiny("train.num_workers=2", "probe.every_epochs=1", "train.checkpoint_minutes=0"), tmp_path / "run", progress=False)
    assert [r for r in rows(tmp_path / "run") if r["kind"] == "train"] == [r for r in rows(unbroken) if r["kind"] == "train"]


@pytest.mark.parametrize("step", [1, 4, 6, 11])
def test_stopped_and_resumed_is_bit_equal(unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_after(patch, step)
        with pytest.raises(StoppedBySignal) as stopped:
            train(tiny(), run, progress=False)
    assert stopped.value.exit_code == 143 and latest(run)[0].step == step  # type: ignore[union-attr]
    with pytest.raises(UsageError, match="--resume"):
        train(tiny(), run, progress=False)
    train(tiny("train.log_every=1", "train.num_workers=1"), run, resume=True, progress=False)
    assert rows(run) == rows(unbroken)
    assert torch.equal(codes(run / "encoder"), codes(unbroken / "encoder"))


def test_resume_without_optimizer_state_is_not_bit_equal(unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(StoppedBySignal):
            train(tiny(), run, progress=False)
    monkeypatch.setattr("rlpjepa_zoo.training.setup.restore_optimizer", lambda *a: None)
    train(tiny(), run, resume=True, progress=False)
    assert rows(run)[:4] == rows(unbroken)[:4] and rows(run) != rows(unbroken)


def test_sigusr1_saves_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_after(monkeypatch, 5, signal.SIGUSR1)
    seen: list[int] = []
    original = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda run, c, *more: (seen.append(c.step), original(run, c, *more))[1])
    train(tiny(), tmp_path / "run", progress=False)
    assert seen == [5, 6, 12]


def test_finished_run_stays_as_it_is(unbroken: Path) -> None:
    before = (unbroken / "metrics.jsonl").read_text()
    assert train(tiny(), unbroken, resume=True, progress=False) == unbroken / "encoder"
    assert (unbroken / "metrics.jsonl").read_text() == before


def test_changed_recipe_is_listed_and_refused(unbroken: Path) -> None:
    with pytest.raises(RecipeError, match=r"optim\.lr: .* -> 0\.5.*--allow-change"):
        train(tiny("optim.lr=0.5"), unbroken, resume=True, progress=False)


def test_damaged_newest_checkpoint_falls_back(
    unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_after(patch, 8)
        with pytest.raises(StoppedBySignal):
            train(tiny(), run, progress=False)
    newest = sorted((run / "checkpoints").iterdir())[-1]
    (newest / "model.safetensors").write_bytes(b"x")
    train(tiny(), run, resume=True, progress=False)
    assert "damaged checkpoint" in caplog.text and rows(run) == rows(unbroken)


def test_non_finite_loss_stops_before_the_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = RectifiedLpJEPALoss.__call__

    def poisoned(self, z, step):  # type: ignore[no-untyped-def]
        terms = original(self, z, step)
        return terms._replace(total=terms.total * float("nan")) if step >= 7 else terms

    monkeypatch.setattr(RectifiedLpJEPALoss, "__call__", poisoned)
    with pytest.raises(NonFiniteError, match="step 10.* 3 steps in a row; weights and outputs of all layers are finite"):
        train(tiny("train.max_skipped=2"), tmp_path / "run", progress=False)
    saved, damaged = latest(tmp_path / "run")
    assert saved is not None and saved.step == 6 and not damaged
    assert all(torch.isfinite(v).all() for v in saved.model.values() if v.is_floating_point())


def test_corrupt_images_are_skipped_counted_and_listed(image_folder: Path, tmp_path: Path) -> None:
    (image_folder / "red" / "03.png").write_bytes(b"not an image")
    recipe = of_folder(image_folder, "train.batch_size=8", "train.epochs=3")
    train(recipe, tmp_path / "run", progress=False)
    listed = [json.loads(line) for line in (tmp_path / "run/bad_images.jsonl").read_text().splitlines()]
    assert len(listed) == 1 and "red/03.png" in listed[0]["reason"]
    assert json.loads((tmp_path / "run/summary.json").read_text())["bad_images"] == 1
    with pytest.raises(DataError, match="max_bad_fraction"):
        strict = recipe.model_copy(update={"train": recipe.train.model_copy(update={"max_bad_fraction": 0.0})})
        train(strict, tmp_path / "strict", progress=False)


def test_second_run_into_a_directory_is_refused(tmp_path: Path) -> None:
    with lock(tmp_path / "run"), pytest.raises(UsageError, match="in use by process"):
        train(tiny(), tmp_path / "run", progress=False)


def test_global_random_state_is_untouched(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    train(tiny("train.epochs=2"), tmp_path / "run", progress=False)
    assert torch.equal(torch.get_rng_state(), state)


def launch(arguments: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "rlpjepa_zoo", *arguments],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def without_batch_statistics(folder: str) -> None:
    """A projector without batch norm on a frozen backbone, so one and two processes must agree to rounding."""
    more = [
        "encoder.projector_depth=1",
        "encoder.freeze_backbone=true",
        "train.epochs=2",
        "objective.num_directions=33",
        "probe.every_epochs=2",
        "target.anneal=0.5",
        "target.hold=true",
        "reconstruction.active=[4, 32]",
    ]
    train(tiny(*more), Path(folder), progress=False)


def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    run_ranks(without_batch_statistics, 2, str(tmp_path / "two"))
    without_batch_statistics(str(tmp_path / "one"))
    one, two = ([*rows(run), json.loads((run / "summary.json").read_text())] for run in (tmp_path / "one", tmp_path / "two"))
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            if isinstance(value, int | float):  # rounding may make one of the 2,048 values of a batch zero
                assert value == pytest.approx(b[name], rel=5e-4, abs=1e-4), (a.get("step"), name)
    assert {"dead", "mean", "variance", "covariance", "l0", "l1"} < one[0].keys() and "l0_train" in one[-1]
    assert torch.allclose(codes(tmp_path / "one/encoder"), codes(tmp_path / "two/encoder"), atol=1e-4)


def test_terminated_killed_and_resumed_run_is_bit_equal(tmp_path: Path) -> None:
    recipe = ["train.checkpoint_minutes=0", "train.epochs=10", "train.num_workers=1"]
    process = launch(["train", "digits", *TINY, *recipe, "--out", str(tmp_path / "run"), "--quiet"])
    wait_for_step(tmp_path / "run", 4)
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 143 and err.splitlines()[-1].startswith("error: stopped by a signal after step")
    stopped = (latest(tmp_path / "run")[0] or pytest.fail("no checkpoint")).step
    with forked(lambda: train(tiny(*recipe), tmp_path / "run", resume=True, progress=False)):  # killed when it has made three more steps
        wait_for_step(tmp_path / "run", stopped + 3)
    assert stopped + 3 <= (latest(tmp_path / "run")[0] or pytest.fail("no checkpoint")).step < 30
    train(tiny(*recipe), tmp_path / "run", resume=True, progress=False)
    train(tiny("train.epochs=10"), tmp_path / "unbroken", progress=False)
    assert rows(tmp_path / "run") == rows(tmp_path / "unbroken")
    assert torch.equal(codes(tmp_path / "run/encoder"), codes(tmp_path / "unbroken/encoder"))


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_data_is_a_one_line_error(image_folder: Path, tmp_path: Path, workers: int) -> None:
    for file in image_folder.rglob("*.png"):
        file.write_bytes(b"broken")
    with pytest.raises(DataError) as caught:
        train(of_folder(image_folder, "train.batch_size=8", f"train.num_workers={workers}"), tmp_path / "run", progress=False)
    assert str(caught.value).startswith("50 images in a row cannot be read") and "\n" not in str(caught.value)


def test_resume_publishes_what_a_stopped_run_did_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(
            "rlpjepa_zoo.training.trainer.Trainer._publish", lambda self, **options: (_ for _ in ()).throw(OutputError("disk full"))
        )
        with pytest.raises(OutputError):
            train(tiny("train.epochs=2"), tmp_path / "run", progress=False)
    assert not (tmp_path / "run/encoder").exists()
    train(tiny("train.epochs=2"), tmp_path / "run", resume=True, progress=False)
    assert (tmp_path / "run/summary.json").is_file() and load_encoder(tmp_path / "run/encoder").config.recipe is not None
