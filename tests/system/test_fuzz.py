"""Random mistakes of a user, thrown at every command: see tests/support/fuzz.py, which also repeats a case and shrinks it."""

import json
import time
from pathlib import Path

import fuzz
import pytest
from processes import run_alone

COMMAND = [fuzz.fuzz_cases.LOAD, "in/x"]


def failures(report: Path) -> str:
    done = json.loads(report.read_text())
    print(fuzz.summary(done))
    return fuzz.summary(done) if done["failures"] else ""


def test_random_mistakes_end_in_one_line_and_a_documented_code(tmp_path: Path) -> None:
    """A fixed seed. Codes of rlpjepa_zoo.errors only, never 70; one printable line of at most 500 characters; under 1 GB; no hang; no other file touched."""
    run_alone(fuzz.session, 1, 80, 600.0, tmp_path / "report.json")
    assert not failures(tmp_path / "report.json")


@pytest.mark.slow
def test_random_mistakes_of_five_minutes(tmp_path: Path) -> None:
    """Another seed each day, which the failures name."""
    run_alone(fuzz.session, int(time.time()) // 86_400, None, 300.0, tmp_path / "report.json", limit=900.0)
    assert not failures(tmp_path / "report.json")


def _bug(case: fuzz.fuzz_cases.Case) -> int:
    raise StopIteration("x")


def _hang(case: fuzz.fuzz_cases.Case) -> int:
    time.sleep(60)
    return 0


def _large(case: fuzz.fuzz_cases.Case) -> int:
    return len(bytearray(b"\1" * (100 << 20))) and 0


def _silent(case: fuzz.fuzz_cases.Case) -> int:
    return 3


def _wordy(case: fuzz.fuzz_cases.Case) -> int:
    print("error: " + "x" * 600 + "\x1b[31m", file=fuzz.sys.stderr)
    return 3


def _elsewhere(case: fuzz.fuzz_cases.Case) -> int:
    Path("in/new").write_text("x")
    return 0


def _anywhere(case: fuzz.fuzz_cases.Case) -> int:
    try:
        Path("/tmp/rlpjepa-fuzz-must-not-exist").write_text("x")
    except PermissionError:
        return 0
    return 70


def _undocumented(case: fuzz.fuzz_cases.Case) -> int:
    print("error: x", file=fuzz.sys.stderr)
    return 1


def _fine(case: fuzz.fuzz_cases.Case) -> int:
    Path("out/new").write_text("x")
    return 0


PLANTED = {
    _bug: "bug: StopIteration",
    _hang: "hang: ",
    _large: "memory: load",
    _silent: "lines: 0 error lines with code 3",
    _wordy: "long: load",
    _elsewhere: "writes: load",
    _anywhere: "",
    _undocumented: "code: 1",
    _fine: "",
}


def _plant(report: Path) -> None:
    fuzz.MOST_MEMORY = 64 << 20
    found = {}
    for function in PLANTED:
        fuzz.SECONDS = 2.0 if function is _hang else 60.0
        fuzz._run = function
        folder = report.parent / function.__name__
        for name in ("in", "out", "outside", "home", "tmp"):
            (folder / name).mkdir(parents=True)
        case = fuzz.fuzz_cases.Case(folder, report.parent, list(COMMAND))
        found[function.__name__] = [kind for kind, _ in fuzz.verdict(case, fuzz.perform(case))]
    report.write_text(json.dumps(found))


def test_planted_faults_are_noticed(tmp_path: Path) -> None:
    run_alone(_plant, tmp_path / "report.json")
    found = json.loads((tmp_path / "report.json").read_text())
    for function, kind in PLANTED.items():
        kinds = found[function.__name__]
        assert any(k.startswith(kind) for k in kinds) if kind else kinds == [], (function.__name__, kinds)
    assert any(k.startswith("unprintable on stderr") for k in found["_wordy"])


def test_a_case_is_repeated_by_its_seed(tmp_path: Path) -> None:
    world = tmp_path / "world"
    (world / "images/a").mkdir(parents=True)
    for member in (
        "images/a/00.png",
        "photo.tar",
        "photo.parquet",
        "photo.zip",
        *(f"codes.{s}" for s in ("safetensors", "npz", "parquet")),
    ):
        (world / member).write_bytes(b"x" * 100)
    for member in ("encoder", "classifier", "run", "parts"):
        (world / member).mkdir()
        (world / member / "config.json").write_text('{"a": [1, {"b": 2}]}')
    for number in range(100):
        first, again = (fuzz.fuzz_cases.build(5, number, tmp_path / f"{number}-{i}", world) for i in range(2))
        assert fuzz.fuzz_cases.describe(first) == fuzz.fuzz_cases.describe(again)
        before, after = ({name: (kind[0], kind[4]) for name, kind in fuzz.snapshot(case.folder).items()} for case in (first, again))
        assert before == after or any(name.startswith("in/s") for name in before)  # symbolic links name the folder
