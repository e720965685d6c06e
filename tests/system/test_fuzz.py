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
    run_alone(fuzz.session, 1, 40, 600.0, tmp_path / "report.json")
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
        Path("/", "rlpjepa-fuzz-must-not-exist").write_text("x")
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


COMMANDS = {
    "train": ["train", "in/recipe.yaml", "--out", "out/run", "--quiet"],
    "embed": [
        "embed",
        "in/encoder",
        "in/images",
        "--out",
        "out/parts",
        "--part-rows",
        "1",
        "--batch-size",
        "1",
        "--num-workers",
        "0",
        "--quiet",
    ],
    "finetune": ["finetune", "in/tuning.yaml", "--out", "out/tuned", "--quiet"],
}


def _prepared(folder: Path, world: Path, command: list[str]) -> fuzz.fuzz_cases.Case:
    for name in ("in", "out", "outside", "home", "tmp"):
        (folder / name).mkdir(parents=True)
    case = fuzz.fuzz_cases.Case(folder, world, command)
    case.take("encoder")
    case.take("images")
    case.write("recipe.yaml", fuzz.fuzz_world.PRETRAINING.encode())
    case.write("tuning.yaml", fuzz.fuzz_world.TUNING.encode())
    return case


def _interrupt(report: Path, instants: int) -> None:
    fuzz.import_everything()
    world = report.parent / "world"
    world.mkdir()
    fuzz.make_world(world)
    found = []
    for name, command in COMMANDS.items():
        whole = fuzz.perform(_prepared(report.parent / name, world, command))
        found.append([name, 0, whole.code, whole.err[-500:]])
        for i in range(1, instants):
            case = _prepared(report.parent / f"{name}-{i}", world, command)
            ending = fuzz.perform(case, interrupt_after=whole.seconds * i / instants)
            errors = [line for line in ending.err.splitlines() if line.startswith("error: ")]
            right = ending.code == 0 and not errors or ending.code == 130 and len(errors) == 1 and "Traceback" not in ending.err
            partial = [str(path) for path in case.folder.rglob("*partial*")]
            if not right or partial or ending.notes:
                found.append([name, i, ending.code, f"{partial} {ending.notes} {ending.err[-1500:]}"])
    report.write_text(json.dumps(found))


@pytest.mark.slow
def test_ctrl_c_at_any_moment_is_one_line_and_leaves_nothing_partial(tmp_path: Path) -> None:
    run_alone(_interrupt, tmp_path / "report.json", 20, limit=900.0)
    found = json.loads((tmp_path / "report.json").read_text())
    assert [entry[:3] for entry in found] == [[name, 0, 0] for name in COMMANDS], found


def _poor_environment(report: Path) -> None:
    fuzz.import_everything()
    world = report.parent / "world"
    world.mkdir()
    fuzz.make_world(world)
    none: dict[str, str | None] = dict.fromkeys(("HOME", "TMPDIR", "XDG_CACHE_HOME", "LC_ALL", "USER", "TERM", "PATH"))
    environments = {
        "empty": none,
        "folders that do not exist": {"HOME": "./none", "TMPDIR": "./none", "XDG_CACHE_HOME": "./none/cache"},
        "files for folders": dict.fromkeys(("HOME", "TMPDIR", "XDG_CACHE_HOME"), "./outside"),
    }
    found = {}
    for kind, environment in environments.items():
        for name, command in {**COMMANDS, "check": ["check", "digits"]}.items():
            case = _prepared(report.parent / f"{name}-{kind}", world, command)
            case.environment |= environment
            ending = fuzz.perform(case)
            found[f"{name}, {kind}"] = [ending.code, ending.err[-800:]]
    report.write_text(json.dumps(found))


@pytest.mark.slow
def test_commands_run_without_home_temporary_folder_and_locale(tmp_path: Path) -> None:
    run_alone(_poor_environment, tmp_path / "report.json")
    found = json.loads((tmp_path / "report.json").read_text())
    assert {key: value for key, value in found.items() if value[0] not in (0, 6)} == {}
