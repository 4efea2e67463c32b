"""Offloaded weights: kept in host memory and copied to the device when they are used.

They never change, so they are copied one way and freed after use. The next weight is predicted from the last two, as
layers run in the same order in every pass. One block of the model is prefetched on a separate stream while the device
computes. A wrong prediction costs one transfer.
"""

from __future__ import annotations

import weakref
from collections import deque
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lorasmith.core.quantization import Packed


class _Sent(NamedTuple):
    """Tensors being copied to the device; `arrived` is None if the copy is done."""

    tensors: tuple[Tensor, ...]
    arrived: torch.cuda.Event | None


class Resident:
    """Bytes of live tensors: `now`, and at the `peak`."""

    def __init__(self) -> None:
        self.now = 0
        self.peak = 0

    def count(self, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(tensor, self._drop, size)

    def _drop(self, size: int) -> None:
        self.now -= size


class WeightStream:
    """Packed weights in host memory, pinned for a GPU. On the CPU they are copied too, for tests."""

    def __init__(self, device: torch.device) -> None:
        self.ahead_bytes = 0  # size of the prefetched weights
        self.resident = Resident()  # weights on the device: at most `ahead_bytes` and the weight in use
        self._device = device
        self._weights: list[Packed] = []
        self._coming: dict[int, _Sent] = {}
        self._following: dict[tuple[int, int], int] = {}
        self._last = (-1, -1)
        self._on_gpu = device.type == "cuda"
        self._side = torch.cuda.Stream(device) if self._on_gpu else None  # type: ignore[no-untyped-call]
        self._in_flight: deque[tuple[torch.cuda.Event, int]] = deque()

    def add(self, weight: Packed) -> int:
        """Add a packed weight; returns its number."""
        tensors = tuple(tensor.cpu() for tensor in weight.tensors)
        if self._on_gpu:
            tensors = tuple(tensor.pin_memory() for tensor in tensors)
        self._weights.append(replace(weight, tensors=tensors))
        return len(self._weights) - 1

    def on_host(self, number: int) -> Packed:
        return self._weights[number]

    def fetch(self, number: int) -> Packed:
        """A packed weight on the device, freed with the caller's last reference."""
        self._settle()
        before = self._last
        self._following[before] = number
        self._last = (before[1], number)
        sent = self._coming.pop(number, None)
        coming = self._foreseen()
        self._coming = {one: waiting for one, waiting in self._coming.items() if one in coming}
        sent = sent or self._send(number)
        for one in coming:
            if one not in self._coming:
                self._coming[one] = self._send(one)
        if sent.arrived is not None:
            here = torch.cuda.current_stream(self._device)
            here.wait_event(sent.arrived)
            for tensor in sent.tensors:
                tensor.record_stream(here)
        return replace(self._weights[number], tensors=sent.tensors)

    def clear(self) -> None:
        self._weights.clear()
        self._coming.clear()
        self._in_flight.clear()
        self._following.clear()
        self._last = (-1, -1)

    def _foreseen(self) -> list[int]:
        found: list[int] = []
        last, free = self._last, self.ahead_bytes
        while (one := self._following.get(last)) is not None and one not in found:
            free -= self._weights[one].size_bytes
            if free < 0:
                break
            found.append(one)
            last = (last[1], one)
        return found

    def _send(self, number: int) -> _Sent:
        if self._side is None:
            tensors = tuple(tensor.clone() for tensor in self._weights[number].tensors)
            arrived = None
        else:
            with torch.cuda.stream(self._side):
                tensors = tuple(tensor.to(self._device, non_blocking=True) for tensor in self._weights[number].tensors)
                arrived = self._side.record_event()
        for tensor in tensors:
            self.resident.count(tensor)
        return _Sent(tensors, arrived)

    def _settle(self) -> None:
        """Keep the host from running ahead of a GPU, as a used weight is freed only when its product is done."""
        if not self._on_gpu or self._last[1] < 0:
            return
        size = self._weights[self._last[1]].size_bytes
        self._in_flight.append((torch.cuda.current_stream(self._device).record_event(), size))
        while sum(size for _, size in self._in_flight) > self.ahead_bytes and len(self._in_flight) > 1:
            self._in_flight.popleft()[0].synchronize()


@dataclass(frozen=True)
class StreamedWeight:
    """A layer's weight source in a stream."""

    stream: WeightStream
    number: int

    @property
    def code(self) -> torch.dtype:
        return self.stream.on_host(self.number).code

    def fetch(self) -> Packed:
        return self.stream.fetch(self.number)
