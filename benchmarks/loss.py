"""The loss measured from all sides: speed and memory beside others, noise of the gradient by family and number of directions, growth with every size.

    python benchmarks/loss.py [--repeats 9] [--json benchmarks/loss.json]     # measures, about five minutes on two quiet CPU cores
    python benchmarks/loss.py --draw                                          # only rewrites docs/loss.md and docs/measured/loss.png

The speed table is what `rlpjepa bench loss` prints. The noise study estimates the relative error of the gradient at three states of the embeddings
(see `rlpjepa_zoo.bench.loss.states`). Growth is compared with a model of the cost, t = a + b N D (drawing) + c N B D (projecting) + d N B log2 B (sorting),
fitted with coefficients >= 0; a `hadamard` projection costs the sum of the factors of D instead of D, and draws nothing to speak of.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import result
import torch
from scipy.optimize import nnls

from rlpjepa_zoo.bench.loss import compare, markdown_table, scaling, states
from rlpjepa_zoo.ops.gradient_noise import gradient_error
from rlpjepa_zoo.ops.hadamard import factors

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent / "docs"
FAMILIES = ("random", "orthogonal", "hadamard")
COUNTS = (128, 256, 512, 1024, 2048, 4096, 8192)
COLORS = {"random": "#c8553d", "orthogonal": "#1b2a41", "hadamard": "#2a7f9e"}


def noise(batch: int = 256, dim: int = 512) -> dict[str, dict[str, dict[int, float]]]:
    """Gradient error by state, family and number of directions."""
    return {
        state: {kind: {n: round(gradient_error(kind, n, z, y, seed=n, draws=6), 4) for n in COUNTS} for kind in FAMILIES}
        for state, (z, y) in states(batch, dim).items()
    }


def terms(row: dict[str, Any]) -> list[float]:
    """What each part of the cost grows with."""
    n, b, d = row["directions"], row["batch"], row["dim"]
    if row["family"] == "random":
        return [1, n * d, n * b * d, n * b * math.log2(b)]
    bases = max(n, d) / d  # whole bases are transformed, whatever of them is sorted
    return [1, 0, (bases + 2) * d * b * sum(factors(d)), n * b * math.log2(b)]


def fitted(rows: list[dict[str, Any]]) -> tuple[list[float], float]:
    """Seconds by the model for each row, and the median of |measured / model - 1|."""
    expected = np.zeros(len(rows))
    for family in {row["family"] for row in rows}:
        at = [i for i, row in enumerate(rows) if row["family"] == family]
        seconds = np.array([rows[i]["seconds"][0] for i in at])
        parts = np.array([terms(rows[i]) for i in at])
        scale = parts.max(0).clip(min=1e-30)
        found, _ = nnls(parts / scale / seconds[:, None], np.ones(len(at)))  # relative errors count
        expected[at] = (parts / scale) @ found
    measured = np.array([row["seconds"][0] for row in rows])
    return expected.tolist(), float(np.median(np.abs(measured / expected - 1)))


def draw(found: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter

    figure, axes = plt.subplots(2, 4, figsize=(15, 7), layout="constrained")
    for axis, (state, families) in zip(axes[0], found["noise"].items(), strict=False):
        for kind, errors in families.items():
            axis.loglog(list(map(int, errors)), list(errors.values()), "o-", color=COLORS[kind], label=kind, ms=4)
        axis.axhline(families["random"]["8192"], color="#b8c4d0", lw=1)
        axis.set(title=f"noise of the gradient, {state}", xlabel="directions", ylabel="relative error")
    axes[0, 0].legend(frameon=False)
    rows = found["compared"]["rows"]
    bars = axes[0, 3].barh(list(rows), [1e3 * row["seconds"][0] for row in rows.values()], color="#2a7f9e")
    axes[0, 3].bar_label(
        bars, [f" {value:.0f}" if value > 99 else f" {value:.3g}" for value in (1e3 * row["seconds"][0] for row in rows.values())]
    )
    axes[0, 3].set(title="one step of the loss", xlabel="ms (log)", xscale="log")
    axes[0, 3].invert_yaxis()
    names = {"directions": "directions N", "dim": "width D", "batch": "batch B", "ranks": "ranks W"}
    for axis, (sweep, name) in zip(axes[1], names.items(), strict=True):
        for kind in ("random", "hadamard"):
            points = [
                (row[sweep], row["seconds"], row["expected"]) for row in found["scaling"] if (row["sweep"], row["family"]) == (sweep, kind)
            ]
            x, seconds, expected = zip(*points, strict=True)
            axis.loglog(x, [1e3 * s[0] for s in seconds], "o", color=COLORS[kind], label=kind, ms=5)
            axis.loglog(x, [1e3 * e for e in expected], "-", color=COLORS[kind], lw=1)
        axis.set(title=f"growth with the {name}", xlabel=name, ylabel="ms (lines: model of the cost)")
    axes[1, 0].legend(frameon=False)
    for axis in axes.flat:
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def learned() -> str:
    """What `benchmarks/directions.py` found: means over seeds, and differences to the first arm with their standard errors."""
    names = {"knn_z": "kNN z", "linear_z": "linear z", "one_shot_z": "1-shot z", "linear_features": "linear features", "l0": "density of z"}
    lines = ["| data | directions | ms a step | epochs | " + " | ".join(names.values()) + " |", "|---" * (4 + len(names)) + "|"]
    for data in ("digits", "cifar10"):
        study = json.loads((HERE / f"directions-{data}.json").read_text())
        for arm, means in study["summary"].items():
            cells = [f"{means[m]:.3f}" for m in names]
            for i, measure in enumerate(names):
                if change := means.get(f"{measure}, difference"):
                    cells[i] += f" ({change[0]:+.3f} ± {change[1]:.3f})"
            epochs = next(row["epochs"] for row in study["rows"] if row["arm"] == arm)
            lines.append(
                f"| {data}, n = {means['n']} | {arm} | {1e3 * study['step_seconds'][arm]:.0f} | {epochs:g} | {' | '.join(cells)} |"
            )
    return "\n".join(lines)


def tables(found: dict[str, Any]) -> dict[str, str]:
    """Markdown for docs/loss.md, by the name of its place."""
    lines = ["| state | family | " + " | ".join(map(str, COUNTS)) + " |", "|---" * (2 + len(COUNTS)) + "|"]
    for state, families in found["noise"].items():
        for kind, errors in families.items():
            lines.append(f"| {state} | {kind} | " + " | ".join(f"{errors[str(n)]:.2f}" for n in COUNTS) + " |")
    return {
        "learned": learned(),
        "speed": markdown_table(found["compared"]),
        "noise": "\n".join(lines),
        "growth": f"{found['model_error']:.0%}",
    }


def write(found: dict[str, Any]) -> None:
    draw(found, DOCS / "measured" / "loss.png")
    page = DOCS / "loss.md"
    text = page.read_text()
    for name, content in tables(found).items():
        inline = "\n" not in content
        pattern, edge = rf"(<!-- {name} -->).*?(<!-- /{name} -->)", "" if inline else "\n"
        text = re.sub(pattern, lambda m, c=content, e=edge: f"{m[1]}{e}{c}{e}{m[2]}", text, flags=re.S)
    page.write_text(text)


def main() -> None:
    parser = result.parser(__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--draw", action="store_true", help="measure nothing, draw what benchmarks/loss.json holds")
    options = parser.parse_args()
    if not options.draw:
        compared, rows = compare(repeats=options.repeats), scaling(options.repeats)
        expected, off = fitted(rows)
        growth = [{**row, "expected": float(f"{e:.4g}")} for row, e in zip(rows, expected, strict=True)]
        found = {"compared": compared, "noise": noise(), "scaling": growth, "model_error": round(off, 3)}
        result.tell(f"python benchmarks/loss.py --repeats {options.repeats}", found, f"{torch.get_num_threads()} threads", options.json)
    if options.draw or (options.json and options.json.resolve() == HERE / "loss.json"):
        write(json.loads((HERE / "loss.json").read_text()))


if __name__ == "__main__":
    main()
