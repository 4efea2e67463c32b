from __future__ import annotations

import subprocess
import sys

import pytest

from lorasmith.core.allocator import memory_missed

CHURN = """
import resource, sys, torch
from lorasmith.core.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
for _ in range(20):
    torch.ones(16_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="page faults are counted on Linux")
def test_freed_memory_is_not_faulted_in_again() -> None:
    def faults(how: str) -> int:
        run = subprocess.run([sys.executable, "-c", CHURN, how], capture_output=True, text=True, check=True)
        return int(run.stdout)

    # Twenty tensors of 64 MB have 15,625 pages each (fewer faults where the system hands out large pages).
    assert faults("give back") > 1.5 * faults("keep")


def test_the_text_of_torch_is_not_passed_on() -> None:
    for text, missed in [
        (
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB",
            "2.00 GiB more were needed",
        ),
        (
            "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
            "allocate 4096 bytes. Error code 12",
            "4096 bytes more were needed",
        ),
        ("out of memory", "the amount is unknown"),
    ]:
        assert memory_missed(RuntimeError(text)) == missed


RELEASE = """
import psutil, torch
from lorasmith.core.allocator import keep_freed_memory, release_freed_memory
keep_freed_memory()
held = [torch.ones(4_000_000) for _ in range(8)]
del held[:7]  # the last one stays above them
before = psutil.Process().memory_info().rss
release_freed_memory()
print(before - psutil.Process().memory_info().rss)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the C library may be another")
def test_kept_memory_can_be_returned_from_the_middle() -> None:
    run = subprocess.run([sys.executable, "-c", RELEASE], capture_output=True, text=True, check=True)
    assert int(run.stdout) > 6 * 16_000_000
