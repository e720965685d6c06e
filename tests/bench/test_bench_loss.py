"""`rlpjepa bench loss`: all contenders estimate the same distance; time and memory are measured as documented."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlpjepa_zoo.bench.loss import (
    matching_term,
    minimal_example,
    optimal_transport,
    peak_memory,
    plain_torch,
    scaling,
    states,
    timed,
)  # fmt: skip
from rlpjepa_zoo.cli import app as cli

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "contender", [plain_torch, optimal_transport, lambda n: matching_term("random", n), lambda n: matching_term("hadamard", n)]
)
def test_contenders_estimate_the_distance_of_the_minimal_example(contender: Callable[[int], Callable[[Tensor], Tensor] | None]) -> None:
    loss = contender(128)
    if loss is None:
        pytest.skip("not installed")
    z = torch.stack([states(32, 64)["near"][0]] * 2)
    values = torch.tensor([[float(of(z)) for _ in range(60)] for of in (loss, minimal_example(128))])
    error = (values.var(1) / 60).sum().sqrt()
    assert float((values[0] - values[1]).mean().abs()) < 4 * float(error)


def test_peak_memory_counts_tensors_held_at_once() -> None:
    def work() -> None:
        for _ in range(3):
            a = torch.zeros(250_000)
            del a
        b, c = torch.zeros(500_000), torch.zeros(125_000)
        del b, c

    assert peak_memory(work) == pytest.approx(2_500_000, rel=0.01)


def test_functions_are_timed_alternately_after_a_warm_up() -> None:
    calls: list[str] = []
    seconds = timed({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert (
        len(calls) == 8
        and all(set(calls[i : i + 2]) == {"a", "b"} for i in range(0, 8, 2))
        and {name: len(taken) for name, taken in seconds.items()} == {"a": 3, "b": 3}
    )


def test_command_prints_a_table_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.json"
    assert cli.run(["bench", "loss", "--batch", "16", "--dim", "64", "--directions", "128", "--repeats", "1", "--out", str(out)]) == 0
    printed, comparison = capsys.readouterr().out, json.loads(out.read_text())
    assert {"minimal example", "plain torch", "random", "hadamard", "hadamard, equal error near"} <= set(comparison["rows"])
    assert all(row["seconds"][1] <= row["seconds"][0] <= row["seconds"][2] and row["bytes"] > 0 for row in comparison["rows"].values())
    assert comparison["rows"]["minimal example"]["faster"] == 1 and set(comparison["gradient_error"]) == {"early", "near", "matched"}
    assert all(error["seen"] < 1.2 * error["random"] for error in comparison["gradient_error"].values())
    assert len(re.findall(r"^\| ", printed, re.M)) == 1 + len(comparison["rows"]) + len(comparison["others"])
    assert comparison["asked"]["n"] == 128 and comparison["versions"]["torch"] == torch.__version__.split("+")[0]


def test_bench_without_a_command_is_that_of_the_loss(capsys: pytest.CaptureFixture[str]) -> None:
    tiny = ["--batch", "8", "--dim", "16", "--directions", "32", "--repeats", "1"]
    assert cli.run(["bench", *tiny]) == 0 and "| hadamard |" in capsys.readouterr().out
    assert cli.run(["bench", "--batch", "8", "loss"]) == 2
    assert "options stand behind the command, as in `rlpjepa bench loss --json`" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--batch", "--dim", "--directions", "--repeats"])
def test_sizes_beyond_any_machine_are_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", "loss", option, "9" * 30]) == 2
    assert f"Invalid value for '{option}'" in capsys.readouterr().err


def test_scaling_measures_every_size_and_ranks() -> None:
    rows = scaling(1, sweeps={"directions": (32, 64), "dim": (64,), "batch": (8,)})
    assert {(row["sweep"], row["family"]) for row in rows} == {
        (s, f) for s in ("directions", "dim", "batch", "ranks") for f in ("random", "hadamard")
    }
    assert [row["directions"] for row in rows if row["sweep"] == "ranks" and row["family"] == "random"] == [2048, 1024, 512, 256]


@pytest.mark.slow
def test_bench_writes_no_lines_of_the_profiler() -> None:
    """As a process, because the profiler's own log goes past sys.stderr."""
    tiny = ["--batch", "8", "--dim", "16", "--directions", "32", "--repeats", "1"]
    ended = subprocess.run([sys.executable, "-m", "rlpjepa_zoo", "bench", *tiny], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert "| hadamard |" in ended.stdout and ended.stderr == ""
