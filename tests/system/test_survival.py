"""Training runs with non-finite steps, averaged and best weights, local and growing views, trackers, changed data, and a rank that fails."""

import json
import logging
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from processes import run_ranks
from runs import codes, of_folder, poison, rows, stop_after, tiny, train_in_two_parts

from rlpjepa_zoo.core import distributed
from rlpjepa_zoo.core.signals import Interrupts
from rlpjepa_zoo.errors import DataError, NonFiniteError, OutputError, RecipeError, StoppedBySignal, UsageError
from rlpjepa_zoo.models.pretrained import load_encoder
from rlpjepa_zoo.objectives.rectified_lpjepa import RectifiedLpJEPALoss
from rlpjepa_zoo.training import setup, trainer
from rlpjepa_zoo.training.checkpoint import latest
from rlpjepa_zoo.training.nonfinite import NonFiniteGuard
from rlpjepa_zoo.training.tasks.pretrain import PretrainTask, train

# --- numbers that are not finite ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["loss", "pixels"])
def test_a_non_finite_step_is_skipped_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    poison(monkeypatch, {3, 7, 8}, where)
    train(tiny(), tmp_path / "run", progress=False)
    found = [row for row in rows(tmp_path / "run") if row["kind"] == "train"]
    assert [row.get("skipped", 0) for row in found] == [0, 0, 1, 1, 1, 1, 2, 3, 3, 3, 3, 3]
    assert json.loads((tmp_path / "run/summary.json").read_text())["skipped"] == 3
    assert "step 3 skipped" in caplog.text and "step 8 skipped" in caplog.text and "2 in a row, 3 in all" in caplog.text
    assert bool(codes(tmp_path / "run/encoder").isfinite().all())  # statistics of batch norm included
    assert [row["loss"] is None for row in found] == [i + 1 in (3, 7, 8) for i in range(12)]  # strict JSON knows no NaN


HELD = ["target.density=0.1", "target.hold=true", "reconstruction.active=[2, 8]"]


@pytest.mark.parametrize("more", [[], HELD])
def test_a_skipped_step_changes_only_the_counter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str]) -> None:
    seen: dict[str, Any] = {}

    right = trainer.Trainer._update

    def update(self: Any, *given: Any) -> float:
        if self.step == 4:
            seen["before"] = {
                k: v.clone() for k, v in self.trained.module.state_dict().items() if "running" not in k and "tracked" not in k
            }
            seen["remembered"] = [b.clone() for b in self.guard._before]
        norm = right(self, *given)
        if self.step == 4:
            seen["after"] = {k: v.clone() for k, v in self.trained.module.state_dict().items()}
            seen["buffers"] = [b.clone() for b in self.guard._buffers]
        return norm

    monkeypatch.setattr(trainer.Trainer, "_update", update)
    poison(monkeypatch, {5}, "pixels")
    train(tiny("train.epochs=2", *more), tmp_path / "run", progress=False)
    assert all(torch.equal(seen["after"][k], v) for k, v in seen["before"].items())
    assert all(torch.equal(a, b) for a, b in zip(seen["remembered"], seen["buffers"], strict=True)) and seen["buffers"]


def test_a_run_with_skipped_steps_resumes_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, {3, 5, 6})
    train(tiny(), tmp_path / "whole", progress=False)
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(StoppedBySignal):
            train(tiny(), tmp_path / "run", progress=False)
    train(tiny(), tmp_path / "run", resume=True, progress=False)
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    assert torch.equal(codes(tmp_path / "run/encoder"), codes(tmp_path / "whole/encoder"))


def test_too_many_skips_in_a_row_stop_and_name_the_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, set(range(8, 100)), "pixels")
    with pytest.raises(
        NonFiniteError,
        match=r"step 11: .*4 steps in a row; first non-finite output: \S*conv\S* \(Conv2d\); its input was already non-finite",
    ):
        train(tiny("train.max_skipped=3"), tmp_path / "run", progress=False)
    found, damaged = latest(tmp_path / "run")
    assert found is not None and found.step == 6 and not damaged
    assert all(torch.isfinite(v).all() for v in found.model.values() if v.is_floating_point())


