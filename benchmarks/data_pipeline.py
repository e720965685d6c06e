"""Views per second of the data pipeline alone: this package against the usual loop over PIL images.

    python benchmarks/data_pipeline.py DATA [--workers 2] [--batch 256] [--seconds 20] [--json FILE]

DATA is a local copy of CIFAR-10 (parquet files). Two cases: the 32-pixel images themselves with the views of `cifar10-resnet18`, and
photograph-sized JPEGs made of them (500 x 375, enlarged and noised) with the 224-pixel views of `imagenet100-resnet50`.

`plain` is what torchvision's documentation shows: a map-style data set that decodes one image and applies a `v2.Compose` for each view, in a
DataLoader with that many workers. `ours` is what `rlpjepa train` runs on a CPU with as many workers: small images decoded once, views made
for a whole batch at a time. Both deliver normalised float32 batches to the main process. `for a GPU` is what it runs on a machine with a GPU:
the workers decode and crop; the rest is done on the device and is not measured. The kinds take turns of a few seconds each; compare the
ratios of the medians.
"""

import io
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import result
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode, v2

import rlpjepa_zoo as rz
from rlpjepa_zoo.data.images import Images
from rlpjepa_zoo.data.loader import Batches, ignore_signals, make_loader
from rlpjepa_zoo.data.memory import decode_to_memory
from rlpjepa_zoo.data.sources import Source, open_source


class Plain(Dataset[torch.Tensor]):
    def __init__(self, encoded: list[bytes], recipe: rz.Recipe) -> None:
        v, size = recipe.views, (recipe.data.image_size, recipe.data.image_size)
        jitter = v2.ColorJitter(v.brightness, v.contrast, v.saturation, v.hue)
        blur = [v2.RandomApply([v2.GaussianBlur(13, (0.1, 2.0))], v.blur)] if v.blur else []
        self.encoded, self.views = encoded, v.count
        self.transform = v2.Compose(
            [v2.RandomResizedCrop(size, v.crop_scale, v.crop_ratio, InterpolationMode.BICUBIC), v2.RandomApply([jitter], v.jitter),
             v2.RandomGrayscale(v.grayscale), *blur, v2.RandomSolarize(128, v.solarize), v2.RandomHorizontalFlip(v.flip), v2.ToImage(),
             v2.ToDtype(torch.float32, scale=True), v2.Normalize(recipe.data.mean, recipe.data.std)]
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, i: int) -> torch.Tensor:
        image = Image.open(io.BytesIO(self.encoded[i])).convert("RGB")
        return torch.stack([self.transform(image) for _ in range(self.views)])


def plain(encoded: list[bytes], recipe: rz.Recipe) -> Iterator[Any]:
    options: dict[str, Any] = {"batch_size": recipe.train.batch_size, "shuffle": True, "drop_last": True, "worker_init_fn": ignore_signals}
    loader = DataLoader(Plain(encoded, recipe), num_workers=recipe.train.num_workers, prefetch_factor=4, persistent_workers=True, **options)
    while True:
        yield from loader


def ours(encoded: list[bytes], recipe: rz.Recipe, finish: bool = True) -> Iterator[Any]:
    train = decode_to_memory(Images(encoded.__getitem__, range(len(encoded))), recipe.data.cache_gb * 2**30)
    with Batches(make_loader(Source(train, None, len(encoded), 0), recipe, range(10**6), finish=finish)) as batches:
        while True:
            yield batches.next()


def photographs(small: list[bytes], n: int) -> list[bytes]:
    rng, made = np.random.default_rng(0), []
    for data in small[:n]:
        big = np.asarray(Image.open(io.BytesIO(data)).convert("RGB").resize((500, 375), Image.Resampling.BICUBIC), np.float32)
        file = io.BytesIO()
        Image.fromarray(np.clip(big + rng.normal(0, 6, big.shape), 0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
        made.append(file.getvalue())
    return made


def measure(encoded: list[bytes], recipe: rz.Recipe, seconds: float) -> dict[str, Any]:
    kinds: dict[str, Callable[..., Iterator[Any]]] = {"plain": plain, "ours": ours, "for a GPU": partial(ours, finish=False)}
    rates: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(3):
        for name, kind in kinds.items():
            batches = kind(encoded, recipe)
            for _ in range(2 * recipe.train.num_workers + 1):  # workers started, queues full
                next(batches)
            started, count = time.perf_counter(), 0
            while time.perf_counter() - started < seconds / 9:
                next(batches)
                count += 1
            rates[name].append(count * recipe.train.batch_size * recipe.views.count / (time.perf_counter() - started))
            batches.close()  # type: ignore[attr-defined]
            print(f"{name}: {rates[name][-1]:.0f} views a second", flush=True)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "views_per_second": {name: [round(v) for v in values] for name, values in rates.items()},
        "ratio": {name: round(value / medians["plain"], 2) for name, value in medians.items() if name != "plain"},
    }


def main() -> None:
    parser = result.parser(__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=60)
    options = parser.parse_args()
    torch.set_num_threads(1)
    more = [f"train.num_workers={options.workers}"]
    cifar = rz.Recipe.load("cifar10-resnet18", [*more, f"train.batch_size={options.batch}", f"data.path={options.data}"])
    source = open_source(cifar.data).images
    small = [source._read(i) for i in range(options.images)]
    large = rz.Recipe.load("imagenet100-resnet50", [*more, "train.batch_size=64"])
    figures = {
        "cifar10": measure(small, cifar, options.seconds),
        "photographs": measure(
            photographs(small, 1000), large.model_copy(update={"data": large.data.model_copy(update={"cache_gb": 0.0})}), options.seconds
        ),
    }
    flags = f"--workers {options.workers} --batch {options.batch} --images {options.images} --seconds {options.seconds:g}"
    result.tell(f"python benchmarks/data_pipeline.py DATA {flags}", figures, f"{options.workers} workers", options.json)


if __name__ == "__main__":
    main()
