"""Float32 products are full float32 inside the context, and the process's setting is restored."""

import subprocess
import sys
import threading

import pytest
import torch

from rlpjepa_zoo.ops.directions import directions
from rlpjepa_zoo.ops.precision import full_float32
from rlpjepa_zoo.ops.sliced_wasserstein import sliced_wasserstein

PLACES = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)


def test_products_are_full_float32_inside_and_restored_after() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        allowed = [place.fp32_precision for place in PLACES]
        with full_float32(), full_float32():
            assert [place.fp32_precision for place in PLACES] == ["ieee", "ieee"]
        assert [place.fp32_precision for place in PLACES] == allowed and torch.get_float32_matmul_precision() == "medium"
        with pytest.raises(KeyError), full_float32():
            raise KeyError
        assert [place.fp32_precision for place in PLACES] == allowed
    finally:
        torch.set_float32_matmul_precision(before)


def test_concurrent_threads_restore_the_precision() -> None:
    before = torch.get_float32_matmul_precision()
    z, y, c = torch.rand(16, 8), torch.rand(16, 8), directions("random", 8, 8, torch.Generator().manual_seed(0))
    try:
        torch.set_float32_matmul_precision("high")
        threads = [threading.Thread(target=lambda: [sliced_wasserstein(z, y, c) for _ in range(60)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before)


def test_inherited_precision_stays_inherited() -> None:
    code = """
import torch
from rlpjepa_zoo.ops.precision import full_float32
torch.backends.fp32_precision = "tf32"
with full_float32():
    print(torch.backends.cuda.matmul.fp32_precision)
torch.backends.fp32_precision = "ieee"
print(torch.backends.cuda.matmul.fp32_precision)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["ieee", "ieee"]
