"""What a run says while it goes on: sizes, warnings, progress, and the images and processes behind a failure."""

import io
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from batches import refused_with
from processes import run_ranks
from refusals import refused
from runs import of_folder, poison, tiny

from rlpjepa_zoo import progress
from rlpjepa_zoo.core import distributed
from rlpjepa_zoo.data.loader import Batches, make_loader
from rlpjepa_zoo.data.sources import fingerprint, open_source
from rlpjepa_zoo.errors import RecipeError, UsageError
from rlpjepa_zoo.training import announce
from rlpjepa_zoo.training.resume import check_same_on_all_ranks
from rlpjepa_zoo.training.run_dir import RunLog
from rlpjepa_zoo.training.tasks import feature_cache
from rlpjepa_zoo.training.tasks.pretrain import PretrainTask, train


def test_dead_dimensions_are_said_at_step_50(caplog: pytest.LogCaptureFixture) -> None:
    def said(dead: float, *steps: int, density: float = 0.12, warmup: int = 2, hold: bool = True) -> list[str]:
        caplog.clear()
        task = PretrainTask(tiny(f"target.density={density}", f"target.hold={hold}", "train.epochs=40", f"optim.warmup_epochs={warmup}"))
        task.source = SimpleNamespace(length=96)  # type: ignore[assignment]
        for step in steps:
            task._warn_of_dead(dead, step)
        return caplog.messages

    assert said(0.13, 49) == [] == said(0.04, 50, 51)
    assert said(0.13, 60, hold=False)[0].endswith("start again with target.hold=true, which brings them back")
    (warning,) = said(0.13, 40, 60, 80)
    assert warning.startswith("step 60: 13% of the dimensions are zero for every image")
    assert warning.endswith("start again with a longer warm-up: optim.warmup_epochs=17, which is 51 steps, instead of 2")
    assert said(0.13, 60, warmup=20)[0].endswith("start again with a lower rate, such as optim.lr=0.005, and more epochs")
    assert said(0.7, 50, density=0.01) == []  # with 32 images, a sample of the target leaves (1 - 0.01)^32 = 72 % silent


def test_minutes_count_encoding_and_the_bar_counts_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = feature_cache._encode

    def slow(*given: object) -> object:
        time.sleep(1.2)
        return right(*given)  # type: ignore[arg-type]

    monkeypatch.setenv("RLPJEPA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(feature_cache, "_encode", slow)
    bars: list[tuple[object, ...]] = []
    original = RunLog.progress_bar
    monkeypatch.setattr(RunLog, "progress_bar", lambda self, *given: (bars.append(given), original(self, *given))[1])
    train(tiny("encoder.cached_views=3", "encoder.freeze_backbone=true", "train.epochs=2"), tmp_path / "run", progress=False)
    assert bars == [("digits", 0, 6, True)]
    assert json.loads((tmp_path / "run/summary.json").read_text())["info"]["training"]["minutes"] >= 0.02


def test_a_bar_in_a_file_is_a_few_whole_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setattr("sys.stderr", file)
    with progress.progress_bar("encode", 1000) as bar:
        for _ in range(1000):
            bar.update()
    lines = file.getvalue().splitlines()
    assert len(lines) == 2 and "\r" not in file.getvalue() and lines[1].startswith("encode: 100%") and "1000/1000" in lines[1]


def test_a_slow_save_under_torchrun_names_its_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert announce.slow_save(100) is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert announce.slow_save(14) is None and "--shutdown-timeout SECONDS" in str(announce.slow_save(40))


def test_a_recipe_can_require_a_number_of_processes(tmp_path: Path) -> None:
    with refused(RecipeError, match="train.processes: the recipe asks for 8 processes, 1 run; start 8"):
        train(tiny("train.processes=8"), tmp_path / "run", progress=False)
    train(tiny("train.processes=1", "train.epochs=1", "optim.warmup_epochs=0"), tmp_path / "run", progress=False)


def test_the_batch_of_a_non_finite_step_can_be_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, {5})
    train(tiny("train.epochs=2"), tmp_path / "run", progress=False)
    (line,) = map(json.loads, (tmp_path / "run/nonfinite.jsonl").read_text().splitlines())
    assert (line["step"], line["seed"], line["epoch"], len(line["rows"])) == (5, 0, 1, 32) and "matching" in line["terms"]
    recipe = tiny("train.epochs=2")
    with Batches(make_loader(open_source(recipe.data, recipe.seed), recipe, range(4, 5))) as batches:
        assert batches.next().rows.tolist() == line["rows"]


