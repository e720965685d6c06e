"""What the pretraining recipes cost: views, steps, multiply-accumulates, memory, disk and hours; the tables of docs/cost.md.

    python tools/cost.py                # prints the tables, from benchmarks/cost.json
    python tools/cost.py --write        # counts again; writes benchmarks/cost.json and docs/cost.md
    python tools/cost.py --run DIR      # hours at the speed that a run of yours has logged in DIR/metrics.jsonl

Nothing is trained. Multiply-accumulates and memory are counted on tensors without values; docs/cost.md has the formulas. Recipes whose number of images is
not known (those of your own images) or whose backbone is frozen are left out.
"""

import argparse
import json
import math
import re
import statistics
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from rlpjepa_zoo.config.finetune import load_any
from rlpjepa_zoo.config.load import list_recipes
from rlpjepa_zoo.config.pretrain import Recipe
from rlpjepa_zoo.core import package
from rlpjepa_zoo.hub import zoo
from rlpjepa_zoo.hub.folder import read_folder
from rlpjepa_zoo.models.encoder import SparseEncoder
from rlpjepa_zoo.training.optim import OPTIMIZERS
from rlpjepa_zoo.training.run_dir import read_run
from rlpjepa_zoo.training.tasks.encoders import build_encoder

ROOT = Path(__file__).resolve().parent.parent
PAGE, COUNTS = ROOT / "docs/cost.md", ROOT / "benchmarks/cost.json"
IMAGES = {"digits": 1437, "cifar10": 50_000, "cifar100": 50_000, "imagenet100": 126_689, "imagenet1k": 1_281_167, "celeba": 162_770}
"""Training images, by the first word of the name of a recipe."""
PASSES = 3
"""A step costs about three forward passes: backward computes the gradients of the activations and of the weights."""
FLOPS = 2 * PASSES
"""Floating-point operations of a step for each multiply-accumulate of the forward pass."""
CHUNK = 4096
"""Directions that the loss processes at once on a GPU (rlpjepa_zoo.ops.sliced_wasserstein)."""


class Speed(NamedTuple):
    """A training speed that somebody has measured."""

    model: str
    per_second: float
    """Images of 224 pixels in a second, forward, backward and update."""
    macs: float
    """Of one image."""

    @property
    def flops(self) -> float:
        """Floating-point operations in a second that this speed makes of a step."""
        return FLOPS * self.macs * self.per_second


RTX3090 = {
    "resnet18_small": Speed("resnet18", 3481.78, 1.814073344e9),
    "resnet50": Speed("resnet50", 1218.01, 4.089184256e9),
    "vit_small_patch16_224": Speed("vit_small_patch16_224", 1057.92, 4.598882304e9),
    "convnext_small": Speed("convnext_small", 487.15, 8.683712256e9),
}
"""Backbone -> what timm has measured for it or its relative, with AMP and channels_last: results/benchmark-train-amp-nhwc-pt112-cu113-rtx3090.csv of
huggingface/pytorch-image-models at 5e7d47c. Multiply-accumulates are counted here, with 1000 classes."""
PAPER_HOURS = 55
"""ResNet-50 on ImageNet-100 on one L40S in appendix L of the paper: 2 days and 7 hours, as a note on the paper quotes it."""


# --- counting -----------------------------------------------------------------------------------------------------------------------


def recipes() -> dict[str, Recipe]:
    """The recipes of the tables, by name."""
    loaded = {name: load_any(name) for name in list_recipes() if name.split("-")[0] in IMAGES}
    return {name: recipe for name, recipe in loaded.items() if isinstance(recipe, Recipe) and not recipe.encoder.freeze_backbone}


def images_of(recipe: Recipe) -> int:
    return IMAGES[recipe.name.split("-")[0]]


def skeleton(recipe: Recipe) -> SparseEncoder:
    """The encoder of a recipe, without values."""
    with torch.device("meta"):
        return build_encoder(recipe).train()


