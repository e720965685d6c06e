"""Memory that is reused: page faults with and without, nesting, threads, and memory that is given back."""

import resource
import subprocess
import sys
import threading

import pytest
import torch

from rlpjepa_zoo.ops import memory
from rlpjepa_zoo.ops.memory import reused_memory

CPU = torch.device("cpu")
BYTES = 1 << 27
"""128 MB, more than glibc keeps by itself."""
glibc = pytest.mark.skipif(memory._glibc() is None, reason="this C library is not glibc")


MEASURED = f"""
import resource, torch
from rlpjepa_zoo.ops import memory

def page_faults():  # of five allocations of which each touches every page
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones({BYTES} // 4)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

memory._LONG = 0.0
plain = page_faults()
with memory.reused_memory(torch.device("cpu")):
    page_faults(), page_faults()
    print(plain, page_faults(), end=" ")
    kept = resident()
print(kept, resident(), page_faults())
"""
"""Prints page faults outside and inside of a block, bytes in memory at its end and after it, and page faults after it."""


@glibc
def test_freed_memory_is_used_again_inside_and_given_back_after() -> None:
    command = [sys.executable, "-c", MEASURED]  # a process of its own: a heap without the traces of other tests
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    plain, inside, kept, left, after = map(int, run.stdout.split())
    assert plain > 5 * BYTES // (1 << 21)  # pages of 4 kB to 2 MB
    assert inside < plain / 2  # aligned blocks do not always fit where one of their size was
    assert left < kept - BYTES / 2 and after > plain / 10  # the pages of one allocation at least


@glibc
def test_many_short_blocks_cost_no_page_faults() -> None:
    def small() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(20):
            with reused_memory(CPU):
                torch.ones(1 << 20)  # 4 MB
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    small()
    assert small() < 2000  # 20,000 if each block gave its memory back


@glibc
def test_the_outermost_block_of_the_main_thread_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[int, int]] = []
    monkeypatch.setattr(memory, "_set", lambda library, parameters: calls.append(parameters))

    def nested() -> None:
        with reused_memory(CPU), reused_memory(CPU):
            raise KeyError

    thread = threading.Thread(target=lambda: pytest.raises(KeyError, nested))
    thread.start()
    thread.join()
    assert not calls  # other threads have heaps of their own
    with pytest.raises(KeyError):
        nested()
    assert calls == [memory._INSIDE, memory._OUTSIDE] and memory._blocks == 0


def test_what_the_user_has_chosen_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("MALLOC_TOP_PAD_", "1"), ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=1")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert memory._glibc.__wrapped__() is None


def test_other_devices_and_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_set", lambda *given: pytest.fail("changed the allocator"))
    with reused_memory(torch.device("meta")):
        pass
    monkeypatch.setattr(memory, "_glibc", lambda: None)
    with reused_memory(CPU):
        assert memory._blocks == 0
