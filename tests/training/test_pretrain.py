"""The training loop: it learns, it resumes bit for bit, it stops in one line, and two processes do what one does."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from runs import TINY, codes, of_folder, rows, stop_after, tiny, wait_for_step

from rlpjepa_zoo.config.pretrain import Recipe
from rlpjepa_zoo.errors import DataError, NonFiniteError, OutputError, RecipeError, StoppedBySignal, UsageError
from rlpjepa_zoo.models.pretrained import load_encoder
from rlpjepa_zoo.training.checkpoint import latest
from rlpjepa_zoo.training.pretrain import train


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "unbroken"
    train(tiny(), run, progress=False)
    return run


def test_a_run_leaves_what_it_promises(unbroken: Path) -> None:
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


def test_without_optimizer_state_a_resume_is_not_bit_equal(unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(StoppedBySignal):
            train(tiny(), run, progress=False)
    monkeypatch.setattr("rlpjepa_zoo.training.checkpoint.restore_optimizer", lambda *a: None)
    train(tiny(), run, resume=True, progress=False)
    assert rows(run)[:4] == rows(unbroken)[:4] and rows(run) != rows(unbroken)


def test_sigusr1_saves_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_after(monkeypatch, 5, signal.SIGUSR1)
    seen: list[int] = []
    import rlpjepa_zoo.training.checkpoint as module

    original = module.save
    monkeypatch.setattr(module, "save", lambda run, c, *more: (seen.append(c.step), original(run, c, *more))[1])
    train(tiny(), tmp_path / "run", progress=False)
    assert seen == [5, 6, 12]


def test_a_finished_run_is_left_alone(unbroken: Path) -> None:
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


def test_a_resumed_run_keeps_its_number_of_directions_and_may_change_their_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unbroken: Path
) -> None:
    import rlpjepa_zoo.training.online_probes as module

    run, auto = tmp_path / "run", tiny("objective.num_directions=auto")
    monkeypatch.setattr(module, "directions_needed", lambda *args: 64)
    with monkeypatch.context() as patch:
        stop_after(patch, 8)
        with pytest.raises(StoppedBySignal):
            train(auto, run, progress=False)
    monkeypatch.setattr(module, "directions_needed", lambda *args: 32)  # what another processor may find
    train(tiny("objective.num_directions=auto", "objective.chunk=1"), run, resume=True, progress=False)
    losses, wanted = ([row["loss"] for row in rows(folder) if row["kind"] == "train"] for folder in (run, unbroken))
    assert losses == pytest.approx(wanted, rel=1e-5)


def test_non_finite_loss_stops_before_the_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import rlpjepa_zoo.objectives.rectified_lpjepa as module

    original = module.RectifiedLpJEPALoss.__call__

    def poisoned(self, z, step):  # type: ignore[no-untyped-def]
        terms = original(self, z, step)
        return terms._replace(total=terms.total * float("nan")) if step >= 7 else terms

    monkeypatch.setattr(module.RectifiedLpJEPALoss, "__call__", poisoned)
    with pytest.raises(NonFiniteError, match="step 10.* 3 steps in a row; weights and outputs of all layers are finite"):
        train(tiny("train.max_skipped=2"), tmp_path / "run", progress=False)
    found, damaged = latest(tmp_path / "run")
    assert found is not None and found.step == 6 and not damaged
    assert all(torch.isfinite(v).all() for v in found.model.values() if v.is_floating_point())


def test_corrupt_images_are_skipped_counted_and_written_down(image_folder: Path, tmp_path: Path) -> None:
    (image_folder / "red" / "03.png").write_bytes(b"not an image")
    recipe = of_folder(image_folder, "train.batch_size=8", "train.epochs=3")
    train(recipe, tmp_path / "run", progress=False)
    listed = [json.loads(line) for line in (tmp_path / "run/bad_images.jsonl").read_text().splitlines()]
    assert len(listed) == 1 and "red/03.png" in listed[0]["reason"]
    assert json.loads((tmp_path / "run/summary.json").read_text())["bad_images"] == 1
    with pytest.raises(DataError, match="max_bad_fraction"):
        strict = recipe.model_copy(update={"train": recipe.train.model_copy(update={"max_bad_fraction": 0.0})})
        train(strict, tmp_path / "strict", progress=False)


def test_unlabelled_images_train_without_probes(tmp_path: Path, rng) -> None:  # type: ignore[no-untyped-def]
    flat = tmp_path / "flat"
    flat.mkdir()
    for i in range(32):
        Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype="uint8")).save(flat / f"{i}.jpg")
    train(of_folder(flat, "train.batch_size=16"), tmp_path / "run", progress=False)
    last = rows(tmp_path / "run")[-1]
    assert "l0_eval" in last and "knn_z" not in last
    assert not any("probe_z" in row for row in rows(tmp_path / "run"))


def test_three_views_lars_frozen_backbone_bf16(tmp_path: Path) -> None:
    more = ["views.count=3", "optim.name=lars", "optim.lr=0.5", "encoder.freeze_backbone=true", "train.precision=bf16", "train.epochs=2"]
    folder = train(tiny(*more), tmp_path / "run", progress=False)
    from rlpjepa_zoo.training.online_probes import build_encoder

    start, end = build_encoder(tiny(*more)), load_encoder(folder)
    for (name, a), b in zip(start.backbone.state_dict().items(), end.backbone.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(start.projector[0].weight, end.projector[0].weight)


def test_an_unknown_tracker_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="train"):
        train(tiny("train.trackers=[nosuchtracker]"), tmp_path / "run", progress=False)


def test_fp16_on_a_cpu_is_refused(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(RecipeError, match="fp16"):
        train(tiny("train.precision=fp16"), tmp_path / "run", progress=False)


def test_a_second_run_into_the_folder_is_refused(tmp_path: Path) -> None:
    from rlpjepa_zoo.core.files import lock

    with lock(tmp_path / "run"), pytest.raises(UsageError, match="in use by process"):
        train(tiny(), tmp_path / "run", progress=False)


def test_global_random_state_is_untouched(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    train(tiny("train.epochs=2"), tmp_path / "run", progress=False)
    assert torch.equal(torch.get_rng_state(), state)


def launch(arguments: list[str], processes: int = 1) -> subprocess.Popen[str]:
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    start = [sys.executable, "-m", "rlpjepa_zoo"]
    if processes > 1:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m", "rlpjepa_zoo"]
    return subprocess.Popen(
        [*start, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    """A projector without batch norm on a frozen backbone: no batch statistics, so one and two processes must agree to rounding."""
    more = [
        "encoder.projector_depth=1",
        "encoder.freeze_backbone=true",
        "train.epochs=2",
        "objective.num_directions=33",
        "probe.every_epochs=2",
    ]
    process = launch(["train", "digits", *TINY, *more, "--out", str(tmp_path / "two"), "--quiet"], processes=2)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    train(tiny(*more), tmp_path / "one", progress=False)
    for a, b in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert a["step"] == b["step"]
        for name in ("loss", "invariance", "matching", "lr", "grad_norm", "knn_features", "l0_eval"):
            assert (name in a) == (name in b)
            if name in a:
                assert a[name] == pytest.approx(b[name], rel=2e-4), (a["step"], name)
    assert torch.allclose(codes(tmp_path / "one/encoder"), codes(tmp_path / "two/encoder"), atol=1e-4)


def test_terminated_with_its_workers_then_killed_then_resumed_is_bit_equal(tmp_path: Path) -> None:
    recipe = ["train.checkpoint_minutes=0", "train.epochs=10", "train.num_workers=1"]
    arguments = ["train", "digits", *TINY, *recipe, "--out", str(tmp_path / "run"), "--quiet"]
    process = launch(arguments)
    wait_for_step(tmp_path / "run", 4)
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 143 and err.splitlines()[-1].startswith("error: stopped by a signal after step")
    process = launch([*arguments, "--resume"])
    wait_for_step(tmp_path / "run", 12)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    assert (latest(tmp_path / "run")[0] or pytest.fail("no checkpoint")).step < 30
    train(tiny(*recipe), tmp_path / "run", resume=True, progress=False)
    train(tiny("train.epochs=10"), tmp_path / "whole", progress=False)
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    assert torch.equal(codes(tmp_path / "run/encoder"), codes(tmp_path / "whole/encoder"))


@pytest.mark.parametrize("workers", [0, 1])
def test_data_that_cannot_be_read_at_all_is_one_line(image_folder: Path, tmp_path: Path, workers: int) -> None:
    for file in image_folder.rglob("*.png"):
        file.write_bytes(b"broken")
    with pytest.raises(DataError) as caught:
        train(of_folder(image_folder, "train.batch_size=8", f"train.num_workers={workers}"), tmp_path / "run", progress=False)
    assert str(caught.value).startswith("50 images in a row cannot be read") and "\n" not in str(caught.value)


def test_a_run_stopped_between_its_last_checkpoint_and_its_end_is_finished_by_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("rlpjepa_zoo.training.trainer.Run._publish", lambda self, **options: (_ for _ in ()).throw(OutputError("disk full")))
        with pytest.raises(OutputError):
            train(tiny("train.epochs=2"), tmp_path / "run", progress=False)
    assert not (tmp_path / "run/encoder").exists()
    train(tiny("train.epochs=2"), tmp_path / "run", resume=True, progress=False)
    assert (tmp_path / "run/summary.json").is_file() and load_encoder(tmp_path / "run/encoder").config.recipe is not None


def test_a_key_that_went_away_is_a_change_and_an_unknown_allowance_is_refused(tmp_path: Path) -> None:
    more = ["train.epochs=2", "encoder.args={drop_path_rate: 0.1}"]
    train(tiny(*more), tmp_path / "run", progress=False)
    with pytest.raises(RecipeError, match=r"encoder\.args\.drop_path_rate: 0\.1 -> 'absent'"):
        train(tiny("train.epochs=2"), tmp_path / "run", resume=True, progress=False)
    with pytest.raises(UsageError, match="optim.lrr"):
        train(tiny(*more), tmp_path / "run", resume=True, allow_change=["optim.lrr"], progress=False)


def test_synchronised_batch_norm_keeps_the_activations_of_timm() -> None:
    """The converter that multi-GPU training uses leaves the function of a network with fused norms as it was."""
    import rlpjepa_zoo.training.trainer as module
    from rlpjepa_zoo.models.factory import create_encoder

    enc, x = create_encoder("test_efficientnet", dim=8).eval(), torch.randn(2, 3, 32, 32)
    before = enc.features(x)
    assert torch.equal(module.convert_sync_batchnorm(enc).eval().features(x), before)


def test_a_missed_density_is_said_at_the_end_and_in_the_summary(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(tiny("target.density=0.02", "train.epochs=2"), tmp_path / "run", progress=False)
    said = json.loads((tmp_path / "run/summary.json").read_text())["alarms"]
    assert said and said[0].startswith("density missed") and said[0] in caplog.text
