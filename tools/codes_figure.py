"""The picture and tables of docs/codes.md: accuracy of sparse codes against their number of values, and densities asked and measured.

    python tools/codes_figure.py            # draws docs/measured/codes.png and rewrites the tables, from benchmarks/{codes,density}-*.json

Results are made with `rlpjepa bench codes RECIPE ... --out benchmarks/codes-DATA.json` and `python benchmarks/density.py RECIPE ... --json benchmarks/density-DATA.json`.
"""

import importlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlpjepa_zoo.bench.measures import DENSE
from rlpjepa_zoo.bench.tables import codes_table, means

ROOT = Path(__file__).resolve().parent.parent
OURS = "#0b7a99"
TRAINED = {"csr": "#c8553d", "csrv2": "#d98e32", "topk_sae": "#8a6fb0", "ncl": "#4f8a5b"}
"""Colours of the other trained methods; those without training are grey."""
GREY = "#8a97a6"


def reports(folder: Path = ROOT / "benchmarks") -> dict[str, dict[str, Any]]:
    """Results by the name of their file."""
    return {path.stem.removeprefix("codes-"): json.loads(path.read_text()) for path in sorted(folder.glob("codes-*.json"))}


def density_section(folder: Path = ROOT / "benchmarks") -> str:
    """Markdown between the markers of the densities."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        table = importlib.import_module("density").table
    finally:
        sys.path.pop(0)
    parts = []
    for path in sorted(folder.glob("density-*.json")):
        found = json.loads(path.read_text())
        sizes = "{n_train:,} training and {n_test:,} test images".format(**found["rows"][0])
        arms = ", ".join(f"{name} `{' '.join(more)}`" if more else f"{name} as the recipe" for name, more in found["arms"].items())
        other = f"; other images: {found['other']}" if found.get("other") else ""
        about = f"`{found['command']}`; {sizes}{other}; {found['machine']}, torch {found['versions']['torch']}."
        parts += [f"**{path.stem.removeprefix('density-')}**: {arms}. {about}", table(found["rows"])]
    return "\n" + "\n\n".join(parts or ["Nothing is recorded yet."]) + "\n"


def section(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown between the markers of the page."""
    if not found:
        return "\nNothing is recorded yet.\n"
    parts = []
    for report in found.values():
        about = f"`{report['command']}`; {report['machine']}, torch {report['versions']['torch']}, timm {report['versions']['timm']}."
        parts += [f"### {report['data']}, {report['backbone']}", about, codes_table(report, methods=False)]
    return "\n" + "\n\n".join(parts) + "\n"


def apart(heights: Sequence[float], gap: float) -> list[float]:
    """Heights moved so that neighbours are at least `gap` apart, in the same order, around the same middle."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    groups: list[tuple[float, list[int]]] = []
    for i in order:
        groups.append((heights[i], [i]))
        while len(groups) > 1 and groups[-1][0] - groups[-2][0] < gap * (len(groups[-1][1]) + len(groups[-2][1])) / 2:
            (high, above), (low, below) = groups.pop(), groups.pop()
            groups.append(((high * len(above) + low * len(below)) / (len(above) + len(below)), below + above))
    moved = [0.0] * len(heights)
    for middle, members in groups:
        for place, i in enumerate(members):
            moved[i] = middle + gap * (place - (len(members) - 1) / 2)
    return moved


def panel(axis: Any, report: Mapping[str, Any], measure: str = "one_nn") -> None:
    """One data set: a line for each method, its name at the right end; dotted, the dense features."""
    ends: list[tuple[str, str, float, float]] = []
    for name, of in means(report, measure).items():
        points = [(int(k), value) for k, value in of.items() if k != "all"]
        color = OURS if name == "ours" else TRAINED.get(name, GREY)
        if points:
            k, values = zip(*points, strict=True)
            style = {"lw": 2.8, "ms": 5.5, "zorder": 3} if name == "ours" else {"lw": 1.2, "ms": 3, "zorder": 2}
            axis.plot(k, values, color=color, marker="o", **style)
            ends.append((name, color, k[-1], values[-1]))
        if name == DENSE and "all" in of:
            axis.axhline(of["all"], color="black", ls=":", lw=1)
            where = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
            axis.annotate("dense features", (0, of["all"]), (4, 4), fontsize=8, **where)
    low, high = axis.get_ylim()
    most = max(end[2] for end in ends)
    heights = apart([end[3] for end in ends], 0.062 * (high - low))
    outside = max(0.0, max(heights) - high) or min(0.0, min(heights) - low)
    for (name, color, k, value), height in zip(ends, (height - outside for height in heights), strict=True):
        leader = {"arrowstyle": "-", "color": color, "lw": 0.6, "shrinkA": 1, "shrinkB": 4, "relpos": (0, 0.5)}
        look = {"fontsize": 9, "color": color, "weight": "bold" if name == "ours" else "normal", "va": "center"}
        axis.annotate(name, (k, value), (most * 1.4, height), arrowprops=leader, annotation_clip=False, **look)
    ticks = report["asked"]["k"]
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [str(k) for k in ticks])
    axis.minorticks_off()
    axis.set(title=f"{report['data']}, {report['backbone']}", xlabel="values of a code, k")
    axis.spines[["top", "right"]].set_visible(False)


def draw(found: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(found), figsize=(5.4 * len(found), 4.6), squeeze=False, layout="constrained")
    for axis, report in zip(axes[0], found.values(), strict=True):
        panel(axis, report)
    axes[0, 0].set_ylabel("1-NN accuracy")
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main() -> None:
    found, page = reports(), ROOT / "docs/codes.md"
    if found:
        draw(found, ROOT / "docs/measured/codes.png")
    text = page.read_text()
    for name, content in (("codes", section(found)), ("density", density_section())):
        text = re.sub(
            rf"(<!-- {name}: .*? -->\n).*?(<!-- end of {name} -->)", lambda m, content=content: m[1] + content + m[2], text, flags=re.S
        )
    page.write_text(text)


if __name__ == "__main__":
    main()
