"""The density asked for and the one measured: each density trained freely, and held by annealing and one shift of all biases.

    python benchmarks/density.py RECIPE [SECTION.KEY=VALUE ...] [--density 0.5 0.1 ...] [--arm NAME "KEY=VALUE ..."] [--seeds 3]
        [--other PARQUET_FOLDER] [--bank N] [--json FILE]

Each encoder is evaluated on the images that its recipe holds out: density, dead and always active dimensions, 1-NN and kNN by cosine and a linear probe
on z, with N training images. Its density is also measured on images of another kind. A parquet folder that has only training images is split first:
a fifth of its rows, drawn with seed 0, is held out. Rows in FILE are kept, so a command that was stopped goes on.
"""

import json
import statistics
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import result

import rlpjepa_zoo as rz
from rlpjepa_zoo.config.pretrain import Recipe
from rlpjepa_zoo.data.sources import open_images, open_source
from rlpjepa_zoo.evaluation.evaluate import evaluate

DENSITIES = (0.5, 0.25, 0.1, 0.05, 0.03, 0.01)
ARMS = {"free": [], "held": ["target.anneal=0.6", "target.hold=true"]}
MEASURES = {
    "l0": "measured",
    "dead": "dead",
    "precision_at_1_z": "1-NN",
    "knn_z": "kNN",
    "linear_z": "linear",
    "knn_features": "kNN features",
}
MOST_OTHER = 2000


def split_folder(folder: Path, into: Path) -> None:
    """The rows of a parquet folder as two files, one in five of them for evaluation."""
    table = pa.concat_tables([pq.read_table(file) for file in sorted(folder.glob("*.parquet"))])
    order = np.random.default_rng(0).permutation(len(table))
    held_out = len(table) // 5
    for name, rows in (("test", order[:held_out]), ("train", order[held_out:])):
        pq.write_table(table.take(pa.array(rows)), into / f"{name}.parquet")


def measured(recipe: Recipe, other: Path | None, bank: int) -> dict[str, Any]:
    """Train and evaluate one encoder."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        encoder = rz.load_encoder(str(rz.train(recipe, Path(folder) / "run", progress=False)))
        seconds = time.perf_counter() - started
    source = open_source(recipe.data, recipe.seed)
    held_out = source.eval
    if held_out is None:
        raise SystemExit("no evaluation images: give data.eval_split, or a parquet folder")
    found = evaluate(encoder, source.train, held_out, limit=bank, probes=("retrieval", "knn", "linear"), with_pixels=False, seeds=1)
    z = encoder.embed(held_out.take(range(min(len(held_out), MOST_OTHER))))
    rates = np.bincount(z.indices, minlength=z.dim) / len(z)
    values = {name: round(found[key], 4) for key, name in MEASURES.items()}
    values |= {"always on": float((rates == 1).mean()), "largest rate": round(float(rates.max()), 4), "seconds": round(seconds, 1)}
    if other is not None:
        far = encoder.embed([row.read() for row in islice(open_images(sorted(other.glob("*.parquet"))[:1]).rows(), MOST_OTHER)])
        values |= {
            "measured on other images": round(far.l0, 4),
            "dead on other images": round(1 - len(np.unique(far.indices)) / far.dim, 4),
        }
    return values | {"law": round(recipe.target.density_in_theory(), 4), "n_test": len(held_out), "n_bank": found["n_train"]}  # type: ignore[union-attr]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: mean over seeds, and the standard deviation of the density."""
    columns = ("law", "measured", "measured on other images", "dead", "largest rate", "1-NN", "kNN", "linear")
    lines = [f"| asked | arm | n | {' | '.join(columns)} |", "|" + "---|" * (len(columns) + 3)]
    for asked, arm in dict.fromkeys((row["asked"], row["arm"]) for row in sorted(rows, key=lambda row: -row["asked"])):
        of = [row for row in rows if (row["asked"], row["arm"]) == (asked, arm)]
        cells = []
        for column in columns:
            values = [row[column] for row in of if column in row]
            spread = f" ± {statistics.stdev(values):.3f}" if column == "measured" and len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}" if values else "")
        lines.append(f"| {asked:g} | {arm} | {len(of)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = result.parser(__doc__)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--density", type=float, nargs="+", default=DENSITIES)
    parser.add_argument("--arm", nargs=2, action="append", metavar=("NAME", "OVERRIDES"), help="instead of free and held")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--other", type=Path, help="parquet folder with images of another kind")
    parser.add_argument("--bank", type=int, default=10_000)
    options = parser.parse_args()
    arms = {name: text.split() for name, text in options.arm} if options.arm else ARMS
    earlier = json.loads(options.json.read_text()) if options.json and options.json.exists() else {"rows": []}
    rows: list[dict[str, Any]] = earlier["rows"]
    with tempfile.TemporaryDirectory() as scratch:
        overrides, path = list(options.overrides), Recipe.load(options.recipe, options.overrides).data.path
        if path and list(Path(path).glob("train*.parquet")) and not list(Path(path).glob("test*.parquet")):
            split_folder(Path(path), Path(scratch))
            overrides += [f"data.path={scratch}", "data.eval_split=test"]
        for seed in range(options.seeds):
            for density in options.density:
                for arm, more in arms.items():
                    if any((row["asked"], row["arm"], row["seed"]) == (density, arm, seed) for row in rows):
                        continue
                    recipe = Recipe.load(options.recipe, [*overrides, f"target.density={density}", f"seed={seed}", *more])
                    rows.append({"asked": density, "arm": arm, "seed": seed} | measured(recipe, options.other, options.bank))
                    found = {"overrides": [text for text in options.overrides if "path" not in text], "arms": arms, "rows": rows}
                    command = f"python benchmarks/density.py {options.recipe} --seeds {options.seeds}"
                    result.tell(command, found, "1 thread", options.json)
    print(table(rows))


if __name__ == "__main__":
    main()
