"""`check` refuses what a run refuses, and no recipe or override ends in our bug code."""

import contextlib
import io
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlpjepa_zoo.cli.app import run
from rlpjepa_zoo.config.finetune import load_any
from rlpjepa_zoo.config.load import list_recipes

MODULE = """
import timm
from timm.models import register_model

@register_model
def backbone_of_mine(pretrained=False, **options):
    return timm.create_model("test_resnet", pretrained=False, **options)
"""


def refused(capsys: pytest.CaptureFixture[str], code: int, *arguments: str) -> str:
    assert run(list(arguments)) == code
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and len(err) <= 501, err
    return err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["folder-resnet18"], 3, "data.path"),
        (["folder-resnet18", "data.path=/no/such/folder"], 3, "/no/such/folder"),
        (["digits", "train.batch_size=1438"], 3, "1437 training images"),
        (["digits", "data.limit=50"], 3, "50 training images"),
        (["digits", "train.trackers=[wanbd]"], 2, "Did you mean 'wandb'?"),
        (["digits", "data.image_size=4097"], 2, "data.image_size: got '4097', expected less than or equal to 4096"),
        (["digits", "data.mean=[1e308, 0, 0]"], 2, "data.mean"),
        (["digits", "data.std=[1e-9, 1, 1]"], 2, "data.std"),
        (["finetune-digits", "data.crop_pct=0.01"], 2, "data.crop_pct"),
        (["digits", "seed=" + "9" * 400], 2, "seed"),
        (["digits", "train.batch_size=" + "9" * 400], 2, "train.batch_size"),
        (["digits", "optim.lr=1" + "0" * 400], 2, "optim.lr"),
        (["digits", "optim.name=lamb"], 2, "optim.name"),
        (["digits", "objective.name=null"], 2, "objective.name"),
        (["finetune-digits", "start.source=null"], 2, "start.source"),
        (["finetune-digits", "start.source=/no/such/run"], 2, "/no/such/run"),
        (["finetune-digits", "data.limit=1"], 3, "1 training images"),
        (["digits", "--import", "no_such_module"], 2, "--import no_such_module: no such module"),
        (["digits", "--import", "broken_module"], 2, "--import broken_module: ZeroDivisionError"),
        (["digits", "--import", "mine.py"], 2, "give the name mine"),
        (["digits", "--import", ""], 2, "--import"),
    ],
)  # fmt: skip
def test_check_refuses_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], code: int, words: str
) -> None:
    (tmp_path / "broken_module.py").write_text("1 / 0")
    (tmp_path / "mine.py").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert words in refused(capsys, code, "check", *arguments)


def test_recipe_without_the_sections_of_its_kind_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("name: x\ndata: {source: digits}\noptim: {lr: 1e-3, warmup_epochs: 1}\ntrain: {epochs: 10}\n")
    assert "start: missing" in refused(capsys, 2, "finetune", str(file))
    assert "encoder: missing" in refused(capsys, 2, "check", str(file))


def test_check_and_run_refuse_alike(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for override, code in (("train.trackers=[wanbd]", 2), ("train.batch_size=1438", 3)):
        said = refused(capsys, code, "check", "digits", override)
        assert refused(capsys, code, "train", "digits", override, "--out", str(tmp_path / "run"), "--quiet") == said


def test_imported_module_registers_a_backbone_and_is_recorded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from rlpjepa_zoo.core import package

    (tmp_path / "my_backbones.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(package, "_USER_MODULES", {})
    assert "backbone_of_mine" in refused(capsys, 4, "check", "digits", "encoder.backbone=backbone_of_mine")
    assert run(["check", "digits", "encoder.backbone=backbone_of_mine", "--import", "my_backbones"]) == 0
    assert package.versions()["my_backbones"] == "imported"


# --- random recipes ------------------------------------------------------------------------------------------------------------------

NAMES = [name for name in list_recipes() if name.split("-")[0] in ("digits", "finetune", "folder", "sparsify", "probe")]
KEYS = {
    name: sorted({*load_any(name).flat(), "objective", "target", "views.local", "train", "data", "encoder.args", "start.args"})
    for name in NAMES
}
STRANGE = [
    "", "null", "~", "0", "-1", "1", "2", "3.5", "0x10", "010", "1_000", "1e3", "1e-308", "1e308", "1e400", "nan", "inf", "9" * 400, "0." + "3" * 400, "true",
    "[]", "{}", "[1, 2]", "[0.5, 0.5, 0.5]", "[1e-300, 1e300]", "{a: 1}", "{count: 2, size: 16}", "[" * 3000, "*a", "a: b", "x" * 70_000, "\x00", "\udce4", "\u202e",
    "digits", "auto", "random", "axes", "rgn", "weak_sigreg", "lejepa", "sgd", "lars", "lora", "linear", "excess", "top5", "timm:test_vit", "/dev/null", ".",
]  # fmt: skip


@st.composite
def command_lines(draw: Any) -> list[str]:
    name = draw(st.sampled_from(NAMES))
    value = st.one_of(
        st.sampled_from(STRANGE), st.integers().map(str), st.floats().map(str), st.text(st.characters(exclude_categories=()), max_size=30)
    )
    pairs = draw(st.lists(st.tuples(st.sampled_from(KEYS[name]), value), min_size=1, max_size=3))
    return ["check", name, *(f"{key}={text}" for key, text in pairs)]


def ends_well(arguments: list[str]) -> None:
    err = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        code = run(arguments)
    assert code in (0, 2, 3, 4, 5, 6), (code, arguments, err.getvalue()[-500:])
    assert code == 0 or (len(err.getvalue().splitlines()) == 1 and len(err.getvalue()) <= 501)


@settings(max_examples=25, derandomize=True)
@given(command_lines())
def test_no_override_is_our_bug(arguments: list[str]) -> None:
    ends_well(arguments)


@pytest.mark.slow
@settings(max_examples=3000)
@given(command_lines())
def test_no_override_of_many_is_our_bug(arguments: list[str]) -> None:
    ends_well(arguments)
