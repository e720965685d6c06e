"""Output: whatever the encoding, the readers and the names of files, results arrive, errors are one printable line, and exit codes are right."""

import logging
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from rlpjepa_zoo.cli.app import run
from rlpjepa_zoo.cli.terminal import _OneLine

HOSTILE = "red\x1b[31m bell\x07 bidi\u202e nul\x00 byte\udce4 line\nbreak\u2028 tag\U000e0041"
ZOO = [sys.executable, "-m", "rlpjepa_zoo"]


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        ["bash", "-c", command.replace("rlpjepa", shlex.join(ZOO))], capture_output=True, timeout=300, env={**os.environ, **environment}
    )


def test_error_is_one_printable_line(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["check", HOSTILE], ["check", "digits", HOSTILE], [HOSTILE], ["check", f"--{HOSTILE}"], ["embed", HOSTILE, HOSTILE]):
        assert run(arguments) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.endswith("\n") and err[:-1].isprintable() and err.isascii(), ascii(err)


@pytest.mark.parametrize(
    "text", ["x" * 300_000, "words " * 50_000, "'\"" * 50_000, "\x1b" * 60_000, "a=" + "[" * 60_000, "seed=" + "9" * 60_000]
)
def test_error_is_cut_to_500_characters_and_keeps_its_end(capsys: pytest.CaptureFixture[str], text: str) -> None:
    for arguments in (["check", text], ["check", "digits", text], [text], ["list", text, text]):
        assert run(arguments) == 2
        err = capsys.readouterr().err
        assert len(err) <= 501 and err.count("\n") == 1
    assert err.endswith("(see rlpjepa list --help)\n")


def test_bug_message_is_cut_and_escaped(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(pattern: str) -> None:
        raise RuntimeError(HOSTILE + "x" * 100_000)

    monkeypatch.setattr("rlpjepa_zoo.hub.zoo.list_encoders", fails)
    assert run(["list"]) == 70
    err = capsys.readouterr().err
    assert err.replace("\n", "").isprintable() and len(err.splitlines()[-1]) <= 500 and "please report it" in err.splitlines()[-1]


def test_results_show_names_without_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", "digits", f"name={HOSTILE}"]) == 0
    assert capsys.readouterr().out.replace("\n", "").isprintable()


def test_log_line_is_printable_and_short() -> None:
    record = logging.LogRecord("x", logging.WARNING, "", 0, "%s: left out", (HOSTILE + 100_000 * "y",), None)
    line = _OneLine().format(record)
    assert line.isprintable() and len(line) <= 1000 and line.endswith(": left out")


@pytest.mark.parametrize("encoding", ["ascii", "utf-16", *(pytest.param(name, marks=pytest.mark.slow) for name in ("latin-1", "cp1252"))])
def test_results_arrive_in_every_encoding(encoding: str) -> None:
    done = shell("rlpjepa card test_resnet.digits", PYTHONIOENCODING=encoding)
    assert done.returncode == 0 and done.stderr == b""
    assert ("+-" if encoding == "ascii" else "±") in done.stdout.decode(encoding)


@pytest.mark.parametrize(
    ("command", "code", "error"),
    [
        ("rlpjepa list --recipes | head -0; exit ${PIPESTATUS[0]}", 141, ""),
        ("rlpjepa --help | head -0; exit ${PIPESTATUS[0]}", 141, ""),
        ("rlpjepa list --recipes > /dev/full", 6, "stdout: cannot be written: No space left on device"),
        ("rlpjepa --help > /dev/full", 6, "stdout: cannot be written"),
        ("rlpjepa list --recipes >&-", 0, ""),
        ("rlpjepa chek 2>&-", 2, ""),
        ("rlpjepa chek 2> /dev/full", 2, ""),
        ("rlpjepa card test_resnet.digits <&- >&- 2>&-", 0, ""),
    ],
)
def test_streams_that_cannot_be_written(command: str, code: int, error: str) -> None:
    if "/dev/full" in command and not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    done = shell(command)
    assert done.returncode == code and done.stderr.decode().strip().startswith(f"error: {error}" if error else ""), done.stderr
    assert len(done.stderr.splitlines()) == bool(error)


_LONG = "x" * 5000


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["dial", "test_resnet.digits", "--budget", "4", "--out", _LONG], 6),
        (["dial", "test_resnet.digits", "--budget", "4", "--out", "a/" * 3000], 6),
        (["embed", "test_resnet.digits", ".", "--out", f"{_LONG}.npz"], 6),
        (["embed", "test_resnet.digits", ".", "--out", "a/" * 3000], 6),
        (["eval", "test_resnet.digits", "--data", _LONG], 2),
        (["eval", "test_resnet.digits", "--data", "digits", "--out", "a/" * 3000], 6),
        (["report", _LONG], 2),
    ],
)
def test_names_that_are_too_long_for_the_system_are_refused(capsys: pytest.CaptureFixture[str], command: list[str], code: int) -> None:
    assert run(command) == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and len(lines[0]) <= 500


@pytest.mark.parametrize(
    "command",
    [
        ["eval", "test_resnet.digits", "--data", "digits", "--out", "PLACE"],
        ["eval", "test_resnet.digits", "--data", "digits", "--plot", "PLACE"],
        ["embed", "test_resnet.digits", ".", "--overwrite", "--out", "PLACE"],
        ["predict", "gone", ".", "--overwrite", "--out", "PLACE"],
        ["bench", "--out", "PLACE"],
        ["bench", "loss", "--out", "PLACE"],
        ["bench", "codes", "digits", "--out", "PLACE"],
    ],
)
def test_devices_and_pipes_are_not_replaced_by_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path, command: list[str]) -> None:
    """Told before anything is loaded or measured."""
    place = tmp_path / {"--plot": "p.png", "embed": "p.npz", "predict": "p.csv"}.get(
        "--plot" if "--plot" in command else command[0], "p.json"
    )
    os.mkfifo(place)
    assert run([str(place) if word == "PLACE" else word for word in command]) == 6
    assert "not a regular file" in capsys.readouterr().err
    assert place.is_fifo()


def test_notes_without_an_end_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["card", "test_resnet.digits", "--notes", "/dev/zero"]) == 2
    assert "--notes /dev/zero: more than" in capsys.readouterr().err
