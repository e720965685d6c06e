"""Show that a change of the code's structure changes no number and no published byte.

    python tools/same_numbers.py record OLD --cifar10 DIR            # in the checkout before the change
    python tools/same_numbers.py record NEW --cifar10 DIR --before OLD   # in the checkout after it
    python tools/same_numbers.py compare OLD NEW

`record` runs 20 seeded steps of `digits` and `cifar10-cpu` and 22 of a fine-tune, and keeps every logged number and the sha256 of every
tensor of the last checkpoint; it saves fixed encoders and keeps the sha256 of every file. With `--before` it also resumes a checkpoint
that the old code wrote, and loads and saves again a classifier and an encoder that the old code published. `compare` prints what differs
and exits with 1 if anything does. One thread, so that sums have one order.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STEPS = {
    "digits": ("train", "digits", ["train.epochs=4", "optim.warmup_epochs=1", "probe.every_epochs=1", "train.keep=9"]),
    "cifar10-cpu": ("train", "cifar10-cpu", ["train.epochs=1", "data.limit=5120", "probe.bank=500", "probe.eval_images=500"]),
    "finetune-digits": ("finetune", "finetune-digits", ["train.epochs=2", "classifier.linear_epochs=1", "optim.warmup_epochs=1"]),
}
TIMES = {"images_per_second"}


def command(*words: str) -> None:
    """Run the command line of this checkout."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "rlpjepa_zoo", *words], check=True, env=environment, stdout=subprocess.DEVNULL)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def numbers(run: Path) -> list[dict[str, Any]]:
    """Every row of metrics.jsonl without what depends on the clock."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def weights(run: Path) -> dict[str, str]:
    """sha256 of every tensor of the newest checkpoint."""
    from safetensors.numpy import load_file

    newest = max((run / "checkpoints").glob("step-*"))
    found = {}
    for file in sorted(newest.glob("*.safetensors")):
        for name, array in load_file(file).items():
            found[f"{file.name}:{name}"] = hashlib.sha256(array.tobytes()).hexdigest()
    return found


def folder(path: Path) -> dict[str, str]:
    return {file.name: sha256(file) for file in sorted(path.iterdir())}


def saved(out: Path, before: Path) -> dict[str, Any]:
    """sha256 of the files that fixed encoders, and a classifier and an encoder published by the old code, are saved as."""
    import torch

    import rlpjepa_zoo as rz

    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for name, options in (
        ("test_resnet", {"dim": 16}),
        ("test_vit", {"dim": 16, "img_size": 32, "patch_size": 4}),
        ("resnet10_small_narrow", {}),
    ):
        torch.manual_seed(0)
        encoder = rz.create_encoder(name, hidden_dim=24, **options).eval()
        found[f"save {name}"] = folder(encoder.save_pretrained(out / name))
        found[f"save {name} with a budget"] = folder(encoder.with_budget(4).save_pretrained(out / f"{name}.top4"))
    for name in rz.list_encoders():
        found[f"load and save {name}"] = folder(rz.load_encoder(name).save_pretrained(out / name))
    found["load and save format 1"] = folder(rz.load_encoder(ROOT / "tests/frozen/format1").save_pretrained(out / "format1"))
    found["load and save format 3"] = folder(rz.load_encoder(before / "saved/test_vit.top4").save_pretrained(out / "format3"))
    found["load and save a trained encoder"] = folder(rz.load_encoder(before / "digits").save_pretrained(out / "encoder"))
    found["load and save a classifier"] = folder(rz.load_classifier(before / "finetune-digits").save_pretrained(out / "classifier"))
    return found


def record(out: Path, cifar10: Path, before: Path | None) -> None:
    out.mkdir(parents=True)
    found: dict[str, Any] = {}
    for name, (kind, recipe, overrides) in STEPS.items():
        data = [f"data.path={cifar10}"] if name.startswith("cifar10") else []
        command(kind, recipe, *overrides, *data, "train.log_every=1", "--out", str(out / name), "--quiet")
        found[f"steps of {name}"], found[f"weights of {name}"] = numbers(out / name), weights(out / name)
    halfway = out / "resumed"
    shutil.copytree((before or out) / "digits", halfway)
    for checkpoint in (halfway / "checkpoints").glob("step-*"):
        if checkpoint.name > "step-00000010":
            shutil.rmtree(checkpoint)
    command("train", "digits", *STEPS["digits"][2], "train.log_every=1", "--out", str(halfway), "--resume", "--quiet")
    found["resumed steps"], found["weights resumed"] = numbers(halfway), weights(halfway)
    sys.path.insert(0, str(ROOT))
    found |= saved(out / "saved", before or out)
    (out / "numbers.json").write_text(json.dumps(found, indent=1) + "\n")


def compare(old: Path, new: Path) -> int:
    a, b = (json.loads((path / "numbers.json").read_text()) for path in (old, new))
    wrong = 0
    for name in sorted(a.keys() | b.keys()):
        same = a.get(name) == b.get(name)
        wrong += not same
        print(f"{'equal  ' if same else 'DIFFERS'}  {name} ({len(a.get(name, ()))} values)")
        if not same and isinstance(a.get(name), dict) and isinstance(b.get(name), dict):
            print("         ", sorted(k for k in a[name].keys() | b[name].keys() if a[name].get(k) != b[name].get(k))[:8])
    return 1 if wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    actions = parser.add_subparsers(dest="action", required=True)
    one = actions.add_parser("record")
    one.add_argument("out", type=Path)
    one.add_argument("--cifar10", type=Path, required=True)
    one.add_argument("--before", type=Path)
    two = actions.add_parser("compare")
    two.add_argument("old", type=Path)
    two.add_argument("new", type=Path)
    options = parser.parse_args()
    if options.action == "compare":
        return compare(options.old, options.new)
    record(options.out.resolve(), options.cifar10.resolve(), options.before and options.before.resolve())
    return 0


if __name__ == "__main__":
    sys.exit(main())
