from __future__ import annotations

import subprocess
import sys

import pytest

from lorasmith.core.allocator import has_lost_device, is_out_of_memory, memory_missed

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


@pytest.mark.parametrize(
    ("text", "missed"),
    [
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
    ],
)
def test_the_text_of_torch_is_not_passed_on(text: str, missed: str) -> None:
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


@pytest.mark.parametrize(
    ("text", "is_full", "is_lost"),
    [
        ("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 7.79 GiB", True, False),
        ("HIP out of memory. Tried to allocate 20.00 MiB", True, False),
        ("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.", True, False),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True, False),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", True, False),
        ("FIND was unable to find an engine to execute this computation", True, False),
        ("GET was unable to find an engine to execute this computation", True, False),
        ("NCCL error: Failed to CUDA calloc 25165824 bytes", True, False),
        ("[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't allocate memory", True, False),
        ("CUDA error: an illegal memory access was encountered", False, True),
        ("CUDA error: device-side assert triggered", False, True),
        ("CUDA error: unspecified launch failure", False, True),
        ("CUDA error: misaligned address", False, True),
        ("CUDA error: the launch timed out and was terminated", False, True),
        ("CUDA error: uncorrectable ECC error encountered", False, True),
        ("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`", False, False),
        ("CUDA error: no kernel image is available for execution on the device", False, False),
        ("expected scalar type Half but found Float", False, False),
    ],
)
def test_errors_of_cuda_and_its_libraries(text: str, is_full: bool, is_lost: bool) -> None:
    error = RuntimeError(text)
    assert (is_out_of_memory(error), has_lost_device(error)) == (is_full, is_lost)
    assert not is_out_of_memory(KeyError(text))