def test_the_diagnosis_names_weights_layers_or_the_loss() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
    guard = NonFiniteGuard(net, 0, "no", 0.1)
    with pytest.raises(NonFiniteError, match=r"weights and outputs of all layers are finite"):
        guard.skip(1, "", lambda: net(torch.ones(1, 2)))
    with pytest.raises(NonFiniteError, match=r"first non-finite output: 2 \(Linear\); its input was finite"):
        net[2].register_forward_hook(lambda module, inputs, output: output / 0)
        guard.skip(1, "", lambda: net(torch.ones(1, 2)))
    with torch.no_grad():
        net[0].bias[0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"weights are not finite in 0\.bias and 0 more"):
        guard.skip(1, "", lambda: net(torch.ones(1, 2)))


def test_fp16_may_skip_more_steps_in_a_row() -> None:
    net = torch.nn.Linear(1, 1)
    assert NonFiniteGuard(net, 5, "fp16", 0.1).max_skipped == 20 and NonFiniteGuard(net, 5, "no", 0.1).max_skipped == 5


def test_all_zero_embeddings_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import rlpjepa_zoo.training.tasks.pretrain as module

    right = module.build_encoder

    def dead(recipe: Any) -> Any:
        encoder = right(recipe)
        last = [m for m in encoder.projector.modules() if isinstance(m, torch.nn.Linear)][-1]
        with torch.no_grad():
            last.weight.zero_()
            last.bias.fill_(-10)
        return encoder

    monkeypatch.setattr(module, "build_encoder", dead)
    with pytest.raises(NonFiniteError, match="step 3: every embedding is zero.*target"):
        train(tiny(), tmp_path / "run", progress=False)


# --- averaged and best weights --------------------------------------------------------------------------------------------------------


def test_averaged_weights_are_published_and_resume_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, seen = tiny("train.ema=0.7"), []
    import rlpjepa_zoo.training.tasks.pretrain as module

    right = trainer.Trainer._update

    def update(self: Any, *given: Any) -> float:
        norm = right(self, *given)
        seen.append(self.core.projector.state_dict()["0.weight"].clone() if "0.weight" in self.core.projector.state_dict() else
                    next(iter(self.core.projector.parameters())).detach().clone())  # fmt: skip
        return norm

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_update", update)
        train(recipe, tmp_path / "whole", progress=False)
    found, _ = latest(tmp_path / "whole")
    published = next(iter(load_encoder(tmp_path / "whole/encoder").projector.parameters())).detach()
    mean = seen[0] * 0 + next(iter(module.build_encoder(recipe).projector.parameters())).detach()
    for t, value in enumerate(seen):  # the decay warms up: 0 at first, so that the initial weights do not linger
        decay = min(0.7, 1 - (1 + t) ** (-2 / 3))
        mean = decay * mean + (1 - decay) * value
    assert torch.allclose(published, mean, atol=1e-6) and not torch.allclose(published, seen[-1], atol=1e-4)
    assert found is not None and any(k.startswith("ema.") for k in found.model)
    train_in_two_parts(monkeypatch, recipe, tmp_path / "run", 7)
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    assert torch.equal(codes(tmp_path / "run/encoder"), codes(tmp_path / "whole/encoder"))


def test_the_best_checkpoint_is_kept_beside_the_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([0.2, 0.9, 0.5, 0.4])
    import rlpjepa_zoo.training.tasks.pretrain as module

    right = module.during_training
    monkeypatch.setattr(module, "during_training", lambda *a: {**right(*a), "knn_z": next(values)})
    run = tmp_path / "run"
    train(tiny("train.best=knn_z", "probe.every_epochs=1", "train.checkpoint_minutes=0"), run, progress=False)
    kept = sorted(p.name for p in (run / "checkpoints").iterdir() if p.name.startswith("step-"))
    assert kept == ["step-00000006", "step-00000011", "step-00000012"]
    assert load_encoder(run / "encoder-best").config.info["training"]["steps"] == 6
    assert load_encoder(run / "encoder").config.info["training"]["steps"] == 12
    said = {name: load_encoder(run / name).config.info["results"]["protocol"] for name in ("encoder", "encoder-best")}
    assert said["encoder-best"] == said["encoder"] + "; selected by knn_z on these evaluation images, so the value is optimistic"
    assert json.loads((run / "summary.json").read_text())["best"] == {"step": 6, "knn_z": 0.9}


