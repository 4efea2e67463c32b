"""The C library's allocator, and recognising out-of-memory errors."""

from __future__ import annotations

import ctypes
import re
import sys

# Numbers of mallopt(3).
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST = 2**31 - 1


def keep_freed_memory() -> None:
    """Stop glibc from returning the memory of activations after each step, which saves page faults (10–15 % on a CPU).

    For programs, not the library, as it affects the whole process, which keeps memory once used.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 2**30)
        mallopt(_TRIM_THRESHOLD, _LARGEST)


def release_freed_memory() -> None:
    """Return free memory to the system once, whether `keep_freed_memory` is in effect or not."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is not None:
        trim(0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a device or the machine is out of memory."""
    return isinstance(error, MemoryError) or _says(error, _OUT_OF_MEMORY)


def has_lost_device(error: BaseException) -> bool:
    """Whether an error means that a GPU does nothing more for this process, as after an illegal access."""
    return _says(error, _DEVICE_LOST)


# Matched by text, as torch's classes would require importing torch, and its libraries have none. In order: torch and
# CUDA, the C library, oneDNN; cuBLAS for its workspace; cuDNN with and without a choice of engines; NCCL.
_OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
    "unable to find an engine to execute",
    "failed to cuda calloc",
)
_DEVICE_LOST = (
    "illegal memory access",
    "illegal instruction",
    "misaligned address",
    "device-side assert triggered",
    "unspecified launch failure",
    "launch timed out",
    "uncorrectable ecc error",
    "has fallen off the bus",
)


def _says(error: BaseException, phrases: tuple[str, ...]) -> bool:
    return isinstance(error, RuntimeError) and any(phrase in str(error).lower() for phrase in phrases)


def memory_missed(error: BaseException) -> str:
    """The amount of memory that an out-of-memory error asked for, as a clause."""
    found = re.search(r"allocate ([\d.,]+ ?(?:[KMGT]i?B|bytes))", str(error))
    return f"{found[1]} more were needed" if found else "the amount is unknown"
