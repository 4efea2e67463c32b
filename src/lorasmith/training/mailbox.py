"""Asynchronous transfer of numbers from the device to the host."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor


class Mailbox:
    """Transfers small tensors by step, and returns them in order: from a GPU asynchronously through pinned memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._waiting: deque[tuple[int, Tensor, torch.Event | None]] = deque()

    def post(self, step: int, values: Tensor) -> None:
        """Send the values (1-d) of a step."""
        if self._device.type != "cuda":
            self._waiting.append((step, values.detach().clone(), None))
            return
        landed = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        landed.copy_(values.detach(), non_blocking=True)
        arrived = torch.Event(self._device)
        arrived.record(torch.cuda.current_stream(self._device))  # not that of the current device
        self._waiting.append((step, landed, arrived))

    def collect(self, *, wait: bool = False, before: int | None = None) -> list[tuple[int, list[float]]]:
        """(step, values) that have arrived since the last call; can wait for all, or for the steps below `before`."""
        ready = []
        while self._waiting:
            step, values, arrived = self._waiting[0]
            if before is not None and step >= before:
                break
            if arrived is not None:
                if wait or before is not None:
                    arrived.synchronize()
                elif not arrived.query():
                    break
            ready.append((step, values.tolist()))
            self._waiting.popleft()
        return ready