def test_non_finite_metrics_are_never_the_best() -> None:
    for name, values, chosen in (
        ("knn_z", [np.nan, 0.2, np.inf, 0.3, np.nan], [1, 3]),
        ("excess", [np.nan, 0.2, -np.inf, 0.3, 0.1], [1, 4]),
    ):
        best, seen = None, []
        for step, value in enumerate(values):
            if PretrainTask.best[name].improves(value, best):
                best, seen = value, [*seen, step]
        assert seen == chosen and best == values[chosen[-1]]


def test_a_resumed_run_remembers_its_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny("train.best=excess", "probe.every_epochs=1")
    train(recipe, tmp_path / "whole", progress=False)
    with monkeypatch.context() as patch:
        stop_after(patch, 8)
        with pytest.raises(StoppedBySignal):
            train(recipe, tmp_path / "run", progress=False)
    train(recipe, tmp_path / "run", resume=True, progress=False)
    best = [json.loads((tmp_path / name / "summary.json").read_text())["best"] for name in ("whole", "run")]
    assert best[0] == best[1] and best[0]["excess"] == min(
        r["excess"] for r in rows(tmp_path / "whole") if r["kind"] == "train" and r["step"] % 3 == 0
    )
    assert torch.equal(codes(tmp_path / "run/encoder-best"), codes(tmp_path / "whole/encoder-best"))


def test_a_best_metric_that_is_not_measured_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(24):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    with pytest.raises(RecipeError, match="train.best: knn_z needs evaluation images with labels"):
        train(of_folder(folder, "train.best=knn_z", "train.batch_size=8", "train.epochs=1"), tmp_path / "run", progress=False)


def test_an_interrupted_best_publication_is_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, run = tiny("train.best=excess", "probe.every_epochs=1", "train.epochs=3"), tmp_path / "run"
    from rlpjepa_zoo.training.publisher import Publisher

    with monkeypatch.context() as patch:
        patch.setattr(Publisher, "copy_as", lambda self, name, chosen: (_ for _ in ()).throw(OutputError("killed here")))
        with pytest.raises(OutputError):
            train(recipe, run, progress=False)
    found, _ = latest(run)
    assert found is not None and found.step == 3 and not (run / "encoder-best").exists()
    published: list[int] = []
    right = Publisher.copy_as
    monkeypatch.setattr(
        Publisher,
        "copy_as",
        lambda self, name, chosen: (right(self, name, chosen), published.append(load_encoder(run / name).config.info["training"]["steps"])),
    )
    train(recipe, run, resume=True, progress=False)
    assert published[0] == 3


# --- multi-crop -----------------------------------------------------------------------------------------------------------------------


def test_local_views_are_encoded_and_matched_like_global_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = set()
    right = RectifiedLpJEPALoss.__call__
    monkeypatch.setattr(RectifiedLpJEPALoss, "__call__", lambda self, z, step: (shapes.add(tuple(z.shape)), right(self, z, step))[1])
    recipe = tiny("views.local={count: 3, size: 16, crop_scale: [0.05, 0.3]}", "train.epochs=2")
    train(recipe, tmp_path / "run", progress=False)
    assert shapes == {(5, 32, 32)}
    assert "2 views and 3 local ones of 16 pixels" in load_encoder(tmp_path / "run/encoder").config.info["augmentations"]


