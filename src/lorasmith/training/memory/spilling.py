"""Device memory that is spilled to host memory: recognised in a run, and prevented by a cap.

Windows' driver model (WDDM, in WSL too) gives a process host memory where the GPU's is full. So no allocation fails and
no step is repeated in smaller micro-batches; instead, steps take many times as long. Other systems raise an
out-of-memory error. With a cap, torch's allocator raises that error everywhere, before the driver spills.
"""

from __future__ import annotations

import contextlib
import math
import platform
import statistics
import sys
from collections import defaultdict, deque
from collections.abc import Hashable, Iterator

import torch

from lorasmith.core.printable import memory_text

_SLOW = 2.0  # times the median of steps of the same size
_ENOUGH = 5  # steps of a size from which their median is known
_WINDOW = 100  # steps of a size that count
_FULL = 0.02  # share of free memory below which a GPU is full
_SUGGESTED = 0.9  # share of the memory as cap


@contextlib.contextmanager
def memory_capped(device: torch.device, cap_bytes: int | None) -> Iterator[None]:
    """Inside the context, this process's tensors have at most `cap_bytes` on a GPU, if that is not None.

    Allocations beyond it raise torch's out-of-memory error. Of contexts that overlap, the lowest cap holds.
    """
    if cap_bytes is None or device.type != "cuda":
        yield
        return
    caps, total = _CAPS[device], torch.cuda.get_device_properties(device).total_memory
    caps.append(cap_bytes)
    torch.cuda.set_per_process_memory_fraction(min(1.0, min(caps) / total), device)
    try:
        yield
    finally:
        caps.remove(cap_bytes)
        torch.cuda.set_per_process_memory_fraction(min(1.0, min(caps, default=total) / total), device)


_CAPS: dict[torch.device, list[int]] = defaultdict(list)  # of open contexts


class SpillCheck:
    """Recognises a step that is slow because device memory is spilled, once in a run."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_open = device.type == "cuda" and may_spill()
        self._seconds: dict[Hashable, deque[float]] = defaultdict(lambda: deque(maxlen=_WINDOW))

    def warning(self, step: int, size: Hashable, seconds: float) -> str | None:
        """A sentence for the user if this step was slow for its size and the GPU's memory is full.

        Args:
            step: counted from 1.
            size: equal for steps that should take the same time.
            seconds: time of the step on the device.
        """
        if not self._is_open:
            return None
        before = self._seconds[size]
        usual = statistics.median(before) if len(before) >= _ENOUGH else math.inf
        before.append(seconds)
        if seconds <= _SLOW * usual:
            return None
        free, total = torch.cuda.mem_get_info(self._device)
        taken = torch.cuda.memory_reserved(self._device)
        if free > _FULL * total and taken <= total:
            return None
        self._is_open = False
        cap = math.floor(10 * _SUGGESTED * total / 2**30) / 10
        return (
            f"Step {step} took {seconds:.3g} s instead of {usual:.3g} s with the GPU's memory full (this process has "
            f"{memory_text(taken)} of {memory_text(total)}): the driver keeps a part of it in host memory; set "
            f"memory_cap {cap:g}, with which the batch is divided instead, or use quantization, offloading or "
            "gradient_checkpointing, or close other programs."
        )


def may_spill() -> bool:
    """Whether the driver of this system gives host memory where a GPU's is full: Windows, and Linux inside of it."""
    return sys.platform == "win32" or "microsoft" in platform.release().casefold()
