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
