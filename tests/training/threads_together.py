"""Processes of a run as threads of one process: each has a model of its own, and they meet where processes would."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from torch import Tensor

from lorasmith.core.errors import LorasmithError
from lorasmith.core.processes import Processes
from tests.launched import LONG_S

T = TypeVar("T")


class _Meeting:
    """Where threads exchange values, one exchange after the other, each of one kind."""

    def __init__(self, size: int) -> None:
        self.bytes_summed = 0
        self._barrier = threading.Barrier(size, timeout=LONG_S)
        self._told: list[Any] = [None] * size

    def exchanged(self, rank: int, kind: str, value: Any) -> list[Any]:
        self._told[rank] = (kind, value)
        self._barrier.wait()
        told = list(self._told)
        self._barrier.wait()
        assert len({kind for kind, _ in told}) == 1, f"processes do different things: {told}"
        return [value for _, value in told]

    def end(self) -> None:
        self._barrier.abort()


class ThreadTogether(Processes):
    """One of several threads."""

    def __init__(self, rank: int, size: int, meeting: _Meeting) -> None:
        self.rank, self.size, self.gpu = rank, size, rank
        self._meeting = meeting

    def summing(self, tensor: Tensor) -> Callable[[], object]:
        whole = sum(self._meeting.exchanged(self.rank, f"sum of {tuple(tensor.shape)}", tensor.clone()))
        if self.is_first:
            self._meeting.bytes_summed += tensor.nbytes
        tensor.copy_(whole)
        return lambda: None

    @property
    def bytes_summed(self) -> int:
        """Bytes of all tensors that were summed so far."""
        return self._meeting.bytes_summed

    def summed(self, numbers: Sequence[int]) -> list[int]:
        return [sum(column) for column in zip(*self.gathered(list(numbers)), strict=True)]

    def gathered(self, value: T) -> list[T]:
        return self._meeting.exchanged(self.rank, "gathered", value)

    def broadcast_from_rank0(self, make: Callable[[], T]) -> T:
        made: Any = None
        if self.is_first:
            try:
                made = make()
            except LorasmithError as error:
                made = error
        first = self._meeting.exchanged(self.rank, "from first", made)[0]
        if isinstance(first, LorasmithError):
            raise first
        return first  # type: ignore[no-any-return]


def run_together(size: int, one: Callable[[ThreadTogether], T]) -> list[T]:
    """Run a function as each of several processes; returns what each of them returns, by rank."""
    meeting = _Meeting(size)

    def process(rank: int) -> T:
        try:
            return one(ThreadTogether(rank, size, meeting))
        except BaseException:
            meeting.end()
            raise

    with ThreadPoolExecutor(size) as pool:
        waiting = [pool.submit(process, rank) for rank in range(size)]
        errors = [error for each in waiting if (error := each.exception()) is not None]
        for error in sorted(errors, key=lambda each: isinstance(each, threading.BrokenBarrierError)):
            raise error
        return [each.result() for each in waiting]
