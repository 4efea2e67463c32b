"""Offloading of activations to host memory between the forward and the backward pass.

Copies run on a separate stream, and are prefetched in the order of the backward pass.
"""

from __future__ import annotations

import weakref
from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

_WORTH_MOVING = 1 << 20
"""Size in bytes from which memory is offloaded."""

_AHEAD = 4
"""Number of prefetched copies."""


class HostMemory:
    """Hooks for saved tensors that copy large ones to host memory, and back in reverse order.

    Storages are copied, not tensors: views of one storage are copied once and keep their layout.
    """

    def __init__(self, module: nn.Module) -> None:
        tensors = [*module.parameters(), *module.buffers()]
        self._stay = {one.untyped_storage()._cdata for one in tensors}
        device = next((one.device for one in tensors), torch.device("cpu"))
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._known: dict[int, _Known] = {}
        self._sent: deque[weakref.ref[_OnHost]] = deque()

    def pack(self, tensor: Tensor) -> Tensor | _Moved:
        storage = tensor.untyped_storage()
        size = storage.nbytes()
        too_small = size < _WORTH_MOVING or 2 * tensor.nbytes < size
        if too_small or storage._cdata in self._stay or isinstance(tensor, nn.Parameter):
            return tensor
        memory = self._on_host(tensor, storage)
        memory.uses += 1
        return _Moved(memory, tensor.dtype, int(tensor.storage_offset()), tensor.shape, tensor.stride())

    def unpack(self, packed: Tensor | _Moved) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        while self._sent and self._sent[-1]() in (None, packed.memory):
            self._sent.pop()
        for one in list(self._sent)[-_AHEAD:]:
            if (coming := one()) is not None:
                coming.send()
        back = packed.memory.take().untyped_storage()
        empty = torch.empty(0, dtype=packed.dtype, device=back.device)
        return empty.set_(back, packed.offset, packed.shape, packed.stride)

    def _on_host(self, tensor: Tensor, storage: torch.UntypedStorage) -> _OnHost:
        key = storage._cdata
        known = self._known.get(key)
        if known is not None and known.version == tensor._version and not known.of.expired():  # type: ignore[no-untyped-call]
            one = known.copy()
            if one is not None:
                return one
        whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
        one = _OnHost(whole, self._stream)
        self._known[key] = _Known(StorageWeakRef(storage), tensor._version, weakref.ref(one))  # type: ignore[no-untyped-call]
        self._sent.append(weakref.ref(one))
        return one


class _OnHost:
    """A storage copied to the host; `uses` counts the saved tensors that need it."""

    def __init__(self, memory: Tensor, stream: torch.cuda.Stream | None) -> None:
        self.uses = 0
        self._device = memory.device
        self._stream = stream
        self._back: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None
        self._memory = torch.empty_like(memory, device="cpu", pin_memory=stream is not None)
        if stream is None:
            self._memory.copy_(memory)
            return
        stream.wait_stream(torch.cuda.current_stream(memory.device))
        with torch.cuda.stream(stream):
            self._memory.copy_(memory, non_blocking=True)
        memory.record_stream(stream)

    def send(self) -> None:
        if self._back is not None:
            return
        if self._stream is None:
            self._back = self._memory.to(self._device)
            return
        with torch.cuda.stream(self._stream):
            self._back = self._memory.to(self._device, non_blocking=True)
            self._arrived = self._stream.record_event()

    def take(self) -> Tensor:
        self.send()
        back = self._back
        assert back is not None
        if self._arrived is not None:
            here = torch.cuda.current_stream(self._device)
            here.wait_event(self._arrived)
            back.record_stream(here)
        self.uses -= 1
        if not self.uses:
            self._back = self._arrived = None
        return back


class _Moved(NamedTuple):
    """A tensor whose storage is on the host."""

    memory: _OnHost
    dtype: torch.dtype
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]


class _Known(NamedTuple):
    """A storage that has been copied, valid while its version is the same."""

    of: StorageWeakRef
    version: int
    copy: weakref.ref[_OnHost]
