"""The Triton kernels: their table of cases under the interpreter, and the machine code for GPUs that are not installed."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlpjepa_zoo.ops import triton_sort

CASES = Path(__file__).parent / "kernel_cases.py"
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def run_cases(which: str, **environment: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-m", which, str(CASES)]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_"))}
    done = subprocess.run(command, capture_output=True, text=True, env=inherited | environment)
    assert done.returncode == 0 and "passed" in done.stdout and "skipped" not in done.stdout, done.stdout + done.stderr


@needs_triton
def test_all_cases_pass_under_the_interpreter() -> None:
    run_cases("not slow", TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.slow
def test_slow_cases_pass_under_the_interpreter() -> None:
    run_cases("slow", TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("which", ["not slow", "slow"])
def test_all_cases_pass_on_the_device(which: str) -> None:
    run_cases(which)


# --- machine code ------------------------------------------------------------------------------------------------------------


def compiled(fn, capability: int, config, **constants: int | bool) -> tuple[int, int, str]:  # type: ignore[no-untyped-def]
    """Registers of a thread, bytes of its stack (spills), and the machine code of a kernel for a GPU of `capability`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    pointers, constants = ("projected", "x", "c", "g", "sums"), constants | config.kwargs
    signature = {a: "constexpr" if a in constants else "*fp32" if a in pointers else "i32" for a in fn.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, a in enumerate(fn.arg_names) if a in (*pointers, "batch", "n")}
    built = triton.compile(
        ASTSource(fn, signature, constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": False},
    )
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    binary = Path(os.environ["TRITON_CACHE_DIR"]) / "kernel.cubin"
    binary.write_bytes(built.asm["cubin"])
    usage, sass = (
        subprocess.run([tool, flag, binary], capture_output=True, text=True, check=True).stdout for flag in ("-res-usage", "-sass")
    )
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())  # type: ignore[union-attr]
    return registers, stack, sass


@pytest.fixture
def kernel_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.slow
@needs_triton
def test_kernels_compile_without_a_gpu_and_fit_the_registers(kernel_cache: None) -> None:
    match, project = triton_sort._kernels()
    sizes = {"VIEWS": 2, "WRITE": True, "P": 256, "LOG_P": 8}
    registers, stack, sass = compiled(match.fn, 90, triton_sort._fitting(match.configs, {}, P=256)[0], **sizes)
    assert registers < 128 and stack == 0 and "STL" not in sass
    assert "FFMA" not in sass and sass.count("BAR.SYNC") <= 2  # nothing fused, and one warp sorts a row without waiting
    registers, stack, sass = compiled(project.fn, 90, triton_sort._fitting(project.configs, {}, P=256)[0], **sizes, DIM=512)
    assert registers < 256 and stack == 0 and "FFMA" in sass and "HMMA" not in sass  # float32, no TF32


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("log", range(4, 13))
def test_every_configuration_compiles(kernel_cache: None, capability: int, log: int) -> None:
    for kernel, largest, more in zip(triton_sort._kernels(), (triton_sort.LARGEST, triton_sort.FUSED), ({}, {"DIM": 100}), strict=True):
        spilled = []
        for config in triton_sort._fitting(kernel.configs, {}, P=1 << log) if 1 << log <= largest else []:
            registers, stack, _ = compiled(kernel.fn, capability, config, VIEWS=2, WRITE=True, P=1 << log, LOG_P=log, **more)
            print(f"sm_{capability} {kernel.fn.__name__} P {1 << log} {config}: {registers} registers, {stack} bytes of stack")
            spilled.append(stack)
        assert min(spilled, default=0) <= 128  # the tuner measures; it must have a configuration that keeps to the registers


@needs_triton
@pytest.mark.parametrize("log", range(4, 13))
def test_every_batch_has_a_configuration(log: int) -> None:
    match, project = triton_sort._kernels()
    assert triton_sort._fitting(match.configs, {}, P=1 << log)
    assert 1 << log > triton_sort.FUSED or triton_sort._fitting(project.configs, {}, P=1 << log)


# --- supported inputs ---------------------------------------------------------------------------------------------------------------


def test_unsupported_inputs_are_not_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not triton_sort.supported(torch.zeros(2, 3, 4))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(triton_sort, "_installed", lambda: True)
    assert triton_sort.supported(torch.zeros(2, 3, 4)) and triton_sort.supported(torch.zeros(4096, 4))
    assert not triton_sort.supported(torch.zeros(2, 3, 4, dtype=torch.float64)) and not triton_sort.supported(torch.zeros(4))
    assert not triton_sort.supported(torch.zeros(2, 4097, 1)) and not triton_sort.supported(torch.zeros(2, 3, 4, device="meta"))
    monkeypatch.setattr(triton_sort, "_installed", lambda: False)
    assert not triton_sort.supported(torch.zeros(2, 3, 4))


def test_importing_needs_no_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; import torch; from rlpjepa_zoo.ops import triton_sort\n"
        "print(triton_sort.supported(torch.zeros(2, 2)))"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("z", "y", "c", "message"),
    [
        (torch.zeros(1, 4, 3, dtype=torch.float64), torch.zeros(4, 3), torch.zeros(2, 3), "contiguous and float32, got torch.float64"),
        (torch.zeros(1, 3, 4).mT, torch.zeros(4, 3), torch.zeros(2, 3), "strides (12, 1, 4)"),
        (torch.zeros(1, 4, 3), torch.zeros(5, 3), torch.zeros(2, 3), "got (1, 4, 3), (5, 3), (2, 3)"),
        (torch.zeros(4, 3), torch.zeros(4, 3), torch.zeros(2, 3), "z (V, B, D)"),
        (torch.zeros(1, 4, 3), torch.zeros(4, 3), torch.zeros(0, 3), "none empty"),
        (torch.zeros(1, 4097, 1), torch.zeros(4097, 1), torch.zeros(2, 1), "B <= 4096"),
        (torch.zeros(1, 4, 3), torch.zeros(4, 3), torch.zeros(2, 3, device="meta"), "one device"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(z: torch.Tensor, y: torch.Tensor, c: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        triton_sort.loss_and_gradient(z, y, c, 8, gradient=True)
    assert "\n" not in str(caught.value)


def test_projections_and_chunks_that_do_not_fit_are_refused() -> None:
    for shape in ((2, 3), (2, 1, 3), (0, 2, 3), (2, 2, 4097)):
        with pytest.raises(ValueError, match="expected \\(n, 1 \\+ V, B\\)"):
            triton_sort.match(torch.zeros(shape))
    with pytest.raises(ValueError, match="chunk must be >= 1, got 0"):
        triton_sort.loss_and_gradient(torch.zeros(1, 4, 3), torch.zeros(4, 3), torch.zeros(2, 3), 0, gradient=True)
