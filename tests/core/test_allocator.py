from __future__ import annotations

import subprocess
import sys

import pytest

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
