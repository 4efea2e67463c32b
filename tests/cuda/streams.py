"""CUDA's streams and events without a device, and a check that what is used on several of them is in order.

Each stream has a vector clock (Mattern 1988, "Virtual Time and Global States of Distributed Systems"): the last
operation of every stream that is known to be done before its next one. Waiting for an event merges clocks. An operation
must know the last writes of what it reads, and all uses of what it writes. Memory belongs to the stream that allocated
it and may be used there again once it is freed, so that this stream must know all uses on others by then, unless
`record_stream` named these.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from lorasmith.core.placement import side_stream

Clock = dict[int, int]
"""Number of operations by stream."""


@dataclass(eq=False)
class Event:
    """A point in a stream."""

    streams: Streams
    clock: Clock = field(default_factory=dict)

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or self.streams.current
        self.clock = dict(self.streams.clock(stream))

    def wait(self, stream: Stream | None = None) -> None:
        (stream or self.streams.current).wait_event(self)

    def synchronize(self) -> None:
        self.streams.host_waits += 1
        _merge(self.streams.host, self.clock)

    def query(self) -> bool:
        return False

    def elapsed_time(self, end: Event) -> float:
        return 0.0


@dataclass(eq=False)
class Stream:
    """A queue of operations."""

    streams: Streams
    number: int

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event(self.streams)
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        _merge(self.streams.clock(self), event.clock)

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def synchronize(self) -> None:
        self.record_event().synchronize()


@dataclass(eq=False)
class _Memory:
    """A storage of the device: where it was allocated, who wrote it last, and the last reads by stream."""

    storage: StorageWeakRef
    home: int
    write: tuple[int, int]
    reads: Clock = field(default_factory=dict)
    recorded: set[int] = field(default_factory=set)


def _thread() -> int:
    """The thread whose current stream counts: autograd's own compute on the stream of the forward pass."""
    own = threading.current_thread()
    return (threading.main_thread() if isinstance(own, threading._DummyThread) else own).ident or 0


class Streams:
    """All streams of the device, and what is wrong with their order.

    Attributes:
        races: uses that may come too early, as sentences, with their number.
        host_waits: how often the host waited for the device.
    """

    def __init__(self) -> None:
        self.races: Counter[str] = Counter()
        self.host_waits = 0
        self.host: Clock = {}
        self._clocks: dict[int, Clock] = defaultdict(dict)
        self._known: dict[int, _Memory] = {}
        self._shared: dict[int, _Memory] = {}  # those that several streams use
        self._streams = [Stream(self, 0)]
        self._of_thread: dict[int, Stream] = {}

    @property
    def are_several(self) -> bool:
        return len(self._streams) > 1

    @property
    def current(self) -> Stream:
        """The current stream of this thread, as in CUDA."""
        return self._of_thread.get(_thread(), self._streams[0])

    def clock(self, stream: Stream) -> Clock:
        return self._clocks[stream.number]

    @property
    def count(self) -> int:
        """Number of streams, the one of the start included."""
        return len(self._streams)

    def made(self, *_: Any, **__: Any) -> Stream:
        self._streams.append(Stream(self, len(self._streams)))
        return self._streams[-1]

    @contextlib.contextmanager
    def chosen(self, stream: Stream) -> Iterator[None]:
        before, self._of_thread[_thread()] = self.current, stream
        try:
            yield
        finally:
            self._of_thread[_thread()] = before

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside the context, `torch.cuda` has these streams."""
        with (
            mock.patch.object(torch.cuda, "Stream", self.made),
            mock.patch.object(torch.cuda, "Event", lambda **_: Event(self)),
            mock.patch.object(torch, "Event", lambda *_, **__: Event(self)),
            mock.patch.object(torch.cuda, "stream", self.chosen),
            mock.patch.object(torch.cuda, "current_stream", lambda *_: self.current),
            mock.patch.object(torch.cuda, "synchronize", lambda *_: self.current.synchronize()),
            mock.patch.object(torch.cuda, "cudart", _Runtime),
            mock.patch.object(Tensor, "record_stream", _recording(self)),
        ):
            side_stream.cache_clear()
            try:
                yield
            finally:
                side_stream.cache_clear()

    def operation(self, reads: Iterable[Tensor], writes: Iterable[Tensor], place: Callable[[], str]) -> None:
        """An operation on the current stream."""
        self._freed(place)
        number, clock = self.current.number, self.clock(self.current)
        now = clock[number] = clock.get(number, 0) + 1
        written = {one.untyped_storage()._cdata: one for one in writes}
        for one in reads:
            memory = self._memory(one, home=0)  # if it is not known, it was there before
            if not _knows(clock, memory.write):
                self.races[f"read before it is written: {place()}"] += 1
            self._used(memory, number, now)
        for one in written.values():
            memory = self._memory(one, home=number)
            if not all(_knows(clock, use) for use in (memory.write, *memory.reads.items())):
                self.races[f"written while it is used: {place()}"] += 1
            memory.write = number, now
            self._used(memory, number, now)

    def recorded(self, tensor: Tensor, stream: Stream) -> None:
        self._memory(tensor, home=0).recorded.add(stream.number)

    def _used(self, memory: _Memory, number: int, now: int) -> None:
        memory.reads[number] = now
        if number != memory.home:
            self._shared[id(memory)] = memory

    def _memory(self, tensor: Tensor, home: int) -> _Memory:
        storage = tensor.untyped_storage()
        memory = self._known.get(storage._cdata)
        if memory is None or memory.storage.expired():
            memory = _Memory(StorageWeakRef(storage), home, (home, 0))
            self._known[storage._cdata] = memory
        return memory

    def _freed(self, place: Callable[[], str]) -> None:
        for key, memory in [item for item in self._shared.items() if item[1].storage.expired()]:
            del self._shared[key]
            clock = self._clocks[memory.home]
            late = [use for use in memory.reads.items() if use[0] not in (memory.home, *memory.recorded)]
            if not all(_knows(clock, use) or _knows(self.host, use) for use in late):
                self.races[f"freed while it is used, without record_stream: before {place()}"] += 1


class _Runtime:
    """CUDA's way, as far as it registers host memory."""

    @staticmethod
    def cudaHostRegister(*_: Any) -> int:
        return 0

    @staticmethod
    def cudaHostUnregister(*_: Any) -> int:
        return 0


def _recording(streams: Streams) -> Callable[[Tensor, Stream], None]:
    """`Tensor.record_stream`; a bound method as an attribute of the class would not get the tensor."""

    def record_stream(tensor: Tensor, stream: Stream) -> None:
        streams.recorded(tensor, stream)

    return record_stream


def _knows(clock: Clock, use: tuple[int, int]) -> bool:
    return clock.get(use[0], 0) >= use[1]


def _merge(clock: Clock, other: Clock) -> None:
    for number, count in other.items():
        clock[number] = max(clock.get(number, 0), count)
