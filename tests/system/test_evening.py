"""recipes/evening.sh: its order, failures and signals with a stand-in for the package, and one real night that is killed and goes on."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import PATIENCE, program
from runs import TINY, rows, wait_for_step

from rlpjepa_zoo.cli.app import run as cli

DIGITS = [word for word in TINY if not word.startswith(("target", "reconstruction", "train.checkpoint"))]
"""Overrides of a run of a second, for folder-resnet18 too."""
MEASURES = {"knn_z", "linear_z", "knn_features", "linear_features"}
SCRIPT = Path(__file__).parents[2] / "recipes/evening.sh"

STAND_IN = """
[ "$1" = -c ] && exit 0
shift 2
echo "$@" >> "$CALLS"
case " $* " in *" $BAD "*) exit 3 ;; esac
[ "$1" = check ] && echo "name: x"
out=""
while [ $# -gt 0 ]; do
    [ "$1" = --out ] && out=$2
    [ "$1" = "$WAITS" ] && waits=1
    [ "$1" = train ] && trains=1
    shift
done
if [ -n "${trains:-}" ]; then
    if [ -n "${waits:-}" ]; then
        trap 'exit 143' TERM
        touch "$CALLS.waiting"
        while :; do sleep 0.1; done
    fi
    mkdir -p "$out/checkpoints"
elif [ -n "$out" ]; then
    echo "{}" > "$out"
fi
"""
"""Writes down its arguments. $BAD as an argument ends it with 3; a training of $WAITS lasts until it is terminated."""


class Night:
    """The script with a stand-in for python."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "out"
        (folder / "bin").mkdir()
        program(folder / "bin", "python", STAND_IN)

    def start(self, *words: str, **environment: str) -> subprocess.Popen[str]:
        values = {"CALLS": str(self.folder / "calls"), "BAD": "nothing", "WAITS": "nothing", "OUT": str(self.out), **environment}
        values = {**os.environ, "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", **values}
        process = ["bash", str(SCRIPT), *words]

        def listen() -> None:
            signal.signal(
                signal.SIGINT, signal.SIG_DFL
            )  # a suite in the background ignores it, and a shell cannot trap what it inherits as ignored

        return subprocess.Popen(
            process, env=values, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, preexec_fn=listen
        )

    def run(self, *words: str, **environment: str) -> tuple[int, str]:
        """Exit code and output."""
        process = self.start(*words, **environment)
        output, _ = process.communicate(timeout=PATIENCE)
        return process.returncode, output

    def calls(self) -> list[str]:
        """Commands since the last call of this."""
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return [line.replace(str(self.folder), "HERE") for line in lines]


@pytest.fixture
def night(tmp_path: Path) -> Night:
    return Night(tmp_path)


EVAL = (
    "eval HERE/out/{0} --data HERE/out/{0}/recipe.yaml --probes knn,linear --no-pixels --limit 130000 --out HERE/out/{0}/eval.json --quiet"
)


def test_all_are_checked_then_each_is_trained_and_evaluated(night: Night) -> None:
    (night.folder / "data/cifar10").mkdir(parents=True)
    code, output = night.run("cifar10-resnet18", "mine/two.yaml", "train.epochs=2", DATA=str(night.folder / "data"))
    assert code == 0 and output.splitlines()[-1] == f"evening.sh: 2 of 2 recipes are done, see {night.out}"
    one, two = "cifar10-resnet18 data.path=HERE/data/cifar10 train.epochs=2", "mine/two.yaml train.epochs=2"
    assert night.calls() == [
        f"check {one}", f"check {two}",
        f"train {one} --out HERE/out/cifar10-resnet18 --resume --quiet", EVAL.format("cifar10-resnet18"),
        f"train {two} --out HERE/out/two --resume --quiet", EVAL.format("two"),
    ]  # fmt: skip
    assert sorted(path.name for path in night.out.iterdir()) == ["cifar10-resnet18", "evening.log", "two"]
    assert (night.out / "evening.log").read_text() == output and "+ python -m rlpjepa_zoo train cifar10-resnet18" in output


def test_without_recipes_it_trains_resnet18_on_both_cifars(night: Night) -> None:
    assert night.run()[0] == 0
    assert [call for call in night.calls() if call.startswith("check")] == ["check cifar10-resnet18", "check cifar100-resnet18"]


def test_a_training_is_evaluated_once_and_a_longer_one_again(night: Night) -> None:
    night.run("one")
    night.calls()
    assert night.run("one")[0] == 0 and [call.split()[0] for call in night.calls()] == ["check", "train"]
    time.sleep(0.01)
    (night.out / "one/checkpoints/step-00000002").mkdir()
    assert night.run("one")[0] == 0 and [call.split()[0] for call in night.calls()] == ["check", "train", "eval"]


@pytest.mark.parametrize(
    ("bad", "what", "left"), [("a", "check", ["b", "c"]), ("--resume", "train", []), ("--data", "eval", ["a", "b", "c"])]
)
def test_after_a_failure_comes_the_next_recipe(night: Night, bad: str, what: str, left: list[str]) -> None:
    code, output = night.run("a", "b", "c", BAD=bad)
    assert code == 3 and f"evening.sh: a: {what} ended with exit code 3" in output.splitlines()
    calls = night.calls()
    assert sum(call.startswith("check") for call in calls) == 3
    assert [call.split()[1].rpartition("/")[2] for call in calls if call.startswith("eval")] == left
    assert f"evening.sh: {2 if what == 'check' else 0} of 3 recipes are done, see {night.out}" == output.splitlines()[-1]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_training_and_the_night(night: Night, number: int, code: int) -> None:
    process = night.start("a", "b", WAITS="a")
    try:
        deadline = time.monotonic() + PATIENCE
        while not (night.folder / "calls.waiting").exists():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        process.send_signal(number)  # to the shell alone
        output, _ = process.communicate(timeout=PATIENCE)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == code
    assert output.splitlines()[-1] == "evening.sh: stopped; the same command goes on from the last checkpoint"
    assert [call.split()[:2] for call in night.calls()] == [["check", "a"], ["check", "b"], ["train", "a"]]


@pytest.mark.parametrize(
    ("words", "environment", "code", "message"),
    [
        (["--out", "x"], {}, 2, "evening.sh: --out: no such option; expected [DATA=DIR] [OUT=DIR] evening.sh [RECIPE ...] [section.key=value ...]"),
        (["digits", "other/digits.yaml"], {}, 2, "evening.sh: other/digits.yaml: a second recipe named digits would have the same folder; give each name once"),
        ([], {"DATA": "/no/such/folder"}, 3, "evening.sh: DATA=/no/such/folder: no such folder"),
        ([], {"OUT": "/dev/null/out"}, 6, "evening.sh: OUT=/dev/null/out: cannot be written"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(night: Night, words: list[str], environment: dict[str, str], code: int, message: str) -> None:
    assert night.run(*words, **environment) == (code, message + "\n") and night.calls() == []


def test_a_python_without_the_package_is_one_line(night: Night) -> None:
    program(night.folder / "bin", "python", "exit 1")
    assert night.run() == (2, "evening.sh: python finds no rlpjepa_zoo; activate the environment in which it is installed\n")


def test_help_is_the_comment_at_the_top(night: Night) -> None:
    code, output = night.run("--help")
    assert (
        code == 0
        and output.startswith("Recipes one after another")
        and "[DATA=DIR] [OUT=DIR] recipes/evening.sh" in output
        and "set -" not in output
    )


def test_its_commands_are_those_of_the_package(night: Night) -> None:
    """What the stand-in was told, the package does: check, train and evaluate a tiny run."""
    assert night.run("digits", *DIGITS)[0] == 0
    shutil.rmtree(night.out)
    for call in night.calls():
        assert cli(call.replace("HERE", str(night.folder)).split()) == 0, call
    report = json.loads((night.out / "digits/eval.json").read_text())
    assert report["n_train"] == 96 and MEASURES <= report.keys() and "knn_pixels" not in report


@pytest.mark.slow
def test_a_killed_night_goes_on_and_names_the_recipe_that_fails(tmp_path: Path) -> None:
    """The real package: folder-resnet18 has no images; the process group of the night is killed in the training of digits."""
    out, words = tmp_path / "out", ["folder-resnet18", "digits", *DIGITS, "train.checkpoint_minutes=0", "train.epochs=8"]
    environment = {**os.environ, "OUT": str(out), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["bash", str(SCRIPT), *words]
    first = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        wait_for_step(out / "digits", 2)
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    reached = len(rows(out / "digits"))
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=PATIENCE)
    assert done.returncode == 3, done.stdout
    assert "error: data.path: the folder of images is not given" in done.stdout and "; resumed at step " in done.stdout
    assert done.stdout.splitlines()[-2:] == [
        "evening.sh: folder-resnet18: check ended with exit code 3", f"evening.sh: 1 of 2 recipes are done, see {out}",
    ]  # fmt: skip
    steps = [row["step"] for row in rows(out / "digits") if row["kind"] == "train"]
    assert reached >= 2 and steps == list(range(1, 25))
    assert MEASURES <= json.loads((out / "digits/eval.json").read_text()).keys()
    assert (out / "evening.log").read_text().endswith(done.stdout)
