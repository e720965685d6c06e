"""The command line: results on stdout, and for every mistake one line on stderr and the right exit code."""

import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rlpjepa_zoo import SparseEmbeddings
from rlpjepa_zoo.cli.app import run
from rlpjepa_zoo.config.pretrain import Recipe
from rlpjepa_zoo.models.factory import create_encoder
from rlpjepa_zoo.report import demo

TINY = [
    "data.limit=128", "encoder.dim=16", "objective.num_directions=32", "train.batch_size=64", "train.epochs=2", "train.num_workers=0",
    "optim.warmup_epochs=0.5", "probe.bank=64", "probe.eval_images=40", "train.precision=no",
]  # fmt: skip


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return create_encoder("test_resnet", dim=24).save_pretrained(tmp_path_factory.mktemp("saved") / "encoder")


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], code: int) -> str:
    """Run a command, check its exit code, that stdout is empty and that stderr has exactly one line; return the line."""
    assert run([str(a) for a in arguments]) == code
    out, err = capsys.readouterr()
    lines = err.strip().splitlines()
    assert out == "" and len(lines) == 1 and lines[0].startswith("error: "), (out, err)
    return lines[0]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.lrr=1", ["optim.lrr", "unknown key", "'lr'"]),
        ("optm.lr=1", ["optm", "unknown key", "'optim'"]),
        ("optim.lr=fast", ["optim.lr", "'fast'", "number"]),
        ("target.p=0", ["target.p", "'0'", "greater than 0"]),
        ("target.p=-1", ["target.p", "greater than 0"]),
        ("target.p=nan", ["target.p"]),
        ("target.sigma=0", ["target.sigma", "'0'", "greater than 0"]),
        ("target.sigma=-2", ["target.sigma", "'-2'"]),
        ("target.density=0", ["target.density", "'0'", "between 0 and 1"]),
        ("target.density=1", ["target.density", "between 0 and 1"]),
        ("target.density=1.5", ["target.density", "between 0 and 1"]),
        ("train.epochs=many", ["train.epochs", "'many'"]),
        ("train.batch_size=1.5", ["train.batch_size", "integer"]),
        ("train.batch_size=1", ["train.batch_size"]),
        ("train.precision=fp8", ["train.precision", "fp8", "bf16"]),
        ("train.keep=1", ["train.keep"]),
        ("train.gradient_accumulation=2", ["train.gradient_accumulation", "refused"]),
        ("data.path=/x", ["data.path", "digits"]),
        ("data.source=http", ["data.source"]),
        ("objective.directions=rondom", ["objective.directions", "rondom"]),
        ("views.flip=2", ["views.flip"]),
        ("nonsense", ["nonsense", "section.key=value"]),
    ],
)
def test_recipe_mistakes_exit_2(capsys: pytest.CaptureFixture[str], override: str, words: list[str]) -> None:
    line = refused(capsys, ["check", "digits", override], 2)
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["check", "digitz"], 2, ["digitz", "Did you mean 'digits'"]),
        (["check"], 2, ["RECIPE"]),
        (["chek", "digits"], 2, ["chek"]),
        (["check", "digits", "--nope"], 2, ["--nope"]),
        (["check", "digits", "encoder.backbone=resnet81"], 4, ["resnet81", "Did you mean"]),
        (["check", "digits", "encoder.args={nope: 1}"], 4, ["nope"]),
        (["check", "cifar10-vit-small", "data.image_size=48"], 2, ["encoder", "48"]),
        (["train", "folder-resnet18", "--out", "OUT"], 3, ["data.path"]),
        (["train", "folder-resnet18", "data.path=/no/such/folder", "--out", "OUT"], 3, ["/no/such/folder"]),
        (["train", "cifar10-cpu", "data.path=/no/such/folder", "--out", "OUT"], 3, ["/no/such/folder"]),
        (["train", "digits", "train.batch_size=4096", "--out", "OUT"], 3, ["1437", "4096"]),
        (["train", "digits", "--out", "/proc/nope"], 6, ["/proc/nope"]),
        (["embed", "ENCODER", "/no/such.png", "--out", "OUT.npz"], 3, ["/no/such.png", "no such file"]),
        (["embed", "ENCODER", "CORRUPT", "--out", "OUT.npz"], 3, ["bad.png", "cannot be read"]),
        (["embed", "ENCODER", "GOOD", "--out", "OUT.csv"], 2, [".csv", ".safetensors"]),
        (["embed", "ENCODER", "GOOD", "--out", "/no/such/dir/x.npz"], 6, ["/no/such/dir"]),
        (["embed", "no-such-encoder", "GOOD", "--out", "OUT.npz"], 2, ["no-such-encoder"]),
        (["embed", "/", "GOOD", "--out", "OUT.npz"], 4, ["config.json"]),
        (["embed", "ENCODER", "GOOD", "--out", "OUT.npz", "--device", "tpu9"], 2, ["--device", "tpu9"]),
        (["embed", "someone/nothing-here", "GOOD", "--out", "OUT.npz"], 5, ["someone/nothing-here"]),
        (["eval", "ENCODER", "--data", "GOOD"], 3, ["labels"]),
        (["eval", "ENCODER", "--data", "nothing"], 2, ["nothing", "Known sets"]), (["eval", "ENCODER", "--data", "cifar11"], 2, ["'cifar10'"]),
        (["eval", "ENCODER", "--data", "digits", "--probes", "knn,linaer"], 2, ["linaer", "'linear'"]),
        (["eval", "ENCODER", "--data", "digits", "--budgets", "4,x"], 2, ["--budgets", "4,x"]),
        (["eval", "ENCODER", "--data", "digits", "--budgets", "0"], 2, ["budgets", "1 .. 24"]),
        (["eval", "ENCODER", "--data", "digits", "--budgets", "4,25"], 2, ["budgets", "25"]),
        (["eval", "ENCODER", "--data", "digits", "--shots", "0,5"], 2, ["shots", "0, 5"]),
        (["eval", "ENCODER", "--data", "digits", "--seeds", "0"], 2, ["--seeds"]),
        (["eval", "ENCODER", "--data", "digits", "--plot", "OUT.pdf"], 2, ["--plot", ".png"]),
        (["eval", "ENCODER", "--data", "digits", "--plot", "/no/such/dir/p.png"], 6, ["/no/such/dir"]),
        (["eval", "ENCODER", "--data", "digits", "--plot", "OUT.png", "--probes", "mlp"], 2, ["--plot", "--probes"]),
        (["eval", "ENCODER", "--data", "digits", "--against", "pixels", "--no-pixels"], 2, ["pixels"]),
        (["eval", "ENCODER", "--data", "digits", "--against", "timm:resnet81"], 4, ["resnet81"]),
        (["eval", "ENCODER", "--data", "digits", "--against", "nobody"], 2, ["nobody"]),
        (["eval", "ENCODER", "--data", "digits", "data.limt=3"], 2, ["data.limt", "'limit'"]),
        (["eval", "ENCODER", "--data", "cifar10", "data.path=/no/such/dir"], 3, ["/no/such/dir"]),
        (["demo", "--density", "2"], 2, ["target.density"]),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_with_their_code(
    capsys: pytest.CaptureFixture[str], encoder: Path, tmp_path: Path, arguments: list[str], code: int, words: list[str]
) -> None:
    for name in ("good", "corrupt"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (20, 20)).save(tmp_path / name / "a.png")
    (tmp_path / "corrupt" / "bad.png").write_bytes(b"\x89PNG broken")
    (tmp_path / "good" / "train").mkdir()
    (tmp_path / "good" / "val").mkdir()
    for part in ("train", "val"):
        Image.new("RGB", (20, 20)).save(tmp_path / "good" / part / "b.png")
    names = {"ENCODER": str(encoder), "GOOD": str(tmp_path / "good"), "CORRUPT": str(tmp_path / "corrupt")}
    ready = [names.get(a, a.replace("OUT", str(tmp_path / "out")) if a.startswith("OUT") else a) for a in arguments]
    if arguments[0] == "demo":
        ready += ["--out", str(tmp_path / "demo")]
    if arguments[0] in ("embed", "eval"):
        ready.append("--quiet")
    line = refused(capsys, ready, code)
    assert all(word in line for word in words), line


