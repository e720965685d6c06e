"""The density asked for and the one measured: each density trained freely, and held by one shift of all biases.

    python benchmarks/density.py RECIPE [SECTION.KEY=VALUE ...] [--density 0.5 0.1 ...] [--arm NAME "KEY=VALUE ..."] [--seeds 3] [--other PARQUET_FOLDER]
        [--limit N] [--json FILE]
    python benchmarks/density.py --table FILE

Each encoder is measured on the images that its recipe holds out (for a recipe with cached views and no test images, on a random fifth): density, dead units,
1-NN, kNN and retrieval by cosine, a linear probe, and 1-NN with only the k largest values. Its density is also measured on images of another kind.
Recipes with cached views train on features that are computed once, as `rlpjepa bench codes` does. Rows in FILE are kept, so a command that was stopped goes on;
the versions, recipe, arms, limit and other images must be the same.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import result
import torch
from torch import Tensor

import rlpjepa_zoo as rz
from rlpjepa_zoo.bench.features import load_features
from rlpjepa_zoo.bench.machine import shown_command
from rlpjepa_zoo.bench.measures import densities, measure
from rlpjepa_zoo.bench.methods import METHODS
from rlpjepa_zoo.config.pretrain import Recipe
from rlpjepa_zoo.core import package, rng
from rlpjepa_zoo.data.sources import open_images, open_source
from rlpjepa_zoo.evaluation.encoding import encode
from rlpjepa_zoo.models.encoder import SparseEncoder
from rlpjepa_zoo.sparse.topk import keep_largest

DENSITIES = (0.5, 0.25, 0.1, 0.05, 0.03, 0.01)
ARMS = {"free": ["target.hold=false"], "held": ["target.hold=true"]}
CUTS = (4, 8, 16, 32)
MOST = 2000
"""Images of another kind."""

Split = tuple[Tensor, Tensor, Tensor, Tensor]
"""z and labels of training and test images."""
Codes = Callable[[Recipe], tuple[Split, Tensor | None]]
"""Trains by a recipe; returns z and labels of training and test images, and z of images of another kind."""


def of_other(encoder: SparseEncoder, folder: Path | None) -> tuple[Tensor, Tensor] | None:
    """Features and z of images of another kind."""
    if folder is None:
        return None
    images = [row.read() for row in islice(open_images(sorted(folder.glob("*.parquet"))[:1]).rows(), MOST)]
    with torch.no_grad(), encoder.evaluating():
        blocks = [torch.stack([encoder.transform(image) for image in images[i : i + 64]]) for i in range(0, len(images), 64)]
        outputs = [encoder.both(block) for block in blocks]
    return torch.cat([out.features for out in outputs]), torch.cat([out.z for out in outputs])


def sample(n: int, limit: int) -> Tensor:
    """Indices of at most `limit` of n images, drawn at random."""
    return torch.randperm(n, generator=rng.generator(0, "bank"))[:limit].sort().values


def by_training(other: Path | None, limit: int) -> Codes:
    """Complete runs."""

    def codes(recipe: Recipe) -> tuple[Split, Tensor | None]:
        source = open_source(recipe.data, recipe.seed)
        if source.eval is None:
            raise SystemExit("no evaluation images: give data.eval_split")
        with tempfile.TemporaryDirectory() as folder:
            encoder = rz.load_encoder(str(rz.train(recipe, Path(folder) / "run", progress=False)))
        bank = source.images.take(sample(len(source.images), limit).numpy())
        (_, z, y), (_, test_z, test_y) = encode(encoder, bank), encode(encoder, source.eval)
        far = of_other(encoder, other)
        return (z, y, test_z, test_y), far and far[1]

    return codes


def on_features(recipe: Recipe, other: Path | None, limit: int) -> Codes:
    """Projectors on features that are computed once."""
    resolved, features = load_features(recipe, progress=True)
    far = of_other(features.encoder, other)

    def codes(recipe: Recipe) -> tuple[Split, Tensor | None]:
        recipe = recipe.model_copy(update={"data": resolved.data})
        method = METHODS["ours"](recipe, torch.device("cpu"))
        method.fit(features, None)
        z, test_z = (method.codes(rows, None) for rows in (features.train, features.test))
        kept = sample(len(z), limit)
        return (z[kept], features.train_labels[kept], test_z, features.test_labels), far and method.codes(far[0], None)

    return codes


def measured(recipe: Recipe, train: Codes) -> dict[str, Any]:
    """The row of one run."""
    started = time.perf_counter()
    (z, y, test_z, test_y), far = train(recipe)
    row: dict[str, Any] = {"seconds": round(time.perf_counter() - started, 1), "n_train": len(z), "n_test": len(test_z)}
    row |= {"law": round(recipe.target.density_in_theory(), 5)} if recipe.target else {}
    row |= densities(z, test_z) | {"always_on": round(float((test_z > 0).all(0).float().mean()), 4)}
    row |= {name: round(value, 5) for name, value in measure(z, y, test_z, test_y, linear=True).values.items()}
    for k in CUTS:
        cut = measure(keep_largest(z, k), y, keep_largest(test_z, k), test_y, linear=False).values
        row |= {f"one_nn@{k}": round(cut["one_nn"], 5)}
    if far is not None:
        row |= {f"{name}_other": value for name, value in densities(far, far).items()}
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: mean over seeds, and the standard deviation of the density."""
    columns = {
        "law": "law", "l0": "measured", "l0_other": "on other images", "dead": "dead", "max_rate": "largest rate", "one_nn": "1-NN", "knn": "kNN",
        "linear": "linear", **{f"one_nn@{k}": f"1-NN, k = {k}" for k in CUTS},
    }  # fmt: skip
    lines = [f"| asked | arm | n | {' | '.join(columns.values())} |", "|" + "---|" * (len(columns) + 3)]
    for asked, arm in dict.fromkeys((row["asked"], row["arm"]) for row in sorted(rows, key=lambda row: -row["asked"])):
        of = [row for row in rows if (row["asked"], row["arm"]) == (asked, arm)]
        cells = []
        for column in columns:
            values = [row[column] for row in of if column in row]
            spread = f" ± {statistics.stdev(values):.3f}" if column in ("l0", "one_nn", "linear") and len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}" if values else "")
        lines.append(f"| {asked:g} | {arm} | {len(of)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def recorded(path: Path | None, about: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of an earlier command, which must have trained and measured in the same way."""
    if path is None or not path.exists():
        return []
    found = json.loads(path.read_text())
    if wrong := [key for key, value in about.items() if found.get(key) != value]:
        raise SystemExit(f"--json: {path} has rows of another {' and '.join(wrong)}; give another file")
    rows: list[dict[str, Any]] = found["rows"]
    return rows


def main() -> None:
    parser = result.parser(__doc__)
    parser.add_argument("recipe", nargs="?")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--density", type=float, nargs="+", default=DENSITIES)
    parser.add_argument("--arm", nargs=2, action="append", metavar=("NAME", "OVERRIDES"), help="instead of free and held")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--other", type=Path, help="parquet folder with images of another kind")
    parser.add_argument("--limit", type=int, default=10_000, help="training images that vote and train the probe")
    parser.add_argument("--table", type=Path, help="print the table of this file")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(options.table.read_text())["rows"]))
        return
    arms = {name: text.split() for name, text in options.arm} if options.arm else ARMS
    base = Recipe.load(options.recipe, options.overrides)
    about = {
        "versions": package.versions(),
        "recipe": base.shareable(),
        "arms": arms,
        "limit": options.limit,
        "other": options.other and options.other.name,
    }
    rows = recorded(options.json, about)
    train = (
        by_training(options.other, options.limit) if base.encoder.cached_views is None else on_features(base, options.other, options.limit)
    )
    for seed in range(options.seeds):
        for density in options.density:
            for arm, more in arms.items():
                if any((row["asked"], row["arm"], row["seed"]) == (density, arm, seed) for row in rows):
                    continue
                recipe = Recipe.load(options.recipe, [*options.overrides, f"target.density={density}", f"seed={seed}", *more])
                rows.append({"asked": density, "arm": arm, "seed": seed} | measured(recipe, train))
                command = shown_command(["python", "benchmarks/density.py", *sys.argv[1:]])
                result.tell(command, about | {"rows": rows}, f"{torch.get_num_threads()} threads", options.json)
    print(table(rows))


if __name__ == "__main__":
    main()
