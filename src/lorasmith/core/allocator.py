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


def is_of_gpu(error: BaseException) -> bool:
    """Whether an error is CUDA's, or that of a library on it."""
    return _says(error, _GPU)


# Matched by text, as torch's classes would require importing torch, and its libraries have none. In order: torch and
# CUDA, the C library, oneDNN; cuBLAS, cuSOLVER and cuDNN for their workspaces; cuDNN with and without a choice of
# engines; NCCL.
_OUT_OF_MEMORY = (
    "out of memory",
    "cuda_error_out_of_memory",
    "can't allocate memory",
    "not enough memory",
    "status_alloc_failed",
    "status_internal_error_device_allocation_failed",
    "status_internal_error_host_allocation_failed",
    "unable to find an engine to execute",
    "failed to cuda calloc",
)
# CUDA's texts of the errors after which, as its documentation says, the process must be started again.
_DEVICE_LOST = (
    "illegal memory access",
    "illegal_address",
    "illegal instruction",
    "misaligned address",
    "device-side assert triggered",
    "launch failure",
    "launch timed out",
    "hardware stack error",
    "invalid program counter",
    "operation not supported on global/shared address space",
    "invalid access of peer gpu memory",
    "uncorrectable ecc error",
    "uncorrectable nvlink error",
    "has fallen off the bus",
    "cuda error: unknown error",
)
_GPU = (
    "cuda error",
    "cuda driver error",
    "hip error",
    "cublas_status_",
    "cusolver_status_",
    "cudnn_status_",
    "cudnn error",
    "triton error [",
)


def _says(error: BaseException, phrases: tuple[str, ...]) -> bool:
    return isinstance(error, RuntimeError) and any(phrase in str(error).lower() for phrase in phrases)


def memory_missed(error: BaseException) -> str:
    """The amount of memory that an out-of-memory error asked for, as a clause."""
    match = re.search(r"allocate ([\d.,]+ ?(?:[KMGT]i?B|bytes))", str(error))
    return f"{match[1]} more were needed" if match else "the amount is unknown"
