"""Does the family of directions change what is learned? Arms that train for the same wall time, seed by seed.

    python benchmarks/directions.py RECIPE [SECTION.KEY=VALUE ...] --arm random:8192 --arm hadamard:4608 [--seeds 3] [--json FILE]

A training step of every arm is timed first, by turns in one process; the first arm trains for the epochs of the recipe, the others for as many as take the same
time. Then each arm trains with each seed, and its encoder is evaluated on the evaluation images (kNN, linear probe, 1-shot on z and on features; density). Differences to
the first arm are paired by seed: mean and standard error over seeds.
"""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import result
import torch

import rlpjepa_zoo as rz
from rlpjepa_zoo.bench.loss import timed
from rlpjepa_zoo.config.pretrain import Recipe
from rlpjepa_zoo.data.sources import open_source
from rlpjepa_zoo.evaluation.evaluate import evaluate
from rlpjepa_zoo.training.optim import build_optimizer
from rlpjepa_zoo.training.tasks.encoders import build_encoder
from rlpjepa_zoo.training.tasks.pretrain import build_objective, param_groups

MEASURES = ("knn_z", "linear_z", "one_shot_z", "knn_features", "linear_features", "one_shot_features", "l0")


def resolved(options: Any, arm: str, *more: str) -> Recipe:
    kind, _, count = arm.partition(":")
    return Recipe.load(options.recipe, [*options.overrides, f"objective.directions={kind}", f"objective.num_directions={count}", *more])


def step_seconds(options: Any) -> dict[str, float]:
    """Median seconds of a step of each arm: forward, loss, backward, optimiser."""
    steps = {}
    for arm in options.arm:
        recipe = resolved(options, arm)
        encoder, objective = build_encoder(recipe).train().to(memory_format=torch.channels_last), build_objective(recipe)
        optimizer = build_optimizer(recipe.optim.name, param_groups(encoder, None, recipe), recipe.optim)
        views = torch.randn(2 * recipe.train.batch_size, 3, recipe.data.image_size, recipe.data.image_size).to(
            memory_format=torch.channels_last
        )

        def step(
            recipe: Recipe = recipe, encoder: Any = encoder, objective: Any = objective, optimizer: Any = optimizer, views: Any = views
        ) -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=recipe.train.precision == "bf16"):
                z = encoder(views)
            objective(z.unflatten(0, (2, -1)), 0).total.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        steps[arm] = step
    return {arm: statistics.median(taken) for arm, taken in timed(steps, 11).items()}


def trained(options: Any, arm: str, epochs: float, seed: int) -> dict[str, Any]:
    recipe = resolved(options, arm, f"train.epochs={epochs}", f"seed={seed}")
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        encoder = rz.load_encoder(str(rz.train(recipe, Path(folder) / "run", progress=False)))
        seconds = time.perf_counter() - started
        source = open_source(recipe.data)
        found = evaluate(
            encoder, source.train, source.eval, limit=options.bank, probes=("knn", "linear", "few_shot"), shots=(1,), with_pixels=False
        )
    return {"arm": arm, "seed": seed, "epochs": round(epochs, 2), "seconds": round(seconds, 1)} | {m: round(found[m], 4) for m in MEASURES}


def summary(rows: list[dict[str, Any]], arms: list[str]) -> dict[str, Any]:
    """Means by arm, and paired differences to the first with their standard errors."""
    of = {arm: [row for row in rows if row["arm"] == arm] for arm in arms}
    found: dict[str, Any] = {}
    for arm in arms:
        found[arm] = {"n": len(of[arm]), "seconds": round(statistics.mean(row["seconds"] for row in of[arm]), 1)}
        for measure in MEASURES:
            values, base = ([row[measure] for row in of[a]] for a in (arm, arms[0]))
            found[arm][measure] = round(statistics.mean(values), 4)
            if arm != arms[0] and len(values) > 1:
                differences = [a - b for a, b in zip(values, base, strict=True)]
                error = statistics.stdev(differences) / len(differences) ** 0.5
                found[arm][f"{measure}, difference"] = [round(statistics.mean(differences), 4), round(error, 4)]
    return found


def main() -> None:
    parser = result.parser(__doc__)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--arm", action="append", help="FAMILY:NUMBER; the first is what the others are compared with")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--bank", type=int, help="training images of the evaluation, at most")
    options = parser.parse_intermixed_args()
    options.arm = options.arm or ["random:8192", "hadamard:auto"]
    seconds = step_seconds(options)
    epochs = {arm: resolved(options, arm).train.epochs * seconds[options.arm[0]] / seconds[arm] for arm in options.arm}
    rows = []
    for seed in range(options.seeds):
        for arm in options.arm:
            rows.append(trained(options, arm, epochs[arm], seed))
            print(rows[-1], flush=True)
    steps = {arm: round(value, 4) for arm, value in seconds.items()}
    found = {"step_seconds": steps, "summary": summary(rows, options.arm), "rows": rows}
    arms = " ".join(f"--arm {arm}" for arm in options.arm)
    words = [word for word in options.overrides if not word.startswith("data.path")]
    bank = [] if options.bank is None else [f"--bank {options.bank}"]
    command = " ".join(["python benchmarks/directions.py", options.recipe, *words, arms, f"--seeds {options.seeds}", *bank])
    result.tell(command, found, f"{torch.get_num_threads()} threads", options.json)


if __name__ == "__main__":
    main()