def test_growing_views_resume_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny("views.start_size=16", "train.num_workers=1")
    sizes, right = list[int](), trainer.Trainer._forward
    monkeypatch.setattr(trainer.Trainer, "_forward", lambda self, batch: (sizes.append(batch.images[0].shape[-1]), right(self, batch))[1])
    train(recipe, tmp_path / "whole", progress=False)
    assert sizes == sorted(sizes) and {16, 32} < {*sizes}
    train_in_two_parts(monkeypatch, recipe, tmp_path / "run", 7)
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    assert torch.equal(codes(tmp_path / "run/encoder"), codes(tmp_path / "whole/encoder"))
    described = load_encoder(tmp_path / "run/encoder").config.info["augmentations"]
    assert "16 pixels in the first epoch, all after 75% of the epochs" in described


def test_a_fixed_size_backbone_refuses_local_views_at_the_start(tmp_path: Path) -> None:
    tiny_vit = "img_size: 32, patch_size: 8, depth: 1, embed_dim: 48, num_heads: 3"
    vit = ["encoder.backbone=vit_tiny_patch16_224", f"encoder.args={{{tiny_vit}}}", "views.local={count: 2, size: 16}"]
    with pytest.raises(RecipeError, match=r"views\.local\.size: vit_tiny_patch16_224 does not take images of 16 pixels.*dynamic_img_size"):
        train(tiny(*vit), tmp_path / "run", progress=False)
    vit[1] = f"encoder.args={{{tiny_vit}, dynamic_img_size: true}}"
    train(tiny(*vit, "train.epochs=1"), tmp_path / "run", progress=False)


# --- trackers -------------------------------------------------------------------------------------------------------------------------


def test_a_tracker_continues_where_the_run_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe, run = tiny("train.trackers=[tensorboard]", "train.epochs=4"), tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_after(patch, 8)
        with pytest.raises(StoppedBySignal):
            train(recipe, run, progress=False)
    (run / "checkpoints/step-00000008/state.json").unlink()  # so that steps 7 and 8 are made and logged again
    train(recipe, run, resume=True, progress=False)
    events = EventAccumulator(str(run / "rlpjepa_zoo"))
    events.Reload()
    logged = {e.step: e.value for e in events.Scalars("loss")}
    assert [e.step for e in events.Scalars("loss")] == list(range(1, 13))
    assert logged == pytest.approx({r["step"]: r["loss"] for r in rows(run) if r["kind"] == "train"})


def test_trackers_get_the_run_id_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import Accelerator

    asked = []
    monkeypatch.setattr("accelerate.accelerator.filter_trackers", lambda names, *a: list(names or []))
    monkeypatch.setattr("rlpjepa_zoo.training.setup.get_available_trackers", lambda: ["wandb", "trackio"])
    monkeypatch.setattr(Accelerator, "init_trackers", lambda self, project, config, options: asked.append(options))
    monkeypatch.setattr(Accelerator, "log", lambda self, values, step: (_ for _ in ()).throw(ConnectionError("server is down")))
    recipe, run = tiny("train.trackers=[wandb, trackio]"), tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(StoppedBySignal):
            train(recipe, run, progress=False)
    train(recipe, run, resume=True, progress=False)
    assert asked[0] == asked[1] and asked[0]["wandb"]["resume"] == "allow" and asked[0]["wandb"]["id"] == (run / "run_id").read_text()
    assert len(rows(run)) == 14  # a server that is down costs nothing


def test_a_tracker_error_is_one_line_at_start_a_warning_at_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from accelerate import Accelerator
    from accelerate.tracking import TensorBoardTracker

    def broken(*given: Any, **named: Any) -> None:
        raise ConnectionError("no key")

    recipe = tiny("train.trackers=[tensorboard]", "train.epochs=1")
    with monkeypatch.context() as patch:
        patch.setattr(Accelerator, "init_trackers", broken)
        with pytest.raises(RecipeError, match="train.trackers: ConnectionError: no key; log in"):
            train(recipe, tmp_path / "a", progress=False)
    monkeypatch.setattr(TensorBoardTracker, "finish", broken)
    train(recipe, tmp_path / "b", progress=False)
    assert "tracker: ConnectionError: no key" in caplog.text


