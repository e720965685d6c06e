"""Memory of tensors on a CPU, side by side: as glibc gives it, and inside `rlpjepa_zoo.ops.memory.reused_memory`.

    python benchmarks/memory.py [--repeats 5] [--json FILE]

`forward`: one batch through a frozen backbone, as `embed` and evaluations do. `step`: forward and backward of a training step in bf16. Both take turns;
the figures are processor seconds of the process (user and system), so other processes on the machine hardly change them. The part of the system is what
the kernel takes, nearly all of it to map and to zero pages.
"""

import resource
import statistics
from collections.abc import Callable
from typing import Any

import result
import timm
import torch

import rlpjepa_zoo.resnet  # noqa: F401 - registers the small-image ResNets
from rlpjepa_zoo.ops.memory import reused_memory

CPU = torch.device("cpu")
FORWARD = {"tf_efficientnet_lite0, 160 pixels": ("tf_efficientnet_lite0", 64, 160), "tf_efficientnet_lite0, 224 pixels": ("tf_efficientnet_lite0", 32, 224),
           "resnet18, 224 pixels": ("resnet18", 32, 224)}  # fmt: skip
STEPS = {
    "resnet18_small_narrow, 32 pixels": ("resnet18_small_narrow", 512, 32),
    "resnet18_small_narrow, 16 pixels": ("resnet18_small_narrow", 512, 16),
}


def batch(name: str, count: int, size: int) -> tuple[Any, torch.Tensor]:
    """A network with random weights, and images for it, in channels_last."""
    model = timm.create_model(name, num_classes=0).to(memory_format=torch.channels_last)
    return model, torch.randn(count, 3, size, size).contiguous(memory_format=torch.channels_last)


def forward(name: str, count: int, size: int) -> Callable[[], None]:
    model, x = batch(name, count, size)
    model.eval()

    def run() -> None:
        with torch.inference_mode():
            model(x)

    return run


def step(name: str, count: int, size: int) -> Callable[[], None]:
    model, x = batch(name, count, size)
    model.train()

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        y.float().square().mean().backward()
        model.zero_grad(set_to_none=True)

    return run


def seconds(run: Callable[[], None]) -> tuple[float, float]:
    """Processor seconds of one call: all, and those of the system."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    run()
    after = resource.getrusage(resource.RUSAGE_SELF)
    system = after.ru_stime - before.ru_stime
    return after.ru_utime - before.ru_utime + system, system


def compare(run: Callable[[], None], repeats: int) -> dict[str, Any]:
    """Medians of both kinds, and how many times as fast the second is."""
    plain, reused = list[tuple[float, float]](), list[tuple[float, float]]()
    for _ in range(repeats):
        run()
        plain.append(seconds(run))
        with reused_memory(CPU):
            run()  # takes the memory that the next call uses again
            reused.append(seconds(run))
    medians = {
        name: [round(statistics.median(column), 4) for column in zip(*values, strict=True)]
        for name, values in (("plain", plain), ("reused", reused))
    }
    return {"seconds, of which system": medians, "ratio": round(medians["plain"][0] / medians["reused"][0], 3)}


def main() -> None:
    parser = result.parser(__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(0)
    found = {
        "forward": {name: compare(forward(*values), options.repeats) for name, values in FORWARD.items()},
        "step": {name: compare(step(*values), options.repeats) for name, values in STEPS.items()},
    }
    result.tell(f"python benchmarks/memory.py --repeats {options.repeats}", found, f"{torch.get_num_threads()} threads", options.json)


if __name__ == "__main__":
    main()