def kill_worker(row: int) -> None:
    if torch.utils.data.get_worker_info() is not None:
        os.kill(os.getpid(), 9)


@pytest.mark.parametrize("hangs", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_image_at_which_a_worker_dies_or_hangs_is_named(image_folder: Path, monkeypatch: pytest.MonkeyPatch, hangs: bool) -> None:
    more = ["train.num_workers=1", "data.cache_gb=0", *(["train.loader_timeout_minutes=0.02"] if hangs else [])]
    recipe = of_folder(image_folder, "train.batch_size=8", *more)
    source = open_source(recipe.data)
    right = source.images._read

    def read(i: int) -> object:
        if source.images.ids[i] == "red/07.png":
            time.sleep(60) if hangs else kill_worker(i)
        return right(i)

    monkeypatch.setattr(source.images, "_read", read)
    with (
        refused_with("while they read red/07.png" if hangs else "while it read red/07.png"),
        Batches(make_loader(source, recipe, range(5))) as loader,
    ):
        for _ in range(5):
            loader.next()


def test_fingerprint_of_all_images_sees_a_changed_pixel_in_any(image_folder: Path) -> None:
    def prints(verify: str) -> str:
        recipe = of_folder(image_folder, f"data.verify={verify}")
        return fingerprint(open_source(recipe.data), recipe.data.verify)

    from PIL import Image

    before = [prints(verify) for verify in ("sample", "all")]
    file = image_folder / "red/12.png"  # row 32 of 40, not among the 32 that a sample reads
    picture = Image.open(file).convert("RGB")
    picture.putpixel((3, 3), (1, 2, 3))
    picture.save(file)
    after = [prints(verify) for verify in ("sample", "all")]
    assert after[1] != before[1]


def first_difference(folder: str) -> list[str]:
    """Messages for other names, and for other pixels, on rank 1."""
    said = []
    for name in ("names", "pixels"):
        source = open_source(of_folder(Path(folder) / f"{name}-{distributed.rank()}").data)
        try:
            check_same_on_all_ranks(0, source, fingerprint(source), "w", {})
        except UsageError as error:
            said.append(str(error))
    return said


def test_the_first_image_that_differs_by_process_is_named(image_folder: Path, tmp_path: Path) -> None:
    import shutil

    for name in ("names-0", "names-1", "pixels-0", "pixels-1"):
        shutil.copytree(image_folder, tmp_path / name)
    (tmp_path / "names-1/red/05.png").rename(tmp_path / "names-1/red/05x.png")
    shutil.copy(image_folder / "blue/01.png", tmp_path / "pixels-1/red/00.png")
    for names, pixels in run_ranks(first_difference, 2, str(tmp_path)):
        assert "image 25 is red/05.png on one process and red/05x.png on another" in names
        assert "the pixels of image 20, red/00.png, differ" in pixels


def silent(_: int = 0) -> dict[int, str]:
    distributed.report(f"to read the images of step {distributed.rank()}")
    distributed.barrier()
    if distributed.rank() == 1:  # hangs
        time.sleep(4)
        return {}
    return distributed.silent_ranks(wait=2)


def test_the_process_that_hangs_is_named_with_what_it_began() -> None:
    assert run_ranks(silent, 3) == [{1: "to read the images of step 1"}, {}, {1: "to read the images of step 1"}]
    assert distributed.silent_ranks() == {}


def test_a_run_without_evaluation_images_says_nothing_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    log = RunLog(Path("/nowhere"), True)
    log.bar = SimpleNamespace(disable=False, write=lambda text, file: said.append(text))
    monkeypatch.setattr(log, "_append", lambda *given: None)
    log.row({"kind": "eval", "step": 3, "epoch": 1.0})
    log.row({"kind": "eval", "step": 6, "epoch": 2.0, "top1": 0.5})
    assert said == ["step 6: top1 0.5000"]
