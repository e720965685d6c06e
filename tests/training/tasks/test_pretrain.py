"""Pretraining: probes, directions, views and alarms of a run."""

import json
from pathlib import Path

import pytest
import torch
from images import table
from PIL import Image
from processes import run_ranks
from refusals import refused
from runs import codes, of_folder, rows, stop_after, tiny, train_in_two_parts

from rlpjepa_zoo.core import distributed
from rlpjepa_zoo.data.sources import open_source
from rlpjepa_zoo.errors import RecipeError, StoppedBySignal
from rlpjepa_zoo.models.pretrained import load_encoder
from rlpjepa_zoo.objectives import rectified_lpjepa
from rlpjepa_zoo.training.checkpoint import latest
from rlpjepa_zoo.training.tasks.encoders import build_encoder
from rlpjepa_zoo.training.tasks.heads import EncoderWithHeads
from rlpjepa_zoo.training.tasks.pretrain import train


def test_resumed_run_keeps_its_number_of_directions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, auto = tmp_path / "run", tiny("objective.num_directions=auto")
    monkeypatch.setattr(rectified_lpjepa, "directions_needed", lambda *args: 64)
    with monkeypatch.context() as patch:
        stop_after(patch, 8)
        with pytest.raises(StoppedBySignal):
            train(auto, run, progress=False)
    monkeypatch.setattr(rectified_lpjepa, "directions_needed", lambda *args: 32)  # another processor may choose another number
    train(tiny("objective.num_directions=auto", "objective.chunk=1"), run, resume=True, progress=False)
    train(tiny(), tmp_path / "unbroken", progress=False)
    losses, wanted = ([row["loss"] for row in rows(folder) if row["kind"] == "train"] for folder in (run, tmp_path / "unbroken"))
    assert losses == pytest.approx(wanted, rel=1e-5)


def test_unlabelled_images_train_without_probes(tmp_path: Path, rng) -> None:  # type: ignore[no-untyped-def]
    flat = tmp_path / "flat"
    flat.mkdir()
    for i in range(32):
        Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype="uint8")).save(flat / f"{i}.jpg")
    train(of_folder(flat, "train.batch_size=16"), tmp_path / "run", progress=False)
    last = rows(tmp_path / "run")[-1]
    assert "l0_eval" in last and "knn_z" not in last
    assert not any("probe_z" in row for row in rows(tmp_path / "run"))


