"""The allocator of the C library, and recognising out-of-memory errors."""

from __future__ import annotations

import ctypes
import re
import sys

# Numbers of mallopt(3).
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST = 2**31 - 1


def keep_freed_memory() -> None:
    """Stop glibc from returning the memory of activations to the system after each step, which costs page faults.

    For our own programs, not for the library, as it affects the whole process. Steps on a CPU take 10–15 % less time,
    and the process keeps memory once used. Without glibc it does nothing.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 2**30)
        mallopt(_TRIM_THRESHOLD, _LARGEST)


def release_freed_memory() -> None:
    """Return what is free at the moment to the system, `keep_freed_memory` or not: once, where much was freed."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is not None:
        trim(0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a device or the machine is out of memory."""
    text = str(error).lower()  # matched by text, as torch's class would require importing torch
    phrases = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(one in text for one in phrases))


def memory_missed(error: BaseException) -> str:
    """The amount of memory that could not be had, from the text of an out-of-memory error, in a clause of ours."""
    found = re.search(r"allocate ([\d.,]+ ?(?:[KMGT]i?B|bytes))", str(error))
    return f"{found[1]} more were needed" if found else "the amount is unknown"
