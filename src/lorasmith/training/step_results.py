"""What a step returns: small tensors that arrive late from the device, and what they belong to."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorasmith.training.batches import Batch


@dataclass(frozen=True)
class Taken:
    """A step whose results have not arrived yet; holds no tensors, so that none is kept alive."""

    names: tuple[str, ...]
    indices: tuple[int, ...]
    quantiles: tuple[float, ...]
    first: int  # samples of its first batch
    shapes: tuple[torch.Size, ...]  # of the latents of this process's batches

    @classmethod
    def of(cls, batches: Sequence[Batch], drawn: Sequence[tuple[str, int, float]] | None) -> Taken:
        """The step of these batches; `drawn` has the draws of all processes, if there are several."""
        if drawn is None:
            facts = [zip(batch.names, batch.indices, batch.quantiles, strict=True) for batch in batches]
            drawn = list(itertools.chain(*facts))
        names, indices, quantiles = zip(*drawn, strict=True)
        return cls(names, indices, quantiles, len(batches[0].names), tuple(batch.noised.shape for batch in batches))

    def at_fault(self, losses: Sequence[float], bound: float) -> tuple[str, ...]:
        """Names of samples whose loss is above a bound or not finite; none if all of several are, as by the weights."""
        names = [name for name, loss in zip(self.names, losses, strict=True) if not math.isfinite(loss) or loss > bound]
        return () if 1 < len(losses) == len(names) else tuple(dict.fromkeys(names))


class Mailbox:
    """Transfers small tensors by step, and returns them in order: from a GPU asynchronously through pinned memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._waiting: deque[tuple[int, Tensor, torch.Event | None, torch.Event | None]] = deque()
        self._began: torch.Event | None = None

    def begin(self) -> None:
        """Start the time of a step, on a GPU when it has done what is queued before."""
        self._began = self._recorded() if self._device.type == "cuda" else None

    def post(self, step: int, values: Tensor) -> None:
        """Send the values (1-d) of a step, whose work is queued."""
        if self._device.type != "cuda":
            self._waiting.append((step, values.detach().clone(), None, None))
            return
        landed = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        landed.copy_(values.detach(), non_blocking=True)
        self._waiting.append((step, landed, self._began, self._recorded()))

    def collect(self, *, wait: bool = False, before: int | None = None) -> list[tuple[int, list[float], float]]:
        """(step, values, seconds) that have arrived since the last call; can wait for all, or for those below `before`.

        The seconds are the device's since `begin`, 0 where they are not measured.
        """
        ready = []
        while self._waiting:
            step, values, began, arrived = self._waiting[0]
            if before is not None and step >= before:
                break
            if arrived is not None:
                if wait or before is not None:
                    arrived.synchronize()
                elif not arrived.query():
                    break
            seconds = 0.0 if began is None or arrived is None else began.elapsed_time(arrived) / 1000
            ready.append((step, values.tolist(), seconds))
            self._waiting.popleft()
        return ready

    def _recorded(self) -> torch.Event:
        event = torch.Event(self._device, enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))  # not that of the current device
        return event