def test_three_views_with_lars_and_frozen_backbone_in_bf16(tmp_path: Path) -> None:
    more = ["views.count=3", "optim.name=lars", "optim.lr=0.5", "encoder.freeze_backbone=true", "train.precision=bf16", "train.epochs=2"]
    folder = train(tiny(*more), tmp_path / "run", progress=False)
    start, end = build_encoder(tiny(*more)), load_encoder(folder)
    for (name, a), b in zip(start.backbone.state_dict().items(), end.backbone.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(start.projector[0].weight, end.projector[0].weight)


HELD = [
    "target.density=0.04",
    "target.anneal=0.5",
    "target.hold=true",
    "reconstruction.active=[2, 16]",
    "probe.bank=96",
    "train.best=knn_z",
]


def test_held_density_is_exact_on_training_images_after_a_resume_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny(*HELD)
    train(recipe, tmp_path / "whole", progress=False)
    train_in_two_parts(monkeypatch, recipe, tmp_path / "parts", 8)
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    assert torch.equal(codes(tmp_path / "parts/encoder"), codes(tmp_path / "whole/encoder"))

    logged = [row for row in rows(tmp_path / "whole") if row["kind"] == "train"]
    assert ["excess" in row for row in logged] == [False] * 6 + [True] * 6  # the target is the final one from the seventh step of twelve
    assert all(row["loss"] > row["reconstruction"] > 0 for row in logged)
    images = open_source(recipe.data, recipe.seed).images
    published = load_encoder(tmp_path / "whole/encoder")
    assert published.embed([images.read(i) for i in range(96)]).l0 == pytest.approx(0.04, abs=2 / (96 * 32))
    summary = json.loads((tmp_path / "whole/summary.json").read_text())
    assert summary["best"]["step"] == 12  # the evaluation at step 6, of a density of 0.04^(6/6 - 1/6), does not count
    assert "gave the asked density on training images" in (tmp_path / "whole/encoder/README.md").read_text()
    last = latest(tmp_path / "whole")[0]
    assert last is not None and last.state["task"]["shift"] != 0
    difference = last.model["encoder.projector.3.bias"] - published.last_layer.bias  # the weights that go on training are not shifted
    assert torch.allclose(difference, torch.full_like(difference, last.state["task"]["shift"]), atol=1e-5)


@pytest.mark.parametrize(
    "more", [["train.ema=0.5"], ["views.local.count=2", "views.local.size=16"], ["train.precision=bf16"], ["encoder.projector_depth=1"]]
)
def test_held_density_is_exact_with(more: list[str], tmp_path: Path) -> None:
    recipe = tiny("target.density=0.1", "target.hold=true", "probe.bank=96", *more)
    train(recipe, tmp_path / "run", progress=False)
    images = open_source(recipe.data, recipe.seed).images
    z = load_encoder(tmp_path / "run/encoder").embed([images.read(i) for i in range(96)])
    assert z.l0 == pytest.approx(0.1, abs=0.01 if "train.precision=bf16" in more else 2 / (96 * 32))


def test_held_density_of_a_stream_is_exact_on_its_evaluation_images_if_there_are_any(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        table(range(96)).to_parquet(str(tmp_path / f"data/{split}-00000-of-00001.parquet"))
    stream = [f"data.path={tmp_path / 'data'}", "data.source=hf", "data.streaming=true", "data.length=96", "data.shuffle_buffer=50"]
    for name, more in (("with", ["data.eval_split=test"]), ("without", [])):
        train(of_folder(tmp_path / "data", *stream, "target.density=0.1", "target.hold=true", *more), tmp_path / name, progress=False)
        shift = (latest(tmp_path / name)[0] or pytest.fail("no checkpoint")).state["task"]["shift"]
        assert (shift != 0) == (name == "with")
        assert ("none to make the density exact on" in caplog.text) == (name == "without")


def test_target_is_annealed_at_a_constant_ratio() -> None:
    target = tiny("target.density=0.02", "target.anneal=0.5").target
    assert target is not None
    densities = [target.at(progress).density_in_theory() for progress in (0, 0.125, 0.25, 0.375, 0.5, 1)]
    assert densities == pytest.approx([0.5, 0.5 / 25**0.25, 0.1, 0.1 / 25**0.25, 0.02, 0.02], rel=1e-6)
    assert tiny("target.mu=-1", "target.anneal=0.5").target.at(1) == tiny("target.mu=-1", "target.anneal=0.5").target  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["target.anneal=1"], "target.anneal"),
        (["target.mu=-50", "target.hold=true"], "out of reach"),
        (["reconstruction.active=[]"], "reconstruction.active"),
        (["reconstruction.active=[8, 8]"], "a number twice"),
        (["reconstruction.weight=0"], "reconstruction.weight"),
    ],
)
def test_impossible_densities_and_reconstructions_are_refused(overrides: list[str], words: str) -> None:
    with refused(RecipeError, match=words):
        tiny(*overrides)


def test_missed_density_is_an_alarm_in_log_and_summary(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(tiny("target.density=0.02", "train.epochs=2"), tmp_path / "run", progress=False)
    alarms = json.loads((tmp_path / "run/summary.json").read_text())["alarms"]
    assert alarms and alarms[0].startswith("density missed") and alarms[0] in caplog.text


def probe_results() -> list[float]:
    """Loss, accuracies and a gradient of the probes, averaged over ranks, on a batch whose first half has one label and whose second has four."""
    labels = torch.tensor([-1, 2, -1, -1, 0, 1, 2, 0])
    x = torch.linspace(-1, 1, 8 * 96).view(8, 96).sin() * 3
    torch.manual_seed(0)
    probed = EncoderWithHeads(build_encoder(tiny("encoder.projector_depth=1")), 3)
    rank, share = distributed.rank(), 8 // distributed.world_size()
    mine = slice(rank * share, (rank + 1) * share)
    out = probed([x[mine]], labels[mine])
    out.probe_loss.backward()
    gradient = probed.probes["features"].weight.grad
    assert gradient is not None
    return distributed.mean_over_ranks(torch.cat([out.probe_loss.detach()[None], out.probe_accuracy, gradient.flatten()])).tolist()


def test_probes_of_two_processes_weigh_the_labels_of_all_alike() -> None:
    for rank in run_ranks(probe_results, 2):
        assert rank == pytest.approx(probe_results(), rel=1e-5, abs=1e-6)