def test_mu_override_replaces_the_density_of_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", "digits", "target.mu=-1"]) == 0 and "expected density: 0.1216" in capsys.readouterr().out
    assert run(["check", "cifar10-cpu", "target.density=0.25"]) == 0 and "expected density: 0.25" in capsys.readouterr().out
    assert "exactly one" in refused(capsys, ["check", "digits", "target.mu=-1", "target.density=0.1"], 2)


def test_invalid_recipe_files_exit_2(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("name: x\nname: y\n")
    assert "twice" in refused(capsys, ["check", file], 2)
    file.write_bytes(b"\xff\xfe")
    assert "UTF-8" in refused(capsys, ["check", file], 2)
    file.write_text("- a\n- b\n")
    refused(capsys, ["check", file], 2)


def test_check_prints_a_usable_recipe(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(["check", "cifar10-resnet18", "target.mu=-1"]) == 0
    out = capsys.readouterr().out
    assert "# expected density: 0.1216" in out and "# parameters, backbone: 11,168,832" in out
    (tmp_path / "again.yaml").write_text(out)
    assert run(["check", str(tmp_path / "again.yaml")]) == 0
    assert capsys.readouterr().out == out


def test_check_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", "digits", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["expected density"] == pytest.approx(0.12) and printed["recipe"]["train"]["epochs"] == 50


def test_train_embed_and_eval_run_in_sequence(capsys: pytest.CaptureFixture[str], image_folder: Path, tmp_path: Path) -> None:
    assert run(["train", "digits", *TINY, "--out", str(tmp_path / "run"), "--quiet", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    folder = printed["encoder"]
    assert printed["steps"] == 4 and Path(folder).is_dir()

    out = tmp_path / "e.parquet"
    assert run(["embed", folder, str(image_folder), "--out", str(out), "--max-active", "5", "--quiet", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    e = SparseEmbeddings.load(out)
    assert printed["images"] == 40 == len(e) and e.ids[0] == "blue/00.png" and np.diff(e.indptr).max() <= 5
    assert printed["model"] == e.meta["model"]
    assert "exists" in refused(capsys, ["embed", folder, str(image_folder), "--out", str(out)], 2)
    assert run(["embed", folder, str(image_folder), "--out", str(out), "--overwrite", "--quiet"]) == 0
    assert "density: " in capsys.readouterr().out

    assert (
        run(["eval", folder, "--data", "digits", "--limit", "200", "--seeds", "1", "--quiet", "--out", str(tmp_path / "report.json")]) == 0
    )
    table = capsys.readouterr().out
    assert "z (sparse)" in table and "raw pixels" in table
    assert json.loads((tmp_path / "report.json").read_text())["n_train"] == 200


def test_eval_writes_report_plot_and_card(capsys: pytest.CaptureFixture[str], encoder: Path, image_folder: Path, tmp_path: Path) -> None:
    mine, out, plot = tmp_path / "mine", tmp_path / "report.json", tmp_path / "curve.png"
    shutil.copytree(encoder, mine)
    command = ["eval", mine, "--data", image_folder, "--budgets", "2,4", "--shots", "1,5,20", "--no-pixels", "--card", "--quiet"]
    assert run([str(word) for word in (*command, "--out", out, "--plot", plot, "--against", encoder)]) == 0
    table = capsys.readouterr().out
    for words in ("5-shot", "active of z", "z - its z, kNN", "left out: 20-shot: class", "32 training and 8 test images"):
        assert words in table, words
    report = json.loads(out.read_text())
    assert report["curve"]["active"] == [2, 4] and report["data"] == str(image_folder) and list(report["against"]) == [str(encoder)]
    assert Image.open(plot).format == "PNG" and sorted(p.name for p in tmp_path.glob("*.*")) == ["curve.png", "report.json"]
    text = (mine / "README.md").read_text()
    assert "5-shot" in text and "paired bootstrap" in text and str(tmp_path) not in text


def test_eval_reports_how_it_split_a_folder(capsys: pytest.CaptureFixture[str], encoder: Path, image_folder: Path) -> None:
    assert run(["eval", str(encoder), "--data", str(image_folder), "--probes", "knn,retrieval", "--no-pixels", "--quiet", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["n_train"], report["n_test"]) == (32, 8) and "8 of 40 images" in report["protocol"] and "linear_z" not in report
    assert 0 <= report["map_z"] <= 1


def test_skip_bad_lists_unreadable_images(capsys: pytest.CaptureFixture[str], encoder: Path, image_folder: Path, tmp_path: Path) -> None:
    (image_folder / "red" / "zz.png").write_bytes(b"no")
    out = tmp_path / "e.npz"
    assert run(["embed", str(encoder), str(image_folder), "--out", str(out), "--skip-bad", "--quiet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["skipped"] == 1 and len(SparseEmbeddings.load(out)) == 40
    listed = [json.loads(line) for line in (tmp_path / "e.npz.failed.jsonl").read_text().splitlines()]
    assert listed[0]["id"] == "red/zz.png"


def test_list_prints_encoders_and_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["list", "--recipes"]) == 0
    commands = {line.split()[0]: line.split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines()}
    assert {"digits", "cifar10-cpu", "cifar10-resnet18", "imagenet100-resnet50"} <= set(commands)
    assert commands["digits"] == "rlpjepa train" and commands["finetune-digits"] == "rlpjepa finetune"
    assert run(["list", "--json"]) == 0
    for row in json.loads(capsys.readouterr().out):
        assert {"name", "architecture", "dim", "density", "sha256"} <= set(row)
    assert run(["list", "nothing-*"]) == 0
    assert capsys.readouterr().out.strip() == "name  backbone  data  dim  density  licence  linear z  kNN z  MB  repo"


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    from rlpjepa_zoo.errors import RecipeError

    with pytest.raises(RecipeError):
        run(["check", "digits", "target.p=0", "--debug"])


def test_bug_prints_its_traceback_and_exits_70(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlpjepa_zoo.hub.zoo.list_encoders", lambda pattern: 1 / 0)
    assert run(["list"]) == 70
    err = capsys.readouterr().err
    assert "Traceback" in err and "bug" in err.splitlines()[-1]


def test_demo_of_one_epoch_writes_all_results(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On fewer training images, and with fewer budgets measured, than the demo has."""
    out, load, evaluate = tmp_path / "demo", Recipe.load, demo.evaluate
    fewer = ["data.limit=512", "train.num_workers=0"]
    monkeypatch.setattr(Recipe, "load", lambda name, changes: load(name, [*changes, *fewer]))
    monkeypatch.setattr(demo, "evaluate", lambda *given, budgets, **more: evaluate(*given, budgets=[4, 16], limit=300, **more))
    assert run(["demo", "--epochs", "1", "--out", str(out), "--quiet"]) == 0
    text = capsys.readouterr().out
    for word in ("asked 0.120", "theory of the target 0.120", "measured", "raw pixels", "1-shot", "dense float32", "overview.png"):
        assert word in text
    assert Image.open(out / "overview.png").size[0] > 1000
    assert SparseEmbeddings.load(out / "test-embeddings.safetensors").shape == (360, 256)
    (out / "mine.txt").write_text("keep me")
    assert "mine.txt" in refused(capsys, ["demo", "--epochs", "1", "--out", out], 2)
    assert (out / "mine.txt").read_text() == "keep me"


def start(*arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "rlpjepa_zoo", *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_help_is_quick() -> None:
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert "demo" in start("--help").communicate(timeout=300)[0]
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert min(seconds) < 0.5  # of processor time, as the cores may be busy


def test_closed_pipe_prints_no_traceback() -> None:
    command = [sys.executable, "-u", "-m", "rlpjepa_zoo", "list", "--recipes"]
    done = subprocess.run(["bash", "-c", f"{shlex.join(command)} | head -1"], capture_output=True, text=True, timeout=300)
    assert done.stderr == "" and done.stdout.split()[0] == "celeba-resnet50"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=300)
    os.close(writer)
    assert done.returncode == 141 and done.stderr == ""


def test_ctrl_c_saves_and_exits_130(tmp_path: Path) -> None:
    process = start("train", "digits", *TINY, "train.epochs=500", "train.log_every=1", "--out", str(tmp_path / "run"), "--quiet")
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not (tmp_path / "run/metrics.jsonl").is_file():
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130 and "Traceback" not in err
    assert any((tmp_path / "run/checkpoints").iterdir())


def test_version_and_short_help_option(capsys):
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("rlpjepa_zoo 0.")
    assert run(["push", "-h"]) == 0
    assert "--dry-run" in capsys.readouterr().out
