"""The processor: its name, what other programs leave of it, and the threads that compute on it.

Threads of one operation wait for each other at its end, a thousand times in a step. Where another program has the
processor of one of them, all wait until the system gives it back. OpenMP's threads wait actively, which takes the
processor from the thread that they wait for; asleep, or one for each free processor, they do not.

Imports no torch, whose OpenMP reads the environment once, when it is loaded.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import platform
import sys
import time
from pathlib import Path

_WAITING = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"}
"""Waiting before a thread sleeps, of GNU's OpenMP in turns of a loop (some 50 µs, longer than between most operations)
and of LLVM's and Intel's in milliseconds. Their own defaults are 20 and 200 ms.
"""
_CHOSEN = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_MEASURED_S = 0.2
_PCI = Path("/sys/bus/pci/devices")
_WSL_GPU = Path("/dev/dxg")
_GPU_VENDORS = {"0x10de", "0x1002"}  # NVIDIA and AMD, whose GPUs torch uses

BUSY = 0.5
"""Processors of other programs from which a machine counts as busy."""


def let_threads_sleep() -> None:
    """Let OpenMP's threads sleep soon while they wait, in this process and its children; before torch is imported.

    For programs, not the library. What the environment sets already is left.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        for name, value in _WAITING.items():
            os.environ.setdefault(name, value)


def threads_are_set() -> bool:
    """Whether the environment sets the number of threads."""
    return any(os.environ.get(name) for name in _CHOSEN)


def busy_processors(seconds: float = _MEASURED_S) -> float:
    """Processors that other programs keep busy, of those that this process may use; measured for `seconds`."""
    import psutil

    began, own = time.perf_counter(), time.process_time()
    shares = psutil.cpu_percent(seconds, percpu=True)
    own = (time.process_time() - own) / (time.perf_counter() - began)
    return max(0.0, sum(shares[index] for index in _usable() if index < len(shares)) / 100 - own)


def usable_processors() -> int:
    """Processors that this process may use: its affinity, and the share of its container."""
    with contextlib.suppress(OSError, ValueError):  # of other systems, or `max`
        quota, period = _QUOTA.read_text().split()
        return max(1, min(len(_usable()), math.ceil(int(quota) / int(period))))
    return len(_usable())


def has_no_gpu() -> bool:
    """Whether the machine surely has no GPU that torch uses; only a PC's Linux says so."""
    if sys.platform != "linux" or platform.machine() != "x86_64" or _WSL_GPU.exists():
        return False
    try:
        return not any(vendor.read_text().strip() in _GPU_VENDORS for vendor in _PCI.glob("*/vendor")) and _PCI.is_dir()
    except OSError:
        return False


def threads_beside(most: int, busy: float) -> int:
    """Threads that compute beside programs that keep `busy` processors: one for each free one, at least half."""
    return max(1, most // 2, most - round(busy))


def slowdown_beside(busy: float) -> float:
    """How many times as long a run takes beside programs that keep `busy` processors; 1 on a quiet machine."""
    if busy < BUSY:
        return 1.0
    most = usable_processors()
    threads = threads_beside(most, busy)
    return most / (threads * min(1.0, most / (busy + threads)))


@functools.cache
def processor_name() -> str:
    """Architecture and model of the processor."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line[:10] == "model name")
        return f"{platform.machine()}, {model}"
    return ", ".join(dict.fromkeys(filter(None, (platform.machine(), platform.processor()))))


def _usable() -> list[int]:
    """Numbers of the processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))
