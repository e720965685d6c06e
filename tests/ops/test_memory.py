"""Memory that is reused: page faults with and without, nesting, threads, and memory that is given back."""

import resource
import threading
from pathlib import Path

import pytest
import torch

from rlpjepa_zoo.ops import memory
from rlpjepa_zoo.ops.memory import reused_memory

CPU = torch.device("cpu")
BYTES = 1 << 27
"""128 MB, more than glibc keeps by itself."""
glibc = pytest.mark.skipif(memory._glibc() is None, reason="this C library is not glibc")


def page_faults() -> int:
    """Page faults of five allocations of which each touches every page."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(BYTES // 4)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@glibc
def test_freed_memory_is_used_again_inside_and_given_back_after() -> None:
    plain = page_faults()
    assert plain > 5 * BYTES // (1 << 21)  # pages of 4 kB to 2 MB
    with reused_memory(CPU):
        page_faults()
        assert page_faults() < plain / 20
        kept = resident()
    assert resident() < kept - BYTES / 2
    assert page_faults() > plain / 2  # as before


@glibc
def test_the_last_block_of_all_threads_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[int, int]] = []
    monkeypatch.setattr(memory, "_set", lambda library, parameters: calls.append(parameters))
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with reused_memory(CPU):
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with pytest.raises(KeyError), reused_memory(CPU):
        thread.start()
        assert entered.wait(10)
        with reused_memory(CPU):
            pass
        raise KeyError
    assert calls == [memory._INSIDE]
    leave.set()
    thread.join()
    assert calls == [memory._INSIDE, memory._OUTSIDE] and memory._blocks == 0


def test_other_devices_and_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_set", lambda *given: pytest.fail("changed the allocator"))
    with reused_memory(torch.device("meta")):
        pass
    monkeypatch.setattr(memory, "_glibc", lambda: None)
    with reused_memory(CPU):
        assert memory._blocks == 0