def test_launcher_end_followed_by_a_signal_is_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Interrupts()
    asked._parent = -1  # gone
    monkeypatch.setattr(asked._over, "wait", lambda seconds: asked.stop is not None)
    asked._watch()
    asked._stop(signal.SIGTERM, None)  # the scheduler's, a moment later: not an impatient second one
    assert asked.stop == 143
    monkeypatch.setattr("time.monotonic", lambda: asked._asked_at + 10)
    with pytest.raises(KeyboardInterrupt):
        asked._stop(signal.SIGINT, None)


# --- other data, other weights, other versions ------------------------------------------------------------------------------------------


def test_renamed_images_are_refused_unless_allowed(image_folder: Path, tmp_path: Path) -> None:
    recipe, run = of_folder(image_folder, "train.batch_size=8", "train.epochs=2"), tmp_path / "run"
    train(recipe, run, progress=False)
    longer = recipe.model_copy(update={"train": recipe.train.model_copy(update={"epochs": 3.0})})
    first = sorted(image_folder.rglob("*.png"))[0]
    first.rename(first.with_name("renamed.png"))
    with pytest.raises(DataError, match="not those that the run .* trained on.*--allow-change data"):
        train(longer, run, resume=True, allow_change=["train.epochs"], progress=False)
    train(longer, run, resume=True, allow_change=["train.epochs", "data"], progress=False)


def test_another_number_of_images_is_refused(tmp_path: Path) -> None:
    train(tiny("train.epochs=1"), tmp_path / "run", progress=False)
    with pytest.raises(DataError, match="trained on 96 images, the data now holds 64; the number of images cannot change"):
        train(tiny("train.epochs=1", "data.limit=64"), tmp_path / "run", resume=True, allow_change=["data.limit", "data"], progress=False)


def test_unlabelled_held_out_images_leave_knn_out(image_folder: Path, tmp_path: Path) -> None:
    for name in ("train/red", "train/blue", "val"):
        (tmp_path / "images" / name).mkdir(parents=True)
    for name in ("red", "blue"):
        for file in sorted((image_folder / name).glob("*.png")):
            file.rename(tmp_path / "images/train" / name / file.name)
    for i in range(4):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(tmp_path / f"images/val/{i}.png")
    recipe = of_folder(tmp_path / "images", "train.batch_size=8", "train.epochs=1")
    train(recipe, tmp_path / "run", progress=False)
    found = rows(tmp_path / "run")[-1]
    assert found["kind"] == "eval" and "l0_eval" in found and "knn_z" not in found
    with pytest.raises(RecipeError, match="train.best: knn_z needs evaluation images with labels"):
        train(recipe.model_copy(update={"train": recipe.train.model_copy(update={"best": "knn_z"})}), tmp_path / "best", progress=False)


def test_other_versions_are_logged_at_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from rlpjepa_zoo.core import package

    run, real = tmp_path / "run", package.versions()
    with monkeypatch.context() as patch:
        patch.setattr(package, "versions", lambda: {**real, "torch": "1.0"})
        stop_after(patch, 4)
        with pytest.raises(StoppedBySignal):
            train(tiny(), run, progress=False)
    train(tiny(), run, resume=True, progress=False)
    assert "package versions changed" in caplog.text and f"torch 1.0 -> {real['torch']}" in caplog.text


