"""One pretraining step, side by side: this package against the loop that the paper's minimal example describes.

    python benchmarks/training_step.py [--batch 256] [--directions 8192] [--repeats 3] [--json FILE]

Both train a ResNet-18 with the 3x3 stem and a 3-layer rectified projector (512, 512) on the same random images of 32 pixels, two views,
with the same number of fresh random directions and LARS; data loading is left out. Steps alternate within one process, so a busy machine
slows both; the figure to trust is the ratio of the medians.

`plain` is written from the method's description: float32, a pass for each view, a target sample for each view, autograd through
`torch.sort` along the batch. `ours` is what `rlpjepa train` runs: bfloat16 autocast, channels_last, both views in one pass, one target, the
loss of `rlpjepa_zoo.objectives.rectified_lpjepa`; once with as many random directions, once with the fewest `hadamard` ones that give their gradient error.
"""

import statistics
import time
from collections.abc import Callable

import result
import torch
import torch.nn.functional as F
from torch import Tensor

import rlpjepa_zoo as rz
from rlpjepa_zoo.ops.gradient_noise import directions_needed, gradient_error, matched
from rlpjepa_zoo.training.optim import build_optimizer
from rlpjepa_zoo.training.tasks.pretrain import param_groups


def plain(count: int, recipe: rz.Recipe) -> Callable[[Tensor], float]:
    encoder = rz.create_encoder("resnet18_small", dim=512, hidden_dim=512).train()
    optimizer = build_optimizer(recipe.optim.name, param_groups(encoder, None, recipe), recipe.optim)
    scale = rz.sigma_gn(1.0)

    def distance(z: Tensor, c: Tensor) -> Tensor:
        y = torch.relu(torch.distributions.Laplace(0.0, scale).sample(z.shape))
        return (torch.sort(z @ c.T, dim=0).values - torch.sort(y @ c.T, dim=0).values).square().mean()

    def step(views: Tensor) -> float:
        a, b = encoder(views[0]), encoder(views[1])
        c = F.normalize(torch.randn(count, a.shape[1]), dim=1)
        loss = 25 * F.mse_loss(a, b) + 125 * (distance(a, c) + distance(b, c)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def ours(family: str, count: int, recipe: rz.Recipe) -> Callable[[Tensor], float]:
    encoder = rz.create_encoder("resnet18_small", dim=512, hidden_dim=512).train().to(memory_format=torch.channels_last)
    optimizer = build_optimizer(recipe.optim.name, param_groups(encoder, None, recipe), recipe.optim)
    objective = rz.RectifiedLpJEPALoss(rz.RectifiedGeneralizedGaussian(0.0, rz.sigma_gn(1.0), 1.0), 25, 125, family, count)
    steps = iter(range(1 << 30))

    def step(views: Tensor) -> float:
        with torch.autocast("cpu", torch.bfloat16):
            z = encoder(views.flatten(0, 1).contiguous(memory_format=torch.channels_last)).unflatten(0, views.shape[:2])
        terms = objective(z, next(steps))
        optimizer.zero_grad(set_to_none=True)
        terms.total.backward()
        optimizer.step()
        return terms.total.item()

    return step


def main() -> None:
    parser = result.parser(__doc__)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--directions", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.manual_seed(0)
    recipe = rz.Recipe.load("cifar10-resnet18", [f"train.batch_size={options.batch}"])
    sample = matched(rz.RectifiedGeneralizedGaussian(0.0, rz.sigma_gn(1.0), 1.0), options.batch, 512)
    enough = directions_needed("hadamard", gradient_error("random", options.directions, *sample, seed=1), *sample)
    loops = {
        "plain": plain(options.directions, recipe), "ours": ours("random", options.directions, recipe),
        "ours, equal gradient error": ours("hadamard", enough, recipe),
    }  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for repeat in range(options.repeats + 1):  # the first is warm-up
        views = torch.randn(2, options.batch, 3, 32, 32)
        for name, step in loops.items():
            started = time.perf_counter()
            loss = step(views)
            if repeat:
                seconds[name].append(time.perf_counter() - started)
            print(f"{name}: loss {loss:.3f}, {time.perf_counter() - started:.2f} s", flush=True)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    found = {
        "seconds": {name: [round(v, 3) for v in values] for name, values in seconds.items()},
        "images_per_second": {name: round(options.batch / value, 1) for name, value in medians.items()},
        "ratio": round(medians["plain"] / medians["ours"], 2),
        "ratio at equal gradient error": round(medians["plain"] / medians["ours, equal gradient error"], 2),
        "hadamard directions": enough,
    }
    flags = f"--batch {options.batch} --directions {options.directions} --repeats {options.repeats}"
    result.tell(f"python benchmarks/training_step.py {flags}", found, f"{torch.get_num_threads()} threads", options.json)


if __name__ == "__main__":
    main()