def macs_per_view(recipe: Recipe) -> int:
    """Multiply-accumulates of the convolutions and matrix products of one view, projector included; the mean over epochs if views grow."""
    encoder, full = skeleton(recipe), recipe.data.image_size or 0
    epochs = range(1 if recipe.views.start_size is None else math.ceil(recipe.train.epochs))
    sizes = Counter(recipe.views.size_at(epoch, recipe.train.epochs, full) for epoch in epochs)
    counts = []
    for size, times in sizes.items():
        with FlopCounterMode(display=False) as counter:
            encoder.both(torch.zeros(2, 3, size, size, device="meta"))
        counts += [counter.get_total_flops() // 4] * times
    return sum(counts) // len(counts)


def saved_bytes(encoder: SparseEncoder, size: int, views: int) -> int:
    """Bytes that autograd keeps for the backward pass of some views in bf16 autocast, parameters left out.

    Hooks see each kept tensor; views of one storage count once. The tensors are fake ones of the CPU: its attention keeps no matrix of weights, as the
    fused kernels of a GPU do not.
    """
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True):
        _without_values(encoder)
        own = {parameter.untyped_storage()._cdata for parameter in encoder.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
            encoder.both(torch.zeros(views, 3, size, size))
    return sum(storage.nbytes() for name, storage in kept.items() if name not in own)


def _without_values(encoder: SparseEncoder) -> None:
    """Replace parameters and buffers, in place, by fake tensors of the CPU."""
    for module in encoder.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def activation_bytes(recipe: Recipe) -> int:
    """Bytes that the backward pass needs of each view: what eight more views add."""
    size = recipe.data.image_size
    return (saved_bytes(skeleton(recipe), size, 16) - saved_bytes(skeleton(recipe), size, 8)) // 8


def memory(recipe: Recipe, parameters: int, activations: int) -> dict[str, int]:
    """Bytes on the GPU by their use."""
    views, batch, dim, size = recipe.views.count, recipe.train.batch_size, recipe.encoder.dim, recipe.data.image_size or 0
    moments = OPTIMIZERS[recipe.optim.name].moments
    directions = recipe.objective.num_directions if isinstance(recipe.objective.num_directions, int) else CHUNK
    return {
        "weights": 4 * parameters,
        "gradients": 4 * parameters,
        "optimiser": 4 * moments * parameters,
        "bf16 copies of the weights": 2 * parameters,
        "activations": views * batch * activations,
        "images and views": 2 * 4 * views * batch * 3 * size**2,
        "loss": 4 * (10 * min(CHUNK, directions) * views * batch + directions * dim + 4 * views * batch * dim),
    }


def count(recipe: Recipe) -> dict[str, Any]:
    """All counts of a recipe."""
    encoder, images = skeleton(recipe), images_of(recipe)
    parameters = sum(p.numel() for p in encoder.parameters())
    steps, per_epoch = recipe.steps(images)
    activations = activation_bytes(recipe)
    held = 4 * parameters * (1 + OPTIMIZERS[recipe.optim.name].moments)
    return {
        "backbone": recipe.encoder.backbone, "images": images, "epochs": recipe.train.epochs, "steps": steps,
        "views": steps * recipe.train.batch_size * recipe.views.count, "macs per view": macs_per_view(recipe), "parameters": parameters,
        "activation bytes per view": activations, "memory": memory(recipe, parameters, activations), "checkpoint bytes": held,
        "disk bytes": (recipe.train.keep + 1) * held + 4 * parameters,
    }  # fmt: skip


# --- hours --------------------------------------------------------------------------------------------------------------------------


def cpu_flops() -> tuple[float, str]:
    """Floating-point operations in a second that the ResNet-18 of benchmarks/training_step.json makes on two CPU threads, and its machine."""
    found = json.loads((ROOT / "benchmarks/training_step.json").read_text())
    small = Recipe.load("cifar10-resnet18", ["encoder.args={}"])
    return FLOPS * macs_per_view(small) * 2 * found["images_per_second"]["ours"], found["machine"]


def hours(row: Mapping[str, Any], flops: float) -> float:
    """Hours of a run at a number of floating-point operations in a second."""
    return float(row["views"] * FLOPS * row["macs per view"] / flops / 3600)


def measured_hours() -> dict[str, tuple[float, str]]:
    """Hours and machine of the runs behind the encoders of the zoo, by recipe."""
    infos = [read_folder(ROOT / "hub" / name).info for name in zoo.list_encoders()]
    return {info["recipe"]: (info["training"]["minutes"] / 60, info["training"]["hardware"]) for info in infos if info.get("training")}


def gpu_hours(row: Mapping[str, Any]) -> float | None:
    """Estimated hours on an RTX 3090; None for a backbone without a measured relative."""
    speed = RTX3090.get(row["backbone"])
    return None if speed is None else hours(row, speed.flops)


# --- tables -------------------------------------------------------------------------------------------------------------------------


def short(value: float) -> str:
    """Two digits, or all before the point."""
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def span(hours: float) -> str:
    """A time in minutes, hours or days."""
    return f"{short(60 * hours)} minutes" if hours < 1 else f"{short(hours)} hours" if hours < 100 else f"{short(hours / 24)} days"


def size_table(found: Mapping[str, Any]) -> str:
    """What is counted."""
    lines = [
        "| recipe | training images | epochs | steps | views, millions | GMAC per view | parameters, millions | GPU memory, GB | of that activations | disk, GB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in found["recipes"].items():
        lines.append(
            f"| `{name}` | {row['images']:,} | {row['epochs']:g} | {row['steps']:,} | {short(row['views'] / 1e6)} | {row['macs per view'] / 1e9:.2g} "
            f"| {row['parameters'] / 1e6:.1f} | {short(sum(row['memory'].values()) / 1e9)} | {short(row['memory']['activations'] / 1e9)} "
            f"| {short(row['disk bytes'] / 1e9)} |"
        )
    return "\n".join(lines) + "\n"


def hours_table(found: Mapping[str, Any]) -> str:
    """What is estimated; the two recipes behind encoders of the zoo are measured."""
    measured = measured_hours()
    lines = ["| recipe | RTX 3090, estimate | from the speed of | two CPU threads, at least |", "|---|---|---|---|"]
    for name, row in found["recipes"].items():
        gpu, speed = gpu_hours(row), RTX3090.get(row["backbone"])
        cpu = f"{span(measured[name][0])} (measured)" if name in measured else span(hours(row, found["cpu"]["flops"]))
        lines.append(f"| `{name}` | {'-' if gpu is None else span(gpu)} | {'-' if speed is None else f'`{speed.model}`'} | {cpu} |")
    return "\n".join(lines) + "\n"


def sections(found: Mapping[str, Any]) -> dict[str, str]:
    """Generated text of docs/cost.md, by the name in its markers."""
    return {"sizes": size_table(found), "hours": hours_table(found), "speeds": speeds_text(found)}


def speeds_text(found: Mapping[str, Any]) -> str:
    """The measured speeds behind the estimates, and checks of them."""
    speeds = "; ".join(f"`{s.model}` {s.per_second:,.0f} images, {s.flops / 1e12:.0f} tera operations" for s in RTX3090.values())
    rows, cpu = found["recipes"], found["cpu"]
    resnet, small, took = rows["imagenet100-resnet50"], rows["cifar10-cpu"], measured_hours()["cifar10-cpu"]
    estimate, paper = gpu_hours(resnet) or 0, FLOPS * resnet["macs per view"] * resnet["views"] / PAPER_HOURS / 3600
    loading = json.loads((ROOT / "benchmarks/data_pipeline.json").read_text())["photographs"]["views_per_second"]["for a GPU"]
    return (
        f"- RTX 3090, in a second: {speeds}.\n"
        f"- Two CPU threads, in a second: {cpu['images per second']:g} images, two views each, of the ResNet-18 of `benchmarks/training_step.json`, "
        f"{cpu['flops'] / 1e12:.2f} tera operations ({cpu['machine']}).\n"
        f"- Check of the first: the paper reports {PAPER_HOURS} hours for `imagenet100-resnet50` on one L40S (appendix L, as a note on the paper quotes it). "
        f"That is {paper / 1e12:.0f} tera operations a second. The estimate for an RTX 3090 is {span(estimate)}.\n"
        f"- Check of the second: the estimate for `cifar10-cpu` is {span(hours(small, cpu['flops']))}; the run took {span(took[0])} ({took[1]}). Small networks "
        "make fewer operations a second, and a run also loads images, draws views and evaluates.\n"
        f"- Loading: the estimate for `imagenet100-resnet50` needs {resnet['views'] / estimate / 3600:,.0f} views a second. Two workers made "
        f"{statistics.median(loading):,.0f} of photographs of 500 x 375 pixels (`benchmarks/data_pipeline.json`).\n"
    )


def counted() -> dict[str, Any]:
    """Contents of benchmarks/cost.json."""
    flops, machine = cpu_flops()
    speed = json.loads((ROOT / "benchmarks/training_step.json").read_text())["images_per_second"]["ours"]
    return {
        "command": "python tools/cost.py --write", "recipes": {name: count(recipe) for name, recipe in recipes().items()},
        "cpu": {"flops": flops, "machine": machine, "images per second": speed}, "versions": package.versions(),
    }  # fmt: skip


def write(found: Mapping[str, Any]) -> None:
    """Write benchmarks/cost.json, and the tables into docs/cost.md between their markers."""
    COUNTS.write_text(json.dumps(found, indent=1) + "\n")
    text = PAGE.read_text()
    for name, content in sections(found).items():
        text = re.sub(
            rf"(<!-- {name}: .*? -->\n).*?(<!-- end of {name} -->)", lambda m, content=content: m[1] + content + m[2], text, flags=re.S
        )
    PAGE.write_text(text)


def of_run(run: Path, found: Mapping[str, Any]) -> str:
    """Times of all recipes at the speed of a run: that of its own recipe as measured, if network and batch are those of the recipe; the others by their
    multiply-accumulates."""
    files = read_run(run)
    speeds = files.series("images_per_second", "train")[1][1:]  # the first row has the start of the workers in it
    recipe = files.recipe
    if not speeds or not isinstance(recipe, Recipe):
        sys.exit(f"{run}: no pretraining run with two logged rows; train at least 2 * train.log_every = {2 * recipe.train.log_every} steps")
    if recipe.views.start_size is not None:
        sys.exit(f"{run}: its views grow, so the speed of its first steps is not that of the run")
    speed = statistics.median(speeds)
    macs = macs_per_view(recipe)
    flops = FLOPS * macs * recipe.views.count * speed
    where = files.info.get("training", {}).get("hardware", "this machine")
    lines = [
        f"{recipe.name} on {where}: {speed:,.1f} images a second, loading and views included (median of {len(speeds)} rows); {flops / 1e12:.3g} tera operations.",
        "The row of this recipe is its length at this speed. Estimates are for the same operations a second, with another network or batch.",
        "", "| recipe | time | |", "|---|---|---|",
    ]  # fmt: skip
    for name, row in found["recipes"].items():
        same = (
            name == recipe.name
            and macs == row["macs per view"]
            and recipe.train.batch_size * row["steps"] * recipe.views.count == row["views"]
        )
        lines.append(f"| `{name}` | {span(hours(row, flops))} | {'at the measured speed' if same else 'estimate'} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="count again, and write benchmarks/cost.json and docs/cost.md")
    parser.add_argument("--run", type=Path, help="folder of a pretraining run whose speed is used")
    options = parser.parse_args()
    if options.write:
        write(counted())
    found = json.loads(COUNTS.read_text())
    print(of_run(options.run, found) if options.run else "\n".join(sections(found).values()), end="")


if __name__ == "__main__":
    main()
