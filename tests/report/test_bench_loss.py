"""`rlpjepa bench`: what is compared estimates the same, what is measured is what it says."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlpjepa_zoo.cli import app as cli
from rlpjepa_zoo.report import bench_loss as bench

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "contender", [bench.plain, bench.optimal_transport, lambda n: bench.ours("random", n), lambda n: bench.ours("hadamard", n)]
)
def test_all_contenders_estimate_what_the_minimal_example_does(contender: Callable[[int], Callable[[Tensor], Tensor] | None]) -> None:
    loss = contender(128)
    if loss is None:
        pytest.skip("not installed")
    z = torch.stack([bench.states(32, 64)["near"][0]] * 2)
    values = torch.tensor([[float(of(z)) for _ in range(60)] for of in (loss, bench.minimal(128))])
    error = (values.var(1) / 60).sum().sqrt()
    assert float((values[0] - values[1]).mean().abs()) < 4 * float(error)


def test_peak_memory_is_what_is_held_at_once() -> None:
    def work() -> None:
        for _ in range(3):
            a = torch.zeros(250_000)
            del a
        b, c = torch.zeros(500_000), torch.zeros(125_000)
        del b, c

    assert bench.peak_memory(work) == pytest.approx(2_500_000, rel=0.01)


def test_work_is_timed_by_turns_after_a_warm_up() -> None:
    calls: list[str] = []
    seconds = bench.timed({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert (
        len(calls) == 8
        and all(set(calls[i : i + 2]) == {"a", "b"} for i in range(0, 8, 2))
        and {name: len(taken) for name, taken in seconds.items()} == {"a": 3, "b": 3}
    )


def test_the_command_prints_a_table_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.json"
    assert cli.run(["bench", "--batch", "16", "--dim", "64", "--directions", "128", "--repeats", "1", "--out", str(out)]) == 0
    printed, found = capsys.readouterr().out, json.loads(out.read_text())
    assert {"minimal example", "plain torch", "random", "hadamard", "hadamard, equal error near"} <= set(found["rows"])
    assert all(row["seconds"][1] <= row["seconds"][0] <= row["seconds"][2] and row["bytes"] > 0 for row in found["rows"].values())
    assert found["rows"]["minimal example"]["faster"] == 1 and set(found["gradient_error"]) == {"early", "near", "matched"}
    assert all(error["seen"] < 1.2 * error["random"] for error in found["gradient_error"].values())
    assert len(re.findall(r"^\| ", printed, re.M)) == 1 + len(found["rows"]) + len(found["others"])
    assert found["asked"]["n"] == 128 and found["versions"]["torch"] == torch.__version__.split("+")[0]


def test_growth_is_measured_for_every_size_and_for_ranks() -> None:
    rows = bench.scaling(1, sweeps={"directions": (32, 64), "dim": (64,), "batch": (8,)})
    assert {(row["sweep"], row["family"]) for row in rows} == {
        (s, f) for s in ("directions", "dim", "batch", "ranks") for f in ("random", "hadamard")
    }
    assert [row["directions"] for row in rows if row["sweep"] == "ranks" and row["family"] == "random"] == [2048, 1024, 512, 256]