def test_unreadable_images_are_listed_once_after_a_resume(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (image_folder / "red" / "03.png").write_bytes(b"not an image")
    recipe, run = of_folder(image_folder, "train.batch_size=8", "train.epochs=3", "data.cache_gb=0"), tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(StoppedBySignal):
            train(recipe, run, progress=False)
    with open(run / "bad_images.jsonl", "a") as file:
        file.write('{"row": 5, "reason": "written after the checkpoint"}\n{"row": 7, "rea')
    train(recipe, run, resume=True, progress=False)
    assert len((run / "bad_images.jsonl").read_text().splitlines()) == 1


# --- ranks ----------------------------------------------------------------------------------------------------------------------------


def run_with(trouble: str, folder: str) -> str:
    """Train on two ranks; something goes wrong on one of them."""
    logging.getLogger("rlpjepa_zoo").setLevel(logging.ERROR)
    rank = distributed.rank()
    import rlpjepa_zoo.data.loader
    import rlpjepa_zoo.training.checkpoint
    import rlpjepa_zoo.training.tasks.pretrain as module

    with pytest.MonkeyPatch.context() as patch:
        if trouble == "data" and rank == 1:
            right_next, calls = rlpjepa_zoo.data.loader.Batches.next, iter(range(100))
            patch.setattr(
                rlpjepa_zoo.data.loader.Batches,
                "next",
                lambda self: right_next(self) if next(calls) < 4 else (_ for _ in ()).throw(DataError("no disk")),
            )
        if trouble == "save" and rank == 0:
            patch.setattr(rlpjepa_zoo.training.checkpoint, "save", lambda *a: (_ for _ in ()).throw(OutputError("disk full")))
        if trouble == "nan" and rank == 1:
            poison(patch, {2}, "loss")
        if trouble == "weights" and rank == 1:
            right = module.build_encoder
            patch.setattr(module, "build_encoder", lambda recipe: right(recipe.model_copy(update={"seed": 5})))
        if trouble == "images" and rank == 1:
            patch.setattr(trainer, "fingerprint", lambda *given: "other")
        if trouble == "journal" and rank == 0:
            patch.setattr("rlpjepa_zoo.training.run_dir.RunLog.open", lambda *a: (_ for _ in ()).throw(OutputError("no room")))
        if trouble == "unreadable" and rank == 1:
            right_read = rlpjepa_zoo.data.loader.Batches.next
            patch.setattr(
                rlpjepa_zoo.data.loader.Batches, "next", lambda self: right_read(self)._replace(bad=[(3, "broken"), (4, "broken")])
            )
        if trouble == "source" and rank == 0:
            patch.setattr(setup, "open_source", lambda *a: (_ for _ in ()).throw(DataError("no such folder")))
        if trouble == "locked" and rank == 0:
            patch.setattr("rlpjepa_zoo.core.files.lock", lambda out: (_ for _ in ()).throw(UsageError("in use")))
        more = {
            "recipe": [f"train.log_every={1 + rank}"],
            "few": ["probe.eval_images=1", "probe.bank=1"],
            "unreadable": ["train.max_bad_fraction=0.005"],
        }
        try:
            train(tiny("train.epochs=2", *more.get(trouble, [])), Path(folder), progress=False)
        except (DataError, OutputError, UsageError) as error:
            return f"{type(error).__name__}: {error}"
    return "finished"


TROUBLES = {
    "data": ["DataError: process 1: no disk", "DataError: no disk"],
    "save": ["OutputError: disk full", "OutputError: process 0: disk full"],
    "weights": ["processes see different weights", "processes see different weights"],
    "images": ["processes see different images", "processes see different images"],
    "nan": ["finished", "finished"],
    "journal": ["OutputError: no room", "OutputError: process 0: no room"],
    "unreadable": ["DataError: 2 of 96 images cannot be read", "DataError: 2 of 96 images cannot be read"],
    "recipe": ["different recipes: train.log_every is [1, 2]", "different recipes: train.log_every is [1, 2]"],
    "few": ["finished", "finished"],
    "source": ["DataError: no such folder", "DataError: process 0: no such folder"],
    "locked": ["UsageError: in use", "UsageError: process 0: in use"],
}


def run_with_each(folder: str) -> dict[str, str]:
    return {trouble: run_with(trouble, f"{folder}/{trouble}") for trouble in TROUBLES}


def test_two_ranks_stop_or_continue_together(tmp_path: Path) -> None:
    found = run_ranks(run_with_each, 2, str(tmp_path))
    for trouble, expected in TROUBLES.items():
        assert all(wanted in said[trouble] for wanted, said in zip(expected, found, strict=True)), (trouble, found)
    assert [row.get("skipped", 0) for row in rows(tmp_path / "nan") if row["kind"] == "train"] == [0, 1, 1, 1, 1, 1]
