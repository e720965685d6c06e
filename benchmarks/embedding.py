"""Embedding, side by side: this package against a bare forward loop, and against the usual script from images to a file; and its memory.

    python benchmarks/embedding.py DATA [--images 5000] [--repeats 3] [--skip-memory] [--json FILE]

DATA is a local copy of CIFAR-10 (parquet files).

`forward`: the same preprocessed batch in memory through the bare timm backbone (`model(x)`, results dropped), and through `enc.embed`, which
also projects, checks, and keeps sparse rows; least, median and largest seconds. Batches
lie in memory as the usual stacking leaves them; `bare, channels_last` is the bare loop
with the memory format that `embed` uses.

`end to end`: from the parquet file of images to a parquet file of sparse embeddings. `plain` is what one writes in an hour: a Hugging Face
data set, PIL, timm's own evaluation transform, a DataLoader with two workers, the encoder, and a loop over rows that collects the non-zero
values into a pandas frame. `ours` is `rlpjepa_zoo.embedding.extract.extract`. Both with the encoder `test_resnet.digits` (whose network is small, so
that what is around it shows) and with `resnet10_small_narrow.cifar10`.

`memory`: largest resident memory of a process that embeds 10,000 and 100,000 images (CIFAR-10 twice over), each in a process of its own.

All take turns; the figures to trust are the ratios of the medians.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import result
import timm
import torch

import rlpjepa_zoo as rz
from rlpjepa_zoo.data.sources import open_images
from rlpjepa_zoo.embedding.extract import Extraction, extract


def turns(kinds: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each kind, turn by turn, after one turn that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for turn in range(repeats + 1):
        for name, kind in kinds.items():
            started = time.perf_counter()
            kind()
            if turn:
                seconds[name].append(round(time.perf_counter() - started, 3))
    return seconds


def ratios(seconds: dict[str, list[float]], ours: str) -> dict[str, float]:
    """How many times as fast as each other kind ours is."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {f"{ours} to {name}": round(medians[name] / medians[ours], 3) for name in seconds if name != ours}


def forward(turns_of_a_batch: int = 24) -> dict[str, Any]:
    """Batch by batch, the kinds in turn, so that what disturbs the machine disturbs all of them; the ratio is the median over batches."""
    found = {}
    for name, size, batch in (("resnet18", 224, 32), ("resnet18_small", 32, 128)):
        enc = rz.create_encoder(name, dim=512).eval()
        x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
        kinds = {
            "bare": lambda enc=enc, x=x: enc.backbone(x),
            "bare, channels_last": lambda enc=enc, x=x: enc.backbone(x.contiguous(memory_format=torch.channels_last)),
            "embed": lambda enc=enc, x=x, batch=batch: enc.embed(x, batch_size=batch),
        }
        with torch.inference_mode():
            seconds = turns(kinds, turns_of_a_batch)
        pairs = {other: [a / b for a, b in zip(seconds[other], seconds["embed"], strict=True)] for other in kinds if other != "embed"}
        found[f"{name}, {size} pixels"] = {
            "batch": batch, "seconds": {kind: [min(v), statistics.median(v), max(v)] for kind, v in seconds.items()},
            "ratio": {f"embed to {other}": round(statistics.median(values), 3) for other, values in pairs.items()},
        }  # fmt: skip
    return found


class Plain(torch.utils.data.Dataset[torch.Tensor]):
    def __init__(self, path: Path, transform: Any) -> None:
        import datasets

        self.rows, self.transform = datasets.Dataset.from_parquet(str(path)), transform

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.transform(self.rows[i]["image"].convert("RGB"))


@torch.inference_mode()
def plain(enc: rz.SparseEncoder, path: Path, out: Path) -> None:
    transform = timm.data.create_transform(**enc.config.preprocess.data_config(), is_training=False)
    rows = []
    for x in torch.utils.data.DataLoader(Plain(path, transform), batch_size=256, num_workers=2):
        for z in enc(x):
            active = z.nonzero().flatten()
            rows.append({"id": len(rows), "indices": active.numpy().astype(np.int16), "values": z[active].numpy()})
    pandas.DataFrame(rows).to_parquet(out)


def end_to_end(path: Path, repeats: int) -> dict[str, Any]:
    found = {}
    for name in ("test_resnet.digits", "resnet10_small_narrow.cifar10"):
        enc = rz.load_encoder(name)
        with tempfile.TemporaryDirectory() as scratch:
            plain_file, folder = Path(scratch) / "plain.parquet", Path(scratch) / "ours"
            kinds = {
                "plain": lambda enc=enc, out=plain_file: plain(enc, path, out),
                "ours": lambda enc=enc, out=folder: extract(enc, open_images(path), out, Extraction(), overwrite=True),
            }
            seconds = turns(kinds, repeats)
            e = rz.SparseEmbeddings.load(folder)
            mine = pandas.read_parquet(plain_file)
            same = np.mean([np.array_equal(a, one.indices) for a, one in zip(mine["indices"], e, strict=True)])
        found[name] = {
            "images": len(e),
            "rows with the same active dimensions": float(same),
            "seconds": seconds,
            "ratio": ratios(seconds, "ours"),
        }
    return found


def memory(train: Path) -> dict[str, Any]:
    """Each measured in a process of its own, on files of 10,000 images."""
    peaks = {}
    with tempfile.TemporaryDirectory() as scratch:
        rows = pq.read_table(train)
        for i in range(5):
            pq.write_table(rows.slice(10_000 * i, 10_000), Path(scratch) / f"{i}.parquet", row_group_size=1000)
        del rows
        pa.default_memory_pool().release_unused()
        for files in (1, 10):
            names = [str(Path(scratch) / f"{i % 5}.parquet") for i in range(files)]
            done = subprocess.run(
                [sys.executable, __file__, "--one", str(Path(scratch) / f"out{files}"), *names], capture_output=True, text=True, check=True
            )
            peaks[f"{files * 10_000} images"] = json.loads(done.stdout.splitlines()[-1])
    few, many = (found["MB"] for found in peaks.values())
    return {"encoder": "test_resnet.digits", **peaks, "ratio": round(many / few, 4)}


def one(out: str, names: list[str]) -> None:
    found = extract(rz.load_encoder("test_resnet.digits"), open_images(names), out, Extraction(num_workers=2))
    peak = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")
    )  # ru_maxrss counts the parent's
    print(json.dumps({"rows": found["rows"], "MB": round(int(peak.split()[1]) / 1024, 1)}))


def main() -> None:
    if "--one" in sys.argv:
        one(sys.argv[2], sys.argv[3:])
        return
    parser = result.parser(__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--skip-memory", action="store_true")
    options = parser.parse_args()
    train = next(options.data.glob("train*.parquet"))
    found: dict[str, Any] = {"forward": forward()}
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "images.parquet"
        pq.write_table(pq.read_table(train).slice(0, options.images), path, row_group_size=1000)
        found["end to end"] = end_to_end(path, options.repeats)
    if not options.skip_memory:
        found["memory"] = memory(train)
    flags = f"--images {options.images} --repeats {options.repeats}"
    result.tell(f"python benchmarks/embedding.py DATA {flags}", found, f"{torch.get_num_threads()} threads", options.json)


if __name__ == "__main__":
    main()
