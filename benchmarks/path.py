"""Everything else on the path: what a training step consists of, what watching costs, how long starting, loading and saving take.

    python benchmarks/path.py [--cifar10 DIR] [--steps 40] [--json FILE]

Steps are those of a real run of the recipe `cifar10-cpu` (of `digits` without --cifar10), each part timed where it is called; what watches a run (online probes,
logged metrics) is also measured by turns, with and without. Start-up times are of fresh processes; loading is compared with `timm.create_model` and
safetensors alone, by turns in one process.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import result
import timm
import torch
from safetensors.torch import load_file

import rlpjepa_zoo as rz
from rlpjepa_zoo.bench import loss as bench
from rlpjepa_zoo.config.pretrain import Recipe
from rlpjepa_zoo.objectives.rectified_lpjepa import RectifiedLpJEPALoss
from rlpjepa_zoo.training.tasks.encoders import build_encoder
from rlpjepa_zoo.training.tasks.heads import EncoderWithHeads
from rlpjepa_zoo.training.tasks.pretrain import PretrainTask, build_objective
from rlpjepa_zoo.training.trainer import Trainer

PARTS = {
    "waiting for images": (Trainer, "_next"),
    "views and forward": (Trainer, "_forward"),
    "encoder, of that": (EncoderWithHeads, "_both"),
    "online probes and encoder, of that": (EncoderWithHeads, "forward"),
    "loss": (RectifiedLpJEPALoss, "__call__"),
    "update": (Trainer, "_update"),
    "log": (Trainer, "_log_step"),
    "evaluation": (PretrainTask, "evaluate"),
    "checkpoint": (Trainer, "_save"),
    "publication": (Trainer, "_publish"),
}


def anatomy(recipe: Recipe) -> dict[str, Any]:
    """Seconds of each part of a run and how often it was called."""
    spent: dict[str, list[float]] = defaultdict(list)
    originals = {name: getattr(owner, method) for name, (owner, method) in PARTS.items()}

    def timed(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            started = time.perf_counter()
            try:
                return original(*args, **more)
            finally:
                spent[name].append(time.perf_counter() - started)

        return call

    try:
        for name, (owner, method) in PARTS.items():
            setattr(owner, method, timed(name, originals[name]))
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            rz.train(recipe, Path(folder) / "run", progress=False)
            whole = time.perf_counter() - started
    finally:
        for name, (owner, method) in PARTS.items():
            setattr(owner, method, originals[name])
    found = {
        name: {"calls": len(taken), "median": round(statistics.median(taken), 5), "all": round(sum(taken), 3)}
        for name, taken in spent.items()
    }
    return {"seconds": round(whole, 2), "parts": found}


def watching(recipe: Recipe, repeats: int) -> dict[str, Any]:
    """A step with and without online probes, and one with its row of the log beside it, by turns."""
    batch, side = recipe.train.batch_size, recipe.data.image_size
    views, labels = torch.randn(2 * batch, 3, side, side), torch.arange(batch) % 10
    objective = build_objective(recipe)

    def step(classes: int, logged: bool) -> Callable[[], None]:
        watched = EncoderWithHeads(build_encoder(recipe), classes).to(memory_format=torch.channels_last)
        task = PretrainTask(recipe)
        task.objective, task.floor, images = objective, 0.0, views.contiguous(memory_format=torch.channels_last)

        def forward(*inputs: Any) -> Any:
            with torch.autocast("cpu", torch.bfloat16, enabled=recipe.train.precision == "bf16"):
                return watched(*inputs)

        def do() -> None:
            output = task.step(forward, [images], labels, 0)
            output.loss.backward()
            watched.zero_grad(set_to_none=True)
            if logged:
                output.log()

        return do

    seconds = bench.timed({"bare": step(0, False), "probes": step(10, False), "probes and log": step(10, True)}, repeats)
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    every = recipe.train.log_every
    return {
        "seconds": {name: round(value, 4) for name, value in medians.items()},
        "probes, share of a step": round(medians["probes"] / medians["bare"] - 1, 4),
        f"log every {every} steps, share of a step": round((medians["probes and log"] - medians["probes"]) / every / medians["bare"], 4),
    }


def starting(folder: Path, repeats: int) -> dict[str, float]:
    """Median seconds of fresh processes."""
    lines = {
        "python": "pass",
        "rlpjepa --help": "from rlpjepa_zoo.cli.app import run; run(['--help'])",
        "import rlpjepa_zoo": "import rlpjepa_zoo",
        "import torch, timm": "import torch, timm",
        "load_encoder": f"import rlpjepa_zoo; rlpjepa_zoo.load_encoder({str(folder)!r})",
    }
    taken: dict[str, list[float]] = {name: [] for name in lines}
    for _ in range(repeats):
        for name, line in lines.items():
            started = time.perf_counter()
            subprocess.run([sys.executable, "-c", line], check=True, stdout=subprocess.DEVNULL)
            taken[name].append(time.perf_counter() - started)
    return {name: round(statistics.median(values), 3) for name, values in taken.items()}


def loading(folder: Path, architecture: str, repeats: int) -> dict[str, Any]:
    """`load_encoder` (hashes and golden codes checked) against building the backbone with timm and reading its weights, by turns."""

    def bare() -> None:
        timm.create_model(architecture, num_classes=0).load_state_dict(load_file(folder / "model.safetensors"))

    seconds = bench.timed({"load_encoder": lambda: rz.load_encoder(str(folder)), "timm.create_model and weights": bare}, repeats)
    medians = {name: round(statistics.median(taken), 4) for name, taken in seconds.items()}
    return {
        "architecture": architecture,
        "seconds": medians,
        "ratio": round(medians["load_encoder"] / medians["timm.create_model and weights"], 2),
    }


def main() -> None:
    parser = result.parser(__doc__)
    parser.add_argument("--cifar10", help="folder of CIFAR-10's parquet files")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    name, batch = ("cifar10-cpu", 256) if options.cifar10 else ("digits", 128)
    short = [
        f"data.limit={options.steps * batch}",
        f"train.batch_size={batch}",
        "train.epochs=1",
        "optim.warmup_epochs=0.1",
        "probe.eval_images=1000",
    ]
    recipe = Recipe.load(name, [*short, *([f"data.path={options.cifar10}"] if options.cifar10 else [])])
    found: dict[str, Any] = {"recipe": name, "anatomy": anatomy(recipe), "watching": watching(recipe, options.repeats)}
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "encoder"
        rz.create_encoder("resnet18", dim=512, hidden_dim=512).eval().save_pretrained(saved)
        found |= {"starting": starting(saved, options.repeats), "loading": loading(saved, "resnet18", options.repeats)}
    given = " --cifar10 DIR" if options.cifar10 else ""
    result.tell(f"python benchmarks/path.py{given} --steps {options.steps}", found, f"{torch.get_num_threads()} threads", options.json)


if __name__ == "__main__":
    main()
